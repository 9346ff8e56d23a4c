"""Phase 1: the causal video VAE on clips of pictures and of normal maps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.train.data import ClipStore, to_unit
from demo.train.trainer import Draw, Metrics
from factorportrait.export.models.vae import VideoVAE

NORMALS_SHARE = 0.35
LATENT_NOISE = 0.1  # added to raw latents, whose deviation settles near 3: makes the decoder smooth
LATENT_WEIGHT = 1e-5  # of their square, against drift
GRADIENT_WEIGHT = 0.25
# Side in pixels and frames of a part's crops, with their shares. Long ones, because the causal convolutions look back over more
# than twenty frames, and what they have never seen they do not decode; large ones, because attention spans the picture.
CROPS = ((64, 29), (64, 13), (128, 9))
CROP_SHARES = (0.5, 0.25, 0.25)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon updates the convolutions inside; the first and the last of each half are left to AdamW."""
    ends = ("encoder.conv1", "encoder.head", "decoder.conv1", "decoder.head", "conv1", "conv2")
    return parameter.ndim >= 4 and not name.startswith(ends)


def sample_crops(store: ClipStore, draw: Draw, budget: int, device: torch.device) -> Tensor:
    """[B, 3, T, S, S] in -1..1. budget: frames of 128 x 128 pixels that the part may cost."""
    rng = draw.rng
    height, width = store.get(0, "frames").shape[1:3]
    side, length = CROPS[rng.choice(len(CROPS), p=CROP_SHARES)]
    count = max(1, round(budget * 128 * 128 / (length * side * side)))
    crops = []
    for _ in range(count):
        clip = store.get(int(rng.integers(len(store))), "normals" if draw.chance(NORMALS_SHARE) else "frames")
        start = rng.integers(len(clip) - length + 1)
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crop = clip[start : start + length, top : top + side, left : left + side]
        crops.append(crop[:, :, ::-1] if draw.chance(0.5) else crop)
    return to_unit(np.stack(crops), device)


def reconstruction_loss(decoded: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, T, H, W] twice -> L1 + MSE / 2 + differences of neighbours (sharpness), and the MSE."""
    error = decoded.float() - frames
    mse = error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * mse + GRADIENT_WEIGHT * edges, mse


def vae_loss(vae: VideoVAE, draw: Draw, frames: Tensor) -> tuple[Tensor, Metrics]:
    """frames [B, 3, T, H, W] -> loss of one part."""
    mean = vae.encode_whole(frames).float()
    latents = mean + LATENT_NOISE * draw.normal(mean.shape, mean.device)
    loss, mse = reconstruction_loss(vae.decode_whole(latents), frames)
    loss = loss + LATENT_WEIGHT * mean.square().mean()
    return loss, {"psnr": psnr_of(mse.item()), "latent_std": mean.std().item()}


def psnr_of(mse: float) -> float:
    """Of frames in -1..1, in dB."""
    return float(10 * np.log10(4 / max(mse, 1e-12)))


@torch.no_grad()
def validate(vae: nn.Module, store: ClipStore, device: torch.device, clips: int = 6) -> Metrics:
    """PSNR of whole clips, pictures and normal maps apart."""
    metrics = {}
    for name in ("frames", "normals"):
        values = []
        for clip in range(min(clips, len(store))):
            frames = to_unit(store.get(clip, name)[None], device)
            with torch.autocast(device.type, torch.bfloat16):
                decoded = vae.decode_whole(vae.encode_whole(frames).float(), clamp=True)
            values.append(psnr_of(F.mse_loss(decoded.float(), frames).item()))
        metrics[f"val_psnr_{name}"] = float(np.mean(values))
    return metrics
