"""fp-bench waterfall: what each part of the denoising loop brings, from the loop that one writes first to the one that ships.

Every row adds one thing to the row before. Rows run in turns, each in a process of its own, as in `fp-bench run`; before that each
of them generates the same latents, which are compared with the first row's over the clip in which the window does not move yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import numpy as np

from factorportrait.benchmarks import svg
from factorportrait.benchmarks.cases import (
    Case,
    frames_until_steady,
    load_cases,
    materialise,
    resolve,
    synthetic_driving,
)
from factorportrait.benchmarks.machine import describe_machine
from factorportrait.benchmarks.measure import WorkerError, measure_case
from factorportrait.benchmarks.page import html_document, html_table, significant
from factorportrait.benchmarks.peers import PEERS
from factorportrait.benchmarks.run import opened_workers
from factorportrait.benchmarks.schema import Machine, Stage, Summary
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.files import whole_file

SCHEMA = 1
FILES = ("waterfall.json", "waterfall.html")
# Cases of shipped files: the demo (or BUNDLE), and two blocks of Wan 1.3B at their real widths with drawn weights. Wan's VAE would
# hide them, ten times as long as the denoising of two blocks, so this one has the demo's.
CASES = {
    "demo": {},
    "wan-1.3b-2blocks": {
        "model": "wan-1.3b-light-vae", "resolution": 256, "steps": 4, "chunk": 3, "window": 6, "frames": 33, "max_repetitions": 2,
    },
}  # fmt: skip
FRAMES, REPETITIONS = 45, 2  # rows are many, and some slow
LIMIT = 1e-4  # relative difference of latents to the first row's that sums in another order may have
DEVICE_LIMIT = 1e-3  # the same on a GPU, whose fp32 products have other kernels


@dataclass(frozen=True)
class Row:
    """One bar. changes: of the case, on top of the rows before."""

    name: str
    what: str
    peer: str
    changes: dict


ROWS = (
    Row("naive", "PyTorch, eager; every step computes all frames of the window again, with their conditions and time embeddings",
        "torch-naive", {"embedding": "graph", "hoist": "reference,time", "cache": "concat"}),
    Row("K/V cache", "keys and values of finished frames are kept; those of the reference are computed for every chunk",
        "torch-cpu", {"hoist": "none"}),
    Row("reference once", "the reference's keys and values are computed once per portrait", "torch-cpu", {"hoist": "reference"}),
    Row("conditions once", "reference, rays and normals are embedded once per chunk; a step embeds the noise alone",
        "torch-cpu", {"hoist": "reference,conditions"}),
    Row("modulation once", "the expression controller runs once per chunk",
        "torch-cpu", {"hoist": "reference,conditions,modulation"}),
    Row("time once", "time embeddings of the schedule are computed once",
        "torch-cpu", {"hoist": "reference,conditions,modulation,time"}),
    Row("features reused", "a driving picture like the one before keeps its code; the pictures of this clip all differ",
        "torch-cpu", {"hoist": "all"}),
    Row("graphs", "ONNX Runtime in place of PyTorch, plain calls", "onnxruntime-cpu-eager", {}),
    Row("bound buffers", "every stage writes into memory that was bound once", "onnxruntime-cpu", {}),
    Row("cache in place", "the graph updates the K/V cache where it lies", "onnxruntime-cpu", {"cache": "auto"}),
    Row("fused embedding", "conditions straight from cameras and latents in C++", "onnxruntime-cpu", {"embedding": "auto"}),
    Row("overlap", "encoder, denoiser and decoder at the same time (on request)", "onnxruntime-cpu-stages", {}),
)  # fmt: skip
# Behind the CPU's rows, where there is a GPU.
DEVICE_ROWS = (
    Row("ONNX Runtime CUDA", "the same loop on the GPU, CUDA graphs", "onnxruntime-cuda", {"embedding": "graph", "cache": "auto"}),
    Row("TensorRT", "plans replayed as CUDA graphs", "tensorrt", {"embedding": "graph", "cache": "auto"}),
)


def limit_of(peer: str) -> float:
    """The largest error that a row may have."""
    return LIMIT if PEERS[peer].device == "cpu" else DEVICE_LIMIT


@dataclass(frozen=True)
class Bar:
    """A row with figures.

    Attributes:
        reason: why it has none; else "".
        frame_ms: of the steady chunks.
        error: largest difference of its latents to the first row's, relative to the largest of them.
        stages: as in a latency report.
    """

    name: str
    what: str
    peer: str
    reason: str = ""
    frame_ms: Summary | None = None
    error: float | None = None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Waterfall:
    """The bars of one case; seconds: how long all of it took; noise: what made it doubtful."""

    case: str
    config: dict
    bars: tuple[Bar, ...]
    frames: int
    compared_frames: int
    machine: Machine
    seconds: float
    noise: tuple[str, ...]


def waterfall_case(name: str, bundle: str | None = None, checkpoint: str | None = None) -> Case:
    """The case of a waterfall, of `CASES`.

    Raises:
        UserError: no such case.
    """
    if name not in CASES:
        raise UserError("--case", expected=" or ".join(CASES), found=name, action="choose one of these")
    (case,) = (case for case in load_cases([name], bundle) if case.name == name)
    case = replace(case, **CASES[name])
    case = replace(case, frames=min(case.frames, FRAMES), cold_start=False, repetitions=REPETITIONS)
    return case if case.model is not None else replace(case, checkpoint=checkpoint)


def measure_waterfall(case: Case, say: Callable[[str], None], *, quick: bool = False) -> Waterfall:
    """Compare and time all rows.

    Raises:
        UserError: the bundle is missing or does not fit.
        Interrupted: the run was stopped.
    """
    started, folder = time.perf_counter(), materialise(case)
    case = resolve(case, Bundle(folder).config)
    if quick:
        case = replace(case, repetitions=1, max_repetitions=1)
    machine = describe_machine()
    rows = (*ROWS, *(DEVICE_ROWS if machine.gpus else ()))
    compared = frames_until_steady(case)
    cases, changes = {}, {}
    for row in rows:
        changes |= row.changes
        cases[row.name] = replace(case, **changes)
    errors, reasons = {}, {}
    expected = None
    for row in rows:
        if reason := PEERS[row.peer].unavailable(cases[row.name]):
            reasons[row.name] = reason
            continue
        say(f"{case.name}: what {row.name} generates")
        try:
            latents = latents_of(PEERS[row.peer].open(cases[row.name], folder), compared)
        except UserError as error:
            reasons[row.name] = str(error)
            continue
        expected = latents if expected is None else expected
        errors[row.name] = float(np.abs(latents - expected).max() / np.abs(expected).max())
    say(f"{case.name}: rows in turns")
    with opened_workers({row.name: (cases[row.name], row.peer, folder) for row in rows if row.name in errors}) as workers:
        failed = {name: WorkerError(reason, available=False) for name, reason in reasons.items()}
        results = {result.peer: result for result in measure_case(case, {**workers, **failed})}
    bars = []
    for row in rows:
        result = results[row.name]
        frame_ms = result.latency.per_frame if result.latency else None
        bars.append(Bar(row.name, row.what, row.peer, result.reason, frame_ms, errors.get(row.name), result.stages))
    noise = tuple(dict.fromkeys(reason for result in results.values() for reason in result.noise.reasons))
    return Waterfall(
        case.name, case.to_config(), tuple(bars), case.frames, compared, machine, time.perf_counter() - started, noise
    )


def latents_of(subject, num_frames: int) -> np.ndarray:
    """Clean latents [1,C,N,h,w] of a clip."""
    session, kept = subject.session, []
    generate = session._denoiser.generate

    def kept_too(chunk):
        latents = generate(chunk)
        kept.append(latents.fetch().copy())
        return latents

    session._denoiser.generate = kept_too
    portrait, driving = synthetic_driving(subject.opened.config, num_frames)
    session.set_reference(portrait)
    for _ in session.frames(driving):
        pass
    return np.concatenate(kept, axis=2)


def write_waterfall(folder: Path, found: Sequence[Waterfall]) -> list[Path]:
    """waterfall.json and waterfall.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = json.dumps({"schema": SCHEMA, "waterfalls": [asdict(each) for each in found]}, indent=1) + "\n", waterfall_page(found)
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, texts, strict=True):
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    return paths


