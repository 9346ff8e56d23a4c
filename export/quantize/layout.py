"""Convolutions with channels last, for the CPU graph: where ONNX Runtime has its integer convolution.

ONNX Runtime turns quantised convolutions into `QLinearConv` with channels last by itself, and then moves the transposes that
this costs out of the way. On the VAE most of them stay, one or two per convolution, since fused activations and stacked frames
lie between, and they take longer than the convolutions. This pass knows the operators of these graphs and leaves transposes only
where a graph leaves pictures behind, or a convolution stays in float. Caches get channels last too: nothing but the same VAE
reads them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# Where an axis of [N, C, h, w] lies in [N, h, w, C].
AXIS = {0: 0, 1: 3, 2: 1, 3: 2}
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Sigmoid", "Clip", "Sqrt", "Reciprocal", "QuantizeLinear", "DequantizeLinear")
CONV_ATTRIBUTES = ("pads", "strides", "group", "dilations", "kernel_shape", "auto_pad")


def channels_last(model: ir.Model) -> ir.Model:
    """Rewrite quantised convolutions and what lies between them to channels last, in place.

    All inputs and outputs named `cache_in.*` and `cache_out.*` become [n, h, w, C], so that the graphs of first and later frames
    agree whatever they quantise.
    """
    _Rewriter(model).run()
    return model


def _integer_parts(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """The nodes before the activation, before the weights and after the result of a quantised 2-D convolution."""
    if node.op_type != "Conv" or node.domain:
        return None
    before, weights = node.inputs[0].producer(), node.inputs[1].producer()
    users = [user for user, _ in node.outputs[0].uses()]
    pairs = before is not None and weights is not None and before.op_type == weights.op_type == "DequantizeLinear"
    if not pairs or len(users) != 1 or users[0].op_type != "QuantizeLinear" or len(weights.inputs[0].const_value.shape) != 4:
        return None
    return before, weights, users[0]


class _Rewriter:
    def __init__(self, model: ir.Model):
        self.model, self.graph = model, model.graph
        self.last: dict[ir.Value, ir.Value] = {}  # value -> the same with channels last
        self.first: dict[ir.Value, ir.Value] = {}  # the way back, for those that need it
        self.count = 0

    def run(self) -> None:
        caches = [value for value in self.graph.inputs if value.name.startswith("cache_in.")]
        self.last.update((cache, cache) for cache in caches)
        for node in list(self.graph):
            if (parts := _integer_parts(node)) is not None:
                self._convolution(node, *parts)
            elif any(value in self.last for value in node.inputs):
                self._twin(node) or self._leave(node)
        for cache in caches:
            cache.shape = _permuted(cache.shape)
        for i, output in enumerate(self.graph.outputs):
            if output.name.startswith("cache_out."):
                self._replace_output(i, output)
            elif output in self.last:
                raise ValueError(f"graph {self.graph.name}: output {output.name} would have its channels last")
        import onnx_ir.passes.common as passes

        passes.RemoveUnusedNodesPass()(self.model)
        self.model.opset_imports["com.microsoft"] = 1

    def _convolution(self, node: ir.Node, before: ir.Node, weights: ir.Node, after: ir.Node) -> None:
        attributes = {name: node.attributes[name].value for name in CONV_ATTRIBUTES if name in node.attributes}
        inputs = [self._to_last(node, before.inputs[0]), *before.inputs[1:], *weights.inputs, *after.inputs[1:]]
        if len(node.inputs) > 2:
            scale = before.inputs[1].const_value.numpy() * weights.inputs[1].const_value.numpy()
            bias = np.rint(node.inputs[2].const_value.numpy() / scale)
            limits = np.iinfo(np.int32)
            inputs.append(self._constant(f"{node.name}.bias", np.clip(bias, limits.min, limits.max).astype(np.int32)))
        attributes["channels_last"] = 1
        result = self._insert(node, "QLinearConv", inputs, attributes, ir.DataType.UINT8, domain="com.microsoft")
        self.last[after.outputs[0]] = result

    def _twin(self, node: ir.Node) -> bool:
        """The node with channels last beside it, if its operator is known; the old one goes when nothing uses it."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        inputs = list(node.inputs)
        if node.op_type in ELEMENTWISE:
            num_data = 1 if node.op_type in ("Clip", "QuantizeLinear", "DequantizeLinear") else len(inputs)
        elif node.op_type == "Concat":
            num_data, attributes["axis"] = len(inputs), AXIS[attributes["axis"] % 4]
        elif node.op_type == "Split":
            num_data, attributes["axis"] = 1, AXIS[attributes.get("axis", 0) % 4]
        elif node.op_type in ("Slice", "ReduceMean"):
            num_data, at = 1, {"Slice": 3, "ReduceMean": 1}[node.op_type]
            axes = inputs[at].const_value.numpy() if len(inputs) > at and inputs[at] is not None else None
            if axes is None or (node.op_type == "ReduceMean" and not attributes.get("keepdims", 1)):
                return False
            moved = np.array([AXIS[int(axis) % 4] for axis in axes], np.int64)
            inputs[at] = self._constant(f"{node.name}.axes", moved)
        elif node.op_type == "Resize":
            num_data = 1
            if attributes.get("mode", "nearest") != "nearest":
                return False
            for i in (2, 3):
                if len(inputs) > i and inputs[i] is not None and inputs[i].const_value is not None:
                    sizes = inputs[i].const_value.numpy()
                    if sizes.size == 4:
                        inputs[i] = self._constant(f"{node.name}.sizes{i}", sizes[list(TO_LAST)])
        else:
            return False
        for i in range(num_data):
            inputs[i] = self._to_last(node, inputs[i])
        for value in node.outputs:
            self.last[value] = ir.Value(name=f"{value.name}.last", type=value.type)
        twin = ir.Node(
            node.domain, node.op_type, inputs, attributes=ir.convenience.convert_attributes(attributes),
            outputs=[self.last[value] for value in node.outputs], name=f"{node.name}.last",
        )  # fmt: skip
        self.graph.insert_before(node, twin)
        return True

    def _leave(self, node: ir.Node) -> None:
        """An operator that wants channels first."""
        for i, value in enumerate(node.inputs):
            if value not in self.last:
                continue
            if value not in self.first:
                self.first[value] = self._insert(node, "Transpose", [self.last[value]], {"perm": TO_FIRST}, value.dtype)
            node.replace_input_with(i, self.first[value])

    def _to_last(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if value in self.last:
            return self.last[value]
        if value.const_value is None:
            self.last[value] = self._insert(node, "Transpose", [value], {"perm": TO_LAST}, value.dtype)
            return self.last[value]
        array = value.const_value.numpy()
        if array.size == 1:
            return value
        # [C, 1, 1] meets [N, C, h, w].
        full = array.reshape((1,) * (4 - array.ndim) + array.shape)
        self.last[value] = self._constant(f"{value.name}.last", full.transpose(TO_LAST))
        return self.last[value]

    def _replace_output(self, index: int, output: ir.Value) -> None:
        twin = self._to_last(None, output)
        name, shape, kind = output.name, output.shape, output.type
        output.name = f"{name}.first"
        twin.name, twin.type, twin.shape = name, kind, _permuted(shape)
        self.graph.outputs[index] = twin

    def _insert(self, before, op_type, inputs, attributes, dtype, domain="") -> ir.Value:
        self.count += 1
        value = ir.Value(name=f"{op_type.lower()}.last{self.count}", type=None if dtype is None else ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=[value], name=f"node_{value.name}")
        self.graph.append(node) if before is None else self.graph.insert_before(before, node)
        return value

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        if name in self.graph.initializers:
            self.count += 1
            name = f"{name}.{self.count}"
        value = ir.val(name, const_value=ir.tensor(np.array(array, order="C"), name=name))
        self.graph.register_initializer(value)
        return value


def _permuted(shape: ir.Shape) -> ir.Shape:
    return ir.Shape([shape[axis] for axis in TO_LAST])
