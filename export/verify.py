"""`fp-export verify BUNDLE`: every graph on every engine that runs here, against the fp32 reference on inputs of a real run.

Polygraphy's comparator is not used: it runs models in sessions of its own, with separate memory for every input and output. What is
verified here is the code that is deployed, bound buffers and caches in place included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorportrait.bundle import Bundle, StageSpec, read_arrays
from factorportrait.errors import UserError
from factorportrait.files import sha256_file, whole_file
from factorportrait.model_config import FRAMES_PER_LATENT
from factorportrait.shipped import cache_folder, shipped_inputs

if TYPE_CHECKING:
    from factorportrait.engines.base import Arrays, Engine

CASES_PER_STAGE = 3  # the first runs and the last one
STEPS, SEED = 2, 0
# Of the shipped inputs: a mesh with pictures, and coefficients for the expression.
_CLIP, _COEFFICIENTS = "driving_clip", "arkit.csv"


@dataclass(frozen=True)
class Comparison:
    """One stage on one engine: the largest errors over all cases and outputs.

    Attributes:
        output: where the relative error is largest.
        max_abs, max_relative: max|a-b| and max|a-b| / max|b|; infinite where a number is not finite.
        cosine: smallest.
        psnr_db: smallest, its peak the range of the reference; infinite where both are equal.
        num_not_finite: numbers of the engine that are NaN or infinite.
        passed: within the thresholds of the bundle's precision.
    """

    engine: str
    stage: str
    output: str
    max_abs: float
    max_relative: float
    cosine: float
    psnr_db: float
    num_not_finite: int
    num_cases: int
    passed: bool


def parser(command: str) -> argparse.ArgumentParser:
    """Options of `fp-export verify`."""
    parser = argparse.ArgumentParser(
        prog=f"{command} verify",
        description="Run every graph of a bundle on every engine that works here, and compare with fp32 on inputs of a real run. "
        "Exit code 1 when an error exceeds what the precision is allowed.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--engine", action="append", metavar="NAME", help="only this engine; may be given again (default: all that run here)"
    )
    parser.add_argument("--reference", type=Path, metavar="BUNDLE", help="fp32 bundle of the same checkpoint to compare with")
    parser.add_argument(
        "--checkpoint", type=Path, help="compare with PyTorch in fp32 on this folder (default: the demo's, if it is the bundle's)"
    )
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this stage; may be given again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def run(options: argparse.Namespace) -> int:
    """Verify, print the table, and return the exit code."""
    from rich.console import Console

    bundle = Bundle(options.bundle)
    _check_recordable(bundle)
    bundle.verify()
    reference = reference_engine(bundle, options.reference, options.checkpoint)
    engines = options.engine or present_engines(bundle, reference)
    console = Console()
    precision = bundle.manifest.precision
    console.print(f"reference: {reference.name} in fp32; {bundle.path} is {precision}", soft_wrap=True, markup=False)
    comparisons = list(verify(bundle, reference, engines, stages=options.stage))
    for engine in engines:
        console.print(_table(engine, [comparison for comparison in comparisons if comparison.engine == engine]))
    failed = [comparison for comparison in comparisons if not comparison.passed]
    compared = {comparison.stage for comparison in comparisons}
    left_out = [stage for stage in options.stage or bundle.manifest.stages if stage not in compared]
    if left_out:
        line = f"not compared, because the recorded runs do not use it: {', '.join(left_out)}"
        console.print(line, soft_wrap=True, markup=False)
    if options.json:
        report = {
            "bundle": bundle.manifest.source_key, "precision": precision, "reference": reference.name,
            "passed": not failed, "not_compared": left_out,
            "comparisons": [_finite(asdict(comparison)) for comparison in comparisons],
        }  # fmt: skip
        with whole_file(options.json) as file:
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for comparison in failed:
        line = f"{comparison.engine}: {comparison.stage}: {comparison.output} exceeds what {precision} is allowed"
        console.print(line, soft_wrap=True, markup=False)
    return 1 if failed else 0


def _check_recordable(bundle: Bundle) -> None:
    """Raises UserError unless a run on the shipped inputs uses the bundle's stages as they are."""
    from factorportrait.engines.chain import stage_names

    stages = bundle.manifest.stages
    if not bundle.config.conditioning.shows_expression or stage_names(stages) != set(stages):
        raise UserError(
            f"verify {bundle.path}", expected="FactorPortrait with its transformer in one graph",
            found=f"{bundle.config.system} in {len(stages)} graphs",
            action="fp-export inspect BUNDLE prints how far each graph was from torch when it was exported",
        )  # fmt: skip


