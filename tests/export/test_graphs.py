"""torch -> ONNX: operators, names, sizes, bytes."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import difference

import factorportrait.bundle
from factorportrait.bundle import Bundle
from factorportrait.export.graphs import WeightFiles, export_stage, weight_bytes, write_graph
from factorportrait.export.stages import dit_inputs, dit_stage, stages_of

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def half(tiny_model):
    """The second block and the head: a graph of its own."""
    stage = dit_stage(tiny_model, 1, 2)
    return stage, export_stage(stage)


@pytest.fixture(scope="module")
def small_stage(tiny_model):
    return next(stage for stage in stages_of(tiny_model) if stage.name == "time_embed")


def test_operators(tiny_bundle):
    operators = Counter(node.op_type for node in onnx.load(tiny_bundle / "dit.onnx").graph.node)
    # Two blocks: one attention, and queries and keys rotated and normalised.
    assert operators["Attention"] == 2
    assert operators["RotaryEmbedding"] == 4
    assert operators["RMSNormalization"] == 4
    assert operators["LayerNormalization"] == 5
    assert not {"If", "Loop", "Softmax", "GatherND", "Conv", "Cast"} & operators.keys()


def test_weights_are_rearranged_at_export(tiny_bundle):
    """A convolution's weight is a constant, not the result of operators that run each time."""
    for file in tiny_bundle.glob("vae_*.onnx"):
        graph = onnx.load(file).graph
        constants = {tensor.name for tensor in graph.initializer}
        assert all(node.input[1] in constants for node in graph.node if node.op_type == "Conv"), file.name


def test_specs_are_those_of_the_table(tiny_bundle):
    stages = Bundle(tiny_bundle).manifest.stages
    described = {name: [spec.describe() for spec in (*stage.inputs, *stage.outputs)] for name, stage in stages.items()}
    assert described["arkit_encoder"] == ["coefficients float32 [B, 52]", "code float32 [B, 16]"]
    assert described["expression_controller"][0] == "codes float32 [1, 4*N, 16]"
    assert described["expression_controller"][3] == "expression_modulation float32 [1, N, 6, 64]"
    assert described["time_embed"] == [
        "timesteps float32 [1, F]", "temb float32 [1, F, 64]", "timestep_proj float32 [1, F, 6, 64]",
    ]  # fmt: skip
    assert described["dit"] == [
        "noise_latents float32 [1, 16, F, 4, 4]", "condition_tokens float32 [1, F, 4, 64]",
        "expression_modulation float32 [1, F, 6, 64]", "temb float32 [1, F, 64]", "timestep_proj float32 [1, F, 6, 64]",
        "positions int64 [F]", "past_positions int64 [P]",
        *(f"past_{part}.{i} float32 [1, P, 4, 64]" for i in range(2) for part in "kv"),
        "velocity float32 [1, 16, F, 4, 4]",
        *(f"new_{part}.{i} float32 [1, F, 4, 64]" for i in range(2) for part in "kv"),
    ]  # fmt: skip


@pytest.mark.parametrize("frames, past", [(1, 0), (1, 1), (2, 0), (5, 9)])
def test_other_sizes(tiny_model, tiny_bundle, frames, past):
    session = onnxruntime.InferenceSession(tiny_bundle / "dit.onnx", providers=["CPUExecutionProvider"])
    inputs = dit_inputs(tiny_model, frames, past, seed=9)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = dit_stage(tiny_model).module(*inputs.values())
    assert max(difference(a, b.numpy()) for a, b in zip(found, expected, strict=True)) <= TOLERANCE


def test_a_range_of_blocks(tiny_model, half, tmp_path):
    stage, graph = half
    assert write_graph(graph, tmp_path, stage.name) == ["dit_1_2.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "dit_1_2.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in zip(stage.input_names, stage.args, strict=True)})
    with torch.no_grad():
        expected = stage.module(*stage.args)
    assert max(difference(a, b.numpy()) for a, b in zip(found, expected, strict=True)) <= TOLERANCE


def test_weights_beside_the_graph(half, tmp_path):
    """As for graphs above 2 GB, and for graphs that share them; same results as with the weights inside."""
    stage, graph = half
    (tmp_path / "inside").mkdir()
    write_graph(graph.clone(), tmp_path / "inside", "graph")
    folder = tmp_path / "beside"
    folder.mkdir()
    weights = WeightFiles(folder, "family")
    assert write_graph(graph.clone(), folder, "graph", weights) == ["graph.onnx", "family.fp32.data"]
    large = (folder / "family.fp32.data").stat().st_size
    assert large > 0.8 * weight_bytes(graph)
    assert (folder / "graph.onnx").stat().st_size < 0.3 * large
    # A second graph of the same weights adds none.
    assert write_graph(graph.clone(), folder, "again", weights) == ["again.onnx", "family.fp32.data"]
    assert (folder / "family.fp32.data").stat().st_size == large
    assert (folder / "again.onnx").read_bytes() == (folder / "graph.onnx").read_bytes()
    onnx.checker.check_model(str(folder / "graph.onnx"), full_check=True)
    feeds = {name: tensor.numpy() for name, tensor in zip(stage.input_names, stage.args, strict=True)}
    inside, beside = (
        onnxruntime.InferenceSession(tmp_path / place / "graph.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
        for place in ("inside", "beside")
    )
    assert all(np.array_equal(a, b) for a, b in zip(inside, beside, strict=True))


def test_same_weights_same_bytes(half, tmp_path):
    stage, graph = half
    write_graph(graph, tmp_path, "one")
    write_graph(export_stage(stage), tmp_path, "two")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_nothing_of_the_machine_in_a_bundle(tiny_bundle, tiny_checkpoint):
    """No path and no line of source, in graphs or manifest."""
    places = [Path(torch.__file__).parent.parent, Path(factorportrait.bundle.__file__).parent.parent, Path.home(), tiny_checkpoint]
    forbidden = [str(place).encode() for place in (*places, Path(tempfile.gettempdir())) if len(place.parts) > 1]
    forbidden += [b"stack_trace", b"Traceback", b"site-packages", b'File "']
    for file in tiny_bundle.iterdir():
        content = file.read_bytes()
        # A path has something after it; a bare word such as /tmp may stand in random weights.
        assert not [text for text in forbidden if re.search(re.escape(text) + rb"[/\"_]?", content)], file.name
    graph = onnx.load(tiny_bundle / "dit.onnx")
    assert not graph.metadata_props and not graph.doc_string
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_the_exporter_says_nothing(small_stage, capfd, recwarn):
    export_stage(small_stage)
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert not recwarn.list
