"""LoRA merges: every style of names gives the product by hand, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import save_file
from wan_models import built, lazy, original_of, random_weights, small

from factorportrait.errors import CheckpointError
from factorportrait.export.weights.files import open_weights
from factorportrait.export.weights.lora import merge_lora
from factorportrait.export.weights.networks import Opened, open_transformer

RANK, ALPHA = 4, 6.0
MODULES = ["blocks.0.self_attn.q", "blocks.1.self_attn.o", "blocks.0.cross_attn.k", "blocks.1.ffn.0", "blocks.1.ffn.2"]


@pytest.fixture(scope="module")
def opened() -> Opened:
    network = small("Wan2.1-I2V-14B")
    return Opened(network, lazy(random_weights(network)), "weights", "original")


def factors(opened: Opened, modules=tuple(MODULES), rank=RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shapes = {module: opened.tensors[f"{module}.weight"].shape for module in modules}
    return {
        module: (torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator))
        for module, (m, n) in shapes.items()
    }


def original_style(pairs, alpha=ALPHA) -> dict[str, torch.Tensor]:
    found = {}
    for module, (down, up) in pairs.items():
        found |= {f"diffusion_model.{module}.lora_down.weight": down, f"diffusion_model.{module}.lora_up.weight": up}
        if alpha is not None:
            found[f"diffusion_model.{module}.alpha"] = torch.tensor(alpha)
    return found


def underscores(pairs, alpha=ALPHA) -> dict[str, torch.Tensor]:
    found = {}
    for module, (down, up) in pairs.items():
        stem = "lora_unet_" + module.replace(".", "_")
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return found


def peft(pairs) -> dict[str, torch.Tensor]:
    """Alpha is the rank; the adapter's name is in the keys."""
    found = {}
    for module, (down, up) in pairs.items():
        stem = f"base_model.model.{module}"
        found |= {f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": up * ALPHA / RANK}
    return found


def merged(opened, lora, tmp_path, scale=1.0) -> dict[str, torch.Tensor]:
    save_file({name: tensor.clone() for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    result = merge_lora(opened, open_weights(tmp_path / "lora.safetensors"), scale)
    assert list(result.tensors) == list(opened.tensors)
    return {name: tensor.load() for name, tensor in result.tensors.items()}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("style", ["original", "underscores", "peft", "diffusers"])
def test_every_style_is_the_product(opened, tmp_path, style, scale):
    pairs = factors(opened)
    lora = {"original": original_style, "underscores": underscores, "peft": peft}.get(style, original_style)(pairs)
    if style == "diffusers":
        # diffusers' own conversion of the original style; it scales in place.
        lora = _convert_non_diffusers_wan_lora_to_diffusers({name: tensor.clone() for name, tensor in lora.items()})
        assert "transformer.blocks.0.attn1.to_q.lora_A.weight" in lora
    found = merged(opened, lora, tmp_path, scale)
    for name, tensor in opened.tensors.items():
        expected = tensor.load()
        if (module := name.removesuffix(".weight")) in pairs:
            down, up = pairs[module]
            expected = expected + scale * ALPHA / RANK * (up @ down)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found[name], expected), name


def test_types_are_kept_and_sums_are_rounded_once(opened, tmp_path):
    half = Opened(
        opened.config, lazy({name: t.load().bfloat16() for name, t in opened.tensors.items()}), "weights", "original"
    )
    pairs = factors(half, MODULES[:1])
    found = merged(half, original_style(pairs, None), tmp_path)[f"{MODULES[0]}.weight"]
    down, up = pairs[MODULES[0]]
    expected = (half.tensors[f"{MODULES[0]}.weight"].load().float() + up @ down).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_differences_of_whole_weights_and_biases(opened, tmp_path):
    lora = {
        "diffusion_model.blocks.0.norm3.diff": torch.full((128,), 0.25),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.full((64,), -0.5),
    }
    found = merged(opened, lora, tmp_path, 2.0)
    assert torch.equal(found["blocks.0.norm3.weight"], opened.tensors["blocks.0.norm3.weight"].load() + 0.5)
    assert torch.equal(found["blocks.0.ffn.0.bias"], opened.tensors["blocks.0.ffn.0.bias"].load() - 1.0)


def test_half_of_a_joined_matrix(tmp_path):
    network = small("Wan2.2-Animate-14B")
    opened = Opened(network, lazy(random_weights(network)), "weights", "original")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 128, generator=generator), torch.randn(128, 2, generator=generator)
    lora = {f"transformer.face_adapter.0.to_v.lora_{part}.weight": value for part, value in (("A", down), ("B", up))}
    name = "face_adapter.fuser_blocks.0.linear1_kv.weight"
    before, found = opened.tensors[name].load(), merged(opened, lora, tmp_path)[name]
    assert torch.equal(found[:128], before[:128])
    torch.testing.assert_close(found[128:], before[128:] + up @ down)


def test_a_convolution(opened, tmp_path):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 36, 1, 2, 2, generator=generator), torch.randn(128, 2, 1, 1, 1, generator=generator)
    lora = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up}
    found = merged(opened, lora, tmp_path)["patch_embedding.weight"]
    expected = opened.tensors["patch_embedding.weight"].load() + torch.einsum("or,rcdhw->ocdhw", up.flatten(1), down)
    torch.testing.assert_close(found, expected)


