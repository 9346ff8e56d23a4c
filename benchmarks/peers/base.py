"""The interface of peers, and the clock that turns a session's spans into samples."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from factorportrait.benchmarks.cases import Case
from factorportrait.benchmarks.schema import OTHER, Chunk, Memory, Span, Startup
from factorportrait.runtime import timing


@dataclass(frozen=True)
class Sample:
    """One repetition as a peer measures it.

    Attributes:
        reference_ms, first_frame_ms: as in `schema.Repetition`; None where the peer makes no pictures.
        spans: per chunk when each stage ran, ms since the chunk before was ready.
    """

    reference_ms: float | None
    first_frame_ms: float | None
    chunks: tuple[Chunk, ...]
    spans: tuple[tuple[Span, ...], ...]


class Subject(Protocol):
    """A peer opened for one case, warm or not. It lives in a process of its own."""

    startup: Startup
    notes: tuple[str, ...]

    def repeat(self, num_frames: int) -> Sample:
        """Run a clip of so many frames from its reference on, and time it."""

    def memory(self) -> Memory:
        """What can be known about it here; peaks of the process are added by whoever runs it."""


@dataclass(frozen=True)
class Peer:
    """A plug-in.

    Attributes:
        unavailable: case -> why it cannot run here, or "". Cheap: it decides without loading anything.
        open: case, bundle folder -> Subject; raises UserError where it turns out to be unavailable after all.
        whole: it makes pictures; else only some stages are measured, and the row has no latency.
        fused: it embeds the conditions with the C++ extension where that is built, not with the bundle's graph.
    """

    name: str
    description: str
    unavailable: Callable[[Case], str]
    open: Callable[[Case, Path], Subject]
    whole: bool = True
    precision: str | None = None  # of its arithmetic; None for the bundle's
    device: str = "cpu"
    fused: bool = False


def missing_package(module: str, extra: str) -> str:
    """Why a peer that imports `module` cannot run, or ""."""
    if importlib.util.find_spec(module) is None:
        return f'the package {module} is not installed: pip install "factorportrait[{extra}]"'
    return ""


def milliseconds(nanoseconds: int) -> float:
    """Exact to the nanosecond, and short in a report."""
    return round(1e-6 * nanoseconds, 6)


@dataclass
class ChunkClock:
    """Cuts one repetition into chunks. Times are `time.perf_counter_ns`.

    Args:
        spans: the list that the session appends to (`factorportrait.runtime.timing.Timings.spans`).
        begin_ns: of the first push.
    """

    spans: list[timing.Span]
    begin_ns: int
    pushes: list[float] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    spans_ms: list[tuple[Span, ...]] = field(default_factory=list)

    def pushed(self, start_ns: int, end_ns: int, *, same_frame: bool = False) -> None:
        """A driving frame was taken; `same_frame`: the call belongs to the frame before (the end of the clip)."""
        duration = milliseconds(end_ns - start_ns)
        if same_frame and self.pushes:
            self.pushes[-1] = round(self.pushes[-1] + duration, 6)
        else:
            self.pushes.append(duration)

    def chunk(self, frames: int, past_frames: int, steady: bool, end_ns: int, arrival_ms: tuple[float, ...] = ()) -> None:
        """A chunk is ready."""
        stages: dict[str, int] = {}
        spans = []
        # A stage counts for the chunk in which it ends. Other threads may append meanwhile: that is for the next one.
        ended = self.spans[:]
        del self.spans[: len(ended)]
        for span in ended:
            name, start_ns = stage_name(span), max(span.start_ns, self.begin_ns)
            stages[name] = stages.get(name, 0) + span.end_ns - span.start_ns
            spans.append(Span(name, milliseconds(start_ns - self.begin_ns), milliseconds(span.end_ns - self.begin_ns)))
        stage_ms = {name: milliseconds(duration) for name, duration in stages.items()}
        wall_ms = milliseconds(end_ns - self.begin_ns)
        stage_ms[OTHER] = round(wall_ms - covered_ms(spans), 6)
        self.chunks.append(Chunk(frames, past_frames, steady, wall_ms, tuple(self.pushes), stage_ms, arrival_ms))
        self.spans_ms.append(tuple(spans))
        self.pushes.clear()
        self.begin_ns = end_ns


def covered_ms(spans: Sequence[Span]) -> float:
    """Time in which at least one of the spans ran."""
    total, end = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start_ms):
        total += max(0.0, span.end_ms - max(span.start_ms, end))
        end = max(end, span.end_ms)
    return total


def stage_name(span: timing.Span) -> str:
    """The stage as reports call it: denoising steps are told apart."""
    return span.stage if span.index is None else f"{span.stage}.{span.index}"
