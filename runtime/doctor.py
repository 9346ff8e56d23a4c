"""fp-run doctor: what this machine can do, what is missing, and the command that adds it. Imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from factorportrait.bundle import MANIFEST
from factorportrait.cores import usable_cores
from factorportrait.engines.choose import NAMES, obstacle
from factorportrait.engines.tensorrt.machine import find_gpu
from factorportrait.errors import UserError
from factorportrait.shipped import default_bundle_path, shipped_checkpoint

# CPU features that decide how fast ONNX Runtime's kernels are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, whether it is there, what it is for, and the command that adds it."""

    name: str
    present: bool
    detail: str
    purpose: str
    action: str = ""


def extra(name: str) -> str:
    """The command that adds an extra of this package."""
    return f'pip install "factorportrait[{name}]" (in a checkout: pip install -e ".[{name}]")'


def findings() -> list[Finding]:
    """Look at the machine."""
    return [
        _machine(),
        _package("onnxruntime", "run bundles", "pip install onnxruntime", ("onnxruntime", "onnxruntime-gpu")),
        _package("av", "read and write video", "pip install av"),
        _package("PIL", "read portraits", "pip install pillow", ("pillow",)),
        _package("warp", "render meshes to normal maps", extra("mesh"), ("warp-lang",)),
        _extension(),
        _package("torch", "fp-export", extra("export")),
        _package("onnx", "fp-export", extra("export")),
        _package("safetensors", "fp-export", extra("export")),
        _checkpoint(),
        _bundle(),
        _gpu(),
        _package("tensorrt", "TensorRT plans", extra("tensorrt"), ("tensorrt-cu13", "tensorrt")),
        _package("cuda", "memory and graphs of the GPU", extra("tensorrt"), ("cuda-python",)),
        *(_engine(name) for name in NAMES),
        _program("ffprobe", "looking into videos by hand", "apt-get install ffmpeg"),
    ]


def doctor(as_json: bool = False) -> int:
    """Print the findings; the exit code is 0 when the demo can run here, else 1."""
    found = findings()
    needed = {"onnxruntime", "av", "PIL"}
    able = all(finding.present for finding in found if finding.name in needed)
    if as_json:
        print(json.dumps({"can_run": able, "findings": [asdict(finding) for finding in found]}))
        return 0 if able else 1
    width = max(len(finding.name) for finding in found)
    for finding in found:
        mark = "ok     " if finding.present else "missing"
        line = f"{mark} {finding.name:<{width}}  {finding.detail or finding.purpose}"
        if not finding.present and finding.action:
            line += f"  -> {finding.action}"
        print(line)
    print(
        "This machine can run bundles." if able else "This machine cannot run bundles yet: see what is missing above."
    )
    return 0 if able else 1


def _machine() -> Finding:
    cores = usable_cores()
    detail = f"{platform.system()} {platform.machine()}, cores to use: {cores}, Python {platform.python_version()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        words = set(cpuinfo.read_text().split())
        detail += ", " + (" ".join(flag for flag in CPU_FLAGS if flag in words) or "no AVX2")
    return Finding("machine", True, detail, "everything")


def _package(module: str, purpose: str, action: str, names: tuple[str, ...] = ()) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(module, False, "", purpose, action)
    for name in names or (module,):
        try:
            return Finding(module, True, f"{name} {importlib.metadata.version(name)}: {purpose}", purpose)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding(module, True, purpose, purpose)


def _extension() -> Finding:
    present = importlib.util.find_spec("factorportrait._embed") is not None
    purpose = "fused pose and camera embedding in C++ (without it NumPy does the same)"
    return Finding(
        "C++ extension", present, purpose if present else "", purpose,
        "apt-get install g++, then pip install --force-reinstall --no-deps . in a checkout",
    )  # fmt: skip


def _checkpoint() -> Finding:
    action = "git checkout -- demo/checkpoint, or install a complete wheel"
    try:
        return Finding("demo checkpoint", True, str(shipped_checkpoint()), "the shipped demo")
    except UserError:
        return Finding("demo checkpoint", False, "", "the shipped demo", action)


def _bundle() -> Finding:
    path = default_bundle_path("demo", "fp32")
    present = (path / MANIFEST).is_file()
    return Finding("demo bundle", present, str(path) if present else "", "a bare fp-run makes it", "fp-export")


def _gpu() -> Finding:
    purpose = "NVIDIA GPU; without one bundles run on the CPU"
    action = "nothing to do on a machine without a GPU; else install NVIDIA's driver and look at nvidia-smi"
    gpu = find_gpu()
    if isinstance(gpu, str):
        return Finding("NVIDIA GPU", False, f"{gpu}; bundles run on the CPU", purpose, action)
    return Finding("NVIDIA GPU", True, f"{gpu.name}, compute capability {gpu.sm}", purpose)


def _engine(name: str) -> Finding:
    purpose = f"fp-run --engine {name}"
    against = obstacle(name)
    if against is None:
        return Finding(f"engine {name}", True, purpose, purpose)
    detail = f"it needs {against.expected}, found: {against.found}"
    return Finding(f"engine {name}", False, detail, purpose, against.action)


def _program(name: str, purpose: str, action: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or "", purpose, action)
