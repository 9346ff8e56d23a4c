"""The subcommands of fp-bench that read reports: report, compare, history, pareto."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from factorportrait.errors import UserError
from factorportrait.files import whole_file

EXIT_REGRESSED = 1


def add_report_commands(commands) -> None:
    """commands: of `argparse`'s add_subparsers."""
    add_report(commands)
    add_compare(commands)
    add_history(commands)
    add_pareto(commands)


def add_report(commands) -> None:
    command = commands.add_parser(
        "report", help="page, summary and README table of a report of fp-bench run",
        description="Write latency.html (one page, works offline), summary.md (for a CI summary) and "
        "customSmallerIsBetter.json (for github-action-benchmark) beside a report.",
    )  # fmt: skip
    command.add_argument("report", type=Path, help="latency.json, or the folder that holds it")
    command.add_argument("--output", "-o", type=Path, help="folder (default: the report's own)")
    command.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the performance table between this file's two markers"
    )
    command.set_defaults(function=report)


def add_compare(commands) -> None:
    command = commands.add_parser(
        "compare", help=f"is HEAD slower than BASE, and which stage? Exit code {EXIT_REGRESSED} on a regression",
        description="Compare two runs of one machine case by case and stage by stage. Runs that took turns can be given together: "
        "BASE HEAD BASE HEAD ... (four rounds or more). Reports of fp-bench run --against are compared in pairs.",
    )  # fmt: skip
    command.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT", help="BASE HEAD, or BASE HEAD BASE HEAD ..."
    )
    command.add_argument("--threshold", default="5%", help="relative change that counts (default 5%%)")
    command.add_argument(
        "--min-ms", type=float, default=0.1, metavar="MS", help="change per chunk that counts (default 0.1)"
    )
    command.add_argument("--allow-different-machines", action="store_true", help="compare although the machines differ")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to a file")
    command.set_defaults(function=compare)


def add_history(commands) -> None:
    command = commands.add_parser(
        "history", help="trend over many reports, change points marked",
        description="Read every report below a folder, order them by commit date, and tell where times changed.",
    )  # fmt: skip
    command.add_argument("folder", type=Path, help="holds reports of fp-bench run, at any depth")
    command.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="page to write (default FOLDER/history.html)"
    )
    command.set_defaults(function=history)


def add_pareto(commands) -> None:
    command = commands.add_parser(
        "pareto", help="quality against latency: one plot from quality and latency reports",
        description="Match quality reports with rows of latency reports that ran the same bundle in the same way (mode, precision, "
        "steps, window), and mark those that no other beats in both.",
    )  # fmt: skip
    command.add_argument(
        "--latency", nargs="+", type=Path, required=True, metavar="REPORT", help="latency.json, or folders"
    )
    command.add_argument(
        "--quality", nargs="+", type=Path, required=True, metavar="REPORT", help="quality.json, or folders"
    )
    command.add_argument("--metric", default="psnr", help="figure of the quality reports (default psnr)")
    command.add_argument(
        "--output", "-o", type=Path, default=Path("pareto.html"), metavar="FILE", help="default pareto.html"
    )
    command.set_defaults(function=pareto)


def report(options: argparse.Namespace) -> int:
    from factorportrait.benchmarks.report import update_readme, write_pages
    from factorportrait.benchmarks.schema import read_report

    source = options.report
    found = read_report(source)
    folder = options.output or (source if source.is_dir() else source.parent)
    written = write_pages(folder, found)
    if options.readme:
        written.append(update_readme(options.readme, found))
    print("fp-bench: " + ", ".join(map(str, written)))
    return 0


def compare(options: argparse.Namespace) -> int:
    from factorportrait.benchmarks.compare import Thresholds, compare_files, markdown

    if not options.min_ms >= 0:
        raise UserError(
            "--min-ms", expected="milliseconds, 0 or more", found=str(options.min_ms), action="0.1 is usual"
        )
    thresholds = Thresholds(parse_share(options.threshold, "--threshold"), options.min_ms)
    found = compare_files(options.reports, thresholds, options.allow_different_machines)
    text = markdown(found)
    if options.markdown:
        with whole_file(options.markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return EXIT_REGRESSED if found.regressed else 0


def parse_share(text: str, name: str) -> float:
    """`5%` or `0.05` -> 0.05.

    Raises:
        UserError: not a share above 0.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 10:
        raise UserError(name, expected="a share above 0 such as 5% or 0.05", found=repr(text), action="5% is usual")
    return share


def history(options: argparse.Namespace) -> int:
    from factorportrait.benchmarks.history import history_page, history_text, read_folder, trends

    output = options.output or options.folder / "history.html"
    reports, skipped = read_folder(options.folder)
    found = trends(reports)
    with whole_file(output) as temporary:
        temporary.write_text(history_page(found, skipped), encoding="utf-8")
    sys.stdout.write(history_text(found, skipped))
    print(f"fp-bench: {output}")
    return 0


def pareto(options: argparse.Namespace) -> int:
    from factorportrait.benchmarks.pareto import pareto_page, pareto_text, read_points

    found = read_points(options.latency, options.quality, options.metric)
    with whole_file(options.output) as temporary:
        temporary.write_text(pareto_page(found), encoding="utf-8")
    sys.stdout.write(pareto_text(found))
    print(f"fp-bench: {options.output}")
    return 0
