"""Tiny video decoder with the structure and names of TAEHV (taew2_1.pth, taew2_2.pth): a tenth of the VAE's work, a little blur.

Streams as the VAE does, with the same functions: one latent frame in, 1 and then 4 frames out, caches in between. Every memory
block looks one frame back. The first latent frame is decoded to 4 frames too, and only the last of them is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factorportrait.config import CORRECT, require_positive
from factorportrait.errors import CheckpointError
from factorportrait.export.models.vae import CacheShapes, Timeline
from factorportrait.export.weights.files import LazyTensor, open_weights
from factorportrait.export.weights.fill import fill

PREFIX = "decoder."
LEVELS = 3
# Layers of a level: three memory blocks, a spatial doubling, a temporal growth and a convolution.
BLOCKS = 3


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Sizes of a tiny decoder.

    Attributes:
        z_dim: latent channels.
        patch_size: pixels of a side that come out as channels.
        widths: channels of the three levels and of the output.
        temporal_upsample: whether a level doubles time.
    """

    z_dim: int = 16
    patch_size: int = 1
    widths: tuple[int, ...] = (256, 128, 64, 64)
    temporal_upsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        require_positive(self, "z_dim", "patch_size", "widths")
        for name, length in (("widths", LEVELS + 1), ("temporal_upsample", LEVELS)):
            if len(getattr(self, name)) != length:
                raise CheckpointError(name, expected=f"{length} of them", found=str(len(getattr(self, name))), action=CORRECT)

    @property
    def temporal_stride(self) -> int:
        """Frames of every latent frame but the first, which shows one."""
        return 2 ** sum(self.temporal_upsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2**LEVELS * self.patch_size


class SoftClamp(nn.Module):
    """Latents beyond 3 deviations are pulled back."""

    def forward(self, x: Tensor) -> Tensor:
        # x: any shape
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, beside the frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(dim * 2, dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w], time outermost."""
        past = timeline.extend(x, 1)[: x.shape[0]]
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TemporalGrowth(nn.Module):
    """Each frame becomes `stride` frames, whose channels a product makes."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim * stride, 1, bias=False)
        self.stride = stride

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T*stride*B, C, h, w]."""
        x = self.conv(x).unflatten(1, (self.stride, -1)).unflatten(0, (-1, timeline.batch))
        return x.transpose(1, 2).flatten(0, 2)


class TinyDecoder(nn.Module):
    """Normalised latents -> frames in -1..1; `decode_first` and `decode_steady` as `VideoVAE` has them."""

    def __init__(self, config: TinyDecoderConfig):
        super().__init__()
        self.config = config
        widths = config.widths
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(config.z_dim, widths[0], 3, padding=1), nn.ReLU()]
        for level, temporal in enumerate(config.temporal_upsample):
            dim, out_dim = widths[level], widths[level + 1]
            layers += [MemoryBlock(dim) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2.0), TemporalGrowth(dim, 2 if temporal else 1)]
            layers += [nn.Conv2d(dim, out_dim, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3 * config.patch_size**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def decode_first(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """latents [B, z, 1, h, w] -> frames [B, 3, 1, H, W] and the caches for `decode_steady`."""
        timeline = Timeline(latents.shape[0], first=True)
        return self._decode(latents, timeline)[:, :, -1:], timeline.kept

    def decode_steady(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """latents [B, z, 1, h, w] -> frames [B, 3, temporal_stride, H, W] and the next caches."""
        timeline = Timeline(latents.shape[0], past=caches)
        return self._decode(latents, timeline), timeline.kept

    def decode_whole(self, latents: Tensor) -> Tensor:
        """latents [B, z, 1+n, h, w] -> frames [B, 3, 1+n*temporal_stride, H, W], all at once."""
        return self._decode(latents, Timeline(latents.shape[0]))[:, :, self.config.temporal_stride - 1 :]

    def cache_shapes(self, height: int, width: int, *, batch: int = 1) -> dict[str, CacheShapes]:
        """Shapes of the caches for frames of `height` x `width` pixels, by "decode"."""
        stride = self.config.spatial_stride
        with torch.device("meta"):
            probe = TinyDecoder(self.config)
            latents = torch.empty(batch, self.config.z_dim, 1, height // stride, width // stride)
        timeline = Timeline(batch, first=True)
        with torch.no_grad():
            probe._decode(latents, timeline)
        return {"decode": timeline.shapes()}

    def _decode(self, latents: Tensor, timeline: Timeline) -> Tensor:
        """latents [B, z, F, h, w] -> frames [B, 3, F*temporal_stride, H, W]."""
        x = latents.permute(2, 0, 1, 3, 4).flatten(0, 1).to(self.decoder[1].weight.dtype)
        for layer in self.decoder:
            x = layer(x, timeline) if isinstance(layer, (MemoryBlock, TemporalGrowth)) else layer(x)
        x = F.pixel_shuffle(x.float(), self.config.patch_size).clamp(0.0, 1.0) * 2 - 1
        return x.unflatten(0, (-1, timeline.batch)).permute(1, 2, 0, 3, 4)


def open_tiny_decoder(path, dtype: torch.dtype | None = None) -> TinyDecoder:
    """Read a TAEHV file for a VAE of Wan; its encoder is left aside.

    Args:
        path: as in `open_weights`.
        dtype: of the weights; None keeps the file's.

    Raises:
        CheckpointError: see `open_weights` and `fill`; or it is no tiny decoder.
    """
    weights = open_weights(path)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(PREFIX)}
    config = _infer(tensors, weights.where)
    with torch.device("meta"):
        decoder = TinyDecoder(config)
    fill(decoder, _trimmed(tensors, decoder), weights.where, dtype=dtype, config="structure")
    return decoder.eval().requires_grad_(False)


def _infer(tensors: Mapping[str, LazyTensor], where: str) -> TinyDecoderConfig:
    per_level = BLOCKS + 3
    first, last = f"{PREFIX}1.weight", f"{PREFIX}{3 + LEVELS * per_level + 1}.weight"
    ends = [f"{PREFIX}{3 + level * per_level + BLOCKS + 2}.weight" for level in range(LEVELS)]
    missing = [name for name in (first, *ends, last) if name not in tensors]
    if missing:
        raise CheckpointError(
            where, expected=f"a tiny decoder, which has {missing[0]}", found=", ".join(list(tensors)[:3]) or "none of its names",
            action="take taew2_1 or taew2_2",
        )  # fmt: skip
    widths = (tensors[first].shape[0], *(tensors[name].shape[0] for name in ends))
    patch = round((tensors[last].shape[0] / 3) ** 0.5)
    return TinyDecoderConfig(z_dim=tensors[first].shape[1], patch_size=patch, widths=widths)


def _trimmed(tensors: Mapping[str, LazyTensor], decoder: TinyDecoder) -> dict[str, LazyTensor]:
    """A file may hold more frames of growth than a level makes here: of those the last are kept, as its authors do."""
    trimmed = dict(tensors)
    for place, layer in enumerate(decoder.decoder):
        name = f"{PREFIX}{place}.conv.weight"
        if isinstance(layer, TemporalGrowth) and name in tensors:
            rows, tensor = layer.conv.weight.shape[0], tensors[name]
            if tensor.shape[0] > rows:
                shape = (rows, *tensor.shape[1:])
                trimmed[name] = LazyTensor(shape, tensor.dtype, lambda tensor=tensor, rows=rows: tensor.load()[-rows:])
    return trimmed
