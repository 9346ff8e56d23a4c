"""Which engine runs a bundle here, and why. A forced one that cannot is an error; nothing is replaced in silence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from factorportrait.bundle import Bundle
from factorportrait.engines.base import Engine
from factorportrait.engines.tensorrt.machine import INSTALL_HINT as TENSORRT_HINT
from factorportrait.engines.tensorrt.machine import find_gpu
from factorportrait.errors import UserError

NAMES = ("tensorrt", "onnxruntime-cuda", "onnxruntime-cpu", "torch")  # the best first; torch is never chosen by itself
_TARGET_OF = {"tensorrt": "tensorrt", "onnxruntime-cuda": "cuda", "onnxruntime-cpu": "cpu"}
TORCH_HINT = 'pip install "factorportrait[export]" (in a checkout: pip install -e ".[export]")'
_CPU_HINT = "run on the CPU with --engine onnxruntime-cpu"


@dataclass(frozen=True)
class Obstacle:
    """Why an engine cannot run, and what to do about it."""

    expected: str
    found: str
    action: str


@dataclass(frozen=True)
class Choice:
    """The engine that was taken and the reason in words."""

    name: str
    reason: str


def obstacle(name: str, bundle: Bundle | None = None) -> Obstacle | None:
    """What stands against an engine on this machine, and with this bundle if one is given; None when nothing does.

    It looks at the driver, the installed packages and the manifest, and loads no library but the driver and ONNX Runtime.
    """
    found = _MACHINE[name]()
    if found is not None or bundle is None or name not in _TARGET_OF:
        return found
    manifest, target = bundle.manifest, _TARGET_OF[name]
    if target in manifest.targets:
        return None
    return Obstacle(
        f"a bundle for {target}", f"one for {', '.join(manifest.targets)}",
        f"export it for that target: fp-export CHECKPOINT --precision {manifest.precision} --target {target}",
    )  # fmt: skip


def choose(bundle: Bundle, name: str | None = None) -> Choice:
    """The engine called `name`, or the best one that runs here.

    Raises:
        UserError: no engine is called so, or it cannot run; without a name: none can.
    """
    if name is not None and name != "auto":
        if name not in NAMES:
            raise UserError("--engine", expected=f"auto or {', '.join(NAMES)}", found=name, action="choose one of these")
        if against := obstacle(name, bundle):
            raise UserError(f"--engine {name}", expected=against.expected, found=against.found, action=against.action)
        return Choice(name, "asked for")
    passed = []
    for candidate in _TARGET_OF:
        against = obstacle(candidate, bundle)
        if against is None:
            return Choice(candidate, "; ".join(passed) or "the best one")
        passed.append(f"{candidate}: {against.found}")
    raise UserError(
        f"bundle {bundle.path}", expected=f"graphs for an engine that runs here ({', '.join(_TARGET_OF)})",
        found="; ".join(passed), action="export it for this machine: fp-export CHECKPOINT --target cpu",
    )  # fmt: skip


def open_engine(
    bundle: Bundle,
    name: str | None = None,
    *,
    threads: int | None = None,
    eager: bool = False,
    spin: bool = True,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    plans: str | Path | None = None,
    notice: Callable[[str], None] | None = None,
) -> tuple[Engine, str]:
    """Open the engine that `choose` names -> the engine and the reason.

    Args:
        threads: of one operator on the CPU; None for every core that the process may use.
        eager: plain calls instead of bound buffers or CUDA graphs.
        spin: on the CPU, see `factorportrait.engines.ort.session_options`.
        checkpoint, device: for torch, see `factorportrait.engines.pytorch.TorchEngine`.
        plans: folder of TensorRT's plans; None for the user's cache.
        notice: is given lines for the user, such as that a plan is being built.
    """
    choice = choose(bundle, name)
    if choice.name == "onnxruntime-cpu":
        from factorportrait.engines.ort import OrtEngine

        return OrtEngine(bundle, threads, eager, spin), choice.reason
    if choice.name == "onnxruntime-cuda":
        from factorportrait.engines.ort_cuda import OrtCudaEngine

        return OrtCudaEngine(bundle, graphs=not eager), choice.reason
    if choice.name == "tensorrt":
        from factorportrait.engines.tensorrt.engine import TensorRTEngine

        return TensorRTEngine(bundle, eager=eager, plans=plans, **({"notice": notice} if notice else {})), choice.reason
    from factorportrait.engines.pytorch import TorchEngine

    return TorchEngine(bundle, checkpoint, device=device, eager=eager, threads=threads), choice.reason


def _cpu() -> Obstacle | None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return Obstacle("an onnxruntime that loads", str(error), "pip install --force-reinstall onnxruntime")
    return None


def _cuda() -> Obstacle | None:
    if against := _gpu() or _cpu():
        return against
    import onnxruntime

    # Both packages hold the module onnxruntime; the one that was installed last is in force.
    install = 'pip install "factorportrait[gpu]", then pip install --force-reinstall --no-deps onnxruntime-gpu'
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return Obstacle("onnxruntime-gpu", "an onnxruntime without its CUDA provider", install)
    if not _installed("cuda-bindings"):
        return Obstacle("the package cuda-python", "none", install)
    return None


def _tensorrt() -> Obstacle | None:
    if against := _gpu():
        return against
    if importlib.util.find_spec("tensorrt") is None:
        return Obstacle("the package tensorrt", "none", TENSORRT_HINT)
    if not _installed("cuda-bindings"):
        return Obstacle("the package cuda-python", "none", TENSORRT_HINT)
    return None


def _torch() -> Obstacle | None:
    if importlib.util.find_spec("torch") is None:
        return Obstacle("the package torch", "none", TORCH_HINT)
    return None


def _gpu() -> Obstacle | None:
    gpu = find_gpu()
    return Obstacle("an NVIDIA GPU and its driver", gpu, f"look at nvidia-smi, or {_CPU_HINT}") if isinstance(gpu, str) else None


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


_MACHINE = {"tensorrt": _tensorrt, "onnxruntime-cuda": _cuda, "onnxruntime-cpu": _cpu, "torch": _torch}
