"""The graphs of a stage for a precision: one for all targets, and others for targets that need their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from factorportrait.export.parts import ReleasedModel

TENSORRT = "tensorrt"
# TensorRT compiles the fused operator in half precision alone, and up to this width of a head.
TENSORRT_HEAD_WIDTH = 256
# Stages that run the weights of another one: their graphs share its files.
FAMILIES = {"dit_inplace": "dit"}
# The transformer's names, whole and by ranges of blocks.
TRANSFORMER, IN_PLACE = r"dit(_inplace)?(_\d+_\d+)?", r"dit_inplace(_\d+_\d+)?"


def whole_name(stage: str) -> str:
    """Name of the stage that a range of blocks belongs to."""
    return re.sub(r"_\d+_\d+$", "", stage)


def family_of(stage: str) -> str:
    """Name of the files of weights that a stage shares with others: of all ranges, and of both forms of the transformer."""
    return FAMILIES.get(whole_name(stage), whole_name(stage))


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
    """What the graphs of all stages of one export share.

    Args:
        model: with a `config`.
        longest: inputs of a stage as long as a run can have them.
        in_place: gives a stage `dit_inplace` with a number of slots; None where `model` is in memory.
        half: a stage in half precision; None to convert `model` once.
    """

    def __init__(
        self,
        model: FactorPortrait | ReleasedModel,
        longest: Callable[[Stage], list[dict[str, Tensor]]],
        in_place: Callable[[Stage, int], Stage] | None = None,
        half: Callable[[Stage], Stage] | None = None,
    ):
        self.model = model
        self._longest, self._in_place, self._own_half = longest, in_place, half
        self._half: HalfWeights | None = None

    def longest(self, stage: Stage) -> list[dict[str, np.ndarray]]:
        """Inputs of a stage by name, fp32, as long as a run can have them: what scales are taken from."""
        return [{name: case[name].numpy() for name in stage.input_names} for case in self._longest(stage)]

    def half(self, stage: Stage) -> Stage:
        """A stage in half precision; the weights are converted once."""
        if self._own_half is not None:
            return self._own_half(stage)
        if self._half is None:
            self._half = HalfWeights(self.model)
        return self._half.stage(stage)

    def with_capacity(self, stage: Stage) -> Stage:
        """A stage on a cache in place that has as many slots as the config's window asks for."""
        config = self.model.config
        capacity = config.conditioning.sink_slots + config.generation.window_frames
        return in_place_stage(self.model, capacity) if self._in_place is None else self._in_place(stage, capacity)


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
            whole = variant.graph.clone() if whole is None and not half else whole
            name, num_blocks = whole_name(stage.name), context.model.config.dit.num_layers
            graph = quantize_weights(name, variant.graph, num_blocks, half=half, fp32=whole)
            found.append(dataclasses.replace(variant, graph=graph, half=None))
    return found


def _fp8(stage: Stage, targets: tuple[str, ...], context: Context) -> list[Variant]:
    """fp16 but for the matrix products of the transformer's blocks, which are all that fp8 kernels are worth it for."""
    found = []
    for variant in float_variants(stage, targets, context, half=True):
        if re.fullmatch(TRANSFORMER, stage.name):
            nodes = rounded_layers(whole_name(stage.name), variant.graph, context.model.config.dit.num_layers)
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
    return context.with_capacity(stage) if re.fullmatch(IN_PLACE, stage.name) else stage


def _export(stage: Stage, targets: tuple[str, ...], context: Context, half: bool) -> Variant:
    rounded = context.half(stage) if half else None
    return Variant(targets, stage, export_stage(rounded or stage), rounded)
