"""Where the time goes: seconds by stage and latency per chunk."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# Percentiles are of the latest chunks, so that a stream that never ends needs no more memory; totals are of all.
KEPT_CHUNKS = 4096


class Span(NamedTuple):
    """When a stage ran, by `time.perf_counter_ns`; index: which denoising step it was."""

    stage: str
    start_ns: int
    end_ns: int
    index: int | None = None


class Timings:
    """Adds up wall time by stage, and keeps how long the latest chunks took and how many frames each gave.

    A chunk's time is told twice. `busy`: inside the session, from the chunk's first driving frame to its pictures, without what the
    caller does in between and without waiting for the driving; None where stages have threads of their own, and work on several
    chunks at once. `wall`: since the chunk before (the first: since the reference), with everything: reading and rendering the
    driving, writing the video, and waiting. `first_frame_s` is the latest portrait's: from the reference to its first pictures.

    `spans` is None, or a list that every run of a stage is appended to when it ends; whoever sets it takes them out again.
    Stages may run at the same time (`factorportrait.runtime.pipeline`). `wait` is None, or called at the end of every stage: calls
    on a device return before it is done, so its stages can be told apart only when each is waited for.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.num_frames = 0
        self.busy_s: float | None = 0.0
        self.first_frame_s: float | None = None
        self.spans: list[Span] | None = None
        self.wait: Callable[[], None] | None = None
        self._chunks: deque[tuple[float | None, float, int]] = deque(maxlen=KEPT_CHUNKS)

    @contextlib.contextmanager
    def __call__(self, stage: str, index: int | None = None) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        try:
            yield
            if self.wait is not None:
                self.wait()
        finally:
            end_ns = time.perf_counter_ns()
            self.seconds[stage] += 1e-9 * (end_ns - start_ns)
            self.calls[stage] += 1
            if self.spans is not None:
                self.spans.append(Span(stage, start_ns, end_ns, index))

    def add_chunk(self, busy_s: float | None, wall_s: float, num_frames: int) -> None:
        """A chunk of so many pictures is ready."""
        self._chunks.append((busy_s, wall_s, num_frames))
        self.num_frames += num_frames
        self.busy_s = None if busy_s is None or self.busy_s is None else self.busy_s + busy_s

    @property
    def last_frame_ms(self) -> float | None:
        """Wall milliseconds per frame of the latest chunk."""
        if not self._chunks:
            return None
        _, wall_s, num_frames = self._chunks[-1]
        return 1000 * wall_s / num_frames

    def frame_ms(self, percentile: float, kind: str = "busy") -> float | None:
        """Percentile over frames of their chunk's time, "busy" or "wall", divided by its frames; None before the first chunk, and
        where nobody knows that time."""
        if not self._chunks:
            return None
        busy_s, wall_s, frames = zip(*self._chunks, strict=True)
        seconds = busy_s if kind == "busy" else wall_s
        if None in seconds:
            return None
        per_frame = 1000 * np.array(seconds) / frames
        return float(np.percentile(np.repeat(per_frame, frames), percentile))

    def summary(self) -> dict[str, object]:
        """Numbers for a report: milliseconds by stage, per-frame percentiles, time to first frame.

        On a device without `wait` a stage's time is the host's: the next one that copies to or from the host waits for all before
        it, and is charged with it.
        """
        percentiles = {
            f"{name}_p{percentile}": self.frame_ms(percentile, kind)
            for name, kind in (("frame_ms", "wall"), ("generate_ms", "busy"))
            for percentile in (50, 95)
        }
        return {
            "stage_ms": {stage: round(1000 * seconds, 3) for stage, seconds in self.seconds.items()},
            "stage_calls": dict(self.calls),
            **percentiles,
            "time_to_first_frame_ms": None if self.first_frame_s is None else 1000 * self.first_frame_s,
        }
