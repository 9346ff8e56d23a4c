"""Operation counts: against the closed formula of a Wan-class transformer, and node by node against sums done by hand."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from helpers import TINY
from onnx import TensorProto, helper

from factorportrait.benchmarks.flops import chunk_work, count_graph, count_model
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.model_config import ModelConfig
from factorportrait.runtime.session import SessionOptions

WAN_1_3B = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "text_dim": 4096}
TEXT_TOKENS = 512


def closed_formula(config: ModelConfig, frames: int, past: int, blocks: int) -> float:
    """QKVO 8SD^2, attention 4SKD, feed-forward 4SDF, cross-attention's Q and O 4SD^2 and its products 4SLD."""
    dim, ffn, tokens = config.dit.dim, config.dit.ffn_dim, config.tokens_per_frame
    length, keys = frames * tokens, (frames + past) * tokens
    block = 8 * length * dim**2 + 4 * length * keys * dim + 4 * length * dim * ffn
    if config.dit.text_dim is not None:
        block += 4 * length * dim**2 + 4 * length * TEXT_TOKENS * dim
    return blocks * block


@pytest.fixture(scope="module")
def wan_block() -> tuple[ModelConfig, onnx.ModelProto]:
    """One block of Wan 1.3B at its real widths for 512 x 512 pixels; its weights, which nobody counts, are zeros."""
    import onnx_ir

    from factorportrait.export.graphs import export_stage
    from factorportrait.export.models.dit import WanDiT
    from factorportrait.export.stages import DIT_SHAPES, DiTRange, Stage

    data = copy.deepcopy(TINY) | {"height": 512, "width": 512, "dit": WAN_1_3B | {"num_layers": 1}}
    data["generation"] = data["generation"] | {"max_clip_frames": 21}
    config = ModelConfig.from_dict(data)
    with torch.device("meta"):
        dit = WanDiT(config.dit, config.fusion, config.latent_height, config.latent_width)
    dit.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in dit.parameters():
            tensor.zero_()
    dit._build_rotary_tables()
    module = DiTRange(dit.requires_grad_(False), 0, 1).eval()
    tokens, dim, frames, past = config.tokens_per_frame, config.dit.dim, 3, 5
    shapes = {
        "noise_latents": (1, 16, frames, config.latent_height, config.latent_width), "condition_tokens": (1, frames, tokens, dim),
        "expression_modulation": (1, frames, 6, dim), "temb": (1, frames, dim), "timestep_proj": (1, frames, 6, dim),
    }  # fmt: skip
    arguments = []
    for name in module.input_names:
        if name in shapes:
            arguments.append(torch.zeros(shapes[name]))
        elif name.endswith("positions"):
            arguments.append(torch.zeros(frames if name == "positions" else past, dtype=torch.int64))
        else:
            arguments.append(torch.zeros((1, past, tokens, dim) if name.startswith("past") else (1, 7, dim)))
    names = module.input_names
    stage = Stage(
        "dit", module, tuple(arguments), names, module.output_names, {name: DIT_SHAPES[name.split(".")[0]] for name in names}
    )
    model = onnx_ir.to_proto(export_stage(stage))
    return config, model


@pytest.mark.parametrize(("frames", "past", "tera"), [(22, 0, 152.0), (3, 0, 9.7)])
def test_wan_counts_what_the_closed_formula_says(wan_block, frames, past, tera):
    config, model = wan_block
    work = count_model(model, {"F": frames, "P": past, "L": TEXT_TOKENS})
    assert work.flops == pytest.approx(closed_formula(config, frames, past, blocks=1), rel=0.01)
    assert 30 * work.flops == pytest.approx(tera * 1e12, rel=0.01)


def test_what_is_looked_back_on_counts_as_keys(wan_block):
    config, model = wan_block
    work = count_model(model, {"F": 3, "P": 7, "L": TEXT_TOKENS})
    assert work.flops == pytest.approx(closed_formula(config, 3, 7, blocks=1), rel=0.01)
    keys = 10 * config.tokens_per_frame
    attention = 4 * 3 * config.tokens_per_frame * (keys + TEXT_TOKENS) * config.dit.dim
    assert work.flops_by_kind["attention"] == pytest.approx(attention, rel=1e-6)


def graph(nodes, inputs: dict, outputs: list[str], weights: dict) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    kept = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, bytes(4 * torch.Size(shape).numel()), raw=True)
        for name, shape in weights.items()
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "g", values, ends, kept), opset_imports=[helper.make_opsetid("", 23)])


