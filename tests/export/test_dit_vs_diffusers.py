"""The transformer with Wan's options against diffusers' WanTransformer3DModel with the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import difference
from wan_models import diffusers_transformer, with_noise

from factorportrait.export.models.dit import WanDiT
from factorportrait.export.weights import layouts
from factorportrait.export.weights.networks import Network
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


@pytest.mark.parametrize("per_frame", [False, True], ids=["one_timestep", "timestep_per_frame"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name, seed, per_frame):
    config, fusion = CONFIGS[name]
    theirs = with_noise(diffusers_transformer(Network(config, fusion)), seed)
    batch, frames, height, width = 2, 3, 4, 6
    ours = WanDiT(config, fusion, height, width).eval()
    ours.load_state_dict(layouts.from_layout(theirs.state_dict(), layouts.TRANSFORMER, "diffusers"))
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
