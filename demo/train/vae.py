"""Phase 1: the causal video VAE on clips of pictures and of normal maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from demo.train.data import ClipStore, to_unit
from demo.train.trainer import Draw, Metrics
from factorportrait.export.models.vae import VideoVAE

NORMALS_SHARE = 0.35
LATENT_NOISE = 0.1  # added to raw latents, whose deviation settles near 3: makes the decoder smooth
LATENT_WEIGHT = 1e-5  # of their square, against drift
GRADIENT_WEIGHT = 0.25
# Of pixels that another performance of the same clip changes: eyes, brows and mouth, a few hundredths of the picture, which a
# mean error forgets although everything that expression shows is there.
EXPRESSION_WEIGHT = 6.0
EXPRESSION_DIFFERENCE = 24  # of 255
# Side in pixels and frames of a part's crops, with their shares. Long ones, because the causal convolutions look back over more
# than twenty frames, and what they have never seen they do not decode; large ones, because attention spans the picture.
CROPS = ((64, 29), (64, 13), (128, 9))
CROP_SHARES = (0.5, 0.25, 0.25)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon updates the convolutions inside; the first and the last of each half are left to AdamW."""
    ends = ("encoder.conv1", "encoder.head", "decoder.conv1", "decoder.head", "conv1", "conv2")
    return parameter.ndim >= 4 and not name.startswith(ends)


def sample_crops(store: ClipStore, draw: Draw, budget: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frames [B, 3, T, S, S] in -1..1, and the weights of their pixels [B, 1, T, S, S], whose mean is 1.

    budget: frames of 128 x 128 pixels that the part may cost.
    """
    rng = draw.rng
    height, width = store.get(0, "frames").shape[1:3]
    side, length = CROPS[rng.choice(len(CROPS), p=CROP_SHARES)]
    count = max(1, round(budget * 128 * 128 / (length * side * side)))
    crops, weights = [], []
    for _ in range(count):
        index, name = int(rng.integers(len(store))), "normals" if draw.chance(NORMALS_SHARE) else "frames"
        start = rng.integers(len(store.get(index, name)) - length + 1)
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        place = (slice(start, start + length), slice(top, top + side), slice(left, left + side))
        crop = store.get(index, name)[place]
        weight = np.ones(crop.shape[:3], np.float32)
        if name == "frames" and store.has(index, "twin_frames"):
            weight += EXPRESSION_WEIGHT * expression_pixels(crop, store.get(index, "twin_frames")[place])
        mirrored = slice(None, None, -1 if draw.chance(0.5) else 1)
        crops.append(crop[:, :, mirrored])
        weights.append(weight[:, :, mirrored] / weight.mean())
    return to_unit(np.stack(crops), device), torch.from_numpy(np.stack(weights))[:, None].to(device)


def expression_pixels(frames: np.ndarray, twin: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3] of two performances -> bool [T, H, W], where they differ."""
    return np.abs(frames.astype(np.int16) - twin).max(-1) > EXPRESSION_DIFFERENCE


def reconstruction_loss(decoded: Tensor, frames: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, 3, T, H, W] twice -> L1 + MSE / 2 + differences of neighbours (sharpness), and the MSE without weights.

    weights: [B, 1, T, H, W], of L1 and MSE.
    """
    error = decoded.float() - frames
    mse = error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    pixels = error.abs() + 0.5 * error.square()
    return (pixels if weights is None else weights * pixels).mean() + GRADIENT_WEIGHT * edges, mse


def vae_loss(vae: VideoVAE, draw: Draw, frames: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """frames [B, 3, T, H, W], weights [B, 1, T, H, W] -> loss of one part."""
    mean = vae.encode_whole(frames).float()
    latents = mean + LATENT_NOISE * draw.normal(mean.shape, mean.device)
    loss, mse = reconstruction_loss(vae.decode_whole(latents), frames, weights)
    loss = loss + LATENT_WEIGHT * mean.square().mean()
    return loss, {"psnr": psnr_of(mse.item()), "latent_std": mean.std().item()}


def psnr_of(mse: float) -> float:
    """Of frames in -1..1, in dB."""
    return float(10 * np.log10(4 / max(mse, 1e-12)))


@torch.no_grad()
def validate(vae: nn.Module, store: ClipStore, device: torch.device, clips: int = 6) -> Metrics:
    """PSNR of whole clips, pictures and normal maps apart, and of the pixels that expression changes."""
    metrics = {}
    for name in ("frames", "normals"):
        values, of_expression = [], []
        for clip in range(min(clips, len(store))):
            shown = store.get(clip, name)
            frames = to_unit(shown[None], device)
            with torch.autocast(device.type, torch.bfloat16):
                decoded = vae.decode_whole(vae.encode_whole(frames).float(), clamp=True)
            error = (decoded.float() - frames).square().mean(1)[0]
            values.append(psnr_of(error.mean().item()))
            if name == "frames" and store.has(clip, "twin_frames"):
                changed = torch.from_numpy(expression_pixels(shown, store.get(clip, "twin_frames"))).to(device)
                if changed.any():
                    of_expression.append(psnr_of(error[changed].mean().item()))
        metrics[f"val_psnr_{name}"] = float(np.mean(values))
        if of_expression:
            metrics["val_psnr_expression"] = float(np.mean(of_expression))
    return metrics
