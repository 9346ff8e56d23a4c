"""Wan-class diffusion transformer with per-frame modulation and a K/V cache; weights carry the original Wan key names.

Shapes: B batch, F latent frames, P cached ones, T tokens per latent frame, D width, H heads, C channels, E head dimension.
FactorPortrait (arXiv 2512.11645) adds an expression term to the modulation of every block and concatenates its conditions on
channels before the patch embedding. Both are linear in what they add, so this module takes them ready made: `condition_tokens`
carries everything of the patch embedding but the noise, `expression_modulation` the expression's share of the modulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.export.models.animate import FaceAdapter, FaceEncoder, MotionEncoder
from factorportrait.export.models.ray_adapter import RayAdapter
from factorportrait.model_config import DiTConfig, FusionConfig


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """timesteps [...] in 0..1000 -> [..., dim], cosines first (Wan; DDPM with base 10000)."""
    half = dim // 2
    frequencies = torch.pow(10000.0, -torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.to(torch.float32)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(config: DiTConfig, axis: int, length: int) -> Tensor:
    """[length, split/2, 2] cosine and sine of position * theta^(-2i/split) for one axis, computed in float64."""
    split = config.rope_split[axis]
    inverse = config.rope_theta ** (-torch.arange(0, split, 2, dtype=torch.float64) / split)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inverse
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(torch.float32)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """x [B, H, S, E] with interleaved pairs, rotary [S, E/2, 2] (cosine, sine) -> the same shape, rotated."""
    if torch.onnx.is_in_onnx_export():
        cos, sin = rotary[None, ..., 0], rotary[None, ..., 1]
        return torch.onnx.ops.rotary_embedding(x.float(), cos, sin, interleaved=True).to(x.dtype)
    cos, sin = rotary[..., 0], rotary[..., 1]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Over the full width, before heads are split (Wan's norm_q and norm_k)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention; the caller decides which keys and values are seen."""

    def __init__(self, config: DiTConfig, *, image: bool = False):
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()

    def split_heads(self, x: Tensor) -> Tensor:
        # x: [B, S, D] -> [B, H, S, E]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # q: [B, H, S, E], k, v: [B, H, S', E], mask: [S, S'] True where seen -> [B, S, D]
        return self.o(self.look_up(q, k, v, mask))

    @staticmethod
    def look_up(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # As `attend`, before the last projection
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


@dataclass
class Rotary:
    """Rotary factors of the queries [F*T, E/2, 2] and of all keys [(P+F)*T, E/2, 2]."""

    query: Tensor
    key: Tensor


class CacheInPlace:
    """Keys and values of one block in memory that the block writes itself: slot 0 is the reference, then a ring of frames.

    Args:
        k, v: [B,1,R,D], R rows of all slots, unrotated keys.
        row: [B] int64, the row of the first token that is written.
        num_rows: rows from the first that are attended to; None for all.
        mutate: write into the memory given; False leaves it as it was. ONNX leaves this to whoever binds the tensors.
    """

    def __init__(self, k: Tensor, v: Tensor, row: Tensor, num_rows: int | None = None, mutate: bool = False):
        self.k, self.v, self.row, self.num_rows, self.mutate = k, v, row, num_rows, mutate

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New k, v [B,S,D] into the memory -> the keys and values that are attended to."""
        self.k, self.v = (self._scatter(memory, new.unsqueeze(1)) for memory, new in ((self.k, k), (self.v, v)))
        if self.num_rows is None:
            return self.k.flatten(1, 2), self.v.flatten(1, 2)
        return self.k[:, :, : self.num_rows].flatten(1, 2), self.v[:, :, : self.num_rows].flatten(1, 2)

    def _scatter(self, memory: Tensor, new: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            # TensorRT takes exactly this: four axes, the last but one is written, rows in a line.
            return torch.onnx.ops.symbolic(
                "TensorScatter", (memory, new, self.row), {"axis": -2, "mode": "linear"},
                dtype=memory.dtype, shape=memory.shape, version=24,
            )  # fmt: skip
        rows = torch.arange(new.shape[2], device=new.device) + self.row
        return memory.index_copy_(2, rows, new) if self.mutate else memory.index_copy(2, rows, new)


class Block(nn.Module):
    """Self-attention, optional cross-attention to text and a picture, feed-forward; shift, scale, gate from the modulation."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = Attention(config)
        if config.text_dim is not None:
            self.norm3 = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else nn.Identity()
            self.cross_attn = Attention(config, image=config.image_dim is not None)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        # x: [B, F, T, D], shift, scale: [B, F, 1, D]; LayerNorm and modulation stay in fp32
        normed = F.layer_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return (normed * (1 + scale) + shift).to(x.dtype)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        past_kv: tuple[Tensor, Tensor] | CacheInPlace | None = None,
        text_kv: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        image_kv: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,F,T,D], modulation [B,F,6,D] fp32, past_kv 2 x [B,P,T,D] -> x, new keys (unrotated) and values [B,F,T,D]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            (self.modulation.float() + modulation).unsqueeze(3).unbind(2)
        )
        attention = self.self_attn
        h = self.modulate(x, shift_a, scale_a).flatten(1, 2)
        q = attention.split_heads(attention.norm_q(attention.q(h)))
        new_k, new_v = attention.norm_k(attention.k(h)), attention.v(h)
        k, v = new_k, new_v
        if isinstance(past_kv, CacheInPlace):
            k, v = past_kv.write(k, v)
        elif past_kv is not None:
            k, v = (torch.cat([past.flatten(1, 2), new], dim=1) for past, new in zip(past_kv, (k, v), strict=True))
        k = apply_rotary(attention.split_heads(k), rotary.key)
        out = attention.attend(apply_rotary(q, rotary.query), k, attention.split_heads(v), mask)
        x = (x + out.view_as(x) * gate_a).to(x.dtype)
        if text_kv is not None:
            attention = self.cross_attn
            h = self.norm3(x.float()).to(x.dtype).flatten(1, 2)
            q = attention.split_heads(attention.norm_q(attention.q(h)))
            # Text and picture are attended to apart, each with a softmax of its own.
            out = attention.look_up(q, *map(attention.split_heads, text_kv))
            if image_kv is not None:
                out = out + attention.look_up(q, *map(attention.split_heads, image_kv))
            x = x + attention.o(out).view_as(x)
        x = (x + self.ffn(self.modulate(x, shift_f, scale_f)) * gate_f).to(x.dtype)
        return x, new_k.view_as(x), new_v.view_as(x)


