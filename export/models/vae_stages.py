"""The four graphs of the VAE: encode and decode, the first latent frame and every other one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factorportrait.export.models.vae import StreamingVAE
from factorportrait.export.stages import Stage


class _FirstStage(nn.Module):
    """x -> y and the caches that depend on x. A cache that is left out starts as zeros."""

    def __init__(self, vae: StreamingVAE, method: str, kept: list[int]):
        super().__init__()
        self.vae, self.method, self.kept = vae, method, kept

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, caches = getattr(self.vae, self.method)(x)
        return (y, *(caches[index] for index in self.kept))


class _SteadyStage(nn.Module):
    """x and all caches -> y and all caches."""

    def __init__(self, vae: StreamingVAE, method: str):
        super().__init__()
        self.vae, self.method = vae, method

    def forward(self, x: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        y, caches = getattr(self.vae, self.method)(x, caches)
        return (y, *caches)


def vae_stages(vae: StreamingVAE, height: int, width: int) -> list[Stage]:
    """Stages for frames of `height` x `width` pixels, batch 1, every shape fixed.

    Caches are `cache_in.i` and `cache_out.i`, i as in the VAE's `cache_shapes`. The first stage of a direction has no
    cache inputs and may lack some outputs: those caches start as zeros.
    """
    config = vae.config
    parameter = next(vae.parameters())
    latent_height, latent_width = config.latent_size(height, width)
    shapes = vae.cache_shapes(height, width)
    stages = []
    for direction, x_name, y_name in (("encode", "frames", "latents"), ("decode", "latents", "frames")):
        steady, first = shapes[direction].steady, shapes[direction].first
        indices = [index for index, name in enumerate(steady) if name in first]

        def example(*shape: int) -> Tensor:
            return torch.zeros(shape, device=parameter.device)

        def example_input(num_frames: int, direction: str = direction) -> Tensor:
            if direction == "encode":
                return example(1, config.in_channels, num_frames, height, width)
            return example(1, config.z_dim, 1, latent_height, latent_width)

        stages.append(
            Stage(
                name=f"vae_{direction}_first",
                module=_FirstStage(vae, f"{direction}_first", indices).eval(),
                args=(example_input(1),),
                input_names=[x_name],
                output_names=[y_name, *(f"cache_out.{index}" for index in indices)],
            )
        )
        stages.append(
            Stage(
                name=f"vae_{direction}_steady",
                module=_SteadyStage(vae, f"{direction}_steady").eval(),
                args=(
                    example_input(config.temporal_stride),
                    *(example(*shape).to(parameter.dtype) for shape in steady.values()),
                ),
                input_names=[x_name, *(f"cache_in.{index}" for index in range(len(steady)))],
                output_names=[y_name, *(f"cache_out.{index}" for index in range(len(steady)))],
            )
        )
    return stages
