"""Statistics of two runs against known truth, and fp-bench compare's verdicts, tables and refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_reports import mood, repetition, report, result, separate, turns, without

from factorportrait.benchmarks import cli, compare, statistics
from factorportrait.benchmarks.schema import write_report

THRESHOLDS = compare.Thresholds()


def paired_times(rng, pairs, factor, chunks=4):
    """Times of A and B [pairs] that took turns in a drifting, bursting machine."""
    slow = mood(rng, 2 * pairs).reshape(pairs, 2)
    slow[1::2] = slow[1::2, ::-1]
    noise = np.median(rng.normal(0, 0.05, (pairs, 2, chunks)), axis=2)
    return np.exp(slow[:, 0] + noise[:, 0]), factor * np.exp(slow[:, 1] + noise[:, 1])


# Statistics


@pytest.mark.parametrize("n", [5, 6, 9])
def test_signed_rank_quantile_against_enumeration(n):
    signs = np.array(list(itertools.product((0, 1), repeat=n)))
    sums = signs @ np.arange(1, n + 1)
    for tail in (0.025, 0.0025):
        k = statistics.signed_rank_quantile(n, tail)
        assert (sums <= k - 1).mean() <= tail < (sums <= k).mean()


def test_few_pairs_have_no_interval():
    change = statistics.compare_paired([1.0] * 5, [2.0] * 5)
    assert change.high is None and change.detectable is None and change.estimate == pytest.approx(1.0)
    assert statistics.compare_paired([1.0] * 6, [2.0] * 6).high == pytest.approx(1.0)
    assert statistics.compare_paired([1.0] * 6, [2.0] * 6, rows=10).high is None


def test_paired_intervals_cover_the_truth_and_are_narrow():
    rng = np.random.default_rng(3)
    found = [statistics.compare_paired(*paired_times(rng, 24, 1.1)) for _ in range(400)]
    covered = np.mean([change.low <= 0.1 <= change.high for change in found])
    assert covered >= 0.92
    # An interval that is always infinite would cover as well.
    assert np.median([change.high - change.low for change in found]) < 0.06


def test_simultaneous_intervals_cover_together():
    rng = np.random.default_rng(4)

    def ten():
        return [statistics.compare_paired(*paired_times(rng, 24, 1.0), rows=10) for _ in range(10)]

    held = [all(change.low <= 0 <= change.high for change in ten()) for _ in range(60)]
    assert np.mean(held) >= 0.9


def test_block_intervals_cover_where_the_machine_stays_the_same():
    rng = np.random.default_rng(5)

    def correlated(n):
        noise = np.zeros(n)
        for i in range(1, n):
            noise[i] = 0.6 * noise[i - 1] + rng.normal(0, 0.03)
        return np.exp(noise)

    found = [statistics.compare_blocks(correlated(24), 1.1 * correlated(24)) for _ in range(200)]
    assert np.mean([change.low <= 0.1 <= change.high for change in found]) >= 0.9
    assert np.median([change.high - change.low for change in found]) < 0.25


def test_rounds_count_what_differs_from_process_to_process():
    rng = np.random.default_rng(6)
    covered = []
    for _ in range(200):
        luck = rng.normal(0, 0.03, (2, 5))
        base, head = ([np.exp(value + rng.normal(0, 0.01, 8)) for value in side] for side in luck)
        change = statistics.compare_rounds(base, head)
        covered.append(change.low <= 0 <= change.high)
    assert np.mean(covered) >= 0.9
    assert statistics.compare_rounds(base[:3], head[:3]).high is None


def test_detectable_change_is_detected():
    """The stated minimum, planted, is found in about 19 of 20; half way from the limit to it, much less often."""
    rng = np.random.default_rng(7)

    def change(slowdown):
        noise = rng.normal(0, 0.05, (2, 24))
        return statistics.compare_paired(np.exp(noise[0]), (1 + slowdown) * np.exp(noise[1]), limit=0.05)

    stated = float(np.median([change(0.0).detectable for _ in range(200)]))
    assert np.mean([change(stated).low > 0.05 for _ in range(300)]) == pytest.approx(0.95, abs=0.04)
    assert np.mean([change((0.05 + stated) / 2).low > 0.05 for _ in range(300)]) < 0.7


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=20), st.floats(0.2, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_paired_change_is_a_ratio(times, factor, seed):
    """Scaling B scales the whole interval; swapping A and B turns it round."""
    base = np.array(times)
    head = base * np.random.default_rng(seed).uniform(0.8, 1.3, len(base))
    one, other = statistics.compare_paired(base, head), statistics.compare_paired(base, factor * head)
    for name in ("estimate", "low", "high"):
        assert 1 + getattr(other, name) == pytest.approx(factor * (1 + getattr(one, name)))
    turned = statistics.compare_paired(head, base)
    assert (1 + turned.low) * (1 + one.high) == pytest.approx(1)
    assert one.low <= one.estimate <= one.high


def test_blocks_wrap_around_and_keep_neighbours():
    indices = statistics.block_indices(10, 50, np.random.default_rng(0))
    assert indices.shape == (50, 10) and set(indices.ravel()) == set(range(10))
    steps = np.diff(indices[:, :8].reshape(50, 2, 4), axis=2) % 10
    assert (steps == 1).all()


# Verdicts


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.06, 0.2, "regression"),
        (0.04, 0.2, "inconclusive"),
        (-0.01, 0.049, "unchanged"),
        (-0.3, -0.06, "improvement"),
        (-0.3, 0.01, "inconclusive"),
    ],
)
def test_verdict(low, high, expected):
    assert compare.verdict(statistics.Change(0.0, low, high, 0.1, "paired", 20), 0.05) == expected
    assert compare.verdict(statistics.Change(5.0, -1.0, None, None, "paired", 3), 0.05) == "inconclusive"


def test_planted_slowdown_is_found_and_attributed():
    """10 % in one stage, 40 pairs, noise of a shared machine: 20 trials with, 20 without."""
    rng = np.random.default_rng(11)
    caught = quiet = 0
    for _ in range(20):
        base, head = turns(rng, 40, {"step.0": 1.1, "step.1": 1.1})
        case = compare.compare([base], [head], THRESHOLDS).cases[0]
        caught += case.faults == ("steps",) and case.verdict == "regression"
        base, head = turns(rng, 40, {})
        quiet += not compare.compare([base], [head], THRESHOLDS).regressed
    assert caught >= 19 and quiet >= 19


def test_small_stages_need_the_absolute_limit():
    rng = np.random.default_rng(12)
    base, head = turns(rng, 30, {"rays": 1.25})
    row = next(row for row in compare.compare([base], [head], THRESHOLDS).cases[0].rows if row.stage == "rays")
    assert row.limit > 0.25 and row.verdict != "regression", "0.08 ms are below the absolute limit"
    head_row = compare.compare([base], [head], compare.Thresholds(0.05, 0.01)).cases[0]
    assert head_row.faults == ("rays",)


def test_improvement_is_told():
    base, head = turns(np.random.default_rng(13), 30, {"decode": 0.8})
    rows = {row.stage: row for row in compare.compare([base], [head], THRESHOLDS).cases[0].rows}
    assert rows["decode"].verdict == "improvement" and rows["pose"].verdict != "improvement"
    assert rows["decode"].added_ms == pytest.approx(-12, abs=2)


def test_a_slower_machine_between_two_runs_is_no_regression():
    """15 % on everything, the fixed arithmetic too: one run after the other must not accuse the program."""
    rng = np.random.default_rng(14)
    compared = compare.compare(*([r] for r in separate(rng, 20, {}, step=math.log(1.15))), THRESHOLDS)
    assert compared.design == "blocks" and not compared.regressed
    assert compared.cases[0].machine_change > 0.05
    assert "Fixed arithmetic" in compare.markdown(compared) and "Take turns" in compare.markdown(compared)


def test_large_slowdown_between_two_separate_runs():
    compared = compare.compare(*([r] for r in separate(np.random.default_rng(15), 30, {"decode": 2.5})), THRESHOLDS)
    assert compared.cases[0].faults == ("decode",)


def test_rounds_of_two_programs():
    rng = np.random.default_rng(16)
    pairs = [separate(rng, 8, {"decode": 1.5}) for _ in range(6)]
    compared = compare.compare([b for b, _ in pairs], [h for _, h in pairs], THRESHOLDS)
    assert compared.design == "rounds" and compared.cases[0].faults == ("decode",)
    assert compared.cases[0].rows[0].change.samples == 6


def test_steps_count_together():
    chunk = repetition(np.random.default_rng(17), 0.0, 0, {}).chunks[1]
    times = compare.stage_times(chunk)
    assert times["steps"] == pytest.approx(chunk.stage_ms["step.0"] + chunk.stage_ms["step.1"])
    assert times["total"] == pytest.approx(sum(ms for stage, ms in times.items() if stage != "total"))


def test_python_between_the_stages_can_be_at_fault():
    base, head = turns(np.random.default_rng(18), 40, {})
    slow = [
        dataclasses.replace(rep, chunks=tuple(
            dataclasses.replace(c, wall_ms=c.wall_ms + 12, stage_ms=c.stage_ms | {"other": c.stage_ms["other"] + 12})
            for c in rep.chunks
        ))
        for rep in head.results[0].repetitions
    ]  # fmt: skip
    head = without(head, results=(dataclasses.replace(head.results[0], repetitions=tuple(slow)),))
    assert compare.compare([base], [head], THRESHOLDS).cases[0].faults == ("other",)


# Reports that do not fit


@pytest.mark.parametrize("status", ["failed", "unavailable"])
def test_case_that_no_longer_runs_fails(status):
    base, head = turns(np.random.default_rng(18), 8, {})
    failed = dataclasses.replace(
        head.results[0], status=status, reason="out | of memory", repetitions=(), latency=None
    )
    compared = compare.compare([base], [without(head, results=(failed,))], THRESHOLDS)
    assert compared.regressed and "out \\| of memory" in compare.markdown(compared)


def test_rows_that_cannot_be_compared_are_named():
    rng = np.random.default_rng(19)
    reps = [repetition(rng, 0.0, i, {}) for i in range(8)]
    base = report([result(reps), result(reps, case="gone"), result(reps, case="other", steps=4)])
    head = report([result(reps), result(reps, case="other", steps=2)])
    compared = compare.compare([base], [head], THRESHOLDS)
    assert dict(compared.skipped) == {"gone/onnxruntime-cpu": "not in head", "other/onnxruntime-cpu": "steps differs: 4 and 2"}
    assert [case.key for case in compared.cases] == ["demo/onnxruntime-cpu"]


def run(capsys, *arguments):
    code = cli.main(["compare", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.fixture
def files(tmp_path):
    """Writes reports as NAME.json."""
    return lambda **reports: [write_report(tmp_path / f"{name}.json", value) for name, value in reports.items()]


def test_exit_codes_and_table(files, capsys, tmp_path):
    base, head = turns(np.random.default_rng(20), 40, {"decode": 1.2})
    paths = files(base=base, head=head)
    code, captured = run(capsys, *paths, "--markdown", tmp_path / "summary.md")
    assert code == 1
    assert "decode" in captured.out and "at fault" in captured.out and "aaaaaaaaaaaa → bbbbbbbbbbbb" in captured.out
    assert (tmp_path / "summary.md").read_text() == captured.out
    assert run(capsys, paths[0], paths[0])[0] == 0
    assert run(capsys, *paths, "--threshold", "40%")[0] == 0


def refused(capsys, *arguments):
    code, captured = run(capsys, *arguments)
    assert code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("fp-bench")
    return captured.err


def test_different_machines_are_refused_unless_asked(files, capsys):
    base, head = turns(np.random.default_rng(21), 12, {})
    other = without(head, machine=dataclasses.replace(head.machine, cpu="Another CPU"))
    paths = files(base=base, other=other)
    message = refused(capsys, *paths)
    assert "Test CPU" in message and "Another CPU" in message and "--allow-different-machines" in message
    code, captured = run(capsys, *paths, "--allow-different-machines")
    assert code == 0 and "different machines" in captured.out


def test_bad_reports_are_one_line(files, capsys, tmp_path):
    base, head = turns(np.random.default_rng(22), 8, {})
    (good,) = files(base=base)
    data = json.loads(good.read_text())
    (tmp_path / "old.json").write_text(json.dumps(data | {"schema": 0}))
    (tmp_path / "cut.json").write_text(good.read_text()[:500])
    (tmp_path / "other.json").write_text("[1]")
    assert "schema" in refused(capsys, good, tmp_path / "old.json")
    assert "JSON" in refused(capsys, good, tmp_path / "cut.json")
    assert "report" in refused(capsys, good, tmp_path / "other.json")
    assert "no such file" in refused(capsys, good, tmp_path / "none.json")
    assert "found 1 report;" in refused(capsys, good)
    assert "found 3 reports;" in refused(capsys, good, good, good)
    assert "--threshold" in refused(capsys, good, good, "--threshold", "fast")
    (empty,) = files(empty=without(head, results=()))
    assert "not in head" in refused(capsys, good, empty)
