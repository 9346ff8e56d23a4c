"""What people and CI read of a latency report: latency.html, summary.md, customSmallerIsBetter.json, and README's table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.benchmarks import svg
from factorportrait.benchmarks.compare import cell
from factorportrait.benchmarks.page import binary, html_document, html_table, metric_prefix, significant
from factorportrait.benchmarks.schema import ACCOUNTED, OTHER, Chunk, Report, Result, Summary
from factorportrait.errors import UserError
from factorportrait.files import whole_file

FILES = ("latency.html", "summary.md", "customSmallerIsBetter.json")
README_START = "<!-- performance: written by fp-bench report -->"
README_END = "<!-- end of performance -->"
SAME_WORK = ("mode", "io", "resolution", "steps", "window", "chunk", "frames", "guidance", "threads")  # of a config
STYLE = f"""{svg.STYLE}
.noisy {{ color: #b35900; font-weight: 600; }} code {{ font-size: .9em; }} td, th small {{ white-space: nowrap; }}
td.text, td:first-child, td small {{ white-space: normal; }} tr.main small {{ font-weight: 400; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 0 2rem; }}"""


def write_pages(folder: Path, report: Report) -> list[Path]:
    """Write the three files into `folder`; each appears when it is whole."""
    contents = (html_page(report), summary_markdown(report), smaller_is_better(report))
    for name, text in zip(FILES, contents, strict=True):
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in FILES]


# What both texts and pages say


def describe_machine(report: Report) -> str:
    machine = report.machine
    gpus = "".join(f", {gpu.name} (driver {gpu.driver})" for gpu in machine.gpus)
    memory = f", {binary(machine.memory_bytes)}" if machine.memory_bytes else ""
    return f"{machine.cpu}, {machine.cores} cores{memory}{gpus}, {machine.system}"


def describe_code(report: Report) -> str:
    code = report.code
    commit = f"commit {code.commit[:12]}" if code.commit else f"version {code.version}"
    return commit + (" with changes that no commit holds" if code.dirty else "")


def describe_config(result: Result) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.config.items() if value is not None)


def doubts(report: Report) -> list[str]:
    """Why the figures should be read with care, as sentences."""
    found = [f"Noisy run: {reason}." for reason in report.noise.reasons]
    if report.interrupted:
        found.append("The run was interrupted; rows may be missing or short.")
    for gpu in report.machine.gpus:
        if gpu.throttle_reasons:
            found.append(f"{gpu.name} throttled: {', '.join(gpu.throttle_reasons)}.")
    beyond = [result.key for result in report.results if any((stage.fraction or 0) > 1 for stage in result.stages)]
    if beyond:
        found.append(
            f"Stages faster than the measured limit of the machine in {len(beyond)} of {len(measured(report.results))} rows "
            f"({beyond[0]}{' ...' if len(beyond) > 1 else ''}): something else ran while the limit was measured, so shares of the "
            "limit are too high."
        )
    for result in report.results:
        if result.execution == "serial" and result.accounted is not None and result.accounted < ACCOUNTED:
            found.append(
                f"The stages of {result.key} account for only {100 * result.accounted:.1f} % of its time; the rest is `other`."
            )
    return found


def measured(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result.latency is not None]


def cases(report: Report) -> dict[str, list[Result]]:
    """Case -> rows, scaling curves left out; the rows that have figures first."""
    found: dict[str, list[Result]] = {}
    for result in report.results:
        if result.sweep is None:
            found.setdefault(result.case, []).append(result)
    return {case: sorted(rows, key=lambda result: result.latency is None) for case, rows in found.items()}


def without_latency(result: Result) -> str:
    """What a row says that has no latency: why, or the stages of a peer that makes no pictures."""
    if result.status == "ok":
        times: dict[str, float] = {}
        for stage in result.stages:
            name = "denoising steps" if stage.name.startswith("step.") or stage.name == "steps" else stage.name
            times[name] = times.get(name, 0.0) + stage.per_chunk.p50
        times.pop(OTHER, None)
        return "no pictures; " + ", ".join(f"{name} {significant(ms)} ms" for name, ms in times.items()) + " per chunk"
    return f"{result.status}: {result.reason}"


def steady_chunks(result: Result) -> list[Chunk]:
    return [chunk for repetition in result.repetitions for chunk in repetition.chunks if chunk.steady]


def limit_fraction(result: Result) -> float | None:
    """Time that the counted stages would need at the machine's limit, over the whole chunk's median."""
    limits = [stage.limit_ms for stage in result.stages if stage.limit_ms is not None]
    return sum(limits) / result.latency.per_chunk.p50 if limits and result.latency else None


# Markdown


def summary_markdown(report: Report) -> str:
    """For a CI summary: rows of all cases, and the stages of every first row."""
    lines = [
        "### Latency", "", f"{describe_machine(report)}; {describe_code(report)}; {report.created}.", "",
        *(f"> {doubt}" for doubt in doubts(report)), "", *rows_table(report.results),
    ]  # fmt: skip
    for rows in cases(report).values():
        if rows[0].stages:
            lines += [
                "",
                f"<details><summary>Stages of {escape(rows[0].key)}</summary>",
                "",
                *stages_markdown(rows[0]),
                "",
                "</details>",
            ]
    lines += ["", f"Timing scope: {report.scope}"]
    return "\n".join(lines) + "\n"


def rows_table(results: Sequence[Result]) -> list[str]:
    """Lines of Markdown. Milliseconds."""
    lines = [
        "| case | ms per frame, p50 | p90 | p99 | ms per chunk, p50 | arrival to picture, p50 | first frame | frames/s "
        "| late frames | of the limit | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        name = cell(result.key)
        if result.latency is None:
            lines.append(f"| {name} | {cell(without_latency(result))} |" + " |" * 9)
            continue
        latency, fraction = result.latency, limit_fraction(result)
        note = "" if result.status == "ok" else f" ({result.status})"
        cells = [
            significant(latency.per_frame.p50), significant(latency.per_frame.p90), significant(latency.per_frame.p99),
            significant(latency.per_chunk.p50), significant(latency.arrival.p50), significant(latency.first_frame.p50),
            significant(latency.throughput_fps), f"{100 * latency.deadline_misses:.0f} % at {latency.target_fps:g} fps",
            "–" if fraction is None else f"{100 * fraction:.0f} %", binary(result.memory.host_peak_bytes),
        ]  # fmt: skip
        lines.append(f"| {name}{note} | " + " | ".join(cells) + " |")
    return lines


def stages_markdown(result: Result) -> list[str]:
    """Lines of Markdown."""
    lines = ["| stage | ms per chunk, p50 | p90 | share | work | of the limit |", "|---|--:|--:|--:|--:|--:|"]
    for stage in result.stages:
        work = metric_prefix(stage.work.flops, "FLOP") if stage.work else "–"
        reached = "–" if stage.fraction is None else f"{100 * stage.fraction:.0f} % ({stage.bound})"
        lines.append(
            f"| {cell(stage.name)} | {significant(stage.per_chunk.p50)} | {significant(stage.per_chunk.p90)} | "
            f"{100 * stage.share:.1f} % | {work} | {reached} |"
        )
    return lines


def readme_table(report: Report) -> str:
    """The part of README between its markers."""
    lines = [f"{describe_machine(report)}; {describe_code(report)}."]
    lines += [f"**{doubt}**" for doubt in doubts(report)]
    lines += ["", *engines_table([result for result in report.results if result.sweep is None])]
    lead = next((rows[0] for rows in cases(report).values() if rows[0].latency), None)
    if lead is not None:
        lines += ["", "Stages of the first row, and how near each comes to this machine's limit:", "", *stages_markdown(lead)]
    return "\n".join(lines)


def engines_table(results: Sequence[Result]) -> list[str]:
    """Lines of Markdown for who chooses an engine. Times are relative to the first row that does the same work."""
    from factorportrait.benchmarks.peers import PEERS

    lines = [
        "| case | engine | ms per frame, median | p99 | time, relative | first frame, ms | frames/s | peak memory |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    first: dict[tuple, float] = {}
    shown = ""
    for result in results:
        case, shown = "" if result.case == shown else describe_case(result), result.case
        peer = PEERS.get(result.peer)
        start = f"| {cell(case)} | {cell(peer.description if peer else result.peer)} | "
        if result.latency is None:
            lines.append(start + cell(without_latency(result)) + " |" + " |" * 5)
            continue
        per_frame, latency = result.latency.per_frame, result.latency
        reference = first.setdefault(tuple(result.config.get(name) for name in SAME_WORK), per_frame.p50)
        cells = [
            significant(per_frame.p50), significant(per_frame.p99), f"{per_frame.p50 / reference:.2f}×",
            significant(latency.first_frame.p50), significant(latency.throughput_fps), binary(result.memory.host_peak_bytes),
        ]  # fmt: skip
        lines.append(start + " | ".join(cells) + " |")
    return lines


def describe_case(result: Result) -> str:
    """`demo: 128 px, fp32, stream, 4 steps`; the name alone where the row never came to its bundle."""
    config = result.config
    if config.get("steps") is None or config.get("resolution") is None:
        return result.case
    ends = ", with files" if config.get("io") else ""
    return f"{result.case}: {config['resolution']} px, {config['precision']}, {config['mode']}, {config['steps']} steps{ends}"


def update_readme(path: Path, report: Report) -> Path:
    """Put the table between the two markers of the file.

    Raises:
        UserError: unreadable, or not exactly one of each marker, in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--readme {path}", expected="a text file", found=str(error), action="name README.md"
        ) from error
    if (
        text.count(README_START) != 1
        or text.count(README_END) != 1
        or text.index(README_START) > text.index(README_END)
    ):
        raise UserError(
            f"--readme {path}", expected=f"{README_START} and {README_END}, once each",
            found=f"{text.count(README_START)} and {text.count(README_END)}", action="put the two lines where the table belongs",
        )  # fmt: skip
    before, _, rest = text.partition(README_START)
    with whole_file(path) as temporary:
        temporary.write_text(
            f"{before}{README_START}\n{readme_table(report)}\n{README_END}{rest.partition(README_END)[2]}",
            encoding="utf-8",
        )
    return path


# github-action-benchmark


def smaller_is_better(report: Report) -> str:
    """JSON of the `customSmallerIsBetter` tool: name, unit, value, range, extra."""
    extra = f"{describe_machine(report)}\n{describe_code(report)}"
    entries: list[dict[str, Any]] = []

    def add(name: str, unit: str, value: float | None, summary: Summary | None = None) -> None:
        if value is not None:
            spread = {"range": f"± {significant((summary.high - summary.low) / 2)}"} if summary else {}
            entries.append({"name": name, "unit": unit, "value": value, **spread, "extra": extra})

    for result in measured(report.results):
        latency = result.latency
        add(f"{result.key} per frame p50", "ms", latency.per_frame.p50, latency.per_frame)
        add(f"{result.key} per frame p90", "ms", latency.per_frame.p90)
        add(f"{result.key} arrival to picture p50", "ms", latency.arrival.p50, latency.arrival)
        add(f"{result.key} first frame", "ms", latency.first_frame.p50, latency.first_frame)
        add(f"{result.key} peak memory", "MiB", result.memory.host_peak_bytes and result.memory.host_peak_bytes / 2**20)
        for stage in result.stages:
            add(f"{result.key} stage {stage.name}", "ms", stage.per_chunk.p50, stage.per_chunk)
    return json.dumps(entries, indent=1, allow_nan=False) + "\n"


# The page


def html_page(report: Report) -> str:
    """One page that works offline."""
    noise = report.noise
    facts = [
        escape(describe_machine(report)), escape(describe_code(report)), escape(report.created), f"{report.seconds:.0f} s",
    ]  # fmt: skip
    if noise.spin_spread is not None:
        facts.append(f"fixed arithmetic varied by {100 * noise.spin_spread:.0f} % (p90 − p10)")
    for text, share in (("other processes", noise.other_share), ("the hypervisor", noise.steal_share)):
        if share is not None:
            facts.append(f"{text} took {100 * share:.0f} % of the processors")
    warnings = "".join(f'<p class="noisy">{escape(doubt)}</p>' for doubt in doubts(report))
    body = (
        f"<h1>Latency</h1><p>{'; '.join(facts)}.</p>{warnings}"
        f'<p class="note">Timing scope: {escape(report.scope)}</p><h2>Cases</h2>'
        + rows_html([result for result in report.results if result.sweep is None])
        + "".join(case_html(case, rows, report) for case, rows in cases(report).items())
        + scaling_html(report)
        + machine_html(report)
    )
    return html_document("Latency", body, STYLE)


def rows_html(results: Sequence[Result]) -> str:
    first = {result.case: result for result in reversed(measured(results))}
    rows = []
    for result in results:
        name = escape(result.key)
        if result.latency is None:
            text = escape(without_latency(result))
            rows.append(("", [name, text if result.status == "ok" else f'<span class="missed">{text}</span>']))
            continue
        latency, per_frame = result.latency, result.latency.per_frame
        marks = "" if result.status == "ok" else f' <span class="missed">{escape(result.status)}</span>'
        if result.noise.noisy:
            marks += f' <span class="noisy" title="{escape("; ".join(result.noise.reasons))}">noisy</span>'
        ratio = per_frame.p50 / first[result.case].latency.per_frame.p50
        fraction = limit_fraction(result)
        cells = [
            name + marks,
            f"{significant(per_frame.p50)}<br><small>{significant(per_frame.low)} … {significant(per_frame.high)}</small>",
            *(significant(value) for value in (per_frame.p90, per_frame.p95, per_frame.p99, per_frame.max)),
            f"{ratio:.2f}×", significant(latency.per_chunk.p50),
            significant(latency.arrival.p50) + ("" if latency.arrival_fps else "<br><small>frames taken when free</small>"),
            significant(latency.first_frame.p50), significant(latency.throughput_fps),
            f"{100 * latency.deadline_misses:.0f} %<br><small>at {latency.target_fps:g} fps</small>",
            "–" if fraction is None else f"{100 * fraction:.0f} %",
        ]  # fmt: skip
        lead = result.sweep is None and result is first[result.case]
        rows.append(("main" if lead else "", cells))
    small = "<br><small>{}</small>"
    head = [
        "Row", "ms per frame" + small.format("p50, 95 % interval"), "p90", "p95", "p99", "max", "of the first row",
        "ms per chunk" + small.format("p50"), "arrival to picture" + small.format("p50, ms"), "first frame" + small.format("ms"),
        "frames/s", "late frames", "of the limit",
    ]  # fmt: skip
    return html_table(head, rows)


def case_html(case: str, rows: list[Result], report: Report) -> str:
    parts = [f"<h2>{escape(case)}</h2>"]
    with_figures = measured(rows)
    if not with_figures:
        return "".join(parts) + '<p class="note">No row has figures.</p>'
    lead = with_figures[0]
    colours = stage_colours(lead)
    parts.append(f'<p class="note">{escape(describe_config(lead))}</p>')
    parts.append(costs_html(with_figures))
    parts.append(f"<h3>Stages of {escape(lead.key)}</h3>" + stages_html(lead))
    figures = (
        distribution_figure(with_figures), stages_figure(lead, colours), waterfall_figure(lead, colours),
        roofline_figure(lead, report, colours),
    )  # fmt: skip
    parts.append('<div class="figures">' + "".join(figures) + "</div>")
    return "".join(parts)


def stage_colours(result: Result) -> dict[str, str]:
    """Stage -> class; all denoising steps share one colour."""
    names = dict.fromkeys(
        "steps" if name.startswith("step.") else name for name in (stage.name for stage in result.stages)
    )
    return {name: svg.colour(index) for index, name in enumerate(names)}


def stage_class(colours: dict[str, str], stage: str) -> str:
    return colours.get("steps" if stage.startswith("step.") else stage, svg.colour(8))


def distribution_figure(results: list[Result]) -> str:
    """Share of the steady chunks that took at most so long, per frame."""
    times = [np.sort([chunk.wall_ms / chunk.frames for chunk in steady_chunks(result)]) for result in results]
    low, high = min(values[0] for values in times), max(values[-1] for values in times)
    log = high > 8 * low
    plot = svg.Plot((low * 0.97, high * 1.03), (0, 1), log_x=log)
    plot.axes("milliseconds per frame, of every steady chunk" + (" (logarithmic)" if log else ""), "share of chunks")
    for index, (result, values) in enumerate(zip(results, times, strict=True)):
        n, steps = len(values), [(values[0], 0.0)]
        for rank, value in enumerate(values, 1):
            steps += [(value, (rank - 1) / n), (value, rank / n)]
        summary = result.latency.per_frame
        plot.line(
            steps,
            svg.colour(index),
            f"{result.key}: p50 {significant(summary.p50)} ms, p99 {significant(summary.p99)} ms",
        )
        plot.point(
            float(np.median(values)), 0.5, svg.colour(index), f"{result.key}: median {significant(summary.p50)} ms"
        )
    legend = [(svg.colour(index), result.key) for index, result in enumerate(results)]
    return plot.figure("Latency distribution", "distribution", legend)


def costs_html(results: list[Result]) -> str:
    """Memory, start and energy of the rows."""

    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{significant(value)} s"

    rows = []
    for result in results:
        memory, startup, energy = result.memory, result.startup, result.energy
        cells = [
            escape(result.key), binary(memory.host_peak_bytes), binary(memory.device_peak_bytes), binary(memory.weight_bytes),
            binary(memory.cache_bytes), seconds(startup.build_s), seconds(startup.load_s), seconds(startup.cold_start_s),
            "–" if energy is None else f"{significant(energy.per_frame_j)} J", str(len(result.repetitions)),
            str(len(steady_chunks(result))), escape(result.stopped),
        ]  # fmt: skip
        rows.append(("", cells))
    head = [
        "Row", "host memory, peak", "device memory, peak", "weights", "K/V cache", "build", "load",
        "process start to first picture", "energy per frame", "repetitions", "steady chunks", "stopped by",
    ]  # fmt: skip
    return html_table(head, rows)


def stages_html(result: Result) -> str:
    rows = []
    for stage in result.stages:
        work, times = stage.work, stage.per_chunk
        cells = [
            escape(stage.name), *map(significant, (times.p50, times.p90, times.p99)), f"{100 * stage.share:.1f} %",
            metric_prefix(work.flops, "FLOP") if work else "–", binary(work.bytes) if work else "–",
            metric_prefix(work.flops / times.p50 * 1e3, "FLOP/s") if work and times.p50 else "–",
            significant(stage.limit_ms), escape(stage.bound or "–"),
            "–" if stage.fraction is None else f"{100 * stage.fraction:.0f} %",
        ]  # fmt: skip
        rows.append(("", cells))
    head = [
        "Stage", "ms per chunk, p50", "p90", "p99", "share", "work", "bytes", "rate", "limit, ms", "bound by", "of the limit",
    ]  # fmt: skip
    notes = (
        [f"The stages account for {100 * result.accounted:.1f} % of the time."] if result.accounted is not None else []
    )
    if result.execution == "overlapped":
        busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result.occupancy.items())
        notes.append(f"Stages overlap; busy: {busy}. Critical path: {' → '.join(result.critical_path)}.")
    notes += [f"{note[:1].upper()}{note[1:]}." for note in result.notes]
    return html_table(head, rows) + f'<p class="note">{escape(" ".join(notes))}</p>'


