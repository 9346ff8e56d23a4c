"""What a back end offers: memory on its device, and the stages of a bundle bound to that memory by tensor name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from factorportrait.bundle import StageSpec, TensorSpec

# Memory of an engine: a NumPy array on the CPU, a torch.Tensor for PyTorch, a DeviceArray elsewhere. All have `shape` and `dtype`.
Buffer = Any
Buffers = Mapping[str, Buffer]
Arrays = Mapping[str, np.ndarray]
# Runs a bound stage once, on what its inputs hold now.
Call = Callable[[], None]


@dataclass(frozen=True)
class DeviceArray:
    """Contiguous memory on a device that NumPy cannot see.

    Attributes:
        address: of the first byte.
        dtype: as in `TensorSpec`, such as "float16".
        owner: what frees the memory when the last array over it is gone.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    def view(self, shape: tuple[int, ...], start: int = 0) -> DeviceArray:
        """See `Engine.view`."""
        if start < 0 or start + prod(shape) > prod(self.shape):
            raise ValueError(f"view of {list(self.shape)}: {list(shape)} from element {start} on is not inside")
        return DeviceArray(self.address + start * itemsize(self.dtype), shape, self.dtype, self.owner)


class Kernels(Protocol):
    """Functions of a file of cpp_ext/kernels, ready to run on an engine's device."""

    def launch(self, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], *arguments: Any) -> None:
        """Put one on the device. Arguments are buffers, and NumPy's scalars for everything else."""


class Runner(Protocol):
    """One loaded stage. `spec` says what it really takes and gives: names, dtypes and sizes."""

    spec: StageSpec

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """Tie the stage to memory. A call allocates nothing and always uses the same addresses, as a CUDA graph needs it.

        Args:
            inputs, outputs: every input and output of the stage by name, contiguous, with the dtype of its spec. A buffer may be
                both where the graph updates it in place (`Engine.in_place`).

        Raises:
            ValueError: a name, dtype or size does not fit.
        """