def test_from_files_to_a_network(opened, tmp_path):
    network = opened.config
    weights = {name: tensor.load() for name, tensor in opened.tensors.items()}
    save_file({k: t.contiguous() for k, t in original_of(network, weights).items()}, tmp_path / "dit.safetensors")
    (tmp_path / "lora").mkdir()
    save_file(original_style(factors(opened)), tmp_path / "lora" / "lora.safetensors")
    result = merge_lora(open_transformer(tmp_path / "dit.safetensors"), open_weights(tmp_path / "lora"))
    assert result.notes[-1].endswith("lora.safetensors: 5 modules updated, rank 4, scale 1")
    dit = built(result)
    assert not torch.equal(dit.blocks[0].self_attn.q.weight, weights["blocks.0.self_attn.q.weight"])


def refused(opened, lora, tmp_path) -> str:
    with pytest.raises(CheckpointError) as caught:
        merged(opened, lora, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_ranks(opened, tmp_path):
    lora = original_style(factors(opened, MODULES[:1]))
    lora[f"diffusion_model.{MODULES[0]}.lora_up.weight"] = torch.zeros(128, RANK + 1)
    assert f"{MODULES[0]}; expected an up factor of rank 4, as down has; found shape [128, 5]" in refused(opened, lora, tmp_path)


def test_another_network_s_width(opened, tmp_path):
    lora = original_style({MODULES[0]: (torch.zeros(RANK, 64), torch.zeros(64, RANK))})
    assert "expected a product for shape [128, 128]; found down [4, 64], up [64, 4]" in refused(opened, lora, tmp_path)


def test_another_network_s_names(opened, tmp_path):
    lora = original_style({"blocks.7.self_attn.q": factors(opened)[MODULES[0]]})
    message = refused(opened, lora, tmp_path)
    assert "found blocks.7.self_attn.q (nearest: blocks." in message and "trained for this network" in message
    lora = {f"lora_unet_down_blocks_0_attn.{part}.weight": torch.zeros(4, 4) for part in ("lora_up", "lora_down")}
    assert "found down_blocks_0_attn" in refused(opened, lora, tmp_path)


def test_no_lora_at_all(opened, tmp_path):
    assert "expected names of a LoRA" in refused(opened, {"blocks.0.self_attn.q.weight": torch.zeros(2)}, tmp_path)


def test_half_of_a_product(opened, tmp_path):
    lora = {f"{MODULES[0]}.lora_A.weight": torch.zeros(4, 128)}
    assert "expected both factors of the product; found no up" in refused(opened, lora, tmp_path)


def test_another_kind(opened, tmp_path):
    lora = original_style(factors(opened)) | {f"diffusion_model.{MODULES[0]}.dora_scale": torch.zeros(128)}
    assert "dora_scale; expected lora_A and lora_B" in refused(opened, lora, tmp_path)
