"""What is generated: test people and motions of the demo's world, and any combination of them with its true render."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.model_config import ModelConfig
from factorportrait.runtime.conditions import DrivingFrame
from factorportrait.runtime.media.fit import square_crop
from factorportrait.runtime.session import OpenBundle
from factorportrait.runtime.vae import StreamingVAE, to_pictures, to_unit

MODES = {
    "frontal": "frontal",
    "novel": "novel view",
    "orbit": "moving camera, still face",
    "all": "everything moves",
}
SPLIT = "test"
_SPLIT_CODE = 17  # keeps these clips apart from the shards of any split, which use 11, 12 and 13
REGIONS = ("iris", "hair", "skin", "lips")


class World:
    """The demo's people, motions and renderer, which lie beside the package in a checkout.

    The one place of the package that reaches for `demo`, and by name, because it is there only for who measures.

    Raises:
        UserError: this is no checkout, or packages of the renderer, of SSIM or of the reader are missing.
    """

    def __init__(self):
        try:
            self.dataset = importlib.import_module("demo.dataset")
            self.appearance = importlib.import_module("demo.world.appearance")
            self.motion = importlib.import_module("demo.world.motion")
            # Not used before the first clip is rendered, generated and compared, which is late to learn that they are missing.
            # SSIM needs both, so they are wanted although nothing is read.
            importlib.import_module("skimage.metrics")
            importlib.import_module("scipy.optimize")
        except ImportError as error:
            missing = (error.name or "").split(".")[0]
            install = "run: pip install -e '.[demo]'"
            expected, action = "the packages of the extra [demo]", install
            if missing in ("demo", ""):
                expected, action = "the demo's world from a checkout of the repository", f"clone the repository and {install}"
            raise UserError(
                "ground-truth renders and their figures", expected=expected, found=f"no package {missing or error}", action=action
            ) from error


@dataclass(frozen=True)
class Motion:
    """T frames: coefficients [T, 52], head rotation [T, 3, 3] and translation [T, 3], K [T, 3, 3], c2w [T, 4, 4]."""

    coefficients: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    K: np.ndarray
    c2w: np.ndarray

    def __len__(self) -> int:
        return len(self.coefficients)

    def neutral(self) -> Motion:
        return replace(self, coefficients=np.zeros_like(self.coefficients))

    def select(self, index: np.ndarray | slice) -> Motion:
        return Motion(*(getattr(self, name)[index] for name in MOTION_FIELDS))

    def mixed(self, expression: Motion | None = None, pose: Motion | None = None, camera: Motion | None = None):
        """This motion with factors taken from others."""
        expression, pose, camera = expression or self, pose or self, camera or self
        return Motion(expression.coefficients, pose.rotation, pose.translation, camera.K, camera.c2w)

    @property
    def camera_rotation(self) -> np.ndarray:
        """[T, 3, 3] world -> camera: how the shoulders are seen."""
        return np.swapaxes(self.c2w[:, :3, :3], 1, 2)

    @property
    def seen_rotation(self) -> np.ndarray:
        """[T, 3, 3] head -> camera: how the head is seen."""
        return self.camera_rotation @ self.rotation


MOTION_FIELDS = ("coefficients", "rotation", "translation", "K", "c2w")


@dataclass(frozen=True)
class Clip:
    """A test person with a portrait, and a motion with its true render.

    Attributes:
        name: of the person, such as "test-3".
        identity, scene: of the demo's world.
        portrait: uint8 [H, W, 3]; portrait_motion: of the portrait, T = 1.
        frames, normals: uint8 [T, H, W, 3].
    """

    name: str
    mode: str
    identity: Any
    scene: Any
    portrait: np.ndarray
    portrait_motion: Motion
    motion: Motion
    frames: np.ndarray
    normals: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.frames.shape[1:3]


def open_clips(
    world: World, config: ModelConfig, count: int, frames: int, modes: tuple[str, ...], seed: int, data: Path | None
) -> Iterator[Clip]:
    """`count` test people, one clip each, the modes in turn: rendered now, or from shards of the test split.

    Raises:
        UserError: shards of another split or size, too short or too few.
    """
    if data is not None:
        yield from _from_shards(world, config, count, frames, modes, data)
        return
    for index in range(count):
        yield make_clip(world, config, modes[index % len(modes)], frames, seed, index)


def make_clip(world: World, config: ModelConfig, mode: str, frames: int, seed: int, index: int) -> Clip:
    """Test person number `index` of a seed with a random clip of a mode, rendered at the bundle's size."""
    rng = np.random.default_rng([_SPLIT_CODE, seed, index])
    number = seed * 1_000_000 + index
    identity = world.appearance.Identity.sample(number, SPLIT)
    scene = world.appearance.Scene.sample(rng)
    head, size = identity.head(), (config.height, config.width)
    motion, still = (
        Motion(*(np.asarray(getattr(clip, name)) for name in MOTION_FIELDS))
        for clip in (
            world.motion.sample_clip(rng, head, frames, *size, kind=mode),
            world.motion.sample_portrait(rng, head, *size),
        )
    )
    portrait, _ = render(world, identity, scene, still, size)
    pictures, normals = render(world, identity, scene, motion, size)
    return Clip(f"{SPLIT}-{number}", mode, identity, scene, portrait[0], still, motion, pictures, normals)


