"""What a plan depends on besides its graph: the TensorRT that is installed, the GPU and the operating system."""

from __future__ import annotations

import ctypes
import importlib
import platform
import sys
from dataclasses import dataclass
from types import ModuleType

from factorportrait.errors import UserError

INSTALL_HINT = 'pip install "factorportrait[tensorrt]" (in a checkout: pip install -e ".[tensorrt]")'
# CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; `sm` is its compute capability, such as 8.9."""

    name: str
    sm: str


@dataclass(frozen=True)
class Machine:
    """Plans built on one machine run on another only if all of this is equal."""

    tensorrt: str
    gpu: str
    sm: str
    os: str


def probe(what: str) -> Machine:
    """This machine, with the first GPU that CUDA_VISIBLE_DEVICES lets it see.

    The driver is asked first: without one, TensorRT ends the process instead of raising.

    Args:
        what: the option or file that needs TensorRT, for the error.

    Raises:
        UserError: there is no GPU, no driver, or no TensorRT.
    """
    gpu = find_gpu()
    if isinstance(gpu, str):
        raise UserError(
            what, expected="an NVIDIA GPU and its driver", found=gpu,
            action="look at nvidia-smi, or run on the CPU with --engine onnxruntime-cpu",
        )  # fmt: skip
    return Machine(import_tensorrt(what).__version__, gpu.name, gpu.sm, f"{sys.platform}-{platform.machine()}")


def find_gpu() -> Gpu | str:
    """The first GPU, or why there is none. Needs no package."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no driver"
    count, handle = ctypes.c_int(0), ctypes.c_int(0)
    if code := driver.cuInit(0):
        return f"a driver that does not start (CUDA error {code})"
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "a driver, but no GPU that it can use"
    name, capability = ctypes.create_string_buffer(256), []
    failed = driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetName(name, len(name), handle)
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int(0)
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(value.value)
    if failed:
        return f"a GPU that does not answer (CUDA error {failed})"
    return Gpu(name.value.decode(errors="replace"), f"{capability[0]}.{capability[1]}")


def import_tensorrt(what: str) -> ModuleType:
    """The module tensorrt.

    Raises:
        UserError: it is not installed, does not load, or is not TensorRT 11.
    """
    try:
        library = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise UserError(
            what, expected="the package tensorrt", found=f"{type(error).__name__}: {error}", action=INSTALL_HINT
        ) from error
    if library.__version__.split(".")[0] != "11":
        # TensorRT 10 would take the graphs as weakly typed and choose precisions of its own.
        raise UserError(what, expected="TensorRT 11", found=f"TensorRT {library.__version__}", action=INSTALL_HINT)
    return library
