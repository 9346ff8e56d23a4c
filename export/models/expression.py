"""Expression encoder, ARKit map and expression controller (FactorPortrait, arXiv 2512.11645, section on expression control).

The paper gives the code's size (128) and that the controller aggregates codes per latent frame and feeds AdaLN. Layer sizes and the
choice of aggregator are inferred, hence configurable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.model_config import FRAMES_PER_LATENT, ExpressionConfig


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm(self.conv1(F.silu(x)))))


class ExpressionEncoder(nn.Module):
    """image [B,3,S,S] in -1..1 -> code [B,E]: halve the picture to S/32, then one linear layer over what is left."""

    def __init__(self, config: ExpressionConfig):
        super().__init__()
        widths = config.encoder_widths
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2)]
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.SiLU(), nn.Conv2d(before, after, 3, stride=2, padding=1)]
            layers += [ResidualBlock(after) for _ in range(config.encoder_blocks)]
        layers += [nn.SiLU(), nn.Conv2d(widths[-1], widths[-1], 3, stride=2, padding=1), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        side = config.image_size // 2 ** (len(widths) + 1)
        self.code = nn.Linear(widths[-1] * side * side, config.code_dim)

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(image.to(self.code.weight.dtype))
        return self.code(features.flatten(1)).float()


class ArkitEncoder(nn.Module):
    """coefficients [B,52] in 0..1, in the order of `ARKIT_NAMES` -> code [B,E]."""

    def __init__(self, config: ExpressionConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(len(ARKIT_NAMES), config.arkit_hidden),
            nn.SiLU(),
            nn.Linear(config.arkit_hidden, config.arkit_hidden),
            nn.SiLU(),
            nn.Linear(config.arkit_hidden, config.code_dim),
        )

    def forward(self, coefficients: Tensor) -> Tensor:
        return self.layers(coefficients.to(self.layers[0].weight.dtype)).float()


class ExpressionController(nn.Module):
    """Codes of frame groups -> modulation of every latent frame, with the state that a stream carries from chunk to chunk.

    Codes come in groups of four, the clip's first frame repeated four times (DESIGN.md). The causal aggregator pads by repeating
    the first code (as Wan-Animate's face encoder does), so a chunked run equals the whole clip with one graph: the state before the
    first chunk is the one left by a group of four first codes.
    """

    def __init__(self, config: ExpressionConfig, dim: int):
        super().__init__()
        self.config = config
        hidden = config.hidden_dim
        if config.aggregator == "causal_conv":
            self.conv1 = nn.Conv1d(config.code_dim, hidden, 3, stride=2)
            self.conv2 = nn.Conv1d(hidden, hidden, 3, stride=2)
        else:
            codes = FRAMES_PER_LATENT if config.aggregator == "window" else 1
            self.window = nn.Sequential(
                nn.Linear(config.code_dim * codes, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
            )
        self.projection = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim * 6))
        self.register_buffer("neutral_code", torch.zeros(config.code_dim))

    def state_shapes(self) -> list[tuple[int, int]]:
        """[length, width] of each state tensor [B, length, width]."""
        if self.config.aggregator != "causal_conv":
            return []
        return [(1, self.config.code_dim), (1, self.config.hidden_dim)]

    def forward(self, codes: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """codes [B,4N,E], state per `state_shapes` -> expression_modulation [B,N,6,D], the next state."""
        dtype = self.projection[1].weight.dtype
        if self.config.aggregator == "causal_conv":
            first = torch.cat([state[0], codes], dim=1).to(dtype)
            middle = F.silu(self.conv1(first.transpose(1, 2))).transpose(1, 2)
            second = torch.cat([state[1].to(dtype), middle], dim=1)
            latent = self.conv2(second.transpose(1, 2)).transpose(1, 2)
            state = [codes[:, -1:], middle[:, -1:].float()]
        else:
            groups = codes.unflatten(1, (-1, FRAMES_PER_LATENT)).to(dtype)
            latent = self.window(groups.flatten(2) if self.config.aggregator == "window" else groups.mean(2))
            state = []
        return self.projection(latent).float().unflatten(-1, (6, -1)), state

    def initial_state(self, first_code: Tensor) -> list[Tensor]:
        """first_code [B,E] -> the state before a clip that begins with it."""
        group = first_code[:, None].expand(-1, FRAMES_PER_LATENT, -1)
        zeros = [group.new_zeros(group.shape[0], *shape) for shape in self.state_shapes()]
        return self.forward(group, zeros)[1]

    def neutral_modulation(self, batch: int) -> Tensor:
        """[B,1,6,D]: what the reference slot gets."""
        code = self.neutral_code[None].expand(batch, -1)
        group = code[:, None].expand(-1, FRAMES_PER_LATENT, -1)
        return self.forward(group, self.initial_state(code))[0]
