"""Last phase: the decoder learns what the transformer's own latents mean, beside those of true pictures.

Generated latents err from cell to cell, which shows as the borders of cells in a decoder that knows exact ones alone. Training
people are generated once, as a stream with the shipped number of steps; the decoder then sees crops of both. The encoder stays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.train.data import ClipStore, to_unit
from demo.train.dit import Window, load_conditions
from demo.train.expression import CodeBasis
from demo.train.latents import LatentStore
from demo.train.sampling import sample_stream
from demo.train.trainer import Draw, Metrics
from demo.train.vae import EXPRESSION_WEIGHT, expression_pixels, psnr_of, reconstruction_loss
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.models.patch_vae import PatchVAE
from factorportrait.model_config import FRAMES_PER_LATENT

log = logging.getLogger(__name__)
GENERATED_SHARE = 0.6  # of the crops; the others have the latents of true pictures
STEPS = 2  # of generation, as fp-run does by default
GENERATION_BATCH = 4
# Of a crop, in latent cells and latent frames.
CROP_CELLS, CROP_LATENTS = 8, 3


@torch.no_grad()
def generate(
    model: FactorPortrait, store: LatentStore, basis: CodeBasis, clips: Sequence[int], device: torch.device
) -> np.ndarray:
    """Latents [n, C, N, h, w] in half precision of these clips, driven by their own coefficients."""
    total = store.stack("latents", [0]).shape[2]
    parts = []
    for start in range(0, len(clips), GENERATION_BATCH):
        batch = list(clips[start : start + GENERATION_BATCH])
        with torch.autocast(device.type, torch.bfloat16):
            codes = basis.code(store.stack("coefficients", batch, device))
            conditions = load_conditions(model, store, batch, Window(0, total, None), codes)
        noise = Draw(0, "generate", batch[0], 0).normal(store.stack("latents", batch).shape, device)
        shift = model.config.generation.timestep_shift
        parts.append(sample_stream(model, conditions, noise, STEPS, shift).cpu().numpy().astype(np.float16))
    return np.concatenate(parts)


def sample_pairs(
    generated: LatentStore,
    clean: LatentStore,
    pictures: ClipStore,
    draw: Draw,
    count: int,
    cell: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random crops -> latents [B, C, 3, 8, 8], true frames [B, 3, 9, S, S] in -1..1, pixel weights [B, 1, 9, S, S].

    Of the first latent frame the last picture is shown, as at the start of a video. `clean` and `pictures` start with the
    clips of `generated`.
    """
    rng, side = draw.rng, CROP_CELLS * cell
    latents, frames, weights = [], [], []
    for _ in range(count):
        clip = int(rng.integers(len(generated)))
        whole = (generated if draw.chance(GENERATED_SHARE) else clean).stack("latents", [clip])[0]
        slot = int(rng.integers(whole.shape[1] - CROP_LATENTS + 1))
        row, column = (int(rng.integers(extent - CROP_CELLS + 1)) for extent in whole.shape[2:])
        latents.append(whole[:, slot : slot + CROP_LATENTS, row : row + CROP_CELLS, column : column + CROP_CELLS])
        # Latent frame k > 0 holds the frames 4k - 3 .. 4k.
        last = FRAMES_PER_LATENT * (slot + CROP_LATENTS - 1)
        place = (
            slice(FRAMES_PER_LATENT * slot, last + 1),
            slice(row * cell, row * cell + side),
            slice(column * cell, column * cell + side),
        )
        crop = pictures.get(clip, "frames")[place]
        weight = 1 + EXPRESSION_WEIGHT * expression_pixels(crop, pictures.get(clip, "twin_frames")[place]).astype(np.float32)
        frames.append(crop)
        weights.append(weight / weight.mean())
    return (
        torch.stack(latents).to(device),
        to_unit(np.stack(frames), device),
        torch.from_numpy(np.stack(weights))[:, None].to(device),
    )


def decoder_loss(vae: PatchVAE, latents: Tensor, frames: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """What `sample_pairs` returns -> loss of one part."""
    loss, mse = reconstruction_loss(vae.decode_whole(latents), frames, weights)
    return loss, {"psnr": psnr_of(mse.item())}


@torch.no_grad()
def validate(
    vae: PatchVAE, generated: LatentStore, clean: LatentStore, pictures: ClipStore, device: torch.device
) -> Metrics:
    """PSNR of whole clips from generated and from clean latents, and of the pixels that expression changes."""
    metrics: Metrics = {}
    for name, store in (("generated", generated), ("frames", clean)):
        values, of_expression = [], []
        for clip in range(len(generated)):
            shown = pictures.get(clip, "frames")
            with torch.autocast(device.type, torch.bfloat16):
                decoded = vae.decode_whole(store.stack("latents", [clip], device), clamp=True)
            error = (decoded.float() - to_unit(shown[None], device)).square().mean(1)[0]
            values.append(psnr_of(error.mean().item()))
            changed = torch.from_numpy(expression_pixels(shown, pictures.get(clip, "twin_frames"))).to(device)
            if changed.any():
                of_expression.append(psnr_of(error[changed].mean().item()))
        metrics[f"val_psnr_{name}"] = float(np.mean(values))
        if of_expression:
            metrics[f"val_psnr_{name}_expression"] = float(np.mean(of_expression))
    return metrics


def generated_folder(work: Path, split: str) -> Path:
    return work / "generated" / split
