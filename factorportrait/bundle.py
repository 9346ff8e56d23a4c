"""A bundle: a folder of graphs with a manifest that says what they take, what they give and what they were made from.

manifest.json     schema, config, targets, stages with named tensors, digest of every file, provenance
*.onnx, *.data    graphs and the weights that they refer to; graphs of one network share a file of weights
constants.npz     small arrays that the runtime needs, such as the neutral expression code
head.npz          optional: a mean head to pose when a source has only head angles
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.config import checked_value, config_from_dict
from factorportrait.errors import BundleError, CheckpointError
from factorportrait.files import sha256_file
from factorportrait.model_config import ModelConfig

SCHEMA = 3  # 2 has one system and no ranges of blocks; it is read as it is
MANIFEST = "manifest.json"
CONSTANTS = "constants.npz"
# Arrays of the constants: the expression code [E] of a face at rest, and the embeddings [L, text_dim] of the default prompt and of
# the negative one, which guidance leads away from.
NEUTRAL_CODE, PROMPT, NEGATIVE_PROMPT = "neutral_code", "prompt", "negative_prompt"
PRECISIONS = ("fp32", "fp16", "int8", "int8-weights", "fp8")
# Who runs a graph: ONNX Runtime on the CPU, ONNX Runtime on CUDA, TensorRT.
TARGETS = ("cpu", "cuda", "tensorrt")
# Arrays of the constants for the fused embedding: weight [D,C,1,p,p] and bias [D] of the patch embedding, float32. Older bundles
# have none. Where the noise is the only stream, no stage adds the bias: it is all that a token without noise consists of.
EMBED_WEIGHT, EMBED_BIAS = "embed_weight", "embed_bias"
SCHEMA_1_TARGETS = ("cpu", "cuda")  # its graphs hold attention in fp32, which TensorRT does not compile
_EXPORT_AGAIN = "make the bundle again with fp-export"


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of a graph; a size is a number or the name of a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def describe(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class StageSpec:
    """One graph: its file, relative to the bundle, and its tensors in order.

    Attributes:
        check: errors against torch at export.
        data: files of weights that the graph refers to, relative to the bundle; other graphs may share them.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    check: Mapping[str, float] = field(default_factory=dict)
    data: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The graph and its weights."""
        return (self.file, *self.data)

    def input(self, name: str) -> TensorSpec:
        """Raises BundleError if the graph has no such input."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        raise BundleError(
            f"stage {self.name}",
            expected=f"an input {name}",
            found=", ".join(spec.name for spec in self.inputs) or "none",
            action=_EXPORT_AGAIN,
        )


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds.

    Attributes:
        stages: the graph of every stage for all targets that have no variant of it; a large one is cut, see `stage_parts`.
        targets: who can run this bundle.
        variants: target -> stage -> the graph for that target alone.
        source_key: digest of everything that the export depends on.
    """

    config: ModelConfig
    precision: str
    stages: Mapping[str, StageSpec]
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any]
    source_key: str
    targets: tuple[str, ...]
    variants: Mapping[str, Mapping[str, StageSpec]] = field(default_factory=dict)
    schema: int = SCHEMA

    def target_stages(self, target: str) -> dict[str, StageSpec]:
        """The graph of every stage as `target` runs it."""
        return {**self.stages, **self.variants.get(target, {})}

    def bytes_of(self, *specs: StageSpec) -> int:
        """Bytes of the graphs and their weights; what several share is counted once."""
        return sum(self.files[name].bytes for name in {name for spec in specs for name in spec.files})

    def target_bytes(self, target: str) -> int:
        """Bytes of everything that `target` loads: its graphs and their weights."""
        return self.bytes_of(*self.target_stages(target).values())

    def to_json(self) -> str:
        data = {
            "schema": self.schema,
            "precision": self.precision,
            "targets": list(self.targets),
            "source_key": self.source_key,
            "config": self.config.to_dict(),
            "stages": _stages_to_dict(self.stages),
            "variants": {target: _stages_to_dict(stages) for target, stages in self.variants.items()},
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
            "provenance": dict(self.provenance),
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse manifest.json.

        Raises:
            BundleError: not JSON, a newer schema, a missing or unknown key, or a value of another type or refused.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where}", expected="JSON", found=str(error), action=_EXPORT_AGAIN) from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise BundleError(
                where, expected="a bundle manifest with a schema number", found="none", action=_EXPORT_AGAIN
            )
        if schema > SCHEMA:
            raise BundleError(
                where,
                expected=f"schema {SCHEMA} or older",
                found=f"schema {schema}",
                action="update factorportrait, or export with this version",
            )
        try:
            files = {
                name: config_from_dict(FileEntry, entry, f"{where}: files") for name, entry in data["files"].items()
            }
            if schema == 1:
                data = _from_schema_1(data)
            targets = checked_value(tuple[str, ...], data["targets"], f"{where}: targets")
            stages = _stages_from_dict(data["stages"], where)
            variants = {target: _stages_from_dict(entry, where) for target, entry in data["variants"].items()}
            _check_targets(targets, variants, where)
            _check_parts(stages, where)
            for spec in (*stages.values(), *(spec for own in variants.values() for spec in own.values())):
                _check_listed(spec, files, where)
            provenance = checked_value(Mapping[str, Any], data["provenance"], f"{where}: provenance")
            checked_value(Mapping[str, str], provenance.get("versions", {}), f"{where}: provenance: versions")
            return cls(
                config=ModelConfig.from_dict(data["config"], f"{where}: config"),
                precision=checked_value(str, data["precision"], f"{where}: precision"),
                stages=stages,
                files=files,
                provenance=provenance,
                source_key=checked_value(str, data["source_key"], f"{where}: source_key"),
                targets=targets,
                variants=variants,
                schema=schema,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                where, expected="all keys of a manifest", found=f"no usable {error}", action=_EXPORT_AGAIN
            ) from error
        except CheckpointError as error:
            raise BundleError(
                error.what, expected=error.expected, found=error.found, action=_EXPORT_AGAIN
            ) from error


def stage_parts(stages: Mapping[str, Any], name: str) -> list[str]:
    """Names of the stages that a large stage was cut into, `NAME_START_END` by blocks, in their order; none where it is whole."""
    found = [(int(match[1]), int(match[2]), key) for key in stages if (match := re.fullmatch(rf"{name}_(\d+)_(\d+)", key))]
    return [key for _, _, key in sorted(found)]


def _from_schema_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Schema 1 had one graph per stage, for ONNX Runtime, with the weights inside or beside it under the graph's name."""
    stages = {
        name: {**entry, "data": [f"{entry['file']}.data"] if f"{entry['file']}.data" in data["files"] else []}
        for name, entry in data["stages"].items()
    }
    return {**data, "stages": stages, "targets": list(SCHEMA_1_TARGETS), "variants": {}}