def waterfall_figure(result: Result, colours: dict[str, str]) -> str:
    """When every stage of one typical chunk ran."""
    spans = result.waterfall
    if not spans:
        return ""
    names = list(dict.fromkeys(span.stage for span in spans))
    row_px = 22
    plot = svg.Plot(
        (0, max(span.end_ms for span in spans)), (0, 1), height=52 + row_px * len(names), left=130
    )  # fmt: skip
    plot.axes("milliseconds since the chunk before was ready", y_ticks=False)
    for row, name in enumerate(names):
        top = plot.top + row * row_px
        plot.text(plot.left - 8, top + 15, name, "end")
        for span in spans:
            if span.stage == name:
                title = f"{name}: {significant(span.end_ms - span.start_ms)} ms"
                plot.bar(span.start_ms, span.end_ms, top + 4, row_px - 8, stage_class(colours, name), title)
    return plot.figure(f"One chunk of {result.key}", "waterfall")


def stages_figure(result: Result, colours: dict[str, str]) -> str:
    """Stage times of every chunk in the order of running, stacked."""
    chunks = [chunk for repetition in result.repetitions for chunk in repetition.chunks]
    names = dict.fromkeys(name for chunk in chunks for name in chunk.stage_ms)
    groups: dict[str, np.ndarray] = {}
    for name in names:
        css = "steps" if name.startswith("step.") else name
        times = np.array([chunk.stage_ms.get(name, 0.0) for chunk in chunks])
        groups[css] = groups.get(css, 0.0) + times
    top = np.zeros(len(chunks))
    # A burst would flatten everything else.
    high = max(np.quantile([sum(chunk.stage_ms.values()) for chunk in chunks], 0.98) * 1.15, 1e-6)
    plot = svg.Plot((0, len(chunks)), (0, float(high)))
    lengths = [len(repetition.chunks) for repetition in result.repetitions]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    stride = max(1, -(-len(starts) // 12))
    ticks = [(float(start), str(index)) for index, start in enumerate(starts)][::stride]
    plot.axes("chunks in the order of running; numbers: repetitions", "ms per chunk", ticks)
    for name, times in groups.items():
        below, top = top, np.minimum(top + times, high)
        edges = [
            [(place, values[i]) for i in range(len(chunks)) for place in (i, i + 1)] for values in (top, below)
        ]  # fmt: skip
        plot.area(*edges, stage_class(colours, name), f"{name}: median {significant(float(np.median(times)))} ms")
    legend = [(stage_class(colours, name), name) for name in groups]
    return plot.figure(f"Stages of {result.key} over time", "stages", legend)


def roofline_figure(result: Result, report: Report, colours: dict[str, str]) -> str:
    """Rate over intensity of every counted stage, under the machine's measured limits."""
    from factorportrait.benchmarks.peers import PEERS

    points = [
        (stage, stage.work.flops / stage.work.bytes, stage.work.flops / stage.per_chunk.p50 * 1e3)
        for stage in result.stages
        if stage.work and stage.work.bytes and stage.work.flops and stage.per_chunk.p50
    ]
    peer = PEERS.get(result.peer)
    on_gpu = peer is not None and peer.device == "cuda"
    limits = [limit for limit in report.limits if (limit.device != "cpu") == on_gpu]
    limits = [limit for limit in limits if on_gpu or limit.threads == result.config.get("threads")]
    roofs = {name: rate for limit in limits[:1] for name, rate in limit.matrix_flops.items()}
    if not points or not roofs:
        return '<p class="note">No roofline: the work of the stages or the machine\'s limits were not measured.</p>'
    copy = limits[0].copy_bytes_s
    ridges = [rate / copy for rate in roofs.values()]
    x = (min(*ridges, *(p[1] for p in points)) / 4, max(*ridges, *(p[1] for p in points)) * 4)
    y = (min(copy * x[0], *(p[2] for p in points)) / 1.5, max(*roofs.values(), *(p[2] for p in points)) * 1.8)
    plot = svg.Plot(x, y, log_x=True, log_y=True, height=340)
    plot.axes("operations per byte (weights, inputs and outputs once)", "operations per second")
    for name, rate in roofs.items():
        text = f"{name} {metric_prefix(rate, 'FLOP/s')}"
        plot.line([(x[0], copy * x[0]), (rate / copy, rate), (x[1], rate)], svg.colour(8), text)
        # Above the highest line, below the others, which may lie close together.
        plot.text(plot.x(x[1]) - 4, plot.y(rate) + (-6 if rate == max(roofs.values()) else 14), text, "end")
    plot.text(plot.x(x[0] * 1.3) + 14, plot.y(copy * x[0] * 1.3) + 6, f"copy {metric_prefix(copy, 'B/s')}")
    seen = set()
    for stage, intensity, rate in points:
        title = f"{stage.name}: {metric_prefix(rate, 'FLOP/s')}, {significant(intensity)} per byte"
        plot.point(intensity, rate, stage_class(colours, stage.name), title)
        seen.add("steps" if stage.name.startswith("step.") else stage.name)
    legend = [(css, name) for name, css in colours.items() if name in seen]
    return plot.figure(f"Roofline of {result.key}", "roofline", legend)


def scaling_html(report: Report) -> str:
    """One plot per curve: median milliseconds per frame, by peer."""
    curves: dict[tuple[str, str], dict[str, list[Result]]] = {}
    failed = []
    for result in report.results:
        if result.sweep is None:
            continue
        if result.latency is None:
            failed.append(f"{result.key}: {without_latency(result)}")
            continue
        peers = curves.setdefault((result.sweep.curve, result.sweep.axis), {})
        peers.setdefault(result.peer, []).append(result)
    if not curves and not failed:
        return ""
    parts = ['<h2>Scaling</h2><div class="figures">']
    for (curve, axis), peers in curves.items():
        rows = [result for results in peers.values() for result in results]
        high = max(result.latency.per_frame.high for result in rows)
        values = sorted({result.sweep.value for result in rows})
        plot = svg.Plot((values[0], values[-1]), (0, high * 1.08))
        plot.axes(axis, "ms per frame, p50", [(value, svg.tick_text(value)) for value in values])
        for index, (peer, results) in enumerate(peers.items()):
            results = sorted(results, key=lambda result: result.sweep.value)
            css = svg.colour(index)
            plot.line([(result.sweep.value, result.latency.per_frame.p50) for result in results], css)
            for result in results:
                summary = result.latency.per_frame
                plot.line([(result.sweep.value, summary.low), (result.sweep.value, summary.high)], css)
                plot.point(
                    result.sweep.value,
                    summary.p50,
                    css,
                    f"{peer}, {axis} {result.sweep.value:g}: {significant(summary.p50)} ms",
                )
        legend = [(svg.colour(index), peer) for index, peer in enumerate(peers)]
        parts.append(plot.figure(f"{curve}: {axis}", "scaling", legend))
    parts.append("</div>" + rows_html([result for result in report.results if result.sweep is not None]))
    if failed:
        parts.append(f'<p class="note">Without figures: {escape("; ".join(failed))}.</p>')
    return "".join(parts)


def machine_html(report: Report) -> str:
    rows = []
    for limit in report.limits:
        rates = ", ".join(f"{name} {metric_prefix(rate, 'FLOP/s')}" for name, rate in limit.matrix_flops.items())
        missing = "; ".join(f"{name}: {reason}" for name, reason in limit.missing.items())
        cells = [
            escape(limit.device),
            str(limit.threads or ""),
            rates,
            metric_prefix(limit.copy_bytes_s, "B/s"),
            escape(missing),
        ]
        rows.append(("", [cells[0], *cells[1:4], cells[4]]))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    clocks = ", ".join(f"{value:.0f}" for value in report.machine.cpu_mhz)
    return (
        "<h2>Machine</h2>"
        + html_table(["Device", "threads", "matrix rate, measured", "copy, measured", "not measured"], rows)
        + f"<p>{escape(versions)}.</p>"
        + (f"<p>Clocks of the cores, start and end: {clocks} MHz.</p>" if clocks else "")
        + f'<p class="note">CPU flags: {escape(" ".join(report.machine.cpu_flags))}. '
        f"Command: <code>{escape(' '.join(report.command))}</code></p>"
    )
