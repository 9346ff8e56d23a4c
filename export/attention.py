"""The fused Attention operator written out, for a target that does not compile it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

FUSED = "Attention"


def head_widths(model: ir.Model) -> list[int]:
    """The width E of a head of every Attention in a graph of `export_stage`, which states scales as 1 / sqrt(E)."""
    return [round(node.attributes["scale"].value ** -2) for node in model.graph if node.op_type == FUSED]


def decompose_attention(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """A copy of a graph with softmax(q k^T / sqrt(E)) v in place of each Attention; weights are shared with the original.

    Args:
        model: from `export_stage`.
        dtype: of queries, keys and values.

    Raises:
        RuntimeError: an Attention with a mask or a cache. No graph of ours has one.
    """
    model = model.clone()
    for node in list(model.graph):
        if node.op_type == FUSED:
            _decompose(model.graph, node, dtype)
    return model


def _decompose(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    # q: [B, H, S, E], k, v: [B, H, S', E] -> [B, H, S, E]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = [value for value in node.inputs if value is not None]
    plain = len(inputs) == 3 and len(node.outputs) == 1 and not attributes.get("is_causal") and not attributes.get("softcap")
    if not plain:
        raise RuntimeError(f"{node.name}: expected an Attention of q, k and v alone, found {attributes} of {len(inputs)}")
    q, k, v = inputs
    name, out = node.outputs[0].name, node.outputs[0]

    def add(op_type: str, *values: ir.Value, suffix: str, **options) -> ir.Value:
        added = ir.node(op_type, list(values), options, name=f"{name}_{suffix}")
        added.outputs[0].name = f"{name}_{suffix}"
        graph.insert_before(node, added)
        return added.outputs[0]

    # The root on both sides, as the operator does it: neither product leaves the range of fp16.
    root = ir.tensor(np.array(math.sqrt(attributes["scale"]), dtype.numpy()), name=f"{name}_root")
    scale = ir.Value(name=root.name, shape=root.shape, type=ir.TensorType(dtype), const_value=root)
    graph.register_initializer(scale)
    scaled_q = add("Mul", q, scale, suffix="q")
    scaled_k = add("Mul", add("Transpose", k, suffix="kt", perm=[0, 1, 3, 2]), scale, suffix="k")
    weights = add("Softmax", add("MatMul", scaled_q, scaled_k, suffix="scores"), suffix="weights", axis=-1)
    result = add("MatMul", weights, v, suffix="out")
    ir.convenience.replace_all_uses_with(out, result)
    graph.remove(node, safe=True)