def verify(
    bundle: Bundle, reference: Engine, engines: Sequence[str], stages: Sequence[str] | None = None
) -> Iterator[Comparison]:
    """Compare stage by stage on recorded inputs.

    Args:
        reference: gives what is right, see `reference_engine`.
        engines: names of engines.
        stages: only these; None for all.

    Raises:
        UserError: an engine cannot run, or there is no such stage.
    """
    from factorportrait.engines.choose import open_engine

    known = bundle.manifest.stages
    for name in stages or ():
        if name not in known:
            raise UserError(f"--stage {name}", expected=f"one of {', '.join(known)}", found="no such stage", action="choose one")
    cases = recorded_inputs(bundle, reference)
    limit = _threshold(bundle.manifest.precision)
    expected: dict[tuple[str, int], Arrays] = {}
    for name in engines:
        engine, _ = open_engine(bundle, name)
        for stage in stages or known:
            found_and_expected = []
            for i, case in enumerate(cases.get(stage, [])):
                if (stage, i) not in expected:
                    expected[stage, i] = _results(reference, stage, case, "fp32")
                found = _results(engine, stage, case, bundle.manifest.precision)
                found_and_expected.append((found, expected[stage, i]))
            if found_and_expected:
                yield compare(name, stage, found_and_expected, limit)


def _results(engine: Engine, stage: str, case: Arrays, precision: str) -> dict[str, np.ndarray]:
    """What an engine makes of a case; caches have channels first here, as they were recorded."""
    from factorportrait.engines.base import run_once
    from factorportrait.export.quantize.bundles import has_channels_last
    from factorportrait.export.quantize.layout import TO_FIRST, TO_LAST

    moved = has_channels_last(precision, engine.target, stage)
    given = _permuted(case, TO_LAST) if moved else case
    found = run_once(engine, stage, _fitting(given, engine.load(stage).spec))
    return _permuted(found, TO_FIRST) if moved else found


def _permuted(arrays: Arrays, order: tuple[int, ...]) -> dict[str, np.ndarray]:
    """With the axes of the VAE's caches in another order."""
    return {
        name: array.transpose(order) if name.startswith(("cache_in.", "cache_out.")) else array for name, array in arrays.items()
    }


def compare(engine: str, stage: str, cases: Sequence[tuple[Arrays, Arrays]], limit: Mapping[str, float]) -> Comparison:
    """Errors of a stage: pairs of what was found and what is right, by output; `limit` has max_relative and max_angle."""
    worst, output, max_abs, cosine, psnr, not_finite = -1.0, "", 0.0, 1.0, np.inf, 0
    for found, expected in cases:
        for name, right in expected.items():
            # A cache of fixed size has slots behind what is used.
            a = found[name][tuple(slice(size) for size in right.shape)].astype(np.float64)
            b = right.astype(np.float64)
            bad = int((~np.isfinite(a)).sum())
            not_finite += bad
            difference = np.abs(a - b)
            peak = float(np.abs(b).max(initial=0.0))
            absolute = np.inf if bad else float(difference.max(initial=0.0))
            relative = absolute / peak if peak else (np.inf if absolute else 0.0)
            if relative > worst:
                worst, output = relative, name
            max_abs = max(max_abs, absolute)
            norms = float(np.linalg.norm(a) * np.linalg.norm(b))
            if bad:
                cosine, psnr = -1.0, -np.inf
            elif absolute:
                cosine = min(cosine, float(a.ravel() @ b.ravel()) / norms if norms else 0.0)
                spread = float(b.max() - b.min()) or peak or 1.0
                psnr = min(psnr, 20 * np.log10(spread / np.sqrt(np.mean(difference**2))))
    passed = not not_finite and worst <= limit["max_relative"] and 1 - cosine <= limit["max_angle"]
    return Comparison(engine, stage, output, max_abs, worst, cosine, float(psnr), not_finite, len(cases), passed)


