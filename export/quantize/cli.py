"""fp-export's share of quantisation: options, the int8 export, and the gate of the other precisions. Light to import."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from factorportrait.errors import UserError
from factorportrait.export.quantize.gate import GateFailed, GateResult, gate_table

if TYPE_CHECKING:
    from factorportrait.bundle import Bundle
    from factorportrait.export.build import BuildReport
    from factorportrait.export.quantize.build import Outcome

# The only precisions whose videos differ from fp32's, and those whose graphs the float export writes.
JUDGED = ("fp16", "int8-weights")
# Checkpoints of demo/train carry this name; the demo's world has clips for them, and the truth.
DEMO_CHECKPOINT = "factorportrait-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fp-export` that concern quality."""
    parser.add_argument(
        "--max-quality-loss-db", type=_decibel, metavar="DB",
        help="most that may be lost against true renders; in int8 layers stay in float until it is met (default: that of the "
        "precision in export/quantize/gates.toml, for int8 0.3)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR",
        help="clips to calibrate and judge with: DIR/NAME/portrait.png and DIR/NAME/driving.mp4 or any driving that fp-run takes "
        "(default: rendered people of the demo's world, for checkpoints that were trained on it)",
    )  # fmt: skip
    parser.add_argument("--skip-gate", action="store_true", help="do not judge the bundle's videos against those of fp32")


def _decibel(text: str) -> float:
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"expected more than 0 and less than 100 dB, found {text}")
    return value


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for a budget that nothing would be held to."""
    if options.max_quality_loss_db is None:
        return
    against = {
        "fp32 loses nothing": options.precision == "fp32",
        "fp8 can only be judged on hardware": options.precision == "fp8",
        "clips of --calibration have no true renders": options.calibration is not None,
        "--skip-gate": options.skip_gate,
    }
    for found, is_so in against.items():
        if is_so:
            raise UserError(
                "--max-quality-loss-db", expected="a loss against true renders that is measured", found=found,
                action="leave the option out",
            )  # fmt: skip


def export_int8(
    options: argparse.Namespace, checkpoint: Path, output: Path, targets: tuple[str, ...], say: Callable[[str], None]
) -> tuple[BuildReport, Outcome]:
    """What `fp-export --precision int8` does.

    Raises:
        GateFailed, UserError: see `build.export_int8`; or there is no --calibration and the demo's world was not made for this.
    """
    from factorportrait.export import build
    from factorportrait.export.quantize.build import Options
    from factorportrait.export.quantize.build import export_int8 as export

    started = time.perf_counter()
    if options.calibration is None and not _is_demo(checkpoint):
        raise UserError(
            "--precision int8", expected="clips to calibrate with", found="a checkpoint that the demo's world was not made for",
            action="name a folder with --calibration DIR (see fp-export --help)",
        )  # fmt: skip
    chosen = Options(options.max_quality_loss_db, options.calibration, gate=not options.skip_gate)
    outcome = export(checkpoint, output, targets, chosen, force=options.force, say=say)
    return build.report_of(outcome.bundle, outcome.up_to_date, started), outcome


def judge_for(options: argparse.Namespace, checkpoint: Path, targets: tuple[str, ...]) -> Callable[[Bundle], dict] | None:
    """The gate of a float export: called with the bundle before it gets its name. None where it is skipped or cannot run."""
    if options.precision not in JUDGED or options.skip_gate:
        return None
    if "cpu" not in targets:
        _tell("quality not judged: the bundle has no graphs for the CPU, where fp32 runs")
        return None
    if options.calibration is None and not _is_demo(checkpoint):
        _tell("quality not judged: the demo's world has no clips for this checkpoint (--calibration DIR names some)")
        return None
    if options.calibration is None and not _has_world():
        _tell("quality not judged: true renders need a checkout with its extra [demo] (--calibration DIR names other clips)")
        return None

    def judge(bundle: Bundle) -> dict:
        from factorportrait.export.quantize.build import float_bundle
        from factorportrait.export.quantize.gate import Judge, gate_clips, load_limits

        fp32 = float_bundle(checkpoint, "fp32", "cpu")
        limits = load_limits(options.precision, options.max_quality_loss_db)
        result = Judge(fp32, gate_clips(fp32, options.calibration)).compare(bundle, limits)
        if not result.passed:
            raise GateFailed(result, "export fp32, or look for the layer in export/precision.toml that has to stay in fp32")
        return result.to_dict()

    return judge


def print_outcome(console: Console, outcome: Outcome) -> None:
    """What quantising cost."""
    from factorportrait.export.quantize.sensitivity import REPORT, costs_table

    if outcome.plan is not None:
        console.print(costs_table(outcome.plan.costs))
        mix = outcome.plan.provenance["mix"]
        left = ", ".join(mix["left_in_float"]) or "nothing"
        console.print(f"left in float beyond layers.toml to meet the budget: {left}", soft_wrap=True, markup=False)
        report = outcome.bundle.path / REPORT
        console.print(f"what each group costs, all of them: {report}", soft_wrap=True, markup=False)
    if outcome.gate is not None:
        print_gate(console, outcome.gate)


def print_gate(console: Console, result: GateResult) -> None:
    """The gate's figures."""
    console.print(gate_table(result))


def gate_line(bundle: Bundle) -> str:
    """What the gate found of a bundle at its export, "" where nothing was judged."""
    gate = bundle.manifest.provenance.get("gate")
    if not gate:
        return ""
    loss = "" if gate["loss_db"] is None else f", {gate['loss_db']:.3f} dB lost against true renders"
    clips = len({row["clip"] for row in gate["clips"]})
    return f"quality: {gate['psnr_db']:.1f} dB between its videos and fp32's ({clips} clips){loss}"


def to_dict(outcome: Outcome) -> dict:
    """For --json: what the manifest keeps of calibration, mix and gate, and the sensitivity report of a new plan."""
    provenance = outcome.bundle.manifest.provenance
    costs = [] if outcome.plan is None else [cost.to_dict() for cost in outcome.plan.costs]
    return {"quantization": provenance.get("quantization"), "gate": provenance.get("gate"), "sensitivity": costs}


def _is_demo(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("name") == DEMO_CHECKPOINT
    except (OSError, ValueError, AttributeError):
        return False


def _has_world() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in ("demo.dataset", "warp"))
    except ImportError:
        return False


def _tell(line: str) -> None:
    Console(stderr=True).print(line, soft_wrap=True, markup=False)
