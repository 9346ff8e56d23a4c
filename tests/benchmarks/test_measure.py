"""Figures from samples whose times are known: turns, failures, intervals, the three tellings, stages, limits, critical path."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from factorportrait.benchmarks import measure
from factorportrait.benchmarks.cases import Case
from factorportrait.benchmarks.machine import Usage, noise_of
from factorportrait.benchmarks.measure import Interrupted, Measured, WorkerError, measure_case
from factorportrait.benchmarks.peers.base import ChunkClock, Sample
from factorportrait.benchmarks.schema import Chunk, Limits, Memory, Repetition, Span, Stage, Startup, Work
from factorportrait.runtime import timing

CASE = Case(
    "c", bundle="b", mode="stream", steps=2, window=3, chunk=1, threads=1, frames=9, target_fps=10.0, repetitions=3,
    max_repetitions=8,
)  # fmt: skip


def chunk(wall_ms: float, *, frames: int = 4, steady: bool = True, last_push: float | None = None) -> Chunk:
    """Pushes of 1 ms and one that takes the rest; stages that leave 1 ms unaccounted."""
    last = wall_ms - (frames - 1) if last_push is None else last_push
    return Chunk(frames, 2, steady, wall_ms, (1.0,) * (frames - 1) + (last,), {"pose": 2.0, "decode": wall_ms - 3.0})


def repetition(*chunks: Chunk, order: int = 0) -> Repetition:
    return Repetition(order, 0.0, 1.0, 5.0, 50.0, chunks)


class Stub:
    """A worker with given chunk times; an exception in their place is raised."""

    startup, notes = Startup(load_s=1.0), ("a note",)

    def __init__(self, name: str, times: list, log: list):
        self.name, self.times, self.log = name, iter(times), log

    def repeat(self, num_frames: int) -> Measured:
        self.log.append((self.name, num_frames))
        wall = next(self.times)
        if isinstance(wall, BaseException):
            raise wall
        spans = (Span("pose", 0.0, 2.0), Span("decode", 2.0, wall - 1.0))
        chunks = (chunk(wall / 2, steady=False), chunk(wall))
        return Measured(Sample(5.0, 50.0, chunks, (spans, spans)), 1.0, Usage(), 2.0, 0.5, Memory(host_peak_bytes=7))

    def close(self) -> None:
        pass


def test_rows_take_turns_and_every_second_round_runs_backwards():
    log: list = []
    case = dataclasses.replace(CASE, max_repetitions=3)
    results = measure_case(case, {name: Stub(name, [20.0] * 9, log) for name in "ab"})
    assert [name for name, _ in log] == list("ab" + "ab" + "ba" + "ab")
    assert [[r.order for r in result.repetitions] for result in results] == [[0, 3, 4], [1, 2, 5]]
    assert [result.key for result in results] == ["c/a", "c/b"]
    assert {result.stopped for result in results} == {"cap"}


def test_repetitions_end_when_every_interval_is_narrow():
    quiet, wild = [20.0] * 9, [20.0, *np.linspace(10, 90, 8)]
    results = measure_case(CASE, {"a": Stub("a", quiet, []), "b": Stub("b", quiet, [])})
    # Six is the least number of samples whose range is a 95 % interval of the median.
    assert {(len(result.repetitions), result.stopped) for result in results} == {(6, "narrow")}
    results = measure_case(CASE, {"a": Stub("a", quiet, []), "b": Stub("b", wild, [])})
    assert {(len(result.repetitions), result.stopped) for result in results} == {(8, "cap")}


def test_repetitions_end_with_the_time_but_not_before_the_least_number():
    case = dataclasses.replace(CASE, max_seconds=1e-9)
    (result,) = measure_case(case, {"a": Stub("a", [20.0] * 9, [])})
    assert (len(result.repetitions), result.stopped) == (3, "time")


def test_a_row_that_fails_says_so_and_the_others_go_on():
    times = [20.0, 20.0, WorkerError("its process ended with\nsignal SIGSEGV")]
    unavailable = WorkerError("no such thing here", available=False)
    rows = {"bad": Stub("bad", times, []), "none": unavailable, "good": Stub("good", [20.0] * 9, [])}
    bad, none, good = measure_case(CASE, rows)
    assert (bad.status, bad.reason, len(bad.repetitions)) == ("failed", "its process ended with signal SIGSEGV", 1)
    assert bad.latency is not None, "what was measured before is kept"
    assert (none.status, none.reason, none.repetitions) == ("unavailable", "no such thing here", ())
    assert good.status == "ok" and len(good.repetitions) == 6


def test_a_row_that_fails_in_warming_up_has_no_figures():
    (result,) = measure_case(CASE, {"a": Stub("a", [WorkerError("out of memory")], [])})
    assert result.status == "failed" and result.latency is None and result.stages == ()


def test_an_interrupt_keeps_what_was_measured():
    rows = {"a": Stub("a", [20.0] * 9, []), "b": Stub("b", [20.0, 20.0, KeyboardInterrupt()], [])}
    with pytest.raises(Interrupted) as caught:
        measure_case(CASE, rows)
    a, b = caught.value.results
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    assert (a.status, b.status) == ("interrupted", "interrupted")
    assert len(a.repetitions) >= 1 and len(b.repetitions) == 1 and a.latency is not None


def test_figures_of_one_row():
    (result,) = measure_case(dataclasses.replace(CASE, repetitions=2, max_repetitions=2), {"a": Stub("a", [9.0, 20.0, 40.0], [])})
    latency = result.latency
    assert (latency.per_chunk.p50, latency.per_chunk.max, latency.per_chunk.count) == (30.0, 40.0, 2)
    assert latency.per_frame.p50 == 7.5 and latency.per_frame.count == 8
    assert latency.throughput_fps == pytest.approx(1000 * 8 / 60)
    assert (latency.first_chunk.p50, latency.first_frame.p50) == (15.0, 50.0)
    assert [(stage.name, stage.per_chunk.p50) for stage in result.stages] == [("pose", 2.0), ("decode", 27.0)]
    assert result.accounted == pytest.approx(58 / 60)
    assert sum(stage.share for stage in result.stages) == pytest.approx(result.accounted)
    assert result.execution == "serial" and result.critical_path == ()
    assert result.energy.per_frame_j == pytest.approx(2.0 / 8) and result.energy.mean_w == pytest.approx(4.0)
    assert result.memory.host_peak_bytes == 7 and result.startup.load_s == 1.0 and result.notes == ("a note",)


def test_the_wait_for_the_chunk_counts():
    """10 frames a second, chunks of 4: the first frame of a chunk waits 300 ms for the last, which then takes 40 ms."""
    given = repetition(chunk(43.0, last_push=40.0), chunk(43.0, last_push=40.0))
    assert measure.arrival_ms(given, 10.0) == pytest.approx([340, 240, 140, 40] * 2)
    # Taken as fast as the session can: 43 ms for the first, which waits for three pushes of 1 ms and the one of 40.
    assert measure.arrival_ms(given, None) == pytest.approx([43, 42, 41, 40] * 2)


def test_a_session_that_is_too_slow_falls_behind():
    slow = repetition(*(chunk(803.0, last_push=800.0) for _ in range(5)))
    found = measure.arrival_ms(slow, 10.0)
    assert found[0] == pytest.approx(1100) and found[16] > found[12] > found[8] > found[4] + 300
    # The first chunk's pictures are due at 800, 900, 1000 and 1100 ms and there at 1100.
    assert measure.misses(slow, 10.0) == [True] * 3 + [False] + [True] * 16
    assert not any(measure.misses(repetition(*(chunk(43.0, last_push=40.0) for _ in range(5))), 10.0))
    assert measure.latency_of([slow], 10.0).arrival_fps is None
    assert measure.latency_of([slow], 2.0).arrival_fps == 2.0


def test_one_slow_chunk_misses_its_deadlines_and_no_others():
    quick = chunk(43.0, last_push=40.0)
    given = repetition(quick, quick, chunk(643.0, last_push=640.0), quick, quick)
    late = measure.misses(given, 10.0)
    assert late == [False] * 8 + [True] * 2 + [False] * 10


def test_a_short_first_chunk_makes_no_frame_late():
    """Its pictures are gone before the frames of the next chunk have arrived, however fast those are then computed."""
    given = repetition(chunk(1.0, frames=2), *(chunk(4.0, frames=8) for _ in range(3)))
    assert not any(measure.misses(given, 24.0))


@pytest.mark.parametrize(("count", "outside"), [(6, 0), (8, 0), (9, 1), (20, 5), (100, 39)])
def test_the_interval_of_the_median_is_the_sign_tests(count, outside):
    """Against the table of Conover, Practical Nonparametric Statistics: n=20 gives the 6th and 15th, n=100 the 40th and 61st."""
    found = measure.summarise([[float(i)] for i in range(1, count + 1)])
    assert (found.low, found.high) == (1 + outside, count - outside)
    assert (found.count, found.p50, found.max, found.mean) == (count, (count + 1) / 2, count, (count + 1) / 2)


def test_samples_of_a_repetition_count_once_in_the_interval():
    groups = [[float(i)] * 50 for i in range(1, 10)]
    found = measure.summarise(groups)
    assert (found.low, found.high, found.count) == (2.0, 8.0, 450)
    few = measure.summarise(groups[:3])
    assert (few.low, few.high) == (1.0, 3.0), "without an interval: the range"


def test_overlapping_stages_have_a_critical_path_and_an_occupancy():
    spans = (
        Span("expression", 0, 10), Span("pose", 0, 30), Span("step.0", 30, 60), Span("expression", 30, 40), Span("pose", 30, 58),
        Span("decode", 60, 100),
    )  # fmt: skip
    assert measure._is_overlapped(spans)
    assert measure.critical_path(spans) == ("pose", "step.0", "decode")
    occupancy = measure.occupancy_of([(chunk(100.0), spans)])
    assert occupancy == pytest.approx({"expression": 0.2, "pose": 0.58, "step.0": 0.3, "decode": 0.4})
    one_after_another = tuple(Span(f"s{i}", 10 * i, 10 * i + 10) for i in range(4))
    assert not measure._is_overlapped(one_after_another)
    assert measure.critical_path(one_after_another) == ("s0", "s1", "s2", "s3")


def test_the_limit_is_the_slower_of_computing_and_copying():
    stage = Stage("decode", measure.summarise([[10.0]]), 0.5)
    limits = Limits("cpu", 1, {"fp32": 1e12, "int8": 4e12}, 1e11)
    work = Work(3e9, {"linear": 2e9, "attention": 1e9}, 1e8, 1e9)
    found = measure.bounded(stage, work, limits, "fp32")
    assert (found.limit_ms, found.bound, found.fraction) == (pytest.approx(3.0), "compute", pytest.approx(0.3))
    quantised = measure.bounded(stage, work, limits, "int8")
    assert (quantised.limit_ms, quantised.bound) == (pytest.approx(0.5 + 1.0), "compute"), "attention stays as it was"
    memory = measure.bounded(stage, dataclasses.replace(work, bytes=6e8), limits, "fp32")
    assert (memory.limit_ms, memory.bound) == (pytest.approx(6.0), "memory")
    unknown = measure.bounded(stage, work, limits, "fp8")
    assert unknown.limit_ms is None and unknown.work == work


def test_spans_of_a_session_become_chunks():
    spans: list[timing.Span] = []
    clock = ChunkClock(spans, begin_ns=1_000_000)
    for step, (start, end) in enumerate([(2, 5), (5, 9)]):
        spans.append(timing.Span("step", start * 1_000_000, end * 1_000_000, step))
        clock.pushed((2 + step) * 1_000_000, (3 + step) * 1_000_000)
    spans.append(timing.Span("decode", 9_000_000, 11_000_000))
    clock.pushed(9_000_000, 12_000_000, same_frame=True)
    clock.chunk(2, 0, True, 13_000_000)
    spans.append(timing.Span("step", 12_000_000, 15_000_000, 0))  # begun in the chunk before, by another thread
    clock.pushed(13_000_000, 16_000_000)
    clock.chunk(1, 1, True, 16_000_000, (4.0,))
    first, second = clock.chunks
    assert first.stage_ms == pytest.approx({"step.0": 3, "step.1": 4, "decode": 2, "other": 3})
    assert first.wall_ms == pytest.approx(12) == sum(first.stage_ms.values())
    assert first.push_ms == pytest.approx((1, 4)), "the end of the clip belongs to its last frame"
    assert second.stage_ms == pytest.approx({"step.0": 3, "other": 1}) and second.wall_ms == pytest.approx(3)
    assert clock.spans_ms[1][0].start_ms == 0 and second.arrival_ms == (4.0,) and not spans


def test_time_is_other_only_where_no_stage_ran():
    """Stages that overlap sum to more than the wall time, which `other` must not hide."""
    spans = [timing.Span(name, start * 1_000_000, end * 1_000_000) for name, start, end in (("a", 1, 5), ("b", 2, 4), ("c", 6, 9))]
    clock = ChunkClock(spans, begin_ns=0)
    clock.chunk(1, 0, True, 10_000_000)
    (found,) = clock.chunks
    assert found.stage_ms["other"] == pytest.approx(3) and sum(found.stage_ms.values()) == pytest.approx(12)
    assert measure._is_overlapped(clock.spans_ms[0])


def test_a_noisy_run_says_why():
    quiet = Usage(total_s=20.0, busy_s=10.0, own_s=9.9)
    assert not noise_of([1.0, 1.01, 1.0, 1.02], quiet, 0.0).noisy
    assert "differ by" in noise_of([1.0, 1.0, 1.5, 2.0], quiet, 0.0).reasons[0]
    assert "hypervisor" in noise_of([1.0], Usage(20.0, steal_s=1.0, busy_s=10.0, own_s=10.0), 0.0).reasons[0]
    assert "other processes took 20%" in noise_of([1.0], Usage(20.0, busy_s=10.0, own_s=6.0), 0.0).reasons[0]
    assert "load average" in noise_of([1.0], None, 1000.0).reasons[0]
