"""fp-bench history: medians over many reports, and where they changed.

Change points are found by E-divisive with means (Matteson and James, A Nonparametric Approach for Multiple Change Point Analysis,
2014), which MongoDB uses for the same purpose (Daly et al., 2020): the split with the largest energy distance between the two
sides, kept when at most 1 % of shuffled series have a larger one; then each side again. Own code, because what `ruptures` offers
instead asks for a penalty that has to be tuned to the noise of every series; a level of significance is the same for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from factorportrait.benchmarks import svg
from factorportrait.benchmarks.compare import percent, repetition_times
from factorportrait.benchmarks.page import html_document, html_table, significant
from factorportrait.benchmarks.report import FILES
from factorportrait.benchmarks.schema import OTHER, Report, Result, read_report
from factorportrait.errors import UserError

SIGNIFICANCE = 0.01
PERMUTATIONS = 999
MIN_REPORTS = 3  # on each side of a change
MIN_CHANGE = 0.02  # smaller ones are no news, however certain


@dataclass(frozen=True)
class ChangePoint:
    """The first report (index) of a new level; change: relative, of the medians of the two sides; p: of the permutation test."""

    index: int
    change: float
    p: float


@dataclass(frozen=True)
class Series:
    """One stage of one row on one machine; times: milliseconds of a chunk [reports], as compare takes them."""

    stage: str
    times: tuple[float, ...]
    changes: tuple[ChangePoint, ...]


@dataclass(frozen=True)
class Trend:
    """A row (key, config) on one machine, over the reports that have it, oldest first."""

    key: str
    config: str
    machine: str
    labels: tuple[str, ...]  # commit or date
    dates: tuple[str, ...]
    series: tuple[Series, ...]  # the total first

    @property
    def news(self) -> list[tuple[Series, ChangePoint]]:
        """Change points of all stages, oldest first, the total before its stages."""
        found = [(series, change) for series in self.series for change in series.changes]
        return sorted(found, key=lambda pair: pair[1].index)


def energy_statistics(distances: np.ndarray) -> np.ndarray:
    """distances [n, n] of neighbours in time -> n1 n2 / (n1 + n2) times the energy distance, of the split before k, k = 0..n.

    Formula 5 of Matteson and James with U-statistics; splits with fewer than MIN_REPORTS on a side are minus infinity.
    """
    n = len(distances)
    sums = np.zeros((n + 1, n + 1))
    sums[1:, 1:] = distances.cumsum(0).cumsum(1)
    out = np.full(n + 1, -np.inf)
    k = np.arange(MIN_REPORTS, n - MIN_REPORTS + 1)
    left = sums[k, k]
    cross = sums[k, n] - left
    right = sums[n, n] - left - 2 * cross
    a, b = k, n - k
    energy = 2 * cross / (a * b) - left / (a * (a - 1)) - right / (b * (b - 1))
    out[k] = a * b / n * energy
    return out


def change_points(values: Sequence[float], seed: int = 0) -> list[ChangePoint]:
    """values [n], above 0, oldest first."""
    logs = np.log(np.asarray(values, float))
    rng = np.random.default_rng(seed)
    found: list[tuple[int, float]] = []

    def search(start: int, stop: int) -> None:
        if stop - start < 2 * MIN_REPORTS:
            return
        distances = np.abs(logs[start:stop, None] - logs[None, start:stop])
        statistics = energy_statistics(distances)
        split = int(statistics.argmax())
        larger = 0
        for _ in range(PERMUTATIONS):
            order = rng.permutation(stop - start)
            larger += energy_statistics(distances[np.ix_(order, order)]).max() >= statistics[split]
        p = (larger + 1) / (PERMUTATIONS + 1)
        if p > SIGNIFICANCE:
            return
        found.append((start + split, p))
        search(start, start + split)
        search(start + split, stop)

    search(0, len(logs))
    found.sort()
    borders = [0, *(index for index, _ in found), len(logs)]
    levels = [np.median(logs[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    changes = [
        ChangePoint(index, float(np.expm1(after - before)), p)
        for (index, p), before, after in zip(found, levels, levels[1:], strict=False)
    ]
    return [change for change in changes if abs(change.change) >= MIN_CHANGE]


def read_folder(folder: Path) -> tuple[list[Report], list[str]]:
    """Every report below the folder, oldest commit first, and why other JSON files with the name of a report were left out.

    Raises:
        UserError: no folder, or no report in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"history {folder}", expected="a folder of reports", found="no folder", action="name another folder"
        )
    reports, skipped = [], []
    paths = sorted(path for path in folder.rglob("*.json") if path.name not in FILES)
    for path in paths:
        try:
            reports.append(read_report(path))
        except UserError as error:
            skipped.append(f"{path.relative_to(folder)}: {error.found}")
    if not reports:
        found = f"{len(paths)} other JSON files" if paths else "no JSON file"
        raise UserError(
            f"history {folder}", expected="reports of fp-bench run", found=found,
            action="put every run's latency.json there, under a name of its own",
        )  # fmt: skip
    return sorted(reports, key=lambda report: (report.code.committed or report.created, report.created)), skipped