def reference_engine(bundle: Bundle, reference: Path | None = None, checkpoint: Path | None = None) -> Engine:
    """What is right: an fp32 bundle in ONNX Runtime on the CPU, or PyTorch in fp32 on a checkpoint. With neither, the shipped
    checkpoint if it is the bundle's, and at last the bundle itself if it is fp32.

    Raises:
        UserError: there is none, or it belongs to another checkpoint.
    """
    from factorportrait.engines.ort import OrtEngine
    from factorportrait.engines.pytorch import TorchEngine

    if reference is not None:
        other = Bundle(reference)
        sources = [each.manifest.provenance.get("checkpoint_files") for each in (other, bundle)]
        if other.manifest.precision != "fp32" or sources[0] != sources[1]:
            raise UserError(
                f"--reference {reference}", expected="an fp32 bundle of the same checkpoint",
                found=f"{other.manifest.precision} of {other.manifest.provenance.get('checkpoint', '?')}",
                action="export one: fp-export CHECKPOINT --precision fp32",
            )  # fmt: skip
        return OrtEngine(other)
    try:
        return TorchEngine(bundle, checkpoint, device="cpu", dtype="float32")
    except UserError:
        if checkpoint is not None or bundle.manifest.precision != "fp32" or "cpu" not in bundle.manifest.targets:
            raise
    return OrtEngine(bundle)


def present_engines(bundle: Bundle, reference: Engine) -> list[str]:
    """Engines that run this bundle here; not the one that would be compared with itself.

    Raises:
        UserError: there is none.
    """
    from factorportrait.engines.choose import NAMES, choose, obstacle

    if "cpu" not in bundle.manifest.targets:
        choose(bundle)  # says what keeps each engine from running it
    same = reference.name if getattr(reference, "bundle", None) is bundle else None
    names = [name for name in NAMES if name not in (same, "torch") and obstacle(name, bundle) is None]
    if not names:
        raise UserError(
            f"verify {bundle.path}", expected="an engine to compare with the reference", found=f"only {reference.name} itself",
            action="name the checkpoint with --checkpoint, or an fp32 bundle with --reference",
        )  # fmt: skip
    return names


