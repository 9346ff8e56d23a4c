"""fp16 by module: a stage whose weights are fp16 but for those that precision.toml lists with a reason.

TensorRT 11 takes every type from the graph, so precision is decided here. The torch modules do what must be fp32 in fp32 whatever
their weights are; a half stage is the same module with other weights, and no graph is rewritten.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from factorportrait.errors import UserError
from factorportrait.export.stages import Stage

HALF_MAX = 65504.0


@dataclass(frozen=True)
class Kept:
    """Weights that stay fp32, as patterns of parameter names, and why."""

    parameters: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class HalfRecipe:
    """What precision.toml says.

    Attributes:
        kept: weights that stay fp32.
        half_tensors: patterns of the inputs and outputs that are float16.
    """

    kept: tuple[Kept, ...]
    half_tensors: tuple[str, ...]

    def keeps(self, parameter: str) -> bool:
        """Whether a parameter stays fp32."""
        return any(fnmatchcase(parameter, pattern) for kept in self.kept for pattern in kept.parameters)

    def is_half(self, tensor: str) -> bool:
        """Whether an input or output of a stage is float16."""
        return any(fnmatchcase(tensor, pattern) for pattern in self.half_tensors)


@functools.cache
def half_recipe() -> HalfRecipe:
    """The reviewed table."""
    table = tomllib.loads(Path(__file__).with_name("precision.toml").read_text(encoding="utf-8"))
    kept = tuple(Kept(tuple(entry["parameters"]), entry["reason"]) for entry in table["kept"])
    return HalfRecipe(kept, tuple(table["boundary"]["half"]))


class HalfWeights:
    """The fp16 weights of a model, made once and shared by all its half stages."""

    def __init__(self, model: nn.Module, recipe: HalfRecipe | None = None):
        """Raises UserError if a weight does not fit fp16."""
        self.recipe = recipe or half_recipe()
        # What `copy.deepcopy` puts in the place of each fp32 parameter.
        self._memo: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if self.recipe.keeps(name):
                continue
            half = parameter.detach().half()
            if not half.isfinite().all():
                raise UserError(
                    f"weight {name}", expected=f"numbers within fp16, at most {HALF_MAX:.0f}",
                    found=f"{parameter.abs().max():.4g}",
                    action="export with --precision fp32, or keep it in fp32: add it to export/precision.toml",
                )  # fmt: skip
            self._memo[id(parameter)] = nn.Parameter(half, requires_grad=False)

    def stage(self, stage: Stage) -> Stage:
        """The same stage in half precision; the model's own modules and tensors are left as they are."""
        args = (
            arg.half() if self.recipe.is_half(name) and arg.dtype == torch.float32 else arg
            for name, arg in zip(stage.input_names, stage.args, strict=True)
        )
        return dataclasses.replace(stage, module=copy.deepcopy(stage.module, dict(self._memo)), args=tuple(args))
