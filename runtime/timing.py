"""Where the time goes: seconds by stage and latency per chunk."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np


class Timings:
    """Adds up wall time by stage, and keeps how long each chunk took and how many frames it gave."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.chunks: list[tuple[float, int]] = []
        self.first_frame_s: float | None = None

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
            self.calls[stage] += 1

    def frame_ms(self, percentile: float) -> float | None:
        """Percentile over frames of their chunk's time divided by its frames; None before the first chunk."""
        per_frame = [1000 * seconds / frames for seconds, frames in self.chunks for _ in range(frames)]
        return float(np.percentile(per_frame, percentile)) if per_frame else None

    def summary(self) -> dict[str, object]:
        """Numbers for a report: milliseconds by stage, per-frame percentiles, time to first frame."""
        return {
            "stage_ms": {stage: round(1000 * seconds, 3) for stage, seconds in self.seconds.items()},
            "stage_calls": dict(self.calls),
            "frame_ms_p50": self.frame_ms(50),
            "frame_ms_p95": self.frame_ms(95),
            "time_to_first_frame_ms": None if self.first_frame_s is None else 1000 * self.first_frame_s,
        }
