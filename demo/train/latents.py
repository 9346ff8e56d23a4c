"""Everything that the transformer is trained on, computed once per clip and stored in half precision.

One .npz per shard. N latent frames, T frames, h x w latent cells:

| array | shape |
|---|---|
| latents, twin_latents, pose | [n, C, N, h, w] of the pictures, of their twins and of the normal maps, normalised |
| reference | [n, C, 1, h, w] of the portrait |
| rays | [n, 24, N, h, w] |
| coefficients, twin_coefficients | [n, 4N, 52] by groups of four frames |
| weights | [n, N, h, w]: 0 behind the head, 1 on it, 2 at eyes and mouth |
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.dataset import read_settings
from demo.train.data import ClipStore, Source, is_made_from, read_source, source_of, to_unit, write_source
from demo.train.expression import MIRROR
from factorportrait.errors import UserError
from factorportrait.export.models.patch_vae import PatchVAE
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.media.camera import ray_maps

log = logging.getLogger(__name__)
MARGIN_PX = 5  # around the projected eyes and mouth; brows and lips lie outside of those vertices
MIRRORED = "-mirrored"  # ends the name of a shard's mirror image


def group_frames(values: np.ndarray) -> np.ndarray:
    """[T, ...] of 4n + 1 frames -> [4(n + 1), ...]: the first frame four times, then the others."""
    return np.concatenate([np.repeat(values[:1], FRAMES_PER_LATENT, axis=0), values[1:]])


def pack_rays(K: np.ndarray, c2w: np.ndarray, config: ModelConfig) -> np.ndarray:
    """K [T, 3, 3], c2w [T, 4, 4] -> [24 or 6, N, h, w] as the runtime packs them."""
    rays = group_frames(ray_maps(K, c2w, config.height, config.width, config.vae.spatial_stride))
    groups = rays.reshape(-1, FRAMES_PER_LATENT, *rays.shape[1:])
    groups = groups if config.fusion.rays == "packed" else groups[:, -1:]
    return groups.reshape(len(groups), -1, *rays.shape[2:]).swapaxes(0, 1)


def face_cells(clip: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """[N, h, w] bool: cells that the eyes or the mouth touch in the last frame of the group. clip: arrays of one clip."""
    stride = config.vae.spatial_stride
    boxes = clip["face_boxes"][::FRAMES_PER_LATENT]
    cells = np.zeros((len(boxes), config.latent_height, config.latent_width), bool)
    for slot, of_frame in enumerate(boxes):
        for low, high in of_frame.reshape(-1, 2, 2):
            left, top = np.maximum(np.floor((low - MARGIN_PX) / stride), 0).astype(int)
            right, bottom = np.maximum(np.floor((high + MARGIN_PX) / stride) + 1, 0).astype(int)
            cells[slot, top:bottom, left:right] = True
    return cells


def cell_classes(clip: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """[N, h, w] uint8: 0 background, 1 head and shoulders, 2 eyes or mouth."""
    stride = config.vae.spatial_stride
    covered = clip["normals"].any(-1)
    covered = covered.reshape(len(covered), config.latent_height, stride, config.latent_width, stride).any((2, 4))
    covered = group_frames(covered).reshape(-1, FRAMES_PER_LATENT, *covered.shape[1:]).any(1)
    return np.where(face_cells(clip, config), 2, covered).astype(np.uint8)


@torch.no_grad()
def latent_statistics(vae: PatchVAE, store: ClipStore, device: torch.device, clips: int = 64) -> dict[str, list[float]]:
    """What the raw latents of pictures are normalised with, per channel; the mean square over all channels becomes 1."""
    picked = np.linspace(0, len(store) - 1, min(clips, len(store))).astype(int)
    latents = torch.stack([encode(vae, store.get(int(clip), "frames")[None], device)[0] for clip in picked])
    channels = latents.movedim(1, 0).flatten(1)
    mean, std = channels.mean(1), channels.std(1)
    # Half way between equal channels and the components' own sizes: fine detail, which is small, stays the smaller part of the
    # transformer's loss, and drowns in noise before the coarse shape does.
    std = (std * std.mean()).sqrt()
    return {"mean": [round(float(v), 5) for v in mean], "std": [round(float(v), 5) for v in std]}


@torch.no_grad()
def encode(vae: PatchVAE, pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [n, T, H, W, 3] -> latents [n, C, N, h, w]; on a CPU clip by clip, which is no slower and takes less memory."""
    parts = []
    together = 1 if device.type == "cpu" else len(pictures)
    for start in range(0, len(pictures), together):
        parts.append(vae.encode_whole(to_unit(pictures[start : start + together], device)))
    return torch.cat(parts)


