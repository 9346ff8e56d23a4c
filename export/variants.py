"""The graphs of a stage for a precision: one for all targets, and others for targets that need their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from factorportrait.export.attention import decompose_attention, head_widths
from factorportrait.export.fp8 import fp8_graph
from factorportrait.export.graphs import export_stage
from factorportrait.export.models.factorportrait import FactorPortrait
from factorportrait.export.precision import HalfWeights
from factorportrait.export.stages import Stage, in_place_stage
from factorportrait.export.weight_only import quantize_weights, rounded_layers

TENSORRT = "tensorrt"
# TensorRT compiles the fused operator in half precision alone, and up to this width of a head.
TENSORRT_HEAD_WIDTH = 256
# Stages that run the weights of another one: their graphs share its files.
FAMILIES = {"dit_inplace": "dit"}


@dataclass(frozen=True)
class Variant:
    """A graph and the targets that run it.

    Attributes:
        stage: in fp32, what the graph must equal.
        half: the stage in half precision, if that is what was exported.
    """

    targets: tuple[str, ...]
    stage: Stage
    graph: ir.Model
    half: Stage | None = None


class Context:
    """What the graphs of all stages of one export share."""

    def __init__(self, model: FactorPortrait, longest: Callable[[Stage], list[dict[str, Tensor]]]):
        self.model = model
        self._longest = longest
        self._half: HalfWeights | None = None

    def longest(self, stage: Stage) -> list[dict[str, np.ndarray]]:
        """Inputs of a stage by name, fp32, as long as a run can have them: what scales are taken from."""
        return [{name: case[name].numpy() for name in stage.input_names} for case in self._longest(stage)]

    def half(self, stage: Stage) -> Stage:
        """A stage in half precision; the weights are converted once."""
        if self._half is None:
            self._half = HalfWeights(self.model)
        return self._half.stage(stage)


def graph_variants(stage: Stage, precision: str, targets: Sequence[str], context: Context) -> list[Variant]:
    """Every graph of a stage; together they serve all of `targets`, and the first one is for those not named elsewhere.

    Args:
        stage: the fp32 stage.
        precision: a key of `PRECISION_VARIANTS`.
        targets: who the bundle is for.
        context: of this export.
    """
    return PRECISION_VARIANTS[precision](stage, tuple(targets), context)


def _fp32(stage: Stage, targets: tuple[str, ...], context: Context) -> list[Variant]:
    return float_variants(stage, targets, context, half=False)


def _fp16(stage: Stage, targets: tuple[str, ...], context: Context) -> list[Variant]:
    return float_variants(stage, targets, context, half=True)


def _int8_weights(stage: Stage, targets: tuple[str, ...], context: Context) -> list[Variant]:
    """ONNX Runtime fuses eight-bit weights with fp32 activations on a CPU; GPUs compute in fp16."""
    found, whole = [], None
    for half in (False, True):
        own = tuple(target for target in targets if (target != "cpu") == half)
        for variant in float_variants(stage, own, context, half=half) if own else []:
            whole = whole if half else variant.graph.clone()
            graph = quantize_weights(stage.name, variant.graph, context.model.config.dit.num_layers, half=half, fp32=whole)
            found.append(dataclasses.replace(variant, graph=graph, half=None))
    return found


def _fp8(stage: Stage, targets: tuple[str, ...], context: Context) -> list[Variant]:
    """fp16 but for the matrix products of the transformer's blocks, which are all that fp8 kernels are worth it for."""
    found = []
    for variant in float_variants(stage, targets, context, half=True):
        if stage.name in ("dit", "dit_inplace"):
            nodes = rounded_layers(stage.name, variant.graph, context.model.config.dit.num_layers)
            graph = fp8_graph(variant.graph, nodes, context.longest(variant.stage))
            variant = dataclasses.replace(variant, graph=graph, half=None)
        found.append(variant)
    return found


PRECISION_VARIANTS: dict[str, Callable[[Stage, tuple[str, ...], Context], list[Variant]]] = {
    "fp32": _fp32, "fp16": _fp16, "int8-weights": _int8_weights, "fp8": _fp8,
}  # fmt: skip


def float_variants(stage: Stage, targets: tuple[str, ...], context: Context, *, half: bool) -> list[Variant]:
    """fp32 or fp16: one graph for ONNX Runtime, which TensorRT shares unless it cannot compile it."""
    others = tuple(target for target in targets if target != TENSORRT)
    found = [_export(stage, others, context, half)] if others else []
    if TENSORRT not in targets:
        return found
    own_stage = tensorrt_stage(stage, context)
    own = found[0] if found and own_stage is stage else _export(own_stage, (TENSORRT,), context, half)
    if any(not half or width > TENSORRT_HEAD_WIDTH for width in head_widths(own.graph)):
        graph = decompose_attention(own.graph, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
        own = dataclasses.replace(own, graph=graph, targets=(TENSORRT,))
    if found and own is found[0]:
        return [dataclasses.replace(own, targets=targets)]
    return [*found, own]


def tensorrt_stage(stage: Stage, context: Context) -> Stage:
    """The stage as TensorRT can run it: a cache in place has a fixed number of slots there."""
    if stage.name != "dit_inplace":
        return stage
    return in_place_stage(context.model, capacity=1 + context.model.config.generation.window_frames)


def _export(stage: Stage, targets: tuple[str, ...], context: Context, half: bool) -> Variant:
    rounded = context.half(stage) if half else None
    return Variant(targets, stage, export_stage(rounded or stage), rounded)
