"""CUDA kernels of `cpp_ext/kernels`, compiled by NVRTC for the GPU that is there, on an engine's stream."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from factorportrait.engines.base import DeviceArray
from factorportrait.engines.tensorrt.cuda import Device
from factorportrait.kernels import source_path

_log = logging.getLogger(__name__)


class Kernels:
    """See `factorportrait.engines.base.Kernels`.

    Args:
        file: of cpp_ext/kernels.
        names: of its functions that are launched.

    Raises:
        Exception: what NVRTC, its loader and the driver raise, which are types of their own.
    """

    def __init__(self, device: Device, file: str, names: Iterable[str]):
        from cuda import core

        self._device, self._core = device, core
        with device.lock:
            gpu = core.Device(0)
            gpu.set_current()
            self._stream = core.Stream.from_handle(device.stream)
        source = source_path(file)
        options = core.ProgramOptions(arch=f"sm_{gpu.arch}", include_path=str(source.parent), std="c++17")
        module = core.Program(source.read_text(encoding="utf-8"), "c++", options).compile("cubin")
        with device.lock:  # this loads code onto the device
            self._functions = {name: module.get_kernel(name) for name in names}

    def launch(self, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], *arguments: Any) -> None:
        """See `factorportrait.engines.base.Kernels.launch`."""
        given = [argument.address if isinstance(argument, DeviceArray) else argument for argument in arguments]
        with self._device.lock:
            self._core.launch(self._stream, self._core.LaunchConfig(grid=grid, block=block), self._functions[name], *given)


class KernelStore:
    """Kernels by file, compiled once for all sessions of an engine."""

    def __init__(self, device: Device):
        self._device, self._found = device, {}

    def open(self, file: str, names: Iterable[str]) -> Kernels | None:
        """`Kernels`, or None where they do not compile or load; the log says why."""
        key = file, tuple(names)
        if key not in self._found:
            try:
                self._found[key] = Kernels(self._device, *key)
            except Exception as error:  # NVRTC, its loader and the driver raise types of their own
                _log.warning("no kernels of %s: %s", file, (str(error).splitlines() or [type(error).__name__])[0])
                self._found[key] = None
        return self._found[key]
