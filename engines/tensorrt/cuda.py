"""Memory, one stream and graphs of a GPU over cuda.bindings. Every return code is checked."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import numpy as np

from factorportrait.engines.base import DeviceArray, itemsize
from factorportrait.engines.tensorrt.machine import INSTALL_HINT
from factorportrait.errors import UserError


class CudaError(RuntimeError):
    """A call of CUDA failed."""


class Device:
    """The first GPU and the stream on which everything of an engine runs, so that work is done in the order of the calls.

    Attributes:
        lock: held by whoever puts something on the stream, asks for memory or frees it. While one thread records a graph, what
            another one enqueued would become a part of it; and where ONNX Runtime records, memory is nobody's to ask for.

    Raises:
        UserError: the package cuda-python is not installed.
        CudaError: the GPU does not answer.
    """

    def __init__(self):
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise UserError("TensorRT", expected="the package cuda-python", found="none", action=INSTALL_HINT) from error
        self.runtime, self.lock = runtime, threading.RLock()
        self._call(runtime.cudaSetDevice, 0)
        # Not the default stream, which waits for all others and cannot be captured.
        self.stream = int(self._call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking))
        weakref.finalize(self, runtime.cudaStreamDestroy, self.stream)

    def zeros(self, shape: Iterable[int], dtype: str) -> DeviceArray:
        """New memory filled with zeros; an empty array has an address of its own, as TensorRT wants it.

        Raises:
            UserError: the GPU's memory is full.
        """
        shape = tuple(shape)
        num_bytes = max(1, prod(shape) * np.dtype(dtype).itemsize)
        try:
            with self.lock:
                address = int(self._call(self.runtime.cudaMalloc, num_bytes))
        except CudaError as error:
            if "cudaErrorMemoryAllocation" not in str(error):
                raise
            free, total = self.memory()
            raise UserError(
                "the GPU's memory", expected=f"{num_bytes / 1e6:.0f} MB free for one buffer",
                found=f"{free / 1e6:.0f} MB free of {total / 1e6:.0f}",
                action="end other programs that use the GPU (nvidia-smi lists them), or take a smaller window or an int8 bundle",
            ) from error  # fmt: skip
        array = DeviceArray(address, shape, dtype, _Owner(self._locked(self.runtime.cudaFree), address))
        with self.lock:
            self._call(self.runtime.cudaMemsetAsync, address, 0, num_bytes, self.stream)
        return array

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """New page-locked host memory, which the GPU copies without a detour."""
        num_bytes = max(1, prod(shape) * np.dtype(dtype).itemsize)
        with self.lock:
            address = int(self._call(self.runtime.cudaMallocHost, num_bytes))
        memory = (ctypes.c_byte * num_bytes).from_address(address)
        weakref.finalize(memory, self._locked(self.runtime.cudaFreeHost), address)
        return np.frombuffer(memory, dtype, count=prod(shape)).reshape(shape)

    def copy(self, source: np.ndarray | DeviceArray, target: np.ndarray | DeviceArray) -> None:
        """Copy; where the host is a part of it, wait until it is done: then the host may use its array again."""
        if source.nbytes != target.nbytes or str(source.dtype) != str(target.dtype):
            raise ValueError(f"copy of {source.dtype} {list(source.shape)} to {target.dtype} {list(target.shape)}")
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDefault
        addresses = [
            array.address if isinstance(array, DeviceArray) else array.ctypes.data for array in (target, source)
        ]
        with self.lock:
            self._call(self.runtime.cudaMemcpyAsync, *addresses, source.nbytes, kind, self.stream)
        if isinstance(source, np.ndarray) or isinstance(target, np.ndarray):
            self.synchronize()

    def copy_slot(self, source: DeviceArray, source_slot: int, target: DeviceArray, target_slot: int) -> None:
        """See `factorportrait.engines.base.Engine.copy_slot`: rows of a slot's bytes, as far apart as all slots are long."""
        batch, channels, num_source, height, width = source.shape
        num_target, slot_bytes = target.shape[2], height * width * itemsize(source.dtype)
        with self.lock:
            self._call(
                self.runtime.cudaMemcpy2DAsync,
                target.address + target_slot * slot_bytes, num_target * slot_bytes,
                source.address + source_slot * slot_bytes, num_source * slot_bytes,
                slot_bytes, batch * channels, self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, self.stream,
            )  # fmt: skip

    def synchronize(self) -> None:
        """Wait for all work so far."""
        with self.lock:  # a stream that is being captured cannot be waited for
            self._call(self.runtime.cudaStreamSynchronize, self.stream)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        free, total = self._call(self.runtime.cudaMemGetInfo)
        return int(free), int(total)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on the stream, without running it, and return the function that replays it.

        Raises:
            CudaError: something in it cannot be captured.
        """
        runtime = self.runtime
        with self.lock:
            self.synchronize()
            # What is collected while a stream is captured frees its memory, which CUDA forbids then.
            gc.collect()
            collects = gc.isenabled()
            gc.disable()
            try:
                graph = self._recorded(enqueue)
            finally:
                if collects:
                    gc.enable()
        owner = _Owner(self._locked(runtime.cudaGraphDestroy), graph)
        with self.lock:
            executable = self._call(runtime.cudaGraphInstantiate, graph, 0)
        owners = owner, _Owner(self._locked(runtime.cudaGraphExecDestroy), executable)

        def replay(_owners=owners) -> None:
            with self.lock:
                self._call(runtime.cudaGraphLaunch, executable, self.stream)

        return replay

    def _recorded(self, enqueue: Callable[[], None]) -> Any:
        """The graph of what `enqueue` puts on the stream."""
        runtime = self.runtime
        self._call(runtime.cudaStreamBeginCapture, self.stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            runtime.cudaStreamEndCapture(self.stream)  # ends the capture; its own error says less than the one on its way
            raise
        graph = self._call(runtime.cudaStreamEndCapture, self.stream)
        if graph is None or not int(graph):
            raise CudaError("the capture gave no graph")
        return graph

    def _locked(self, free: Callable) -> Callable:
        """`free` with the lock held; it keeps the lock and not the device, which would never be collected."""
        lock = self.lock

        def locked(handle: Any) -> None:
            with lock:
                free(handle)

        return locked

    def _call(self, function: Callable, *arguments: Any) -> Any:
        """What a function of CUDA's runtime returns behind its error code: nothing, a value, or a tuple."""
        code, *values = function(*arguments)
        if int(code):
            name = getattr(function, "__name__", str(function))
            raise CudaError(f"{name}: {getattr(code, 'name', code)}")
        return values[0] if len(values) == 1 else tuple(values)


class _Owner:
    """Frees something of CUDA when the last user of it is gone."""

    def __init__(self, free: Callable, handle: Any):
        weakref.finalize(self, free, handle)
