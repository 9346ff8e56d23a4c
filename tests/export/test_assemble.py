"""FactorPortrait on released backbones: at first it is the backbone, and its checkpoint is one like any other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import difference
from wan_models import diffusers_transformer, lazy, small, with_noise

from factorportrait.errors import CheckpointError
from factorportrait.export.checkpoint import load_checkpoint, save_checkpoint
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.weights import layouts
from factorportrait.export.weights.assemble import factorportrait_on
from factorportrait.export.weights.networks import PUBLISHED, WAN21_VAE, WAN22_VAE, Opened
from factorportrait.model_config import ExpressionConfig, FusionConfig, ModelConfig

BACKBONES = {"Wan2.1-T2V-1.3B": WAN21_VAE, "Wan2.1-T2V-14B": WAN21_VAE, "Wan2.2-TI2V-5B": WAN22_VAE}


def opened(name: str):
    """diffusers' model of a small backbone, and both networks as they would be opened."""
    network = small(name)
    theirs = with_noise(diffusers_transformer(network), 0)
    weights = layouts.from_layout(theirs.state_dict(), layouts.TRANSFORMER, "diffusers")
    vae = dataclasses.replace(BACKBONES[name], base_dim=8, decoder_base_dim=None)
    vae_weights = with_noise(VideoVAE(vae), 1).state_dict()
    return theirs, Opened(network, lazy(weights), "dit", "diffusers"), Opened(vae, lazy(vae_weights), "vae", "original")


def config_of(dit: Opened, vae: Opened) -> ModelConfig:
    return ModelConfig(
        system="factorportrait", height=64, width=96, fps=24.0, vae=vae.config, dit=dit.config.dit,
        fusion=FusionConfig(latent_channels=vae.config.z_dim),
        expression=ExpressionConfig(code_dim=16, image_size=32, encoder_widths=(8, 16, 16), arkit_hidden=16, hidden_dim=16),
    )  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_untrained_it_is_the_backbone(name, tmp_path):
    theirs, dit, vae = opened(name)
    config = config_of(dit, vae)
    model, notes = factorportrait_on(dit, vae, config)
    assert any("untrained: reference" in note for note in notes) and "untrained" in notes[-1]
    generator = torch.Generator().manual_seed(0)
    channels, rows, columns = vae.config.z_dim, config.latent_height, config.latent_width
    noise, reference, pose = (torch.randn(1, channels, 3, rows, columns, generator=generator) for _ in range(3))
    rays = torch.randn(1, 24, 3, rows, columns, generator=generator)
    text = torch.randn(1, 7, config.dit.text_dim, generator=generator)
    controller = model.expression["controller"]
    codes = torch.randn(1, 12, 16, generator=generator)
    modulation, _ = controller(codes, controller.initial_state(codes[:, 0]))
    temb, proj = model.dit.embed_time(torch.full((1, 3), 300.0))
    found, _ = model.dit(
        noise, model.dit.embed_conditions(reference, rays, pose), modulation, temb, proj, torch.arange(3),
        text_kv=model.dit.embed_text(text),
    )  # fmt: skip
    expected = theirs(noise, torch.tensor([300.0]), text, return_dict=False)[0]
    assert difference(found, expected) <= 1e-4

    save_checkpoint(model, tmp_path / "assembled")
    loaded = load_checkpoint(tmp_path / "assembled")
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_what_is_new_is_the_same_for_a_seed():
    _, dit, vae = opened("Wan2.1-T2V-1.3B")
    config = config_of(dit, vae)
    first, again, other = (factorportrait_on(dit, vae, config, seed=seed)[0].expression.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.code.weight"], other["encoder.code.weight"])
    half = factorportrait_on(dit, vae, config, dtype=torch.bfloat16)[0]
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_another_structure_is_refused():
    _, dit, vae = opened("Wan2.1-T2V-1.3B")
    config = config_of(dit, vae)
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, ffn_dim=32))
    with pytest.raises(CheckpointError, match="config: dit; expected ffn_dim 64, as the weights have; found ffn_dim 32"):
        factorportrait_on(dit, vae, config)


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
