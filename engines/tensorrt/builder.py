"""ONNX -> plan with TensorRT's builder. `python -m factorportrait.engines.tensorrt.builder` does it, in a process of its own:
a crash of the library then ends that process and becomes one line of ours. See `build.py` for the other side.

Polygraphy's loaders are not used. With damaged caches, the parser's errors, locks and progress done here, they would save the
twenty calls below, and be one more package on every machine that runs a portrait. Its command line is a good tool to look into a
graph that is refused: `polygraphy debug reduce`, `polygraphy inspect model`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from factorportrait.engines.tensorrt.cuda import CudaError, Device
from factorportrait.engines.tensorrt.machine import import_tensorrt
from factorportrait.engines.tensorrt.plans import Options, read_timing_cache, write_timing_cache
from factorportrait.engines.tensorrt.profiles import Profile
from factorportrait.errors import UserError

REPORT_EVERY_S = 0.1
# Without --workspace-mb a layer may use this share of the free memory for scratch; the rest is for weights and activations.
WORKSPACE_SHARE = 0.8
WRONG_GRAPH = "export it for this target: fp-export CHECKPOINT --target tensorrt --precision fp16"


@dataclass(frozen=True)
class Job:
    """What the process is asked to do.

    Attributes:
        stage: for people.
        graph, plan, timing_cache, log: paths; the log is where the library's messages go.
    """

    stage: str
    graph: str
    plan: str
    timing_cache: str
    log: str
    profiles: tuple[Profile, ...]
    options: Options

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        data = json.loads(text)
        profiles = tuple(Profile(**profile) for profile in data.pop("profiles"))
        return cls(**{**data, "profiles": profiles, "options": Options(**data["options"])})


class Phases:
    """How far a build is, from the phases that the builder reports: each has steps, and within a step other phases may run."""

    def __init__(self):
        self._phases: dict[str, list] = {}  # name -> [parent, steps, steps done]
        self._furthest = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        self._phases[name] = [parent, max(1, num_steps), 0]

    def step(self, name: str, step: int) -> None:
        if name in self._phases:
            self._phases[name][2] = step + 1

    def finish(self, name: str) -> None:
        self._phases.pop(name, None)

    @property
    def fraction(self) -> float:
        """0..1, never less than before. Steps count alike, though timing kernels takes most of the time."""
        roots = [name for name, (parent, *_) in self._phases.items() if parent not in self._phases]
        self._furthest = max([self._furthest, *map(self._share, roots)])
        return self._furthest

    def _share(self, name: str) -> float:
        _, num_steps, done = self._phases[name]
        inner = [self._share(child) for child, (parent, *_) in self._phases.items() if parent == name]
        return min(1.0, (done + max(inner, default=0.0)) / num_steps)


def build(job: Job, tell: Callable[[dict], None]) -> None:
    """Write the plan.

    Args:
        job: what to build.
        tell: is given {"fraction": 0..1, "phase": name} now and then, and {"notice": line} for what a user should know.

    Raises:
        UserError: TensorRT refuses the graph or finds no way to run it.
    """
    trt = import_tensorrt(f"building the plan of {job.stage}")
    log = open_log(trt, lambda message: print(message, file=sys.stderr, flush=True))
    builder = trt.Builder(log)
    network = builder.create_network(0)  # TensorRT 11 networks are always strongly typed: types are those of the graph
    _parse(trt, network, log, job)
    config = _config(trt, builder, job)
    times, wrong = read_timing_cache(Path(job.timing_cache))
    if wrong:
        tell({"notice": wrong})
    _use_timing_cache(config, times, job, tell)
    monitor = _monitor(trt, tell)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(
            f"graph {job.graph}", expected="a graph that TensorRT compiles", found=log.errors[-1] if log.errors else "no plan",
            action=f"all messages are in {job.log}; where memory was short, --workspace-mb gives it more",
        )  # fmt: skip
    with open(job.plan, "wb") as file:
        file.write(plan)
    cache = config.get_timing_cache()
    if cache is not None:
        write_timing_cache(Path(job.timing_cache), bytes(cache.serialize()))


def open_log(trt: ModuleType, write: Callable[[str], None]):
    """A logger for TensorRT: warnings and errors go to `write`, and `errors` keeps the errors."""

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            if severity not in (trt.ILogger.INFO, trt.ILogger.VERBOSE):
                write(message)

    return Log()


def _parse(trt: ModuleType, network: Any, log: Any, job: Job) -> None:
    parser = trt.OnnxParser(network, log)
    # From the file, so that weights beside the graph are found, however large they are.
    parsed = parser.parse_from_file(job.graph)
    errors = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        place = " ".join(part for part in (error.node_operator(), error.node_name()) if part)
        print(f"{place}: {error.desc()}", file=sys.stderr)
        errors.append(f"{place}: {' '.join(error.desc().split())[:300]}")
    if errors or not parsed:
        more = f" and {len(errors) - 1} more errors" if len(errors) > 1 else ""
        raise UserError(
            f"graph {job.graph}", expected="a graph that TensorRT's parser takes",
            found=(errors[0] + more) if errors else "one that it refuses without a reason",
            action=f"all messages are in {job.log}; {WRONG_GRAPH}",
        )  # fmt: skip


def _config(trt: ModuleType, builder: Any, job: Job) -> Any:
    config, options = builder.create_builder_config(), job.options
    config.builder_optimization_level = options.optimization_level
    # What the graph keeps in fp32 is there for its precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    workspace = options.workspace_bytes if options.workspace_bytes is not None else _free_workspace()
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    for profile in job.profiles:
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.shapes.items():
            shapes.set_shape(name, tuple(low), tuple(best), tuple(high))
        if config.add_optimization_profile(shapes) < 0:
            raise UserError(
                f"graph {job.graph}", expected=f"inputs that the profile {profile.name} fits", found="others",
                action=f"all messages are in {job.log}",
            )  # fmt: skip
    return config


def _free_workspace() -> int | None:
    """Bytes; None leaves TensorRT's own limit, the whole memory."""
    try:
        free, _ = Device().memory()
    except (CudaError, UserError):
        return None
    return int(free * WORKSPACE_SHARE)


