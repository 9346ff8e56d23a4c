"""Phase 1: the video VAE. Its encoder is the principal components of patches, its decoder trained on pictures and normal maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from demo.train.data import ClipStore, to_unit
from demo.train.trainer import Draw, Metrics
from factorportrait.config import PatchVAEConfig
from factorportrait.export.models.patch_vae import PatchVAE

NORMALS_SHARE = 0.3
STILL_SHARE = 0.15  # of the patches that the components are made from: pictures that stand still, as the first one does
COMPONENT_CLIPS = 600
# What the transformer makes is not exact either, and shows the borders of its cells: half of the crops have noise in their
# latents, up to this share of the unit in which the transformer sees them (`latents.latent_statistics`).
LATENT_NOISE, NOISY_SHARE = 0.5, 0.5
GRADIENT_WEIGHT = 0.25
# Of pixels that another performance of the same clip changes: eyes, brows and mouth, a few hundredths of the picture, which a
# mean error forgets although everything that expression shows is there.
EXPRESSION_WEIGHT = 3.0
EXPRESSION_DIFFERENCE = 24  # of 255
# Of a crop, in pixels and in frames: the decoder sees a few cells around, and one latent frame back.
CROP_SIDE, CROP_FRAMES = 64, 9


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon updates the convolutions inside."""
    return name.startswith(("decoder.cells.", "decoder.blocks.", "decoder.to_fine."))


def patches_of(frames: np.ndarray, config: PatchVAEConfig) -> np.ndarray:
    """uint8 [4, H, W, 3] -> float32 [cells, 12 * s * s] in -1..1, a row in the order of the encoder's weights [z, 3 * 4, s, s]."""
    time, height, width, channels = frames.shape
    side = config.cell_size
    cells = (frames.astype(np.float32) / 127.5 - 1).reshape(time, height // side, side, width // side, side, channels)
    return cells.transpose(1, 3, 5, 0, 2, 4).reshape(-1, channels * time * side * side)


@torch.no_grad()
def fit_components(vae: PatchVAE, store: ClipStore, seed: int) -> None:
    """Make the encoder the principal components of the clips' patches, and the decoder's linear part its inverse."""
    config, draw = vae.config, Draw(seed, "components", 0, 0)
    size = vae.encoder.weight[0].numel()
    total, products, count = np.zeros(size), np.zeros((size, size)), 0
    for clip in np.linspace(0, len(store) - 1, min(COMPONENT_CLIPS, len(store))).astype(int):
        shown = store.get(int(clip), "normals" if draw.chance(NORMALS_SHARE) else "frames")
        start = draw.rng.integers(len(shown) - config.temporal_stride + 1)
        frames = shown[start : start + config.temporal_stride]
        rows = patches_of(np.repeat(frames[:1], len(frames), 0) if draw.chance(STILL_SHARE) else frames, config)
        total, products, count = total + rows.sum(0), products + rows.T @ rows, count + len(rows)
    mean = total / count
    _, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    basis = torch.from_numpy(vectors[:, ::-1][:, : config.z_dim].T.copy()).float()
    vae.encoder.weight.copy_(basis.view_as(vae.encoder.weight))
    vae.encoder.bias.copy_(-basis @ torch.from_numpy(mean).float())
    # The decoder's channels are frame, colour, row, column; the encoder's colour, frame, row, column.
    channels, time, side = config.in_channels, config.temporal_stride, config.cell_size

    def by_frame(x: Tensor) -> Tensor:
        return x.unflatten(-1, (channels, time, side, side)).transpose(-4, -3).flatten(-4)

    vae.decoder.inverse.weight.copy_(by_frame(basis).T[:, :, None, None])
    vae.decoder.inverse.bias.copy_(by_frame(torch.from_numpy(mean).float()))


def train_only_decoder(vae: PatchVAE) -> None:
    """Gradients for the decoder; what makes latents is fixed, so the transformer may be trained at any time."""
    vae.encoder.requires_grad_(False)


def sample_crops(store: ClipStore, draw: Draw, budget: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frames [B, 3, T, S, S] in -1..1, and the weights of their pixels [B, 1, T, S, S], whose mean is 1.

    budget: frames of 128 x 128 pixels that the part may cost.
    """
    rng = draw.rng
    height, width = store.get(0, "frames").shape[1:3]
    count = max(1, round(budget * 128 * 128 / (CROP_FRAMES * CROP_SIDE**2)))
    crops, weights = [], []
    for _ in range(count):
        index, name = int(rng.integers(len(store))), "normals" if draw.chance(NORMALS_SHARE) else "frames"
        start = rng.integers(len(store.get(index, name)) - CROP_FRAMES + 1)
        top, left = rng.integers(height - CROP_SIDE + 1), rng.integers(width - CROP_SIDE + 1)
        place = (slice(start, start + CROP_FRAMES), slice(top, top + CROP_SIDE), slice(left, left + CROP_SIDE))
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


def vae_loss(vae: PatchVAE, draw: Draw, frames: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """frames [B, 3, T, H, W], weights [B, 1, T, H, W] -> loss of one part."""
    with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
        mean = vae.encode_whole(frames)
    loss, mse = reconstruction_loss(vae.decode_whole(noisy_latents(mean, draw)), frames, weights)
    return loss, {"psnr": psnr_of(mse.item())}


def noisy_latents(latents: Tensor, draw: Draw) -> Tensor:
    """Latents [B, C, N, h, w], some of them with noise."""
    deviation = latents.movedim(1, 0).flatten(1).std(1)
    unit = (deviation * deviation.mean()).sqrt().view(1, -1, 1, 1, 1)
    share = draw.uniform((2, len(latents), 1, 1, 1, 1), latents.device)
    level = LATENT_NOISE * share[0] * (share[1] < NOISY_SHARE)
    return latents + level * unit * draw.normal(latents.shape, latents.device)


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
