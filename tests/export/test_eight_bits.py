"""Weights in eight bits, and products in fp8: what is rounded, how far that is from the float graph, and what is stored."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from factorportrait.export import weight_only
from factorportrait.export.activations import largest_activations
from factorportrait.export.check import angle
from factorportrait.export.fp8 import FP8_MAX, _scale, fp8_graph
from factorportrait.export.graphs import WeightFiles, export_stage, write_graph
from factorportrait.export.precision import HalfWeights
from factorportrait.export.stages import dit_stage
from factorportrait.export.weight_only import quantize_weights, rounded_layers


def run(path, feeds):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def block(request, tiny_model, tmp_path_factory):
    """The second block and the head: precision, graph, inputs and what the float graph makes of them."""
    stage = dit_stage(tiny_model, 1, 2)
    if request.param == "fp16":
        stage = HalfWeights(tiny_model).stage(stage)
    graph = export_stage(stage)
    feeds = {name: tensor.numpy() for name, tensor in zip(stage.input_names, stage.args, strict=True)}
    folder = tmp_path_factory.mktemp("float")
    write_graph(graph.clone(), folder, "float")
    return request.param, graph, feeds, run(folder / "float.onnx", feeds)


def test_weights_in_eight_bits(block, tmp_path):
    precision, graph, feeds, expected = block
    small = quantize_weights("dit", graph.clone(), 2, half=precision == "fp16")
    assert [path.name for path in tmp_path.iterdir()] == []
    files = write_graph(small, tmp_path, "small", WeightFiles(tmp_path, "dit"))
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    operators = Counter(node.op_type for node in small.graph)
    # q, k, v, o and two of the feed-forward; the head's stays float.
    assert operators["DequantizeLinear"] == 6 and "QuantizeLinear" not in operators
    assert "dit.int8.data" in files
    # Four projections and the feed-forward, a byte each.
    assert (tmp_path / "dit.int8.data").stat().st_size >= 4 * 64 * 64 + 2 * 64 * 128
    found = run(tmp_path / "small.onnx", feeds)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and 0 < angle(a, b) < 1e-3


def test_fp8(block, tmp_path):
    precision, graph, feeds, expected = block
    if precision != "fp16":
        pytest.skip("fp8 is made of the fp16 graph")
    small = fp8_graph(graph.clone(), rounded_layers("dit", graph, 2), [feeds])
    write_graph(small, tmp_path, "fp8")
    onnx.checker.check_model(str(tmp_path / "fp8.onnx"), full_check=True)
    operators = Counter(node.op_type for node in small.graph)
    # q, k and v take one activation, so it is rounded once.
    assert (operators["QuantizeLinear"], operators["DequantizeLinear"]) == (4, 10)
    constants = [value.const_value for value in small.graph.initializers.values()]
    stored = [tensor.numpy().astype(np.float32) for tensor in constants if tensor.dtype == ir.DataType.FLOAT8E4M3FN]
    assert all(np.isfinite(array).all() for array in stored)
    assert max(np.abs(array).max() for array in stored) == FP8_MAX
    # The weights that were rounded are gone, and the graph can be watched as any other.
    assert sum(array.nbytes for array in (tensor.numpy() for tensor in constants) if array.dtype == np.float16) < 20_000
    assert 1 < max(largest_activations(tmp_path / "fp8.onnx", [feeds]).values()) < 1000
    # Three bits of mantissa: a few percent, far from the 1e-6 of fp16 and far from noise.
    found = run(tmp_path / "fp8.onnx", feeds)
    angles = [angle(a, b) for a, b in zip(found, expected, strict=True)]
    assert all(1e-5 < value < 1e-2 for value in angles)


@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.01, 1.0, 448.0, 60000.0])
def test_scale_holds_the_largest(largest):
    scale = float(_scale(largest))
    assert 0 < scale < np.inf and largest / scale <= FP8_MAX


def test_every_rule_has_a_reason():
    table = tomllib.loads(Path(weight_only.__file__).with_name("weight_only.toml").read_text())
    assert all(len(entry["reason"].split()) > 8 and entry["mode"] in ("weights", "float") for entry in table["layer"])
