"""Checkpoint folder -> bundle folder. torch is imported only when there is something to do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from factorportrait.bundle import (
    CONSTANTS,
    EMBED_BIAS,
    EMBED_WEIGHT,
    MANIFEST,
    NEUTRAL_CODE,
    TARGETS,
    Bundle,
    FileEntry,
    Manifest,
    StageSpec,
    read_arrays,
)
from factorportrait.checkpoint_files import HEAD, checkpoint_digests
from factorportrait.errors import BundleError, CheckpointError, UserError
from factorportrait.files import sha256_file, whole_folder

if TYPE_CHECKING:
    from factorportrait.export.check import Cases, Threshold
    from factorportrait.export.parts import Part
    from factorportrait.export.variants import Context

# The packages that decide the bytes of a graph.
WRITERS = ("torch", "onnx", "onnxscript", "onnx-ir")
# The parts of factorportrait that do, export/ aside.
CONTRACT = ("arkit.py", "bundle.py", "config.py", "model_config.py", "systems.py")
# Parts of export/ that do not: the command lines.
NOT_SOURCES = ("cli.py", "plan_cli.py", "released_cli.py")
# What `fp-export --precision` offers: every target that it has graphs for, and those that get one unless some are named.
OFFERED = {
    "fp32": TARGETS, "fp16": TARGETS, "int8": ("cpu", "tensorrt"), "int8-weights": TARGETS, "fp8": ("tensorrt",),
}  # fmt: skip
# TensorRT's graphs of the transformer are exported apart, which nobody in a hurry for fp32 waits for.
DEFAULT_TARGETS = {"fp32": ("cpu", "cuda")}
# Why a target is not among them.
REASONS = {
    ("int8", "cuda"): "ONNX Runtime computes quantised products in float on CUDA: take fp16 or int8-weights there",
    ("fp8", "cpu"): "no CPU has fp8 products",
    ("fp8", "cuda"): "ONNX Runtime has no fp8 kernels for CUDA: take fp16 there",
}
NOTES = {
    ("int8", "tensorrt"): "compiles; how fast it is on hardware has not been measured, and the videos were judged on the CPU",
    ("fp16", "cpu"): "half the size and no faster: ONNX Runtime's CPU kernels compute most operators in fp32",
    ("int8-weights", "cuda"): "smaller files; ONNX Runtime unpacks the weights to fp16, so it is no faster than fp16",
    ("fp8", "tensorrt"): "compiles, and its numbers are simulated on a CPU; it has not run on hardware (SM 8.9 or newer)",
}
INSTALL_HINT = 'install the exporter: pip install "factorportrait[export]" (in a checkout: pip install -e ".[export]")'


@dataclass(frozen=True)
class Progress:
    """`step` of `num_steps` begins: `what` is done to `stage`."""

    step: int
    num_steps: int
    stage: str
    what: str


@dataclass(frozen=True)
class BuildReport:
    """What an export did.

    Attributes:
        checks: per graph `max_abs`, `max_relative`, `angle`, `num_cases` and, where there is fp16, `headroom`.
        target_bytes: what each target loads.
        up_to_date: nothing had changed, so nothing was done.
    """

    path: Path
    precision: str
    up_to_date: bool
    total_bytes: int
    seconds: float
    target_bytes: Mapping[str, int] = field(default_factory=dict)
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For --json."""
        return {
            "bundle": str(self.path), "precision": self.precision, "up_to_date": self.up_to_date,
            "bytes": self.total_bytes, "target_bytes": dict(self.target_bytes), "seconds": round(self.seconds, 3),
            "stages": {name: dict(check) for name, check in self.checks.items()},
        }  # fmt: skip


class GraphsRefused(UserError):
    """Graphs are worse than their precision may be.

    Attributes:
        checks: of all graphs, those that passed included.
        refused: names among them.
    """

    def __init__(self, what: str, *, checks: Mapping[str, Mapping[str, float]], refused: tuple[str, ...], **words: str):
        super().__init__(what, **words)
        self.checks, self.refused = checks, refused


