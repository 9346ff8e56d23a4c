"""`fp-export --precision int8`: record, measure, choose, write, judge; everything that takes long is kept in the user's cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from factorportrait.bundle import CONSTANTS, MANIFEST, Bundle, FileEntry, Manifest, StageSpec
from factorportrait.checkpoint_files import HEAD
from factorportrait.errors import UserError
from factorportrait.export.quantize.bundles import has_channels_last, int8_graph, write_trial
from factorportrait.export.quantize.clips import CALIBRATION_SPLIT, DrivenClip, demo_clips, longest_clip, media_clips
from factorportrait.export.quantize.gate import GateFailed, GateResult, Judge, gate_clips, load_limits
from factorportrait.export.quantize.insert import LayerRecipe
from factorportrait.export.quantize.layout import TO_FIRST, TO_LAST
from factorportrait.export.quantize.mix import choose_mix, ranked
from factorportrait.export.quantize.recipe import FAMILIES, Recipe, exact_weights, make_recipe, observe
from factorportrait.export.quantize.samples import RECORD_AGAIN, RecordSettings, Samples, record_samples
from factorportrait.export.quantize.sensitivity import PROBES, REPORT, Cost, families_of, measure_costs, write_report
from factorportrait.files import sha256_file, whole_file, whole_folder
from factorportrait.shipped import cache_folder

if TYPE_CHECKING:
    from factorportrait.export.check import GraphCheck
    from factorportrait.export.graphs import WeightFiles

CALIBRATION_CLIPS = 4
CALIBRATION_FRAMES = 29
# A mix is chosen with the first of the calibration's clips; test clips are for the gate alone.
CHOICE_CLIPS = 2
GRAPH_SAMPLES = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a user may choose.

    Attributes:
        max_loss_db: most that may be lost against the truth; None takes gates.toml.
        calibration: folder of clips; None for the demo's world. The gate then takes the same clips, which have no truth.
        gate: judge the bundle before it gets its name.
        threads: of the runs.
    """

    max_loss_db: float | None = None
    calibration: Path | None = None
    gate: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What `export_int8` did; `gate` and `plan` are None when nothing had changed, `gate` also when it was skipped."""

    bundle: Bundle
    up_to_date: bool
    plan: Plan | None = None
    gate: GateResult | None = None


@dataclass(frozen=True)
class Measured:
    """What calibration found, whatever the budget is.

    Attributes:
        recipe: of every layer, as layers.toml wants it.
        costs: the sensitivity report.
        alone: figures of the videos with one network quantised alone, by its name.
    """

    recipe: Recipe
    costs: tuple[Cost, ...]
    alone: Mapping[str, Mapping]


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is quantised, and why.

    Attributes:
        recipe: of every layer, those that the budget leaves in float among them.
        costs: the sensitivity report.
        provenance: for the manifest.
    """

    recipe: Recipe
    costs: tuple[Cost, ...]
    provenance: Mapping


def export_int8(
    checkpoint: Path,
    output: Path,
    targets: tuple[str, ...],
    options: Options | None = None,
    *,
    cache: Path | None = None,
    force: bool = False,
    say: Say = lambda line: None,
) -> Outcome:
    """Checkpoint -> int8 bundle for "cpu" and, if named, "tensorrt".

    Args:
        cache: for float bundles, samples and plans; None for a folder of the user's cache.
        force: write the bundle though nothing changed; samples and plan are still taken from the cache.

    Raises:
        GateFailed: no mix of layers meets the budget, or the test clips say otherwise than the calibration's.
        UserError: checkpoint or calibration cannot be used, or the output cannot be written.
    """
    from factorportrait.export.build import bundle_with, check_output

    options = options or Options()
    cache = cache or cache_folder() / "quantize"
    check_output(output)
    if "cpu" not in targets:
        say("the CPU's graphs are written as well: the judge runs them")
    floats = {}
    for precision, target in (("fp32", "cpu"), *((("fp16", "tensorrt"),) if "tensorrt" in targets else ())):
        say(f"export {precision} for {target}")
        floats[precision] = float_bundle(checkpoint, precision, target, cache)
    key = _source_key(floats.values(), options)
    if not force and (old := bundle_with(output, key)) is not None:
        return Outcome(old, True)
    fp32 = floats["fp32"]
    say("calibrate: clips")
    clips = calibration_clips(fp32, options.calibration)
    plan = make_plan(fp32, clips, cache, max_loss_db=options.max_loss_db, threads=options.threads, say=say)
    judge = None
    if options.gate:
        say("gate: fp32")
        judge = Judge(fp32, gate_clips(fp32, options.calibration), threads=options.threads)
    samples = Samples(fp32, cache / "samples" / plan.provenance["calibration"]["samples"])
    say("write and judge")
    result = write_int8_bundle(
        fp32, floats.get("fp16"), plan, output, samples, source_key=key, judge=judge, max_loss_db=options.max_loss_db
    )
    return Outcome(Bundle(output), False, plan, result)


