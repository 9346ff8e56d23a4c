"""PyTorch: the modules that the graphs were exported from, on any device of torch.

It needs the export extra and the checkpoint of the bundle, so it is no way to deploy: it is what the other engines are measured
against, and runs on every GPU that torch runs on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorportrait.bundle import Bundle, StageSpec, TensorSpec
from factorportrait.checkpoint_files import checkpoint_digests
from factorportrait.cores import usable_cores
from factorportrait.engines.base import Buffers, Call, check_buffers, check_slots, dtype_name
from factorportrait.errors import UserError
from factorportrait.memory import available_memory

if TYPE_CHECKING:
    import torch

    from factorportrait.export.stages import Stage

DTYPES = ("float32", "float16", "bfloat16")
_DTYPE_OF = {"fp32": "float32", "fp16": "float16"}  # precision of a bundle -> dtype of the weights


class TorchEngine:
    """See `factorportrait.engines.base.Engine`.

    Args:
        bundle: says what the stages take and give.
        checkpoint: the folder that the bundle was exported from; None for the shipped one.
        device: of torch, such as "cpu" or "cuda:0"; None for the GPU where there is one.
        dtype: of the weights and of what stays on the device, one of `DTYPES`; None for the bundle's precision. Modules that
            export/precision.toml lists stay in float32.
        compile: hand every stage to torch.compile.
        eager: on a GPU, call the modules instead of replaying CUDA graphs.
        threads: of torch, in this whole process; None for every core that it may use on the CPU, and on a GPU leaves them.

    Raises:
        UserError: torch is not installed or lacks the device, or the checkpoint is not the bundle's.
    """

    name, in_place = "torch", True

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
        eager: bool = False,
        threads: int | None = None,
    ):
        torch = import_torch()
        self.bundle, self.compile = bundle, compile
        self.target = bundle.manifest.targets[0]
        self.device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        self._check_device(torch)
        self.dtype = self._resolve_dtype(dtype)
        self.graphs = self.whole_chunks = self.device.startswith("cuda") and not eager
        self.in_chunk = False  # calls are part of a chunk's graph and have none of their own
        # While one thread records a graph, no other may ask the device for anything. On the CPU nobody waits for anybody.
        self.lock = threading.RLock() if self.graphs else contextlib.nullcontext()
        self.threads = usable_cores() if threads is None and self.device == "cpu" else threads
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.torch = torch
        self._stages = self._load_stages(find_checkpoint(bundle, checkpoint))
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self._runners: dict[str, TorchRunner] = {}

    def load(self, name: str) -> TorchRunner:
        """See `factorportrait.engines.base.Engine`."""
        if name not in self._runners:
            spec = self._channels_first(self.bundle.stage(name))
            retyped = (tuple(self._retype(tensor) for tensor in side) for side in (spec.inputs, spec.outputs))
            inputs, outputs = retyped
            spec = dataclasses.replace(spec, inputs=inputs, outputs=outputs)
            self._runners[name] = TorchRunner(self, spec, self._stages[name])
        return self._runners[name]

    def zeros(self, shape: Iterable[int], dtype: str) -> torch.Tensor:
        """See `factorportrait.engines.base.Engine`."""
        with self.lock:
            return self.torch.zeros(tuple(shape), dtype=getattr(self.torch, dtype), device=self.device)

    def free_bytes(self) -> int | None:
        """See `factorportrait.engines.base.Engine`."""
        if not self.device.startswith("cuda"):
            return available_memory()
        with self.lock:
            kept = self.torch.cuda.memory_reserved(self.device) - self.torch.cuda.memory_allocated(self.device)
            return self.torch.cuda.mem_get_info(self.device)[0] + kept

    def view(self, buffer: torch.Tensor, shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
        """See `factorportrait.engines.base.Engine`."""
        return buffer.view(-1)[start : start + prod(shape)].view(shape)

    def mirror(self, buffer: torch.Tensor) -> np.ndarray:
        """See `factorportrait.engines.base.Engine`. NumPy has no bfloat16: the host holds such a buffer in float32."""
        torch = self.torch
        dtype = torch.float32 if buffer.dtype == torch.bfloat16 else buffer.dtype
        if buffer.device.type == "cpu" and dtype == buffer.dtype:
            return buffer.numpy()
        with self.lock:
            return torch.zeros(buffer.shape, dtype=dtype, pin_memory=self.device.startswith("cuda")).numpy()

    def copy(self, source: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> None:
        """See `factorportrait.engines.base.Engine`."""
        source, target = (self.torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in (source, target))
        alike = source.dtype == target.dtype or {source.dtype, target.dtype} == {self.torch.float32, self.torch.bfloat16}
        if not alike or source.shape != target.shape:
            raise ValueError(
                f"copy of {dtype_name(source)} {list(source.shape)} to {dtype_name(target)} {list(target.shape)}"
            )
        if source.device != target.device or source.data_ptr() != target.data_ptr():
            with self.lock:
                target.copy_(source)

    def copy_slot(self, source: torch.Tensor, source_slot: int, target: torch.Tensor, target_slot: int) -> None:
        """See `factorportrait.engines.base.Engine`."""
        check_slots(source, source_slot, target, target_slot)
        with self.lock:
            target[:, :, target_slot].copy_(source[:, :, source_slot])

    def weighted_sum(
        self, target: torch.Tensor, terms: Sequence[tuple[torch.Tensor, float]], spare: torch.Tensor, first: int = 0
    ) -> Call:  # fmt: skip
        """See `factorportrait.engines.base.Engine`."""
        torch, target, spare = self.torch, target[:, :, first:], spare[:, :, first:]
        (start, scale), *others = [(source[:, :, first:], weight) for source, weight in terms]

        @torch.inference_mode()
        def call() -> None:
            with self.lock:
                torch.mul(start, scale, out=target)
                for source, weight in others:
                    torch.mul(source, weight, out=spare)
                    torch.add(target, spare, out=target)

        return call

    def capture(self, run: Call) -> Call:
        """See `factorportrait.engines.base.Engine`."""
        if not self.graphs:
            return run

        def whole() -> None:
            before, self.in_chunk = self.in_chunk, True
            try:
                run()
            finally:
                self.in_chunk = before

        return self._locked(_captured(whole, self.torch, self._pool))

    def kernels(self, file: str, names: Iterable[str]) -> None:
        """See `factorportrait.engines.base.Engine`. The engine that others are measured against runs its own modules."""
        return None

    def _locked(self, run: Call) -> Call:
        def call() -> None:
            with self.lock:
                run()

        return call

    def _check_device(self, torch) -> None:
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"--device {self.device}", expected="a device that torch can use", found=str(error).splitlines()[0],
                action="use --device cpu, or install torch for this device",
            ) from error  # fmt: skip

    def _resolve_dtype(self, dtype: str | None) -> str:
        precision = self.bundle.manifest.precision
        dtype = dtype or _DTYPE_OF.get(precision)
        if dtype is None:
            raise UserError(
                "--engine torch", expected=f"a bundle of precision {' or '.join(_DTYPE_OF)}", found=precision,
                action="take such a bundle: torch runs the checkpoint's weights, not quantised ones",
            )  # fmt: skip
        if dtype not in DTYPES:
            raise UserError("dtype", expected=" or ".join(DTYPES), found=dtype, action="choose one of them")
        return dtype

    def _channels_first(self, spec: StageSpec) -> StageSpec:
        """int8 graphs for the CPU keep the VAE's caches with channels last; torch's modules do not."""
        from factorportrait.export.quantize.bundles import has_channels_last
        from factorportrait.export.quantize.layout import TO_FIRST

        if not has_channels_last(self.bundle.manifest.precision, self.target, spec.name):
            return spec
        sides = (
            tuple(
                dataclasses.replace(tensor, shape=tuple(tensor.shape[axis] for axis in TO_FIRST))
                if tensor.name.startswith(("cache_in.", "cache_out.")) else tensor
                for tensor in side
            )
            for side in (spec.inputs, spec.outputs)
        )  # fmt: skip
        inputs, outputs = sides
        return dataclasses.replace(spec, inputs=inputs, outputs=outputs)

    def _load_stages(self, checkpoint: Path) -> dict[str, Stage]:
        from factorportrait.export.checkpoint import load_checkpoint
        from factorportrait.export.stages import stages_of

        model = load_checkpoint(checkpoint).eval().requires_grad_(False)
        modules = {stage.name: stage for stage in stages_of(model)}
        if self.dtype != "float32":
            from factorportrait.export.precision import half_recipe

            recipe, dtype = half_recipe(), getattr(self.torch, self.dtype)
            self._is_half = recipe.is_half
            # What `copy.deepcopy` puts in the place of each parameter: all stages share one copy.
            memo = {
                id(parameter): self.torch.nn.Parameter(parameter.to(dtype), requires_grad=False)
                for name, parameter in model.named_parameters()
                if not recipe.keeps(name)
            }
            modules = {
                name: dataclasses.replace(stage, module=copy.deepcopy(stage.module, dict(memo)))
                for name, stage in modules.items()
            }
        for stage in modules.values():
            stage.module.to(self.device).eval()
            if hasattr(stage.module, "mutate"):
                stage.module.mutate = True
        return modules

    def _retype(self, tensor: TensorSpec) -> TensorSpec:
        if not tensor.dtype.startswith("float"):
            return tensor
        is_half = self.dtype != "float32" and self._is_half(tensor.name)
        return dataclasses.replace(tensor, dtype=self.dtype if is_half else "float32")


class TorchRunner:
    """One module. See `factorportrait.engines.base.Runner`."""

    def __init__(self, engine: TorchEngine, spec: StageSpec, stage: Stage):
        self.spec, self._engine, self._stage = spec, engine, stage
        self._module = engine.torch.compile(stage.module) if engine.compile else stage.module

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """See `factorportrait.engines.base.Runner.bind`."""
        check_buffers(self.spec, inputs, outputs)
        torch, module = self._engine.torch, self._module
        given = [inputs[name] for name in self._stage.input_names]
        kept = [outputs[name] for name in self._stage.output_names]

        @torch.inference_mode()
        def run() -> None:
            results = module(*given)
            results = (results,) if isinstance(results, torch.Tensor) else results
            for result, output in zip(results, kept, strict=True):
                # What was updated in place is there already.
                if result.data_ptr() != output.data_ptr() or result.dtype != output.dtype:
                    output.copy_(result)

        engine = self._engine
        if not engine.graphs:
            return run
        captured = _captured(run, torch, engine._pool)
        return engine._locked(lambda: run() if engine.in_chunk else captured())


def _captured(run: Call, torch, pool) -> Call:
    """Calls `run` once, then captures it in a CUDA graph, then replays that. Calls run one after another, so they share a pool."""
    warm, graph = False, None

    def call() -> None:
        nonlocal warm, graph
        if not warm:
            run()
            warm = True
            return
        if graph is None:
            torch.cuda.synchronize()
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded, pool=pool):
                run()
            graph = recorded
        graph.replay()

    return call


def import_torch():
    """The module torch.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "--engine torch", expected="the package torch", found=str(error),
            action='pip install "factorportrait[export]" (in a checkout: pip install -e ".[export]")',
        ) from error  # fmt: skip
    return torch


def find_checkpoint(bundle: Bundle, checkpoint: str | Path | None) -> Path:
    """The folder that a bundle was exported from.

    Args:
        checkpoint: the folder; None for the shipped one.

    Raises:
        UserError: it is another checkpoint than the bundle's.
    """
    from factorportrait.shipped import shipped_checkpoint

    path = Path(checkpoint) if checkpoint is not None else shipped_checkpoint()
    if checkpoint_digests(path) != bundle.manifest.provenance.get("checkpoint_files"):
        name = bundle.manifest.provenance.get("checkpoint", "?")
        raise UserError(
            f"checkpoint {path}", expected=f"the one that {bundle.path} was exported from ({name})", found="other files",
            action="name its folder with --checkpoint",
        )  # fmt: skip
    return path
