"""Checkpoint folder -> bundle folder. torch is imported only when there is something to do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from factorportrait.bundle import (
    CONSTANTS,
    MANIFEST,
    NEUTRAL_CODE,
    PRECISIONS,
    Bundle,
    FileEntry,
    Manifest,
    StageSpec,
    read_arrays,
)
from factorportrait.checkpoint_files import HEAD, checkpoint_digests
from factorportrait.errors import BundleError, CheckpointError, UserError
from factorportrait.files import sha256_file, whole_folder

# The packages that decide the bytes of a graph.
WRITERS = ("torch", "onnx", "onnxscript", "onnx-ir")
# The parts of factorportrait that do, export/ aside.
CONTRACT = ("arkit.py", "bundle.py", "config.py", "model_config.py")
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
        checks: per stage `max_abs`, `max_relative` and `num_cases`.
        up_to_date: nothing had changed, so nothing was done.
    """

    path: Path
    precision: str
    up_to_date: bool
    total_bytes: int
    seconds: float
    checks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For --json."""
        return {
            "bundle": str(self.path), "precision": self.precision, "up_to_date": self.up_to_date,
            "bytes": self.total_bytes, "seconds": round(self.seconds, 3),
            "stages": {name: dict(check) for name, check in self.checks.items()},
        }  # fmt: skip


def build_bundle(
    checkpoint: str | Path,
    output: str | Path,
    *,
    precision: str = "fp32",
    force: bool = False,
    external: bool | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BuildReport:
    """Export every stage of a checkpoint, check it against torch, and write the bundle when all of it is right.

    Args:
        checkpoint: folder, see `checkpoint.py`.
        output: the bundle's folder; an older bundle there is replaced at the end.
        precision: fp32; the others come later.
        force: export though nothing changed.
        external: keep weights in a second file per graph; None for graphs that need it.
        on_progress: called before each step.

    Raises:
        UserError: the checkpoint does not load, a graph differs from torch, or the output cannot be written.
    """
    started = time.perf_counter()
    checkpoint, output = Path(checkpoint), Path(output)
    check_precision(precision)
    _check_output(output)
    for package in (*WRITERS, "safetensors"):
        _version(package)
    files = checkpoint_digests(checkpoint)
    options = {"precision": precision, "external": external}
    versions = {name: _version(name) for name in WRITERS}
    key = _digest({"checkpoint": files, "options": options, "sources": _source_digests(), "versions": versions})
    if not force and (old := _bundle_with(output, key)) is not None:
        checks = {name: stage.check for name, stage in old.manifest.stages.items()}
        return BuildReport(output, precision, True, old.total_bytes(), time.perf_counter() - started, checks)

    _check_head(checkpoint / HEAD)
    # Late: an up-to-date bundle needs no torch.
    from factorportrait.export.check import Cases, check_graph, threshold
    from factorportrait.export.checkpoint import load_checkpoint
    from factorportrait.export.graphs import OPSET, export_stage, tensor_specs, write_graph
    from factorportrait.export.stages import stages_of

    on_progress(Progress(0, 1, "", "load"))
    model = load_checkpoint(checkpoint)
    stages, cases = stages_of(model), Cases(model)
    specs: dict[str, StageSpec] = {}
    num_steps = 2 * len(stages)
    with whole_folder(output) as folder:
        for i, stage in enumerate(stages):
            on_progress(Progress(2 * i, num_steps, stage.name, "export"))
            graph = export_stage(stage)
            file, *data = write_graph(graph, folder, stage.name, external=external)
            inputs, outputs = tensor_specs(graph.graph.inputs), tensor_specs(graph.graph.outputs)
            del graph
            on_progress(Progress(2 * i + 1, num_steps, stage.name, "check"))
            check = check_graph(folder / file, stage, outputs, cases.of(stage), threshold(precision))
            specs[stage.name] = StageSpec(stage.name, file, inputs, outputs, check.to_dict(), tuple(data))
        neutral_code = model.expression["controller"].neutral_code
        write_arrays(folder / CONSTANTS, {NEUTRAL_CODE: neutral_code.numpy()})
        if (checkpoint / HEAD).is_file():
            shutil.copyfile(checkpoint / HEAD, folder / HEAD)
        manifest = Manifest(
            config=model.config, precision=precision, stages=specs, source_key=key, targets=("cpu", "cuda"),
            files={
                path.name: FileEntry(sha256_file(path), path.stat().st_size) for path in sorted(folder.iterdir())
            },
            provenance={
                "checkpoint": model.config.name, "checkpoint_files": files, "opset": OPSET,
                "versions": {"factorportrait": _version("factorportrait"), **versions},
            },
        )  # fmt: skip
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    total_bytes = Bundle(output).total_bytes()
    checks = {name: spec.check for name, spec in specs.items()}
    return BuildReport(output, precision, False, total_bytes, time.perf_counter() - started, checks)


def check_precision(precision: str) -> None:
    """Raises UserError unless an export in this precision exists."""
    if precision == "fp32":
        return
    found = f"{precision}, which is not available yet" if precision in PRECISIONS else repr(precision)
    raise UserError("--precision", expected="fp32", found=found, action="run again with --precision fp32")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz whose bytes depend on the arrays alone: no time of writing."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(arrays.items()):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def _check_output(output: Path) -> None:
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


def _bundle_with(output: Path, key: str) -> Bundle | None:
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


def _source_digests() -> dict[str, str]:
    """Digest of every source file that the graphs depend on."""
    import factorportrait.bundle

    export, package = Path(__file__).parent, Path(factorportrait.bundle.__file__).parent
    files = {str(path.relative_to(export)): path for path in export.rglob("*") if path.suffix in (".py", ".toml")}
    files |= {f"factorportrait/{name}": package / name for name in CONTRACT}
    return {name: sha256_file(path) for name, path in sorted(files.items()) if name != "cli.py"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("fp-export", expected=f"the package {package}", found="none", action=INSTALL_HINT) from error


def _check_head(file: Path) -> None:
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


def _digest(data: Mapping) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
