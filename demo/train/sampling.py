"""Few-step sampling in torch, for evaluation while training; the runtime does the same with a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from factorportrait.export.models.factorportrait import ClipConditions, FactorPortrait, stream_mask
from factorportrait.runtime.schedule import shifted_sigmas


def euler(predict: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, shift: float) -> Tensor:
    """Integrate dx = v dsigma from 1 to 0. predict: x, sigma -> velocity."""
    x, sigmas = noise, [float(sigma) for sigma in shifted_sigmas(steps, shift)]
    for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (following - now) * predict(x, now)
    return x


@torch.no_grad()
def sample_clip(model: FactorPortrait, conditions: ClipConditions, noise: Tensor, steps: int, shift: float) -> Tensor:
    """noise [B, C, N, h, w] -> clean latents, all frames together."""

    def predict(x: Tensor, sigma: float) -> Tensor:
        timesteps = torch.full((x.shape[0], x.shape[2]), 1000 * sigma, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16):
            return model.predict_clip(x, timesteps, conditions).float()

    return euler(predict, noise, steps, shift)


@torch.no_grad()
def sample_stream(model: FactorPortrait, conditions: ClipConditions, noise: Tensor, steps: int, shift: float) -> Tensor:
    """noise [B, C, N, h, w] -> clean latents, chunk by chunk; what came before is computed anew instead of cached."""
    generation = model.config.generation
    size = generation.chunk_frames
    done: list[Tensor] = []
    for start in range(0, noise.shape[2], size):
        end = min(start + size, noise.shape[2])
        first = max(0, end - generation.window_frames)
        past = torch.cat(done, dim=2)[:, :, first:] if done else noise[:, :, :0]
        sizes = [length for length in (past.shape[2], end - start) if length]
        mask = stream_mask(sizes, generation.window_frames, model.config.tokens_per_frame).to(noise.device)
        modulation = conditions.expression_modulation
        window = ClipConditions(
            conditions.reference_latents,
            conditions.pose_latents[:, :, first:end],
            conditions.rays[:, :, first:end],
            torch.cat([modulation[:, :1], modulation[:, 1 + first : 1 + end]], dim=1),
        )

        def predict(x: Tensor, sigma: float, past=past, window=window, mask=mask) -> Tensor:
            timesteps = torch.full((x.shape[0], past.shape[2] + x.shape[2]), 1000 * sigma, device=x.device)
            timesteps[:, : past.shape[2]] = 0
            with torch.autocast(x.device.type, torch.bfloat16):
                velocity = model.predict_clip(torch.cat([past, x], dim=2), timesteps, window, mask)
            return velocity[:, :, past.shape[2] :].float()

        done.append(euler(predict, noise[:, :, start:end], steps, shift))
    return torch.cat(done, dim=2)
