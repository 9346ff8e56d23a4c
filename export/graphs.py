"""torch -> ONNX: one file per stage, the same bytes for the same weights, and nothing of the machine in it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch

from factorportrait.bundle import TensorSpec
from factorportrait.export.stages import OPSET, Stage

__all__ = ["OPSET", "export_stage", "tensor_specs", "weight_bytes", "write_graph"]
# A protobuf file ends at 2 GB; weights above this lie in one file beside the graph.
INLINE_LIMIT_BYTES = 1_500_000_000
# Constants are computed at export up to this size; tables and rearranged weights are, nothing that grows with a clip is constant.
FOLD_LIMIT_BYTES = 512 * 2**20
# Smaller constants stay in the graph: shape inference needs the sizes among them.
EXTERNAL_MIN_BYTES = 1024
# Weights begin at a multiple of this in their file, so that they can be mapped into memory.
ALIGNMENT_BYTES = 4096

_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT64: "int64"}
_TYPE_NAMES = {
    ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8",
    ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT64: "int64", ir.DataType.INT32: "int32",
}  # fmt: skip


def export_stage(stage: Stage) -> ir.Model:
    """The graph of a stage, with the stage's names and opset.

    Raises:
        RuntimeError: the exporter failed, or its graph lacks a name. That is a mistake in the program, not of its user.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            stage.module, stage.args, dynamo=True, opset_version=stage.opset, verbose=False, optimize=True,
            input_names=stage.input_names, output_names=stage.output_names, dynamic_shapes=_dynamic_shapes(stage),
        )  # fmt: skip
        model = program.model
        onnxscript.optimizer.optimize(
            model, input_size_limit=FOLD_LIMIT_BYTES, output_size_limit=FOLD_LIMIT_BYTES, onnx_shape_inference=False
        )
    _name_sizes(model, stage)
    _state_attention_scales(model)
    _clean(model, stage.name)
    found = [value.name for value in model.graph.inputs], [value.name for value in model.graph.outputs]
    if found != (stage.input_names, stage.output_names):
        raise RuntimeError(f"stage {stage.name}: expected {stage.input_names} -> {stage.output_names}, found {found}")
    return model


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all constants of a graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


class WeightFiles:
    """Files of weights in a bundle, one per element type, that several graphs refer to; equal weights are written once."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._places: dict[tuple, tuple[int, int]] = {}

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Write a tensor, unless an equal one is there; what a graph keeps instead of it."""
        content = tensor.tobytes()
        file = self.folder / f"{self.name}.{_TYPE_NAMES[tensor.dtype]}.data"
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(content).digest())
        if key not in self._places:
            with open(file, "ab") as opened:
                opened.write(bytes(-opened.tell() % ALIGNMENT_BYTES))
                self._places[key] = (opened.tell(), len(content))
                opened.write(content)
        offset, length = self._places[key]
        return ir.ExternalTensor(
            file.name, offset, length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=self.folder
        )


def write_graph(model: ir.Model, folder: Path, name: str, weights: WeightFiles | None = None) -> list[str]:
    """Write `name`.onnx with its weights inside, or with large ones in `weights`.

    Returns:
        The names of the files that make the graph, itself first.
    """
    file, data = f"{name}.onnx", set()
    if weights is not None:
        for value in model.graph.initializers.values():
            if value.const_value.nbytes >= EXTERNAL_MIN_BYTES:
                value.const_value = weights.place(value.const_value)
                data.add(value.const_value.location)
    ir.save(model, folder / file)
    return [file, *sorted(data)]


def tensor_specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Names, types and sizes of a graph's inputs or outputs."""
    return tuple(
        TensorSpec(
            value.name, _DTYPES[value.dtype], tuple(size if isinstance(size, int) else size.value for size in value.shape)
        )
        for value in values
    )


def _dynamic_shapes(stage: Stage) -> tuple | None:
    """The stage's sizes as the exporter wants them: one item per parameter of `forward`, a tuple for `*args`."""
    if not stage.dynamic_shapes:
        return None
    import inspect

    sizes: dict[str, torch.export.Dim] = {}

    def size(text: str):
        factor, _, name = text.rpartition("*")
        # Prefixed: a bare N is a function to sympy.
        dim = sizes.setdefault(name, torch.export.Dim(f"size_{name}", min=0))
        return int(factor) * dim if factor else dim

    shapes = tuple(
        {axis: size(text) for axis, text in (stage.dynamic_shapes.get(name) or {}).items()} for name in stage.input_names
    )
    parameters = list(inspect.signature(stage.module.forward).parameters.values())
    if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        named = len(parameters) - 1
        shapes = (*shapes[:named], shapes[named:])
    return shapes


def _name_sizes(model: ir.Model, stage: Stage) -> None:
    """Give symbolic sizes the stage's names in inputs and outputs; sizes inside are left to whoever infers them."""
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, text in ((stage.dynamic_shapes or {}).get(value.name) or {}).items():
            found = value.shape[axis]
            if isinstance(found, int):
                raise RuntimeError(f"stage {stage.name}: {value.name} axis {axis}: expected {text}, found the constant {found}")
            symbols[str(found.value)] = text
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([size if isinstance(size, int) else _named(str(size.value), symbols) for size in value.shape])


def _named(size: str, symbols: dict[str, str]) -> str:
    """`s7` -> `F`, `size_F` -> `F`; a symbol of the exporter's own is the stage's only one. `check.py` runs with other sizes."""
    if size in symbols:
        return symbols[size]
    if size.startswith("size_"):
        return size.removeprefix("size_")
    names = {text.rpartition("*")[2] for text in symbols.values()}
    if len(names) != 1:
        raise RuntimeError(f"an output has the size {size}: expected one of {symbols}")
    return names.pop()


def _state_attention_scales(model: ir.Model) -> None:
    """Write down the scale that Attention takes from the width of a head: passes after this one see no shapes."""
    for node in model.graph:
        if node.op_type == "Attention" and "scale" not in node.attributes:
            width = node.inputs[0].shape[-1]
            node.attributes.add(ir.AttrFloat32("scale", float(width) ** -0.5))


def _clean(model: ir.Model, name: str) -> None:
    """Remove what differs between machines and runs: stack traces with paths, doc strings, comments of the exporter."""
    model.doc_string = None
    model.graph.doc_string = None
    model.graph.name = name
    model.producer_version = None
    model.metadata_props.clear()
    kept = {*model.graph.inputs, *model.graph.outputs}
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for value in graph.inputs:
            _clean_value(value, kept)
        for value in graph.initializers.values():
            _clean_value(value, kept)
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                _clean_value(value, kept)


def _clean_value(value: ir.Value, kept: set[ir.Value]) -> None:
    value.metadata_props.clear()
    value.doc_string = None
    if value not in kept and value.const_value is None:
        value.shape = value.type = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks off the terminal; failures still raise."""
    names = ["torch.onnx", "torch.export", "onnxscript", "onnx_ir"]
    names += [name for name in logging.root.manager.loggerDict if name.startswith(tuple(f"{top}." for top in names))]
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
