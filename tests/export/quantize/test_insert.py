"""The graphs: integer kernels on the CPU, TensorRT's conventions, close to fp32, and the layout pass changes no number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from factorportrait.export.quantize.bundles import int8_graph, write_trial
from factorportrait.export.quantize.insert import INT8, LayerRecipe, layers_of, quantize_graph, weight_scales
from factorportrait.export.quantize.layout import channels_last
from factorportrait.export.quantize.recipe import FAMILIES, inline_weights, named_layers, probe_session
from factorportrait.runtime.session import open_bundle


def run(model, path, sample):
    session, names = probe_session(model, path, ())
    return dict(zip(names, session.run(names, dict(sample)), strict=True))


def snr_db(found, expected):
    error = ((found.astype(np.float64) - expected) ** 2).sum()
    return 10 * np.log10((expected.astype(np.float64) ** 2).sum() / max(error, 1e-30))


def optimised_operators(model, tmp_path):
    """Counts of what ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ir.save(inline_weights(model), tmp_path / "graph.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), options, ["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(tmp_path / "optimised.onnx").graph)


@pytest.fixture(params=["dit", "dit_inplace", "vae_encode_first", "vae_encode_steady", "vae_decode_first", "vae_decode_steady"])
def stage(request, graphs):
    return request.param


def test_integer_kernels_run_on_the_cpu(stage, graphs, recipe, tmp_path):
    model = ir.load(graphs[stage])
    wanted = recipe.of(stage, model)
    num_int8 = sum(layer.mode == INT8 for layer in wanted.values())
    kinds = {layer.name: layer.kind for layer in layers_of(model)}
    products = sum(layer.mode == INT8 and kinds[name] == "MatMul" for name, layer in wanted.items())
    operators = optimised_operators(int8_graph(stage, model, recipe, "cpu"), tmp_path)
    assert num_int8 > 0
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == products
    assert operators["QLinearConv"] == num_int8 - products


def test_cpu_graphs_are_close_to_fp32(stage, graphs, recipe, recorded):
    if stage == "dit_inplace":
        pytest.skip("the tiny model's window is no multiple of its chunk, so it runs dit")
    sample = recorded[stage][-1]
    expected = run(ir.load(graphs[stage]), graphs[stage], sample)
    model = ir.load(graphs[stage])
    found = run(quantize_graph(model, recipe.of(stage, model), "cpu"), graphs[stage], sample)
    for name, value in expected.items():
        if name != "frames":
            assert snr_db(found[name], value) > 20, name
    assert all(value.dtype == expected[name].dtype for name, value in found.items())


def test_channels_last_changes_layout_and_nothing_else(stage, graphs, recipe, recorded):
    if not stage.startswith("vae"):
        pytest.skip("a transformer has no convolutions")
    sample = recorded[stage][-1]
    models = [ir.load(graphs[stage]) for _ in range(2)]
    for model in models:
        quantize_graph(model, recipe.of(stage, model), "cpu")
    expected = run(models[0], graphs[stage], sample)
    moved = {
        name: np.ascontiguousarray(value.transpose(0, 2, 3, 1)) if name.startswith("cache_in.") else value
        for name, value in sample.items()
    }
    found = run(channels_last(models[1]), graphs[stage], moved)
    for name, value in expected.items():
        again = found[name].transpose(0, 3, 1, 2) if name.startswith("cache_out.") else found[name]
        assert snr_db(again, value) > 45, name


def test_tensorrt_pairs_are_symmetric_and_of_the_activations_type(graphs, recipe):
    for stage in ("dit", "vae_decode_steady"):
        model = ir.load(graphs[stage])
        quantize_graph(model, recipe.of(stage, model), "tensorrt")
        pairs = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert pairs
        for node in pairs:
            scale, zero = (node.inputs[i].const_value.numpy() for i in (1, 2))
            assert zero.dtype == np.int8 and not zero.any()
            assert (scale > 0).all() and scale.dtype == np.float32
            # Per channel for weights, one for activations.
            assert scale.ndim == (1 if node.inputs[0].const_value is not None else 0)


def test_scales_of_half_graphs_are_half():
    values = {name: np.full((4, 4), 0.5, np.float16) for name in "w"}
    weights = ir.val("w", const_value=ir.tensor(values["w"], name="w"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([2, 4]))
    node = ir.node("MatMul", [x, weights], name="product")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, ir.Shape([2, 4])
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], initializers=[weights], opset_imports={"": 23}, name="g")
    model = quantize_graph(ir.Model(graph, ir_version=10), {"product": LayerRecipe(INT8, 0.01)}, "tensorrt")
    scales = [node.inputs[1].const_value.dtype for node in model.graph if node.op_type.endswith("Linear")]
    assert scales and set(scales) == {ir.DataType.FLOAT16}


def test_smoothing_folds_into_norm_and_shift(graphs, recipe):
    model = ir.load(graphs["dit"])
    before = Counter(node.op_type for node in model.graph)
    quantize_graph(model, recipe.of("dit", model), "cpu")
    after = Counter(node.op_type for node in model.graph)
    smoothed = {layer.smooth.tobytes() for layer in recipe.layers.values() if layer.smooth is not None}
    # One small product per shift, and none on an activation.
    assert after["Mul"] - before["Mul"] == len(smoothed) == 4
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].producer() is None or not node.inputs[0].name.endswith(".smoothed")


def test_layers_of_a_family_share_numbers(graphs):
    names = {stage: set(named_layers(stage, ir.load(graphs[stage]))) for stage in graphs}
    assert names["dit"] == names["dit_inplace"]
    assert names["vae_decode_first"] <= names["vae_decode_steady"]
    assert all(name.startswith(FAMILIES.get(stage, stage) + "/") for stage, found in names.items() for name in found)


def test_a_channel_of_zeros_has_a_scale():
    weights = np.ones((3, 4), np.float32)
    weights[:, 1] = 0
    assert weight_scales(weights, 1).tolist() == pytest.approx([1 / 127, 1, 1 / 127, 1 / 127])


def test_unknown_layer_is_refused(graphs):
    with pytest.raises(ValueError, match="no layer nobody"):
        quantize_graph(ir.load(graphs["dit"]), {"nobody": LayerRecipe(INT8, 1.0)}, "cpu")


def test_a_trial_bundle_runs_and_is_small(fp32, recipe, clips, tmp_path):
    trial = write_trial(fp32, recipe, tmp_path / "trial")
    trial.verify()
    opened = open_bundle(trial.path, threads=1)
    for mode in ("stream", "clip"):
        session = opened.session(mode=mode)
        session.set_reference(clips[0].portrait)
        assert len(list(session.frames(clips[0].driving))) == len(clips[0].driving)
    stages = trial.manifest.stages
    weights = trial.manifest.bytes_of(stages["dit"], stages["dit_inplace"])
    assert weights < 0.8 * fp32.manifest.bytes_of(fp32.stage("dit"), fp32.stage("dit_inplace"))
