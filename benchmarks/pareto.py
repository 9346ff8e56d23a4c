"""fp-bench pareto: quality beside speed, one point per way of running a bundle.

A quality report and a row of a latency report belong together when they ran the same bundle (its source key tells checkpoint,
precision and how it was exported) in the same mode, with the same steps, window, guidance and approximations. Only the first row
of a case counts: its peers are other programs, whose pictures nobody judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from factorportrait.benchmarks import svg
from factorportrait.benchmarks.page import html_document, html_table, number, significant
from factorportrait.benchmarks.quality import report as quality
from factorportrait.benchmarks.schema import Result, read_report
from factorportrait.errors import UserError

# Metrics with a good end. Sharpness and flicker have none: 1 is as much as the truth.
LARGER_IS_BETTER = {
    "psnr": True, "psnr_expression": True, "ssim": True, "lpips": False, "expression_error": False, "pose_error_deg": False,
    "identity_error": False,
}  # fmt: skip
# Options that change both pictures and time, and what they are where nobody asked.
USUAL = {"guidance": "1", "guidance_steps": None, "commit": "clean", "step_cache": 0.0}
# The same, but the time stays what it is, unless steps are skipped by what the schedule's time embeddings are.
USUAL_OF_PICTURES = {"solver": None, "shift": None}
# Settings of a quality report that decide what was judged.
CLIPS = ("identities", "frames", "modes", "seed", "clips", "expression", "expression_gain")


@dataclass(frozen=True)
class Way:
    """What decides both pictures and time. approximations: (option, value) of those that are not off."""

    source_key: str
    precision: str
    mode: str
    steps: int
    window: int
    approximations: tuple[tuple[str, object], ...] = ()

    @property
    def timed(self) -> Way:
        """The way whose time this one has."""
        if dict(self.approximations).get("step_cache"):
            return self
        costly = tuple((name, value) for name, value in self.approximations if name not in USUAL_OF_PICTURES)
        return replace(self, approximations=costly)


@dataclass(frozen=True)
class Point:
    """One way of running a bundle.

    Attributes:
        ms: per frame, median of the steady chunks; low, high: its interval.
        noisy: the machine was disturbed while the row ran.
        best: no other point is faster and better.
    """

    name: str
    way: Way
    ms: float
    quality: float
    machine: str
    threads: int
    low: float
    high: float
    noisy: bool = False
    best: bool = False


@dataclass(frozen=True)
class Pareto:
    """metric: of `LARGER_IS_BETTER`; alone: what has no partner, and why; clips: settings of what was judged."""

    metric: str
    points: tuple[Point, ...]
    alone: tuple[str, ...]
    clips: dict[str, Any]


def read_points(latency: Sequence[Path], qualities: Sequence[Path], metric: str) -> Pareto:
    """Match the reports.

    Raises:
        UserError: an unknown metric, a file that is no such report, different clips or machines, or nothing that belongs together.
    """
    if metric not in LARGER_IS_BETTER:
        raise UserError(
            "--metric", expected=" or ".join(LARGER_IS_BETTER), found=repr(metric), action="choose one of these"
        )
    judged: dict[Way, float] = {}
    alone = []
    clips: dict[str, Any] = {}
    for path in qualities:
        found, reason, of = read_quality(path, metric)
        clips = clips or of
        if different := [name for name in CLIPS if of.get(name) != clips.get(name)]:
            name = different[0]
            raise UserError(
                "--quality", expected=f"reports of the same clips: {name} {clips.get(name)}, as in {qualities[0]}",
                found=f"{of.get(name)} in {path}", action="measure them with the same options of fp-bench quality",
            )  # fmt: skip
        judged |= found
        alone += [f"{path}: {reason}"] if reason else []
    reports = [read_report(path) for path in latency]
    if len({report.machine.identity for report in reports}) > 1:
        raise UserError(
            "--latency",
            expected="reports of one machine",
            found="different machines",
            action="draw one plot per machine",
        )
    points, used = [], set()
    for report in reports:
        for result in leading(report.results):
            timed = way_of(result)
            ways = [way for way in judged if way.timed == timed]
            if not ways:
                alone.append(
                    f"{result.key}: no quality report of {describe(timed)}"
                    if timed
                    else f"{result.key}: it does not tell its bundle"
                )
            used.update(ways)
            points += [
                Point(
                    result.key,
                    way,
                    result.latency.per_frame.p50,
                    judged[way],
                    report.machine.cpu,
                    int(result.config["threads"]),
                    result.latency.per_frame.low,
                    result.latency.per_frame.high,
                    result.noise.noisy,
                )
                for way in ways
            ]
    alone += [f"quality of {describe(way)}: no latency report" for way in judged if way not in used]
    if not points:
        raise UserError(
            "fp-bench pareto", expected="a latency report and a quality report of one bundle, mode, steps and window",
            found=alone[0] if alone else "none", action="run fp-bench run and fp-bench quality on the same bundle",
        )  # fmt: skip
    return Pareto(metric, tuple(mark_best(points, LARGER_IS_BETTER[metric])), tuple(alone), clips)


def read_quality(path: Path, metric: str) -> tuple[dict[Way, float], str, dict[str, Any]]:
    """Way -> mean figure over the clips, for every number of steps that the report has; why there is none; and its settings."""
    path = path / quality.FILES[0] if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"quality report {path}",
            expected="a file made by fp-bench quality",
            found=str(error),
            action="name another",
        ) from error
    report = quality.Report.from_json(text, f"quality report {path}")
    bundle, settings = report.bundle, report.settings
    if settings.get("window_frames") is None:
        return {}, "it does not tell its window: make it again", settings
    found = {}
    for steps in settings["steps"]:
        value = quality.mean_of(report, f"steps_{steps}", metric)
        if value is not None:
            way = Way(
                bundle["source_key"], bundle["precision"], settings["generation"], steps, settings["window_frames"],
                approximations(settings.get("approximations", {})),
            )
            found[way] = value
    return found, "" if found else f"{metric} was not measured", settings


def leading(results: Sequence[Result]) -> list[Result]:
    """The first row of every case, where it has figures."""
    first = {result.case: result for result in reversed(results)}
    return [result for result in results if result is first[result.case] and result.latency is not None]


def way_of(result: Result) -> Way | None:
    """None for reports that do not tell the bundle."""
    config = result.config
    if result.source_key is None:
        return None
    return Way(
        result.source_key, config["precision"], config["mode"], config["steps"], config["window"], approximations(config)
    )


def approximations(options: Mapping[str, object]) -> tuple[tuple[str, object], ...]:
    """Those among options that are not off, in the order of `USUAL`; behind them those that cost no time."""
    usual = USUAL | USUAL_OF_PICTURES
    return tuple((name, options[name]) for name, value in usual.items() if options.get(name, value) != value)


def describe(way: Way) -> str:
    """In words."""
    window = f", window {way.window}" if way.mode == "stream" else ""
    how = "".join(f", {name.replace('_', ' ')} {value}" for name, value in way.approximations)
    steps = f"{way.steps} step{'' if way.steps == 1 else 's'}"
    return f"{way.precision}, {way.mode}, {steps}{window}{how} (bundle {way.source_key[:8]})"


def mark_best(points: Sequence[Point], larger_is_better: bool) -> list[Point]:
    """By time; the points that no other one beats in time or quality without losing in the other."""
    sign = 1 if larger_is_better else -1
    out, reached = [], None
    for point in sorted(points, key=lambda point: (point.ms, -sign * point.quality)):
        best = reached is None or sign * point.quality > reached
        reached = sign * point.quality if best else reached
        out.append(Point(**{**vars(point), "best": best}))
    return out


def pareto_text(pareto: Pareto) -> str:
    """For a terminal: by time, the best ones marked."""
    heading, unit, digits, _ = quality.METRICS[pareto.metric]
    lines = [f"   {'ms/frame':>9}  {(heading + ' ' + unit).strip():>16}"]
    lines += [
        f"{'*' if point.best else ' '}  {significant(point.ms):>9}  {number(point.quality, digits):>16}  {point.name}: "
        f"{describe(point.way)}"
        for point in pareto.points
    ]
    lines += ["* no other is both faster and better", what_to_doubt(pareto), *(f"left out: {reason}" for reason in pareto.alone)]
    return "\n".join(lines) + "\n"


def what_to_doubt(pareto: Pareto) -> str:
    """How much was judged, and how quiet the machine was."""
    clips, noisy = pareto.clips, sum(point.noisy for point in pareto.points)
    text = f"Judged on {clips.get('identities')} clips of {clips.get('frames')} frames."
    return text + (f" Noisy: the machine was disturbed in {noisy} of {len(pareto.points)} rows." if noisy else "")


def pareto_page(pareto: Pareto) -> str:
    """One page that works offline."""
    heading, unit, digits, what = quality.METRICS[pareto.metric]
    label = f"{heading}, {unit}" if unit else heading
    highs = [point.high for point in pareto.points]
    times, values = [point.ms for point in pareto.points], [point.quality for point in pareto.points]
    margin = 0.1 * (max(values) - min(values)) or abs(values[0]) * 0.1 or 1.0
    log = max(times) > 8 * min(times)
    x = (min(times) / 1.3, max(highs) * 1.3) if log else (0.0, max(highs) * 1.1)
    plot = svg.Plot(x, (min(values) - margin, max(values) + margin), width=920, height=420, log_x=log)
    plot.axes("milliseconds per frame, median" + (" (logarithmic)" if log else ""), label)
    best = [point for point in pareto.points if point.best]
    steps = []
    for point, after in zip(best, [*best[1:], None], strict=True):
        steps.append((point.ms, point.quality))
        steps.append((after.ms if after else x[1], point.quality))
    plot.line(steps, svg.colour(8), "no other is both faster and better")
    kinds = list(dict.fromkeys((point.way.precision, point.way.mode) for point in pareto.points))
    for point in pareto.points:
        css = svg.colour(kinds.index((point.way.precision, point.way.mode)))
        title = (
            f"{point.name}: {describe(point.way)}, {significant(point.ms)} ms, {number(point.quality, digits)} {unit}"
        )
        plot.line([(max(point.low, x[0]), point.quality), (point.high, point.quality)], css)
        plot.point(point.ms, point.quality, css, title, radius=5, hollow=not point.best)
        how = "".join(f", {value}" for _, value in point.way.approximations)
        label = f"{point.way.steps} step{'' if point.way.steps == 1 else 's'}, w{point.way.window}{how}"
        # Below the line, and inside the frame.
        at, late = plot.x(point.ms), plot.x(point.ms) > plot.width - 120
        plot.text(at - 8 if late else at + 6, plot.y(point.quality) + 16, label, "end" if late else "start")
    legend = [(svg.colour(index), f"{precision}, {mode}") for index, (precision, mode) in enumerate(kinds)]
    rows = [
        ("main" if point.best else "", [escape(point.name), escape(describe(point.way)), str(point.threads), significant(point.ms),
                                        number(point.quality, digits)])
        for point in pareto.points
    ]  # fmt: skip
    left = "".join(f"<li>{escape(reason)}</li>" for reason in pareto.alone)
    body = (
        f"<h1>Quality beside speed</h1><p>{escape(heading)}: {escape(what)}, mean over the test clips. Filled points and bold "
        f"rows: no other is both faster and better; bars: interval of the median. Machine: {escape(pareto.points[0].machine)}.</p>"
        f'<p class="note">{escape(what_to_doubt(pareto))}</p>'
        + plot.figure(f"{heading} over milliseconds per frame", "pareto", legend)
        + html_table(["Row", "way of running", "threads", "ms per frame", escape(heading)], rows)
        + (f"<h2>Left out</h2><ul>{left}</ul>" if left else "")
    )
    return html_document("Quality beside speed", body, svg.STYLE)
