"""Which files a checkpoint has. No torch here, so that an export with nothing to do ends at once; the runtime asks too."""

from __future__ import annotations

import json
from pathlib import Path

from factorportrait.errors import CheckpointError
from factorportrait.files import sha256_file
from factorportrait.model_config import ModelConfig

CONFIG = "config.json"
HEAD = "head.npz"
# How files of weights end, and indices of them.
WEIGHTS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt")
PARTS = ("vae", "dit", "expression")  # sub-modules of FactorPortrait, one file each


def weight_file(part: str) -> str:
    """Name of the file with the weights of a sub-module."""
    return f"{part}.safetensors"


def is_released(path: Path) -> bool:
    """Whether this is a checkpoint as others publish it (`factorportrait.export.weights.released`) and none of ours."""
    if path.is_file():
        return path.name.endswith(WEIGHTS)
    if not path.is_dir() or any((path / weight_file(part)).is_file() for part in PARTS):
        return False
    return (path / "transformer").is_dir() or any(file.name.endswith(WEIGHTS) for file in path.iterdir())


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint that an export depends on.

    Raises:
        CheckpointError: the folder or one of its files is missing.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {path}", expected=f"a folder with {CONFIG} and " + ", ".join(map(weight_file, PARTS)),
            found="a file" if path.exists() else "nothing", action="name the folder of a checkpoint: fp-export CHECKPOINT",
        )  # fmt: skip
    files = [path / CONFIG, *(path / weight_file(part) for part in PARTS)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"checkpoint {path}", expected="a file " + ", ".join(missing), found="none",
            action="copy the whole folder, or name another: fp-export CHECKPOINT",
        )  # fmt: skip
    return files + ([path / HEAD] if (path / HEAD).is_file() else [])


def checkpoint_digests(path: Path) -> dict[str, str]:
    """Digest of each of the `checkpoint_files`, by name; a bundle's provenance keeps them.

    Raises:
        CheckpointError: the folder or one of its files is missing.
    """
    return {file.name: sha256_file(file) for file in checkpoint_files(path)}


def read_config(path: Path) -> ModelConfig:
    """Read a checkpoint's config.json.

    Raises:
        CheckpointError: missing, no JSON, or a key is unknown, missing or refused.
    """
    file = path / CONFIG
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path}", expected=f"a file {CONFIG}", found="none",
            action="copy the whole folder, or name another: fp-export CHECKPOINT",
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}", expected="JSON", found=str(error), action="correct the file") from error
    return ModelConfig.from_dict(data, str(file))