def _check_targets(targets: tuple[str, ...], variants: Mapping[str, Any], where: str) -> None:
    if not targets or not set(targets) <= set(TARGETS):
        raise BundleError(
            f"{where}: targets", expected=f"some of {', '.join(TARGETS)}", found=", ".join(targets) or "none",
            action=_EXPORT_AGAIN,
        )  # fmt: skip
    if not set(variants) <= set(targets):
        raise BundleError(
            f"{where}: variants", expected=f"targets of this bundle, {', '.join(targets)}", found=", ".join(variants),
            action=_EXPORT_AGAIN,
        )  # fmt: skip


def _check_parts(stages: Mapping[str, Any], where: str) -> None:
    for name in {match[1] for key in stages if (match := re.fullmatch(r"(.+)_\d+_\d+", key))}:
        ends = [[int(number) for number in key.rsplit("_", 2)[1:]] for key in stage_parts(stages, name)]
        starts = [0, *(end for _, end in ends[:-1])]
        if [start for start, _ in ends] != starts or any(end <= start for start, end in ends):
            raise BundleError(
                f"{where}: stage {name}", expected="ranges of blocks, one behind the other from 0 on",
                found=", ".join(f"{start} to {end}" for start, end in ends), action=_EXPORT_AGAIN,
            )  # fmt: skip


def _check_listed(spec: StageSpec, files: Mapping[str, FileEntry], where: str) -> None:
    for name in spec.files:
        if name not in files:
            raise BundleError(
                f"{where}: stage {spec.name}", expected="files that the manifest lists", found=name, action=_EXPORT_AGAIN
            )


def _stages_to_dict(stages: Mapping[str, StageSpec]) -> dict[str, Any]:
    return {name: _stage_to_dict(stage) for name, stage in stages.items()}


def _stages_from_dict(entries: Mapping[str, Any], where: str) -> dict[str, StageSpec]:
    return {name: _stage_from_dict(name, entry, where) for name, entry in entries.items()}


def _stage_to_dict(stage: StageSpec) -> dict[str, Any]:
    tensors = {
        side: [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in getattr(stage, side)]
        for side in ("inputs", "outputs")
    }
    return {"file": stage.file, "data": list(stage.data), **tensors, "check": dict(stage.check)}


