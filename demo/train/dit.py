"""Phase 4: flow matching of the transformer and the expression controller, under both masks.

x = (1 - sigma) * clean + sigma * noise, target velocity = noise - clean, timestep = 1000 * sigma. In clip mode a clip has one
sigma, in stream mode each chunk its own; the first chunk is sometimes clean, as committed frames are at run time.

Most parts show twins: the same person, pose, camera, light and noise with two performances. Expression moves a few cells
by little, so among the errors of everything else its gradient drowns, and the transformer learns to shut the controller out.
In the difference of twins everything else cancels; its share of the loss is raised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.presets import DiTSettings
from demo.train.expression import CodeBasis, scale_layers
from demo.train.latents import LatentStore
from demo.train.trainer import Draw, Metrics
from factorportrait.export.models.dit import Rotary
from factorportrait.export.models.factorportrait import ClipConditions, FactorPortrait, stream_mask
from factorportrait.model_config import GenerationConfig

CHUNK_FULL_SHARE = 0.75  # of chunks that have `chunk_frames`; the others are shorter, as the last of a video may be
SHORT_SHARES = (0.5, 0.2, 0.3)  # of short windows with 1, 2, 3 latent frames
NUM_CHUNKS_SHARES = (0.4, 0.5, 0.1)  # of windows with 1, 2, 3 chunks
WHOLE_CLIP_SHARE = 0.3
INITIAL_MODULATION = 0.2  # deviation of the modulation over codes
DROP_ALL_SHARE = 0.03
DETAIL_ENERGY = 0.1  # mean square of a latent cell's channels but the first, above which the cell is not flat
VALIDATION_SIGMAS = (1.0, 0.75, 0.5, 0.25)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon updates the matrices of the blocks and of the controller."""
    return (
        parameter.ndim >= 2 and name.startswith(("dit.blocks.", "expression.controller.")) and "modulation" not in name
    )


def prepare(model: FactorPortrait, codes: Tensor) -> None:
    """Start the head at zero and the controller with a modulation that codes [B, T, E] do move."""
    controller = model.expression["controller"]
    scale_layers(
        controller, codes, [torch.zeros(len(codes), *s, device=codes.device) for s in controller.state_shapes()]
    )
    with torch.no_grad():
        controller.projection[-1].weight *= INITIAL_MODULATION
        model.dit.head.head.weight.zero_()
        model.dit.head.head.bias.zero_()


def train_only_transformer(model: FactorPortrait) -> None:
    """Gradients for the transformer and the expression controller, and for nothing else."""
    model.requires_grad_(False)
    model.dit.requires_grad_(True)
    model.expression["controller"].requires_grad_(True)


@dataclass(frozen=True)
class Window:
    """Latent frames start..start+frames-1 of a clip; chunks is None under the bidirectional mask."""

    start: int
    frames: int
    chunks: tuple[int, ...] | None


def draw_window(draw: Draw, settings: DiTSettings, generation: GenerationConfig, total: int) -> Window:
    """Which part of clips of `total` latent frames a micro-batch sees, and how it is cut into chunks."""
    rng = draw.rng
    if draw.chance(settings.short_share):
        frames = 1 + int(rng.choice(len(SHORT_SHARES), p=SHORT_SHARES))
        chunks = None
        if draw.chance(settings.stream_share):
            cut = frames > 1 and draw.chance(settings.cut_share)
            first = int(rng.integers(1, frames)) if cut else frames
            chunks = (first, frames - first) if cut else (frames,)
        return Window(int(rng.integers(total - frames + 1)), frames, chunks)
    if not draw.chance(settings.stream_share):
        longest = min(total, generation.max_clip_frames)
        frames = longest if draw.chance(WHOLE_CLIP_SHARE) else int(rng.integers(1, longest + 1))
        return Window(int(rng.integers(total - frames + 1)), frames, None)
    chunks: list[int] = []
    for _ in range(1 + rng.choice(len(NUM_CHUNKS_SHARES), p=NUM_CHUNKS_SHARES)):
        size = generation.chunk_frames
        size = size if draw.chance(CHUNK_FULL_SHARE) else int(rng.integers(1, size + 1))
        # Never longer than the window, so that positions are those of a rolling cache.
        if sum(chunks) + size <= min(generation.window_frames, total):
            chunks.append(size)
    frames = sum(chunks)
    return Window(int(rng.integers(total - frames + 1)), frames, tuple(chunks))


