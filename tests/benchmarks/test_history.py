"""fp-bench history: change points against planted ones, folders with all kinds of files, page and text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from latency_reports import mood, repetition, report, result

from factorportrait.benchmarks import cli
from factorportrait.benchmarks.history import MIN_REPORTS, change_points, energy_statistics, read_folder, trends
from factorportrait.benchmarks.schema import Machine, write_report


def test_energy_statistics_against_the_definition():
    values = np.random.default_rng(0).normal(size=9)
    found = energy_statistics(np.abs(values[:, None] - values[None]))
    for k in range(len(values) + 1):
        a, b = values[:k], values[k:]
        if min(len(a), len(b)) < MIN_REPORTS:
            assert found[k] == -np.inf
            continue
        between = np.abs(a[:, None] - b[None]).mean()
        within = [np.abs(x[:, None] - x[None])[np.triu_indices(len(x), 1)].mean() for x in (a, b)]
        assert found[k] == pytest.approx(len(a) * len(b) / len(values) * (2 * between - sum(within)))


def test_planted_changes_are_found_where_they_are():
    rng = np.random.default_rng(1)
    levels = np.repeat([100.0, 112.0, 95.0], [12, 10, 12])
    found = change_points(levels * np.exp(rng.normal(0, 0.01, len(levels))))
    assert [change.index for change in found] == [12, 22]
    assert found[0].change == pytest.approx(0.12, abs=0.02) and found[1].change == pytest.approx(95 / 112 - 1, abs=0.02)
    assert all(change.p <= 0.01 for change in found)


def test_noise_alone_has_no_change_points():
    rng = np.random.default_rng(2)
    alarms = sum(bool(change_points(np.exp(rng.normal(0, 0.05, 20)), seed)) for seed in range(40))
    assert alarms <= 2


def test_certain_but_tiny_changes_are_no_news():
    rng = np.random.default_rng(3)
    assert not change_points(np.repeat([100.0, 101.0], 12) * np.exp(rng.normal(0, 0.001, 24)))


@pytest.fixture
def folder(tmp_path):
    """20 reports, `decode` 30 % slower from the 11th on; written in an order that is not theirs."""
    rng = np.random.default_rng(4)
    for index in rng.permutation(20):
        factors = {"decode": 1.3} if index >= 10 else {}
        reps = [repetition(rng, slow, i, factors) for i, slow in enumerate(0.2 * mood(rng, 6))]
        commit = f"{index:02d}" * 20
        write_report(
            tmp_path / f"{rng.integers(1 << 30)}.json",
            report([result(reps)], commit, f"2026-10-{index + 1:02d}T12:00:00+00:00"),
        )
    return tmp_path


def test_trend_names_the_stage_and_the_commit(folder, capsys):
    assert cli.main(["history", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "20 reports" in out
    news = [line.strip() for line in out.splitlines() if line.startswith("  since")]
    decode = [line for line in news if "decode" in line]
    assert len(decode) == 1 and decode[0].startswith("since 1010101010 (2026-10-11): decode +")
    assert not [line for line in news if "pose" in line]
    page = (folder / "history.html").read_text()
    assert page.count('<figure class="history">') == 1 and 'class="mark"' in page


def test_machines_and_configs_are_not_mixed(folder):
    reports, _ = read_folder(folder)
    other = dataclasses.replace(reports[0], machine=Machine("Linux x86_64", "Other CPU", (), 64, None))
    changed = dataclasses.replace(
        reports[0], results=(dataclasses.replace(reports[0].results[0], config={"steps": 50}),)
    )
    found = trends([*reports, other, changed])
    assert [len(trend.labels) for trend in found] == [20, 1, 1]


def test_other_files_are_named_and_none_is_an_error(folder, tmp_path_factory, capsys):
    (folder / "notes.json").write_text("{}")
    assert cli.main(["history", str(folder)]) == 0
    assert "left out: notes.json" in capsys.readouterr().out
    empty = tmp_path_factory.mktemp("empty")
    for arguments in ([str(empty)], [str(empty / "none")]):
        assert cli.main(["history", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
