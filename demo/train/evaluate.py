"""Figures of held-out people and a contact sheet: self-reenactment in torch, through the temporal VAE."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demo.dataset import render_clip
from demo.train.data import ClipStore, to_bytes, to_unit
from demo.train.latents import encode, group_frames, pack_rays
from demo.train.sampling import sample_clip, sample_stream
from demo.train.trainer import Draw
from demo.world.appearance import Identity, Scene
from factorportrait.export.models.factorportrait import ClipConditions, FactorPortrait

log = logging.getLogger(__name__)
CHANGED = 24  # of 255: a pixel that expression changes by more, in the truth, counts as an expression pixel
STEPS = 4
SHIFTS = (1.0, 3.0)
SHEET_CLIPS = 12


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """uint8 pictures [T, H, W, 3], mask [T, H, W] -> dB over all (or the masked) pixels of the clip; NaN for none."""
    squared = np.square(a.astype(np.float32) - b.astype(np.float32)).mean(-1)
    squared = squared if mask is None else squared[mask]
    return float(10 * np.log10(255**2 / max(squared.mean(), 1e-6))) if squared.size else float("nan")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """uint8 pictures [T, H, W, 3] -> mean SSIM, Gaussian window of 11 pixels and deviation 1.5 (Wang et al. 2004)."""
    axis = torch.arange(11) - 5.0
    kernel = torch.exp(-axis.square() / (2 * 1.5**2))
    window = torch.outer(kernel, kernel) / kernel.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window.expand(3, 1, -1, -1), groups=3)

    x, y = (torch.from_numpy(np.array(pictures)).movedim(-1, 1).float() for pictures in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


@torch.no_grad()
def conditions_of(
    model: FactorPortrait, clip: dict[str, np.ndarray], device: torch.device, *, by_coefficients: bool
) -> ClipConditions:
    """Everything from the clip itself: its normal maps, cameras, and the codes of its ARKit coefficients or of its pictures."""
    with torch.autocast(device.type, torch.bfloat16):
        if by_coefficients:
            codes = model.expression["arkit"](torch.from_numpy(clip["coefficients"]).float().to(device)).float()
        else:
            codes = model.expression["encoder"](to_unit(clip["frames"][:, None], device)[:, :, 0]).float()
    grouped = torch.from_numpy(group_frames(codes.cpu().numpy()))[None].to(device)
    rays = torch.from_numpy(pack_rays(clip["K"], clip["c2w"], model.config)).float()[None].to(device)
    return ClipConditions(
        encode(model.vae, clip["portrait"][None, None], device),
        encode(model.vae, clip["normals"][None], device),
        rays,
        model.clip_modulation(grouped),
    )


def neutral_truth(clip: dict[str, np.ndarray]) -> np.ndarray:
    """The true render of the clip with no expression, uint8 [T, H, W, 3]."""
    identity, scene = (
        kind.from_dict(json.loads(str(clip[name]))) for kind, name in ((Identity, "identity"), (Scene, "scene"))
    )
    _, height, width, _ = clip["frames"].shape
    still = np.zeros_like(clip["coefficients"])
    pose = (clip[name] for name in ("rotation", "translation", "K", "c2w"))
    return render_clip(identity, still, *pose, scene, height, width)[0]


@torch.no_grad()
def evaluate_clip(
    model: FactorPortrait, clip: dict[str, np.ndarray], neutral: np.ndarray, seed: int, device: torch.device
) -> tuple[dict, dict]:
    """Figures by method, and the pictures that the contact sheet shows. neutral: see `neutral_truth`."""

    def decode(latents: Tensor) -> np.ndarray:
        with torch.autocast(device.type, torch.bfloat16):
            return to_bytes(model.vae.decode_whole(latents))[0]

    def code(pictures: np.ndarray) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model.expression["encoder"](to_unit(pictures[:, None], device)[:, :, 0]).float()

    truth = clip["frames"]
    changed = np.abs(truth.astype(int) - neutral).max(-1) > CHANGED
    conditions = conditions_of(model, clip, device, by_coefficients=True)
    seen = conditions_of(model, clip, device, by_coefficients=False)
    zeroed = ClipConditions(
        conditions.reference_latents,
        conditions.pose_latents,
        conditions.rays,
        torch.zeros_like(conditions.expression_modulation),
    )
    clean = encode(model.vae, truth[None], device)
    noise = Draw(seed, "evaluate", 0, 0).normal(clean.shape, device)
    pictures = {
        "autoencoder": decode(clean),
        "portrait_copied": np.broadcast_to(clip["portrait"], truth.shape),
        "neutral_truth": neutral,
        "stream": decode(sample_stream(model, conditions, noise, STEPS, 1.0)),
        "clip_1_step": decode(sample_clip(model, conditions, noise, 1, 1.0)),
        "clip_by_pictures": decode(sample_clip(model, seen, noise, STEPS, 1.0)),
        "zeroed": decode(sample_clip(model, zeroed, noise, STEPS, 1.0)),
    }
    for shift in SHIFTS:
        pictures[f"clip_shift_{shift:g}"] = decode(sample_clip(model, conditions, noise, STEPS, shift))
    target, figures = code(truth), {}
    for name, made in pictures.items():
        figures[name] = {
            "psnr": psnr(made, truth),
            "ssim": ssim(made, truth),
            "psnr_expression": psnr(made, truth, changed),
            "code_error": float((code(made) - target).square().mean().sqrt()),
        }
    return figures, {"truth": truth, "changed": changed, **pictures}


def contact_sheet(rows: list[list[np.ndarray]], path: Path, columns: int = 2) -> None:
    """Rows of uint8 pictures, laid out in `columns` columns of rows."""
    strips = [np.concatenate(row, axis=1) for row in rows]
    strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
    lines = [np.concatenate(strips[i : i + columns], axis=1) for i in range(0, len(strips), columns)]
    Image.fromarray(np.concatenate(lines)).save(path)


def evaluate(
    model: FactorPortrait, store: ClipStore, work: Path, device: torch.device, num_clips: int, workers: int
) -> None:
    """Write metrics.json and contact_sheet.png: portrait | truth | clip | stream | expression zeroed | autoencoder."""
    began, by_clip, rows = time.perf_counter(), [], []
    places = [(shard, i) for _, shard in store.shards for i in range(len(shard["kind"]))][:num_clips]
    clips = [{name: values[i] for name, values in shard.items()} for shard, i in places]
    neutrals = [neutral_truth(clip) for clip in clips]  # one after the other: the renderer keeps state
    if workers > 1:
        torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        jobs = zip(clips, neutrals, range(len(clips)), strict=True)
        results = list(pool.map(lambda job: evaluate_clip(model, *job, device), jobs))
    for clip, (figures, pictures) in zip(clips, results, strict=True):
        by_clip.append(figures)
        if len(rows) < SHEET_CLIPS:
            frame = int(pictures["changed"].sum((1, 2)).argmax())
            shown = (pictures[name][frame] for name in ("truth", "clip_shift_1", "stream", "zeroed", "autoencoder"))
            rows.append([clip["portrait"], *shown])
    means = {
        name: {key: round(float(np.nanmean([clip[name][key] for clip in by_clip])), 4) for key in values}
        for name, values in by_clip[0].items()
    }
    result = {"clips": len(by_clip), "steps": STEPS, "seconds": round(time.perf_counter() - began, 1), "means": means}
    (work / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    contact_sheet(rows, work / "contact_sheet.png")
    for name, values in means.items():
        log.info("%-16s %s", name, "  ".join(f"{key} {value:g}" for key, value in values.items()))
