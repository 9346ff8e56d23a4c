"""FactorPortrait on a released backbone: weights that exist are taken, those that do not are zero or drawn, and told.

The result computes what the backbone did, as long as nothing is trained: new input channels are zero, and so is the expression's
share of the modulation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from factorportrait.errors import CheckpointError
from factorportrait.export.models.factorportrait import FactorPortrait, expression_networks
from factorportrait.export.weights.fill import fill
from factorportrait.export.weights.networks import Opened, with_streams
from factorportrait.model_config import ModelConfig


def factorportrait_on(
    transformer: Opened, vae: Opened, config: ModelConfig, *, dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[FactorPortrait, tuple[str, ...]]:
    """Build a FactorPortrait whose transformer and VAE are released ones; `save_checkpoint` makes it a checkpoint.

    Args:
        transformer: of `open_transformer`, without inputs that FactorPortrait lacks.
        vae: of `open_vae`.
        config: of the whole; `dit` and `vae` have to be the structures that were opened.
        dtype: of all weights; None keeps what the files have, and float32 for what is new.
        seed: of the expression encoder, which no release has.

    Returns:
        The model in evaluation mode, and what the user has to know of it.

    Raises:
        CheckpointError: config and weights are of different structures, or see `fill`.
    """
    for name, wanted, found in (
        ("dit", config.dit, replace(transformer.config.dit, max_position=config.dit.max_position)),
        ("vae", config.vae, vae.config),
    ):
        if wanted != found:
            fields = [key for key in wanted.__dataclass_fields__ if getattr(wanted, key) != getattr(found, key)]
            raise CheckpointError(
                f"config: {name}", expected=", ".join(f"{key} {getattr(found, key)}" for key in fields) + ", as the weights have",
                found=", ".join(f"{key} {getattr(wanted, key)}" for key in fields), action="take the structure of the weights",
            )  # fmt: skip
    tensors, declared = with_streams(transformer.tensors, transformer.config.fusion, config.fusion)
    with torch.device("meta"):
        model = FactorPortrait(config)
    fill(model.dit, tensors, transformer.where, dtype=dtype, config="structure")
    fill(model.vae, vae.tensors, vae.where, dtype=dtype, config="structure")
    model.dit._build_rotary_tables()
    model.expression = expression = draw_expression(config, seed)
    if dtype is not None:
        expression.to(dtype)
    notes = (
        declared,
        "expression encoder, ARKit map and controller: drawn, untrained; the controller's last layer is zero",
    )
    return model.eval().requires_grad_(False), (*transformer.notes, *vae.notes, *notes)


def draw_expression(config: ModelConfig, seed: int = 0) -> nn.ModuleDict:
    """FactorPortrait's expression encoder, ARKit map and controller, drawn; no release has them.

    The neutral code and the controller's last layer are zero: the modulation is the backbone's own.
    """
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        networks = expression_networks(config)
        controller = networks["controller"]
        controller.neutral_code.zero_()
        for parameter in controller.projection[-1].parameters():
            parameter.zero_()
    return networks.eval().requires_grad_(False)
