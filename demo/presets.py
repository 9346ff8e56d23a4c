"""Model and training settings of the demo: `cpu` for two cores and hours, `gpu` for one data-centre GPU. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from factorportrait.config import PatchVAEConfig
from factorportrait.model_config import (
    CameraConfig,
    DiTConfig,
    ExpressionConfig,
    FusionConfig,
    GenerationConfig,
    ModelConfig,
)


@dataclass(frozen=True)
class PhaseSettings:
    """One phase of training. It ends at `steps` optimiser steps or after `minutes`, whichever is first.

    Attributes:
        parts: micro-batches of a step; on a CPU each of `Preset.workers` threads takes one after the other.
        learning_rate: of Muon (matrices) and AdamW (everything else) alike; constant, then linear to zero over `cooldown`.
        batch: samples of a part; the phase says what a sample is.
    """

    steps: int
    parts: int
    batch: int
    learning_rate: float
    minutes: float | None = None
    warmup_steps: int = 50
    cooldown: float = 0.3
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    validate_every: int = 250
    save_every_s: float = 150.0


@dataclass(frozen=True)
class DiTSettings(PhaseSettings):
    """Flow matching.

    Attributes:
        batch: tokens of a part divided by `tokens_per_frame`, that is slots, so that short and long clips cost the same.
        short_share: of parts with no more than one chunk: more people for the same time, and less attention. With few people in
            a step the update is noise in all directions but the easy ones, and expression is never one of these.
        stream_share: share of parts with the chunk-causal mask.
        cut_share: of short windows with that mask and more than one frame that are cut into two chunks.
        context_share: of windows of several chunks, those whose first chunk is clean context, as finished frames are.
        context_noise: highest noise level of that context, for robustness against drift.
        code_noise: of the expression codes, in half of the clips; the rest has the codes of the ARKit map.
        drop: chance that a condition is dropped, for each of them.
        twin_share: of the parts that show every clip twice, with two performances.
        twin_weight: of the difference of their errors, against 1 of the mean.
        face_weight, background_weight: of latent cells at eyes and mouth, and behind the head; the rest has 1.
        channel_weight: exponent: a channel's squared error weighs as its share of the latents' deviation to this power. 0 is all
            alike; 2 is the error of pixels; between them large shapes come first and fine detail is not forgotten.
        cells: of a latent frame that take part where not all do: those on the head and with detail, and some flat ones. What lies
            flat behind the head is copied well early on, and a third of all cells.
        cells_share: of parts in which not all cells take part.
        noise_weight: exponent: a squared error weighs as the noise level to this power; 0 is the velocity's error, 2 that of the
            clean latents. Few steps hardly visit small levels.
        controller_rate: of the expression controller's learning rate, against 1 of the transformer's.
    """

    short_share: float = 0.9
    stream_share: float = 0.5
    cut_share: float = 0.5
    context_share: float = 0.3
    context_noise: float = 0.1
    drop: float = 0.04
    code_noise: float = 0.2
    training_shift: float = 1.5
    pure_noise_share: float = 0.55
    twin_share: float = 0.6
    twin_weight: float = 6.0
    face_weight: float = 4.0
    background_weight: float = 0.5
    channel_weight: float = 1.5
    controller_rate: float = 0.3
    cells: int = 160
    cells_share: float = 0.8
    noise_weight: float = 1.0


@dataclass(frozen=True)
class Preset:
    """How to train on one kind of machine."""

    name: str
    workers: int
    device: str
    vae: PhaseSettings
    expression: PhaseSettings
    dit: DiTSettings
    seed: int = 0


MODEL = ModelConfig(
    name="factorportrait-demo",
    system="factorportrait",
    height=128,
    width=128,
    fps=25.0,
    vae=PatchVAEConfig(z_dim=48),
    # Tokens of one latent cell, 8 pixels: those of 16 were still coarse blocks after 26 minutes on two cores.
    dit=DiTConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=6, out_channels=48, patch_size=(1, 1, 1)),
    fusion=FusionConfig(latent_channels=48, reference_slots="all"),
    expression=ExpressionConfig(encoder_widths=(16, 32, 64, 128)),
    generation=GenerationConfig(
        chunk_frames=3, window_frames=6, max_clip_frames=8, timestep_shift=1.0, denoising_steps=2
    ),
    # Frames the face as the training's cameras do (demo/world/motion.py).
    camera=CameraConfig(fov_degrees=16.6, distance=0.95, target=(0.0, 0.002, 0.02)),
)

CPU = Preset(
    name="cpu",
    workers=2,
    device="cpu",
    vae=PhaseSettings(steps=6000, minutes=8.0, parts=2, batch=9, learning_rate=2e-3),
    expression=PhaseSettings(steps=20000, minutes=40.0, parts=2, batch=24, learning_rate=1e-3, cooldown=0.5),
    dit=DiTSettings(steps=12000, minutes=400.0, parts=2, batch=24, learning_rate=2e-3, cooldown=0.85),
)
# Together 22 minutes; --stop-after cuts them into runs.
GPU = replace(
    CPU,
    name="gpu",
    workers=1,
    device="cuda",
    vae=replace(CPU.vae, steps=20000, minutes=4.0, parts=1, batch=144, ema_decay=0.9995, validate_every=500),
    expression=replace(CPU.expression, steps=8000, minutes=3.0, parts=1, batch=256, ema_decay=0.999, validate_every=500),
    dit=replace(CPU.dit, steps=40000, minutes=15.0, parts=1, batch=512, ema_decay=0.9995, validate_every=500),
)
PRESETS = {preset.name: preset for preset in (CPU, GPU)}
