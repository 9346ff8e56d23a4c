"""fp-export: a checkpoint becomes a bundle. `fp-export inspect` prints a bundle; that needs no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from factorportrait.bundle import TARGETS, Bundle, Manifest
from factorportrait.checkpoint_files import is_released
from factorportrait.command import run_command
from factorportrait.export import build, plan_cli, released_cli, verify
from factorportrait.export.quantize import cli as quantize_cli
from factorportrait.shipped import DEMO_NAME, default_bundle_path, is_shipped_checkpoint, shipped_checkpoint

COMMAND = "fp-export"


def main(arguments: list[str] | None = None) -> int:
    """Run fp-export and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["inspect"]:
        options = _inspect_parser().parse_args(arguments[1:])
        return run_command(COMMAND, lambda: _inspect(options))
    if arguments[:1] == ["build"]:
        options = plan_cli.build_parser(COMMAND).parse_args(arguments[1:])
        return run_command(COMMAND, lambda: plan_cli.run_build(options))
    if arguments[:1] == ["plans"]:
        options = plan_cli.plans_parser(COMMAND).parse_args(arguments[1:])
        return run_command(COMMAND, lambda: plan_cli.run_plans(options))
    if arguments[:1] == ["verify"]:
        options = verify.parser(COMMAND).parse_args(arguments[1:])
        return run_command(COMMAND, lambda: verify.run(options))
    options = _export_parser().parse_args(arguments)
    return run_command(COMMAND, lambda: _export(options))


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Export a checkpoint to a bundle of ONNX graphs, each checked against torch.",
        epilog="fp-export inspect BUNDLE prints a bundle, build BUNDLE builds its TensorRT plans, plans list and plans prune look "
        "after them, verify BUNDLE compares its graphs on every engine with fp32; each has --help. A "
        "checkpoint called inspect is ./inspect.",
    )
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT",
        help="folder with config.json and safetensors files, or a released checkpoint of Wan's family (default: the shipped demo)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", default="fp32",
        help=f"{' or '.join(build.OFFERED)} (default: fp32); fp16 is for GPUs, on a CPU it is smaller but no faster",
    )  # fmt: skip
    parser.add_argument(
        "--target", metavar="TARGETS",
        help=f"who will run it, with commas: {', '.join(TARGETS)}, or all (default: all, for fp32 cpu,cuda); with a GPU here, "
        "naming tensorrt builds its plans as well",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="BUNDLE", help="folder of the bundle (default: a folder of the user's cache)"
    )
    quantize_cli.add_arguments(parser)
    released_cli.add_arguments(parser)
    parser.add_argument("--force", action="store_true", help="export even if nothing changed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{COMMAND} inspect", description="Print what a bundle holds.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its digest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _export(options: argparse.Namespace) -> int:
    targets = build.check_precision(options.precision, None if options.target is None else tuple(options.target.split(",")))
    quantize_cli.check_options(options)
    checkpoint = options.checkpoint or shipped_checkpoint()
    released = is_released(checkpoint)
    if not released:
        released_cli.check_unused(options)
    output = options.output or _default_output(options.checkpoint, options.precision)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)

        def show(progress: build.Progress) -> None:
            description = f"{progress.what:6} {progress.stage}".rstrip()
            bar.update(task, description=description, completed=progress.step, total=progress.num_steps)

        def note(line: str) -> None:
            bar.console.print(f"fp-export: {line}", soft_wrap=True, markup=False, highlight=False)

        outcome = None
        try:
            if released:
                from factorportrait.export.released import export_released

                report = export_released(
                    checkpoint, output, released_cli.options_of(options), precision=options.precision, targets=targets,
                    force=options.force, on_progress=show, on_note=note,
                )  # fmt: skip
            elif options.precision == "int8":
                report, outcome = quantize_cli.export_int8(
                    options, checkpoint, output, targets, lambda line: bar.update(task, description=line, total=None)
                )
            else:
                report = build.build_bundle(
                    checkpoint, output, precision=options.precision, targets=targets, force=options.force, on_progress=show,
                    judge=quantize_cli.judge_for(options, checkpoint, targets),
                )  # fmt: skip
        except quantize_cli.GateFailed as error:
            bar.stop()
            if not options.json:
                quantize_cli.print_gate(Console(), error.result)
            raise
        except build.GraphsRefused as error:
            bar.stop()
            if not options.json:
                Console().print(_check_table(error.checks, error.refused))
            raise
    # Who names TensorRT wants to run it with no further command, if this is the machine.
    wants_plans = options.target is not None and "tensorrt" in targets
    plans, elsewhere = plan_cli.plans_after_export(report.path) if wants_plans else (None, "")
    if options.json:
        gate = Bundle(report.path).manifest.provenance.get("gate")
        quality = {"gate": gate} if outcome is None else quantize_cli.to_dict(outcome)
        print(json.dumps(report.to_dict() | {"plans": plans} | quality))
        return 0
    console = Console()
    if report.up_to_date:
        console.print(f"{report.path}: up to date, nothing done (--force exports again)", soft_wrap=True, markup=False)
    else:
        _print_export(console, report)
        if outcome is None and (line := quantize_cli.gate_line(Bundle(report.path))):
            console.print(line, soft_wrap=True, markup=False)
        if outcome is not None:
            quantize_cli.print_outcome(console, outcome)
    if plans is not None:
        plan_cli.print_plans(plans)
    elif elsewhere:
        console.print(elsewhere, soft_wrap=True, markup=False)
    return 0


