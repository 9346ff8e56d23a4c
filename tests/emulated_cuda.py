"""CUDA kernels compiled for the CPU, whose threads are threads (`cpp_ext/cuda_on_cpu.h`)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from factorportrait.kernels import source_path


def compiled(driver: str, folder: Path) -> ctypes.CDLL:
    """C++ that includes cuda_on_cpu.h and kernels, as a library; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "driver.cpp").write_text(driver, encoding="utf-8")
    includes = [f"-I{Path(__file__).parent / 'cpp_ext'}", f"-I{source_path('embed.cu').parent}"]
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    command = [compiler, *options, *includes, "-o", "driver.so", "driver.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "driver.so"))