def trends(reports: Iterable[Report]) -> list[Trend]:
    """reports: oldest first. Rows are the same when key, config and machine are."""
    groups: dict[tuple[str, str, str], list[tuple[Report, Result]]] = {}
    for report in reports:
        for result in report.results:
            if result.status == "ok" and any(chunk.steady for rep in result.repetitions for chunk in rep.chunks):
                config = ", ".join(
                    f"{name} {value}" for name, value in sorted(result.config.items()) if value is not None
                )
                groups.setdefault((result.key, config, report.machine.identity), []).append((report, result))
    out = []
    for (key, config, machine), found in groups.items():
        times = [
            {stage: float(np.median(values)) for stage, values in repetition_times(result).items()}
            for _, result in found
        ]
        stages = [stage for stage in times[-1] if stage != OTHER and all(entry.get(stage, 0) > 0 for entry in times)]
        series = []
        for stage in stages:
            values = tuple(entry[stage] for entry in times)
            series.append(Series(stage, values, tuple(change_points(values))))
        labels = tuple((report.code.commit or report.created)[:10] for report, _ in found)
        dates = tuple((report.code.committed or report.created)[:10] for report, _ in found)
        out.append(Trend(key, config, machine, labels, dates, tuple(series)))
    return out


def history_text(found: list[Trend], skipped: Sequence[str] = ()) -> str:
    """For a terminal."""
    lines = []
    for trend in found:
        total = trend.series[0]
        lines.append(
            f"{trend.key}: {len(total.times)} report{'s' if len(total.times) > 1 else ''}, "
            f"{significant(total.times[0])} ms per chunk at {trend.labels[0]}, {significant(total.times[-1])} at {trend.labels[-1]}"
        )
        for series, change in trend.news:
            where = f"{trend.labels[change.index]} ({trend.dates[change.index]})"
            lines.append(f"  since {where}: {series.stage} {percent(change.change)}  (p = {change.p:.3f})")
        if not trend.news:
            lines.append("  no change point")
    lines += [f"left out: {reason}" for reason in skipped]
    return "\n".join(lines) + "\n"


def history_page(found: list[Trend], skipped: Sequence[str] = ()) -> str:
    """One page that works offline."""
    parts = [
        "<h1>Latency over time</h1>",
        '<p class="note">The fastest chunk of a repetition, medians over a report; in the order of commits. '
        "A change point (dashed) is kept when at most "
        f"{100 * SIGNIFICANCE:g} % of shuffled series have a clearer one and the level moved by {100 * MIN_CHANGE:g} % or more; "
        f"{MIN_REPORTS} reports on each side are needed, and a handful more for certainty.</p>",
    ]
    for trend in found:
        parts.append(
            f'<h2>{escape(trend.key)}</h2><p class="note">{escape(_short(trend.machine))}. {escape(trend.config)}.</p>'
        )
        parts.append(trend_figure(trend))
        rows = [
            ("", [escape(trend.labels[change.index]), escape(trend.dates[change.index]), escape(series.stage),
                  f'<span class="{"missed" if change.change > 0 else "met"}">{percent(change.change)}</span>', f"{change.p:.3f}"])
            for series, change in trend.news
        ]  # fmt: skip
        parts.append(
            html_table(["Since commit", "date", "stage", "change", "p"], rows) if rows else "<p>No change point.</p>"
        )
    if skipped:
        parts.append("<h2>Left out</h2><ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in skipped) + "</ul>")
    return html_document("Latency over time", "\n".join(parts), svg.STYLE)


def _short(machine: str) -> str:
    """A machine's identity without the list of its CPU flags, which are the words without capitals between two commas."""
    return re.sub(r", [a-z0-9_ ]{40,}(?=,)", "", machine)


def trend_figure(trend: Trend) -> str:
    n = len(trend.labels)
    high = max(max(series.times) for series in trend.series)
    plot = svg.Plot((0, max(n - 1, 1)), (0, high * 1.08), width=920, height=300)
    stride = -(-n // 10)
    plot.axes("report", "ms per chunk", [(float(index), trend.labels[index][:7]) for index in range(0, n, stride)])
    for index, series in enumerate(trend.series):
        css = svg.colour(index)
        plot.line(list(enumerate(series.times)), css, series.stage)
        for place, value in enumerate(series.times):
            title = f"{series.stage}, {trend.labels[place]} ({trend.dates[place]}): {significant(value)} ms"
            plot.point(place, value, css, title, radius=3)
        for change in series.changes:
            plot.mark_x(
                change.index - 0.5, f"{series.stage} {percent(change.change)} since {trend.labels[change.index]}"
            )
    legend = [(svg.colour(index), series.stage) for index, series in enumerate(trend.series)]
    return plot.figure(f"{trend.key}, {trend.series[0].stage} and stages", "history", legend)