@torch.no_grad()
def encode_shard(
    vae: PatchVAE, shard: dict[str, np.ndarray], config: ModelConfig, device: torch.device
) -> dict[str, np.ndarray]:
    """Arrays of one shard -> see the module's table."""
    clips = [{name: values[i] for name, values in shard.items()} for i in range(len(shard["kind"]))]
    return {
        "latents": encode(vae, shard["frames"], device).cpu().numpy().astype(np.float16),
        "twin_latents": encode(vae, shard["twin_frames"], device).cpu().numpy().astype(np.float16),
        "pose": encode(vae, shard["normals"], device).cpu().numpy().astype(np.float16),
        "reference": encode(vae, shard["portrait"][:, None], device).cpu().numpy().astype(np.float16),
        "rays": np.stack([pack_rays(clip["K"], clip["c2w"], config) for clip in clips]).astype(np.float16),
        **{
            name: np.stack([group_frames(clip[name]) for clip in clips]).astype(np.float16)
            for name in ("coefficients", "twin_coefficients")
        },
        "weights": np.stack([cell_classes(clip, config) for clip in clips]),
    }


def mirrored(shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a shard (see `demo.dataset`) -> those that `encode_shard` needs of the same clips seen in a mirror.

    The world is reflected in the plane x = 0 of the head, which makes other people of these: left is right in hair, light and
    performance. Pictures, cameras, normals and boxes stay exact; actions do as far as the head's are symmetric, which all are but
    mouthFunnel (its halves differ by a tenth).
    """
    width = shard["frames"].shape[3]
    out = {name: shard[name][..., ::-1, :] for name in ("frames", "twin_frames", "normals", "portrait")}
    normals = np.ascontiguousarray(out["normals"])
    red, covered = normals[..., 0], normals[..., 0] | normals[..., 1] | normals[..., 2]
    red[...] = np.where(covered, 255 - red, 0)
    K, flip = shard["K"].copy(), np.diag([-1.0, 1.0, 1.0, 1.0])
    K[..., 0, 2] = width - K[..., 0, 2]
    left, top, right, bottom = np.moveaxis(shard["face_boxes"], -1, 0)
    boxes = np.stack([width - right, top, width - left, bottom], -1)
    actions = {name: shard[name][..., MIRROR] for name in ("coefficients", "twin_coefficients")}
    return {**out, **actions, "normals": normals, "K": K, "c2w": flip @ shard["c2w"] @ flip, "face_boxes": boxes,
            "kind": shard["kind"]}  # fmt: skip


def write_shard(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f"{path.name}.part.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def is_encoded(path: Path, source: Source) -> bool:
    """Whether these latents are there and are those of that shard."""
    return is_made_from(path, path.with_suffix(".json"), source)


def write_encoded(path: Path, arrays: dict[str, np.ndarray], source: Source) -> None:
    """Latents, then their note: should only one of them get written, they are made again."""
    write_shard(path, arrays)
    write_source(path.with_suffix(".json"), source)


def check_encoded(folder: Path, clips: Path) -> None:
    """Compare the latents in `folder` with the shards in `clips`. Shards may be gone, to save room; their settings may not.

    Raises:
        UserError: latents were made from other clips.
    """
    for path in sorted(folder.glob("shard-*.npz")):
        shard = clips / f"{path.stem.removesuffix(MIRRORED)}.npz"
        if shard.exists():
            fits, action = is_encoded(path, source_of(shard)), "run python -m demo.train latents first"
        else:
            found = read_source(path.with_suffix(".json"))
            fits, action = found is None or found.get("dataset") == read_settings(clips), "remove this file"
        if not fits:
            raise UserError(f"{path}", expected=f"latents of {shard}", found="those of other clips", action=action)


class LatentStore:
    """All encoded shards of a folder in memory; `refresh` adds new ones.

    Raises:
        UserError: there are none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: list[Path] = []
        self._arrays: dict[str, list[np.ndarray]] = {}
        self._places: list[tuple[int, int]] = []
        self.refresh()
        if not self._places:
            action = "run python -m demo.train latents first"
            raise UserError(f"no latents in {folder}", expected="at least those of one shard", action=action)

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("shard-*.npz")):
            if path in self._read:
                continue
            with np.load(path) as archive:
                for name in archive.files:
                    self._arrays.setdefault(name, []).append(archive[name])
            self._places += [(len(self._read), i) for i in range(len(self._arrays["latents"][-1]))]
            self._read.append(path)

    def stack(self, name: str, clips: list[int], device: torch.device | str = "cpu") -> Tensor:
        """The array `name` of these clips, [B, ...]; floats in fp32."""
        arrays, places = self._arrays[name], [self._places[clip] for clip in clips]
        values = torch.from_numpy(np.stack([arrays[shard][i] for shard, i in places])).to(device)
        return values.float() if values.is_floating_point() else values
