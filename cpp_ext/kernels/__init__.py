"""Sources that are compiled where they run: the CUDA kernels, and the header that they share with the C++ extension."""

from __future__ import annotations

from pathlib import Path


def source_path(name: str) -> Path:
    """Path of an installed source file, for instance `embed.cu`. Its folder is the include path for NVRTC."""
    path = Path(__file__).parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such kernel source; the package is not whole, install it again")
    return path
