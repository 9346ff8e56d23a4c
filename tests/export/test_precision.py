"""fp16: which weights stay fp32, what passes between graphs, and that no number is lost."""

from __future__ import annotations

import copy
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from helpers import difference
from wan_models import small

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.export import precision
from factorportrait.export.activations import in_fp32, largest_activations
from factorportrait.export.attention import decompose_attention, head_widths
from factorportrait.export.check import Cases, threshold
from factorportrait.export.graphs import export_stage, write_graph
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.precision import HALF_MAX, HalfWeights, half_recipe
from factorportrait.export.stages import dit_stage, stages_of


def run(path, feeds):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.fixture(scope="module")
def half_block(tiny_model):
    """The second block and the head in half precision."""
    return HalfWeights(tiny_model).stage(dit_stage(tiny_model, 1, 2))


@pytest.fixture(scope="module")
def half_graph(half_block):
    return export_stage(half_block)


def test_every_exception_has_a_reason_and_a_use(tiny_model):
    table = tomllib.loads(Path(precision.__file__).with_name("precision.toml").read_text())
    assert all(len(entry["reason"].split()) > 10 for entry in (*table["kept"], table["boundary"]))
    names = [name for name, _ in tiny_model.named_parameters()]
    # Parts that only other systems have.
    animate = small("Wan2.2-Animate-14B")
    names += [name for name, _ in WanDiT(animate.dit, animate.fusion, 4, 4).named_parameters()]
    for kept in half_recipe().kept:
        assert any(fnmatchcase(name, pattern) for name in names for pattern in kept.parameters), kept
    # And they are exceptions: all but a few of the weights are fp16.
    sizes = {name: parameter.numel() for name, parameter in tiny_model.named_parameters()}
    assert sum(size for name, size in sizes.items() if half_recipe().keeps(name)) < 0.25 * sum(sizes.values())


def test_half_weights(tiny_model):
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    stage = dit_stage(tiny_model)
    half = HalfWeights(tiny_model).stage(stage)
    for name, parameter in half.module.named_parameters():
        kept = half_recipe().keeps(name)
        assert parameter.dtype == (torch.float32 if kept else torch.float16), name
        assert difference(parameter.float(), before[name]) <= (0 if kept else 2**-11), name
    # The model that it was made of is as it was.
    assert all(torch.equal(parameter, before[name]) for name, parameter in tiny_model.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in stage.module.parameters())


def test_what_passes_between_stages(tiny_fp16_bundle):
    """Bulk in half, what the host computes with in fp32; the same type on both sides of every pair."""
    manifest = Bundle(tiny_fp16_bundle).manifest
    for target in manifest.targets:
        for stage in manifest.target_stages(target).values():
            for spec in (*stage.inputs, *stage.outputs):
                expected = "float16" if half_recipe().is_half(spec.name) else "float32"
                assert spec.dtype in (expected, "int64"), (stage.name, spec)
    found = {spec.name: spec.dtype for stage in manifest.stages.values() for spec in (*stage.inputs, *stage.outputs)}
    assert found["past_k.0"] == found["new_v.1"] == found["cache_in.0"] == found["condition_tokens"] == "float16"
    assert found["velocity"] == found["temb"] == found["frames"] == found["state_out.0"] == "float32"
    assert found["positions"] == "int64"


def test_the_bundle_passed_and_is_half_the_size(tiny_fp16_bundle, tiny_bundle):
    half, whole = Bundle(tiny_fp16_bundle), Bundle(tiny_bundle)
    limit = threshold("fp16")
    checks = {stage.name: stage.check for stage in half.manifest.stages.values()}
    for name, check in checks.items():
        assert 0 < check["max_relative"] <= limit.max_relative and check["angle"] <= limit.max_angle, name
        assert check.get("headroom", limit.min_headroom) >= limit.min_headroom, name
    assert checks["dit"]["headroom"] > 10 and "headroom" not in checks["time_embed"]
    # Half of the weights; a tiny graph is mostly nodes.
    sizes = [sum(path.stat().st_size for path in bundle.path.glob("dit.fp*.data")) for bundle in (half, whole)]
    assert sizes[0] < 0.75 * sizes[1]


def test_attention_and_norms_in_their_types(half_graph, tmp_path):
    """Queries and keys are half before their product; the operators that must be fp32 are."""
    write_graph(half_graph.clone(), tmp_path, "block")
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "block.onnx"), data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    wanted = {"Attention": "FLOAT16", "MatMul": "FLOAT16", "Gelu": "FLOAT16", "RotaryEmbedding": "FLOAT"}
    wanted |= {"LayerNormalization": "FLOAT", "RMSNormalization": "FLOAT"}
    seen = set()
    for node in graph.node:
        if node.op_type in wanted:
            seen.add(node.op_type)
            assert {onnx.TensorProto.DataType.Name(types[name]) for name in node.input if name} == {wanted[node.op_type]}, node.name
    assert seen == wanted.keys()


def test_a_weight_beyond_fp16(tiny_model):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.dit.blocks[0].ffn[0].weight[0, 0] = 70000
    words = r"dit.blocks.0.ffn.0.weight; expected .* 65504; found 7e\+04; export with --precision fp32"
    with pytest.raises(UserError, match=words):
        HalfWeights(model)


