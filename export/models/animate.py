"""Face motion of Wan2.2-Animate (arXiv 2509.14055): picture -> motion code -> tokens per latent frame -> adapters behind blocks.

Nothing here depends on the denoising step but the adapters' queries: codes are computed once per driving frame, tokens and the
adapters' keys and values once per clip. The orthonormal basis of motions is a function of weights alone, so an export folds it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.model_config import DiTConfig, FaceConfig

BLUR = (1.0, 3.0, 3.0, 1.0)


class Bias(nn.Module):
    """Bias, leaky ReLU and a gain that keeps the variance (StyleGAN 2, arXiv 1912.04958, appendix B)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, C, h, w]
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * 2**0.5


class ScaledConv2d(nn.Module):
    """Convolution whose weight is divided by the root of its fan-in; with `blur` the picture is smoothed before it is halved."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, blur: bool = False, act: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.act = Bias(out_channels) if act else nn.Identity()
        self.blur = blur
        self.stride = 2 if blur else 1
        # Without blur the picture keeps its size; a blur of 4 taps pads for itself and for the strided kernel behind it.
        self.padding = 0 if blur else kernel // 2
        self.blur_padding = (len(BLUR) - self.stride + kernel - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,h,w] -> [B,O,h,w], or [B,O,h/2,w/2] with blur."""
        if self.blur:
            taps = torch.tensor(BLUR, dtype=x.dtype, device=x.device)
            kernel = taps[:, None] * taps / taps.sum() ** 2
            channels = x.shape[1]
            x = F.conv2d(x, kernel.expand(channels, 1, -1, -1), padding=self.blur_padding, groups=channels)
        weight = self.weight * self.weight[0].numel() ** -0.5
        return self.act(F.conv2d(x, weight, stride=self.stride, padding=self.padding))


class ScaledLinear(nn.Module):
    """Linear layer whose weight is divided by the root of its width."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, C] -> [B, O]
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class MotionLevel(nn.Module):
    """Two convolutions beside a shortcut, all of them to half the size."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = ScaledConv2d(in_channels, in_channels, 3)
        self.conv2 = ScaledConv2d(in_channels, out_channels, 3, blur=True)
        self.skip = ScaledConv2d(in_channels, out_channels, 1, blur=True, act=False)

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, C, h, w] -> [B, O, h/2, w/2]
        return (self.conv2(self.conv1(x)) + self.skip(x)) * 0.5**0.5


class MotionEncoder(nn.Module):
    """Face picture -> motion code: amounts of learned directions, which are made orthonormal (LIA, arXiv 2203.09043, eq. 5)."""

    def __init__(self, config: FaceConfig):
        super().__init__()
        widths = config.encoder_widths
        self.conv_in = ScaledConv2d(3, widths[0], 1)
        self.levels = nn.ModuleList(MotionLevel(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.conv_out = ScaledConv2d(widths[-1], config.style_dim, 4, act=False)
        self.conv_out.padding = 0  # 4 pixels become one
        dims = [config.style_dim] * 5 + [config.motion_dim]
        self.linears = nn.ModuleList(ScaledLinear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))
        self.directions = nn.Parameter(torch.randn(config.code_dim, config.motion_dim))

    def amounts(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S] in -1..1 -> amounts of the directions [B,motion_dim]."""
        x = self.conv_in(pictures)
        for level in self.levels:
            x = level(x)
        x = self.conv_out(x).flatten(1)
        for linear in self.linears:
            x = linear(x)
        return x

    def basis(self) -> Tensor:
        """The directions, orthonormal [code_dim,motion_dim], float32."""
        return torch.linalg.qr(self.directions.float() + 1e-8)[0]

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S] in -1..1 -> motion codes [B,code_dim]."""
        amounts = self.amounts(pictures)
        return (amounts.float() @ self.basis().T).to(amounts.dtype)


class FoldedMotionEncoder(nn.Module):
    """A MotionEncoder for a graph: the basis is a constant, since ONNX has no QR decomposition."""

    def __init__(self, encoder: MotionEncoder):
        super().__init__()
        self.motion_encoder = encoder
        with torch.no_grad():
            self.register_buffer("basis", encoder.basis().T.contiguous(), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S] in -1..1 -> motion codes [B,code_dim]."""
        amounts = self.motion_encoder.amounts(pictures)
        return (amounts.float() @ self.basis).to(amounts.dtype)


class CausalConv1d(nn.Module):
    """Sees the past alone, which before the first frame is the first frame repeated."""

    def __init__(self, in_dim: int, out_dim: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        # x: [B, T, C] -> [B, T/stride, O]
        return self.conv(F.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2)


class FaceEncoder(nn.Module):
    """Motion codes of all frames -> tokens of the latent frames: the causal aggregator, 4 frames to one."""

    def __init__(self, config: FaceConfig, dim: int):
        super().__init__()
        hidden = config.hidden_dim
        self.num_tokens, self.hidden = config.num_tokens, hidden
        self.conv1_local = CausalConv1d(config.code_dim, hidden * config.num_tokens)
        self.conv2 = CausalConv1d(hidden, hidden, 2)
        self.conv3 = CausalConv1d(hidden, hidden, 2)
        self.out_proj = nn.Linear(hidden, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B,1+4N,code_dim] -> tokens [B,1+N,num_tokens+1,D]; the last token is learned and the same everywhere."""
        batch = codes.shape[0]
        x = self.conv1_local(codes).unflatten(-1, (self.num_tokens, self.hidden))
        # The groups of channels go their own ways from here: as items of the batch.
        x = self._act(x.transpose(1, 2).flatten(0, 1))
        x = self._act(self.conv2(x))
        x = self.out_proj(self._act(self.conv3(x)))
        x = x.unflatten(0, (batch, self.num_tokens)).transpose(1, 2)
        return torch.cat([x, self.padding_tokens.expand(batch, x.shape[1], -1, -1)], dim=2)

    def _act(self, x: Tensor) -> Tensor:
        return F.silu(F.layer_norm(x, (self.hidden,), eps=1e-6))


class FaceAdapter(nn.Module):
    """Cross-attention of a latent frame's tokens to its own face tokens, added behind a block."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_heads, config.eps
        self.linear1_q, self.linear1_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.linear2 = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(config.head_dim, config.eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.eps)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Face tokens [B,F,M,D] -> keys and values [B,F,M,D], once per clip."""
        normed = F.layer_norm(tokens.float(), (tokens.shape[-1],), eps=self.eps).to(self.linear1_kv.weight.dtype)
        k, v = self.linear1_kv(normed).chunk(2, dim=-1)
        return self.k_norm(k.unflatten(-1, (self.num_heads, -1))).flatten(-2), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x [B,F,T,D], k, v [B,F,M,D] -> what is added to x."""
        q = self.linear1_q(F.layer_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)).unflatten(-1, (self.num_heads, -1))
        q, k, v = (
            t.flatten(0, 1).transpose(1, 2)
            for t in (self.q_norm(q), *(t.unflatten(-1, (self.num_heads, -1)) for t in (k, v)))
        )
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.linear2(out.transpose(1, 2).flatten(2)).view_as(x)
