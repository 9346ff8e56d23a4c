"""A latency report with every field in use, to be written and read back."""

from __future__ import annotations

from factorportrait.benchmarks.schema import (
    Chunk,
    Code,
    Energy,
    Gpu,
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


def summary(value: float, count: int = 4) -> Summary:
    """Percentiles around `value` ms."""
    return Summary(count, value, value, 1.1 * value, 1.2 * value, 1.3 * value, 1.4 * value, 0.9 * value, 1.1 * value)


def make_repetition(order: int, step_ms: float = 5.0) -> Repetition:
    """Two chunks, the second steady."""
    stage_ms = {"expression": 1.0, "pose": 2.0, "step.0": step_ms, "step.1": step_ms, "commit": 4.0, "decode": 6.0}
    chunks = tuple(
        Chunk(frames, past, past > 0, sum(stage_ms.values()) + 0.1, (1.0,) * (frames - 1) + (21.0,), stage_ms)
        for frames, past in ((5, 0), (8, 2))
    )
    return Repetition(order, 0.1 * order, 3.0, 7.0, 30.0, chunks)


def make_report() -> Report:
    """One good row, and one that could not run."""
    work = Work(2e9, {"linear": 1.5e9, "attention": 0.5e9}, 1e7, 3e7)
    stage = Stage("step.0", summary(5.0), 0.2, work, "fp32", 1.0, "compute", 0.2)
    good = Result(
        key="demo/onnxruntime-cpu", case="demo", peer="onnxruntime-cpu", config={"mode": "stream", "steps": 2}, status="ok",
        sweep=Sweep("demo-steps", "steps", 2), repetitions=(make_repetition(0), make_repetition(1)),
        latency=Latency(summary(3.0), summary(24.0), summary(40.0), 24.0, summary(30.0), summary(20.0), 333.0, 24.0, 0.0),
        stages=(stage,), accounted=0.995, occupancy={"step.0": 0.2}, critical_path=("step.0",),
        waterfall=(Span("step.0", 0.0, 5.0),),
        memory=Memory(10, 20, 30, 40), startup=Startup(0.5, None, 2.5), energy=Energy(0.1, 20.0),
        noise=Noise((3.0, 3.1), 0.03, 0.0, 0.1, 0.5, ("other processes took 10 % of the processor time",)), stopped="narrow",
    )  # fmt: skip
    missing = Result("demo/tensorrt", "demo", "tensorrt", {"mode": "stream"}, "unavailable", "no NVIDIA GPU")
    return Report(
        created="2026-01-01T00:00:00+00:00", command=("fp-bench", "run"), scope="in memory", seconds=12.5,
        machine=Machine("Linux x86_64", "A CPU", ("avx2",), 4, 2**33, (3000.0,), (Gpu("A GPU", "600.1", 2**34),)),
        code=Code("0.1.0", "0" * 40, "main", False, "2026-01-01T00:00:00+00:00"), versions={"python": "3.12.0"},
        limits=(Limits("cpu", 2, {"fp32": 1e11}, 1e10, {"int8": "no instruction"}),), noise=Noise(), results=(good, missing),
    )  # fmt: skip