def draw_sigmas(draw: Draw, settings: DiTSettings, window: Window, batch: int) -> tuple[Tensor, Tensor]:
    """Noise levels [B, N] of the frames, and which of them [B, N] are clean context (timestep 0, no loss)."""
    sizes = torch.tensor(window.chunks or (window.frames,))
    uniform = draw.uniform((batch, len(sizes)), torch.device("cpu"))
    shift = settings.training_shift
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    pure = draw.uniform(sigmas.shape, torch.device("cpu")) < settings.pure_noise_share
    sigmas = torch.where(pure, 1.0, sigmas)
    context = torch.zeros(sigmas.shape, dtype=torch.bool)
    if len(sizes) > 1:
        context[:, 0] = draw.uniform((batch,), torch.device("cpu")) < settings.context_share
    sigmas = torch.where(context, settings.context_noise * uniform, sigmas)
    return sigmas.repeat_interleave(sizes, 1), context.repeat_interleave(sizes, 1)


def noisy_codes(codes: Tensor, draw: Draw, settings: DiTSettings, copies: int = 1) -> Tensor:
    """codes [B, T, E] -> the same, half of the clips with errors like the expression encoder's: per clip and frame.

    copies: the batch is that many times the same clips; all copies of a clip get equal errors.
    """
    batch, frames, width = len(codes) // copies, *codes.shape[1:]
    of_clip = draw.normal((batch, 1, width), codes.device)
    of_frame = draw.normal((batch, frames, width), codes.device)
    strength = settings.code_noise * (draw.uniform((batch, 1, 1), codes.device) < 0.5)
    return codes + (strength * (of_clip + of_frame)).repeat(copies, 1, 1)


def load_conditions(
    model: FactorPortrait, store: LatentStore, clips: list[int], window: Window, codes: Tensor
) -> ClipConditions:
    """Conditions of a window. codes [B, 4N, E] of the whole clips."""
    part = slice(window.start, window.start + window.frames)
    modulation = model.clip_modulation(codes)
    return ClipConditions(
        reference_latents=store.stack("reference", clips, codes.device),
        pose_latents=store.stack("pose", clips, codes.device)[:, :, part],
        rays=store.stack("rays", clips, codes.device)[:, :, part],
        expression_modulation=torch.cat([modulation[:, :1], modulation[:, 1:][:, part]], dim=1),
    )


def drop_conditions(conditions: ClipConditions, draw: Draw, share: float, copies: int = 1) -> ClipConditions:
    """Zero each condition of a clip with the chance `share`, and all of them now and then. copies: see `noisy_codes`."""
    batch, device = len(conditions.rays) // copies, conditions.rays.device
    kept = (draw.uniform((batch, 4), device) >= share) & (draw.uniform((batch, 1), device) >= DROP_ALL_SHARE)
    reference, pose, rays, expression = kept.float().repeat(copies, 1).unbind(1)

    def masked(x: Tensor, keep: Tensor) -> Tensor:
        return x * keep.view(-1, *[1] * (x.ndim - 1))

    return ClipConditions(
        masked(conditions.reference_latents, reference),
        masked(conditions.pose_latents, pose),
        masked(conditions.rays, rays),
        masked(conditions.expression_modulation, expression),
    )


def channel_scale(model: FactorPortrait, exponent: float) -> Tensor:
    """[1, C, 1, 1, 1] by which errors of the latents' channels are multiplied; its mean square is 1."""
    config = model.config.vae
    scale = torch.tensor(config.latents_std or (1.0,) * config.z_dim) ** (exponent / 2)
    return (scale / scale.square().mean().sqrt()).view(1, -1, 1, 1, 1)


def window_mask(model: FactorPortrait, window: Window, cells: int, device: torch.device) -> Tensor | None:
    if window.chunks is None:
        return None
    return stream_mask(list(window.chunks), model.config.generation.window_frames, cells).to(device)


