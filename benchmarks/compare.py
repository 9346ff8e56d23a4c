"""fp-bench compare: which case and which stage became slower, by how much, and what the comparison could have seen at all.

A row alarms only when its whole interval lies beyond the limit, which is the relative threshold or the absolute one, whichever is
larger. Verdicts: `regression` and `improvement` (the interval lies beyond the limit), `unchanged` (inside the limits on both
sides), else `inconclusive`. A case that no longer runs is `broken`, which fails like a regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from factorportrait.benchmarks.schema import BUNDLE_KEYS, Chunk, Report, Result, read_report
from factorportrait.benchmarks.statistics import MIN_ROUNDS, Change, compare_blocks, compare_paired, compare_rounds
from factorportrait.errors import UserError

TOTAL = "total"
VERDICTS = ("regression", "broken", "inconclusive", "improvement", "unchanged")
FAILING = ("regression", "broken")


@dataclass(frozen=True)
class Thresholds:
    """relative: share of the time; absolute_ms: per chunk. A change has to exceed both."""

    relative: float = 0.05
    absolute_ms: float = 0.1


@dataclass(frozen=True)
class Row:
    """One stage of one case.

    Attributes:
        base_ms, head_ms: of a repetition's fastest chunk, medians over the repetitions.
        limit: the relative change that meets both thresholds here.
    """

    stage: str
    base_ms: float
    head_ms: float
    change: Change
    limit: float
    verdict: str

    @property
    def added_ms(self) -> float:
        """Per chunk, from the estimated ratio: medians of two runs drift apart, ratios of pairs do not."""
        return self.base_ms * self.change.estimate


@dataclass(frozen=True)
class CaseComparison:
    """One case of one peer.

    Attributes:
        rows: the total first, then stages in the order in which they run.
        machine_change: of fixed arithmetic between the two runs; None where they took turns.
        broken: why head no longer runs it.
    """

    key: str
    rows: tuple[Row, ...]
    machine_change: float | None = None
    broken: str = ""

    @property
    def verdict(self) -> str:
        """The worst of the rows."""
        if self.broken:
            return "broken"
        total = self.rows[0].verdict
        return "regression" if any(row.verdict == "regression" for row in self.rows) else total

    @property
    def faults(self) -> tuple[str, ...]:
        """Stages that regressed, those that cost most first."""
        found = sorted((row for row in self.rows[1:] if row.verdict == "regression"), key=lambda row: -row.added_ms)
        return tuple(row.stage for row in found)


@dataclass(frozen=True)
class Comparison:
    """skipped: (key, why it was not compared)."""

    base: str
    head: str
    design: str
    thresholds: Thresholds
    cases: tuple[CaseComparison, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        return any(case.verdict in FAILING for case in self.cases)


def compare_files(
    paths: Sequence[str | Path], thresholds: Thresholds, allow_different_machines: bool = False
) -> Comparison:
    """paths: base and head, or base head base head ... of runs that took turns.

    Raises:
        UserError: an odd number of reports, one that cannot be read, different machines, nothing in common.
    """
    if len(paths) < 2 or len(paths) % 2:
        raise UserError(
            "fp-bench compare", expected="BASE HEAD, or BASE HEAD BASE HEAD ... of runs that took turns",
            found=f"{len(paths)} report{'s' if len(paths) != 1 else ''}", action="name every base with its head",
        )  # fmt: skip
    reports = [read_report(path) for path in paths]
    machines = dict.fromkeys(report.machine.identity for report in reports)
    if len(machines) > 1 and not allow_different_machines:
        raise UserError(
            "reports of different machines", expected=f"one machine: {_short(reports[0])}",
            found=next(_short(report) for report in reports if report.machine.identity != reports[0].machine.identity),
            action="measure both on one machine, or say --allow-different-machines",
        )  # fmt: skip
    notes = ["The reports are of different machines: what differs may be the machine."] if len(machines) > 1 else []
    compared = compare(reports[::2], reports[1::2], thresholds, notes)
    if not compared.cases:
        reason = compared.skipped[0][1] if compared.skipped else "no case in either"
        raise UserError(
            f"{paths[0]} and {paths[1]}", expected="a case that both have measured", found=reason,
            action="run the same cases with fp-bench run for both",
        )  # fmt: skip
    return compared


def _short(report: Report) -> str:
    machine = report.machine
    gpus = ", ".join(f"{gpu.name} driver {gpu.driver}" for gpu in machine.gpus) or "no GPU"
    return f"{machine.system}, {machine.cpu}, {machine.cores} cores, {len(machine.cpu_flags)} CPU flags, {gpus}"


def compare(
    base: Sequence[Report], head: Sequence[Report], thresholds: Thresholds, notes: Sequence[str] = ()
) -> Comparison:
    """base, head: reports of the rounds."""
    notes = list(notes)
    turns = {report.turns for report in (*base, *head)}
    paired = len(turns) == 1 and None not in turns
    design = "paired" if paired else "rounds" if len(base) >= MIN_ROUNDS else "blocks"
    if design == "blocks":
        notes.append(
            "Base and head ran one after the other: what the machine did between the runs cannot be told from the program. "
            f"Take turns (at least {MIN_ROUNDS} rounds of BASE HEAD) for a verdict that holds on a shared machine."
        )
    for name, reports in (("base", base), ("head", head)):
        for report in reports:
            notes += [f"The {name} run was noisy: {reason}." for reason in report.noise.reasons]
        if any(report.interrupted for report in reports):
            notes.append(f"The {name} run was interrupted.")
        if any(report.code.dirty for report in reports):
            notes.append(f"The {name} checkout had changes that no commit holds.")
    found: list[tuple[str, list[Result], list[Result]]] = []
    cases, skipped = [], []
    one_machine = len({report.machine.identity for report in (*base, *head)}) == 1
    for key in dict.fromkeys(result.key for report in (*base, *head) for result in report.results):
        results = [[_result(report, key) for report in side] for side in (base, head)]
        broken, reason = _usable(*results, free=BUNDLE_KEYS if paired else (), one_machine=one_machine)
        if broken:
            cases.append(CaseComparison(key, (), broken=broken))
        elif reason:
            skipped.append((key, reason))
        else:
            found.append((key, *results))
    samples = [(key, *(_shared_samples(b, h))) for key, b, h in found]
    num_rows = sum(len(times) for _, times, _ in samples)
    for (key, base_ms, head_ms), (_, base_results, head_results) in zip(samples, found, strict=True):
        machine = None if design != "blocks" else _machine_change(base_results, head_results)
        rows = []
        for stage in base_ms:
            a, b = base_ms[stage], head_ms[stage]
            middle = float(np.median(np.concatenate(a)))
            limit = max(thresholds.relative, thresholds.absolute_ms / middle if middle > 0 else math.inf)
            if machine:
                limit = (1 + limit) * (1 + abs(machine)) - 1
            change = _change(design, a, b, limit, num_rows)
            head_middle = float(np.median(np.concatenate(b)))
            rows.append(Row(stage, middle, head_middle, change, limit, verdict(change, limit)))
        cases.append(CaseComparison(key, tuple(rows), machine))
    order = {key: place for place, key in enumerate(dict.fromkeys(r.key for report in base for r in report.results))}
    cases.sort(key=lambda case: order.get(case.key, len(order)))
    return Comparison(*_names(base, head), design, thresholds, tuple(cases), tuple(skipped), tuple(dict.fromkeys(notes)))


def _names(base: Sequence[Report], head: Sequence[Report]) -> list[str]:
    """Of the two sides: commits, or where those are the same, bundles."""
    commits = [dict.fromkeys((report.code.commit or report.code.version)[:12] for report in side) for side in (base, head)]
    bundles = [
        dict.fromkeys(
            f"{result.config['bundle']} ({result.config['precision']})"
            for report in side for result in report.results if result.config.get("bundle")
        )
        for side in (base, head)
    ]  # fmt: skip
    return [", ".join(names) for names in (bundles if commits[0] == commits[1] and bundles[0] != bundles[1] else commits)]


def _result(report: Report, key: str) -> Result | None:
    return next((result for result in report.results if result.key == key), None)


def _usable(
    base: list[Result | None], head: list[Result | None], free: Sequence[str] = (), one_machine: bool = True
) -> tuple[str, str]:
    """("", "") where a case can be compared, else (why head is broken, "") or ("", why it is left out).

    free: keys of the config that may differ; one_machine: what ran in base is not missing in head, but lost.
    """
    for side, results in (("base", base), ("head", head)):
        if missing := [result for result in results if result is None]:
            return "", f"not in {'all reports of ' if len(results) > len(missing) else ''}{side}"
    for side, results in (("base", base), ("head", head)):
        for result in results:
            lost = result.status == "failed" or (result.status == "unavailable" and one_machine)
            if lost and side == "head" and all(r.status == "ok" for r in base):
                return f"{result.status} in head: {result.reason}", ""
            if not any(_steady(result)):
                return "", f"{result.status} in {side}: {result.reason or 'no steady chunk'}"
    for result in (*base, *head):
        different = sorted(
            name for name in {*base[0].config, *result.config} - {*free}
            if base[0].config.get(name) != result.config.get(name)
        )  # fmt: skip
        if different:
            name = different[0]
            return "", f"{name} differs: {base[0].config.get(name)!r} and {result.config.get(name)!r}"
    return "", ""


def _steady(result: Result) -> list[list[Chunk]]:
    return [[chunk for chunk in repetition.chunks if chunk.steady] for repetition in result.repetitions]


def stage_times(chunk: Chunk) -> dict[str, float]:
    """Milliseconds of a chunk: total and stages. All denoising steps count together, for they run one graph."""
    times = {TOTAL: chunk.wall_ms}
    for stage, ms in chunk.stage_ms.items():
        name = "steps" if stage.startswith("step.") else stage
        times[name] = times.get(name, 0.0) + ms
    return times


def repetition_times(result: Result) -> dict[str, np.ndarray]:
    """Stage -> time of the fastest steady chunk [repetitions], ms; repetitions without a steady chunk are left out.

    What others do on a machine only ever adds to a time, by whole slices of the scheduler, so that the fastest of chunks that do
    the same work tells most about the program (Chen and Revels, Robust Benchmarking in Noisy Environments, 2016). A slowdown of
    some chunks alone is for the percentiles of the report.
    """
    rows = [[stage_times(chunk) for chunk in chunks] for chunks in _steady(result) if chunks]
    stages = [stage for stage in rows[0][0] if all(stage in times for chunks in rows for times in chunks)]
    return {stage: np.array([min(times[stage] for times in chunks) for chunks in rows]) for stage in stages}


def _shared_samples(base: list[Result], head: list[Result]) -> tuple[dict[str, list[np.ndarray]], ...]:
    """Of base and of head: stage -> per round medians [repetitions]. Stages that both have throughout and that take time."""
    sides = [[repetition_times(result) for result in side] for side in (base, head)]
    stages = [
        stage for stage in sides[0][0]
        if all(stage in times and (times[stage] > 0).all() for side in sides for times in side)
    ]  # fmt: skip
    return tuple({stage: [times[stage] for times in side] for stage in stages} for side in sides)


def _machine_change(base: list[Result], head: list[Result]) -> float:
    """Relative change of fixed arithmetic, timed before every repetition."""
    middles = [np.median([rep.spin_ms for result in side for rep in result.repetitions]) for side in (base, head)]
    return float(middles[1] / middles[0] - 1)


def _change(design: str, base: list[np.ndarray], head: list[np.ndarray], limit: float, rows: int) -> Change:
    if design == "rounds":
        return compare_rounds(base, head, limit, rows)
    if design == "paired":
        # An interrupted run may have one repetition more on one side.
        pairs = [(a[:n], b[:n]) for a, b in zip(base, head, strict=True) for n in [min(len(a), len(b))]]
        base, head = [a for a, _ in pairs], [b for _, b in pairs]
    chosen: Callable = compare_paired if design == "paired" else compare_blocks
    return chosen(np.concatenate(base), np.concatenate(head), limit, rows)


def verdict(change: Change, limit: float) -> str:
    """limit: relative change, above 0; an improvement has to be as large, seen from the other side."""
    if change.high is None:
        return "inconclusive"
    if change.low > limit:
        return "regression"
    faster = 1 / (1 + limit) - 1
    if change.high < faster:
        return "improvement"
    return "unchanged" if faster < change.low and change.high < limit else "inconclusive"


def markdown(comparison: Comparison) -> str:
    """The table that names the stage at fault; the same text for a terminal and for a CI summary."""
    limits = comparison.thresholds
    lines = [
        f"### Latency: {comparison.base} → {comparison.head}", "",
        headline(comparison), "",
        f"An alarm needs more than {100 * limits.relative:g} % and {limits.absolute_ms:g} ms per chunk, and all of the interval "
        f"beyond that ({DESIGNS[comparison.design]}; the intervals hold for all rows at once with 95 %; detectable: the slowdown "
        "that such a comparison catches in 19 of 20).",
        "",
        "| case | stage | base, ms | head, ms | change | interval | detectable | verdict |",
        "|---|---|--:|--:|--:|:-:|--:|---|",
    ]  # fmt: skip
    for case in comparison.cases:
        if case.broken:
            lines.append(f"| {cell(case.key)} | | | | | | | **broken**: {cell(case.broken)} |")
        for row in case.rows:
            change = row.change
            interval = "–" if change.high is None else f"{percent(change.low)} … {percent(change.high)}"
            detectable = "–" if change.detectable is None else percent(change.detectable)
            shown = f"**{row.verdict}**" if row.verdict == "regression" else row.verdict
            if case.faults and row.stage == case.faults[0]:
                shown += " ← at fault"
            lines.append(
                f"| {cell(case.key) if row.stage == TOTAL else ''} | {row.stage} | {row.base_ms:.3f} | {row.head_ms:.3f} | "
                f"{percent(change.estimate)} | {interval} | {detectable} | {shown} |"
            )
    if comparison.skipped:
        lines += [
            "",
            "Not compared: " + "; ".join(f"{cell(key)} ({cell(reason)})" for key, reason in comparison.skipped) + ".",
        ]
    shifts = [case.machine_change for case in comparison.cases if case.machine_change]
    notes = list(comparison.notes)
    if shifts:
        worst = max(shifts, key=abs)
        notes.append(
            f"Fixed arithmetic itself changed by up to {percent(worst)} between the runs; limits were widened by that."
        )
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


DESIGNS = {
    "paired": "repetitions of both took turns and are compared in pairs",
    "rounds": "runs took turns; a round is one sample",
    "blocks": "separate runs; block bootstrap over repetitions",
}


def headline(comparison: Comparison) -> str:
    """What happened, in a sentence."""
    parts = []
    for case in comparison.cases:
        if case.verdict == "broken":
            parts.append(f"{case.key} no longer runs.")
        elif case.verdict == "regression":
            where = ", ".join(case.faults) or "no single stage"
            parts.append(f"{case.key} became slower: {where}.")
    if parts:
        return " ".join(parts)
    totals = [case.rows[0].verdict for case in comparison.cases if case.rows]
    return " ".join(
        f"{totals.count(name)} of {len(totals)} {name}." for name in VERDICTS if totals.count(name)
    )  # fmt: skip


def percent(share: float) -> str:
    """0.0512 -> +5.1 %."""
    return f"{100 * share:+.1f} %".replace("-", "−")


def cell(text: str) -> str:
    """One cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
