"""`fp-export build BUNDLE` and `fp-export plans list|prune`: TensorRT plans on the machine that runs them. No torch here."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError

DAY_S = 24 * 3600.0


def build_parser(command: str) -> argparse.ArgumentParser:
    """Options of `fp-export build`."""
    parser = argparse.ArgumentParser(
        prog=f"{command} build",
        description="Build the TensorRT plans of a bundle for this machine's GPU. Plans that fit are kept as they are.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="made with fp-export --target tensorrt")
    _add_plans_folder(parser)
    parser.add_argument(
        "--optimization-level", type=int, choices=range(6), default=3, metavar="0..5",
        help="5 searches longest for the fastest kernels (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--workspace-mb", type=_positive, metavar="MB", help="scratch memory of a layer (default: 80 %% of the free memory)"
    )
    parser.add_argument(
        "--version-compatible", action="store_true", help="plans that later versions of TensorRT 11 load too; may be slower"
    )
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this stage; may be given again")
    parser.add_argument("--force", action="store_true", help="build again what is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def plans_parser(command: str) -> argparse.ArgumentParser:
    """Options of `fp-export plans`."""
    parser = argparse.ArgumentParser(prog=f"{command} plans", description="List or remove TensorRT plans.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|prune")
    listing = actions.add_parser("list", help="what is kept, and whether it can be used here")
    prune = actions.add_parser("prune", help="remove plans that nothing can use any more, and what killed builds left")
    prune.add_argument("--all", action="store_true", help="remove every plan, and the measured times as well")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    for action in (listing, prune):
        _add_plans_folder(action)
        action.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def run_build(options: argparse.Namespace) -> int:
    """`fp-export build`."""
    from factorportrait.engines.tensorrt.plans import Options

    workspace = None if options.workspace_mb is None else options.workspace_mb * 10**6
    how = Options(options.optimization_level, workspace, options.version_compatible)
    report = build_with_progress(
        Bundle(options.bundle), plans=options.plans, how=how, stages=options.stage, again=options.force
    )
    if options.json:
        print(json.dumps(report))
    else:
        print_plans(report)
    return 0


def build_with_progress(bundle: Bundle, *, plans: Path | None = None, how=None, stages=None, again: bool = False) -> dict:
    """Build a bundle's plans with a bar on stderr; what was done, for --json.

    Args:
        plans: their folder; None for the user's cache.
        how, stages, again: see `factorportrait.engines.tensorrt.build.build_plans`.

    Raises:
        UserError: there is no GPU or no TensorRT here, the bundle is damaged or not for TensorRT, or a graph gives no plan.
    """
    from factorportrait.engines.tensorrt.build import TARGET, build_plans
    from factorportrait.engines.tensorrt.build import Progress as Step
    from factorportrait.engines.tensorrt.machine import probe
    from factorportrait.engines.tensorrt.plans import PlanStore

    for stage in stages or bundle.manifest.target_stages(TARGET):
        bundle.stage(stage, TARGET)  # before the GPU is asked for: a bundle for others is the first thing to mend
    machine = probe("TensorRT plans")
    bundle.verify()  # plans are kept by the digests that the manifest has of the graphs
    store = PlanStore(plans)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        shown = None

        def show(step: Step) -> None:
            nonlocal shown
            if shown != step.step:  # the time that remains is the stage's own
                shown = step.step
                bar.reset(task, total=1.0)
            bar.update(task, description=f"{step.step + 1}/{step.num_steps} {step.stage}", completed=step.fraction)

        def notice(line: str) -> None:
            console.print(line, soft_wrap=True, markup=False, highlight=False)

        done = build_plans(bundle, store, machine, how, stages=stages, again=again, on_progress=show, notice=notice)
    return {
        "bundle": str(bundle.path), "plans": str(store.folder), "gpu": machine.gpu, "sm": machine.sm, "tensorrt": machine.tensorrt,
        "stages": [
            {
                "stage": plan.stage, "built_now": built, "key": plan.parts.key, "file": str(plan.file), "bytes": plan.bytes,
                "build_seconds": plan.seconds,
            }
            for plan, built in done
        ],
    }  # fmt: skip


def print_plans(report: dict) -> None:
    """The table of what `build_with_progress` did."""
    table = Table(title=f"TensorRT plans in {escape(report['plans'])}", title_justify="left")
    for column in ("stage", "plan", "key"):
        table.add_column(column)
    for column in ("size", "build"):
        table.add_column(column, justify="right")
    for plan in report["stages"]:
        state = "built" if plan["built_now"] else "as it was"
        table.add_row(plan["stage"], state, plan["key"], _megabytes(plan["bytes"]), f"{plan['build_seconds']:.1f} s")
    Console().print(table)


def plans_after_export(bundle: Path) -> tuple[dict | None, str]:
    """What `fp-export --target tensorrt` does behind the export: the plans, or why they have to be built elsewhere."""
    from factorportrait.engines.tensorrt.machine import find_gpu

    gpu = find_gpu()
    if isinstance(gpu, str):
        return None, f"no TensorRT plans built here ({gpu}); on the machine that runs them: fp-export build {bundle}"
    return build_with_progress(Bundle(bundle)), ""


def run_plans(options: argparse.Namespace) -> int:
    """`fp-export plans`."""
    return _list(options) if options.action == "list" else _prune(options)


def _list(options: argparse.Namespace) -> int:
    from factorportrait.engines.tensorrt.plans import PlanStore, status_of

    store, machine = PlanStore(options.plans), _this_machine()
    rows = [(plan, status_of(plan, machine)) for plan in store.plans()]
    if options.json:
        print(json.dumps({"plans": str(store.folder), "entries": [_entry(*row) for row in rows]}))
        return 0
    console = Console()
    if not rows:
        console.print(f"{store.folder}: no plans", soft_wrap=True, markup=False)
        return 0
    table = Table(title=f"TensorRT plans in {escape(str(store.folder))}", title_justify="left")
    for column in ("bundle", "stage", "size", "key", "GPU", "age", "state"):
        table.add_column(column, justify="right" if column in ("size", "age") else "left")
    for plan, status in rows:
        state = f"stale: {status.reason}" if status.state == "stale" else status.state
        size, age = _megabytes(plan.bytes), _age(plan.age_s)
        cells = (Path(plan.bundle).name, plan.stage, size, plan.parts.key, plan.parts.gpu, age, state)
        table.add_row(*map(escape, cells))
    console.print(table)
    console.print(f"{len(rows)} plans, {_megabytes(sum(plan.bytes for plan, _ in rows))}")
    if machine is None:
        console.print("there is no GPU or no TensorRT here that would tell which of them fit")
    return 0


def _prune(options: argparse.Namespace) -> int:
    from factorportrait.engines.tensorrt.plans import PlanStore, status_of

    store, machine = PlanStore(options.plans), _this_machine()
    removed: list[tuple[str, str]] = []
    if store.folder.is_dir():
        with store.lock(lambda: Console(stderr=True).print("waiting for a build to end")):
            for plan in store.plans():
                status = status_of(plan, machine)
                if options.all or status.state == "stale":
                    removed.append((plan.folder.name, status.reason or "asked for"))
            removed += [(path.name, "left by a build that did not succeed") for path in store.left_overs()]
            if options.all:
                removed += [(path.name, "asked for") for path in store.timing_caches()]
            if not options.dry_run:
                for name, _ in removed:
                    store.remove(store.folder / name)
    if options.json:
        entries = [{"name": name, "reason": reason} for name, reason in removed]
        print(json.dumps({"plans": str(store.folder), "dry_run": options.dry_run, "removed": entries}))
        return 0
    console = Console()
    for name, reason in removed:
        console.print(f"{'would remove' if options.dry_run else 'removed'} {name}: {reason}", soft_wrap=True, markup=False)
    if not removed:
        console.print(f"{store.folder}: nothing to remove", soft_wrap=True, markup=False)
    return 0


def _this_machine():
    """None where nobody can tell which plans fit, because there is no GPU or no TensorRT."""
    from factorportrait.engines.tensorrt.machine import probe

    try:
        return probe("TensorRT plans")
    except UserError:
        return None


def _entry(plan, status) -> dict:
    parts = plan.parts
    return {
        "bundle": plan.bundle, "stage": plan.stage, "bytes": plan.bytes, "key": parts.key, "gpu": parts.gpu, "sm": parts.sm,
        "tensorrt": parts.tensorrt, "os": parts.os, "flags": parts.flags, "built": time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(plan.built)
        ), "age_s": round(plan.age_s), "build_seconds": plan.seconds, "file": str(plan.file), "state": status.state,
        "reason": status.reason,
    }  # fmt: skip


def _add_plans_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plans", type=Path, metavar="DIR", help="folder of the plans (default: a folder of the user's cache)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return number


def _age(seconds: float) -> str:
    for unit, length in (("d", DAY_S), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
