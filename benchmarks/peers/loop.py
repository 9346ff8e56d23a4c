"""This program's own loop, on any of its engines: the rows that make pictures."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from factorportrait.benchmarks.cases import CHECKPOINT, Case, session_options, synthetic_driving
from factorportrait.benchmarks.peers.base import ChunkClock, Peer, Sample, milliseconds
from factorportrait.benchmarks.schema import Memory, Startup
from factorportrait.bundle import Bundle
from factorportrait.engines.choose import obstacle
from factorportrait.engines.tensorrt.machine import find_gpu
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT
from factorportrait.runtime.session import OpenBundle, Session, open_bundle


class LoopSubject:
    """A session that is driven again and again.

    Args:
        case: resolved.
        opened: the bundle, loaded.
    """

    def __init__(self, case: Case, opened: OpenBundle):
        self.case, self.opened = case, opened
        self.session = self.make_session()
        self.startup = Startup(load_s=opened.load_s)
        manifest = opened.bundle.manifest
        self.notes = (
            f"bundle of {manifest.provenance.get('checkpoint', 'unnamed')}, key {manifest.source_key[:12]}",
            *((f"cache {self.session.cache}: {self.session.cache_reason}",) if case.mode == "stream" else ()),
        )
        self._portrait, _ = synthetic_driving(opened.config, 0)
        if opened.engine.device != "cpu":
            # Calls on a device return before it is done; copies to the host wait for everything before them.
            flag = opened.engine.zeros((1,), "float32")
            seen = opened.engine.mirror(flag)
            self.session.timings.wait = lambda: opened.engine.copy(flag, seen)

    def make_session(self) -> Session:
        """The session that is driven."""
        return self.opened.session(session_options(self.case))

    def repeat(self, num_frames: int) -> Sample:
        """See `Subject.repeat`."""
        if self.session.overlap == "stages" and self.case.mode == "stream":
            num_frames += 2 * CHUNKS_AHEAD * frames_of_chunks(self.case)
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
        clock, first, taken = ChunkClock(spans, begin), None, _Taken()
        expected = frames_of_chunks(case)

        def ready(pictures: list, end: int, arrivals: tuple[float, ...] = ()) -> None:
            nonlocal first
            first = end if first is None else first
            index = len(clock.chunks)
            past = 0 if case.mode == "clip" else min(index * case.chunk, case.window - case.chunk)
            full = index > 0 and past == case.window - case.chunk and len(pictures) == expected
            if session.overlap == "stages":
                full = full and index >= CHUNKS_AHEAD and not taken.ended
            if write is not None:
                write(pictures)
                end = time.perf_counter_ns()
            clock.chunk(len(pictures), past, case.mode == "clip" or full, end, arrivals)

        if session.overlap != "none":
            for pictures in session.chunks(taken(driving)):
                after = time.perf_counter_ns()
                arrivals = tuple(milliseconds(after - taken.times.popleft()) for _ in pictures)
                # As a player sees them: pictures come at the rate of the chunks.
                for _ in pictures:
                    share = (after - clock.begin_ns) // len(pictures)
                    clock.pushed(after - share, after)
                ready(pictures, after, arrivals)
            return Sample(milliseconds(begin - start), milliseconds(first - start), tuple(clock.chunks), tuple(clock.spans_ms))
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
        return Sample(milliseconds(begin - start), milliseconds(first - start), tuple(clock.chunks), tuple(clock.spans_ms))

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


# Between a chunk at its source and its pictures there are at most so many others where stages overlap. While these fill, and when
# no new ones come behind them, a chunk has the cores more to itself than in the middle of a stream: such chunks are not steady.
CHUNKS_AHEAD = 7


class _Taken:
    """When each driving frame was taken, and whether there are no more."""

    def __init__(self):
        self.times: deque[int] = deque()
        self.ended = False

    def __call__(self, driving: Iterator) -> Iterator:
        for frame in driving:
            self.times.append(time.perf_counter_ns())
            yield frame
        self.ended = True


def frames_of_chunks(case: Case) -> int:
    """Pictures of every chunk of a stream but the first, which has three fewer."""
    return FRAMES_PER_LATENT * case.chunk


def checkpoint_of(case: Case, folder: Path) -> Path | None:
    """The checkpoint that a bundle was exported from, for the rows in PyTorch; None for the shipped one."""
    if case.checkpoint is not None:
        return Path(case.checkpoint)
    beside = folder.parent / CHECKPOINT
    return beside if beside.is_dir() else None


def _open(
    case: Case, folder: Path, engine: str, eager: bool = False, overlap: str | None = None, spin: bool = True
) -> LoopSubject:
    threads = case.threads
    if overlap is not None:
        case, threads = replace(case, overlap=overlap), max(1, case.threads // 2) if overlap == "stages" else case.threads
    return LoopSubject(case, open_bundle(folder, engine=engine, threads=threads, eager=eager, spin=spin))


def _open_torch(case: Case, folder: Path, **options) -> LoopSubject:
    from factorportrait.engines.pytorch import TorchEngine

    start = time.perf_counter()
    bundle = Bundle(folder)
    engine = TorchEngine(bundle, checkpoint_of(case, folder), threads=case.threads, **options)
    subject = LoopSubject(case, OpenBundle(bundle, engine, load_s=time.perf_counter() - start))
    if options.get("compile"):
        start = time.perf_counter()
        subject.first_picture()
        subject.startup = replace(subject.startup, build_s=time.perf_counter() - start)
    return subject


def _obstacle(engine: str) -> Callable[[Case], str]:
    def found(_case: Case) -> str:
        against = obstacle(engine)
        return f"it needs {against.expected}; found {against.found}" if against else ""

    return found


def _no_compiler(case: Case) -> str:
    if TORCH_DEVICE == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        return "torch.compile needs a C++ compiler: none found"
    return _obstacle("torch")(case)


def _peer(name: str, description: str, engine: str, **options) -> Peer:
    device = "cuda" if engine in ("onnxruntime-cuda", "tensorrt") else "cpu"
    opened = partial(_open, engine=engine, **options)
    return Peer(name, description, _obstacle(engine), opened, device=device, fused=device == "cpu")


def _torch_peer(name: str, description: str, unavailable: Callable[[Case], str], precision: str | None = None, **options) -> Peer:
    device = options.get("device", TORCH_DEVICE)
    return Peer(name, description, unavailable, partial(_open_torch, **options), precision=precision, device=device)


TORCH_DEVICE = "cpu" if isinstance(find_gpu(), str) else "cuda"
LOOPS = (
    _peer("onnxruntime-cpu", "ONNX Runtime on the CPU, bound buffers", "onnxruntime-cpu"),
    _peer("onnxruntime-cpu-eager", "ONNX Runtime on the CPU, calls that allocate every result", "onnxruntime-cpu", eager=True),
    _peer("onnxruntime-cpu-no-spin", "ONNX Runtime on the CPU, threads sleep while they wait", "onnxruntime-cpu", spin=False),
    _peer(
        "onnxruntime-cpu-stages", "the same with encoder, denoiser and decoder at once, on half of the threads each",
        "onnxruntime-cpu", overlap="stages",
    ),
    _peer("onnxruntime-cuda", "ONNX Runtime on an NVIDIA GPU", "onnxruntime-cuda"),
    _peer("tensorrt", "TensorRT plans, replayed as CUDA graphs", "tensorrt"),
    _torch_peer("torch", "PyTorch's modules in the same loop (eager on a CPU, CUDA graphs on a GPU)", _obstacle("torch")),
    _torch_peer("torch-cpu", "PyTorch's modules in the same loop on the CPU, eager", _obstacle("torch"), device="cpu"),
    _torch_peer("torch-bf16", "PyTorch in bfloat16", _obstacle("torch"), precision="bf16", dtype="bfloat16"),
    _torch_peer("torch-compile", "PyTorch through torch.compile", _no_compiler, compile=True),
)