def float_bundle(checkpoint: Path, precision: str, target: str, cache: Path | None = None) -> Bundle:
    """The bundle of a checkpoint for one target in the user's cache, exported if it is not there or not of this version."""
    from factorportrait.export.build import build_bundle

    name = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:12]
    folder = (cache or cache_folder() / "quantize") / "bundles" / f"{name}-{precision}-{target}"
    return Bundle(build_bundle(checkpoint, folder, precision=precision, targets=(target,)).path)


def _source_key(bundles: Iterable[Bundle], options: Options) -> str:
    """Of everything that an int8 bundle depends on; the float bundles' keys cover checkpoint and sources."""
    folder = options.calibration
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder is not None and folder.is_dir() else []
    parts = {
        "bundles": [bundle.manifest.source_key for bundle in bundles], "max_loss_db": options.max_loss_db, "gate": options.gate,
        "calibration": [(str(path.relative_to(folder)), sha256_file(path)) for path in files],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def calibration_clips(bundle: Bundle, folder: Path | None) -> list[DrivenClip]:
    """Validation people of the demo's world, or a user's own clips."""
    frames = min(CALIBRATION_FRAMES, longest_clip(bundle.config))
    if folder is not None:
        return media_clips(bundle, folder, frames)
    return demo_clips(bundle.config, CALIBRATION_SPLIT, CALIBRATION_CLIPS, frames)


def make_plan(
    fp32: Bundle,
    clips: list[DrivenClip],
    cache: Path,
    *,
    max_loss_db: float | None = None,
    settings: RecordSettings | None = None,
    threads: int | None = None,
    say: Say = lambda line: None,
) -> Plan:
    """Record samples, make a recipe, measure what its layers cost, and leave as many in float as the budget needs.

    Args:
        cache: for samples, what was measured with them (whatever the budget) and mixes, each kept by what it was made from.
        max_loss_db: instead of the one in gates.toml.
        say: told what is done.

    Raises:
        GateFailed: no mix meets the budget; it has the best figures that were reached.
        UserError: the calibration cannot be used.
    """
    limits = load_limits("int8", max_loss_db)
    samples = record_samples(
        fp32, clips, cache / "samples", settings, threads=threads, on_clip=lambda i, n: say(f"calibrate: clip {i} of {n}")
    )
    key = _digest([fp32.manifest.source_key, samples.key])
    measured_file, report = cache / "measured" / f"{key}.json", cache / "measured" / f"{key}.csv"
    judge = Judge(fp32, clips[:CHOICE_CLIPS], threads=threads)
    with tempfile.TemporaryDirectory() as folder:

        def evaluate(candidate: Recipe) -> GateResult:
            return judge.compare(write_trial(fp32, candidate, Path(folder) / "trial"), limits)

        if not measured_file.is_file():
            _write_json(measured_file, _measured_to_dict(_measure(fp32, samples, evaluate, say)))
        measured = _read_measured(measured_file)
        mixes = cache / "mixes" / f"{_digest([key, limits.min_psnr_db, limits.max_loss_db])}.json"
        if not mixes.is_file():
            with whole_file(report) as path:
                write_report(path, measured.costs, measured.recipe)
            errors = {family: 10 ** (-figures["psnr_db"] / 10) for family, figures in measured.alone.items()}
            mix = choose_mix(
                measured.recipe, ranked(measured.costs, errors), evaluate,
                lambda count, result: say(f"mix: {count} groups in float: {result.psnr_db:.1f} dB"),
            )  # fmt: skip
            if not mix.result.passed:
                raise GateFailed(
                    mix.result,
                    "allow more with --max-quality-loss-db, or export fp16; these are the best figures of any mix, and what each "
                    f"group of layers costs is in {report}",
                )
            _write_json(mixes, {"left_in_float": list(mix.in_float), **_figures(mix.result)})
    mix = json.loads(mixes.read_text(encoding="utf-8"))
    left = [layer for cost in measured.costs if cost.group in mix["left_in_float"] for layer in cost.layers]
    calibration = {"samples": samples.key, "clips": [clip.name for clip in clips]}
    provenance = {"calibration": calibration, "alone": dict(measured.alone), "mix": mix}
    return Plan(measured.recipe.without(left), measured.costs, provenance)


def _measure(fp32: Bundle, samples: Samples, evaluate: Callable[[Recipe], GateResult], say: Say) -> Measured:
    graphs = {name: fp32.file(spec.file) for name, spec in fp32.manifest.target_stages("cpu").items()}
    recorded = _recorded(samples, graphs)
    say("calibrate: scales")
    recipe = make_recipe(graphs, observe(graphs, recorded), fp32.config.dit.num_layers)
    costs = measure_costs(graphs, recorded, recipe, on_group=lambda i, n: say(f"sensitivity: group {i} of {n}"))
    alone = {}
    for family in families_of(recipe):
        say(f"sensitivity: {family} alone")
        others = [layer for layer in recipe.candidates if not layer.startswith(f"{family}/")]
        alone[family] = _figures(evaluate(recipe.without(others)))
    return Measured(recipe, tuple(costs), alone)


def write_int8_bundle(
    fp32: Bundle,
    fp16: Bundle | None,
    plan: Plan,
    output: Path,
    samples: Samples,
    *,
    source_key: str,
    judge: Judge | None,
    max_loss_db: float | None = None,
) -> GateResult | None:
    """Write an int8 bundle: its graphs for the CPU from the fp32 bundle, those for TensorRT from the fp16 one.

    Args:
        fp16: with graphs for TensorRT; None for the CPU alone.
        judge: of the gate; None skips it.

    Raises:
        GateFailed: the bundle is worse than its precision may be; nothing is written.
        GraphsRefused: a graph is far from fp32 on its own calibration samples, or overflows.
    """
    from factorportrait.export.graphs import WeightFiles

    result = None
    with whole_folder(output) as folder:
        weights = {family: WeightFiles(folder, family) for family in {FAMILIES.get(name, name) for name in fp32.manifest.stages}}
        checks: dict[str, GraphCheck] = {}
        stages = _write_stages(fp32, fp32, "cpu", plan.recipe, weights, samples, checks)
        variants = {}
        if fp16 is not None:
            variants["tensorrt"] = _write_stages(fp16, fp32, "tensorrt", plan.recipe, weights, samples, checks)
        _refuse_bad(checks)
        for name in (CONSTANTS, HEAD):
            if name in fp32.manifest.files:
                (folder / name).write_bytes(fp32.file(name).read_bytes())
        write_report(folder / REPORT, plan.costs, plan.recipe)
        files = {path.name: FileEntry(sha256_file(path), path.stat().st_size) for path in sorted(folder.iterdir())}
        provenance = {**fp32.manifest.provenance, "quantization": dict(plan.provenance)}

        def write_manifest() -> None:
            manifest = Manifest(
                config=fp32.config, precision="int8", stages=stages, files=files, provenance=provenance, source_key=source_key,
                targets=("cpu", *variants), variants=variants,
            )  # fmt: skip
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

        write_manifest()
        if judge is not None:
            result = judge.compare(Bundle(folder), load_limits("int8", max_loss_db))
            if not result.passed:
                raise GateFailed(result, "allow more with --max-quality-loss-db, or export fp16")
            provenance["gate"] = result.to_dict()
            write_manifest()
    return result


def _write_stages(
    source: Bundle,
    fp32: Bundle,
    target: str,
    recipe: Recipe,
    weights: Mapping[str, WeightFiles],
    samples: Samples,
    checks: dict[str, GraphCheck],
) -> dict[str, StageSpec]:
    """Quantise the graphs of a target, which the bundle `source` holds in its float type, and compare them with those.

    Args:
        checks: gets the errors of each graph, by the name of its file.
    """
    # Late: graphs.py brings torch along.
    from factorportrait.export.graphs import tensor_specs, write_graph

    found = {}
    suffix = "" if target == "cpu" else f".{target}"
    for name, spec in source.manifest.target_stages(target).items():
        model = ir.load(source.file(spec.file))
        whole = None if source is fp32 else ir.load(fp32.file(fp32.stage(name, "cpu").file))
        int8_graph(name, model, recipe, target, None if whole is None else exact_weights(name, model, whole))
        inputs, outputs = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs)
        family = weights[FAMILIES.get(name, name)]
        file, *data = write_graph(model, family.folder, name + suffix, family)
        check = _check(family.folder / file, source.file(spec.file), _cases(samples, spec), name, target)
        checks[name + suffix] = check
        found[name] = StageSpec(name, file, inputs, outputs, check.to_dict(), tuple(data))
    return found


