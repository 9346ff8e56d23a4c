"""What FactorPortrait has beyond a released backbone, drawn so that nothing changes before it is trained."""

from __future__ import annotations

import torch
from torch import nn

from factorportrait.export.models.factorportrait import expression_networks
from factorportrait.model_config import ModelConfig


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
