"""fp-bench stream: does a stream stay as fast and as small as it began? One long stream, watched chunk by chunk."""

from __future__ import annotations

import gc
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from factorportrait.benchmarks.cases import synthetic_driving
from factorportrait.benchmarks.machine import describe_machine
from factorportrait.benchmarks.schema import Machine
from factorportrait.errors import UserError
from factorportrait.files import whole_file
from factorportrait.model_config import FRAMES_PER_LATENT
from factorportrait.runtime.session import OpenBundle, SessionOptions

SCHEMA = 1
LARGE_BYTES = 64 * 1024  # an array that is allocated in a step may not be larger
SLOWER = 0.03  # the last quarter may be so much slower than the second one
TRACED_CHUNKS = 4
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Quarter:
    """Chunks of a quarter of the stream: median times of a chunk, and the largest resident size when one was ready."""

    chunks: int
    wall_ms: float
    cpu_ms: float
    resident_bytes: int


@dataclass(frozen=True)
class StreamReport:
    """A long stream.

    Attributes:
        quarters: of the stream, in order.
        slower: last quarter's median wall time over the second's, less 1; slower_cpu: the same of processor time, which other
            programs on the machine disturb less.
        growth_bytes: last quarter's resident size less the second's.
        allocated_bytes: largest sum of what one `generate` (all steps, and the commit) allocated in Python at once, of some steady
            chunks in a stream of its own, since counting slows down.
        chunk_ms, resident: samples of every chunk.
    """

    config: dict
    frames: int
    machine: Machine
    seconds: float
    quarters: tuple[Quarter, ...]
    slower: float
    slower_cpu: float
    growth_bytes: int
    allocated_bytes: int
    chunk_ms: tuple[float, ...]
    resident: tuple[int, ...]
    schema: int = SCHEMA

    @property
    def objections(self) -> list[str]:
        """What is not as it should be."""
        found = []
        if self.slower > SLOWER:
            found.append(f"the last quarter is {self.slower:.1%} slower than the second; at most {SLOWER:.0%}")
        if self.growth_bytes > 0.01 * self.quarters[1].resident_bytes:
            found.append(f"memory grew by {self.growth_bytes / 2**20:.1f} MiB")
        if self.allocated_bytes >= LARGE_BYTES:
            found.append(f"a chunk's steps allocated {self.allocated_bytes} bytes; less than {LARGE_BYTES}")
        return found


def measure_stream(opened: OpenBundle, options: SessionOptions, num_frames: int, say: Callable[[str], None]) -> StreamReport:
    """Run a stream of `num_frames` synthetic driving frames.

    Raises:
        UserError: too few frames for quarters of steady chunks.
    """
    options = options.resolve(opened.config)
    least = 1 + 16 * FRAMES_PER_LATENT * options.chunk_frames
    if num_frames < least:
        raise UserError("--frames", expected=f"{least} or more", found=str(num_frames), action="10001 is what the target asks for")
    started = time.perf_counter()
    allocated = allocated_bytes(opened, options)
    session = opened.session(options)
    portrait, driving = synthetic_driving(opened.config, num_frames)
    session.set_reference(portrait)
    wall, cpu, resident = [], [], []
    now = time.perf_counter(), time.process_time()
    for index, _ in enumerate(session.chunks(driving)):
        before, now = now, (time.perf_counter(), time.process_time())
        wall.append(1000 * (now[0] - before[0]))
        cpu.append(1000 * (now[1] - before[1]))
        resident.append(resident_bytes())
        if index % 200 == 199:
            frames = 1 + FRAMES_PER_LATENT * ((index + 1) * options.chunk_frames - 1)
            say(f"{frames} of {num_frames} frames, {wall[-1]:.0f} ms a chunk")
    # The last chunk may be short; the first ones see less.
    whole = len(wall) - 1
    bounds = [round(part * whole / 4) for part in range(5)]
    quarters = tuple(
        Quarter(end - start, float(np.median(wall[start:end])), float(np.median(cpu[start:end])), max(resident[start:end]))
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    )
    config = {
        "bundle": opened.bundle.path.name, "source_key": opened.bundle.manifest.source_key,
        "precision": opened.bundle.manifest.precision, "engine": opened.engine.name,
        "threads": getattr(opened.engine, "threads", None), "mode": options.mode,
        "steps": options.steps, "chunk": options.chunk_frames, "window": options.window_frames,
        "overlap": session.overlap, "cache": session.cache, "embedding": session.embedding,
    }  # fmt: skip
    _, second, _, last = quarters
    return StreamReport(
        config, num_frames, describe_machine(), time.perf_counter() - started, quarters, last.wall_ms / second.wall_ms - 1,
        last.cpu_ms / second.cpu_ms - 1, last.resident_bytes - second.resident_bytes, allocated,
        tuple(round(each, 3) for each in wall), tuple(resident),
    )  # fmt: skip


def allocated_bytes(opened: OpenBundle, options: SessionOptions) -> int:
    """Largest sum that a steady chunk's steps and commit allocate in Python, arrays included (NumPy tells tracemalloc)."""
    session, peaks = opened.session(options), []
    warm = -(-options.window_frames // options.chunk_frames) + 1
    portrait, driving = synthetic_driving(
        opened.config, 1 + FRAMES_PER_LATENT * (options.chunk_frames * (warm + TRACED_CHUNKS) - 1)
    )
    generate = session._denoiser.generate

    def watched(chunk):
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        latents = generate(chunk)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        return latents

    session._denoiser.generate = watched
    session.set_reference(portrait)
    gc.collect()
    tracemalloc.start()
    try:
        for frame in driving:  # in this thread alone, or others' memory would count
            session.push(frame)
    finally:
        tracemalloc.stop()
    return max(peaks[warm:])


def resident_bytes() -> int:
    """Resident size of this process; the largest so far where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        from factorportrait.runtime.cli import peak_memory_bytes

        return peak_memory_bytes() or 0


def write_stream(path: Path, report: StreamReport) -> None:
    """The report as JSON."""
    with whole_file(path) as file:
        file.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


def stream_text(report: StreamReport) -> str:
    """For a terminal."""
    lines = [
        f"quarter {number}: {quarter.chunks} chunks, {quarter.wall_ms:.2f} ms a chunk (processor {quarter.cpu_ms:.2f} ms), "
        f"{quarter.resident_bytes / 2**20:.1f} MiB"
        for number, quarter in enumerate(report.quarters, 1)
    ]
    lines.append(
        f"{report.frames} frames: last quarter against the second {report.slower:+.2%} (processor {report.slower_cpu:+.2%}), "
        f"memory {report.growth_bytes / 2**10:+.0f} KiB, a chunk's steps allocate at most {report.allocated_bytes / 2**10:.1f} KiB"
    )
    return "\n".join([*lines, *(f"not as it should be: {objection}" for objection in report.objections)]) + "\n"
