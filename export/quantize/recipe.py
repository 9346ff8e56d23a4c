"""Samples and layers.toml -> the recipe of every layer: scales, and SmoothQuant's factors.

A layer is known by its weights' name in the checkpoint, so that the graphs of one network (first and steady state of the VAE,
`dit` and `dit_inplace`, fp32 and fp16) take the same numbers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from factorportrait.export.quantize.insert import FLOAT, INT8, QMAX, WEIGHTS, Layer, LayerRecipe, layer_of

# Graphs that run the same weights on the same activations.
FAMILIES = {
    "dit_inplace": "dit",
    "vae_encode_first": "vae_encode", "vae_encode_steady": "vae_encode",
    "vae_decode_first": "vae_decode", "vae_decode_steady": "vae_decode",
}  # fmt: skip
# SmoothQuant (arXiv 2211.10438): how much of the difficulty moves from activations to weights.
ALPHA = 0.8
# Shares of the largest magnitude that are tried as the range of a tensor; the one with the smallest squared error is taken.
RANGE_SHARES = np.linspace(0.3, 1.0, 29)
ROWS_PER_SAMPLE, VALUES_PER_SAMPLE = 64, 8191


@dataclass(frozen=True)
class Rule:
    """One entry of layers.toml."""

    match: tuple[str, ...]
    mode: str
    reason: str
    smooth: tuple[str, ...] = ()
    min_blocks: int = 0


def load_rules(path: Path | None = None) -> list[Rule]:
    """The reviewed table."""
    text = (path or Path(__file__).with_name("layers.toml")).read_text(encoding="utf-8")
    return [
        Rule(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
        for entry in tomllib.loads(text)["layer"]
    ]


def rule_of(layer: str, num_blocks: int, rules: Sequence[Rule]) -> Rule:
    """The first rule that matches; a layer that none knows stays in float."""
    for rule in rules:
        patterns = (pattern.replace("{last}", str(num_blocks - 1)) for pattern in rule.match)
        if num_blocks >= rule.min_blocks and any(fnmatchcase(layer, pattern) for pattern in patterns):
            return rule
    return Rule((), FLOAT, "no rule of layers.toml knows it")


def named_layers(stage: str, model: ir.Model) -> dict[str, Layer]:
    """Layers of a stage's graph by name, such as "dit/dit.blocks.0.ffn.0" or "vae_decode/vae.decoder.head.2"."""
    family, named = FAMILIES.get(stage, stage), {}
    for node in model.graph:
        if (layer := layer_of(node)) is not None:
            name = f"{family}/{_weights_name(node)}"
            # One weight may serve two nodes; the second is told apart, and the order is the same in every graph of a family.
            named[name if name not in named else f"{name}#{len(named)}"] = layer
    return named


def exact_weights(stage: str, model: ir.Model, fp32: ir.Model) -> dict[str, np.ndarray]:
    """The layers' weights in fp32 by node name of `model`, which is the same stage in half precision.

    Nodes and weights have other names in another export; layers have the same.
    """
    nodes = {node.name: node for node in fp32.graph}
    whole = {name: nodes[layer.name].inputs[1].const_value for name, layer in named_layers(stage, fp32).items()}
    layers = named_layers(stage, model)
    return {layer.name: whole[name].numpy() for name, layer in layers.items() if tuple(whole[name].shape) == layer.shape}


def _weights_name(node: ir.Node) -> str:
    """The parameter behind a node: its bias keeps the checkpoint's name, its weights may have been rearranged at export."""
    names = [node.inputs[2].name] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    if node.op_type == "MatMul":
        for user, _ in node.outputs[0].uses():
            if user.op_type == "Add":
                names += [value.name for value in user.inputs if value.name in node.graph.initializers]
    names.append(node.inputs[1].name)
    for name in names:
        if name.endswith((".bias", ".weight")):
            return name.rpartition(".")[0]
    return node.name


