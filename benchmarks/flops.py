"""Operations and bytes of a graph, counted from its ONNX file for given sizes; weights are not loaded.

A multiplication and an addition are two operations. Products (`MatMul`, `Gemm`, `Conv`, `Attention` and their quantised forms) are
counted exactly; every other node that computes counts `ELEMENTWISE` operations per element of its output, which is a convention
and below one percent of any graph that has products.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factorportrait.benchmarks.schema import Work
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT
from factorportrait.runtime.schedule import limit_guidance, parse_guidance
from factorportrait.runtime.session import SessionOptions

if TYPE_CHECKING:
    import onnx

# Operations per element of the output; 1 for what is not listed.
ELEMENTWISE = {
    "LayerNormalization": 7, "RMSNormalization": 5, "GroupNormalization": 7, "InstanceNormalization": 7, "Softmax": 5,
    "Gelu": 8, "Sigmoid": 4, "Tanh": 4, "RotaryEmbedding": 3, "Resize": 1, "QuantizeLinear": 3, "DequantizeLinear": 2,
}  # fmt: skip
# These move or describe data and compute nothing.
MOVES = {
    "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
# These do not even move it.
VIEWS = {"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"}
# The output is as large as the first input, and ONNX's own inference does not say so.
KEEP_SHAPE = {"GroupNormalization"}


@dataclass(frozen=True)
class Tensor:
    """Sizes and bytes per element of a value; constant: made of weights alone."""

    shape: tuple[int, ...]
    itemsize: float
    constant: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        return self.size * self.itemsize


def count_graph(path: str | Path, sizes: Mapping[str, int]) -> Work:
    """Work of one run of a graph.

    Args:
        path: the .onnx file; its external data need not be there.
        sizes: of its symbols, such as {"F": 3, "P": 7}.

    Raises:
        UserError: it cannot be read, a symbol has no size, or a product's size is not known.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own classes
        raise UserError(
            f"graph {path}", expected="an ONNX file", found=str(error), action="make the bundle again with fp-export"
        ) from error
    return count_model(model, sizes, Path(path).name)


def count_model(model: onnx.ModelProto, sizes: Mapping[str, int], where: str = "graph") -> Work:
    """`count_graph` for a graph in memory."""
    tensors = infer_tensors(model, sizes, where)
    flops: dict[str, float] = defaultdict(float)
    node_bytes = 0.0
    for node in model.graph.node:
        outputs = [tensors[name] for name in node.output if name in tensors]
        inputs = [tensors[name] for name in node.input if name in tensors]
        if outputs and all(tensor.constant for tensor in outputs):
            continue
        kind, count = node_flops(node, tensors, where)
        flops[kind] += count
        if node.op_type not in VIEWS:
            # A gather reads the rows that it gives out, not the table.
            read = outputs if node.op_type in ("Gather", "Slice") else inputs
            node_bytes += sum(tensor.nbytes for tensor in (*read, *outputs))
    weights = {tensor.name for tensor in model.graph.initializer}
    ends = [value.name for value in (*model.graph.input, *model.graph.output) if value.name not in weights]
    total = sum(tensors[name].nbytes for name in (*ends, *weights) if name in tensors)
    return Work(sum(flops.values()), {kind: count for kind, count in flops.items() if count}, total, node_bytes)


