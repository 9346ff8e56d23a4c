"""This program's own loop, on any of its engines: the rows that make pictures."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from factorportrait.benchmarks.cases import Case, synthetic_driving
from factorportrait.benchmarks.peers.base import ChunkClock, Peer, Sample
from factorportrait.benchmarks.schema import Memory, Startup
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT
from factorportrait.runtime.session import OpenBundle, SessionOptions, open_bundle


class LoopSubject:
    """A session that is driven again and again.

    Args:
        case: resolved.
        opened: the bundle, loaded.
    """

    def __init__(self, case: Case, opened: OpenBundle):
        self.case, self.opened = case, opened
        options = SessionOptions(case.mode, case.steps, case.guidance, 0, case.chunk, case.window)
        self.session = opened.session(options)
        self.startup = Startup(load_s=opened.load_s)
        self.notes = (f"bundle of {opened.bundle.manifest.provenance.get('checkpoint', 'unnamed')}, key "
                      f"{opened.bundle.manifest.source_key[:12]}",)  # fmt: skip
        self._portrait, _ = synthetic_driving(opened.config, 0)

    def repeat(self, num_frames: int) -> Sample:
        """See `Subject.repeat`."""
        with contextlib.ExitStack() as stack:
            driving, write = self._ends(num_frames, stack)
            return self._repeat(driving, write)

    def _repeat(self, driving: Iterator, write: Callable[[list], None] | None) -> Sample:
        session, case = self.session, self.case
        session.timings.spans = spans = []
        start = time.perf_counter_ns()
        session.set_reference(self._portrait)
        begin = time.perf_counter_ns()
        spans.clear()
        clock, first = ChunkClock(spans, begin), None
        expected = frames_of_chunks(case)

        def ready(pictures: list, end: int) -> None:
            nonlocal first
            first = end if first is None else first
            index = len(clock.chunks)
            past = 0 if case.mode == "clip" else min(index * case.chunk, case.window - case.chunk)
            full = index > 0 and past == case.window - case.chunk and len(pictures) == expected
            if write is not None:
                write(pictures)
                end = time.perf_counter_ns()
            clock.chunk(len(pictures), past, case.mode == "clip" or full, end)

        for frame in driving:
            before = time.perf_counter_ns()
            pictures = session.push(frame)
            after = time.perf_counter_ns()
            clock.pushed(before, after)
            if pictures:
                ready(pictures, after)
        before = time.perf_counter_ns()
        pictures = session.finish()
        after = time.perf_counter_ns()
        if pictures:
            clock.pushed(before, after, same_frame=True)
            ready(pictures, after)
        return Sample(1e-6 * (begin - start), 1e-6 * (first - start), tuple(clock.chunks), tuple(clock.spans_ms))

    def _ends(self, num_frames: int, stack: contextlib.ExitStack) -> tuple[Iterator, Callable[[list], None] | None]:
        """The driving, and what takes the pictures: memory, or the shipped files and a video."""
        if not self.case.io:
            return synthetic_driving(self.opened.config, num_frames)[1], None
        from factorportrait.runtime.inputs import open_inputs
        from factorportrait.runtime.media.writer import VideoWriter
        from factorportrait.shipped import shipped_inputs

        config, timings = self.opened.config, self.session.timings
        driving = open_inputs(self.opened.bundle, shipped_inputs() / "driving_clip")
        if driving.num_frames is not None and driving.num_frames < num_frames:
            raise UserError(
                f"case {self.case.name}: frames", expected=f"at most {driving.num_frames}, the shipped driving's",
                found=str(num_frames), action="use fewer",
            )  # fmt: skip
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        writer = stack.enter_context(VideoWriter(Path(folder) / "out.mp4", config.width, config.height, driving.fps))

        def frames() -> Iterator:
            source = iter(driving)
            for _ in range(num_frames):
                with timings("input"):
                    frame = next(source)
                yield frame

        def write(pictures: list[np.ndarray]) -> None:
            with timings("write"):
                for picture in pictures:
                    writer.write(picture)

        return frames(), write

    def memory(self) -> Memory:
        """See `Subject.memory`."""
        weights = sum(
            entry.bytes for name, entry in self.opened.bundle.manifest.files.items() if Path(name).suffix in (".onnx", ".data")
        )
        return Memory(cache_bytes=int(self.session.cache_bytes), weight_bytes=weights)

    def first_picture(self) -> None:
        """Run until the first picture is there."""
        self.session.set_reference(self._portrait)
        for frame in synthetic_driving(self.opened.config, self.case.frames)[1]:
            if self.session.push(frame):
                return
        self.session.finish()


def frames_of_chunks(case: Case) -> int:
    """Pictures of every chunk of a stream but the first, which has three fewer."""
    return FRAMES_PER_LATENT * case.chunk


def _open_ort(case: Case, folder: Path, **options) -> LoopSubject:
    return LoopSubject(case, open_bundle(folder, threads=case.threads, **options))


def _always(_case: Case) -> str:
    return ""


LOOPS = (
    Peer("onnxruntime-cpu", "ONNX Runtime on the CPU, bound buffers", _always, _open_ort),
    Peer(
        "onnxruntime-cpu-eager", "ONNX Runtime on the CPU, plain calls that allocate every result", _always,
        lambda case, folder: _open_ort(case, folder, eager=True),
    ),
)  # fmt: skip