def _refuse_bad(checks: Mapping[str, GraphCheck]) -> None:
    """Raises GraphsRefused unless all graphs are within the thresholds of int8."""
    from factorportrait.export.build import GraphsRefused
    from factorportrait.export.check import threshold

    limit = threshold("int8")
    objections = {name: objection for name, check in checks.items() if (objection := check.objection(limit))}
    if objections:
        name, (expected, found) = next(iter(objections.items()))
        more = f" (and {len(objections) - 1} more graphs)" if len(objections) > 1 else ""
        raise GraphsRefused(
            f"stage {name} in int8 differs from the float graph{more}", expected=expected, found=found,
            action="calibrate with clips like those that it will run, or export fp16",
            checks={name: check.to_dict() for name, check in checks.items()}, refused=tuple(objections),
        )  # fmt: skip


def _cases(samples: Samples, spec: StageSpec) -> list[dict[str, np.ndarray]]:
    """Some of a stage's samples, from all over the recording; none for a stage that the clips do not run."""
    recorded = samples.of(spec.name)
    if not recorded and spec.name == "arkit_encoder":
        # Clips of pictures give no coefficients, which are numbers from 0 to 1. Nothing is calibrated with these.
        drawn = np.random.default_rng(0).uniform(0, 1, (4, *spec.inputs[0].shape[1:])).astype(np.float32)
        return [{spec.inputs[0].name: rows} for rows in (drawn[:1], drawn, np.zeros_like(drawn))]
    places = np.linspace(0, len(recorded) - 1, min(len(recorded), GRAPH_SAMPLES)).round().astype(int)
    return [recorded[at] for at in places]


