"""int8-weights: weights stored in eight bits behind DequantizeLinear, everything else as in the float graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from factorportrait.export.quantize.insert import WEIGHTS, LayerRecipe, quantize_graph
from factorportrait.export.quantize.recipe import exact_weights, load_rules, named_layers, rule_of


def quantize_weights(
    stage: str, graph: ir.Model, num_blocks: int, *, half: bool, fp32: ir.Model | None = None
) -> ir.Model:
    """Round the weights of every layer that weight_only.toml says, in place.

    ONNX Runtime's CPU kernels take DequantizeLinear and MatMul as one product of integers; TensorRT stores the integers.

    Args:
        stage: its name.
        graph: in fp32, or in fp16 if `half`; scales have the same type.
        num_blocks: of the transformer.
        fp32: the same stage in fp32, whose weights are rounded then, so that both hold the same integers.
    """
    recipe = {name: LayerRecipe(WEIGHTS) for name in rounded_layers(stage, graph, num_blocks)}
    exact = None if fp32 is None else exact_weights(stage, graph, fp32)
    return quantize_graph(graph, recipe, "tensorrt" if half else "cpu", exact)


def rounded_layers(stage: str, graph: ir.Model, num_blocks: int) -> list[str]:
    """The nodes of a graph whose weights weight_only.toml wants in eight bits."""
    rules = load_rules(Path(__file__).with_name("weight_only.toml"))
    return [layer.name for name, layer in named_layers(stage, graph).items() if rule_of(name, num_blocks, rules).mode == WEIGHTS]
