"""The commands of fp-bench that look at the denoising loop: waterfall, stream and threads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from factorportrait.errors import UserError
from factorportrait.runtime.pipeline import OVERLAPS

EXIT_MISSED = 1


def add_loop_commands(commands) -> None:
    """commands: of `argparse`'s add_subparsers."""
    add_waterfall(commands)
    add_stream(commands)
    add_threads(commands)


def add_waterfall(commands) -> None:
    from factorportrait.benchmarks.waterfall import CASES

    command = commands.add_parser(
        "waterfall", help="what each part of the denoising loop brings: waterfall.json and waterfall.html",
        description="From the loop that one writes first (PyTorch eager, everything recomputed) to the one that ships, one "
        "addition per row; all rows in turns, the latents of each compared with the first row's.",
    )  # fmt: skip
    command.add_argument("bundle", nargs="?", help="bundle folder in place of the shipped demo")
    command.add_argument("--checkpoint", help="folder that BUNDLE was exported from (default: the shipped one)")
    command.add_argument("--case", choices=(*CASES, "all"), default="demo", help="the demo, or two blocks of Wan 1.3B's width")
    command.add_argument("--output", "-o", type=Path, default=Path("waterfall"), help="folder (default waterfall)")
    command.add_argument("--quick", action="store_true", help="one repetition")
    command.set_defaults(function=waterfall)


def waterfall(options: argparse.Namespace) -> int:
    """Measure, write, print."""
    from factorportrait.benchmarks.waterfall import (
        CASES,
        limit_of,
        measure_waterfall,
        waterfall_case,
        waterfall_text,
        write_waterfall,
    )

    names = list(CASES) if options.case == "all" else [options.case]
    cases = [waterfall_case(name, options.bundle, options.checkpoint) for name in names]
    found = []
    for case in cases:
        found.append(measure_waterfall(case, say, quick=options.quick))
        print(waterfall_text(found[-1]), end="", flush=True)
    print("fp-bench: " + ", ".join(map(str, write_waterfall(options.output, found))))
    wrong = [bar.name for each in found for bar in each.bars if bar.error is not None and bar.error > limit_of(bar.peer)]
    for name in wrong:
        print(f"fp-bench: {name} does not generate what the first row does")
    return EXIT_MISSED if wrong else 0


def add_stream(commands) -> None:
    command = commands.add_parser(
        "stream", help="one long stream: is it as fast and as small at its end? stream.json",
        description=f"Run one stream and compare its quarters. Exit code {EXIT_MISSED} where it is slower, larger, or allocates.",
    )
    command.add_argument("bundle", nargs="?", help="bundle folder (default: the shipped demo)")
    command.add_argument("--frames", type=int, default=10001, help="default 10001")
    command.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    command.add_argument("--engine", default="auto", help="as for fp-run")
    command.add_argument("--threads", type=int, help="of one operator (default: every core; half of them where stages overlap)")
    command.add_argument("--overlap", choices=("auto", *OVERLAPS), default="none", help="as for fp-run (default none)")
    command.add_argument("--output", "-o", type=Path, default=Path("stream.json"), help="default stream.json")
    command.set_defaults(function=stream)


def stream(options: argparse.Namespace) -> int:
    """Measure, write, print."""
    from factorportrait.benchmarks.stream import measure_stream, stream_text, write_stream
    from factorportrait.runtime.cli import demo_bundle
    from factorportrait.runtime.pipeline import default_threads
    from factorportrait.runtime.session import SessionOptions, open_bundle

    for name in ("frames", "steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}", expected="1 or more", found=str(value), action="choose another number")
    threads = options.threads or default_threads(options.overlap)
    opened = open_bundle(options.bundle or demo_bundle(), engine=options.engine, threads=threads)
    wanted = SessionOptions(mode="stream", steps=options.steps, overlap=options.overlap)
    report = measure_stream(opened, wanted, options.frames, say)
    write_stream(options.output, report)
    print(stream_text(report), end="")
    print(f"fp-bench: {options.output}")
    return EXIT_MISSED if report.objections else 0


def add_threads(commands) -> None:
    command = commands.add_parser(
        "threads", help="how many threads an operator should have here: threads.json",
        description="The loop with 1, 2, 4, ... threads per operator on the CPU, with and without spinning, all rows in turns.",
    )  # fmt: skip
    command.add_argument("bundle", nargs="?", help="bundle folder (default: the shipped demo)")
    command.add_argument("--threads", metavar="N,N", help="numbers to try (default: 1, 2, 4, ... and every usable core)")
    command.add_argument("--output", "-o", type=Path, default=Path("threads.json"), help="default threads.json")
    command.add_argument("--quick", action="store_true", help="one repetition")
    command.set_defaults(function=threads)


def threads(options: argparse.Namespace) -> int:
    """Measure, write, print."""
    from factorportrait.benchmarks.threads import measure_threads, threads_text, write_threads

    found = measure_threads(options.bundle, thread_numbers(options.threads), say, quick=options.quick)
    write_threads(options.output, found)
    print(threads_text(found), end="")
    print(f"fp-bench: {options.output}")
    return 0 if found.fastest is not None else EXIT_MISSED


def thread_numbers(text: str | None) -> list[int] | None:
    """`--threads` of fp-bench threads: "1,2" -> [1, 2], None as it is.

    Raises:
        UserError: not numbers from 1.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise UserError("--threads", expected="numbers from 1 with commas between them", found=text, action="such as --threads 1,2")
    return sorted({int(word) for word in words})


def say(line: str) -> None:
    print(f"fp-bench: {line}", file=sys.stderr, flush=True)