class Head(nn.Module):
    """Last norm, modulation by the raw time embedding, projection to patches."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        _, ph, pw = config.patch_size
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_channels * ph * pw)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        # x: [B, F, T, D], temb: [B, F, D] -> [B, F, T, C*ph*pw]
        shift, scale = (self.modulation.float() + temb.float().unsqueeze(2)).unsqueeze(3).unbind(2)
        normed = F.layer_norm(x.float(), (x.shape[-1],), eps=self.eps)
        # The velocity is fp32: the sampler adds it up over the steps.
        return self.head((normed * (1 + scale) + shift).to(self.head.weight.dtype)).float()


class ImageEmbedding(nn.Module):
    """Tokens of an image encoder to the transformer's width (Wan I2V)."""

    def __init__(self, image_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim), nn.LayerNorm(dim)
        )

    def forward(self, image: Tensor) -> Tensor:
        # image: [B, L, image_dim] -> [B, L, D]
        return self.proj(image)


class WanDiT(nn.Module):
    """The transformer and the embeddings that feed it."""

    def __init__(self, config: DiTConfig, fusion: FusionConfig, latent_height: int, latent_width: int):
        super().__init__()
        self.config, self.fusion = config, fusion
        _, ph, pw = config.patch_size
        self.grid = (latent_height // ph, latent_width // pw)
        dim = config.dim
        self.patch_embedding = nn.Conv3d(fusion.in_channels, dim, config.patch_size, config.patch_size)
        if config.text_dim is not None:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        if config.reference_channels is not None:
            self.ref_conv = nn.Conv2d(config.reference_channels, dim, (ph, pw), (ph, pw))
        if config.pose_channels is not None:
            self.pose_patch_embedding = nn.Conv3d(config.pose_channels, dim, config.patch_size, config.patch_size)
        if config.ray_adapter is not None:
            self.control_adapter = RayAdapter(config.ray_adapter, config)
        if config.face is not None:
            self.motion_encoder = MotionEncoder(config.face)
            self.face_encoder = FaceEncoder(config.face, dim)
            adapters = (FaceAdapter(config) for _ in range(0, config.num_layers, config.face.block_interval))
            self.face_adapter = nn.ModuleDict({"fuser_blocks": nn.ModuleList(adapters)})
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._build_rotary_tables()

    def _build_rotary_tables(self):
        rows, columns = self.grid
        height = rotary_table(self.config, 1, rows)[:, None].expand(-1, columns, -1, -1)
        width = rotary_table(self.config, 2, columns)[None].expand(rows, -1, -1, -1)
        spatial = torch.cat([height, width], dim=2).flatten(0, 1).contiguous()
        self.register_buffer("rope_time", rotary_table(self.config, 0, self.config.max_position), persistent=False)
        self.register_buffer("rope_space", spatial, persistent=False)

    def rotary(self, positions: Tensor) -> Tensor:
        """positions [F] int64 -> [F*T, E/2, 2]."""
        tokens, _, _ = self.rope_space.shape
        time = self.rope_time.index_select(0, positions)[:, None].expand(-1, tokens, -1, -1)
        space = self.rope_space[None].expand(positions.shape[0], -1, -1, -1)
        return torch.cat([time, space], dim=2).flatten(0, 1)

    def embed_patches(self, latents: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """latents [B,C,F,h,w], weight [D,C,1,ph,pw] -> [B,F,T,D]: the convolution as one matrix product."""
        # A stride as large as the kernel makes it a product of patches: the same sums, and no slow Conv3d on a CPU.
        batch, channels, frames, height, width = latents.shape
        _, ph, pw = self.config.patch_size
        patches = latents.reshape(batch, channels, frames, height // ph, ph, width // pw, pw)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames, -1, channels * ph * pw)
        return F.linear(patches.to(weight.dtype), weight.flatten(1), bias)

    def embed_noise(self, noise_latents: Tensor) -> Tensor:
        """[B,C,F,h,w] -> [B,F,T,D], the noise's share of the patch embedding."""
        return self.embed_patches(noise_latents, self.patch_embedding.weight[:, self.fusion.slice("noise")], None)

    def embed_conditions(self, reference_latents: Tensor, rays: Tensor, pose_latents: Tensor) -> Tensor:
        """reference, pose [B,C,F,h,w], rays [B,6 or 24,F,h,w] -> condition tokens [B,F,T,D], bias included."""
        return self.embed_streams({"reference": reference_latents, "camera": rays, "pose": pose_latents})

    def embed_streams(self, streams: Mapping[str, Tensor]) -> Tensor:
        """Every stream but the noise by name [B,C,F,h,w] -> condition tokens [B,F,T,D], bias included; not for text alone."""
        weight = self.patch_embedding.weight
        order = [stream for stream in self.fusion.streams if stream != "noise"]
        latents = torch.cat([streams[stream] for stream in order], dim=1)
        selected = torch.cat([weight[:, self.fusion.slice(stream)] for stream in order], dim=1)
        return self.embed_patches(latents, selected, self.patch_embedding.bias)

    def embed_pose(self, latents: Tensor) -> Tensor:
        """Pose latents [B,C,F,h,w] -> tokens [B,F,T,D] to be added (Animate, slots 1..N)."""
        return self.embed_patches(latents, self.pose_patch_embedding.weight, self.pose_patch_embedding.bias)

    def embed_image(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """An image encoder's tokens [B,L,image_dim] -> keys and values [B,L,D] of every block's cross-attention."""
        context = self.img_emb(image)
        attentions = [block.cross_attn for block in self.blocks]
        return [(attention.norm_k_img(attention.k_img(context)), attention.v_img(context)) for attention in attentions]

    def embed_time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """timesteps [B,F] in 0..1000 -> temb [B,F,D], timestep_proj [B,F,6,D]."""
        embedding = sinusoidal_embedding(timesteps, self.config.freq_dim).to(self.time_embedding[0].weight.dtype)
        temb = self.time_embedding(embedding)
        return temb, self.time_projection(temb).unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """text [B,L,text_dim] -> keys and values [B,L,D] of every block's cross-attention."""
        context = self.text_embedding(text.to(self.text_embedding[0].weight.dtype))
        return [
            (block.cross_attn.norm_k(block.cross_attn.k(context)), block.cross_attn.v(context)) for block in self.blocks
        ]

    def unpatchify(self, x: Tensor) -> Tensor:
        # x: [B, F, T, ph*pw*C] (channels last in a patch, as Wan's head) -> [B, C, F, h, w]
        batch, frames, _, _ = x.shape
        _, ph, pw = self.config.patch_size
        rows, columns = self.grid
        x = x.reshape(batch, frames, rows, columns, ph, pw, self.config.out_channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, self.config.out_channels, frames, rows * ph, columns * pw)

    def forward(
        self,
        noise_latents: Tensor,
        condition_tokens: Tensor,
        expression_modulation: Tensor,
        temb: Tensor,
        timestep_proj: Tensor,
        positions: Tensor,
        past_positions: Tensor | None = None,
        past_kv: list[tuple[Tensor, Tensor]] | None = None,
        text_kv: list[tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,
        image_kv: list[tuple[Tensor, Tensor]] | None = None,
        face_kv: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One evaluation over F latent frames that see P cached ones and each other.

        Args:
            noise_latents: [B,C,F,h,w].
            condition_tokens: [B,F,T,D] from `embed_conditions`.
            expression_modulation: [B,F,6,D] from the expression controller.
            temb, timestep_proj: [B,F,D], [B,F,6,D] from `embed_time`.
            positions: [F] int64, rotary positions of the frames; past_positions [P] of the cached ones.
            past_kv: per block unrotated keys and values [B,P,T,D].
            text_kv: per block keys and values of the prompt.
            mask: [F*T, (P+F)*T] True where seen; training only.
            image_kv: per block keys and values of a picture, from `embed_image`.
            face_kv: per face adapter its keys and values, as `wan_stages.FaceTokens` makes them.

        Returns:
            velocity [B,C,F,h,w], and per block the new unrotated keys and values [B,F,T,D].
        """
        x = self.embed_noise(noise_latents) + condition_tokens
        modulation = timestep_proj.float() + expression_modulation.float()
        x, new_kv = self.run_blocks(
            self.blocks, x, modulation, self.rotary_pair(positions, past_positions), past_kv, text_kv, mask, image_kv,
            self.adapters_of(0, len(self.blocks), face_kv),
        )  # fmt: skip
        return self.unpatchify(self.head(x, temb)), new_kv

    @staticmethod
    def run_blocks(
        blocks: Sequence[Block],
        x: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        past_kv: list[tuple[Tensor, Tensor]] | None = None,
        text_kv: list[tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,
        image_kv: list[tuple[Tensor, Tensor]] | None = None,
        adapters: Mapping[int, tuple[FaceAdapter, Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x [B,F,T,D] through `blocks` -> x, and per block the new keys and values.

        past_kv, text_kv and image_kv have one item per block, adapters those of `adapters_of`.
        """
        new_kv = []
        for i, block in enumerate(blocks):
            x, k, v = block(
                x, modulation, rotary, past_kv[i] if past_kv else None, text_kv[i] if text_kv else None, mask,
                image_kv[i] if image_kv else None,
            )  # fmt: skip
            if adapters and i in adapters:
                adapter, face_k, face_v = adapters[i]
                x = x + adapter(x, face_k, face_v)
            new_kv.append((k, v))
        return x, new_kv

    def adapters_of(
        self, start: int, end: int, face_kv: Sequence[tuple[Tensor, Tensor]] | Mapping[int, tuple[Tensor, Tensor]] | None
    ) -> dict[int, tuple[FaceAdapter, Tensor, Tensor]]:
        """Adapters behind the blocks from `start` to before `end`, by a block's place among these, with their keys and values.

        face_kv: of every adapter, or of these by number.
        """
        if face_kv is None:
            return {}
        interval = self.config.face.block_interval
        adapters = self.face_adapter["fuser_blocks"]
        return {
            block - start: (adapters[block // interval], *face_kv[block // interval])
            for block in range(start, end)
            if block % interval == 0
        }

    def rotary_pair(self, positions: Tensor, past_positions: Tensor | None) -> Rotary:
        """Factors for the frames and, in front of them, the cached ones."""
        keys = positions if past_positions is None else torch.cat([past_positions, positions])
        return Rotary(self.rotary(positions), self.rotary(keys))
