"""The stages of a system: the functions that become graphs, with names, example inputs and symbolic sizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Stage:
    """One graph to be.

    Args:
        module: called with `args` in order; returns a tensor or a flat tuple of tensors.
        dynamic_shapes: per input a dict axis -> name of the symbolic size, or None.
    """

    name: str
    module: nn.Module
    args: tuple[Tensor, ...]
    input_names: list[str]
    output_names: list[str]
    dynamic_shapes: dict | None = None