def draw_cells(draw: Draw, reference: Tensor, clean: Tensor, classes: Tensor, cells: int) -> Tensor:
    """Which cells of every slot take part: those on the head and those with detail first, then some of the flat ones.

    Args:
        reference, clean: latents [B, C, 1, h, w] of the portrait and [V*B, C, N, h, w] of all versions of the frames.
        classes: [B, N, h, w], 0 behind the head.
        cells: how many of h * w.

    Returns:
        [V*B, 1+N, cells] indices, the same for all versions of a clip.
    """
    copies = len(clean) // len(reference)
    detail = [latents[:, 1:].square().mean(1) > DETAIL_ENERGY for latents in (reference, *clean.chunk(copies))]
    frames = torch.stack([classes > 0, *detail[1:]]).any(0)
    chosen = torch.cat([detail[0], frames], dim=1).flatten(2)
    rank = chosen + draw.uniform(chosen.shape, chosen.device)
    return rank.topk(cells, dim=-1).indices.sort(-1).values.repeat(copies, 1, 1)


def take_cells(x: Tensor, cells: Tensor) -> Tensor:
    """x [B, F, T, D], cells [B, F, K] -> [B, F, K, D]."""
    return x.gather(2, cells.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def predict_cells(
    model: FactorPortrait,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: ClipConditions,
    cells: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """`FactorPortrait.predict_clip` of some cells that see each other alone, for transformers with tokens of one cell.

    Args:
        noisy: [B, C, N, h, w]; timesteps [B, N]; conditions as there.
        cells: [B, 1+N, K], see `draw_cells`.
        mask: [slots*K, slots*K] True where seen.

    Returns:
        velocity [B, N, K, C].

    Raises:
        ValueError: tokens of more than a cell.
    """
    if model.config.dit.patch_size != (1, 1, 1):
        raise ValueError(f"patch_size {model.config.dit.patch_size}: training wants tokens of one latent cell, (1, 1, 1)")
    dit, slots = model.dit, cells.shape[1]
    temb, timestep_proj = dit.embed_time(F.pad(timesteps, (1, 0)))
    x = dit.embed_noise(F.pad(noisy, (0, 0, 0, 0, 1, 0))) + model.clip_condition_tokens(conditions)
    rotary = dit.rotary(torch.arange(slots, device=x.device)).unflatten(0, (slots, -1))
    rotary = rotary[torch.arange(slots, device=x.device)[:, None], cells].flatten(1, 2).unsqueeze(1)
    modulation = timestep_proj.float() + conditions.expression_modulation.float()
    x, _ = dit.run_blocks(dit.blocks, take_cells(x, cells), modulation, Rotary(rotary, rotary), mask=mask)
    return dit.head(x, temb)[:, 1:]


def dit_loss(
    model: FactorPortrait,
    draw: Draw,
    store: LatentStore,
    basis: CodeBasis,
    settings: DiTSettings,
    device: torch.device,
) -> tuple[Tensor, Metrics]:
    """Loss of one part: clips drawn at random, with or without their twins, all with the same window."""
    total, tokens = store.stack("latents", [0]).shape[2], model.config.tokens_per_frame
    window = draw_window(draw, settings, model.config.generation, total)
    versions = ("", "twin_") if draw.chance(settings.twin_share) else ("",)
    copies = len(versions)
    cells = min(settings.cells, tokens) if draw.chance(settings.cells_share) else tokens
    batch = max(1, settings.batch * tokens // (cells * copies * (1 + window.frames)))
    clips = [int(clip) for clip in draw.rng.integers(len(store), size=batch)]
    part = slice(window.start, window.start + window.frames)
    coefficients, clean = (
        torch.cat([store.stack(version + name, clips, device) for version in versions])
        for name in ("coefficients", "latents")
    )
    clean, codes = clean[:, :, part], noisy_codes(basis.code(coefficients), draw, settings, copies)
    conditions = load_conditions(model, store, clips * copies, window, codes)
    classes = store.stack("weights", clips, device)[:, part].long()
    kept = draw_cells(draw, conditions.reference_latents[:batch], clean, classes, cells)
    conditions = drop_conditions(conditions, draw, settings.drop, copies)
    sigmas, context = (t.to(device).repeat(copies, 1) for t in draw_sigmas(draw, settings, window, batch))
    noise = draw.normal(clean[:batch].shape, device).repeat(copies, 1, 1, 1, 1)
    level = sigmas[:, None, :, None, None]
    noisy = (1 - level) * clean + level * noise
    mask = window_mask(model, window, cells, device)
    velocity = predict_cells(model, noisy, 1000 * sigmas * ~context, conditions, kept, mask)
    target = take_cells((noise - clean).flatten(3).permute(0, 2, 3, 1), kept[:, 1:])
    error = (velocity.float() - target) * channel_scale(model, settings.channel_weight).to(device).flatten()
    scale = torch.tensor([settings.background_weight, 1.0, settings.face_weight], device=device)
    weights = scale[classes.flatten(2).gather(2, kept[:batch, 1:])]
    weights = weights * (~context * sigmas**settings.noise_weight)[:batch, :, None]
    squared = error.square().mean(-1)
    if copies == 2:
        first, second = error.chunk(2)
        # With a weight of 1 this is the mean of both squared errors.
        common, change = ((first + second) / 2).square().mean(-1), ((first - second) / 2).square().mean(-1)
        squared = common + settings.twin_weight * change
    loss = (squared * weights).sum() / weights.sum().clamp(min=1)
    kind = "stream" if window.chunks else "clip"
    return loss, {f"{kind}{'_twins' if copies == 2 else ''}_loss": loss.item()}


@torch.no_grad()
def validate(
    model: FactorPortrait, store: LatentStore, basis: CodeBasis, device: torch.device, clips: int = 8
) -> Metrics:
    """Errors of the predicted clean latents of unseen people in clip mode, and what the expression code is worth at the face.

    `val_expression_followed`: of the squared difference between twins at eyes and mouth, the share that the prediction from pure
    noise explains. 1 follows the expression perfectly, 0 is what ignoring it gives, and what is worse than that is negative.
    """
    indices = list(range(min(clips, len(store))))
    clean = store.stack("latents", indices, device)
    window = Window(0, clean.shape[2], None)
    with torch.autocast(device.type, torch.bfloat16):
        conditions, of_twins = (
            load_conditions(model, store, indices, window, basis.code(store.stack(name, indices, device)))
            for name in ("coefficients", "twin_coefficients")
        )
    noise = Draw(0, "validate", 0, 0).normal(clean.shape, device)
    face = store.stack("weights", indices, device) == 2
    zeroed = ClipConditions(
        conditions.reference_latents,
        conditions.pose_latents,
        conditions.rays,
        torch.zeros_like(conditions.expression_modulation),
    )

    def prediction(sigma: float, conditions: ClipConditions) -> Tensor:
        x = (1 - sigma) * clean + sigma * noise
        timesteps = torch.full(clean.shape[:1] + clean.shape[2:3], 1000 * sigma, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            return x - sigma * model.predict_clip(x, timesteps, conditions).float()

    def clean_error(sigma: float, conditions: ClipConditions) -> Tensor:
        return (prediction(sigma, conditions) - clean).square().mean(1)

    errors = {sigma: clean_error(sigma, conditions) for sigma in VALIDATION_SIGMAS}
    metrics = {f"val_error_{sigma:g}": float(error.mean()) for sigma, error in errors.items()}
    metrics["val_face_error"] = float(errors[1.0][face].mean())
    metrics["val_face_error_zeroed"] = float(clean_error(1.0, zeroed)[face].mean())
    change = (clean - store.stack("twin_latents", indices, device)).movedim(1, -1)[face]
    predicted = (prediction(1.0, conditions) - prediction(1.0, of_twins)).movedim(1, -1)[face]
    metrics["val_expression_followed"] = 1 - float((predicted - change).square().sum() / change.square().sum())
    metrics["val_velocity_loss"] = float(np.mean([float(e.mean()) / s**2 for s, e in errors.items()]))
    return metrics