@dataclass
class Activation:
    """What calibration saw of one tensor: rows [R, K] of it, and the largest magnitude per channel [K].

    Channels are those of a matrix product. The VAE's pictures count as one: a first frame meets a third of a kernel's channels.
    """

    rows: list[np.ndarray] = field(default_factory=list)
    largest: np.ndarray | None = None

    def add(self, array: np.ndarray, kind: str) -> None:
        """Take some rows of what a layer of this kind takes or gives."""
        rows = array.reshape(-1, 1 if kind == "Conv" else array.shape[-1])
        num_rows = VALUES_PER_SAMPLE if kind == "Conv" else ROWS_PER_SAMPLE
        largest = np.abs(rows).max(axis=0)
        self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        step = max(len(rows) // num_rows, 1)
        self.rows.append(np.array(rows[::step][:num_rows]))

    def scale(self, smooth: np.ndarray | None = None) -> float:
        """Value of one integer step: of the tried ranges the one with the smallest squared error of rounding and clipping."""
        values, largest = np.concatenate(self.rows), self.largest
        if smooth is not None:
            values, largest = values / smooth, largest / smooth
        top = float(largest.max())
        if top == 0:
            return 1.0
        # The extreme of each channel counts once, whether its row was kept or not.
        sizes = np.concatenate([np.abs(values).reshape(-1), largest])
        counts, edges = np.histogram(sizes, bins=4096, range=(0, top))
        centres = (edges[:-1] + edges[1:]) / 2
        errors = []
        for share in RANGE_SHARES:
            step = share * top / QMAX
            rounded = np.clip(np.rint(centres / step), 0, QMAX) * step
            # Rounding within a bin is not seen by its centre: its variance is step^2/12.
            inside = centres <= share * top
            errors.append(float((counts * np.where(inside, step**2 / 12, (centres - rounded) ** 2)).sum()))
        return float(RANGE_SHARES[int(np.argmin(errors))] * top / QMAX)


@dataclass(frozen=True)
class Activations:
    """Of every layer of a graph family, by layer name."""

    inputs: dict[str, Activation]
    results: dict[str, Activation]


def observe(graphs: Mapping[str, Path], samples: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> Activations:
    """Run samples through fp32 graphs and look at what enters each layer, and what leaves each convolution.

    Args:
        graphs: stage -> file; stages without samples are passed over.
    """
    seen = Activations({}, {})
    for stage, path in graphs.items():
        if not samples.get(stage):
            continue
        model = ir.load(path)
        layers = named_layers(stage, model)
        wanted = {layer.source for layer in layers.values()}
        wanted |= {layer.result for layer in layers.values() if layer.kind == "Conv"}
        session, names = probe_session(model, path, wanted)
        for sample in samples[stage]:
            values = {**sample, **dict(zip(names, session.run(names, dict(sample)), strict=True))}
            taken: dict[str, Activation] = {}
            for name, layer in layers.items():
                seen.inputs.setdefault(name, Activation())
                if layer.source in taken:
                    _share(seen.inputs[name], taken[layer.source])
                else:
                    seen.inputs[name].add(values[layer.source], layer.kind)
                    taken[layer.source] = seen.inputs[name]
                if layer.kind == "Conv":
                    seen.results.setdefault(name, Activation()).add(values[layer.result], layer.kind)
    return seen


def _share(activation: Activation, other: Activation) -> None:
    """The same tensor enters two layers: its rows are kept once."""
    activation.rows, activation.largest = other.rows, other.largest


def probe_session(
    model: ir.Model, path: Path, wanted: Iterable[str]
) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """A session of a graph whose named inner values are outputs too, and the names of all outputs."""
    have = {value.name for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name in wanted and value.name not in have:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = ir.to_proto(inline_weights(model)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return session, [value.name for value in session.get_outputs()]


def inline_weights(model: ir.Model) -> ir.Model:
    """Weights into the graph itself, in place, so that it can be loaded from memory."""
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return model


def smooth_factors(largest: np.ndarray, weights: Sequence[np.ndarray], alpha: float = ALPHA) -> np.ndarray:
    """SmoothQuant's factors [K] of an input that enters several weights [K, N]: max|x|^alpha / max|w|^(1-alpha)."""
    of_weights = np.max([np.abs(matrix).max(axis=1) for matrix in weights], axis=0)
    floor = 1e-5
    factors = np.maximum(largest, floor) ** alpha / np.maximum(of_weights, floor) ** (1 - alpha)
    # The scale of all factors together is arbitrary; around one, fp16 has room on both sides.
    factors = factors / np.exp(np.log(factors).mean())
    return np.clip(factors, 1 / 64, 64).astype(np.float32)


@dataclass(frozen=True)
class Recipe:
    """Every layer's recipe by layer name, and which of them may be int8."""

    layers: Mapping[str, LayerRecipe]
    weights: Mapping[str, int]  # layer -> number of its weights

    @property
    def candidates(self) -> list[str]:
        """Layers whose activations are quantised."""
        return [name for name, layer in self.layers.items() if layer.mode == INT8]

    def without(self, names: Iterable[str], mode: str = WEIGHTS) -> Recipe:
        """The recipe with some layers in another mode; factors that several layers share stay with the others."""
        changed = dict(self.layers)
        for name in names:
            changed[name] = replace(changed[name], mode=mode, smooth=changed[name].smooth if mode == INT8 else None)
        return Recipe(changed, self.weights)

    def only(self, names: Iterable[str]) -> Recipe:
        """The recipe with nothing quantised but these layers."""
        kept = set(names)
        return Recipe(
            {name: layer if name in kept else replace(layer, mode=FLOAT, smooth=None) for name, layer in self.layers.items()},
            self.weights,
        )

    def of(self, stage: str, model: ir.Model) -> dict[str, LayerRecipe]:
        """By node name, for one graph; rounding of results that are outputs of the graph is left out with its layer."""
        outputs = {value.name for value in model.graph.outputs}
        found = {}
        for name, layer in named_layers(stage, model).items():
            recipe = self.layers.get(name)
            if recipe is None:
                continue
            if recipe.mode == INT8 and layer.kind == "Conv" and layer.result in outputs:
                recipe = replace(recipe, mode=WEIGHTS, smooth=None)
            found[layer.name] = recipe
        return found


def make_recipe(
    graphs: Mapping[str, Path], seen: Activations, num_blocks: int, rules: Sequence[Rule] | None = None, alpha: float = ALPHA
) -> Recipe:
    """A recipe for every layer of all graphs.

    Args:
        graphs: stage -> file of the fp32 graph.
        seen: of `observe`.
        num_blocks: of the transformer.
        alpha: of SmoothQuant; 0 switches it off.
    """
    rules = load_rules() if rules is None else rules
    layers: dict[str, LayerRecipe] = {}
    weights: dict[str, int] = {}
    for stage, path in graphs.items():
        model = ir.load(path)
        named = named_layers(stage, model)
        constants = {node.name: node.inputs[1].const_value for node in model.graph if layer_of(node) is not None}
        groups: dict[str, list[str]] = {}
        for name, layer in named.items():
            groups.setdefault(layer.source, []).append(name)
        for members in groups.values():
            found = {name: rule_of(name, num_blocks, rules) for name in members}
            smoothed = [
                name for name in members
                if alpha and found[name].mode == INT8 and named[name].kind == "MatMul" and name in seen.inputs
                and any(fnmatchcase(name, pattern) for pattern in found[name].smooth)
            ]  # fmt: skip
            smooth = None
            if smoothed:
                arrays = [constants[named[name].name].numpy() for name in smoothed]
                smooth = smooth_factors(seen.inputs[smoothed[0]].largest, arrays, alpha)
            for name in members:
                if name in layers:
                    continue
                layer, mode = named[name], found[name].mode
                weights[name] = layer.num_weights
                if mode == INT8 and name not in seen.inputs:
                    mode = WEIGHTS
                if mode != INT8:
                    layers[name] = LayerRecipe(mode)
                    continue
                factors = smooth if name in smoothed else None
                result = seen.results[name].scale() if layer.kind == "Conv" else None
                layers[name] = LayerRecipe(INT8, seen.inputs[name].scale(factors), result, factors)
    return Recipe(layers, weights)
