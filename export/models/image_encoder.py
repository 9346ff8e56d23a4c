"""The picture encoder that some public Wan systems look through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """A CLIP picture encoder of `transformers`, whose last but one hidden state Wan's I2V, Fun and Animate look at.

    Args:
        clip: a CLIPVisionModel.
        mean, std: of the colours in 0..1 that it was trained with.
    """

    def __init__(self, clip: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.clip = clip
        self.size = int(clip.config.image_size)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] in -1..1 -> tokens [B,L,image_dim]."""
        # As Wan does it: the whole picture on CLIP's square, whatever its shape, neither cropped nor smoothed before.
        image = F.interpolate(image, (self.size, self.size), mode="bicubic", align_corners=False)
        return self.clip(((image + 1) / 2 - self.mean) / self.std, output_hidden_states=True).hidden_states[-2]