def waterfall_text(found: Waterfall) -> str:
    """For a terminal."""
    lines = [f"{found.case}: ms per frame, all rows in turns; errors over the first {found.compared_frames} frames"]
    timed = [bar for bar in found.bars if bar.frame_ms]
    for bar in found.bars:
        if bar.frame_ms is None:
            lines.append(f"  {bar.name:<18} {bar.reason or 'no figures'}")
            continue
        first, before = timed[0].frame_ms.p50, timed[max(0, timed.index(bar) - 1)].frame_ms.p50
        ms = bar.frame_ms.p50
        lines.append(
            f"  {bar.name:<18} {ms:8.2f} ms  {before - ms:+8.2f} ms saved  {first / ms:5.2f}x the first  error {bar.error:.1e}"
        )
    return "\n".join([*lines, *(f"  noisy: {reason}" for reason in found.noise)]) + "\n"


def waterfall_page(found: Sequence[Waterfall]) -> str:
    """One page that works offline."""
    return html_document("Waterfall of the denoising loop", "".join(map(_section, found)), svg.STYLE)


def _section(found: Waterfall) -> str:
    timed = [bar for bar in found.bars if bar.frame_ms]
    config = found.config
    model = f"{config['model']}, {config['blocks']} blocks: " if config.get("model") else ""
    about = (
        f"{model}{found.frames} frames of {config['resolution']} x {config['resolution']} pixels, {config['steps']} steps, chunks "
        f"of {config['chunk']} and a window of {config['window']} latent frames, {config['threads']} threads, "
        f"{found.machine.cpu}. A bar is the median time per frame of the steady chunks, end to end without files; each row has "
        f"what the rows above have. Error: largest difference of the latents of the first {found.compared_frames} frames to the "
        "first row's, relative to the largest latent."
    )
    noise = "".join(f"<p>Noisy: {escape(reason)}</p>" for reason in found.noise)
    rows = []
    for bar in found.bars:
        if bar.frame_ms is None:
            rows.append(("", [escape(bar.name), escape(bar.what), escape(bar.reason or "no figures")]))
            continue
        before, ms = timed[max(0, timed.index(bar) - 1)].frame_ms.p50, bar.frame_ms
        interval = f"<small>{significant(ms.low)} to {significant(ms.high)}</small>"
        cells = [escape(bar.name), escape(bar.what), f"{significant(ms.p50)} {interval}", f"{before - ms.p50:+.2f}"]
        cells += [f"{timed[0].frame_ms.p50 / ms.p50:.2f}", f"{bar.error:.1e}"]
        rows.append(("main" if bar is timed[-1] else "", cells))
    table = html_table(["Row", "what it adds", "ms per frame", "saved, ms", "times the first", "error"], rows)
    return f"<h1>{escape(found.case)}</h1><p>{escape(about)}</p>{noise}{_plot(found.case, timed)}{table}"


def _plot(case: str, timed: Sequence[Bar]) -> str:
    if not timed:
        return ""
    step, most = 24, max(bar.frame_ms.p50 for bar in timed)
    plot = svg.Plot((0.0, most * 1.28), (0.0, 1.0), width=920, height=step * len(timed) + 64, left=140)
    plot.axes("milliseconds per frame", y_ticks=False)
    before = None
    for index, bar in enumerate(timed):
        ms, top = bar.frame_ms.p50, plot.top + step * index + 3
        if before is not None and before > ms:
            plot.bar(ms, before, top, step - 6, svg.colour(8), f"{bar.name}: {before - ms:.2f} ms saved")
        plot.bar(0, ms, top, step - 6, svg.colour(0), f"{bar.name}: {ms:.2f} ms per frame")
        plot.text(plot.left - 8, top + 13, bar.name, "end")
        plot.text(plot.x(max(ms, before or 0)) + 6, top + 13, f"{significant(ms)} ms, error {bar.error:.0e}")
        before = ms
    legend = [(svg.colour(0), "time per frame"), (svg.colour(8), "saved by this row")]
    return plot.figure(f"{case}: from the naive loop to the one that ships", "waterfall", legend)
