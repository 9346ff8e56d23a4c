"""The transformer with Wan's options against diffusers' WanTransformer3DModel with the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import difference

from factorportrait.errors import CheckpointError
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.wan_keys import from_diffusers, to_diffusers
from factorportrait.model_config import DiTConfig, FusionConfig

TOLERANCE = 1e-4  # relative; found 1e-6
WAN = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_dim=20)
CONFIGS = {
    "wan": (WAN, FusionConfig()),
    # 128 per head, as every release: rotary parts of 44, 42, 42.
    "wide_heads": (dataclasses.replace(WAN, dim=256, num_heads=2, ffn_dim=128, num_layers=1), FusionConfig()),
    "plain_cross_norm": (dataclasses.replace(WAN, cross_attn_norm=False, num_heads=3, num_layers=3), FusionConfig()),
    "other_order": (
        dataclasses.replace(WAN, patch_size=(1, 1, 1), out_channels=4),
        FusionConfig(streams=("noise", "pose", "camera", "reference"), latent_channels=4, rays="last"),
    ),
}


def reference_model(config: DiTConfig, fusion: FusionConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=fusion.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
        cross_attn_norm=config.cross_attn_norm, eps=config.eps, rope_max_seq_len=config.max_position,
    ).eval()  # fmt: skip


def with_noise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight is drawn: fresh norms of one and biases of zero would hide a swapped name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("per_frame", [False, True], ids=["one_timestep", "timestep_per_frame"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name, seed, per_frame):
    config, fusion = CONFIGS[name]
    theirs = with_noise(reference_model(config, fusion), seed)
    batch, frames, height, width = 2, 3, 4, 6
    ours = WanDiT(config, fusion, height, width).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    generator = torch.Generator().manual_seed(100 + seed)
    streams = {
        stream: torch.randn((batch, fusion.channels(stream), frames, height, width), generator=generator)
        for stream in fusion.streams
    }
    text = torch.randn((batch, 5, config.text_dim), generator=generator)
    timesteps = torch.tensor([[0.0, 421.0, 999.0], [1000.0, 17.0, 500.0]])
    if not per_frame:
        timesteps = timesteps[:, 1:2].expand(-1, frames)

    temb, timestep_proj = ours.embed_time(timesteps)
    velocity, kept = ours(
        streams["noise"], ours.embed_conditions(streams["reference"], streams["camera"], streams["pose"]),
        torch.zeros(batch, frames, 6, config.dim), temb, timestep_proj, torch.arange(frames),
        text_kv=ours.embed_text(text),
    )  # fmt: skip
    tokens = (height // config.patch_size[1]) * (width // config.patch_size[2])
    expected = theirs(
        hidden_states=torch.cat([streams[stream] for stream in fusion.streams], dim=1),
        timestep=timesteps.repeat_interleave(tokens, dim=1) if per_frame else timesteps[:, 0],
        encoder_hidden_states=text,
        return_dict=False,
    )[0]
    assert len(kept) == config.num_layers
    assert expected.std() > 0.1
    assert difference(velocity, expected) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_names_translate_both_ways(name):
    config, fusion = CONFIGS[name]
    with torch.device("meta"):
        ours = WanDiT(config, fusion, 4, 4).state_dict()
        theirs = reference_model(config, fusion).state_dict()
    assert to_diffusers(ours).keys() == theirs.keys()
    assert from_diffusers(theirs).keys() == ours.keys()


def test_norm_before_cross_attention_is_third_here_and_second_there():
    assert list(to_diffusers({"blocks.7.norm3.weight": 0})) == ["blocks.7.norm2.weight"]


@pytest.mark.parametrize("key", ["blocks.0.norm9.weight", "vace.weight", "blocks.0.self_attn.qkv.weight"])
def test_unknown_name_is_refused(key):
    with pytest.raises(CheckpointError, match=key):
        to_diffusers({key: 0})
    with pytest.raises(CheckpointError, match=key):
        from_diffusers({key: 0})
