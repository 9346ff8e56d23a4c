"""Shards of `demo.dataset`, unpacked once and memory-mapped. New shards are picked up while training runs."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.dataset import load_shard, shard_paths
from factorportrait.errors import UserError

log = logging.getLogger(__name__)
PICTURES = ("frames", "twin_frames", "normals", "portrait", "portrait_normals")


class ClipStore:
    """Clips of one split. `store["frames"]` is not one array: clips are looked up by index with `get`."""

    def __init__(self, folder: Path, unpacked: Path):
        self.folder, self.unpacked = folder, unpacked
        self._shards: list[dict[str, np.ndarray]] = []
        self._names: list[str] = []
        self._places: list[tuple[int, int]] = []
        self.refresh()
        if not self._places:
            raise UserError(f"no shards in {folder}", expected="at least one", action="run python -m demo.dataset")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shards(self) -> list[tuple[str, dict[str, np.ndarray]]]:
        """Name and arrays of every shard."""
        return list(zip(self._names, self._shards, strict=True))

    def refresh(self) -> None:
        """Add the shards that were finished since the last call."""
        for path in shard_paths(self.folder):
            if path.stem in self._names:
                continue
            shard = self._open(path)
            self._places += [(len(self._shards), clip) for clip in range(len(shard["kind"]))]
            self._shards.append(shard)
            self._names.append(path.stem)

    def get(self, clip: int, name: str) -> np.ndarray:
        """One array of one clip, without the leading axis n."""
        shard, place = self._places[clip]
        return self._shards[shard][name][place]

    def has(self, clip: int, name: str) -> bool:
        """Whether `get` finds it: shards of older versions have no twins."""
        return name in self._shards[self._places[clip][0]]

    def _open(self, path: Path) -> dict[str, np.ndarray]:
        target = self.unpacked / path.stem
        if not target.is_dir():
            temporary = target.with_name(f"{target.name}.part.{os.getpid()}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, values in load_shard(path).items():
                np.save(temporary / f"{name}.npy", values)
            os.replace(temporary, target)
        return {
            file.stem: np.load(file, mmap_mode="r" if file.stem in PICTURES else None) for file in target.glob("*.npy")
        }


def to_unit(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in -1..1, as the runtime does."""
    return torch.from_numpy(np.array(pictures)).to(device).movedim(-1, -4).float().div(127.5).sub(1)


def to_bytes(frames: Tensor) -> np.ndarray:
    """[..., 3, T, H, W] in -1..1 -> uint8 [..., T, H, W, 3]."""
    return frames.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-4, -1).cpu().numpy()
