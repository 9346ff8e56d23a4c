"""int8 graphs of a stage, and whole trial bundles of them, made of an fp32 bundle without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from factorportrait.bundle import CONSTANTS, MANIFEST, Bundle, FileEntry, StageSpec
from factorportrait.export.quantize.insert import quantize_graph
from factorportrait.export.quantize.layout import channels_last
from factorportrait.export.quantize.recipe import FAMILIES, Recipe
from factorportrait.files import sha256_file, whole_folder

# Stages that are convolutions throughout.
CONVOLUTIONAL = ("vae_encode_first", "vae_encode_steady", "vae_decode_first", "vae_decode_steady")


def has_channels_last(precision: str, target: str, stage: str) -> bool:
    """Whether the caches of a stage's graph are [n, h, w, C], not [n, C, h, w] as everywhere else."""
    return precision == "int8" and target == "cpu" and stage in CONVOLUTIONAL


def int8_graph(
    stage: str, model: ir.Model, recipe: Recipe, target: str, exact: Mapping[str, np.ndarray] | None = None
) -> ir.Model:
    """Quantise one graph in place.

    Args:
        model: of the stage, in fp32 for "cpu", in fp16 for "tensorrt".
        exact: see `quantize_graph`.
    """
    quantize_graph(model, recipe.of(stage, model), target, exact)
    if has_channels_last("int8", target, stage):
        channels_last(model)
    return model


def write_trial(bundle: Bundle, recipe: Recipe, output: Path) -> Bundle:
    """A bundle for the CPU with the recipe's graphs, to be measured; its graphs are those that an export writes.

    Args:
        bundle: in fp32, for the CPU.
    """
    # Late: graphs.py brings torch along.
    from factorportrait.export.graphs import WeightFiles, tensor_specs, write_graph

    manifest = bundle.manifest
    with whole_folder(output) as folder:
        weights = {name: WeightFiles(folder, name) for name in {FAMILIES.get(stage, stage) for stage in manifest.stages}}
        stages = {}
        for name, spec in manifest.target_stages("cpu").items():
            model = int8_graph(name, ir.load(bundle.file(spec.file)), recipe, "cpu")
            file, *data = write_graph(model, folder, name, weights[FAMILIES.get(name, name)])
            inputs, outputs = tensor_specs(model.graph.inputs), tensor_specs(model.graph.outputs)
            stages[name] = StageSpec(name, file, inputs, outputs, {}, tuple(data))
        (folder / CONSTANTS).write_bytes(bundle.file(CONSTANTS).read_bytes())
        files = {path.name: FileEntry(sha256_file(path), path.stat().st_size) for path in sorted(folder.iterdir())}
        trial = dataclasses.replace(manifest, precision="int8", stages=stages, targets=("cpu",), variants={}, files=files)
        (folder / MANIFEST).write_text(trial.to_json(), encoding="utf-8")
    return Bundle(output)