def _from_shards(
    world: World, config: ModelConfig, count: int, frames: int, modes: tuple[str, ...], data: Path
) -> Iterator[Clip]:
    _check_shards(config, frames, data)
    order = [modes[i % len(modes)] for i in range(count)]
    found: dict[str, list[Clip]] = {mode: [] for mode in modes}
    for values in world.dataset.iterate_clips(data):
        mode = world.motion.KINDS[int(values["kind"])]
        if mode in found and len(found[mode]) < order.count(mode):
            found[mode].append(_clip_of_shard(world, values, mode, frames))
        if all(len(found[mode]) == order.count(mode) for mode in found):
            break
    missing = [mode for mode in found if len(found[mode]) < order.count(mode)]
    if missing:
        raise UserError(
            f"--data {data}", expected=f"{order.count(missing[0])} clips of mode {missing[0]}",
            found=str(len(found[missing[0]])), action="render more clips, name fewer --identities, or leave --data out",
        )  # fmt: skip
    for mode in order:
        yield found[mode].pop(0)


def _check_shards(config: ModelConfig, frames: int, data: Path) -> None:
    note = data / "dataset.json"
    action = f"python -m demo.dataset --split {SPLIT} --size {config.height} --frames {frames} --out DIR --clips N"
    expected = f"a folder of shards of the {SPLIT} split, {config.height}x{config.width}, {frames} frames or more"
    try:
        settings = json.loads(note.read_text(encoding="utf-8"))
        split, size, length = settings["split"], settings["size"], settings["frames"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data {data}", expected=expected, found="no usable dataset.json", action=action) from error
    if split != SPLIT or (size, size) != (config.height, config.width) or length < frames:
        raise UserError(f"--data {data}", expected=expected, found=f"{split}, {size}, {length} frames", action=action)


def _clip_of_shard(world: World, values: dict[str, np.ndarray], mode: str, frames: int) -> Clip:
    identity = world.appearance.Identity.from_dict(json.loads(str(values["identity"])))
    scene = world.appearance.Scene.from_dict(json.loads(str(values["scene"])))
    return Clip(
        f"{SPLIT}-{identity.seed}", mode, identity, scene, values["portrait"],
        Motion(*(values["portrait_" + name][None] for name in MOTION_FIELDS)),
        Motion(*(values[name][:frames] for name in MOTION_FIELDS)),
        values["frames"][:frames], values["normals"][:frames],
    )  # fmt: skip


def render(world: World, identity: Any, scene: Any, motion: Motion, size: tuple[int, int]):
    """True frames and normal maps of the neutral face, both uint8 [T, H, W, 3]."""
    fields = (getattr(motion, name) for name in MOTION_FIELDS)
    return world.dataset.render_clip(identity, *fields, scene, *size)


def regions(world: World, clip: Clip, motion: Motion, threshold: float) -> dict[str, np.ndarray]:
    """Where iris, hair, skin and lips of the clip's person are seen in a motion: [T, H, W] each.

    A pixel belongs to a region when a render with only that colour turned to its opposite differs there.
    """
    truth, _ = render(world, clip.identity, clip.scene, motion, clip.size)
    masks = {}
    for name in REGIONS:
        opposite = tuple(0.0 if value > 127.5 else 255.0 for value in getattr(clip.identity, name))
        other, _ = render(world, replace(clip.identity, **{name: opposite}), clip.scene, motion, clip.size)
        masks[name] = np.abs(truth.astype(np.int16) - other).max(-1) > threshold
    masks["skin"] &= ~(masks["lips"] | masks["hair"])
    return masks


def drive(
    opened: OpenBundle, portrait: np.ndarray, expression: np.ndarray, normals: np.ndarray, motion: Motion, **options
) -> np.ndarray:
    """Generate with the runtime's own loop.

    Args:
        portrait: uint8 [H, W, 3]; normals: [T, H, W, 3].
        expression: pictures [T, H, W, 3] for the expression encoder, or ARKit coefficients [T, 52].
        motion: gives the cameras.
        options: fields of `factorportrait.runtime.session.SessionOptions`.

    Returns: uint8 [T, H, W, 3].
    """
    session = opened.session(**options)
    session.check_length(len(normals))
    session.set_reference(np.ascontiguousarray(portrait))
    side = opened.config.expression.image_size
    pictured = expression.ndim == 4
    driving = (
        DrivingFrame(
            normal, K, c2w, image=square_crop(shown, side) if pictured else None, coefficients=None if pictured else shown
        )
        for normal, K, c2w, shown in zip(normals, motion.K, motion.c2w, expression, strict=True)
    )
    return np.stack(list(session.frames(driving)))


class Autoencoder:
    """The bundle's temporal VAE: pictures -> latents -> pictures, one latent frame at a time."""

    def __init__(self, opened: OpenBundle):
        self._encoder, self._decoder = (StreamingVAE(opened.engine, direction) for direction in ("encode", "decode"))

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> the same; a group that is not full is completed by repeating the last frame."""
        self._encoder.reset()
        self._decoder.reset()
        pictures: list[np.ndarray] = []
        start, size = 0, 1
        while start < len(frames):
            group = frames[np.minimum(np.arange(start, start + size), len(frames) - 1)]
            for i, frame in enumerate(group):
                to_unit(frame, self._encoder.input[0, :, i])
            self._decoder.input[...] = self._encoder()
            pictures += to_pictures(self._decoder())
            start, size = start + size, 4
        return np.stack(pictures[: len(frames)])


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """What the report says about the bundle; no paths."""
    config = bundle.config
    return {
        "name": config.name, "precision": bundle.manifest.precision, "height": config.height, "width": config.width,
        "source_key": bundle.manifest.source_key, "bytes": bundle.total_bytes(),
    }  # fmt: skip