def test_zeros_stay_zeros_in_half_norms(tiny_model):
    """A vector of zeros has a scale that fp16 cannot hold."""
    norm = copy.deepcopy(tiny_model.vae.encoder.middle[0].residual[0]).half()
    x = torch.zeros(1, norm.gamma.numel(), 2, 2, dtype=torch.float16)
    assert torch.equal(norm(x), x)


def test_activations_are_found_where_they_overflow(tiny_model, half_block, half_graph, tmp_path):
    stage = dit_stage(tiny_model, 1, 2)
    cases = [{name: case[name].numpy() for name in stage.input_names} for case in Cases(tiny_model).of(stage)[:2]]
    write_graph(half_graph.clone(), tmp_path, "block")
    sizes = largest_activations(tmp_path / "block.onnx", cases)
    assert max(sizes.values()) < 1000 and len(sizes) > 20
    # By hand: what leaves the block and enters the head's matrix product.
    with torch.no_grad():
        keys = [stage.module(*(torch.from_numpy(case[name]) for name in stage.input_names))[1] for case in cases]
    new_k = max(float(tensor.abs().max()) for tensor in keys)
    assert any(abs(size / new_k - 1) < 1e-2 for size in sizes.values())
    large = half_graph.clone()
    weights = next(value for name, value in large.graph.initializers.items() if name.endswith("ffn.0.bias"))
    weights.const_value = ir.tensor(np.full(weights.shape, 60000, np.float16), name=weights.name)
    write_graph(large, tmp_path, "large")
    sizes = largest_activations(tmp_path / "large.onnx", cases)
    assert max(sizes.values()) > HALF_MAX
    # The real graph overflows there.
    feeds = dict(zip(half_block.input_names, (tensor.numpy() for tensor in half_block.args), strict=True))
    assert not np.isfinite(run(tmp_path / "large.onnx", feeds)[0]).all()


def test_the_fp32_twin_has_no_half(half_graph):
    twin = in_fp32(half_graph.clone())
    assert not any(value.dtype == ir.DataType.FLOAT16 for value in (*twin.graph.inputs, *twin.graph.initializers.values()))
    casts = [node.attributes["to"].value for node in twin.graph if node.op_type == "Cast"]
    assert casts and ir.DataType.FLOAT16 not in casts


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_attention_written_out(tiny_model, half_graph, half_block, tmp_path, dtype):
    stage = half_block if dtype == ir.DataType.FLOAT16 else dit_stage(tiny_model, 1, 2)
    graph = half_graph if dtype == ir.DataType.FLOAT16 else export_stage(stage)
    assert head_widths(graph) == [32]
    plain = decompose_attention(graph, dtype)
    assert head_widths(graph) == [32] and head_widths(plain) == []
    feeds = dict(zip(stage.input_names, (tensor.numpy() for tensor in stage.args), strict=True))
    for name, model in (("fused", graph.clone()), ("plain", plain)):
        write_graph(model, tmp_path, name)
    onnx.checker.check_model(str(tmp_path / "plain.onnx"), full_check=True)
    fused, found = (run(tmp_path / f"{name}.onnx", feeds) for name in ("fused", "plain"))
    limit = 2e-3 if dtype == ir.DataType.FLOAT16 else 1e-5
    assert max(difference(a.astype(float), b.astype(float)) for a, b in zip(found, fused, strict=True)) <= limit


def test_only_plain_attention_is_written_out(half_graph):
    graph = half_graph.clone()
    node = next(node for node in graph.graph if node.op_type == "Attention")
    node.attributes.add(ir.AttrInt64("is_causal", 1))
    with pytest.raises(RuntimeError, match="q, k and v alone"):
        decompose_attention(graph, ir.DataType.FLOAT16)


def test_targets_share_weights(tiny_fp16_bundle):
    """TensorRT's own graph of the cache in place refers to the files of the others, and its cache has a fixed size."""
    bundle = Bundle(tiny_fp16_bundle)
    generation, tokens = bundle.config.generation, bundle.config.tokens_per_frame
    shared, own = bundle.stage("dit_inplace"), bundle.stage("dit_inplace", "tensorrt")
    assert own.file != shared.file and own.data == shared.data == bundle.stage("dit").data
    assert own.input("cache_k.0").shape == (1, 1, (1 + generation.window_frames) * tokens, bundle.config.dit.dim)
    assert bundle.stage("dit", "tensorrt") == bundle.stage("dit", "cuda")
    assert list(stage for stage in bundle.manifest.variants["tensorrt"]) == ["dit_inplace"]


def test_every_stage_can_be_half(tiny_model):
    """And all that it takes and gives is as the table says, in torch."""
    weights = HalfWeights(tiny_model)
    for stage in stages_of(tiny_model):
        half = weights.stage(stage)
        with torch.no_grad():
            found = half.module(*half.args)
        found = [found] if isinstance(found, torch.Tensor) else found
        for name, tensor in zip(half.output_names, found, strict=True):
            assert tensor.dtype == (torch.float16 if half_recipe().is_half(name) else torch.float32), (stage.name, name)
            assert tensor.isfinite().all(), (stage.name, name)
