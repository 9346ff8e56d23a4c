"""Quantise-dequantise pairs into a graph: from one recipe, the graph of ONNX Runtime's CPU kernels and that of TensorRT.

Own code, although ONNX Runtime (`onnxruntime.quantization`) and ModelOpt insert such pairs too, because on these graphs
- ONNX Runtime's quantiser rounds the output of every matrix product to eight bits again, writes a graph that does not load
  when activations are int8, stops at a channel whose weights are all zero, and knows no scales of half precision;
- it quantises behind the three stacked frames of a causal convolution, so that they are copied as floats, three times
  the work, where the frames can be quantised once and copied as bytes;
- neither folds SmoothQuant into an ONNX graph, and quantised torch models of ModelOpt did not export.

Numbers are the same on both targets: symmetric, one scale per activation tensor, one per output channel of the weights.
The CPU stores activations as uint8 with zero point 128, since its integer products want unsigned by signed; TensorRT as int8
with zero point 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

TARGETS = ("cpu", "tensorrt")
# Largest magnitude of a symmetric 8-bit number; -128 stays unused.
QMAX = 127
KINDS = ("MatMul", "Gemm", "Conv")
# Operators that only move values: quantising before them gives the same numbers as after them.
MOVES = {"Concat": None, "Slice": 1, "Reshape": 1, "Transpose": 1, "Resize": 1, "Squeeze": 1, "Unsqueeze": 1}
INT8, WEIGHTS, FLOAT = "int8", "weights", "float"


@dataclass(frozen=True)
class LayerRecipe:
    """How one MatMul, Gemm or Conv is computed.

    Attributes:
        mode: "int8" (weights and activations), "weights" (stored as int8, computed in float) or "float".
        input_scale: activation that one step of the integer is worth.
        output_scale: the same of a convolution's result, which ONNX Runtime's integer convolution rounds again.
        smooth: SmoothQuant's factors [K]: the activation is divided by them, the weights are multiplied.
    """

    mode: str = FLOAT
    input_scale: float | None = None
    output_scale: float | None = None
    smooth: np.ndarray | None = None


@dataclass(frozen=True)
class Layer:
    """A MatMul, Gemm or Conv with constant weights.

    Attributes:
        name: of the node; source: the activation's value name; kind: of `KINDS`.
        axis: of the weights' output channels.
    """

    name: str
    kind: str
    source: str
    result: str
    axis: int
    shape: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """Elements of the weights."""
        return int(np.prod(self.shape))


def layers_of(model: ir.Model) -> list[Layer]:
    """Every layer of a graph that can be quantised, in the order of the graph."""
    return [layer for node in model.graph if (layer := layer_of(node)) is not None]


def layer_of(node: ir.Node) -> Layer | None:
    """The layer of a node; None for other operators, two activations, or weights that are not plain matrices or kernels."""
    if node.op_type not in KINDS or node.domain not in ("", "ai.onnx"):
        return None
    weights = node.inputs[1].const_value
    if weights is None or node.inputs[1].dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    rank = len(weights.shape)
    if node.op_type == "MatMul" and rank != 2:
        return None
    if node.op_type == "Gemm":
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return None
        axis = 0 if attributes.get("transB", 0) else 1
    else:
        axis = 0 if node.op_type == "Conv" else 1
    return Layer(
        node.name, node.op_type, node.inputs[0].name, node.outputs[0].name, axis, tuple(int(size) for size in weights.shape)
    )


def weight_scales(weights: np.ndarray, axis: int) -> np.ndarray:
    """Scales [N] of the output channels; a channel of zeros gets 1."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    largest = np.abs(weights).max(axis=others).astype(np.float32)
    return np.where(largest > 0, largest / QMAX, 1).astype(np.float32)


def round_weights(weights: np.ndarray, scales: np.ndarray, axis: int) -> np.ndarray:
    """int8 weights on their scales."""
    shape = [1] * weights.ndim
    shape[axis] = -1
    return np.clip(np.rint(weights.astype(np.float32) / scales.reshape(shape)), -QMAX, QMAX).astype(np.int8)


def smoothed(weights: np.ndarray, layer: Layer, smooth: np.ndarray | None) -> np.ndarray:
    """Weights times SmoothQuant's factors of their input channels."""
    if smooth is None:
        return weights
    shape = [1] * weights.ndim
    shape[1 - layer.axis] = -1
    return weights * smooth.astype(weights.dtype).reshape(shape)


