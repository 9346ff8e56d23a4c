"""What counts as equal, and that a graph which is not is refused."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch

from factorportrait.bundle import Bundle, TensorSpec
from factorportrait.errors import UserError
from factorportrait.export.build import OFFERED
from factorportrait.export.check import (
    DIT_CASES,
    Cases,
    GraphCheck,
    Threshold,
    angle,
    check_graph,
    relative_error,
    threshold,
)
from factorportrait.export.graphs import export_stage, tensor_specs, write_graph
from factorportrait.export.stages import EXAMPLE_FRAMES, EXAMPLE_PAST, dit_stage, stages_of

STRICT = Threshold(1e-4, 1e-8, "a test")


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """time_embed: stage, graph file, outputs, cases."""
    stage = next(stage for stage in stages_of(tiny_model) if stage.name == "time_embed")
    graph = export_stage(stage)
    folder = tmp_path_factory.mktemp("graph")
    write_graph(graph, folder, stage.name)
    return stage, folder / "time_embed.onnx", tensor_specs(graph.graph.outputs), Cases(tiny_model).of(stage)


@pytest.mark.parametrize(
    "found, expected, error",
    [
        ([1.0, 2.0], [1.0, 2.0], (0.0, 0.0)),
        ([1.0, 2.5], [1.0, 2.0], (0.5, 0.25)),
        ([0.0], [0.0], (0.0, 0.0)),
        ([], [], (0.0, 0.0)),
        ([1e-9], [0.0], (1e-9, float("inf"))),
        ([float("nan")], [1.0], (float("inf"), float("inf"))),
        ([1.0], [float("inf")], (float("inf"), float("inf"))),
        ([float("nan")], [float("nan")], (float("inf"), float("inf"))),
    ],
)
def test_relative_error(found, expected, error):
    assert relative_error(np.array(found), np.array(expected)) == error


def test_thresholds_have_a_reason():
    assert threshold("fp32").max_relative == 1e-4
    for precision in OFFERED:
        assert len(threshold(precision).reason.split()) > 20


@pytest.mark.parametrize(
    "found, expected, result",
    [([1, 0], [1, 0], 0), ([1, 0], [0, 1], 1), ([1, 0], [-1, 0], 2), ([0, 0], [0, 0], 0), ([1, 0], [0, 0], 1), ([2, 2], [1, 1], 0)],
)
def test_angle(found, expected, result):
    assert angle(np.array(found), np.array(expected)) == pytest.approx(result, abs=1e-12)


@pytest.mark.parametrize(
    "values, words",
    [
        ({}, None),
        ({"max_relative": 2e-4}, "2.0e-04 in velocity"),
        ({"angle": 2e-8}, "2.0e-08"),
        ({"max_relative": float("inf")}, "NaN or infinite values in velocity"),
        ({"max_relative": float("nan")}, "NaN or infinite values in velocity"),
        ({"headroom": 1.5}, "4.367e+04 in blocks.7"),
        ({"headroom": 0.5}, "1.31e+05 in blocks.7"),
        ({"headroom": float("nan")}, "nan in blocks.7"),
        ({"headroom": 2.5}, None),
    ],
)
def test_what_is_objected_to(values, words):
    passing = {"max_abs": 1.0, "max_relative": 1e-5, "worst_output": "velocity", "num_cases": 1, "hottest": "blocks.7"}
    check = GraphCheck(**(passing | values))
    objection = check.objection(Threshold(1e-4, 1e-8, "a test", min_headroom=2.0))
    assert words is None and objection is None or objection[1] == words


def test_every_stage_has_cases_of_other_sizes(tiny_model):
    cases = Cases(tiny_model)
    for stage in stages_of(tiny_model):
        found = cases.of(stage)
        assert len(found) >= 2, stage.name
        for case in found:
            assert list(case) == stage.input_names, stage.name
            for name, example in zip(stage.input_names, stage.args, strict=True):
                assert case[name].dtype == example.dtype
                assert case[name].dim() == example.dim()
        if stage.dynamic_shapes:
            sizes = [[case[name].shape for name in stage.input_names] for case in found]
            assert [tensor.shape for tensor in stage.args] not in sizes
    assert (1, 0) in DIT_CASES and (EXAMPLE_FRAMES, EXAMPLE_PAST) not in DIT_CASES
    half = dit_stage(tiny_model, 1, 2)
    assert all(set(half.input_names) <= set(case) for case in cases.of(half))


def test_the_vae_is_checked_on_pictures(tiny_model):
    """Values in range, different from frame to frame, and latents of the encoder."""
    cases = Cases(tiny_model)
    stages = {stage.name: stage for stage in stages_of(tiny_model)}
    for case in cases.of(stages["vae_encode_steady"]):
        frames = case["frames"]
        assert frames.abs().max() <= 1 and frames.std() > 0.1
        assert (frames[:, :, 1:] - frames[:, :, :-1]).abs().mean() > 1e-3
        assert all(case[name].abs().max() > 0 for name in case)
    for case in cases.of(stages["vae_decode_steady"])[1:]:
        assert all(case[name].abs().max() > 0 for name in case)


def test_all_graphs_of_the_bundle_passed(tiny_bundle):
    for stage in Bundle(tiny_bundle).manifest.stages.values():
        assert 0 <= stage.check["max_relative"] <= threshold("fp32").max_relative, stage.name
        assert stage.check["num_cases"] >= 2


def test_equal(exported):
    stage, path, outputs, cases = exported
    check = check_graph(path, stage, outputs, cases)
    assert check.max_relative < 1e-5 and check.angle < 1e-9 and check.num_cases == 2
    assert check.objection(STRICT) is None


def test_another_weight_is_noticed(exported):
    stage, path, outputs, cases = exported
    changed = copy.deepcopy(stage)
    with torch.no_grad():
        changed.module.module.time_projection[1].bias[5] += 0.01
    expected, found = check_graph(path, changed, outputs, cases).objection(STRICT)
    assert "at most 1.0e-04" in expected and found.endswith("timestep_proj")


def test_no_number_is_noticed(exported):
    """Neither side may have it: a module that gives NaN is no reference."""
    stage, path, outputs, cases = exported
    changed = copy.deepcopy(stage)
    with torch.no_grad():
        changed.module.module.time_projection[1].bias[5] = float("nan")
    assert check_graph(path, changed, outputs, cases).objection(STRICT)[1] == "NaN or infinite values in timestep_proj"
    half = check_graph(path, stage, outputs, cases, half=changed)
    assert half.objection(STRICT)[1] == "NaN or infinite values in timestep_proj"


def test_another_size_is_noticed(exported):
    stage, path, outputs, cases = exported
    wrong = (TensorSpec("temb", "float32", (1, 7, 64)), *outputs[1:])
    with pytest.raises(UserError, match=r"temb float32 \[1, 7, 64\]"):
        check_graph(path, stage, wrong, cases)


def test_invalid_graph_is_noticed(exported, tmp_path):
    stage, path, outputs, cases = exported
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(UserError, match="expected a valid ONNX graph"):
        check_graph(tmp_path / "bad.onnx", stage, outputs, cases)