def infer_tensors(model: onnx.ModelProto, sizes: Mapping[str, int], where: str) -> dict[str, Tensor]:
    """Every value whose size can be known, by name."""
    import onnx

    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    del bound.graph.value_info[:]
    for value in bound.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = _size_of(dim.dim_param, sizes, where)
    for value in bound.graph.output:
        value.type.tensor_type.ClearField("shape")
    for node in bound.graph.node:
        if node.op_type in KEEP_SHAPE:
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.attribute[:]
    nodes = [part for node in bound.graph.node for part in _known_layout(node)]
    del bound.graph.node[:]
    bound.graph.node.extend(nodes)
    inferred = onnx.shape_inference.infer_shapes(bound, data_prop=True).graph
    tensors = {tensor.name: Tensor(tuple(tensor.dims), _itemsize(tensor.data_type), True) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor_type = value.type.tensor_type
        dims = tensor_type.shape.dim
        if value.name not in tensors and tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            tensors[value.name] = Tensor(tuple(dim.dim_value for dim in dims), _itemsize(tensor_type.elem_type))
    constants = {name for name, tensor in tensors.items() if tensor.constant}
    for node in inferred.node:
        # Weights that are only unpacked, turned or cast are weights still.
        if all(name in constants for name in node.input if name) and node.op_type in {*MOVES, "DequantizeLinear"}:
            constants.update(node.output)
    return {
        name: Tensor(tensor.shape, tensor.itemsize, name in constants) for name, tensor in tensors.items()
    }  # fmt: skip


def _known_layout(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """ONNX Runtime's convolution with channels last as ONNX's own between two transposes, whose sizes can be inferred."""
    from onnx import helper

    if node.op_type != "QLinearConv" or not _attribute(node, "channels_last", 0):
        return [node]
    conv = type(node)()
    conv.CopyFrom(node)
    conv.domain = ""
    conv.input[0], conv.output[0] = f"{node.input[0]}.first.{node.name}", f"{node.output[0]}.first"
    kept = [attribute for attribute in conv.attribute if attribute.name != "channels_last"]
    del conv.attribute[:]
    conv.attribute.extend(kept)
    return [
        helper.make_node("Transpose", [node.input[0]], [conv.input[0]], perm=(0, 3, 1, 2)),
        conv,
        helper.make_node("Transpose", [conv.output[0]], [node.output[0]], perm=(0, 2, 3, 1)),
    ]


def node_flops(node: onnx.NodeProto, tensors: Mapping[str, Tensor], where: str) -> tuple[str, float]:
    """Kind and number of operations of one node."""
    op = node.op_type

    def of(name: str) -> Tensor:
        if name not in tensors:
            raise UserError(
                f"{where}: {op} {node.name}", expected=f"a size for {name}", found="none that shape inference could tell",
                action="count a graph without operators of other domains",
            )  # fmt: skip
        return tensors[name]

    if op in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        left, right = of(node.input[0]), of(node.input[3 if op == "QLinearMatMul" else 1])
        kind = "linear" if left.constant or right.constant else "attention"
        return kind, 2.0 * of(node.output[0]).size * left.shape[-1]
    if op == "Gemm":
        left = of(node.input[0])
        depth = left.shape[0 if _attribute(node, "transA", 0) else 1]
        return "linear", 2.0 * of(node.output[0]).size * depth
    if op in ("Conv", "ConvInteger", "QLinearConv"):
        weight = of(node.input[3 if op == "QLinearConv" else 1])
        return "conv", 2.0 * of(node.output[0]).size * math.prod(weight.shape[1:])
    if op == "ConvTranspose":
        return "conv", 2.0 * of(node.input[0]).size * math.prod(of(node.input[1]).shape[1:])
    if op == "Attention":
        return "attention", _attention_flops(node, of)
    if op in MOVES:
        return "elementwise", 0.0
    size = max((tensors[name].size for name in node.output if name in tensors), default=0)
    if op.startswith("Reduce"):
        size = of(node.input[0]).size
    return "elementwise", float(ELEMENTWISE.get(op, 1) * size)


def _attention_flops(node: onnx.NodeProto, of) -> float:
    """QK^T and its product with V. query [B,H,S,E] or [B,S,H*E]; what is cached before counts as keys."""
    query, key, value = (of(name) for name in node.input[:3])
    past = of(node.input[4]).shape[2] if len(node.input) > 4 and node.input[4] else 0
    if len(query.shape) == 4:
        batch, heads, length, size = query.shape
        keys, value_size = key.shape[2] + past, value.shape[3]
    else:
        heads = _attribute(node, "q_num_heads", 1)
        batch, length, size = query.shape[0], query.shape[1], query.shape[2] // heads
        keys, value_size = key.shape[1] + past, value.shape[2] // _attribute(node, "kv_num_heads", heads)
    return 2.0 * batch * heads * length * keys * (size + value_size)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _size_of(text: str, sizes: Mapping[str, int], where: str) -> int:
    factor, _, name = text.rpartition("*")
    if name not in sizes:
        raise UserError(
            f"{where}: size {name}", expected=f"one of {', '.join(sizes) or 'no symbol'}", found=text,
            action="make the bundle again with fp-export",
        )  # fmt: skip
    return int(factor or 1) * sizes[name]


def _itemsize(data_type: int) -> float:
    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 0.5
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def scaled(work: Work, factor: float) -> Work:
    """`factor` runs."""
    return Work(
        work.flops * factor, {kind: count * factor for kind, count in work.flops_by_kind.items()}, work.bytes * factor,
        work.node_bytes * factor,
    )  # fmt: skip


def added(first: Work, *others: Work) -> Work:
    """One after another."""
    kinds: dict[str, float] = defaultdict(float)
    for work in (first, *others):
        for kind, count in work.flops_by_kind.items():
            kinds[kind] += count
    works = (first, *others)
    return Work(sum(w.flops for w in works), dict(kinds), sum(w.bytes for w in works), sum(w.node_bytes for w in works))


def chunk_work(bundle: Bundle, options: SessionOptions, *, num_frames: int, coefficients: bool) -> dict[str, Work]:
    """Work of every stage in a steady chunk (stream mode), or in a whole clip of `num_frames` pictures.

    With a step cache the steps are left out: which of them run depends on the time embeddings.

    Args:
        options: resolved.
        coefficients: the expression comes from ARKit coefficients, not from pictures.
    """
    clip = options.mode == "clip"
    new = 1 + -(-(num_frames - 1) // FRAMES_PER_LATENT) if clip else options.chunk_frames
    slots, past = (1 + new, 0) if clip else (new, 1 + options.window_frames - options.chunk_frames)
    guidance = parse_guidance(options.guidance, options.steps)
    if options.guidance_steps is not None:
        guidance = limit_guidance(guidance, options.guidance_steps)

    def work(stage: str, **sizes: int) -> Work:
        return count_graph(bundle.file(bundle.stage(stage).file), sizes)

    def vae(direction: str) -> Work:
        if not clip:
            return scaled(work(f"vae_{direction}_steady"), new)
        return added(work(f"vae_{direction}_first"), scaled(work(f"vae_{direction}_steady"), new - 1))

    encoder = work("arkit_encoder" if coefficients else "expression_encoder", B=1)
    frames = num_frames if clip else new * FRAMES_PER_LATENT
    dit = work("dit", F=slots, P=past)
    works = {
        "expression": scaled(encoder, frames),
        "pose": vae("encode"),
        "conditions": added(work("expression_controller", N=new), scaled(work("condition_embed", F=new), guidance.num_sets)),
    }
    steps = {f"step.{step}": scaled(dit, int((weights != 0).sum())) for step, weights in enumerate(guidance.weights)}
    commit = {} if clip or options.commit != "clean" else {"commit": scaled(dit, guidance.num_sets)}
    # Where a chunk is one call, its conditions, steps and commit are one stage.
    passes = steps | commit | {"steps": added(works["conditions"], *steps.values(), *commit.values())}
    return works | (commit if options.step_cache else passes) | {"decode": vae("decode")}
