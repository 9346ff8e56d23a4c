"""How close the fp16 tensors inside a graph come to the largest number of fp16.

The graph is run in fp32, with the same nodes: there an overflow has a size instead of being infinite, and every tensor that is
fp16 in the real graph has its largest magnitude as an output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from factorportrait.export.graphs import WeightFiles, write_graph


def largest_activations(path: Path, cases: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The largest magnitude over all cases of every float16 value that the graph computes, by name.

    Args:
        path: of the graph, its weights beside it.
        cases: inputs by name; float32 is taken for float16.
    """
    half = _half_values(path)
    if not half:
        return {}
    twin = in_fp32(ir.load(path))
    watched = [value for node in twin.graph for value in node.outputs if value.name in half]
    for i, value in enumerate(watched):
        size = ir.node("Abs", [value], name=f"size_{i}")
        largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0}, name=f"largest_{i}")
        output = largest.outputs[0]
        output.name, output.dtype, output.shape = f"largest_{i}", ir.DataType.FLOAT, ir.Shape([])
        twin.graph.extend([size, largest])
        twin.graph.outputs.append(output)
    found = {value.name: 0.0 for value in watched}
    with tempfile.TemporaryDirectory() as folder:
        write_graph(twin, Path(folder), "twin", WeightFiles(Path(folder), "twin"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Operators as they stand in the graph: fusing pairs of fp8 makes a graph that does not load (1.31).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(f"{folder}/twin.onnx", options, providers=["CPUExecutionProvider"])
        names = [f"largest_{i}" for i in range(len(watched))]
        for case in cases:
            feeds = {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in case.items()}
            for value, size in zip(watched, session.run(names, feeds), strict=True):
                # A NaN stays one whichever side of the comparison it is on.
                found[value.name] = float(np.maximum(found[value.name], size))
    return found


def in_fp32(model: ir.Model) -> ir.Model:
    """The graph with float32 in the place of every float16, changed in place."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    for value in (*kept, *model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT16:
            # A new type: copies of a graph share the old one.
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        if value.const_value.dtype == ir.DataType.FLOAT16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "output_dtype") and attribute.value == ir.DataType.FLOAT16:
                node.attributes.add(ir.AttrInt64(name, ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT16:
                node.attributes.add(ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32))))
        for value in node.outputs:
            if value not in kept:
                value.type = value.shape = None
    return model


def _half_values(path: Path) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    values = (*inferred.graph.value_info, *inferred.graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
