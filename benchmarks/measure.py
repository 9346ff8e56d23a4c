"""Measure rows of one case in turns, and turn their samples into figures.

    rows = {"a": LocalWorker(subject), "b": ...}         # or ProcessWorker(case, peer, folder)
    results = measure_case(case, rows)                   # list of schema.Result, raw samples included

Rows take turns repetition by repetition, every second round backwards (A B B A ...), so that a machine that becomes slower or
faster does so for all of them.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from factorportrait.benchmarks.cases import Case
from factorportrait.benchmarks.machine import (
    Usage,
    gpu_energy_j,
    gpu_memory_bytes,
    noise_of,
    nvml,
    spin_ms,
)
from factorportrait.benchmarks.peers.base import Sample, Subject, covered_ms
from factorportrait.benchmarks.schema import (
    OTHER,
    Chunk,
    Energy,
    Latency,
    Limits,
    Memory,
    Repetition,
    Result,
    Span,
    Stage,
    Startup,
    Summary,
    Sweep,
    Work,
)
from factorportrait.errors import UserError

CONFIDENCE_REPETITIONS = 6  # fewer have no 95 % interval of the median
OVERLAP = 1.02  # stages that sum to more than so much of the time in which any ran are not serial


class WorkerError(Exception):
    """A row cannot go on. available: it could run but failed; else it cannot run here."""

    def __init__(self, reason: str, available: bool = True):
        super().__init__(reason)
        self.reason, self.available = " ".join(reason.split()), available


@dataclass(frozen=True)
class Measured:
    """One repetition with what the process saw of itself: processor seconds, joules of the GPUs, highest memory so far."""

    sample: Sample
    spin_ms: float
    usage: Usage
    energy_j: float | None
    wall_s: float
    memory: Memory


class Worker(Protocol):
    """Runs repetitions of one row. Raises WorkerError."""

    startup: Startup
    notes: tuple[str, ...]

    def repeat(self, num_frames: int) -> Measured:
        """One repetition."""

    def close(self) -> None:
        """End it."""


class LocalWorker:
    """A subject in this process."""

    def __init__(self, subject: Subject):
        self.subject, self.startup, self.notes = subject, subject.startup, subject.notes
        self._device_peak: int | None = None

    def repeat(self, num_frames: int) -> Measured:
        """See `Worker.repeat`."""
        spin, usage = spin_ms(), Usage()
        with nvml() as library:
            energy, start = gpu_energy_j(library), time.perf_counter()
            with usage.watch():
                sample = self.subject.repeat(num_frames)
            wall_s = time.perf_counter() - start
            used = None if energy is None else gpu_energy_j(library) - energy
            if (device := gpu_memory_bytes(library)) is not None:
                self._device_peak = max(device, self._device_peak or 0)
        # Linux counts kilobytes, macOS bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = replace(self.subject.memory(), host_peak_bytes=peak, device_peak_bytes=self._device_peak)
        return Measured(sample, spin, usage, used, wall_s, memory)

    def close(self) -> None:
        """See `Worker.close`."""


class ProcessWorker:
    """A peer in a process of its own: it may crash, and its memory is its own.

    Raises:
        WorkerError: the peer cannot run, or its process ended.
    """

    def __init__(self, case: Case, peer: str, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, case, peer, str(folder)), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.startup, self.notes = self._receive()
        except BaseException:
            self.close()
            raise

    def repeat(self, num_frames: int) -> Measured:
        """See `Worker.repeat`."""
        with contextlib.suppress(BrokenPipeError):  # then `_receive` says why
            self._pipe.send(num_frames)
        return self._receive()

    def _receive(self):
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            end = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            raise WorkerError(f"its process ended with {end}") from None
        if kind == "ok":
            return value
        raise WorkerError(value, available=kind != "unavailable")

    def close(self) -> None:
        """See `Worker.close`."""
        self._pipe.close()  # an idle process then ends by itself
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe, case: Case, peer: str, folder: str) -> None:
    """The process of a row. Ctrl-C is for the process that started it, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from factorportrait.benchmarks.peers import PEERS

    opened = False
    try:
        worker = LocalWorker(PEERS[peer].open(case, Path(folder)))
        pipe.send(("ok", (worker.startup, worker.notes)))
        opened = True
        while True:
            pipe.send(("ok", worker.repeat(pipe.recv())))
    except (EOFError, BrokenPipeError):
        return
    except UserError as error:
        pipe.send(("failed" if opened else "unavailable", str(error)))
    except Exception as error:  # whatever a peer's library raises becomes its row
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:500]))