def recorded_inputs(bundle: Bundle, reference: Engine) -> dict[str, list[dict[str, np.ndarray]]]:
    """Per stage, inputs of a real run on the shipped portrait and driving: kept in the user's cache by content.

    Both modes that the bundle has, both kinds of driving and both kinds of cache are run, in the reference.
    """
    identity = {
        "checkpoint": bundle.manifest.provenance.get("checkpoint_files"), "config": bundle.config.to_dict(),
        "stages": sorted(bundle.manifest.stages), "cases": CASES_PER_STAGE, "steps": STEPS, "seed": SEED,
        "portrait": sha256_file(shipped_inputs() / "portrait.png"),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "verify" / f"{key}.npz"
    if not file.is_file():
        kept = _record(bundle, reference)
        with whole_file(file) as path, zipfile.ZipFile(path, "w") as archive:
            for stage, cases in sorted(kept.items()):
                for i, case in enumerate(cases):
                    for name, array in case.items():
                        with archive.open(f"{stage}/{i}/{name}.npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, array, allow_pickle=False)
    try:
        arrays = read_arrays(file)
    except ValueError as error:
        raise UserError(f"recorded inputs {file}", expected="a whole .npz", found=str(error), action="remove it") from error
    cases: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, array in arrays.items():
        stage, number, tensor = name.split("/", 2)
        cases.setdefault(stage, {}).setdefault(number, {})[tensor] = array
    return {stage: list(numbered.values()) for stage, numbered in cases.items()}


def _record(bundle: Bundle, reference: Engine) -> dict[str, list[dict[str, np.ndarray]]]:
    from factorportrait.engines.recording import RecordingEngine
    from factorportrait.runtime.inputs import open_inputs
    from factorportrait.runtime.media.portrait import load_portrait
    from factorportrait.runtime.session import OpenBundle

    kept: dict[str, list[dict[str, np.ndarray]]] = {}

    def show(stage: str, inputs: Arrays) -> None:
        cases = kept.setdefault(stage, [])
        del cases[CASES_PER_STAGE - 1 :]
        cases.append({name: np.array(array) for name, array in inputs.items()})

    config, inputs = bundle.config, shipped_inputs()
    generation = config.generation
    opened = OpenBundle(bundle, RecordingEngine(reference, show))
    portrait = load_portrait(inputs / "portrait.png", config.height, config.width)
    whole_window = generation.window_frames // generation.chunk_frames * generation.chunk_frames
    runs = [("clip", "concat", _CLIP)] if "clip" in generation.modes else []
    if "stream" in generation.modes:
        runs += [("stream", "concat", _COEFFICIENTS)]
        if "dit_inplace" in bundle.manifest.stages:
            runs += [("stream", "inplace", _CLIP)]
    for mode, cache, expression in runs:
        frames = min(generation.max_clip_frames, 3) if mode == "clip" else whole_window + generation.chunk_frames
        session = opened.session(
            mode=mode, cache=cache, steps=STEPS, seed=SEED, window_frames=whole_window, embedding="graph"
        )  # fmt: skip
        session.set_reference(portrait)
        driving = open_inputs(
            bundle, inputs / _CLIP, expression_from=inputs / expression, num_frames=1 + FRAMES_PER_LATENT * (frames - 1)
        )
        for _ in session.frames(driving):
            pass
    return kept


def _fitting(case: Arrays, spec: StageSpec) -> dict[str, np.ndarray]:
    """A case with the types of a stage, and padded with zeros where the stage has a cache of fixed size."""
    fitting = {}
    for tensor in spec.inputs:
        array = case[tensor.name].astype(tensor.dtype, copy=False)
        missing = [
            (0, wanted - size if isinstance(wanted, int) else 0) for wanted, size in zip(tensor.shape, array.shape, strict=True)
        ]
        fitting[tensor.name] = np.pad(array, missing) if any(after > 0 for _, after in missing) else array
    return fitting


def _threshold(precision: str) -> dict[str, float]:
    # Not check.threshold, which brings torch along: a bundle can be verified against another one without it.
    return tomllib.loads(Path(__file__).with_name("thresholds.toml").read_text(encoding="utf-8"))[precision]


def _finite(comparison: dict) -> dict:
    """JSON has no infinity: null for a perfect PSNR and for errors that cannot be told."""
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in comparison.items()
    }


def _table(engine: str, comparisons: Sequence[Comparison]):
    """Less than eighty columns wide, so one per engine."""
    from rich.table import Table

    table = Table(title=engine, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    for column in ("absolute", "relative", "1-cos", "PSNR dB", "NaN", "cases", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for each in comparisons:
        table.add_row(
            each.stage, f"{each.max_abs:.1e}", f"{each.max_relative:.1e}", f"{max(0.0, 1 - each.cosine):.0e}",
            f"{each.psnr_db:.1f}", str(each.num_not_finite), str(each.num_cases), "ok" if each.passed else "FAILED",
        )  # fmt: skip
    return table