def build_bundle(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    targets: tuple[str, ...] | None = None,
    force: bool = False,
    external: bool = False,
    judge: Callable[[Bundle], Mapping] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BuildReport:
    """Export every stage of a checkpoint, check it against torch, and write the bundle when all of it is right.

    Args:
        checkpoint: folder, see `checkpoint.py`.
        output: the bundle's folder; an older bundle there is replaced at the end.
        precision: a key of `OFFERED` other than int8, which is `factorportrait.export.quantize.build.export_int8`.
        targets: who will run it; None for `DEFAULT_TARGETS`, or everyone that the precision has graphs for.
        force: export though nothing changed.
        external: keep all weights in files of their own, not only those that are shared or do not fit.
        judge: called with the whole bundle before it gets its name; what it returns goes into the provenance, what it raises
            leaves the output as it was.
        on_progress: called before each step.

    Raises:
        GraphsRefused: a graph is further from torch than its precision may be, or overflows.
        UserError: the checkpoint does not load, or the output cannot be written.
    """
    started = time.perf_counter()
    checkpoint, output = Path(checkpoint), Path(output)
    targets = check_precision(precision, targets)
    if precision == "int8":
        raise ValueError("precision int8: call factorportrait.export.quantize.build.export_int8")
    check_output(output)
    for package in (*WRITERS, "safetensors"):
        version_of(package)
    files = checkpoint_digests(checkpoint)
    options = {"precision": precision, "targets": targets, "external": external}
    if judge is not None:
        options["judged"] = True
    versions = {name: version_of(name) for name in WRITERS}
    key = digest_of({"checkpoint": files, "options": options, "sources": source_digests(), "versions": versions})
    if not force and (old := bundle_with(output, key)) is not None:
        return report_of(old, True, started)

    check_head(checkpoint / HEAD)
    # Late: an up-to-date bundle needs no torch.
    from factorportrait.export.check import Cases
    from factorportrait.export.checkpoint import load_checkpoint
    from factorportrait.export.parts import Part
    from factorportrait.export.stages import OPSET, stages_of
    from factorportrait.export.variants import Context

    on_progress(Progress(0, 1, "", "load"))
    model = load_checkpoint(checkpoint)
    with whole_folder(output) as folder:
        cases = Cases(model)
        parts = [Part(stage.name, lambda stage=stage: stage) for stage in stages_of(model)]
        context = Context(model, cases.longest)
        stages, variants = write_graphs(parts, context, cases, folder, precision, targets, external, on_progress)
        embedding = model.dit.patch_embedding
        write_arrays(folder / CONSTANTS, {
            NEUTRAL_CODE: model.expression["controller"].neutral_code.numpy(),
            EMBED_WEIGHT: embedding.weight.detach().float().numpy(), EMBED_BIAS: embedding.bias.detach().float().numpy(),
        })
        if (checkpoint / HEAD).is_file():
            shutil.copyfile(checkpoint / HEAD, folder / HEAD)
        manifest = Manifest(
            config=model.config, precision=precision, stages=stages, targets=targets, variants=variants, source_key=key,
            files={
                path.name: FileEntry(sha256_file(path), path.stat().st_size) for path in sorted(folder.iterdir())
            },
            provenance={
                "checkpoint": model.config.name, "checkpoint_files": files, "opset": OPSET,
                "versions": {"factorportrait": version_of("factorportrait"), **versions},
            },
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if judge is not None:
            on_progress(Progress(1, 1, "", "judge"))
            gate = dict(judge(Bundle(folder)))
            manifest = replace(manifest, provenance={**manifest.provenance, "gate": gate})
            (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return report_of(Bundle(output), False, started)


def write_graphs(
    parts: Sequence[Part],
    context: Context,
    cases: Cases,
    folder: Path,
    precision: str,
    targets: tuple[str, ...],
    external: bool,
    on_progress: Callable[[Progress], None],
    limit: Threshold | None = None,
) -> tuple[dict[str, StageSpec], dict[str, dict[str, StageSpec]]]:
    """Export every part into `folder` and check it, one after the other: the manifest's `stages` and `variants`.

    Args:
        limit: what is let pass; None for the precision's.

    Raises:
        GraphsRefused: a graph is worse than its precision may be; all have been looked at.
    """
    from factorportrait.export.check import check_variant, threshold
    from factorportrait.export.graphs import INLINE_LIMIT_BYTES, WeightFiles, tensor_specs, weight_bytes, write_graph
    from factorportrait.export.variants import family_of, graph_variants

    limit = limit or threshold(precision)
    family = {part.name: family_of(part.name) for part in parts}
    members, weights = Counter(family.values()), {name: WeightFiles(folder, name) for name in family.values()}
    stages: dict[str, StageSpec] = {}
    own: dict[str, dict[str, StageSpec]] = {}
    checks, objections = {}, {}
    for i, part in enumerate(parts):
        on_progress(Progress(2 * i, 2 * len(parts), part.name, "export"))
        stage = part.build()
        variants = graph_variants(stage, precision, targets, context)
        on_progress(Progress(2 * i + 1, 2 * len(parts), stage.name, "check"))
        shared = external or members[family[stage.name]] > 1 or len(variants) > 1
        for variant in variants:
            name = f"{stage.name}.{'-'.join(variant.targets)}" if stage.name in stages else stage.name
            beside = shared or weight_bytes(variant.graph) > INLINE_LIMIT_BYTES
            inputs, outputs = tensor_specs(variant.graph.graph.inputs), tensor_specs(variant.graph.graph.outputs)
            file, *data = write_graph(variant.graph, folder, name, weights[family[stage.name]] if beside else None)
            check = check_variant(folder / file, variant, outputs, cases, limit)
            checks[name] = check.to_dict()
            if objection := check.objection(limit):
                objections[name] = objection
            spec = StageSpec(stage.name, file, inputs, outputs, checks[name], tuple(data))
            if stage.name not in stages:
                stages[stage.name] = spec
            else:
                for target in variant.targets:
                    own.setdefault(target, {})[stage.name] = spec
        # Of a large model one part lies in memory at a time.
        del stage, variants, variant
    if objections:
        name, (expected, found) = next(iter(objections.items()))
        more = f" (and {len(objections) - 1} more graphs)" if len(objections) > 1 else ""
        raise GraphsRefused(
            f"stage {name} differs from torch in {precision}{more}", expected=expected, found=found,
            action="export in a higher precision, or report it with these numbers" if precision != "fp32"
            else "this is a mistake in the exporter or in ONNX Runtime: report it with these numbers",
            checks=checks, refused=tuple(objections),
        )  # fmt: skip
    return stages, own


def report_of(bundle: Bundle, up_to_date: bool, started: float) -> BuildReport:
    """What an export that began at `started` of `time.perf_counter` did."""
    manifest = bundle.manifest
    specs = (*manifest.stages.values(), *(spec for stages in manifest.variants.values() for spec in stages.values()))
    return BuildReport(
        bundle.path, manifest.precision, up_to_date, bundle.total_bytes(), time.perf_counter() - started,
        {target: manifest.target_bytes(target) for target in manifest.targets},
        {spec.file.removesuffix(".onnx"): spec.check for spec in specs},
    )  # fmt: skip


def check_precision(precision: str, targets: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The targets of an export, in the order of `TARGETS`.

    Args:
        targets: those that are asked for, ("all",) among the possible; None for the default.

    Raises:
        UserError: there is no such precision, or it has no graph for a target.
    """
    if precision not in OFFERED:
        raise UserError(
            "--precision", expected=" or ".join(OFFERED), found=repr(precision), action="run again with --precision fp32"
        )
    possible = OFFERED[precision]
    if targets == ("all",):
        return possible
    for target in targets or ():
        if target not in possible:
            reason = REASONS.get((precision, target))
            raise UserError(
                f"--target with --precision {precision}", expected=f"some of {', '.join(possible)}", found=target or "nothing",
                action=reason or "name targets with commas between them, or all",
            )  # fmt: skip
    return tuple(target for target in TARGETS if target in (targets or DEFAULT_TARGETS.get(precision, possible)))


def precision_notes(precision: str, targets: Iterable[str]) -> list[str]:
    """What a user should know about a precision on these targets, one line each."""
    return [f"{precision} on {target}: {NOTES[precision, target]}" for target in targets if (precision, target) in NOTES]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz whose bytes depend on the arrays alone: no time of writing."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(arrays.items()):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def check_output(output: Path) -> None:
    """An older bundle may be replaced; anything else that is in the way may not, nor the folder that the user is in."""
    if Path.cwd().is_relative_to(output.resolve()):
        raise UserError(
            f"--output {output}", expected="a folder of its own, since it is replaced as a whole", found="where you are",
            action="name a new folder, such as --output bundle",
        )  # fmt: skip
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise UserError(
            f"--output {output}", expected="a new folder, an empty one or an older bundle", found="a folder with other files",
            action="choose another place with --output",
        )  # fmt: skip
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}", expected="a folder", found="a file", action="choose another place with --output")


def bundle_with(output: Path, key: str) -> Bundle | None:
    """The bundle at `output`, if it was made from the same sources and none of its files has changed since."""
    if not output.is_dir():
        return None
    try:
        bundle = Bundle(output)
        if bundle.manifest.source_key != key:
            return None
        bundle.verify()
    except (BundleError, OSError):
        return None
    return bundle


def source_digests() -> dict[str, str]:
    """Digest of every source file that the graphs depend on."""
    import factorportrait.bundle

    export, package = Path(__file__).parent, Path(factorportrait.bundle.__file__).parent
    files = {str(path.relative_to(export)): path for path in export.rglob("*") if path.suffix in (".py", ".toml")}
    files |= {f"factorportrait/{name}": package / name for name in CONTRACT}
    return {name: sha256_file(path) for name, path in sorted(files.items()) if name not in NOT_SOURCES}


def version_of(package: str) -> str:
    """The installed version of a package. Raises UserError where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("fp-export", expected=f"the package {package}", found="none", action=INSTALL_HINT) from error


def check_head(file: Path) -> None:
    """Raises CheckpointError unless head.npz is missing, or a head that a run can pose."""
    if not file.is_file():
        return
    action = "make it again, or remove it: it is optional"
    try:
        arrays = read_arrays(file)
    except ValueError as error:
        raise CheckpointError(f"{file}", expected="a whole .npz of arrays", found=str(error), action=action) from error
    missing = [name for name in ("vertices", "faces", "weights", "pivot") if name not in arrays]
    if missing:
        raise CheckpointError(
            f"{file}", expected="arrays vertices, faces, weights and pivot", found=f"no {', '.join(missing)}", action=action
        )
    vertices, faces, weights, pivot = (arrays[name] for name in ("vertices", "faces", "weights", "pivot"))
    num = len(vertices) if vertices.ndim == 2 else 0
    for name, expected, fits in (
        ("vertices", "finite numbers [V, 3]", num > 0 and vertices.shape[1] == 3 and _is_finite(vertices)),
        (
            "faces", f"integers [F, 3] from 0 to {num - 1}",
            faces.ndim == 2 and faces.shape[1] == 3 and len(faces) > 0 and faces.dtype.kind in "iu"
            and 0 <= faces.min() and faces.max() < num,
        ),
        (
            "weights", f"[{num}] numbers from 0 to 1",
            weights.shape == (num,) and _is_finite(weights) and 0 <= weights.min() and weights.max() <= 1,
        ),
        ("pivot", "3 finite numbers", pivot.shape == (3,) and _is_finite(pivot)),
    ):  # fmt: skip
        if not fits:
            array = arrays[name]
            found = f"{array.dtype} {list(array.shape)}"
            if array.size and array.dtype.kind in "iuf":
                found += f" from {array.min():g} to {array.max():g}"
            raise CheckpointError(f"{file}: {name}", expected=expected, found=found, action=action)


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def digest_of(data: Mapping) -> str:
    """Digest of what JSON can say."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