def _stage_from_dict(name: str, entry: Mapping[str, Any], where: str) -> StageSpec:
    inputs, outputs = (
        tuple(config_from_dict(TensorSpec, spec, f"{where}: stage {name}") for spec in entry[side])
        for side in ("inputs", "outputs")
    )
    file = checked_value(str, entry["file"], f"{where}: stage {name}: file")
    check = checked_value(Mapping[str, float], entry.get("check", {}), f"{where}: stage {name}: check")
    weights = checked_value(tuple[str, ...], entry["data"], f"{where}: stage {name}: data")
    return StageSpec(name, file, inputs, outputs, check, weights)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz.

    Raises:
        ValueError: it is damaged, no .npz, or holds objects.
    """
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with opened:
            return {name: opened[name] for name in opened.files}
    except (ValueError, EOFError, KeyError, OSError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error


class Bundle:
    """An opened bundle folder. Opening reads the manifest and checks that every file is there with its size."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            found = "a file" if self.path.is_file() else "nothing"
            raise BundleError(
                f"bundle {self.path}",
                expected="a folder made by fp-export",
                found=found,
                action="run: fp-export CHECKPOINT --output BUNDLE",
            )
        manifest_path = self.path / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(
                f"bundle {self.path}",
                expected=f"a {MANIFEST} in it",
                found="none",
                action="run: fp-export CHECKPOINT --output BUNDLE",
            )
        self.manifest = Manifest.from_json(
            manifest_path.read_text(encoding="utf-8", errors="replace"), str(manifest_path)
        )
        self._check_sizes()

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    def stage(self, name: str, target: str | None = None) -> StageSpec:
        """The graph of a stage as `target` runs it; without a target the one for targets without a variant.

        Raises:
            BundleError: the bundle has no such stage, or is not for that target.
        """
        manifest = self.manifest
        if target is not None and target not in manifest.targets:
            raise BundleError(
                f"bundle {self.path}",
                expected=f"graphs for {target}",
                found=f"graphs for {', '.join(manifest.targets)}",
                action=f"export it for that target: fp-export CHECKPOINT --precision {manifest.precision} --target {target}",
            )
        stages = manifest.stages if target is None else manifest.target_stages(target)
        if name not in stages:
            raise BundleError(
                f"bundle {self.path}", expected=f"a stage {name}", found=", ".join(stages), action=_EXPORT_AGAIN
            )
        return stages[name]

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.path}", expected=f"a file {name} in its manifest", action=_EXPORT_AGAIN)
        return self.path / name

    def constants(self) -> dict[str, np.ndarray]:
        """The arrays of constants.npz, `NEUTRAL_CODE` among them.

        Raises:
            BundleError: the file is damaged, or lacks an array.
        """
        path, size = self.file(CONSTANTS), self.config.expression.code_dim
        try:
            arrays = read_arrays(path)
        except ValueError as error:
            raise BundleError(
                f"bundle file {path}", expected="a whole .npz of arrays", found=str(error), action=_EXPORT_AGAIN
            ) from error
        if not self.config.conditioning.shows_expression:
            return arrays
        code = arrays.get(NEUTRAL_CODE)
        if code is None or code.shape != (size,) or code.dtype.kind != "f":
            raise BundleError(
                f"bundle file {path}",
                expected=f"an array {NEUTRAL_CODE} of {size} floats",
                found=", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items()) or "none",
                action=_EXPORT_AGAIN,
            )
        return arrays

    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BundleError(
                    f"bundle {self.path}: file {name}", expected="a path inside the bundle", action=_EXPORT_AGAIN
                )
            if not path.is_file():
                raise BundleError(
                    f"bundle file {path}", expected=f"{entry.bytes} bytes", found="no such file", action=_EXPORT_AGAIN
                )
            if path.stat().st_size != entry.bytes:
                raise BundleError(
                    f"bundle file {path}",
                    expected=f"{entry.bytes} bytes",
                    found=f"{path.stat().st_size}",
                    action=_EXPORT_AGAIN,
                )

    def verify(self) -> None:
        """Read every file and compare its digest.

        Raises:
            BundleError: a digest does not match.
        """
        for name, entry in self.manifest.files.items():
            digest = sha256_file(self.path / name)
            if digest != entry.sha256:
                raise BundleError(
                    f"bundle file {self.path / name}",
                    expected=f"sha256 {entry.sha256[:12]}",
                    found=digest[:12],
                    action="the file was changed or damaged: " + _EXPORT_AGAIN,
                )
