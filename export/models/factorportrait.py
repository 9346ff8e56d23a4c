"""FactorPortrait (arXiv 2512.11645): one portrait, driving expression, head pose and camera path -> latent video.

Slots: 0 is the reference, 1..N the frames. Each stream is zero where it has nothing to say (the paper's figure of the condition
fusion): the reference only in slot 0, unless `FusionConfig.reference_slots` is "all"; noise, camera and pose only in slots 1..N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.config import PatchVAEConfig, VAEConfig
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.expression import ArkitEncoder, ExpressionController, ExpressionEncoder
from factorportrait.export.models.patch_vae import PatchVAE
from factorportrait.export.models.vae import VideoVAE
from factorportrait.model_config import ModelConfig


@dataclass
class ClipConditions:
    """Conditions of whole clips. A dropped stream is zeros: latents, rays or modulation alike."""

    reference_latents: Tensor  # [B, C, 1, h, w]
    pose_latents: Tensor  # [B, C, N, h, w]
    rays: Tensor  # [B, 6 or 24, N, h, w]
    expression_modulation: Tensor  # [B, 1+N, 6, D], slot 0 neutral


class FactorPortrait(nn.Module):
    """The networks of one checkpoint. Sub-modules are the checkpoint's files: vae, dit, expression."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vae = video_vae(config.vae)
        self.dit = WanDiT(config.dit, config.fusion, config.latent_height, config.latent_width)
        self.expression = expression_networks(config)

    def clip_modulation(self, codes: Tensor) -> Tensor:
        """codes of frame groups [B,4N,E] -> modulation of all slots [B,1+N,6,D]."""
        controller = self.expression["controller"]
        frames, _ = controller(codes, controller.initial_state(codes[:, 0]))
        return torch.cat([controller.neutral_modulation(codes.shape[0]), frames], dim=1)

    def clip_condition_tokens(self, conditions: ClipConditions) -> Tensor:
        """The slot layout: [B,1+N,T,D]."""
        frames = conditions.pose_latents.shape[2]
        reference = conditions.reference_latents
        if self.config.fusion.reference_slots == "all":
            reference = reference.expand(-1, -1, 1 + frames, -1, -1)
        else:
            reference = F.pad(reference, (0, 0, 0, 0, 0, frames))
        pose, rays = (F.pad(t, (0, 0, 0, 0, 1, 0)) for t in (conditions.pose_latents, conditions.rays))
        return self.dit.embed_conditions(reference, rays, pose)

    def predict_clip(
        self, noise_latents: Tensor, timesteps: Tensor, conditions: ClipConditions, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity of all frames of a clip.

        Args:
            noise_latents: [B,C,N,h,w].
            timesteps: [B,N] in 0..1000; the reference slot has 0.
            conditions: see `ClipConditions`.
            mask: [slots*T, slots*T] True where seen; None is bidirectional (clip mode).

        Returns:
            velocity [B,C,N,h,w]; slot 0 is dropped.
        """
        slots = noise_latents.shape[2] + 1
        temb, timestep_proj = self.dit.embed_time(F.pad(timesteps, (1, 0)))
        velocity, _ = self.dit(
            F.pad(noise_latents, (0, 0, 0, 0, 1, 0)),
            self.clip_condition_tokens(conditions),
            conditions.expression_modulation,
            temb,
            timestep_proj,
            torch.arange(slots, device=noise_latents.device),
            mask=mask,
        )
        return velocity[:, :, 1:]


def video_vae(config: VAEConfig | PatchVAEConfig) -> VideoVAE | PatchVAE:
    """The VAE that a config describes."""
    return PatchVAE(config) if isinstance(config, PatchVAEConfig) else VideoVAE(config)


def expression_networks(config: ModelConfig) -> nn.ModuleDict:
    """Picture or ARKit coefficients -> code, codes -> modulation."""
    return nn.ModuleDict(
        {
            "encoder": ExpressionEncoder(config.expression),
            "arkit": ArkitEncoder(config.expression),
            "controller": ExpressionController(config.expression, config.dit.dim),
        }
    )


def stream_mask(chunks: list[int], window_frames: int, tokens_per_frame: int) -> Tensor:
    """[slots*T, slots*T] True where seen: the reference sees itself, a chunk the reference, itself and the window before it.

    Args:
        chunks: latent frames of each chunk, in order.
        window_frames: latent frames that a chunk sees, itself included and the reference not.
    """
    slots = 1 + sum(chunks)
    mask = torch.zeros(slots, slots, dtype=torch.bool)
    mask[:, 0] = True
    end = 1
    for size in chunks:
        start, end = end, end + size
        mask[start:end, max(1, end - window_frames) : end] = True
    return mask.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
