"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.engines.base import Arrays
from factorportrait.errors import BundleError

_DTYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}


class OrtRunner:
    """One graph in ONNX Runtime. Bound runs write into the caller's arrays; eager runs allocate every output.

    Both run the same kernels on the same data, so their results are equal to the bit (tests/runtime/test_session.py).
    """

    def __init__(self, spec: StageSpec, path: Path, options: onnxruntime.SessionOptions, eager: bool):
        self.spec = spec
        self.eager = eager
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises classes of its own, which share no other base
            raise BundleError(
                f"graph {path}",
                expected="a graph that ONNX Runtime can load",
                found=str(error).splitlines()[0][:200],
                action="make the bundle again with fp-export",
            ) from error
        self._binding = self._session.io_binding()
        self._output_names = [output.name for output in spec.outputs]
        found = [value.name for value in self._session.get_outputs()]
        if found != self._output_names:
            raise BundleError(
                f"graph {path}",
                expected=f"outputs {self._output_names}",
                found=str(found),
                action="make the bundle again with fp-export",
            )

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, np.ndarray]:
        """See `factorportrait.engines.base.Runner.run`."""
        check_inputs(self.spec, inputs)
        if self.eager:
            values = self._session.run(self._output_names, dict(inputs))
            return self._copy_out(dict(zip(self._output_names, values, strict=True)), outputs or {})
        return self._run_bound(inputs, outputs or {})

    def _run_bound(self, inputs: Arrays, outputs: Arrays) -> dict[str, np.ndarray]:
        binding = self._binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in self._output_names:
            array = outputs.get(name)
            if array is None:
                binding.bind_output(name, "cpu")
            else:
                if not array.flags.c_contiguous:
                    raise ValueError(f"stage {self.spec.name}: output {name} is not contiguous")
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        if len(outputs) == len(self._output_names):
            return {name: outputs[name] for name in self._output_names}
        values = binding.get_outputs()
        return {
            name: outputs[name] if name in outputs else value.numpy()
            for name, value in zip(self._output_names, values, strict=True)
        }

    @staticmethod
    def _copy_out(results: dict[str, np.ndarray], outputs: Arrays) -> dict[str, np.ndarray]:
        for name, array in outputs.items():
            array[...] = results[name]
            results[name] = array
        return results


class OrtEngine:
    """The CPU back end: one session per stage, all with the same number of threads."""

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None, eager: bool = False):
        self.bundle = bundle
        self.eager = eager
        self.threads = threads
        self._options = session_options(threads)
        self._runners: dict[str, OrtRunner] = {}

    def load(self, spec: StageSpec) -> OrtRunner:
        """Load a stage once."""
        if spec.name not in self._runners:
            self._runners[spec.name] = OrtRunner(spec, self.bundle.file(spec.file), self._options, self.eager)
        return self._runners[spec.name]

    def load_all(self, specs: Iterable[StageSpec]) -> None:
        for spec in specs:
            self.load(spec)


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options for low latency with one caller: `threads` inside an operator, operators one after another."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    return options


def check_inputs(spec: StageSpec, inputs: Arrays) -> None:
    """Names, dtypes, ranks and fixed sizes of `inputs` against the stage's; a wrong binding would read foreign memory.

    Raises:
        ValueError: something does not fit; it names the tensor.
    """
    names = {tensor.name for tensor in spec.inputs}
    if names != set(inputs):
        raise ValueError(
            f"stage {spec.name}: missing inputs {sorted(names - set(inputs))}, unknown {sorted(set(inputs) - names)}"
        )
    symbols: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs[tensor.name]
        fits = array.dtype == _DTYPES[tensor.dtype] and array.ndim == len(tensor.shape) and array.flags.c_contiguous
        fits = fits and all(
            size == (wanted if isinstance(wanted, int) else symbols.setdefault(wanted, size))
            for wanted, size in zip(tensor.shape, array.shape, strict=True)
        )
        if not fits:
            layout = "" if array.flags.c_contiguous else ", not contiguous"
            raise ValueError(
                f"stage {spec.name}: expected {tensor.describe()}, found {array.dtype} {list(array.shape)}{layout}"
            )