def _check(path: Path, reference: Path, cases: Sequence[Mapping[str, np.ndarray]], stage: str, target: str) -> GraphCheck:
    """An int8 graph against the float graph that it was made of, all outputs, and the room that its fp16 tensors leave."""
    import onnxruntime

    from factorportrait.export.activations import largest_activations
    from factorportrait.export.check import GraphCheck, angle, relative_error
    from factorportrait.export.precision import HALF_MAX

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    rounded, whole = (onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"]) for file in (path, reference))
    moved = has_channels_last("int8", target, stage)
    names = [value.name for value in whole.get_outputs()]
    max_abs = worst = max_angle = 0.0
    worst_output = names[0]
    for case in cases:
        found, expected = rounded.run(names, _fed(rounded, case, moved)), whole.run(names, _fed(whole, case, False))
        for name, a, b in zip(names, found, expected, strict=True):
            if moved and name.startswith("cache_out."):
                a = a.transpose(TO_FIRST)
            absolute, relative = relative_error(a, b)
            max_abs = max(max_abs, absolute)
            if relative >= worst:
                worst, worst_output = relative, name
            if np.isfinite(relative):
                max_angle = max(max_angle, angle(a, b))
    check = GraphCheck(max_abs, worst, worst_output, len(cases), max_angle)
    sizes = largest_activations(path, [_fed(rounded, case, moved) for case in cases]) if target == "tensorrt" and cases else {}
    if sizes:
        # A NaN is the worst of all: it sorts nowhere.
        hottest = max(sizes, key=lambda name: np.nan_to_num(sizes[name], nan=np.inf))
        check = dataclasses.replace(check, headroom=HALF_MAX / sizes[hottest] if sizes[hottest] else None, hottest=hottest)
    return check


def _fed(session, case: Mapping[str, np.ndarray], channels_last: bool) -> dict[str, np.ndarray]:
    """A case as a graph takes it: caches with channels last, half precision, zeros behind what is used of a fixed size."""
    feeds = {}
    for value in session.get_inputs():
        array = case[value.name]
        if channels_last and value.name.startswith("cache_in."):
            array = array.transpose(TO_LAST)
        sizes = zip(value.shape, array.shape, strict=True)
        array = np.pad(array, [(0, wanted - size if isinstance(wanted, int) else 0) for wanted, size in sizes])
        feeds[value.name] = np.ascontiguousarray(array, np.float16 if value.type == "tensor(float16)" else None)
    return feeds


def _recorded(samples: Samples, graphs: Mapping[str, Path]) -> dict[str, list[dict[str, np.ndarray]]]:
    """Samples of all stages.

    Raises:
        UserError: there is none for a network whose activations are to be quantised.
    """
    found = {stage: samples.of(stage) for stage in graphs}
    for family in PROBES:
        if not any(found[stage] for stage in graphs if FAMILIES.get(stage, stage) == family):
            raise UserError(
                f"calibration of stage {family}", expected="some samples", found=f"none in {samples.folder}", action=RECORD_AGAIN
            )
    return found


def _figures(result: GateResult) -> dict:
    loss = result.loss_db
    return {"psnr_db": round(result.psnr_db, 3), "loss_db": None if loss is None else round(loss, 4)}


def _measured_to_dict(measured: Measured) -> dict:
    layers = {
        name: {
            "mode": layer.mode, "input_scale": layer.input_scale, "output_scale": layer.output_scale,
            "smooth": None if layer.smooth is None else [float(value) for value in layer.smooth],
        }
        for name, layer in measured.recipe.layers.items()
    }  # fmt: skip
    return {
        "layers": layers, "weights": dict(measured.recipe.weights), "costs": [cost.to_dict() for cost in measured.costs],
        "alone": dict(measured.alone),
    }  # fmt: skip


def _read_measured(path: Path) -> Measured:
    data = json.loads(path.read_text(encoding="utf-8"))
    layers = {
        name: LayerRecipe(
            layer["mode"], layer["input_scale"], layer["output_scale"],
            None if layer["smooth"] is None else np.array(layer["smooth"], np.float32),
        )
        for name, layer in data["layers"].items()
    }  # fmt: skip
    costs = tuple(Cost(cost["group"], tuple(cost["layers"]), cost["error"], cost["weights"]) for cost in data["costs"])
    return Measured(Recipe(layers, data["weights"]), costs, data["alone"])


def _write_json(file: Path, data: Mapping) -> None:
    with whole_file(file) as path:
        path.write_text(json.dumps(data), encoding="utf-8")


def _digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
