"""Camera adapter of Wan2.1-Fun Control-Camera: Plücker rays of every pixel become tokens that are added to the video's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.model_config import DiTConfig, RayAdapterConfig


class ResidualBlock(nn.Module):
    """x plus two 3x3 convolutions of it."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        # x: [N, D, rows, columns]
        return x + self.conv2(F.relu(self.conv1(x)))


class RayAdapter(nn.Module):
    """Rays at the size of the frames -> tokens.

    Its channels are those of its training: value c of frame t (0..3) of a latent frame lies at 4c + t, and c counts the moment
    o x d, then the direction d. (FactorPortrait's packed rays are one frame after the other.)
    """

    def __init__(self, config: RayAdapterConfig, dit: DiTConfig):
        super().__init__()
        self.downscale = config.downscale
        patch = dit.patch_size[1]
        self.conv = nn.Conv2d(config.channels * config.downscale**2, dit.dim, patch, patch)
        self.residual_blocks = nn.Sequential(*(ResidualBlock(dit.dim) for _ in range(config.num_blocks)))

    def forward(self, rays: Tensor) -> Tensor:
        """rays [B,24,F,H,W], the four frames of a latent frame on channels -> tokens [B,F,T,D]."""
        batch, _, frames, _, _ = rays.shape
        x = F.pixel_unshuffle(rays.transpose(1, 2).flatten(0, 1).to(self.conv.weight.dtype), self.downscale)
        return self.residual_blocks(self.conv(x)).flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
