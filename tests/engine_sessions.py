"""A short session on any engine, for comparing engines."""

from __future__ import annotations

import numpy as np

from factorportrait.runtime.conditions import DrivingFrame
from factorportrait.runtime.inputs import default_camera


def drifting_pictures(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: waves of colour that move."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    t, y, x = np.meshgrid(np.arange(count) / 5, np.linspace(0, 4, height), np.linspace(0, 4, width), indexing="ij")
    return (127.5 + 120 * np.stack([np.sin(x * (i + 1) + y + t + shift) for i, shift in enumerate(phase)], -1)).astype(np.uint8)


def driving(config, count: int, seed: int = 0) -> list[DrivingFrame]:
    """Frames with a moving camera."""
    K, c2w = default_camera(config)
    normals = drifting_pictures(count, config.height, config.width, seed)
    side = config.expression.image_size
    images = drifting_pictures(count, side, side, seed + 1)
    cameras = np.repeat(c2w[None], count, axis=0)
    cameras[:, 0, 3] += 0.01 * np.arange(count)
    return [DrivingFrame(normals[i], K, cameras[i], image=images[i]) for i in range(count)]


def latents_and_pictures(opened, count: int, *, session=None, portrait_seed: int = 9, **options) -> tuple[np.ndarray, np.ndarray]:
    """Clean latents [1, C, N, h, w] of all chunks, and pictures uint8 [count, H, W, 3]."""
    session = session or opened.session(**options)
    config, kept = opened.config, []
    generate = session._denoiser.generate

    def kept_too(chunk):
        latents = generate(chunk)
        kept.append(latents.fetch().copy())
        return latents

    session._denoiser.generate = kept_too
    try:
        session.set_reference(drifting_pictures(1, config.height, config.width, portrait_seed)[0])
        pictures = np.stack(list(session.frames(driving(config, count))))
    finally:
        session._denoiser.generate = generate
    return np.concatenate(kept, axis=2), pictures
