"""Clips to calibrate and to judge with: rendered people of the demo's world, or a user's own portraits and driving."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig

if TYPE_CHECKING:
    from factorportrait.runtime.conditions import DrivingFrame

# People of these splits are no two the same. Rounding is fitted to some, and judged on others.
CALIBRATION_SPLIT, TEST_SPLIT = "val", "test"
# Keeps these clips apart from every other draw of the world, which use 11, 12, 13 and 17.
_DRAW = 19
KINDS = ("all", "novel", "frontal", "orbit")
ACTION = "one folder per clip, each with a portrait.* and a driving.* or driving/ as fp-run takes them"


@dataclass(frozen=True)
class DrivenClip:
    """A portrait uint8 [H,W,3] and what drives it; with the true frames uint8 [T,H,W,3] where they are known."""

    name: str
    portrait: np.ndarray
    driving: tuple[DrivingFrame, ...]
    truth: np.ndarray | None = None

    def digest(self) -> str:
        """Of everything that generating it depends on."""
        sha = hashlib.sha256(self.portrait.tobytes())
        for frame in self.driving:
            for part in (frame.normals, frame.K, frame.c2w, frame.image, frame.coefficients):
                sha.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
        return sha.hexdigest()


def longest_clip(config: ModelConfig) -> int:
    """Frames of a clip that both modes can make."""
    return 1 + FRAMES_PER_LATENT * (config.generation.max_clip_frames - 1)


def demo_clips(config: ModelConfig, split: str, count: int, frames: int, seed: int = 0) -> list[DrivenClip]:
    """`count` people of a split of the demo's world, one clip each, with their true renders.

    Raises:
        UserError: this is no checkout, or the renderer's packages are missing.
    """
    # Late: only who quantises needs runtime and renderer.
    from factorportrait.benchmarks.quality.cases import MOTION_FIELDS, Motion, World, render
    from factorportrait.runtime.conditions import DrivingFrame
    from factorportrait.runtime.media.fit import square_crop

    world, size, clips = World(), (config.height, config.width), []
    for index in range(count):
        rng = np.random.default_rng([_DRAW, seed, index])
        identity = world.appearance.Identity.sample(seed * 1_000_000 + index, split)
        scene, head = world.appearance.Scene.sample(rng), identity.head()
        kind = KINDS[index % len(KINDS)]
        motion, still = (
            Motion(*(np.asarray(getattr(drawn, name)) for name in MOTION_FIELDS))
            for drawn in (
                world.motion.sample_clip(rng, head, frames, *size, kind=kind),
                world.motion.sample_portrait(rng, head, *size),
            )
        )
        portrait, _ = render(world, identity, scene, still, size)
        truth, normals = render(world, identity, scene, motion, size)
        driving = tuple(
            DrivingFrame(normal, K, c2w, image=square_crop(picture, config.expression.image_size))
            for normal, K, c2w, picture in zip(normals, motion.K, motion.c2w, truth, strict=True)
        )
        clips.append(DrivenClip(f"{split}-{index}-{kind}", np.ascontiguousarray(portrait[0]), driving, truth))
    return clips


def media_clips(bundle: Bundle, folder: Path, frames: int) -> list[DrivenClip]:
    """A user's clips: `folder/NAME/portrait.*` and `folder/NAME/driving.*` or `driving/`, read as fp-run does.

    Raises:
        UserError: there is none, one is incomplete or cannot be read, or a clip has fewer frames than a second chunk needs.
    """
    from factorportrait.runtime.inputs import open_inputs
    from factorportrait.runtime.media.portrait import load_portrait

    config = bundle.config
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not folders:
        found = "no folder of a clip in it" if folder.is_dir() else "no such folder"
        raise UserError(f"--calibration {folder}", expected=ACTION, found=found, action="put some clips there")
    clips = []
    for path in folders:
        parts = [sorted(path.glob(pattern)) for pattern in ("portrait.*", "driving*")]
        if any(len(part) != 1 for part in parts):
            found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "an empty folder"
            raise UserError(f"--calibration: {path}", expected="one portrait.* and one driving", found=found, action=ACTION)
        portrait, driving = (part[0] for part in parts)
        frames_of = open_inputs(bundle, driving, num_frames=frames)
        driven = tuple(itertools.islice(frames_of, frames))
        if not driven:
            raise UserError(f"--calibration: {driving}", expected="some frames", found="none", action=ACTION)
        clips.append(DrivenClip(path.name, load_portrait(portrait, config.height, config.width), driven))
    return clips