class Engine(Protocol):
    """A back end with its device. Calls run in order; on a GPU they return before the work is done.

    Attributes:
        name: what `--engine` calls it.
        target: whose graphs of the bundle it runs: "cpu", "cuda" or "tensorrt".
        device: where its buffers lie, such as "cpu" or "cuda:0".
        in_place: a stage may write the memory that it reads, so `dit_inplace` works.
        whole_chunks: all steps of a chunk are put on the device as one, with nothing for the host to do between them; else one
            step after the other, each with its own time.
    """

    name: str
    target: str
    device: str
    in_place: bool
    whole_chunks: bool

    def load(self, name: str) -> Runner:
        """Load a stage of the bundle, once."""

    def zeros(self, shape: Iterable[int], dtype: str) -> Buffer:
        """New memory on the device, filled with zeros."""

    def free_bytes(self) -> int | None:
        """What `zeros` can still give on the device; None where nobody says."""

    def view(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        """The memory of `buffer` from element `start` on, seen with another shape."""

    def mirror(self, buffer: Buffer) -> np.ndarray:
        """Where the host reads and writes what belongs into `buffer`: the array itself on the CPU, else host memory of its size,
        which may hold anything at first."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy between device and host or within either; nothing where both are the same. A copy to the host waits for it."""

    def copy_slot(self, source: Buffer, source_slot: int, target: Buffer, target_slot: int) -> None:
        """Copy one slot of [B, C, F, h, w] to one of another such buffer, both on the device; nobody waits.

        Raises:
            ValueError: another dtype or other sizes, or no such slot.
        """

    def weighted_sum(self, target: Buffer, terms: Sequence[tuple[Buffer, float]], spare: Buffer, first: int = 0) -> Call:
        """Bind target = sum of weight * buffer, term after term in float32, so that all engines agree to the bit.

        Args:
            target, terms: float32 [B, C, F, ...], at least one term; only the first may be the target itself.
            spare: memory of the same size, overwritten by engines that need it.
            first: slots on the axis F that are left as they are.
        """

    def capture(self, run: Call) -> Call:
        """What `run` puts on the device, as one call: recorded once where the device has graphs, else `run` itself.

        `run` must do the same to the same memory every time; what changes has to lie in that memory.
        """

    def kernels(self, file: str, names: Iterable[str]) -> Kernels | None:
        """Functions of a file of cpp_ext/kernels; None where the device runs none, as a CPU, or they do not compile there."""


def check_slots(source: Buffer, source_slot: int, target: Buffer, target_slot: int) -> None:
    """What `Engine.copy_slot` raises."""
    kinds = [(dtype_name(buffer), *buffer.shape[:2], *buffer.shape[3:]) for buffer in (source, target)]
    inside = 0 <= source_slot < source.shape[2] and 0 <= target_slot < target.shape[2]
    if kinds[0] != kinds[1] or not inside:
        raise ValueError(
            f"copy of slot {source_slot} of {dtype_name(source)} {list(source.shape)} to slot {target_slot} of "
            f"{dtype_name(target)} {list(target.shape)}"
        )


def host_sum(
    target: np.ndarray, terms: Sequence[tuple[np.ndarray, float]], spare: np.ndarray, first: int = 0
) -> Call:  # fmt: skip
    """`Engine.weighted_sum` in NumPy; a call allocates nothing."""
    target, spare = target[:, :, first:], spare[:, :, first:]
    (start, scale), *others = [(source[:, :, first:], np.float32(weight)) for source, weight in terms]

    def call() -> None:
        np.multiply(start, scale, out=target)
        for source, weight in others:
            np.multiply(source, weight, out=spare)
            np.add(target, spare, out=target)

    return call


def mirrored_sum(engine: Engine, target: Buffer, terms: Sequence[tuple[Buffer, float]], first: int = 0) -> Call:
    """The same for a device that cannot add by itself: by way of the host."""
    given = [(Mirrored(engine, source), weight) for source, weight in terms]
    result = Mirrored(engine, target)
    add = host_sum(result.array, [(each.array, weight) for each, weight in given], np.empty_like(result.array), first)

    def call() -> None:
        for each, _ in given:
            each.fetch()
        if first:
            result.fetch()
        add()
        result.send()

    return call


class Mirrored:
    """A buffer with its mirror on the host; on the CPU both are one array, and sending and fetching do nothing."""

    def __init__(self, engine: Engine, buffer: Buffer):
        self._engine, self.buffer, self.array = engine, buffer, engine.mirror(buffer)

    def send(self) -> None:
        """What was written into `array` goes to the device."""
        self._engine.copy(self.array, self.buffer)

    def fetch(self) -> np.ndarray:
        """`array` with what the device holds."""
        self._engine.copy(self.buffer, self.array)
        return self.array


class HostStage:
    """A stage of fixed sizes that is fed from the host and answers there: fill `inputs`, call, read the results.

    Args:
        sizes: the symbolic sizes of its inputs.
    """

    def __init__(self, engine: Engine, name: str, **sizes: int):
        runner = engine.load(name)
        self.spec = runner.spec
        inputs, outputs = (allocate(engine, side, sizes) for side in (runner.spec.inputs, runner.spec.outputs))
        if engine.in_place:
            outputs |= {name: inputs[twin] for name in outputs if (twin := updated_input(name)) in inputs}
        self._call = runner.bind(inputs, outputs)
        self._inputs, self._outputs = (
            {name: Mirrored(engine, buffer) for name, buffer in side.items()} for side in (inputs, outputs)
        )
        self.inputs = {name: mirrored.array for name, mirrored in self._inputs.items()}

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Results by name, overwritten by the next call. `arrays` are copied into `inputs` first."""
        for name, array in arrays.items():
            np.copyto(self.inputs[name], array, casting="no")
        for mirrored in self._inputs.values():
            mirrored.send()
        self._call()
        return {name: mirrored.fetch() for name, mirrored in self._outputs.items()}


def updated_input(output: str) -> str:
    """The input whose memory an output updates, if the stage has one of this name: `cache_k.3` for `cache_k_out.3`."""
    return output.replace("_out.", ".")


def run_once(engine: Engine, name: str, arrays: Arrays) -> dict[str, np.ndarray]:
    """Results of a stage for inputs of any size. It allocates everything anew: for checks, not for loops."""
    sizes: dict[str, int] = {}
    for tensor in engine.load(name).spec.inputs:
        _fits(tensor.shape, arrays[tensor.name].shape, sizes)
    return HostStage(engine, name, **sizes)(**arrays)


def slots(engine: Engine, buffer: Buffer, start: int, stop: int) -> Buffer:
    """Entries `start` up to `stop` of axis 1 of buffer [1, S, ...], without a copy."""
    _, _, *rest = buffer.shape
    return engine.view(buffer, (1, stop - start, *rest), start * prod(rest))


def allocate(engine: Engine, tensors: Iterable[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Buffer]:
    """A buffer for each tensor, its symbolic sizes replaced."""
    return {tensor.name: engine.zeros(tensor_shape(tensor, sizes), tensor.dtype) for tensor in tensors}


def tensor_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with its symbolic sizes, such as "F" or "4*N", replaced."""

    def number(size: int | str) -> int:
        factor, _, name = str(size).rpartition("*")
        return size if isinstance(size, int) else sizes[name] * int(factor or 1)

    return tuple(number(size) for size in tensor.shape)


def symbol_sizes(tensors: Iterable[TensorSpec], buffers: Buffers) -> dict[str, int]:
    """The sizes that buffers give the symbols of their tensors."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        _fits(tensor.shape, tuple(buffers[tensor.name].shape), sizes)
    return sizes


def check_buffers(spec: StageSpec, inputs: Buffers, outputs: Buffers) -> None:
    """Names, dtypes, ranks and sizes against the stage's; a wrong binding would read or write foreign memory.

    Raises:
        ValueError: something does not fit; it names the tensor.
    """
    sizes: dict[str, int] = {}
    for side, tensors, buffers in (("inputs", spec.inputs, inputs), ("outputs", spec.outputs, outputs)):
        names = {tensor.name for tensor in tensors}
        if names != set(buffers):
            missing, unknown = sorted(names - set(buffers)), sorted(set(buffers) - names)
            raise ValueError(f"stage {spec.name}: missing {side} {missing}, unknown {unknown}")
        for tensor in tensors:
            buffer = buffers[tensor.name]
            dtype, shape = dtype_name(buffer), tuple(buffer.shape)
            if dtype != tensor.dtype or len(shape) != len(tensor.shape) or not _fits(tensor.shape, shape, sizes):
                raise ValueError(f"stage {spec.name}: expected {tensor.describe()}, found {dtype} {list(shape)}")


def itemsize(dtype: str) -> int:
    """Bytes of an element; NumPy has no bfloat16."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def dtype_name(buffer: Buffer) -> str:
    """The dtype as in `TensorSpec`."""
    return str(buffer.dtype).removeprefix("torch.")


def _fits(wanted: tuple[int | str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    for want, size in zip(wanted, shape, strict=True):
        if isinstance(want, str):
            factor, _, name = want.rpartition("*")
            want = sizes.setdefault(name, size // int(factor or 1)) * int(factor or 1)
        if want != size:
            return False
    return True

