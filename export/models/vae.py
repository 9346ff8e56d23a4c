"""Causal video VAE of Wan 2.1 and Wan 2.2: whole clips for training, one latent frame at a time for streaming.

Parameters carry the names of the original Wan checkpoints. `export/weights/layouts.py` translates to diffusers.

Inside, a clip is `[T*B, C, h, w]`, time outermost. So the last frames are a contiguous slice, a picture layer needs no
reshape, and a 3x3x3 causal convolution is a 2-D one over three frames stacked on channels.

Streaming rule: each temporal convolution keeps the last 2 frames of its input (strided ones the last 1), zero at the
start, and convolves them with the new frames. The first latent frame is a single picture and passes the temporal
convolutions of the resampling layers by. Whole clips follow the same rule with all frames at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factorportrait.config import PatchVAEConfig, VAEConfig

# F.normalize's floor of the norm, squared: an all-zero vector stays zero.
NORM_FLOOR_SQUARED = 1e-24
CONV_IMPLS = ("conv2d", "conv3d")


@dataclass(frozen=True)
class CacheShapes:
    """Shapes of one direction's caches by name, `cache.0` and so on.

    Attributes:
        steady: every cache, the inputs and outputs of the steady function.
        first: those of them that depend on the first latent frame; the others start as zeros.
    """

    steady: dict[str, tuple[int, ...]]
    first: dict[str, tuple[int, ...]]


class Timeline:
    """What came before the frames at hand, for every temporal convolution in the order of the calls.

    Three cases: `past` given (streaming), `first` (one picture, nothing before it), neither (a whole clip from its
    start). Caches are `[n*B, C, h, w]` with n = 2 frames, or 1 where the convolution strides in time.

    Attributes:
        batch: B.
        first: the frames at hand are one picture, the first latent frame.
        kept: the caches for what follows, filled as the layers run; empty for a whole clip.
        constant: indices in `kept` of the caches that are zero whatever the frames are.
    """

    def __init__(self, batch: int, *, past: Sequence[Tensor] | None = None, first: bool = False):
        self.batch = batch
        self.first = first
        self.past = None if past is None else list(past)
        self.kept: list[Tensor] = []
        self.constant: list[int] = []

    def extend(self, x: Tensor, num_past: int) -> Tensor:
        """x [T*B, C, h, w] -> [(num_past+T)*B, C, h, w]: put the past before x, and keep the end for the next call."""
        rows = num_past * self.batch
        if self.past is None:
            past = x.new_zeros((rows, *x.shape[1:]))
        else:
            past = self.past[len(self.kept)]
        frames = torch.cat([past, x])
        if self.past is not None or self.first:
            self.kept.append(frames[-rows:])
        return frames

    def skip(self, num_past: int, shape: Sequence[int], like: Tensor) -> None:
        """Keep zeros for a convolution that the first latent frame passes by. shape: C, h, w of its input."""
        self.constant.append(len(self.kept))
        self.kept.append(like.new_zeros((num_past * self.batch, *shape)))

    def shapes(self) -> CacheShapes:
        """Of the caches kept by a first latent frame."""
        steady = {f"cache.{index}": tuple(cache.shape) for index, cache in enumerate(self.kept)}
        first = {name: shape for index, (name, shape) in enumerate(steady.items()) if index not in self.constant}
        return CacheShapes(steady, first)


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees only past frames. The weight is `[O, C, kt, kh, kw]`, as in the original.

    `conv_impl` chooses how it is computed, with equal results. "conv2d" stacks the kt frames on channels, which ONNX
    Runtime's CPU kernels like better; "conv3d" is the plain form, a little faster in PyTorch's training.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.spatial_padding = padding
        self.conv_impl = CONV_IMPLS[0]

    @property
    def num_past(self) -> int:
        """Frames of the past that one output needs."""
        return self.kernel_size[0] - self.stride[0]

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T/stride*B, O, h, w]."""
        taps, stride = self.kernel_size[0], self.stride[0]
        if taps == 1:
            return self._conv2d(x, self.weight[:, :, 0])
        frames = timeline.extend(x, self.num_past)
        if timeline.first:
            # All taps but the last meet zeros.
            return self._conv2d(x, self.weight[:, :, -1])
        if self.conv_impl == "conv3d":
            clip = frames.unflatten(0, (-1, timeline.batch)).permute(1, 2, 0, 3, 4)
            padding = (0, self.spatial_padding, self.spatial_padding)
            out = F.conv3d(clip, self.weight, self.bias, self.stride, padding)
            return out.permute(2, 0, 1, 3, 4).flatten(0, 1)
        num_out = (frames.shape[0] // timeline.batch - taps) // stride + 1
        if stride == 1:
            shifted = [frames[tap * timeline.batch : (tap + num_out) * timeline.batch] for tap in range(taps)]
        else:
            by_time = frames.unflatten(0, (-1, timeline.batch))
            shifted = [by_time[tap : tap + stride * num_out : stride].flatten(0, 1) for tap in range(taps)]
        return self._conv2d(torch.cat(shifted, dim=1), self.weight.transpose(1, 2).flatten(1, 2))

    def _conv2d(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride[1:], self.spatial_padding)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over channels; `pictures` only decides the shape of gamma in the checkpoint."""

    def __init__(self, dim: int, *, pictures: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1, 1) if pictures else (1, 1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, h, w]."""
        # Squares are summed in fp32: fp16 would overflow, and bf16 is too coarse.
        values = x.float()
        power = (values * values).mean(dim=1, keepdim=True)
        scale = power.clamp(min=NORM_FLOOR_SQUARED / x.shape[1]).rsqrt()
        # The scale of a vector of zeros does not fit fp16, and zero times infinity is no number.
        return (values * scale * self.gamma.view(-1, 1, 1)).to(x.dtype)


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, beside a 1x1x1 shortcut where the channels change."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        # Index 5 is the dropout of the original: it has no weights and no release uses it.
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(out_dim, out_dim, 3, padding=1),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T*B, O, h, w]."""
        return _run(self.residual, x, timeline) + _run([self.shortcut], x, timeline)


class AttentionBlock(nn.Module):
    """Single-head attention among the cells of each picture."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, pictures=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, h, w]."""
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        # Written out: a fused attention operator with heads wider than 256 is refused by TensorRT.
        # Scaled before the product, which would overflow fp16 in a wide head.
        weights = torch.softmax((q * x.shape[1] ** -0.5).transpose(1, 2) @ k, dim=-1)
        return x + self.proj((v @ weights.to(v.dtype).transpose(1, 2)).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width and, with `time_conv`, time: pairs of frames become one, the first frame stays alone."""

    def __init__(self, dim: int, *, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T'*B, C, h/2, w/2]."""
        x = self.resample(x)
        if not self.temporal:
            return x
        if timeline.past is not None:
            return self.time_conv(x, timeline)
        first, later = x[: timeline.batch], x[timeline.batch :]
        if timeline.first:
            timeline.kept.append(first)
        if later.shape[0] == 0:
            return first
        # A later frame's past is the picture before it, not zeros.
        return torch.cat([first, self.time_conv(later, Timeline(timeline.batch, past=[first]))])


class Upsample(nn.Module):
    """Doubles height and width; with `time_conv` each frame but the first becomes two."""

    def __init__(self, dim: int, out_dim: int, *, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(dim, out_dim, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T'*B, O, 2h, 2w]."""
        if self.temporal:
            x = self._double_time(x, timeline)
        return self.resample(x)

    def _double_time(self, x: Tensor, timeline: Timeline) -> Tensor:
        if timeline.first:
            timeline.skip(self.time_conv.num_past, x.shape[1:], x)
            return x
        if timeline.past is not None:
            return self._interleave(self.time_conv(x, timeline), timeline.batch)
        first, later = x[: timeline.batch], x[timeline.batch :]
        if later.shape[0] == 0:
            return first
        # The first latent frame is not part of this convolution's past: it starts from zeros.
        doubled = self.time_conv(later, Timeline(timeline.batch))
        return torch.cat([first, self._interleave(doubled, timeline.batch)])

    def _interleave(self, x: Tensor, batch: int) -> Tensor:
        """x [T*B, 2*C, h, w], the earlier frame in the first half of the channels -> [2*T*B, C, h, w]."""
        _, channels, height, width = x.shape
        pairs = x.reshape(-1, batch, 2, channels // 2, height, width)
        return pairs.transpose(1, 2).reshape(-1, channels // 2, height, width)


class DownLevel(nn.Module):
    """A level of Wan 2.2's encoder: blocks and a resampling, beside the mean of what goes into one of their outputs."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, *, halved: bool, temporal: bool):
        super().__init__()
        blocks = [ResidualBlock(out_dim if block else in_dim, out_dim) for block in range(num_blocks)]
        self.downsamples = nn.Sequential(*blocks, *([Downsample(out_dim, temporal=temporal)] if halved else []))
        self.out_dim, self.side, self.time = out_dim, 2 if halved else 1, 2 if temporal else 1

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T'*B, O, h', w']."""
        return _run(self.downsamples, x, timeline) + self._mean(x, timeline)

    def _mean(self, x: Tensor, timeline: Timeline) -> Tensor:
        # The first frame is alone in its pair; the other one is zero, and counts.
        if self.time == 2 and timeline.past is None:
            x = torch.cat([x.new_zeros((timeline.batch, *x.shape[1:])), x])
        _, channels, height, width = x.shape
        side, time = self.side, self.time
        cells = x.reshape(-1, time, timeline.batch, channels, height // side, side, width // side, side)
        cells = cells.permute(0, 2, 3, 1, 5, 7, 4, 6).reshape(-1, self.out_dim, channels * time * side**2 // self.out_dim,
                                                              height // side, width // side)  # fmt: skip
        return cells.mean(dim=2)


class UpLevel(nn.Module):
    """A level of Wan 2.2's decoder: blocks and a resampling, beside copies of what goes in."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, *, doubled: bool, temporal: bool):
        super().__init__()
        blocks = [ResidualBlock(out_dim if block else in_dim, out_dim) for block in range(num_blocks)]
        last = [Upsample(out_dim, out_dim, temporal=temporal)] if doubled else []
        self.upsamples = nn.Sequential(*blocks, *last)
        self.out_dim, self.doubled, self.time = out_dim, doubled, 2 if temporal else 1

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, C, h, w] -> [T'*B, O, h', w']."""
        out = _run(self.upsamples, x, timeline)
        return out + self._copies(x, timeline) if self.doubled else out

    def _copies(self, x: Tensor, timeline: Timeline) -> Tensor:
        _, channels, height, width = x.shape
        copies = x.repeat_interleave(self.out_dim * self.time * 4 // channels, dim=1)
        copies = copies.reshape(-1, timeline.batch, self.out_dim, self.time, 2, 2, height, width)
        copies = copies.permute(0, 3, 1, 2, 6, 4, 7, 5).reshape(-1, self.out_dim, 2 * height, 2 * width)
        # The first frame stays one: the last of its copies.
        return copies[timeline.batch * (self.time - 1) :] if timeline.past is None else copies


def _run(layers, x: Tensor, timeline: Timeline) -> Tensor:
    """Apply layers in order; those that look back in time get the timeline."""
    for layer in layers:
        temporal = isinstance(layer, (CausalConv3d, ResidualBlock, Downsample, Upsample, DownLevel, UpLevel))
        x = layer(x, timeline) if temporal else layer(x)
    return x


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, 3, padding=1))


class Encoder(nn.Module):
    """Packed frames -> mean and log variance of the latents, before `conv1` of the VAE."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(config.in_channels * config.pixel_patch**2, dims[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            if config.residual_resampling:
                halved = level < len(config.temporal_downsample)
                temporal = halved and config.temporal_downsample[level]
                layers.append(DownLevel(in_dim, out_dim, config.num_res_blocks, halved=halved, temporal=temporal))
                continue
            for block in range(config.num_res_blocks):
                layers.append(ResidualBlock(out_dim if block else in_dim, out_dim))
                if 0.5**level in config.attn_scales:
                    layers.append(AttentionBlock(out_dim))
            if level < len(config.temporal_downsample):
                layers.append(Downsample(out_dim, temporal=config.temporal_downsample[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], config.z_dim * 2)

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [T*B, 3*p*p, H/p, W/p] -> [F*B, 2*z, h, w]."""
        return _run([self.conv1, *self.downsamples, *self.middle, *self.head], x, timeline)


class Decoder(nn.Module):
    """Latents, after `conv2` of the VAE, -> packed frames."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        base_dim = config.decoder_base_dim or config.base_dim
        dims = [base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal_upsample = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], 3, padding=1)
        self.middle = _middle(dims[0])
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
            if config.residual_resampling:
                doubled = level < len(temporal_upsample)
                temporal = doubled and temporal_upsample[level]
                layers.append(UpLevel(in_dim, out_dim, config.num_res_blocks + 1, doubled=doubled, temporal=temporal))
                continue
            # Upsampling halves the channels.
            in_dim = in_dim // 2 if level else in_dim
            for block in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(out_dim if block else in_dim, out_dim))
                # The original counts decoder scales from one level higher than the encoder's.
                if 2.0 ** (level + 2 - len(config.dim_mult)) in config.attn_scales:
                    layers.append(AttentionBlock(out_dim))
            if level < len(temporal_upsample):
                layers.append(Upsample(out_dim, out_dim // 2, temporal=temporal_upsample[level]))
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(dims[-1], config.out_channels * config.pixel_patch**2)

    def forward(self, x: Tensor, timeline: Timeline) -> Tensor:
        """x [F*B, z, h, w] -> [T*B, 3*p*p, H/p, W/p]."""
        return _run([self.conv1, *self.middle, *self.upsamples, *self.head], x, timeline)


class StreamingVAE(nn.Module):
    """Clips by way of the streaming functions of a causal VAE, `encode_first` to `decode_steady`."""

    def __init__(self, config: VAEConfig | PatchVAEConfig):
        super().__init__()
        self.config = config
        # On the CPU even when the parameters are built on `meta`: a state dict does not bring them.
        mean = config.latents_mean or [0.0] * config.z_dim
        std = config.latents_std or [1.0] * config.z_dim
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            values = torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def encode(self, frames: Tensor) -> Tensor:
        """frames [B, 3, 1+n*temporal_stride, H, W] -> latents [B, z, 1+n, h, w], one latent frame at a time."""
        self.config.num_latent_frames(frames.shape[2])
        latents, caches = self.encode_first(frames[:, :, :1])
        parts = [latents]
        if frames.shape[2] > 1:
            for group in frames[:, :, 1:].split(self.config.temporal_stride, dim=2):
                latents, caches = self.encode_steady(group, caches)
                parts.append(latents)
        return torch.cat(parts, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, z, 1+n, h, w] -> frames [B, 3, 1+n*temporal_stride, H, W], one latent frame at a time."""
        first, *later = latents.split(1, dim=2)
        frames, caches = self.decode_first(first)
        parts = [frames]
        for latent_frame in later:
            frames, caches = self.decode_steady(latent_frame, caches)
            parts.append(frames)
        return torch.cat(parts, dim=2)


class VideoVAE(StreamingVAE):
    """Causal video VAE. Frames are -1..1, latents normalised with the config's mean and standard deviation.

    Frames and latents are float32 on both sides; caches have the type of the parameters.
    `encode_*` and `decode_*` of streaming are functions of frames and caches alone; nothing is kept on the module.
    Caches are lists in the order of the calls inside; `cache.i` in a graph is item i. `[n*B, C, h, w]`, time outermost.
    """

    def __init__(self, config: VAEConfig, conv_impl: str = CONV_IMPLS[0]):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.set_conv_impl(conv_impl)

    def set_conv_impl(self, conv_impl: str) -> None:
        """How causal convolutions are computed, "conv2d" or "conv3d". Weights and results stay the same."""
        if conv_impl not in CONV_IMPLS:
            raise ValueError(f"conv_impl: expected one of {CONV_IMPLS}, found {conv_impl!r}")
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.conv_impl = conv_impl

    # ---- streaming -------------------------------------------------------------------------------------------

    def encode_first(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """frames [B, 3, 1, H, W] -> latents [B, z, 1, h, w] and the caches for `encode_steady`."""
        timeline = Timeline(frames.shape[0], first=True)
        return self._encode(frames, timeline)[0], timeline.kept

    def encode_steady(self, frames: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """frames [B, 3, temporal_stride, H, W] -> latents [B, z, 1, h, w] and the next caches."""
        timeline = Timeline(frames.shape[0], past=caches)
        return self._encode(frames, timeline)[0], timeline.kept

    def decode_first(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """latents [B, z, 1, h, w] -> frames [B, 3, 1, H, W] in -1..1 and the caches for `decode_steady`.

        Caches of the layers that the first latent frame passes by are zeros, see `cache_shapes`.
        """
        timeline = Timeline(latents.shape[0], first=True)
        return self._decode(latents, timeline).clamp(-1.0, 1.0), timeline.kept

    def decode_steady(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """latents [B, z, 1, h, w] -> frames [B, 3, temporal_stride, H, W] in -1..1 and the next caches."""
        timeline = Timeline(latents.shape[0], past=caches)
        return self._decode(latents, timeline).clamp(-1.0, 1.0), timeline.kept

    def cache_shapes(self, height: int, width: int, *, batch: int = 1) -> dict[str, CacheShapes]:
        """Shapes of the caches for frames of `height` x `width` pixels, by "encode" and "decode"."""
        latent_height, latent_width = self.config.latent_size(height, width)
        # Shapes only: nothing is computed on `meta`, and this module's own weights stay where they are.
        with torch.device("meta"):
            probe = VideoVAE(self.config)
        probe = probe.to("meta")
        encode, decode = Timeline(batch, first=True), Timeline(batch, first=True)
        with torch.no_grad():
            probe._encode(torch.empty(batch, self.config.in_channels, 1, height, width, device="meta"), encode)
            latents = torch.empty(batch, self.config.z_dim, 1, latent_height, latent_width, device="meta")
            probe._decode(latents, decode)
        return {"encode": encode.shapes(), "decode": decode.shapes()}

    # ---- whole clips, for training ---------------------------------------------------------------------------

    def encode_moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames [B, 3, 1+n*temporal_stride, H, W] -> mean (normalised) and log variance (of the raw latents)."""
        self.config.num_latent_frames(frames.shape[2])
        return self._encode(frames, Timeline(frames.shape[0]))

    def encode_whole(self, frames: Tensor) -> Tensor:
        """`encode` with all frames at once: frames [B, 3, 1+n*temporal_stride, H, W] -> latents [B, z, 1+n, h, w]."""
        return self.encode_moments(frames)[0]

    def decode_whole(self, latents: Tensor, *, clamp: bool = False) -> Tensor:
        """`decode` with all frames at once: latents [B, z, 1+n, h, w] -> frames [B, 3, 1+n*temporal_stride, H, W].

        Not clamped to -1..1 unless asked: a loss needs the gradient outside too.
        """
        frames = self._decode(latents, Timeline(latents.shape[0]))
        return frames.clamp(-1.0, 1.0) if clamp else frames

    def _encode(self, frames: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """frames [B, 3, T, H, W] -> mean and log variance [B, z, F, h, w]."""
        batch, channels, time, height, width = frames.shape
        self.config.latent_size(height, width)
        p = self.config.pixel_patch
        # Channels of a packed cell are ordered colour, column, row, as in diffusers.
        packed = frames.reshape(batch, channels, time, height // p, p, width // p, p)
        packed = packed.permute(2, 0, 1, 6, 4, 3, 5).reshape(time * batch, channels * p * p, height // p, width // p)
        packed = packed.to(self.conv1.weight.dtype)
        moments = self.conv1(self.encoder(packed, timeline), timeline).float()
        mean, logvar = moments.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4).chunk(2, dim=1)
        return (mean - self.latents_mean[:, None]) / self.latents_std[:, None], logvar

    def _decode(self, latents: Tensor, timeline: Timeline) -> Tensor:
        """latents [B, z, F, h, w] -> frames [B, 3, T, H, W]."""
        batch = latents.shape[0]
        rows = latents.permute(2, 0, 1, 3, 4).flatten(0, 1) * self.latents_std + self.latents_mean
        rows = rows.to(self.conv2.weight.dtype)
        packed = self.decoder(self.conv2(rows, timeline), timeline).float()
        p = self.config.pixel_patch
        frames = packed.reshape(-1, batch, self.config.out_channels, p, p, *packed.shape[2:])
        frames = frames.permute(1, 2, 0, 5, 4, 6, 3)
        return frames.reshape(batch, self.config.out_channels, -1, packed.shape[2] * p, packed.shape[3] * p)
