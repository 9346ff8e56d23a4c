"""The TensorRT engine: plans found or built, stages bound by name, replayed as CUDA graphs.

One stream for everything, and one scratch buffer for all stages, since they run one after another. Every bound call has an
execution context of its own: its shapes and addresses never change, as a captured graph needs it.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.bundle import Bundle, StageSpec
from factorportrait.engines.base import Buffers, Call, DeviceArray, check_buffers, check_slots, mirrored_sum
from factorportrait.engines.tensorrt.build import TARGET, OnProgress, get_plan
from factorportrait.engines.tensorrt.builder import open_log
from factorportrait.engines.tensorrt.cuda import CudaError, Device
from factorportrait.engines.tensorrt.kernels import Kernels, KernelStore
from factorportrait.engines.tensorrt.machine import import_tensorrt, probe
from factorportrait.engines.tensorrt.plans import Options, Plan, PlanStore, Request
from factorportrait.engines.tensorrt.sums import SumKernel
from factorportrait.errors import BundleError, UserError

_log = logging.getLogger(__name__)


class TensorRTEngine:
    """See `factorportrait.engines.base.Engine`.

    Args:
        bundle: with graphs for TensorRT.
        eager: enqueue every call instead of replaying a CUDA graph.
        plans: folder of the plans; None for the user's cache.
        options: take only plans that are built so; None takes the latest that fits, and builds with the defaults.
        notice: is given lines for the user, such as why a plan is built again.
        on_progress: called while a plan is built.

    Raises:
        UserError: there is no GPU, no driver or no TensorRT 11.
    """

    name, target, device, in_place = "tensorrt", TARGET, "cuda:0", True

    def __init__(
        self,
        bundle: Bundle,
        *,
        eager: bool = False,
        plans: str | Path | None = None,
        options: Options | None = None,
        notice: Callable[[str], None] = _log.warning,
        on_progress: OnProgress = lambda progress: None,
    ):
        self.bundle, self.eager = bundle, eager
        self._machine = probe("--engine tensorrt")
        self._store, self._options = PlanStore(plans), options
        self._notice, self._on_progress = notice, on_progress
        self.trt = import_tensorrt("--engine tensorrt")
        self.log = open_log(self.trt, _log.info)
        self.cuda = Device()
        self.lock = self.cuda.lock
        self._sums, self._kernels = SumKernel(self.cuda), KernelStore(self.cuda)
        self.whole_chunks = not eager and not self._sums.reason
        self.in_chunk = False  # calls are part of a chunk's graph and have none of their own
        self._runtime = self.trt.Runtime(self.log)
        self._scratch = self.cuda.zeros((0,), "uint8")
        self._runners: dict[str, TensorRTRunner] = {}
        self._loading = threading.Lock()  # not the stream's: a plan may be built meanwhile, which takes minutes

    def load(self, name: str) -> TensorRTRunner:
        """See `factorportrait.engines.base.Engine`.

        Raises:
            UserError: the bundle is not for TensorRT, or its graph gives no plan that loads.
        """
        with self._loading:
            if name not in self._runners:
                self._runners[name] = self._load(name)
            return self._runners[name]

    def _load(self, name: str) -> TensorRTRunner:
        request = Request(self.bundle, self.bundle.stage(name, TARGET), self._machine, self._options or Options())
        plan, built = self._store.find_any(request) if self._options is None else None, False
        if plan is None:
            plan, built = get_plan(self._store, request, on_progress=self._on_progress, notice=self._notice)
        loaded = self._deserialize(plan)
        if loaded is None and not built:
            self._notice(f"plan of {name}: TensorRT does not load it ({self._last_error()})")
            plan, _ = get_plan(self._store, request, again=True, on_progress=self._on_progress, notice=self._notice)
            loaded = self._deserialize(plan)
        if loaded is None:
            raise UserError(
                f"plan {plan.file}", expected="a plan that TensorRT loads", found=self._last_error(),
                action="is the GPU's memory full? look at nvidia-smi",
            )  # fmt: skip
        return TensorRTRunner(self, request, loaded)

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
        """See `factorportrait.engines.base.Engine`. The second call captures the CUDA graph that later ones replay."""

        def enqueue() -> None:
            before, self.in_chunk = self.in_chunk, True
            try:
                run()
            finally:
                self.in_chunk = before

        return _Call(self, "dit, conditions and all steps of a chunk,", enqueue, ())

    def kernels(self, file: str, names: Iterable[str]) -> Kernels | None:
        """See `factorportrait.engines.base.Engine`."""
        return self._kernels.open(file, names)

    def scratch(self, num_bytes: int) -> DeviceArray:
        """Memory for activations, shared by all calls. When it grows, calls that are bound keep what they have."""
        if num_bytes > self._scratch.nbytes:
            self._scratch = self.cuda.zeros((num_bytes,), "uint8")
        return self._scratch

    def check(self, done: Any, what: str) -> None:
        """Raises RuntimeError unless a call of TensorRT said that it is done, and logged no error."""
        if done is False or self.log.errors:
            reason = self._last_error()
            self.log.errors.clear()
            raise RuntimeError(f"TensorRT: {what}: {reason}")

    def _deserialize(self, plan: Plan) -> Any:
        self.log.errors.clear()
        # Plans that carry the lean runtime hold code; those in the store were built here.
        self._runtime.engine_host_code_allowed = plan.version_compatible
        # Mapped, because a plan may be gigabytes and is read once.
        with open(plan.file, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return self._runtime.deserialize_cuda_engine(content)

    def _last_error(self) -> str:
        return self.log.errors[-1] if self.log.errors else "no reason given"


class TensorRTRunner:
    """One plan. See `factorportrait.engines.base.Runner`."""

    def __init__(self, engine: TensorRTEngine, request: Request, plan: Any):
        self.spec: StageSpec = request.spec
        self._engine, self._profiles, self._plan = engine, request.profiles, plan
        expected = {tensor.name for tensor in (*self.spec.inputs, *self.spec.outputs)}
        found = {plan.get_tensor_name(i) for i in range(plan.num_io_tensors)}
        if found != expected:
            raise BundleError(
                f"plan of {self.spec.name}", expected=f"tensors {', '.join(sorted(expected))}", found=", ".join(sorted(found)),
                action="make the bundle again with fp-export",
            )  # fmt: skip

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """See `factorportrait.engines.base.Runner.bind`. The second call captures the CUDA graph that later ones replay.

        Raises:
            ValueError: a buffer does not fit, or two that must share memory do not.
            UserError: the plan was built for other sizes.
        """
        check_buffers(self.spec, inputs, outputs)
        for name, buffer in outputs.items():
            shared = self._plan.get_aliased_input_tensor(name)
            if shared is not None and inputs[shared].address != buffer.address:
                raise ValueError(f"stage {self.spec.name}: {name} must be bound to the memory of {shared}: it updates that")
        context, scratch = self._context(inputs, outputs)
        engine, name = self._engine, self.spec.name

        def enqueue() -> None:
            engine.check(context.execute_async_v3(engine.cuda.stream), f"running {name}")

        return _Call(engine, name, enqueue, (inputs, outputs, scratch))

    def _context(self, inputs: Buffers, outputs: Buffers) -> tuple[Any, DeviceArray]:
        """An execution context with all shapes and addresses set, and the scratch memory that it uses."""
        with self._engine.cuda.lock:  # a profile is set on the stream; the log and the scratch memory are the engine's
            return self._new_context(inputs, outputs)

    def _new_context(self, inputs: Buffers, outputs: Buffers) -> tuple[Any, DeviceArray]:
        engine, plan, stage = self._engine, self._plan, self.spec.name
        engine.log.errors.clear()
        context = plan.create_execution_context(engine.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        engine.check(context is not None, f"a context for {stage}")
        profile = self._profile(inputs)
        engine.check(context.set_optimization_profile_async(profile, engine.cuda.stream), f"a profile for {stage}")
        engine.cuda.synchronize()
        for name, buffer in inputs.items():
            engine.check(context.set_input_shape(name, buffer.shape), f"{stage}: the shape {buffer.shape} of {name}")
            engine.check(context.set_tensor_address(name, buffer.address), f"{stage}: the address of {name}")
        if missing := context.infer_shapes():
            raise RuntimeError(f"TensorRT: {stage}: shapes depend on {', '.join(missing)}")
        for name, buffer in outputs.items():
            found = tuple(context.get_tensor_shape(name))
            if found != tuple(buffer.shape):
                raise ValueError(f"stage {stage}: expected {name} {list(found)}, found {list(buffer.shape)}")
            engine.check(context.set_tensor_address(name, buffer.address), f"{stage}: the address of {name}")
        num_bytes = plan.get_device_memory_size_for_profile_v2(profile)
        scratch = engine.scratch(num_bytes)
        engine.check(context.set_device_memory(scratch.address, scratch.nbytes), f"scratch memory for {stage}")
        return context, scratch

    def _profile(self, inputs: Buffers) -> int:
        shapes = {name: tuple(buffer.shape) for name, buffer in inputs.items()}
        for i, profile in enumerate(self._profiles):
            if profile.holds(shapes):
                return i
        if not self._profiles:
            return 0
        dynamic = sorted(self._profiles[0].shapes)
        built = "; ".join(
            f"{profile.name}: " + ", ".join(f"{name} {profile.shapes[name][0]}..{profile.shapes[name][2]}" for name in dynamic)
            for profile in self._profiles
        )
        raise UserError(
            f"plan of {self.spec.name}", expected=f"sizes that it was built for ({built})",
            found=", ".join(f"{name} {shapes[name]}" for name in dynamic),
            action="choose a chunk and a window of the checkpoint's config or smaller",
        )  # fmt: skip


class _Call:
    """A bound stage. The first call runs it, which sets up what TensorRT does late; the second captures; later ones replay."""

    def __init__(self, engine: TensorRTEngine, name: str, enqueue: Callable[[], None], memory: Any):
        self._engine, self._name, self._enqueue, self._memory = engine, name, enqueue, memory
        self._warm, self._replay = False, None

    def __call__(self) -> None:
        with self._engine.cuda.lock:  # of whoever records a chunk, `in_chunk` is no other thread's business
            self._run()

    def _run(self) -> None:
        if self._engine.in_chunk:
            self._enqueue()
            self._warm = True
        elif self._replay is not None:
            self._replay()
        elif self._engine.eager or not self._warm:
            self._enqueue()
            self._warm = True
        else:
            try:
                self._replay = self._engine.cuda.capture(self._enqueue)
            except (CudaError, RuntimeError) as error:
                # A refused capture must not pass for one: what it would replay is stale.
                raise RuntimeError(f"stage {self._name} cannot be captured in a CUDA graph ({error}); run with --eager") from error
            self._replay()
