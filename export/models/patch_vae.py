"""A light causal video VAE: one linear map makes a latent cell of four frames of a patch, and a small decoder gives them back.

The map may be the principal components of such patches, which need no training and nearly no time; the decoder begins as their
inverse and learns what that cannot give: edges across patches and what is likely in a face. It looks one latent frame back and no
further, so a stream of any length is decoded as its first seconds are. Functions and streaming rule are `VideoVAE`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factorportrait.config import PatchVAEConfig
from factorportrait.export.models.vae import CacheShapes, StreamingVAE


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity; it begins as the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, h, w]."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class PatchDecoder(nn.Module):
    """Raw latents and those before them -> four frames."""

    def __init__(self, config: PatchVAEConfig):
        super().__init__()
        self.time, self.cell, self.fine = config.temporal_stride, config.cell_size, 2
        pixels = config.in_channels * config.cell_size**2
        self.inverse = nn.Conv2d(config.z_dim, self.time * pixels, 1)
        self.conv_in = nn.Conv2d(2 * config.z_dim, config.cell_dim, 3, padding=1)
        self.cells = nn.Sequential(*(ResidualBlock(config.cell_dim) for _ in range(config.cell_blocks)))
        self.to_fine = nn.Conv2d(config.cell_dim, self.time * config.fine_dim * self.fine**2, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(config.fine_dim) for _ in range(config.fine_blocks)))
        self.conv_out = nn.Conv2d(config.fine_dim, pixels // self.fine**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, latents: Tensor, past: Tensor) -> Tensor:
        """latents, past [N, z, h, w] -> frames [N, 4, 3, H, W]."""
        linear = F.pixel_shuffle(self.inverse(latents).unflatten(1, (self.time, -1)), self.cell)
        x = F.silu(self.cells(self.conv_in(torch.cat([latents, past], dim=1))))
        x = F.pixel_shuffle(self.to_fine(x).unflatten(1, (self.time, -1)).flatten(0, 1), self.fine)
        refined = F.pixel_shuffle(self.conv_out(F.silu(self.blocks(x))), self.cell // self.fine)
        return linear + refined.unflatten(0, (-1, self.time))


class PatchVAE(StreamingVAE):
    """Frames are -1..1, latents normalised with the config's mean and standard deviation; both are float32 outside.

    The first picture is encoded as if it had stood still for four frames, and of what its latents decode to the last is shown.
    The decoder's only cache is the latent frame before.
    """

    def __init__(self, config: PatchVAEConfig):
        super().__init__(config)
        frames = config.in_channels * config.temporal_stride
        self.encoder = nn.Conv2d(frames, config.z_dim, config.cell_size, stride=config.cell_size)
        self.decoder = PatchDecoder(config)

    # ---- streaming -------------------------------------------------------------------------------------------

    def encode_first(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """frames [B, 3, 1, H, W] -> latents [B, z, 1, h, w] and no caches."""
        return self.encode_steady(frames.expand(-1, -1, self.config.temporal_stride, -1, -1))

    def encode_steady(self, frames: Tensor, caches: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """frames [B, 3, 4, H, W] -> latents [B, z, 1, h, w] and no caches."""
        latents = self.encoder(frames.flatten(1, 2).to(self.encoder.weight.dtype)).float()
        return ((latents - self.latents_mean) / self.latents_std)[:, :, None], []

    def decode_first(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """latents [B, z, 1, h, w] -> frames [B, 3, 1, H, W] in -1..1 and the caches for `decode_steady`."""
        raw = self._raw(latents[:, :, 0])
        return self._frames(self.decoder(raw, raw)[:, -1:]).clamp(-1.0, 1.0), [raw]

    def decode_steady(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """latents [B, z, 1, h, w] -> frames [B, 3, 4, H, W] in -1..1 and the next caches."""
        raw = self._raw(latents[:, :, 0])
        return self._frames(self.decoder(raw, caches[0])).clamp(-1.0, 1.0), [raw]

    def cache_shapes(self, height: int, width: int, *, batch: int = 1) -> dict[str, CacheShapes]:
        """Shapes of the caches for frames of `height` x `width` pixels, by "encode" and "decode"."""
        shape = {"cache.0": (batch, self.config.z_dim, *self.config.latent_size(height, width))}
        return {"encode": CacheShapes({}, {}), "decode": CacheShapes(shape, shape)}

    # ---- whole clips, for training ---------------------------------------------------------------------------

    def encode_whole(self, frames: Tensor) -> Tensor:
        """`encode` with all frames at once: frames [B, 3, 1+4n, H, W] -> latents [B, z, 1+n, h, w]."""
        self.config.num_latent_frames(frames.shape[2])
        time = self.config.temporal_stride
        held = torch.cat([frames[:, :, :1].expand(-1, -1, time, -1, -1), frames[:, :, 1:]], dim=2)
        groups = held.unflatten(2, (-1, time)).movedim(2, 1).flatten(0, 1)
        return self.encode_steady(groups)[0].unflatten(0, (len(frames), -1)).squeeze(3).movedim(1, 2)

    def decode_whole(self, latents: Tensor, *, clamp: bool = False) -> Tensor:
        """`decode` with all frames at once: latents [B, z, 1+n, h, w] -> frames [B, 3, 1+4n, H, W].

        Not clamped to -1..1 unless asked: a loss needs the gradient outside too.
        """
        raw = self._raw(latents.movedim(2, 1))
        past = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
        frames = self.decoder(raw.flatten(0, 1), past.flatten(0, 1)).unflatten(0, raw.shape[:2]).flatten(1, 2)
        frames = self._frames(frames[:, self.config.temporal_stride - 1 :])
        return frames.clamp(-1.0, 1.0) if clamp else frames

    def _raw(self, latents: Tensor) -> Tensor:
        """Normalised [..., z, h, w] -> raw, in the type of the parameters."""
        return (latents.float() * self.latents_std + self.latents_mean).to(self.encoder.weight.dtype)

    def _frames(self, pictures: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> [B, 3, T, H, W] in float32."""
        return pictures.transpose(1, 2).float()
