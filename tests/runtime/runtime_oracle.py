"""Recomputes a stream from its whole history, with none of the runtime's code: no cache, no ring, no ONNX.

In every step the full sequence (reference, all finished chunks, the chunk in work) goes through the transformer again.
Attention is written out per query chunk: which frames it sees, and at which positions, follows from the definition of the
window. Rotation is done with complex numbers in float64.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, frame_positions: torch.Tensor, config, grid: tuple[int, int]) -> torch.Tensor:
    """x [S, D] of whole frames -> [H, S, E] complex-rotated by (position, row, column) of each token."""
    rows, columns = grid
    time, row, column = torch.meshgrid(
        frame_positions.double(), torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij"
    )
    angles = []
    for axis, place in enumerate((time, row, column)):
        split = config.rope_split[axis]
        frequency = config.rope_theta ** (-torch.arange(0, split, 2, dtype=torch.float64) / split)
        angles.append(place.reshape(-1, 1).double() * frequency)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, dim=1))  # [S, E/2]
    heads = x.double().reshape(len(x), config.num_heads, -1, 2).permute(1, 0, 2, 3)
    return torch.view_as_real(torch.view_as_complex(heads.contiguous()) * turn).flatten(-2)


def block_forward(block, x, modulation, chunks, window_frames, config, grid):
    """x [S, T, D] of all slots, modulation [S, 6, D] -> x after the block. `chunks`: slot ranges, the first is the reference."""
    table = (block.modulation.double() + modulation.double()).unbind(1)
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (part[:, None] for part in table)
    tokens = x.shape[1]

    def norm(values, shift, scale):
        return F.layer_norm(values, (values.shape[-1],), eps=config.eps) * (1 + scale) + shift

    h = norm(x, shift_a, scale_a)
    attention = block.self_attn
    q, k, v = (getattr(attention, name)(h) for name in "qkv")
    q, k = (
        part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + config.eps) * weight
        for part, weight in ((q, attention.norm_q.weight), (k, attention.norm_k.weight))
    )
    out = torch.zeros_like(x)
    for start, end in chunks:
        if start == 0:
            seen, positions = [0], [0]
        else:
            seen = [0, *range(max(1, end - window_frames), end)]
            # Frame f (0-based; slot f + 1) of the window counts from 1 once the stream is longer than the window.
            base = max(0, (end - 1) - window_frames)
            positions = [0, *(slot - base for slot in seen[1:])]
        own = positions[len(seen) - (end - start) :]
        keys = rotate(k[seen].flatten(0, 1), torch.tensor(positions), config, grid)
        queries = rotate(q[start:end].flatten(0, 1), torch.tensor(own), config, grid)
        values = v[seen].flatten(0, 1).reshape(keys.shape[1], config.num_heads, -1).transpose(0, 1)
        weights = torch.softmax(queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5, dim=-1)
        out[start:end] = (weights @ values).transpose(0, 1).reshape(end - start, tokens, -1)
    x = x + attention.o(out) * gate_a
    return x + block.ffn(norm(x, shift_f, scale_f)) * gate_f


@torch.no_grad()
def stream(model, reference, chunks, noise, schedule, window_frames) -> torch.Tensor:
    """Clean latents [C, N, h, w] of all chunks.

    Args:
        model: FactorPortrait in float64.
        reference: (tokens [1, T, D], modulation [1, 6, D]) of the reference slot.
        chunks: per chunk (tokens [n, T, D], modulation [n, 6, D]).
        noise: callable (first_frame, count, step) -> [C, count, h, w].
        schedule: rows of (timestep, sample, outputs newest first, noise).
    """
    dit = model.dit
    config = dit.config
    tokens, modulation = [reference[0]], [reference[1]]
    finished: list[torch.Tensor] = []
    ranges = [(0, 1)]
    first = 0
    for chunk_tokens, chunk_modulation in chunks:
        count = len(chunk_tokens)
        tokens.append(chunk_tokens)
        modulation.append(chunk_modulation)
        ranges.append((1 + first, 1 + first + count))
        x, velocities = noise(first, count, 0), []
        for step, (timestep, sample, outputs, fresh) in enumerate(schedule):
            blank = torch.zeros_like(x[:, :1])
            latents = torch.cat([blank, *finished, x], dim=1)
            slots = latents.shape[1]
            timesteps = torch.zeros(1, slots, dtype=torch.float64)
            timesteps[0, 1 + first :] = timestep
            half = config.freq_dim // 2
            frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            angles = timesteps[..., None] * frequency
            temb = dit.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1))
            projected = dit.time_projection(temb).unflatten(-1, (6, -1))[0]
            weight = dit.patch_embedding.weight[:, dit.fusion.slice("noise")]
            hidden = F.conv3d(latents[None], weight, stride=config.patch_size)[0].flatten(2).permute(1, 2, 0)
            hidden = hidden + torch.cat(tokens)
            for block in dit.blocks:
                hidden = block_forward(
                    block, hidden, projected + torch.cat(modulation), ranges, window_frames, config, dit.grid
                )
            shift, scale = (dit.head.modulation[0, :, None] + temb[0][None]).unbind(0)
            normed = F.layer_norm(hidden, (config.dim,), eps=config.eps) * (1 + scale[:, None]) + shift[:, None]
            patches = dit.head.head(normed)[1 + first :]
            _, ph, pw = config.patch_size
            rows, columns = dit.grid
            velocity = patches.reshape(count, rows, columns, ph, pw, -1).permute(5, 0, 1, 3, 2, 4)
            velocity = velocity.reshape(-1, count, rows * ph, columns * pw)
            velocities.insert(0, velocity)
            x = sample * x + sum(output * seen for output, seen in zip(outputs, velocities, strict=False))
            if fresh:
                x = x + fresh * noise(first, count, step + 1)
        finished.append(x)
        first += count
    return torch.cat(finished, dim=1)


def relative_error(found, expected) -> float:
    """max |found - expected| / max |expected|."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
