"""fp8 (e4m3) for TensorRT: the matrix products of the transformer's blocks, with weights and activations in eight-bit floats.

Own code rather than ModelOpt's quantiser, which pins older onnx and onnxruntime. What TensorRT wants: one scale per tensor in the
graph's fp16, QuantizeLinear and DequantizeLinear around the activation, DequantizeLinear behind the stored weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from factorportrait.export.activations import largest_activations
from factorportrait.export.graphs import write_graph
from factorportrait.export.quantize.insert import layer_of

FP8 = ir.DataType.FLOAT8E4M3FN.numpy()
FP8_MAX = 448.0
# e4m3 keeps its precision over a range of 2^14, so room for larger activations than calibration saw costs nothing.
ROOM = 2.0
# Sizes that TensorRT's fp8 kernels take.
MULTIPLE = 16


def fp8_graph(model: ir.Model, nodes: Collection[str], cases: Sequence[Mapping[str, np.ndarray]]) -> ir.Model:
    """Round products of a half graph to fp8, in place; those whose sizes no kernel takes stay fp16.

    Args:
        model: of a stage in half precision.
        nodes: names of those that are rounded.
        cases: inputs by name, from which the scales of activations are taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_graph(model.clone(), Path(folder), "half")
        largest = largest_activations(Path(folder) / "half.onnx", cases)
    rounded: dict[str, ir.Value] = {}
    for node in list(model.graph):
        layer = layer_of(node) if node.name in nodes else None
        if layer is None or layer.kind != "MatMul" or any(size % MULTIPLE for size in layer.shape):
            continue
        weights = node.inputs[1].const_value.numpy().astype(np.float32)
        scale = _scale(float(np.abs(weights).max()))
        codes = _constant(model.graph, f"{node.inputs[1].name}.fp8", (weights / np.float32(scale)).astype(FP8))
        node.replace_input_with(1, _dequantized(model.graph, node, codes, scale))
        if layer.source not in rounded:
            source, scale = node.inputs[0], _scale(ROOM * largest[layer.source])
            pair = _pair(model.graph, source.name, scale)
            quantize = ir.node("QuantizeLinear", [source, *pair], name=f"{source.name}.quantize")
            quantize.outputs[0].name = f"{source.name}.fp8"
            model.graph.insert_before(node, quantize)
            rounded[layer.source] = _dequantized(model.graph, node, quantize.outputs[0], scale, pair)
        node.replace_input_with(0, rounded[layer.source])
    RemoveUnusedNodesPass()(model)
    return model


def _scale(largest: float) -> np.float16:
    """What 1 stands for. Never 0, and never so small that a weight divided by it overflows."""
    return np.float16(max(largest / FP8_MAX * (1 + 2**-10), 2**-14))


def _dequantized(
    graph: ir.Graph, before: ir.Node, codes: ir.Value, scale: np.float16, pair: tuple[ir.Value, ir.Value] | None = None
) -> ir.Value:
    node = ir.node("DequantizeLinear", [codes, *(pair or _pair(graph, codes.name, scale))], name=f"{codes.name}.dequantize")
    node.outputs[0].name = f"{codes.name}.dequantized"
    graph.insert_before(before, node)
    return node.outputs[0]


def _pair(graph: ir.Graph, name: str, scale: np.float16) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point; the zero point's type is that of the codes."""
    return _constant(graph, f"{name}.scale", np.array(scale)), _constant(graph, f"{name}.zero", np.zeros((), FP8))


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]
