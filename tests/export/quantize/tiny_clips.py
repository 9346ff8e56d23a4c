"""Driven clips for the tiny model: colours that drift, no renderer."""

from __future__ import annotations

import numpy as np

from factorportrait.export.quantize.clips import DrivenClip
from factorportrait.runtime.conditions import DrivingFrame
from factorportrait.runtime.inputs import default_camera


def smooth_pictures(count: int, size: int, seed: int) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.linspace(0, 1, count), np.linspace(0, 3, size), np.linspace(0, 3, size), indexing="ij")
    waves = [np.sin(a * x + b * y + 4 * c * t + d) for a, b, c, d in rng.uniform(0, 6, (3, 4))]
    return np.ascontiguousarray(127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def tiny_clip(config, frames: int = 13, seed: int = 0, truth: bool = False) -> DrivenClip:
    """A clip of `frames` frames; its truth, if asked for, is any picture."""
    K, c2w = default_camera(config)
    normals = smooth_pictures(frames, config.height, seed)
    images = smooth_pictures(frames, config.expression.image_size, seed + 1)
    driving = tuple(DrivingFrame(normal, K, c2w, image=image) for normal, image in zip(normals, images, strict=True))
    portrait = smooth_pictures(1, config.height, seed + 2)[0]
    return DrivenClip(f"tiny-{seed}", portrait, driving, smooth_pictures(frames, config.height, seed + 3) if truth else None)
