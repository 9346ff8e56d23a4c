"""Latency reports with known truth: a machine that drifts, bursts and jitters, and stages whose times are planted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from factorportrait.benchmarks.schema import (
    Chunk,
    Code,
    Latency,
    Limits,
    Machine,
    Memory,
    Noise,
    Repetition,
    Report,
    Result,
    Span,
    Stage,
    Startup,
    Summary,
    Sweep,
    Work,
)

STAGES = {
    "expression": 2.0,
    "rays": 0.3,
    "pose": 40.0,
    "conditions": 1.5,
    "step.0": 18.0,
    "step.1": 18.0,
    "commit": 8.0,
    "decode": 60.0,
}
FRAMES = 12
MACHINE = Machine("Linux x86_64", "Test CPU", ("avx2", "avx512f"), 2, 8 << 30)


def mood(rng: np.random.Generator, count: int) -> np.ndarray:
    """Logarithm of how slow the machine is [count], one per repetition: a random walk, bursts and correlated noise."""
    walk = np.cumsum(rng.normal(0, 0.01, count))
    bursts, noise = np.zeros(count), np.zeros(count)
    for start in np.flatnonzero(rng.random(count) < 0.05):
        length = rng.integers(1, 8)
        bursts[start : start + length] += rng.uniform(0.05, 0.5)
    for i in range(1, count):
        noise[i] = 0.6 * noise[i - 1] + rng.normal(0, 0.015)
    return walk + bursts + noise


def repetition(
    rng: np.random.Generator, slow: float, order: int, factors: dict[str, float], chunks: int = 4
) -> Repetition:
    """slow: logarithm; factors: stage -> planted factor."""
    rows = []
    for index in range(chunks):
        spike = rng.exponential(0.3) if rng.random() < 0.05 else 0.0
        stage_ms = {
            stage: ms * factors.get(stage, 1.0) * math.exp(slow + spike + rng.normal(0, 0.04))
            for stage, ms in STAGES.items()
        }
        stage_ms["other"] = 0.4
        wall = sum(stage_ms.values())
        rows.append(Chunk(FRAMES, 3 * index, index > 0, wall, (wall / FRAMES,) * FRAMES, stage_ms))
    return Repetition(order, 1.5 * order, 10 * math.exp(slow), 30.0, 200.0, tuple(rows))


def summary(values) -> Summary:
    values = np.asarray(values, float)
    p = [float(np.percentile(values, q)) for q in (50, 90, 95, 99, 100)]
    return Summary(len(values), float(values.mean()), *p, 0.98 * p[0], 1.02 * p[0])


def result(
    repetitions, case: str = "demo", peer: str = "onnxruntime-cpu", sweep: Sweep | None = None, **config
) -> Result:
    chunks = [chunk for rep in repetitions for chunk in rep.chunks if chunk.steady]
    wall = summary([chunk.wall_ms for chunk in chunks])
    per_frame = summary([chunk.wall_ms / chunk.frames for chunk in chunks])
    first = summary([rep.first_frame_ms for rep in repetitions])
    arrival = summary(np.outer([chunk.wall_ms for chunk in chunks], np.linspace(1, 1.9, FRAMES)).ravel())
    latency = Latency(
        per_frame, wall, arrival, None, first, summary([rep.chunks[0].wall_ms for rep in repetitions]),
        1000 / per_frame.p50, 25.0, 0.03,
    )  # fmt: skip
    stages = []
    for name, ms in STAGES.items():
        times = summary([chunk.stage_ms[name] for chunk in chunks])
        work = None if name == "rays" else Work(ms * 4e7, {"linear": ms * 4e7}, ms * 2e5, ms * 9e5)
        limit = None if work is None else max(work.flops / 1e11, work.bytes / 2e10) * 1e3
        stages.append(
            Stage(
                name,
                times,
                ms / sum(STAGES.values()),
                work,
                work and "fp32",
                limit,
                work and "compute",
                work and limit / times.p50,
            )
        )
    typical = min(chunks, key=lambda chunk: abs(chunk.wall_ms - wall.p50))
    spans, at = [], 0.0
    for name, ms in typical.stage_ms.items():
        spans.append(Span(name, at, at + ms))
        at += ms
    fields = {
        "mode": "stream",
        "precision": "fp32",
        "steps": 2,
        "window": 9,
        "resolution": 128,
        "bundle": "demo-fp32",
        "threads": 2,
    } | config
    return Result(
        f"{case}/{peer}",
        case,
        peer,
        fields,
        "ok",
        sweep=sweep,
        repetitions=tuple(repetitions),
        latency=latency,
        stages=tuple(stages),
        accounted=0.997,
        occupancy={name: 0.1 for name in STAGES},
        waterfall=tuple(spans),
        memory=Memory(500 << 20, None, 4 << 20, 90 << 20),
        startup=Startup(0.25, None, 1.9),
        noise=Noise(tuple(rep.spin_ms for rep in repetitions), 0.08),
        stopped="cap",
    )


def report(results, commit: str = "a" * 40, committed: str = "2026-11-20T12:00:00+00:00", **fields) -> Report:
    defaults = {
        "created": "2026-11-21T10:00:00+00:00",
        "command": ("fp-bench", "run"),
        "scope": "pushes in host memory to pictures in host memory",
        "machine": MACHINE,
        "code": Code("0.1.0", commit, "main", False, committed),
        "versions": {"numpy": "2", "onnxruntime": "1.23"},
        "limits": (Limits("cpu", 2, {"fp32": 1e11}, 2e10, {"fp16": "no kernel"}),),
        "noise": Noise((10.0, 11.0), 0.1, 0.0, 0.2, 1.5),
        "results": tuple(results),
        "seconds": 61.0,
    }
    return Report(**(defaults | fields))


def turns(rng: np.random.Generator, pairs: int, factors: dict[str, float]) -> tuple[Report, Report]:
    """Base and head that took turns (A B, B A, ...); head's stages take `factors` times as long."""
    slow = mood(rng, 2 * pairs)
    sides = ([], [])
    for i in range(pairs):
        for place, side in enumerate((i % 2, 1 - i % 2)):
            sides[side].append(repetition(rng, slow[2 * i + place], 2 * i + place, factors if side else {}))
    return tuple(report([result(side)], commit=name * 40, turns="t") for side, name in zip(sides, "ab", strict=True))


