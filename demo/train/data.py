"""Shards of `demo.dataset`, unpacked once and memory-mapped. New shards are picked up while training runs.

What is made from a shard (the unpacked copy, its latents) outlives it, so a note beside it says which shard that was.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.dataset import SHORTEST_CLIP, fits_latents, load_shard, read_settings, shard_paths
from factorportrait.errors import UserError
from factorportrait.files import whole_file, whole_folder
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig

log = logging.getLogger(__name__)
PICTURES = ("frames", "twin_frames", "normals", "portrait", "portrait_normals")
Source = dict[str, Any]  # of a shard, see `source_of`


def check_clips(folder: Path, split: str, config: ModelConfig) -> None:
    """Raises: UserError: the clips of a folder are of another split, or do not fit the model."""
    found = read_settings(folder)
    size = (found["size"], found["size"])
    if found["split"] == split and size == (config.height, config.width) and fits_latents(found["frames"]):
        return
    raise UserError(
        f"clips in {folder}",
        expected=f"split {split}, {config.height} pixels, {FRAMES_PER_LATENT}n + 1 frames and at least {SHORTEST_CLIP}",
        found=f"split {found['split']}, {found['size']} pixels, {found['frames']} frames",
        action=f"python -m demo.dataset --split {split} --size {config.height} --out DIR --clips N renders such clips",
    )


def source_of(shard: Path) -> Source:
    """What tells a shard from others of its name: the settings of its folder, and the file's size and time."""
    status = shard.stat()
    return {"dataset": read_settings(shard.parent), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def read_source(note: Path) -> Source | None:
    """The note beside a copy; None without one, and nothing that any shard has where it is damaged."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write_source(note: Path, source: Source) -> None:
    with whole_file(note) as part:
        part.write_text(json.dumps(source) + "\n", encoding="utf-8")


def is_made_from(copy: Path, note: Path, source: Source) -> bool:
    """Whether `copy` is there and was made from that shard. One from before there were notes is believed, and gets its note."""
    if not copy.exists():
        return False
    found = read_source(note)
    if found is None:
        write_source(note, source)
    return found in (None, source)


class ClipStore:
    """Clips of one split. `store["frames"]` is not one array: clips are looked up by index with `get`."""

    def __init__(self, folder: Path, unpacked: Path):
        self.folder, self.unpacked = folder, unpacked
        self._shards: list[dict[str, np.ndarray]] = []
        self._names: list[str] = []
        self.sources: dict[str, Source] = {}  # by name of the shard, as it was when it was opened
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
        target, note = self.unpacked / path.stem, "source.json"
        # Before the shard is read: one that is replaced meanwhile is unpacked again next time.
        source = self.sources[path.stem] = source_of(path)
        if not is_made_from(target, target / note, source):
            with whole_folder(target) as part:
                for name, values in load_shard(path).items():
                    np.save(part / f"{name}.npy", values)
                write_source(part / note, source)
        return {
            file.stem: np.load(file, mmap_mode="r" if file.stem in PICTURES else None) for file in target.glob("*.npy")
        }


def to_unit(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in -1..1, as the runtime does."""
    return torch.from_numpy(np.array(pictures)).to(device).movedim(-1, -4).float().div(127.5).sub(1)


def to_bytes(frames: Tensor) -> np.ndarray:
    """[..., 3, T, H, W] in -1..1 -> uint8 [..., T, H, W, 3]."""
    return frames.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-4, -1).cpu().numpy()