def quantize_graph(
    model: ir.Model, recipe: Mapping[str, LayerRecipe], target: str, exact: Mapping[str, np.ndarray] | None = None
) -> ir.Model:
    """Insert the pairs that `recipe` asks for, in place.

    Args:
        model: a graph of `export_stage`, fp32 for the CPU, fp32 or fp16 for TensorRT: scales take the activation's type.
        recipe: by node name; layers not named stay as they are.
        target: one of `TARGETS`.
        exact: weights in fp32 by node name, to be rounded in the place of a half graph's: then the graphs of all targets hold
            the same integers, and share the file of them.

    Raises:
        ValueError: an unknown target, or a name that is no layer of the graph.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {TARGETS}, found {target!r}")
    writer = _Writer(model, target, exact or {})
    nodes = {node.name: node for node in model.graph}
    writer.fold_smoothing(nodes, recipe)
    for name, layer_recipe in recipe.items():
        if layer_recipe.mode == FLOAT:
            continue
        layer = layer_of(nodes[name]) if name in nodes else None
        if layer is None:
            raise ValueError(f"graph {model.graph.name}: no layer {name} to quantise")
        writer.write(nodes[name], layer, layer_recipe)
    if target == "cpu":
        writer.keep_codes()
    _remove_unused(model)
    return model


class _Writer:
    """Inserts nodes; a value is quantised once for all that use it on the same scale."""

    def __init__(self, model: ir.Model, target: str, exact: Mapping[str, np.ndarray]):
        self.graph, self.target, self.exact = model.graph, target, exact
        self.code = ir.DataType.UINT8 if target == "cpu" else ir.DataType.INT8
        self._quantized: dict[tuple[str, float], ir.Value] = {}
        self._dequantized: dict[tuple[str, float], ir.Value] = {}
        self._divided: dict[tuple[str, bytes], ir.Value] = {}
        self._count = 0

    def write(self, node: ir.Node, layer: Layer, recipe: LayerRecipe) -> None:
        """Replace the inputs of one layer, and for the CPU the result of a convolution."""
        weights, dtype = node.inputs[1], node.inputs[1].dtype
        node.replace_input_with(1, self._weights(node, layer, weights, recipe))
        if recipe.mode == WEIGHTS:
            return
        source = node.inputs[0]
        if recipe.smooth is not None:
            source = self._divide(node, source, recipe.smooth, dtype)
        scale = float(recipe.input_scale)
        node.replace_input_with(0, self._dequantize(node, self._quantize(node, source, scale, dtype), scale, dtype))
        if self.target == "cpu" and layer.kind == "Conv":
            self._round_result(node, float(recipe.output_scale), dtype)

    def keep_codes(self) -> None:
        """Let the caches that a causal convolution leaves come from its integers: its floats need not be stacked then."""
        scales = dict(self._quantized)
        for i, output in enumerate(self.graph.outputs):
            node = output.producer()
            if not output.name.startswith("cache_out.") or node is None or node.op_type != "Slice":
                continue
            for name, scale in scales:
                if name == node.inputs[0].name:
                    # At the end: the integers are stacked just before their convolution.
                    codes = self._quantize(None, output, scale, output.dtype)
                    rounded = self._insert(None, "DequantizeLinear", self._pair(codes, scale, output.dtype), f"{output.name}.kept")
                    rounded.type, rounded.shape = output.type, output.shape
                    output.name, rounded.name = f"{output.name}.float", output.name
                    self.graph.outputs[i] = rounded
                    break

    def _weights(self, node: ir.Node, layer: Layer, weights: ir.Value, recipe: LayerRecipe) -> ir.Value:
        array = smoothed(self.exact.get(node.name, weights.const_value.numpy()), layer, recipe.smooth)
        scales = weight_scales(array, layer.axis)
        stem = weights.name
        parts = [
            self._constant(f"{stem}.int8", round_weights(array, scales, layer.axis)),
            self._constant(f"{stem}.scale", scales.astype(weights.const_value.numpy().dtype)),
            self._constant(f"{stem}.zero", np.zeros(len(scales), np.int8)),
        ]
        return self._insert(node, "DequantizeLinear", parts, f"{stem}.dequantized", {"axis": layer.axis}, weights.dtype)

    def fold_smoothing(self, nodes: Mapping[str, ir.Node], recipe: Mapping[str, LayerRecipe]) -> None:
        """Divide activations by SmoothQuant's factors where it costs nothing: in the norm and the shift that make them."""
        for name, layer_recipe in recipe.items():
            if layer_recipe.smooth is None or name not in nodes:
                continue
            source, smooth = nodes[name].inputs[0], layer_recipe.smooth
            key = source.name, smooth.tobytes()
            users = [recipe.get(user.name) for user, _ in source.uses()]
            same = all(user is not None and user.smooth is not None and user.smooth.tobytes() == key[1] for user in users)
            if key not in self._divided and same and (parts := _norm_and_shift(source)) is not None:
                norm, add, index = parts
                for node, at in ((norm, 1), (add, index)):
                    value = node.inputs[at]
                    dtype = value.dtype or norm.inputs[1].dtype
                    factor = (1 / smooth).astype(dtype.numpy())
                    if at == 1 and node is norm:
                        divided = self._constant(f"{norm.name}.smooth", value.const_value.numpy() * factor)
                    else:
                        factors = self._constant(f"{add.name}.smooth", factor)
                        divided = self._insert(add, "Mul", [value, factors], f"{value.name}.smoothed{self._next()}")
                    node.replace_input_with(at, divided)
                self._divided[key] = source

    def _divide(self, node: ir.Node, source: ir.Value, smooth: np.ndarray, dtype: ir.DataType) -> ir.Value:
        key = source.name, smooth.tobytes()
        if key not in self._divided:
            factor = self._constant(f"{source.name}.smooth{len(self._divided)}", (1 / smooth).astype(dtype.numpy()))
            self._divided[key] = self._insert(node, "Mul", [source, factor], f"{source.name}.smoothed{len(self._divided)}")
        return self._divided[key]

    def _quantize(self, node: ir.Node, source: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """`source` as integers, from as far before it as only moves lie between: there it may be smaller."""
        key = source.name, scale
        if key in self._quantized:
            return self._quantized[key]
        producer = source.producer()
        if self.target == "cpu" and producer is not None and producer.op_type in MOVES and _only_moves(producer):
            num_data = MOVES[producer.op_type]
            inputs = list(producer.inputs)
            for i in range(len(inputs) if num_data is None else num_data):
                inputs[i] = self._quantize(producer, inputs[i], scale, dtype)
            attributes = {name: attribute.value for name, attribute in producer.attributes.items()}
            result = self._insert(node, producer.op_type, inputs, f"{source.name}.codes{self._next()}", attributes, self.code)
        else:
            name = f"{source.name}.q{self._next()}"
            result = self._insert(node, "QuantizeLinear", self._pair(source, scale, dtype), name, None, self.code)
        self._quantized[key] = result
        return result

    def _dequantize(self, node: ir.Node, codes: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        key = codes.name, scale
        if key not in self._dequantized:
            inputs = self._pair(codes, scale, dtype)
            self._dequantized[key] = self._insert(node, "DequantizeLinear", inputs, f"{codes.name}.dq", None, dtype)
        return self._dequantized[key]

    def _pair(self, value: ir.Value, scale: float, dtype: ir.DataType) -> list[ir.Value]:
        """`value`, its scale and its zero point."""
        name = f"{value.name}.{self._next()}"
        zero = 128 if self.code == ir.DataType.UINT8 else 0
        return [
            value,
            self._constant(f"{name}.scale", np.array(scale, dtype.numpy())),
            self._constant(f"{name}.zero", np.array(zero, self.code.numpy())),
        ]

    def _round_result(self, node: ir.Node, scale: float, dtype: ir.DataType) -> None:
        result = node.outputs[0]
        raw = ir.Value(name=f"{result.name}.raw", type=ir.TensorType(dtype))
        users = list(result.uses())
        after = ir.Node("", node.op_type, node.inputs, attributes=node.attributes.values(), outputs=[raw], name=f"{node.name}.int8")
        self.graph.insert_before(node, after)
        rounded = self._dequantize(node, self._quantize(node, raw, scale, dtype), scale, dtype)
        for user, index in users:
            user.replace_input_with(index, rounded)
        if result in self.graph.outputs:
            raise ValueError(f"{node.name}: a convolution whose result is an output of the graph cannot be rounded")
        self.graph.remove(node, safe=True)

    def _insert(self, before, op_type, inputs, name, attributes=None, dtype=None) -> ir.Value:
        output = ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes, outputs=[output], name=f"node_{name}")
        self.graph.append(node) if before is None else self.graph.insert_before(before, node)
        return output

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name in self.graph.initializers:
            name = f"{name}.{self._next()}"
        value = ir.val(name, const_value=ir.tensor(np.array(array, order="C"), name=name))
        self.graph.register_initializer(value)
        return value

    def _next(self) -> int:
        self._count += 1
        return self._count


def _norm_and_shift(value: ir.Value) -> tuple[ir.Node, ir.Node, int] | None:
    """Norm, sum and the shift's index in it, if `value` is norm(x) * (1 + scale) + shift and nothing else needs its parts."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Cast"):
        value = node.inputs[0]
        node = value.producer() if len(value.uses()) == 1 else None
    if node is None or node.op_type != "Add":
        return None
    for index in (0, 1):
        scaled = node.inputs[1 - index].producer()
        if scaled is None or scaled.op_type != "Mul" or len(scaled.outputs[0].uses()) != 1:
            continue
        for factor in scaled.inputs:
            norm = factor.producer()
            if (
                norm is not None and norm.op_type == "LayerNormalization" and len(factor.uses()) == 1
                and len([value for value in norm.inputs if value is not None]) == 2 and norm.inputs[1].const_value is not None
            ):  # fmt: skip
                return norm, node, index
    return None


def _only_moves(node: ir.Node) -> bool:
    """A resize moves values only when it repeats the nearest ones."""
    if node.op_type != "Resize":
        return True
    mode = node.attributes.get("mode")
    return mode is None or mode.value == "nearest"


def _remove_unused(model: ir.Model) -> None:
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)
