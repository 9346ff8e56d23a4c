"""The tiny model's config and weights, and how far two tensors are apart. Test folders import it as `helpers`."""

from __future__ import annotations

import torch

from factorportrait.export.models.vae import VideoVAE

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


def difference(found, expected) -> float:
    """max|a-b| / max|b| of two arrays or tensors of one shape."""
    if tuple(found.shape) != tuple(expected.shape):
        raise ValueError(f"shapes: expected {tuple(expected.shape)}, found {tuple(found.shape)}")
    return float(abs(found - expected).max() / abs(expected).max())


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill a FactorPortrait with weights that hide nothing: every bias, norm, gate and code differs from its start value."""
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
        sides = (model.vae.encoder, model.vae.decoder) if isinstance(model.vae, VideoVAE) else ()
        for head in (side.head[-1] for side in sides):
            head.weight.mul_(1.5)
