"""A tiny model, its checkpoint and its bundle, made once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from factorportrait.model_config import ModelConfig

TINY = {
    "system": "factorportrait",
    "name": "tiny",
    "height": 32,
    "width": 32,
    "fps": 24.0,
    "vae": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temporal_downsample": [True, True],
        "patch_size": 2,
        "latents_mean": [0.1 * (i % 5 - 2) for i in range(16)],
        "latents_std": [0.8 + 0.05 * i for i in range(16)],
    },
    "dit": {
        "dim": 64,
        "ffn_dim": 128,
        "num_heads": 2,
        "num_layers": 2,
        "freq_dim": 32,
        "cross_attn_norm": False,
        "max_position": 64,
    },
    "expression": {
        "code_dim": 16,
        "image_size": 32,
        "encoder_widths": [8, 16, 16],
        "encoder_blocks": 1,
        "arkit_hidden": 32,
        "hidden_dim": 32,
    },
    "generation": {"chunk_frames": 2, "window_frames": 5, "max_clip_frames": 9},
}


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """32 x 32 pixels, 4 x 4 latent cells, 4 tokens per latent frame, two blocks of width 64."""
    return ModelConfig.from_dict(TINY)


def randomise(model, seed: int = 0) -> None:
    """Fill a FactorPortrait with weights that hide nothing: every bias, norm, gate and code differs from its start value."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            last = name.rpartition(".")[2]
            if last == "modulation":
                tensor.copy_(0.5 * noise)
            elif last == "neutral_code":
                tensor.copy_(noise)
            elif last == "bias":
                tensor.copy_(0.1 * noise)
            elif last == "gamma" or tensor.dim() == 1 and last == "weight":
                tensor.copy_(1 + 0.2 * noise)
            elif last == "weight":
                # The variance stays about the same from layer to layer.
                tensor.copy_(noise * (1.0 / tensor[0].numel()) ** 0.5)
        # The VAE halves the signal in each SiLU; its latents and frames should still be of order one.
        for head in (model.vae.encoder.head[-1], model.vae.decoder.head[-1]):
            head.weight.mul_(1.5)


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """FactorPortrait of `tiny_config` in fp32 on the CPU, random and non-degenerate. Read only."""
    from factorportrait.export.models.factorportrait import FactorPortrait

    model = FactorPortrait(tiny_config).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory) -> Path:
    """Folder with the weights of `tiny_model` in fp32. Read only: copy it to change it."""
    from factorportrait.export.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory, request) -> Path:
    """The fp32 bundle of `tiny_checkpoint`. Read only: copy it to change it.

    Kept in pytest's cache, so that a second run exports only what changed since.
    """
    from factorportrait.export.build import build_bundle

    kept = request.config.cache.mkdir("factorportrait") / "tiny-fp32"
    path = tmp_path_factory.mktemp("bundle") / "tiny-fp32"
    build_bundle(tiny_checkpoint, kept)
    # A copy: another run may replace the kept one.
    shutil.copytree(kept, path)
    return path