def test_products_by_hand():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),  # [2,8,5,5]
        helper.make_node("Conv", ["y", "depthwise"], ["z"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["z"], ["flat"]),
        helper.make_node("Gemm", ["flat", "dense"], ["out"], transB=1),  # [2,200] x [3,200]
    ]
    model = graph(
        nodes, {"x": ["B", 4, 10, 10]}, ["out"], {"w": [8, 4, 3, 3], "depthwise": [8, 1, 3, 3], "dense": [3, 200]}
    )
    work = count_model(model, {"B": 2})
    assert work.flops_by_kind["conv"] == 2 * (2 * 8 * 25) * 36 + 2 * (2 * 8 * 25) * 9
    assert work.flops_by_kind["linear"] == 2 * 2 * 200 * 3
    assert work.bytes == 4 * (2 * 4 * 100 + 2 * 3 + 8 * 36 + 8 * 9 + 600)


def test_a_product_of_two_activations_is_attention_and_unpacked_weights_stay_weights():
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
        helper.make_node("Transpose", ["y"], ["yt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["y", "yt"], ["scores"]),
    ]
    work = count_model(graph(nodes, {"x": [1, "S", 6]}, ["scores"], {"w": [5, 6]}), {"S": 4})
    assert work.flops_by_kind == {"linear": 2 * 4 * 6 * 5, "attention": 2 * 4 * 4 * 5}


def test_sizes_that_are_not_given_are_named():
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, "S", 6]}, ["y"], {"w": [6, 5]})
    with pytest.raises(UserError, match="size S"):
        count_model(model, {"F": 3})


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "dit.onnx"
    path.write_bytes(b"\x00not a graph")
    with pytest.raises(UserError, match="fp-export"):
        count_graph(path, {})


@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_a_chunk_of_a_bundle_has_every_stage(tiny_bundle, mode):
    bundle = Bundle(tiny_bundle)
    options = SessionOptions(mode=mode, steps=2, guidance="2").resolve(bundle.config)
    works = chunk_work(bundle, options, num_frames=9, coefficients=False)
    stages = {"expression", "pose", "conditions", "step.0", "step.1", "steps", "decode"}
    assert set(works) == stages | ({"commit"} if mode == "stream" else set())
    single = chunk_work(bundle, SessionOptions(mode=mode, steps=2).resolve(bundle.config), num_frames=9, coefficients=True)
    # Guidance evaluates two sets of conditions.
    assert works["step.0"].flops == pytest.approx(2 * single["step.0"].flops)
    whole = sum(work.flops for name, work in works.items() if name in ("conditions", "step.0", "step.1", "commit"))
    assert works["steps"].flops == pytest.approx(whole)
    assert single["expression"].flops < works["expression"].flops
    assert all(work.flops > 0 and 0 < work.bytes <= work.node_bytes for work in works.values())
    few = SessionOptions(mode=mode, steps=2, guidance="2", guidance_steps=1).resolve(bundle.config)
    few = chunk_work(bundle, few, num_frames=9, coefficients=False)
    assert few["step.0"].flops == 2 * few["step.1"].flops == works["step.0"].flops
    cached = SessionOptions(mode=mode, steps=2, step_cache=0.5).resolve(bundle.config)
    assert not any(name.startswith("step") for name in chunk_work(bundle, cached, num_frames=9, coefficients=False))


def test_a_quantised_convolution_with_channels_last():
    """1 x 6 x 8 cells of 4 channels to 5, 3 x 3 taps, in ONNX Runtime's operator."""
    weight = helper.make_tensor("w", TensorProto.INT8, (5, 4, 3, 3), bytes(180), raw=True)
    scales = [helper.make_tensor(name, TensorProto.FLOAT, (), [1.0]) for name in ("xs", "ws", "ys")]
    zeros = [helper.make_tensor(f"{name}z", kind, (), [0]) for name, kind in (("x", 2), ("w", 3), ("y", 2))]
    conv = helper.make_node(
        "QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"],
        domain="com.microsoft", channels_last=1, pads=(1, 1, 1, 1),
    )  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name, shape in (("x", (1, "h", 8, 4)), ("y", None))]
    graph = helper.make_graph([conv], "g", values[:1], values[1:], [weight, *scales, *zeros])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)])
    work = count_model(model, {"h": 6})
    assert work.flops_by_kind == {"conv": 2 * 6 * 8 * 5 * 4 * 9}
