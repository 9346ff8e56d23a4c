"""ONNX Runtime on the CPU: buffers are NumPy arrays, and a bound stage writes straight into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import onnxruntime

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.cores import usable_cores
from factorportrait.engines.base import Arrays, Call, check_buffers, check_slots, host_sum
from factorportrait.errors import BundleError
from factorportrait.memory import available_memory


class OrtRunner:
    """One graph in ONNX Runtime. Bound calls write into the caller's arrays; eager ones allocate every output and copy it there.

    Both run the same kernels on the same data, so their results are equal to the bit (tests/runtime/test_session.py).
    """

    def __init__(self, spec: StageSpec, path: Path, options: onnxruntime.SessionOptions, eager: bool):
        self.spec = spec
        self.eager = eager
        self._session = open_session(spec, path, options, ["CPUExecutionProvider"])

    def bind(self, inputs: Arrays, outputs: Arrays) -> Call:
        """See `factorportrait.engines.base.Runner.bind`."""
        check_buffers(self.spec, inputs, outputs)
        inputs, outputs = dict(inputs), dict(outputs)  # these keep the memory alive
        for name, array in (*inputs.items(), *outputs.items()):
            if not array.flags.c_contiguous:
                raise ValueError(f"stage {self.spec.name}: {name} is not contiguous")
        session = self._session
        if self.eager:

            def call() -> None:
                for array, value in zip(outputs.values(), session.run(list(outputs), inputs), strict=True):
                    array[...] = value

            return call
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        def call(_memory=(inputs, outputs)) -> None:
            session.run_with_iobinding(binding)

        return call


class OrtEngine:
    """The CPU back end: one session per stage, all with the same number of threads.

    Args:
        threads: of one operator; None for every usable core.
        spin: see `session_options`.
    """

    name, target, device, in_place, whole_chunks = "onnxruntime-cpu", "cpu", "cpu", True, False

    def __init__(self, bundle: Bundle, threads: int | None = None, eager: bool = False, spin: bool = True):
        self.bundle = bundle
        self.eager = eager
        self.threads = usable_cores() if threads is None else threads
        self._options = session_options(self.threads, spin)
        self._runners: dict[str, OrtRunner] = {}

    def load(self, name: str) -> OrtRunner:
        """See `factorportrait.engines.base.Engine`."""
        if name not in self._runners:
            spec = self.bundle.stage(name, self.target)
            self._runners[name] = OrtRunner(spec, self.bundle.file(spec.file), self._options, self.eager)
        return self._runners[name]

    def zeros(self, shape: Iterable[int], dtype: str) -> np.ndarray:
        return np.zeros(tuple(shape), dtype)

    def free_bytes(self) -> int | None:
        return available_memory()

    def view(self, buffer: np.ndarray, shape: tuple[int, ...], start: int = 0) -> np.ndarray:
        return buffer.reshape(-1)[start : start + prod(shape)].reshape(shape)

    def mirror(self, buffer: np.ndarray) -> np.ndarray:
        return buffer

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        if source is not target:
            np.copyto(target, source, casting="no")

    def copy_slot(self, source: np.ndarray, source_slot: int, target: np.ndarray, target_slot: int) -> None:
        check_slots(source, source_slot, target, target_slot)
        np.copyto(target[:, :, target_slot], source[:, :, source_slot])

    def weighted_sum(
        self, target: np.ndarray, terms: Sequence[tuple[np.ndarray, float]], spare: np.ndarray, first: int = 0
    ) -> Call:  # fmt: skip
        return host_sum(target, terms, spare, first)

    def capture(self, run: Call) -> Call:
        return run

    def kernels(self, file: str, names: Iterable[str]) -> None:
        return None


def session_options(threads: int, spin: bool = True) -> onnxruntime.SessionOptions:
    """Options for low latency with one caller: `threads` inside an operator, operators one after another.

    Args:
        spin: a thread that waits for its share of an operator keeps its core, while a stage runs and no longer: every stage has
            threads of its own, and those of the stage before would hold the cores that this one needs. False lets threads
            sleep at once: somewhat slower on a quiet machine, much faster where other programs want the cores.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    spec: StageSpec, path: Path, options: onnxruntime.SessionOptions, providers: list
) -> onnxruntime.InferenceSession:
    """Load a graph.

    Raises:
        BundleError: ONNX Runtime refuses it, or its outputs are not the manifest's.
    """
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises classes of its own, which share no other base
        raise BundleError(
            f"graph {path}", expected="a graph that ONNX Runtime can load", found=str(error).splitlines()[0][:200],
            action="make the bundle again with fp-export",
        ) from error  # fmt: skip
    expected, found = [tensor.name for tensor in spec.outputs], [value.name for value in session.get_outputs()]
    if found != expected:
        raise BundleError(
            f"graph {path}", expected=f"outputs {expected}", found=str(found), action="make the bundle again with fp-export"
        )
    return session