@dataclass
class Row:
    """What is gathered for one row."""

    key: str
    peer: str
    worker: Worker | None
    status: str = "ok"
    reason: str = ""
    stopped: str = ""
    repetitions: list[Repetition] = field(default_factory=list)
    spans: list[tuple[Chunk, tuple[Span, ...]]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    memory: Memory = field(default_factory=Memory)
    energy: list[tuple[float, float, int]] = field(default_factory=list)  # joules, seconds, frames


class Interrupted(BaseException):
    """Somebody stopped the run; `results` is what there is. The cause is the interrupt itself."""

    def __init__(self, results: list[Result]):
        super().__init__()
        self.results = results


def measure_case(
    case: Case,
    workers: Mapping[str, Worker | WorkerError],
    *,
    sweep: Sweep | None = None,
    origin: float | None = None,
    on_round: Callable[[int, float | None], None] = lambda rounds, width: None,
) -> list[Result]:
    """Measure the rows of a case in turns.

    Args:
        case: resolved (`cases.resolve`).
        workers: row name -> what runs it, or why nothing does. They are closed by their owner.
        sweep: the point of a curve that the case is.
        origin: `time.perf_counter()` when the run began; None for now.
        on_round: called after every round with its number and the widest relative half interval, None while there is none.

    Returns:
        One result per row, in order; a row that fails keeps the repetitions before, and the others go on.

    Raises:
        Interrupted: Ctrl-C or a termination signal; it carries the results.
    """
    origin = time.perf_counter() if origin is None else origin
    rows = []
    for name, worker in workers.items():
        row = Row(f"{case.name}/{name}", name, worker)
        if isinstance(worker, WorkerError):
            row.worker, row.status, row.reason = None, "failed" if worker.available else "unavailable", worker.reason
        rows.append(row)

    def results() -> list[Result]:
        return [result_of(case, row, sweep) for row in rows]

    try:
        _take_turns(case, rows, origin, on_round)
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        for row in rows:
            if row.status == "ok":
                row.status, row.reason, row.stopped = "interrupted", "the run was stopped", "interrupted"
        raise Interrupted(results()) from error
    return results()


def _take_turns(case: Case, rows: Sequence[Row], origin: float, on_round) -> None:
    from factorportrait.benchmarks.cases import frames_until_steady

    warm_up = min(case.frames, frames_until_steady(case)) if case.mode == "stream" else case.frames
    for row in rows:
        _attempt(row, warm_up)
    order, start = 0, time.perf_counter()
    for round_idx in range(case.max_repetitions):
        alive = [row for row in rows if row.status == "ok"]
        if not alive:
            return
        for row in alive if round_idx % 2 == 0 else reversed(alive):
            started = time.perf_counter() - origin
            if (measured := _attempt(row, case.frames)) is not None:
                _keep(row, measured, order, started)
            order += 1
        width = max((half_interval(row.repetitions) for row in alive if row.status == "ok"), default=math.inf)
        on_round(round_idx + 1, None if math.isinf(width) else width)
        enough = round_idx + 1 >= case.repetitions
        if enough and width <= case.interval:
            stopped = "narrow"
        elif enough and time.perf_counter() - start > case.max_seconds:
            stopped = "time"
        elif round_idx + 1 == case.max_repetitions:
            stopped = "cap"
        else:
            continue
        for row in alive:
            row.stopped = stopped
        return


def _attempt(row: Row, num_frames: int) -> Measured | None:
    """One repetition; a failure ends the row."""
    if row.status != "ok":
        return None
    try:
        return row.worker.repeat(num_frames)
    except WorkerError as error:
        row.status, row.reason = "failed", error.reason
        return None


def _keep(row: Row, measured: Measured, order: int, started_s: float) -> None:
    sample = measured.sample
    row.repetitions.append(
        Repetition(order, started_s, measured.spin_ms, sample.reference_ms, sample.first_frame_ms, sample.chunks)
    )
    row.spans += [pair for pair in zip(sample.chunks, sample.spans, strict=True) if pair[0].steady]
    for name in ("total_s", "steal_s", "busy_s", "own_s"):
        setattr(row.usage, name, getattr(row.usage, name) + getattr(measured.usage, name))
    row.memory = measured.memory
    if measured.energy_j is not None:
        row.energy.append((measured.energy_j, measured.wall_s, sum(chunk.frames for chunk in sample.chunks)))


def steady_chunks(repetition: Repetition) -> list[Chunk]:
    """Those that the figures are of."""
    return [chunk for chunk in repetition.chunks if chunk.steady]


def half_interval(repetitions: Sequence[Repetition]) -> float:
    """Half of the 95 % interval of the median chunk time, relative to it; infinite with too few repetitions for one."""
    if len(repetitions) < CONFIDENCE_REPETITIONS:
        return math.inf
    found = summarise([[chunk.wall_ms for chunk in steady_chunks(repetition)] for repetition in repetitions])
    return (found.high - found.low) / 2 / found.p50


def summarise(groups: Sequence[Sequence[float]]) -> Summary:
    """groups: the samples of each repetition, ms; groups without samples are left out."""
    groups = [group for group in groups if group]
    samples = np.concatenate([np.asarray(group, float) for group in groups])
    if len(groups) < CONFIDENCE_REPETITIONS:
        low, high = samples.min(), samples.max()
    else:
        medians = np.sort([np.median(group) for group in groups])
        outside = _sign_rank(len(medians))
        low, high = medians[outside], medians[-1 - outside]
    percentiles = [float(value) for value in np.percentile(samples, [50, 90, 95, 99, 100])]
    return Summary(len(samples), float(samples.mean()), *percentiles, float(low), float(high))


def _sign_rank(count: int) -> int:
    """How many of `count` ordered samples lie outside the 95 % interval of their median on each side (the sign test's interval)."""
    tail, outside = 0.0, 0
    while True:
        tail += math.comb(count, outside) / 2**count
        if tail > 0.025:
            return max(outside - 1, 0)
        outside += 1


def result_of(case: Case, row: Row, sweep: Sweep | None) -> Result:
    """Figures of a row's samples."""
    worker = row.worker
    result = Result(
        key=row.key, case=case.name, peer=row.peer, config=case.to_config(), status=row.status, reason=row.reason, sweep=sweep,
        repetitions=tuple(row.repetitions), memory=row.memory, startup=worker.startup if worker else Startup(),
        notes=worker.notes if worker else (), stopped=row.stopped,
        noise=noise_of([r.spin_ms for r in row.repetitions], row.usage, None),
    )  # fmt: skip
    if not any(steady_chunks(repetition) for repetition in row.repetitions):
        return result
    energy = None
    if row.energy:
        joules, seconds, frames = (sum(column) for column in zip(*row.energy, strict=True))
        energy = Energy(joules / frames, joules / seconds)
    spans = [spans for _, spans in row.spans]
    overlapped = any(_is_overlapped(found) for found in spans)
    chunks = [chunk for repetition in row.repetitions for chunk in steady_chunks(repetition)]
    wall = sum(chunk.wall_ms for chunk in chunks)
    waterfall = _typical(row.spans)
    return replace(
        result, latency=latency_of(row.repetitions, case.target_fps), stages=tuple(stages_of(row.repetitions)), energy=energy,
        execution="overlapped" if overlapped else "serial",
        accounted=sum(ms for chunk in chunks for stage, ms in chunk.stage_ms.items() if stage != OTHER) / wall,
        occupancy=occupancy_of(row.spans), critical_path=critical_path(waterfall) if overlapped else (), waterfall=waterfall,
    )  # fmt: skip


def latency_of(repetitions: Sequence[Repetition], target_fps: float) -> Latency | None:
    """The three tellings; None for peers that make no pictures."""
    if any(repetition.first_frame_ms is None for repetition in repetitions):
        return None
    steady = [steady_chunks(repetition) for repetition in repetitions]
    frames, wall = (sum(getattr(chunk, name) for chunks in steady for chunk in chunks) for name in ("frames", "wall_ms"))
    throughput = 1000 * frames / wall
    arrival_fps = target_fps if throughput >= target_fps else None
    return Latency(
        per_frame=summarise([[c.wall_ms / c.frames for c in chunks for _ in range(c.frames)] for chunks in steady]),
        per_chunk=summarise([[c.wall_ms for c in chunks] for chunks in steady]),
        arrival=summarise([arrival_ms(repetition, arrival_fps) for repetition in repetitions]),
        arrival_fps=arrival_fps,
        first_frame=summarise([[repetition.first_frame_ms] for repetition in repetitions]),
        first_chunk=summarise([[repetition.chunks[0].wall_ms] for repetition in repetitions]),
        throughput_fps=throughput, target_fps=target_fps,
        deadline_misses=float(np.mean([miss for repetition in repetitions for miss in misses(repetition, target_fps)])),
    )  # fmt: skip


def arrival_ms(repetition: Repetition, fps: float | None) -> list[float]:
    """From a driving frame's arrival to its picture, frames of steady chunks: pushes replayed one after another.

    fps: rate at which frames arrive; None when each arrives just as the session can take it.
    """
    found, now, arrived = [], 0.0, 0
    for chunk in repetition.chunks:
        arrivals = []
        for push in chunk.push_ms:
            arrival = now if fps is None else 1000 * arrived / fps
            arrived += 1
            arrivals.append(arrival)
            now = max(now, arrival) + push
        if chunk.steady:
            found += chunk.arrival_ms or [now - arrival for arrival in arrivals]
    return found


def misses(repetition: Repetition, fps: float) -> list[bool]:
    """Per picture of the clip: it is later than a player needs it that runs two chunks behind the driving.

    A player that follows more closely stops between chunks, however fast they are computed: it has to wait for their frames.
    """
    now, arrived, shown, found = 0.0, 0, 0, []
    behind = 2 * max(chunk.frames for chunk in repetition.chunks)
    for chunk in repetition.chunks:
        for push in chunk.push_ms:
            now = max(now, 1000 * arrived / fps) + push
            arrived += 1
        for _ in range(chunk.frames):
            found.append(now > 1000 * (shown + behind) / fps + 1e-9)
            shown += 1
    return found


def stages_of(repetitions: Sequence[Repetition]) -> list[Stage]:
    """Times per stage of the steady chunks, in the order in which the stages first run."""
    steady = [steady_chunks(repetition) for repetition in repetitions]
    names = dict.fromkeys(name for chunks in steady for chunk in chunks for name in chunk.stage_ms)
    wall = sum(chunk.wall_ms for chunks in steady for chunk in chunks)
    stages = []
    for name in names:
        times = [[chunk.stage_ms.get(name, 0.0) for chunk in chunks] for chunks in steady]
        stages.append(Stage(name, summarise(times), share=sum(map(sum, times)) / wall))
    return stages


def bounded(stage: Stage, work: Work, limits: Limits, precision: str) -> Stage:
    """The stage with its physical limit.

    Products of weights run in `precision`; attention does too, except where that is int8: then in fp16 on a GPU, fp32 elsewhere.
    """
    unquantised = "fp16" if "fp16" in limits.matrix_flops else "fp32"
    attention = unquantised if precision == "int8" else precision
    rates = [limits.matrix_flops.get(attention if kind == "attention" else precision) for kind in work.flops_by_kind]
    if None in rates or not rates:
        return replace(stage, work=work, precision=precision)
    compute = 1000 * sum(count / rate for count, rate in zip(work.flops_by_kind.values(), rates, strict=True))
    memory = 1000 * work.bytes / limits.copy_bytes_s
    limit = max(compute, memory)
    return replace(
        stage, work=work, precision=precision, limit_ms=limit, bound="compute" if compute >= memory else "memory",
        fraction=limit / stage.per_chunk.p50,
    )  # fmt: skip


def _is_overlapped(spans: Sequence[Span]) -> bool:
    return sum(span.end_ms - span.start_ms for span in spans) > OVERLAP * covered_ms(spans)


def _typical(chunks: Sequence[tuple[Chunk, tuple[Span, ...]]]) -> tuple[Span, ...]:
    """Spans of the chunk whose time is nearest the median."""
    median = np.median([chunk.wall_ms for chunk, _ in chunks])
    return min(chunks, key=lambda pair: abs(pair[0].wall_ms - median))[1]


def occupancy_of(chunks: Sequence[tuple[Chunk, tuple[Span, ...]]]) -> dict[str, float]:
    """Per stage the share of the wall time in which it ran."""
    wall = sum(chunk.wall_ms for chunk, _ in chunks)
    names = dict.fromkeys(span.stage for _, spans in chunks for span in spans)
    return {
        name: sum(covered_ms([span for span in spans if span.stage == name]) for _, spans in chunks) / wall for name in names
    }  # fmt: skip


def critical_path(spans: Sequence[Span]) -> tuple[str, ...]:
    """Stages that bound a chunk: back from its last end, each time the span that ended last before the present one began."""
    path: list[str] = []
    limit = math.inf
    while True:
        before = [span for span in spans if span.end_ms <= limit and span.start_ms < limit]
        if not before:
            return tuple(dict.fromkeys(reversed(path)))
        last = max(before, key=lambda span: span.end_ms)
        path.append(last.stage)
        limit = last.start_ms