def separate(
    rng: np.random.Generator, count: int, factors: dict[str, float], step: float = 0.0
) -> tuple[Report, Report]:
    """Base, then head; between them the machine becomes slower by `step` (logarithm)."""
    slow = mood(rng, 2 * count) + np.repeat([0.0, step], count)
    sides = [
        [repetition(rng, slow[count * side + i], i, factors if side else {}) for i in range(count)] for side in (0, 1)
    ]
    return tuple(report([result(side)], commit=name * 40) for side, name in zip(sides, "ab", strict=True))


def peers_and_sweep(rng: np.random.Generator) -> Report:
    """A whole report: three peers (one failed, one unavailable), and scaling curves over steps and threads."""
    reps = [repetition(rng, slow, i, {}) for i, slow in enumerate(mood(rng, 12))]
    torch = [repetition(rng, slow, i, dict.fromkeys(STAGES, 1.6)) for i, slow in enumerate(mood(rng, 12))]
    rows = [
        result(reps),
        result(torch, peer="torch"),
        Result("demo/torch-compile", "demo", "torch-compile", {}, "unavailable", "no C++ compiler was found"),
        Result("demo/diffusers", "demo", "diffusers", {}, "failed", 'RuntimeError: shapes <1> & "2"'),
    ]
    for axis, values in (("steps", (1, 2, 4)), ("threads", (1, 2))):
        for value in values:
            factor = value if axis == "steps" else 2 / value
            swept = [
                repetition(rng, slow, i, {"step.0": factor, "step.1": factor}) for i, slow in enumerate(mood(rng, 4))
            ]
            rows.append(result(swept, case=f"demo-{axis}-{value}", sweep=Sweep("demo", axis, value), **{axis: value}))
    return report(rows)


def without(value: Report, **fields) -> Report:
    return dataclasses.replace(value, **fields)
