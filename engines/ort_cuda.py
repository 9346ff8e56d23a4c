"""ONNX Runtime on an NVIDIA GPU: buffers lie on the device, and stages are bound to them.

ONNX Runtime computes on the stream on which buffers are copied, so that nothing but a copy to the host ever waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.cores import usable_cores
from factorportrait.engines.base import Buffers, Call, DeviceArray, check_buffers, check_slots, mirrored_sum
from factorportrait.engines.ort import open_session, session_options
from factorportrait.engines.tensorrt.cuda import Device
from factorportrait.engines.tensorrt.kernels import Kernels, KernelStore
from factorportrait.engines.tensorrt.sums import SumKernel
from factorportrait.errors import BundleError, UserError

PROVIDER = "CUDAExecutionProvider"


class OrtCudaRunner:
    """One graph on the GPU. With CUDA graphs, ONNX Runtime captures each bound call after its first runs and then replays it."""

    def __init__(self, spec: StageSpec, path: Path, cuda: Device, graph_ids: Iterable[int] | None):
        self.spec, self._graph_ids, self._cuda = spec, graph_ids, cuda

        def opened(graphs: bool) -> onnxruntime.InferenceSession:
            options = {"device_id": 0, "user_compute_stream": str(cuda.stream), "enable_cuda_graph": str(int(graphs))}
            with cuda.lock:  # it asks for memory
                return open_session(spec, path, session_options(usable_cores()), [(PROVIDER, options), "CPUExecutionProvider"])

        try:
            self._session = opened(graph_ids is not None)
        except BundleError:
            # It captures only graphs that are wholly the GPU's.
            if graph_ids is None:
                raise
            self._graph_ids = None
            self._session = opened(False)
        # ONNX Runtime logs a provider that does not start and goes on with the next one.
        if self._session.get_providers()[0] != PROVIDER:
            raise UserError(
                "--engine onnxruntime-cuda", expected=f"{PROVIDER} to start",
                found="an onnxruntime that went on without it: its CUDA or cuDNN libraries do not load",
                action="install the versions that onnxruntime-gpu asks for, or use --engine onnxruntime-cpu",
            )  # fmt: skip
        self._session.disable_fallback()

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """See `factorportrait.engines.base.Runner.bind`."""
        check_buffers(self.spec, inputs, outputs)
        session, lock = self._session, self._cuda.lock
        binding, options = session.io_binding(), onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._graph_ids is not None:
            # A captured graph has fixed addresses, so every bound call has one of its own.
            options.add_run_config_entry("gpu_graph_id", str(next(iter(self._graph_ids))))
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", 0, np.dtype(array.dtype).type, array.shape, array.address)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", 0, np.dtype(array.dtype).type, array.shape, array.address)

        def call(_memory=(dict(inputs), dict(outputs))) -> None:
            with lock:  # the first runs are captured
                session.run_with_iobinding(binding, options)

        return call


class OrtCudaEngine:
    """See `factorportrait.engines.base.Engine`.

    Args:
        graphs: have ONNX Runtime capture CUDA graphs, of every stage that has no node for the CPU.

    Raises:
        UserError: cuda-python is not installed.
    """

    name, target, device, in_place = "onnxruntime-cuda", "cuda", "cuda:0", True
    threads = None

    def __init__(self, bundle: Bundle, *, graphs: bool = False):
        self.bundle, self.cuda = bundle, Device()
        self.lock = self.cuda.lock
        self._sums, self._kernels = SumKernel(self.cuda), KernelStore(self.cuda)
        # Its own captured graphs follow each other on one stream; a graph around them it does not allow.
        self.whole_chunks = graphs and not self._sums.reason
        self._graph_ids = itertools.count(1) if graphs else None
        self._runners: dict[str, OrtCudaRunner] = {}

    def load(self, name: str) -> OrtCudaRunner:
        """See `factorportrait.engines.base.Engine`.

        Raises:
            UserError: ONNX Runtime runs no graph on the GPU here.
        """
        if name not in self._runners:
            spec = self.bundle.stage(name, self.target)
            self._runners[name] = OrtCudaRunner(spec, self.bundle.file(spec.file), self.cuda, self._graph_ids)
        return self._runners[name]

    def zeros(self, shape: Iterable[int], dtype: str) -> DeviceArray:
        """See `factorportrait.engines.base.Engine`."""
        return self.cuda.zeros(shape, dtype)

    def free_bytes(self) -> int:
        """See `factorportrait.engines.base.Engine`."""
        return self.cuda.memory()[0]

    def view(self, buffer: DeviceArray, shape: tuple[int, ...], start: int = 0) -> DeviceArray:
        """See `factorportrait.engines.base.Engine`."""
        return buffer.view(shape, start)

    def mirror(self, buffer: DeviceArray) -> np.ndarray:
        """See `factorportrait.engines.base.Engine`."""
        return self.cuda.pinned(buffer.shape, buffer.dtype)

    def copy(self, source: DeviceArray | np.ndarray, target: DeviceArray | np.ndarray) -> None:
        """See `factorportrait.engines.base.Engine`."""
        if source is not target:
            self.cuda.copy(source, target)

    def copy_slot(self, source: DeviceArray, source_slot: int, target: DeviceArray, target_slot: int) -> None:
        """See `factorportrait.engines.base.Engine`."""
        check_slots(source, source_slot, target, target_slot)
        self.cuda.copy_slot(source, source_slot, target, target_slot)

    def weighted_sum(
        self, target: DeviceArray, terms: Sequence[tuple[DeviceArray, float]], spare: DeviceArray, first: int = 0
    ) -> Call:  # fmt: skip
        """See `factorportrait.engines.base.Engine`."""
        return mirrored_sum(self, target, terms, first) if self._sums.reason else self._sums.bind(target, terms, first)

    def capture(self, run: Call) -> Call:
        """See `factorportrait.engines.base.Engine`."""
        return run

    def kernels(self, file: str, names: Iterable[str]) -> Kernels | None:
        """See `factorportrait.engines.base.Engine`."""
        return self._kernels.open(file, names)