def _print_export(console: Console, report: build.BuildReport) -> None:
    console.print(_check_table(report.checks))
    lines = [
        f"{report.path}: {len(report.checks)} graphs, {_megabytes(report.total_bytes)}, {report.seconds:.1f} s",
        _target_sizes(report.target_bytes),
        *build.precision_notes(report.precision, report.target_bytes),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _target_sizes(target_bytes: Mapping[str, int]) -> str:
    return "a target loads: " + ", ".join(f"{target} {_megabytes(size)}" for target, size in target_bytes.items())


def _default_output(checkpoint: Path | None, precision: str) -> Path:
    if checkpoint is None or is_shipped_checkpoint(checkpoint):
        return default_bundle_path(DEMO_NAME, precision)
    return default_bundle_path(checkpoint.resolve().name, precision, checkpoint)


def _check_table(checks: Mapping[str, Mapping[str, float]], refused: tuple[str, ...] = ()) -> Table:
    # Without a frame, so that names of graphs are whole in eighty columns.
    title = "ONNX Runtime against the float model, largest errors"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("graph", no_wrap=True)
    has_half = any("headroom" in check for check in checks.values())
    columns = ["inputs", "absolute", "relative", "1-cos", *(["fp16 room"] if has_half else [])]
    for column in columns + (["verdict"] if refused else []):
        table.add_column(column, justify="right")
    for name, check in checks.items():
        figures = (f"{check[key]:.1e}" for key in ("max_abs", "max_relative", "angle"))
        cells = [f"{check['num_cases']:.0f}", *(figures if check["num_cases"] else ["not run"] * 3)]
        if has_half:
            cells.append(f"{check['headroom']:.3g}x" if "headroom" in check else "")
        if refused:
            cells.append("refused" if name in refused else "passed")
        table.add_row(name, *cells)
    return table


def _inspect(options: argparse.Namespace) -> int:
    bundle = Bundle(options.bundle)
    if options.verify:
        bundle.verify()
    manifest, config = bundle.manifest, bundle.config
    sizes = {target: manifest.target_bytes(target) for target in manifest.targets}
    if options.json:
        known = {"bundle": str(bundle.path), "verified": options.verify, "target_bytes": sizes}
        print(json.dumps(json.loads(manifest.to_json()) | known))
        return 0
    console = Console()
    console.print(f"{bundle.path}", soft_wrap=True, markup=False)
    modes, generation = " and ".join(config.generation.modes), config.generation
    lines = [
        f"{config.system} {config.name}, {manifest.precision}, schema {manifest.schema}",
        f"{config.width} x {config.height} px, {config.fps:g} frames per second, {config.tokens_per_frame} tokens per latent frame",
        f"transformer: width {config.dit.dim}, {config.dit.num_heads} heads, {config.dit.num_layers} blocks",
        f"modes {modes}, chunk {generation.chunk_frames}, window {generation.window_frames}, {generation.denoising_steps} steps",
        f"{len(manifest.files)} files, {_megabytes(bundle.total_bytes())}, digests "
        + ("match" if options.verify else "not read (--verify does)"),
        _target_sizes(sizes),
        *build.precision_notes(manifest.precision, manifest.targets),
        *filter(None, [quantize_cli.gate_line(bundle)]),
        *manifest.provenance.get("notes", ()),
        "made with " + ", ".join(f"{name} {version}" for name, version in manifest.provenance.get("versions", {}).items()),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    table = Table()
    for column in ("stage", "inputs", "outputs"):
        table.add_column(column)
    table.add_column("size", justify="right")
    table.add_column("relative error", justify="right")
    own = ((target, stage) for target, stages in manifest.variants.items() for stage in stages.values())
    for target, stage in (*((None, stage) for stage in manifest.stages.values()), *own):
        error = f"{stage.check['max_relative']:.1e}" if stage.check.get("num_cases") else "?"
        sides = (escape(_tensors(side)) for side in (stage.inputs, stage.outputs)) if target is None else ("as above", "")
        name = stage.name if target is None else f"{stage.name} for {target}"
        table.add_row(name, *sides, _megabytes(manifest.bytes_of(stage)), error)
    console.print(table)
    if shared := [name for name, num in _uses(manifest).items() if num > 1]:
        console.print(f"shared by several graphs, counted in each: {', '.join(shared)}", soft_wrap=True, markup=False)
    return 0


def _uses(manifest: Manifest) -> Counter[str]:
    """How many graphs refer to each file."""
    own = (spec for stages in manifest.variants.values() for spec in stages.values())
    return Counter(name for spec in (*manifest.stages.values(), *own) for name in spec.files)


def _tensors(specs) -> str:
    """One line per tensor; a numbered family is its first member and how many there are."""
    families: dict[str, list] = {}
    for spec in specs:
        base, _, number = spec.name.rpartition(".")
        families.setdefault(base if number.isdigit() else spec.name, []).append(spec)
    return "\n".join(
        members[0].describe() + (f" and {len(members) - 1} more" if len(members) > 1 else "")
        for members in families.values()
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