def _use_timing_cache(config: Any, times: bytes, job: Job, tell: Callable[[dict], None]) -> None:
    for content in (times, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        if content:
            tell({"notice": f"timing cache {job.timing_cache} is of another TensorRT or GPU; measuring again"})


def _monitor(trt: ModuleType, tell: Callable[[dict], None]):
    class Monitor(trt.IProgressMonitor):
        """Called by TensorRT from any of its threads."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self._phases, self._lock, self._told = Phases(), threading.Lock(), 0.0

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(name, parent, num_steps)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                self._phases.step(name, step)
                now = time.monotonic()
                if now - self._told < REPORT_EVERY_S:
                    return True
                self._told = now
                try:
                    tell({"fraction": self._phases.fraction, "phase": name})
                except OSError:
                    return False  # nobody listens any more: stop building
                return True

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.finish(name)

    return Monitor()


def main() -> int:
    """Read a job from stdin; write what happens to stdout, one JSON object a line, the last one saying how it ended."""

    def tell(message: dict) -> None:
        print(json.dumps(message), flush=True)

    job = Job.from_json(sys.stdin.read())
    try:
        build(job, tell)
    except UserError as error:
        parts = {name: getattr(error, name) for name in ("what", "expected", "found", "action")}
        tell({"error": parts})
        return 0
    except Exception as error:  # what pybind11 makes of C++ errors
        traceback.print_exc()
        tell({"error": {
            "what": f"building the plan of {job.stage}", "expected": "TensorRT to build it",
            "found": f"{type(error).__name__}: {error}", "action": f"all messages are in {job.log}",
        }})  # fmt: skip
        return 0
    tell({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
