"""fp-bench: measurements of bundles. `fp-bench run` times one and its peers, `fp-bench quality BUNDLE` compares what it makes with
ground-truth renders."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path

from factorportrait.benchmarks.loop_commands import add_loop_commands
from factorportrait.benchmarks.report_commands import add_report_commands
from factorportrait.command import run_command
from factorportrait.errors import UserError
from factorportrait.model_config import SOLVERS

EXIT_MISSED = 1
QUICK_IDENTITIES, QUICK_FRAMES = 2, 13
DEFAULT_IDENTITIES, DEFAULT_FRAMES = 20, 29


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return run_command("fp-bench", lambda: options.function(options))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fp-bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_run(commands)
    add_quality(commands)
    add_report_commands(commands)
    add_loop_commands(commands)
    return parser


def add_run(commands) -> None:
    command = commands.add_parser(
        "run", help="latency of cases and their peers: latency.json",
        description="Time a bundle, its peers in the same run, and the limits of the machine. Cases are data: shipped ones by "
        "name, or TOML files. Ctrl-C keeps what was measured until then. Exit code 1 where a row failed or none has figures.",
    )  # fmt: skip
    command.add_argument("bundle", nargs="?", help="bundle folder for cases that name none (default: the shipped demo)")
    command.add_argument("--cases", nargs="+", metavar="NAME|FILE", default=["demo"], help="default: demo")
    command.add_argument("--output", "-o", type=Path, default=Path("bench"), help="folder for the report (default bench)")
    command.add_argument("--checkpoint", help="folder that BUNDLE was exported from, for its rows in PyTorch")
    command.add_argument(
        "--against", metavar="BASE",
        help="another bundle folder, in turns with BUNDLE on the cases' engine alone: writes OUTPUT/base and OUTPUT/head, "
        "for fp-bench compare",
    )  # fmt: skip
    command.add_argument("--peers", metavar="A,B", help="only these peers, instead of the cases' own")
    command.add_argument("--quick", action="store_true", help="few repetitions, wide intervals")
    command.add_argument("--list", action="store_true", help="print the shipped cases and the peers, and stop")
    command.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    """Measure, write the report, print one line per row."""
    from factorportrait.benchmarks.run import run_cases

    return run_cases(options)


def add_quality(commands) -> None:
    command = commands.add_parser(
        "quality", help="pictures against ground-truth renders: quality.json, contact sheets, quality.html",
        description="Generate test people that nothing was trained on, through the exported bundle and the runtime's own loop, "
        "and compare with true renders of the same people. Needs a checkout with the [demo] extra.",
    )  # fmt: skip
    command.add_argument("bundle", type=Path, help="folder made by fp-export")
    command.add_argument("--output", "-o", type=Path, default=Path("quality"), help="folder for the report (default quality)")
    command.add_argument("--identities", type=int, help=f"test people, one clip each (default {DEFAULT_IDENTITIES})")
    command.add_argument("--frames", type=int, help=f"of a clip (default {DEFAULT_FRAMES})")
    command.add_argument("--steps", help="denoising steps to compare, such as 1,2,4,8,50 (default: the bundle's own)")
    command.add_argument("--modes", default="frontal,novel,orbit,all", help="kinds of clips, in turn (default: all four)")
    command.add_argument("--generation", choices=("stream", "clip"), help="default: stream where the checkpoint allows it")
    command.add_argument(
        "--expression", choices=("pictures", "arkit"), default="pictures",
        help="what drives it: pictures through the expression encoder (default), or their true ARKit coefficients",
    )  # fmt: skip
    command.add_argument("--expression-gain", type=float, default=1.0, metavar="X", help="as for fp-run")
    command.add_argument("--window", type=int, help="latent frames that a chunk of a stream sees (default: the checkpoint's)")
    command.add_argument(
        "--self-only", action="store_true",
        help="people driven by themselves alone, expression and pose not read: enough for fp-bench pareto",
    )  # fmt: skip
    command.add_argument("--guidance", default="1", help="these six as for fp-run")
    command.add_argument("--guidance-steps", type=int, metavar="N")
    command.add_argument("--commit", default="clean", metavar="KIND")
    command.add_argument("--step-cache", type=float, default=0.0, metavar="X")
    command.add_argument("--solver", choices=SOLVERS)
    command.add_argument("--shift", type=float, metavar="X")
    command.add_argument("--stream", type=int, default=0, metavar="N", help="also one stream of N frames, for drift and seams")
    command.add_argument("--seed", type=int, default=0, help="of people, motions and noise")
    command.add_argument("--data", type=Path, help="shards of the test split, instead of rendering people now")
    command.add_argument("--threads", type=int, help="of one operator (default: every core)")
    command.add_argument(
        "--quick", action="store_true", help=f"{QUICK_IDENTITIES} people, {QUICK_FRAMES} frames unless said otherwise"
    )
    command.add_argument("--enforce", action="store_true", help=f"exit code {EXIT_MISSED} when a target is missed")
    command.set_defaults(function=quality)


def quality(options: argparse.Namespace) -> int:
    """Measure, write the report and print the verdicts."""
    # One BLAS thread: renders are then equal to the bit from run to run. It has to be said before NumPy is imported.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from factorportrait.benchmarks.quality import measure
    from factorportrait.benchmarks.quality.report import write_report
    from factorportrait.bundle import Bundle
    from factorportrait.model_config import FRAMES_PER_LATENT
    from factorportrait.runtime.session import SessionOptions, open_bundle

    settings = settings_from(options)
    check_output(options.output)
    # Everything that can be wrong is found before the graphs are loaded.
    bundle = Bundle(options.bundle)
    mode = SessionOptions(
        mode=settings.generation, expression_gain=settings.expression_gain, **settings.approximations
    ).resolve(bundle.config).mode  # fmt: skip
    longest = 1 + FRAMES_PER_LATENT * (bundle.config.generation.max_clip_frames - 1)
    if mode == "clip" and max(settings.frames, measure.ACTION_FRAMES) > longest:
        raise UserError(
            "--generation clip", expected=f"clips of at most {longest} frames, the length of the training",
            found=f"{settings.frames} frames, {measure.ACTION_FRAMES} for single actions",
            action="use --generation stream, or fewer --frames",
        )  # fmt: skip
    if settings.stream and "stream" not in bundle.config.generation.modes:
        raise UserError(
            "--stream", expected="a checkpoint that was trained for streams", found="clip mode only",
            action="leave --stream out",
        )  # fmt: skip
    measure.World()
    opened = open_bundle(options.bundle, threads=settings.threads)
    report, sheets = measure.measure(opened, settings, say)
    written = write_report(options.output, report, sheets)
    missed = print_verdicts(report)
    print("fp-bench: " + ", ".join(map(str, written)))
    return EXIT_MISSED if options.enforce and missed else 0


def settings_from(options: argparse.Namespace):
    """Settings of the run.

    Raises:
        UserError: a number or name that no run can have.
    """
    from factorportrait.benchmarks.quality.cases import MODES
    from factorportrait.benchmarks.quality.measure import STREAM_PERIOD, Settings

    usual = (QUICK_IDENTITIES, QUICK_FRAMES) if options.quick else (DEFAULT_IDENTITIES, DEFAULT_FRAMES)
    identities = usual[0] if options.identities is None else options.identities
    frames = usual[1] if options.frames is None else options.frames
    threads = 1 if options.threads is None else options.threads
    for name, value, least in (
        ("identities", identities, 1), ("frames", frames, 5), ("threads", threads, 1), ("seed", options.seed, 0),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--{name}", expected=f"{least} or more", found=str(value), action="choose another number")
    if options.stream and (options.stream < 2 * STREAM_PERIOD or options.stream % STREAM_PERIOD):
        raise UserError(
            "--stream", expected=f"a multiple of {STREAM_PERIOD}, at least {2 * STREAM_PERIOD}",
            found=str(options.stream), action="1000 is what the target asks for",
        )  # fmt: skip
    modes = tuple(part.strip() for part in options.modes.split(","))
    for mode in modes:
        if mode not in MODES or modes.count(mode) > 1:
            near = difflib.get_close_matches(mode, MODES, 1)
            raise UserError(
                "--modes", expected="a list of " + ", ".join(MODES), found=repr(mode),
                action=f"did you mean {near[0]}?" if near and near[0] != mode else "name each once",
            )  # fmt: skip
    return Settings(
        identities, frames, parse_steps(options.steps), modes, options.seed, options.generation, options.stream,
        1 if options.quick else 2, options.data, options.threads, options.window, approximations(options),
        options.self_only, options.expression, options.expression_gain,
    )  # fmt: skip


def approximations(options: argparse.Namespace) -> dict[str, object]:
    """Those that were asked for."""
    from factorportrait.benchmarks import pareto

    return dict(pareto.approximations(vars(options)))


def parse_steps(text: str | None) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4); None -> ().

    Raises:
        UserError: not a list of positive whole numbers.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            "--steps", expected="numbers of steps such as 1,2,4", found=repr(text), action="4 is a good start"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def check_output(folder: Path) -> None:
    """Raises UserError unless the report can go there; a folder with other things is not written into."""
    from factorportrait.benchmarks.quality.report import FILES

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}", expected="a folder", found="a file", action="choose another place")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILES[0]).is_file():
        raise UserError(
            f"--output {folder}", expected="a new or empty folder, or an earlier report", found="other files",
            action="choose another folder",
        )  # fmt: skip


def say(line: str) -> None:
    print(f"fp-bench: {line}", file=sys.stderr, flush=True)


def print_verdicts(report) -> int:
    """Targets with their figures on stdout; the number of missed ones."""
    from factorportrait.benchmarks.quality.report import mean_of, verdicts

    rulers = report.rulers
    for what, reason in (("expression and pose", rulers["reader_missing"]), ("LPIPS", rulers["lpips_missing"])):
        if reason:
            print(f"fp-bench: not measured: {what}: {reason}")
    if rulers["reader_doubt"]:
        print(f"fp-bench: do not trust expression and pose figures: {rulers['reader_doubt']}")
    found = verdicts(report)
    for target in found:
        sign = ">=" if target["compare"] == "at_least" else "<="
        value = "-" if target["value"] is None else f"{target['value']:.3f}"
        note = f" ({target['note']})" if target["note"] else ""
        print(
            f"{target['status']:>12}  {value:>9} {sign} {target['figure']:g} {target['unit']:<5}  "
            f"{target['sentence']}{note}"
        )
    psnr = mean_of(report, report.primary, "psnr")
    print(f"fp-bench: mean PSNR {psnr:.2f} dB over {len(report.clips)} clips in {report.seconds:.0f} s")
    return sum(target["status"] == "missed" for target in found)


if __name__ == "__main__":
    sys.exit(main())
