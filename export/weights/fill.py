"""Weights into a network that was built on `meta`: every name, shape and type is checked before the first value is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from factorportrait.errors import CheckpointError
from factorportrait.export.weights.files import FLOATS, LazyTensor

SHOWN = 3  # names of each kind in an error of one line


def fill(
    module: nn.Module,
    tensors: Mapping[str, LazyTensor],
    where: str | Path,
    *,
    dtype: torch.dtype | None = None,
    config: str = "config.json",
    on_tensor: Callable[[str], None] = lambda name: None,
) -> None:
    """Give a module's parameters and buffers their values, one tensor in memory beside them at a time.

    Args:
        module: built on `meta`; its parameters are replaced, not copied into.
        tensors: by the module's names.
        where: what errors call the source.
        dtype: cast to; None keeps what the file has, as pages of the file where it is mapped.
        config: what the module was built from, for the errors.
        on_tensor: called when a tensor has been placed.

    Raises:
        CheckpointError: names are missing or left over, a shape or type does not fit, blocks differ in type, or a value is no
            finite number.
    """
    expected = module.state_dict()
    compare(expected, tensors, where, config)
    check_dtypes(tensors, where)
    values = {}
    for name in expected:
        values[name] = checked(tensors[name].load(), name, where, dtype)
        on_tensor(name)
    module.load_state_dict(values, assign=True)


def compare(
    expected: Mapping[str, Tensor | LazyTensor], found: Mapping[str, Tensor | LazyTensor], where: str | Path,
    config: str = "config.json",
) -> None:  # fmt: skip
    """Raises CheckpointError unless both have the same names and shapes; it names what differs and what comes nearest."""
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in expected]
    if missing or left_over:
        parts = [
            f"{title} {_listed(names, others)}"
            for title, names, others in (("missing", missing, left_over), ("left over", left_over, missing))
            if names
        ]
        raise CheckpointError(
            f"{where}", expected=f"the {len(expected)} weights that {config} asks for", found=", ".join(parts),
            action=f"use the weights that belong to this {config}",
        )  # fmt: skip
    wrong = [name for name in expected if tuple(expected[name].shape) != tuple(found[name].shape)]
    if wrong:
        more = f"; so do {len(wrong) - 1} more: {_listed(wrong[1:], [])}" if wrong[1:] else ""
        raise CheckpointError(
            f"{where}: {wrong[0]}", expected=f"shape {list(expected[wrong[0]].shape)}",
            found=f"{list(found[wrong[0]].shape)}{more}", action=f"the weights do not belong to this {config}",
        )  # fmt: skip


def check_dtypes(tensors: Mapping[str, LazyTensor], where: str | Path) -> None:
    """Raises CheckpointError for a type that is no float, or one weight in another type in another block.

    Releases keep norms and embeddings in float32 beside bfloat16 matrices, in all blocks alike. Where blocks differ, somebody
    joined halves of two files, or a conversion stopped on its way.
    """
    first: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name}", expected="float32, float16 or bfloat16", found=str(tensor.dtype),
                action="save it again in one of these",
            )  # fmt: skip
        match = re.match(r"blocks\.\d+\.(.+)", name)
        if not match:
            continue
        other = first.setdefault(match[1], name)
        if tensors[other].dtype != tensor.dtype:
            raise CheckpointError(
                f"{where}", expected="every block in the same types",
                found=f"{other} in {_short(tensors[other].dtype)}, {name} in {_short(tensor.dtype)}",
                action="take one whole release, or convert all of it again",
            )  # fmt: skip


def summary(tensors: Mapping[str, LazyTensor]) -> str:
    """One line: how many weights, parameters and bytes, in which types."""
    types: dict[str, int] = {}
    count = 0
    for tensor in tensors.values():
        types[_short(tensor.dtype)] = types.get(_short(tensor.dtype), 0) + 1
        count += tensor.nbytes // tensor.dtype.itemsize
    size = sum(tensor.nbytes for tensor in tensors.values()) / 2**30
    kinds = ", ".join(f"{number} {name}" for name, number in sorted(types.items(), key=lambda item: -item[1]))
    return f"{len(tensors)} weights ({kinds}), {count / 1e9:.4f} billion parameters, {size:.2f} GiB"


def checked(tensor: Tensor, name: str, where: str | Path, dtype: torch.dtype | None) -> Tensor:
    """A value as it was read, cast to `dtype` if there is one. Raises CheckpointError where it is not finite."""
    # The extremes carry NaN and infinity on, and take no second tensor to find.
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise CheckpointError(
            f"{where}: {name}", expected="finite numbers",
            found=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} are NaN or infinite",
            action="take an earlier checkpoint of the training",
        )  # fmt: skip
    return tensor if dtype is None else tensor.to(dtype)


def _listed(names: list[str], others: list[str]) -> str:
    shown = []
    for name in names[:SHOWN]:
        near = difflib.get_close_matches(name, others, n=1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
