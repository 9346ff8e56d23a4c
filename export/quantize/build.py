"""`fp-export --precision int8`: record, measure, choose, write, judge; everything that takes long is kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from factorportrait.bundle import CONSTANTS, MANIFEST, Bundle, FileEntry, Manifest, StageSpec
from factorportrait.checkpoint_files import HEAD
from factorportrait.errors import UserError
from factorportrait.export.quantize.bundles import has_channels_last, int8_graph, write_trial
from factorportrait.export.quantize.clips import CALIBRATION_SPLIT, DrivenClip, demo_clips, longest_clip, media_clips
from factorportrait.export.quantize.gate import GateFailed, GateResult, Judge, gate_clips, load_limits
from factorportrait.export.quantize.insert import LayerRecipe
from factorportrait.export.quantize.mix import choose_mix, ranked
from factorportrait.export.quantize.recipe import FAMILIES, Recipe, make_recipe, observe
from factorportrait.export.quantize.samples import RECORD_AGAIN, RecordSettings, Samples, record_samples
from factorportrait.export.quantize.sensitivity import PROBES, Cost, families_of, measure_costs
from factorportrait.files import sha256_file, whole_file, whole_folder
from factorportrait.shipped import cache_folder

CALIBRATION_CLIPS = 4
CALIBRATION_FRAMES = 29
# A mix is chosen with the first of the calibration's clips; test clips are for the gate alone.
CHOICE_CLIPS = 2
GRAPH_SAMPLES = 2

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
class Plan:
    """How a checkpoint is quantised, and why.

    Attributes:
        recipe: of every layer.
        costs: the sensitivity report; empty for a plan without one.
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
        cache: for samples and plans; a plan of the same bundle, clips and budget is read from there.
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
    key = hashlib.sha256(
        json.dumps([fp32.manifest.source_key, samples.key, limits.min_psnr_db, limits.max_loss_db]).encode()
    ).hexdigest()[:16]
    kept = cache / "plans" / f"{key}.json"
    if kept.is_file():
        return _read_plan(kept)
    graphs = {name: fp32.file(spec.file) for name, spec in fp32.manifest.target_stages("cpu").items()}
    recorded = _recorded(samples, graphs)
    say("calibrate: scales")
    recipe = make_recipe(graphs, observe(graphs, recorded), fp32.config.dit.num_layers)
    costs = measure_costs(graphs, recorded, recipe, on_group=lambda i, n: say(f"sensitivity: group {i} of {n}"))
    judge = Judge(fp32, clips[:CHOICE_CLIPS], threads=threads)
    with tempfile.TemporaryDirectory() as folder:

        def evaluate(candidate: Recipe) -> GateResult:
            return judge.compare(write_trial(fp32, candidate, Path(folder) / "trial"), limits)

        alone = {}
        for family in families_of(recipe):
            say(f"sensitivity: {family} alone")
            others = [layer for layer in recipe.candidates if not layer.startswith(f"{family}/")]
            alone[family] = evaluate(recipe.without(others))
        errors = {family: 10 ** (-result.psnr_db / 10) for family, result in alone.items()}
        mix = choose_mix(
            recipe, ranked(costs, errors), evaluate,
            lambda count, result: say(f"mix: {count} groups in float: {result.psnr_db:.1f} dB"),
        )  # fmt: skip
    if not mix.result.passed:
        raise GateFailed(mix.result, "allow more with --max-quality-loss-db, or export fp16; these are the best figures of any mix")
    provenance = {
        "calibration": {"samples": samples.key, "clips": [clip.name for clip in clips]},
        "alone": {family: _figures(result) for family, result in alone.items()},
        "mix": {"left_in_float": list(mix.in_float), **_figures(mix.result)},
    }
    plan = Plan(mix.recipe, tuple(costs), provenance)
    with whole_file(kept) as path:
        path.write_text(json.dumps(_plan_to_dict(plan)), encoding="utf-8")
    return plan


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
        UserError: a graph is far from fp32 on its own calibration samples.
    """
    result = None
    with whole_folder(output) as folder:
        stages = _write_stages(fp32, "cpu", plan.recipe, folder, samples)
        variants = {} if fp16 is None else {"tensorrt": _write_stages(fp16, "tensorrt", plan.recipe, folder, samples)}
        for name in (CONSTANTS, HEAD):
            if name in fp32.manifest.files:
                (folder / name).write_bytes(fp32.file(name).read_bytes())
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


def _write_stages(source: Bundle, target: str, recipe: Recipe, folder: Path, samples: Samples) -> dict[str, StageSpec]:
    # Late: graphs.py brings torch along.
    from factorportrait.export.graphs import WeightFiles, tensor_specs, write_graph

    found = {}
    suffix = "" if target == "cpu" else f".{target}"
    specs = source.manifest.target_stages(target)
    weights = {family: WeightFiles(folder, family + suffix) for family in {FAMILIES.get(name, name) for name in specs}}
    for name, spec in specs.items():
        model = int8_graph(name, ir.load(source.file(spec.file)), recipe, target)
        file, *data = write_graph(model, folder, name + suffix, weights[FAMILIES.get(name, name)])
        check = _check(folder / file, source.file(spec.file), samples, name, target)
        inputs, outputs = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs)
        found[name] = StageSpec(name, file, inputs, outputs, check, tuple(data))
    return found


def _check(path: Path, reference: Path, samples: Samples, stage: str, target: str) -> dict[str, float]:
    """An int8 graph against the graph that it was made of, on calibration samples: first output, as the manifest keeps it."""
    import onnxruntime

    from factorportrait.export.check import GraphCheck, angle, relative_error, threshold

    cases = samples.of(stage)[:GRAPH_SAMPLES]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = [onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"]) for file in (path, reference)]
    name = sessions[1].get_outputs()[0].name
    max_abs = max_relative = max_angle = 0.0
    count = 0
    for case in cases:
        moved = has_channels_last("int8", target, stage)
        feeds = [_fed(session, case, moved and session is sessions[0]) for session in sessions]
        if None in feeds:
            continue
        found, expected = (session.run([name], feed)[0] for session, feed in zip(sessions, feeds, strict=True))
        absolute, relative = relative_error(found, expected)
        max_abs, max_relative = max(max_abs, absolute), max(max_relative, relative)
        max_angle = max(max_angle, angle(found, expected))
        count += 1
    check = GraphCheck(max_abs, max_relative, name, count, max_angle)
    if objection := check.objection(threshold("int8")):
        raise UserError(
            f"stage {stage} in int8 differs from fp32", expected=objection[0], found=objection[1],
            action="calibrate with clips like those that it will run, or export fp16",
        )  # fmt: skip
    return check.to_dict()


def _fed(session, case: Mapping[str, np.ndarray], channels_last: bool) -> dict[str, np.ndarray] | None:
    """A case as a graph takes it: caches with channels last, half precision; None where a fixed size differs."""
    feeds = {}
    for value in session.get_inputs():
        array = case[value.name]
        if channels_last and value.name.startswith("cache_in."):
            array = array.transpose(0, 2, 3, 1)
        if any(isinstance(size, int) and size != found for size, found in zip(value.shape, array.shape, strict=True)):
            return None
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


def _plan_to_dict(plan: Plan) -> dict:
    layers = {
        name: {
            "mode": layer.mode, "input_scale": layer.input_scale, "output_scale": layer.output_scale,
            "smooth": None if layer.smooth is None else [float(value) for value in layer.smooth],
        }
        for name, layer in plan.recipe.layers.items()
    }  # fmt: skip
    return {
        "layers": layers, "weights": dict(plan.recipe.weights), "costs": [cost.to_dict() for cost in plan.costs],
        "provenance": dict(plan.provenance),
    }  # fmt: skip


def _read_plan(path: Path) -> Plan:
    data = json.loads(path.read_text(encoding="utf-8"))
    layers = {
        name: LayerRecipe(
            layer["mode"], layer["input_scale"], layer["output_scale"],
            None if layer["smooth"] is None else np.array(layer["smooth"], np.float32),
        )
        for name, layer in data["layers"].items()
    }  # fmt: skip
    costs = tuple(Cost(cost["group"], tuple(cost["layers"]), cost["error"], cost["weights"]) for cost in data["costs"])
    return Plan(Recipe(layers, data["weights"]), costs, data["provenance"])
