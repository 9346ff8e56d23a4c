"""FactorPortrait on released backbones: at first it is the backbone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import difference
from wan_models import diffusers_transformer, lazy, small, with_noise

from factorportrait.errors import CheckpointError
from factorportrait.export.parts import LazyTransformer
from factorportrait.export.weights import layouts
from factorportrait.export.weights.assemble import draw_expression
from factorportrait.export.weights.networks import PUBLISHED, WAN21_VAE, WAN22_VAE, Opened, with_streams
from factorportrait.model_config import ExpressionConfig, FusionConfig, ModelConfig

BACKBONES = {"Wan2.1-T2V-1.3B": WAN21_VAE, "Wan2.1-T2V-14B": WAN21_VAE, "Wan2.2-TI2V-5B": WAN22_VAE}


def opened(name: str):
    """diffusers' model of a small backbone, its weights as they would be opened, and FactorPortrait's config on it."""
    network = small(name)
    theirs = with_noise(diffusers_transformer(network), 0)
    weights = layouts.from_layout(theirs.state_dict(), layouts.TRANSFORMER, "diffusers")
    vae = dataclasses.replace(BACKBONES[name], base_dim=8, decoder_base_dim=None)
    config = ModelConfig(
        system="factorportrait", height=64, width=96, fps=24.0, vae=vae, dit=network.dit,
        fusion=FusionConfig(latent_channels=vae.z_dim),
        expression=ExpressionConfig(code_dim=16, image_size=32, encoder_widths=(8, 16, 16), arkit_hidden=16, hidden_dim=16),
    )  # fmt: skip
    return theirs, Opened(network, lazy(weights), "dit", "diffusers"), config


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_untrained_it_is_the_backbone(name):
    """As `export_released` puts it together: zeros for the new inputs, a drawn expression that says nothing yet."""
    theirs, dit, config = opened(name)
    tensors, declared = with_streams(dit.tensors, dit.config.fusion, config.fusion)
    assert "untrained: reference" in declared
    model, expression = LazyTransformer(config, tensors, "dit").with_weights(""), draw_expression(config)
    generator = torch.Generator().manual_seed(0)
    channels, rows, columns = config.vae.z_dim, config.latent_height, config.latent_width
    noise, reference, pose = (torch.randn(1, channels, 3, rows, columns, generator=generator) for _ in range(3))
    rays = torch.randn(1, 24, 3, rows, columns, generator=generator)
    text = torch.randn(1, 7, config.dit.text_dim, generator=generator)
    controller = expression["controller"]
    codes = torch.randn(1, 12, 16, generator=generator)
    modulation, _ = controller(codes, controller.initial_state(codes[:, 0]))
    temb, proj = model.embed_time(torch.full((1, 3), 300.0))
    found, _ = model(
        noise, model.embed_conditions(reference, rays, pose), modulation, temb, proj, torch.arange(3),
        text_kv=model.embed_text(text),
    )  # fmt: skip
    expected = theirs(noise, torch.tensor([300.0]), text, return_dict=False)[0]
    assert difference(found, expected) <= 1e-4


def test_what_is_new_is_the_same_for_a_seed():
    *_, config = opened("Wan2.1-T2V-1.3B")
    first, again, other = (draw_expression(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.code.weight"], other["encoder.code.weight"])


@pytest.mark.parametrize("name", ["Wan2.1-I2V-14B", "Wan2.2-Animate-14B", "Wan2.1-Fun-V1.1-1.3B-Control"])
def test_a_transformer_with_other_inputs_is_refused(name):
    network = small(name)
    with pytest.raises(CheckpointError, match="dit: image_dim; expected null: this system has no such input"):
        ModelConfig(
            system="factorportrait", height=64, width=64, fps=24.0, vae=dataclasses.replace(WAN21_VAE, base_dim=8),
            dit=network.dit, fusion=FusionConfig(latent_channels=16),
        )  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_real_sizes_fit(name):
    """FactorPortrait's config at the published size, without values."""
    vae = BACKBONES[name]
    config = ModelConfig(
        system="factorportrait", height=512, width=512, fps=15.0, vae=vae, dit=PUBLISHED[name].dit,
        fusion=FusionConfig(latent_channels=vae.z_dim),
    )  # fmt: skip
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.tokens_per_frame == {8: 1024, 16: 256}[vae.spatial_stride]
