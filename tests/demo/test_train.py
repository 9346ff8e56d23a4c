"""Training: resuming, masks and partitions, losses that fall. Toy sizes, a few seconds."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from demo import dataset
from demo.presets import CPU, MODEL, DiTSettings, PhaseSettings
from demo.train import expression as expression_phase
from demo.train import phases
from demo.train import vae as vae_phase
from demo.train.__main__ import MORE_TO_DO, PHASES, main
from demo.train.data import ClipStore
from demo.train.dit import (
    INITIAL_MODULATION,
    Window,
    channel_scale,
    dit_loss,
    draw_cells,
    draw_sigmas,
    draw_window,
    is_matrix,
    predict_cells,
    prepare,
    take_cells,
    train_only_transformer,
    window_mask,
)
from demo.train.expression import MIRROR, CodeBasis, random_basis
from demo.train.latents import LatentStore, encode_shard, group_frames, mirrored, pack_rays, write_shard
from demo.train.muon import orthogonalise
from demo.train.sampling import euler, sample_clip, sample_stream
from demo.train.trainer import Draw, Trainer, learning_rate
from factorportrait.arkit import ARKIT_NAMES
from factorportrait.command import run_command
from factorportrait.errors import CheckpointError, UserError
from factorportrait.export.checkpoint import load_checkpoint, save_checkpoint
from factorportrait.export.models.factorportrait import ClipConditions, FactorPortrait, stream_mask
from factorportrait.export.models.patch_vae import PatchVAE
from factorportrait.model_config import DiTConfig

TOY = replace(
    MODEL,
    height=32,
    width=32,
    dit=DiTConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, patch_size=(1, 1, 1)),
    vae=replace(MODEL.vae, z_dim=16, cell_dim=8, cell_blocks=1, fine_dim=8, fine_blocks=1),
    fusion=replace(MODEL.fusion, latent_channels=16),
    expression=replace(MODEL.expression, image_size=32, encoder_widths=(8, 8), hidden_dim=16),
)


@pytest.fixture(autouse=True)
def one_thread():
    """Toy tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_settings(**changes) -> PhaseSettings:
    return PhaseSettings(**{"steps": 12, "parts": 2, "batch": 8, "learning_rate": 1e-2, "warmup_steps": 2, **changes})


def linear_loss(module, draw, part):
    x = draw.normal((16, 4), torch.device("cpu"))
    return (module(x).float() - x.flip(1)).square().mean(), {"part": part}


def toy_trainer(work: Path, workers: int = 1, **changes) -> Trainer:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    return Trainer("toy", module, toy_settings(**changes), work, 0, lambda name, p: name == "0.weight", workers)


def test_resumed_run_equals_uninterrupted_one(tmp_path):
    whole = toy_trainer(tmp_path / "a")
    whole.run(linear_loss)
    first = toy_trainer(tmp_path / "b", steps=5, cooldown=0.0)
    second = toy_trainer(tmp_path / "b")
    first.settings = replace(second.settings, steps=12)
    for _ in range(5):
        first.train_step(linear_loss, learning_rate(first.settings, first.step, 0))
    first.save()
    second.resume()
    second.run(linear_loss)
    assert second.step == whole.step == 12
    for a, b in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_out_of_time_keeps_what_it_has(tmp_path):
    late = toy_trainer(tmp_path)
    late.deadline = time.monotonic()
    late.run(linear_loss)
    assert late.checkpoint.exists() and late.step == 0 and not late.done
    again = toy_trainer(tmp_path)
    again.resume()
    again.run(linear_loss)
    assert again.step == 12 and again.done


def test_threads_change_nothing(tmp_path):
    runs = [toy_trainer(tmp_path / str(workers), workers) for workers in (1, 2)]
    for run in runs:
        run.run(linear_loss)
    for a, b in zip(runs[0].module.parameters(), runs[1].module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_may_learn_more_slowly(tmp_path):
    """Both kinds: Muon's first layer at full rate, AdamW's second at a tenth, and the other way round."""
    moved = {}
    for slow in ("0.", "1."):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        before = [p.detach().clone() for p in module.parameters()]
        trainer = Trainer(
            "toy", module, toy_settings(weight_decay=0.0), tmp_path, 0, lambda name, p: name == "0.weight",
            rate_of=lambda name, slow=slow: 0.1 if name.startswith(slow) else 1.0,
        )  # fmt: skip
        trainer.train_step(linear_loss, 1e-2)
        moved[slow] = [float((p.detach() - b).abs().max()) for p, b in zip(module.parameters(), before, strict=True)]
    for first, second, ratio in zip(moved["0."], moved["1."], (0.1, 0.1, 10, 10), strict=True):
        assert first / second == pytest.approx(ratio, rel=1e-3)


def test_channels_weigh_as_they_are_told():
    """Exponent 0: all alike. 2: as in the sum of squares of raw latents, that is of pixels under an orthonormal encoder."""
    vae = replace(TOY.vae, latents_std=tuple(1.0 + i for i in range(16)), latents_mean=(0.0,) * 16)
    model = FactorPortrait(replace(TOY, vae=vae))
    error = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    raw = error * torch.arange(1.0, 17.0).view(1, -1, 1, 1, 1)
    scale = {exponent: channel_scale(model, exponent) for exponent in (0.0, 1.0, 2.0)}
    assert torch.equal(scale[0.0], torch.ones(1, 16, 1, 1, 1))
    weighed = (error * scale[2.0]).square().sum((1, 2, 3, 4))
    assert torch.allclose(weighed / weighed.sum(), (raw.square().sum((1, 2, 3, 4)) / raw.square().sum()))
    for found in scale.values():
        assert float(found.square().mean()) == pytest.approx(1)


def test_noise_for_the_decoder():
    """Half of the crops stay as they are; the others get noise in the transformer's unit, at levels of their own."""
    clean = torch.randn(400, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    clean *= torch.tensor([8.0, 2.0, 1.0, 1.0]).view(1, 4, 1, 1, 1)
    added = vae_phase.noisy_latents(clean, Draw(0, "test", 0, 0)) - clean
    levels = added.square().mean((2, 3, 4)).sqrt()  # [400, 4]
    untouched = (levels == 0).all(1)
    assert 0.4 < float(untouched.float().mean()) < 0.6
    noisy = levels[~untouched]
    assert 0.45 * (8 * 3) ** 0.5 < float(noisy[:, 0].max()) < 0.65 * (8 * 3) ** 0.5
    assert float((noisy[:, 0] / noisy[:, 2]).median()) == pytest.approx(8**0.5, rel=0.1)
    assert float(noisy[:, 0].std()) > 0.2


def test_learning_rate_warms_up_and_falls_by_steps_or_time():
    settings = toy_settings(steps=100, minutes=1.0, cooldown=0.5)
    rates = [learning_rate(settings, step, 0.0) / settings.learning_rate for step in (0, 1, 50, 75)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert learning_rate(settings, 10, 45.0) == pytest.approx(0.5 * settings.learning_rate)


def test_orthogonalised_singular_values_are_near_one():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix).float())
    assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.parametrize("short_share", [CPU.dit.short_share, 0.0])
def test_windows_fit_the_clip_and_context_carries_no_noise(short_share):
    settings, generation = replace(CPU.dit, short_share=short_share), MODEL.generation
    counts, with_context = [], 0
    for step in range(120):
        draw = Draw(0, "test", step, 0)
        window = draw_window(draw, settings, generation, 8)
        assert 0 <= window.start and window.start + window.frames <= 8
        sigmas, context = draw_sigmas(draw, settings, window, 5)
        assert sigmas.shape == context.shape == (5, window.frames)
        chunks = window.chunks or (window.frames,)
        assert sum(chunks) == window.frames
        if window.chunks is not None:
            assert window.frames <= generation.window_frames and max(chunks) <= generation.chunk_frames
        for of_chunk, is_context in zip(sigmas.split(chunks, 1), context.split(chunks, 1), strict=True):
            assert (of_chunk == of_chunk[:, :1]).all() and (is_context == is_context[:, :1]).all()
        assert not context[:, chunks[0] if len(chunks) > 1 else 0 :].any()
        assert (sigmas[context] <= settings.context_noise).all()
        counts.append(len(chunks))
        with_context += bool(context.any())
    assert sum(count > 1 for count in counts) >= 8 and with_context >= 5


def test_short_windows_are_cut_as_often_as_they_are_told():
    """With a chunk before it, a chunk sees what streams show it; without a cut, a short window is one chunk."""
    settings, generation = replace(CPU.dit, short_share=1.0), MODEL.generation
    whole, cut = (
        [draw_window(Draw(0, "test", step, 0), replace(settings, cut_share=share), generation, 8) for step in range(80)]
        for share in (0.0, 1.0)
    )
    for windows in (whole, cut):
        assert {window.frames for window in windows} == set(range(1, generation.chunk_frames + 1))
        assert all(window.chunks is None or sum(window.chunks) == window.frames for window in windows)
    assert {window.chunks for window in whole} == {None, (1,), (2,), (3,)}
    assert {window.chunks for window in cut} == {None, (1,), (1, 1), (1, 2), (2, 1)}


def toy_store(folder: Path, clips: int = 3) -> LatentStore:
    rng = np.random.default_rng(0)
    h, w, groups = TOY.latent_height, TOY.latent_width, 8
    smooth = rng.standard_normal((clips, 16, 1, 1, 1)) + np.zeros((clips, 16, groups, h, w))
    write_shard(
        folder / "shard-00000.npz",
        {
            "latents": smooth.astype(np.float16),
            "pose": rng.standard_normal((clips, 16, groups, h, w)).astype(np.float16),
            "reference": smooth[:, :, :1].astype(np.float16),
            "rays": rng.standard_normal((clips, 24, groups, h, w)).astype(np.float16),
            "twin_latents": (smooth + 0.1 * rng.standard_normal(smooth.shape)).astype(np.float16),
            "coefficients": rng.random((clips, 4 * groups, 52)).astype(np.float16),
            "twin_coefficients": rng.random((clips, 4 * groups, 52)).astype(np.float16),
            "weights": rng.integers(0, 3, (clips, groups, h, w)).astype(np.uint8),
        },
    )
    return LatentStore(folder)


def toy_shard(clips: int = 2, frames: int = 9, size: int = 32) -> dict[str, np.ndarray]:
    """What `demo.dataset` writes of a clip, as far as training reads it; half of every normal map is background."""
    rng = np.random.default_rng(1)

    def pictures(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, size, size, 3), dtype=np.uint8)

    normals = pictures(clips, frames)
    normals[..., : size // 2, :] = 0
    c2w = np.tile(np.eye(4), (clips, frames, 1, 1))
    c2w[..., :3, :3] = np.linalg.qr(rng.standard_normal((clips, frames, 3, 3)))[0]
    c2w[..., :3, 3] = rng.standard_normal((clips, frames, 3))
    K = np.tile(np.array([[40.0, 0, 17.5], [0, 42.0, 15.0], [0, 0, 1]]), (clips, frames, 1, 1))
    low = rng.uniform(0, 20, (clips, frames, 3, 2))
    return {
        "frames": pictures(clips, frames), "twin_frames": pictures(clips, frames), "normals": normals,
        "portrait": pictures(clips), "K": K, "c2w": c2w, "kind": np.zeros(clips, np.int8),
        "face_boxes": np.concatenate([low, low + 6], -1).astype(np.float32),
        "coefficients": rng.random((clips, frames, 52)).astype(np.float32),
        "twin_coefficients": rng.random((clips, frames, 52)).astype(np.float32),
    }  # fmt: skip


def test_a_mirror_image_is_the_same_world_reflected():
    """Pictures, boxes and rays are those of the reflected world, left actions are right ones; twice is the clip itself."""
    shard = toy_shard()
    other = mirrored(shard)
    np.testing.assert_array_equal(other["frames"], shard["frames"][:, :, :, ::-1])
    np.testing.assert_array_equal(other["portrait"], shard["portrait"][:, :, ::-1])
    assert ARKIT_NAMES[MIRROR[ARKIT_NAMES.index("jawLeft")]] == "jawRight"
    np.testing.assert_array_equal(
        other["coefficients"][..., ARKIT_NAMES.index("jawLeft")], shard["coefficients"][..., ARKIT_NAMES.index("jawRight")]
    )
    back = other["normals"][:, :, :, ::-1]
    np.testing.assert_array_equal(back[..., 1:], shard["normals"][..., 1:])
    covered = shard["normals"].any(-1)
    assert (back[..., 0][covered] == 255 - shard["normals"][..., 0][covered]).all() and not back[~covered].any()
    rays, mirror_rays = (pack_rays(a["K"][0], a["c2w"][0], TOY).reshape(4, 6, 3, 4, 4) for a in (shard, other))
    signs = np.array([1, -1, -1, -1, 1, 1]).reshape(1, 6, 1, 1, 1)  # o x d turns like an axis, d like a direction
    np.testing.assert_allclose(mirror_rays[..., ::-1], signs * rays, atol=1e-6)
    point, mirror_point = np.array([0.3, -0.2, 1.5]), np.array([-0.3, -0.2, 1.5])

    def pixel(arrays: dict[str, np.ndarray], position: np.ndarray) -> np.ndarray:
        c2w = arrays["c2w"][1, 2]
        projected = arrays["K"][1, 2] @ (np.linalg.inv(c2w) @ [*position, 1])[:3]
        return projected[:2] / projected[2]

    x, y = pixel(shard, point)
    np.testing.assert_allclose(pixel(other, mirror_point), (32 - x, y))
    for name, values in mirrored(other).items():
        np.testing.assert_allclose(values, shard[name], atol=1e-4, err_msg=name)
    vae = PatchVAE(TOY.vae).eval()
    encoded, reflected = (encode_shard(vae, a, TOY, torch.device("cpu")) for a in (shard, other))
    np.testing.assert_array_equal(reflected["weights"], encoded["weights"][..., ::-1])
    assert {name: a.shape for name, a in encoded.items()} == {name: a.shape for name, a in reflected.items()}


def test_crops_and_codes_are_fp32_under_autocast():
    """In bf16 places lie up to half a pixel off, and the code's targets in their third digit."""
    images = torch.linspace(-1, 1, 128).expand(4, 3, 128, 128)
    coefficients, basis = torch.rand(8, 52, generator=torch.Generator().manual_seed(0)), toy_basis()
    plain = expression_phase.jitter(images, Draw(0, "test", 0, 0)), basis.code(coefficients)
    with torch.autocast("cpu", torch.bfloat16):
        under = expression_phase.jitter(images, Draw(0, "test", 0, 0)), basis.code(coefficients)
    for found, expected in zip(under, plain, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_transformer_learns_and_only_what_it_should(tmp_path):
    torch.manual_seed(0)
    model = FactorPortrait(TOY)
    codes = torch.randn(2, 8, 128)
    prepare(model, codes)
    train_only_transformer(model)
    assert 0.5 < model.clip_modulation(codes)[:, 1:].std((0, 1)).mean() / INITIAL_MODULATION < 2
    before = {name: p.clone() for name, p in model.named_parameters()}
    settings = DiTSettings(steps=40, parts=1, batch=24, learning_rate=3e-3, warmup_steps=2)
    store, losses = toy_store(tmp_path), []
    trainer = Trainer("dit", model, settings, tmp_path, 0, is_matrix)

    def part_loss(model, draw, part):
        loss, metrics = dit_loss(model, draw, store, toy_basis(), settings, torch.device("cpu"))
        losses.append(loss.item())
        return loss, metrics

    trainer.run(part_loss)
    assert np.mean(losses[-8:]) < 0.75 * np.mean(losses[:8])
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"dit", "expression"}
    assert not any(name.startswith("expression.encoder") for name, p in model.named_parameters() if p.requires_grad)


def test_twins_share_everything_but_expression(tmp_path, monkeypatch):
    """Equal performances make equal errors: their difference vanishes, and its weight with it."""
    torch.manual_seed(0)
    model, store = FactorPortrait(TOY), toy_store(tmp_path)
    seen = {}

    def predict(model, noisy, timesteps, conditions, cells, mask):
        seen.update(noisy=noisy, timesteps=timesteps, conditions=conditions, cells=cells)
        return torch.zeros(len(noisy), noisy.shape[2], cells.shape[2], noisy.shape[1])

    monkeypatch.setattr("demo.train.dit.predict_cells", predict)

    def loss(step: int, weight: float) -> float:
        settings = replace(CPU.dit, twin_share=1.0, twin_weight=weight, batch=24, drop=0.4)
        draw = Draw(0, "test", step, 0)
        return dit_loss(model, draw, store, toy_basis(), settings, torch.device("cpu"))[0].item()

    for step in range(4):
        assert loss(step, 6.0) > loss(step, 1.0)
        for name in ("timesteps", "cells"):
            first, second = seen[name].chunk(2)
            assert torch.equal(first, second)
        for name, values in vars(seen["conditions"]).items():
            first, second = values.chunk(2)
            assert torch.equal(first, second) == (name != "expression_modulation" or not first.any())
    store._arrays["twin_latents"], store._arrays["twin_coefficients"] = store._arrays["latents"], store._arrays["coefficients"]
    assert loss(0, 6.0) == pytest.approx(loss(0, 1.0))
    assert torch.equal(*seen["noisy"].chunk(2)) and torch.equal(*seen["conditions"].expression_modulation.chunk(2))


def toy_clip(frames: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, ClipConditions]:
    """Noise [B, C, N, h, w], timesteps [B, N] and conditions of the toy model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    conditions = ClipConditions(
        normal(batch, 16, 1, 4, 4), normal(batch, 16, frames, 4, 4), normal(batch, 24, frames, 4, 4),
        0.1 * normal(batch, 1 + frames, 6, 32),
    )  # fmt: skip
    return normal(batch, 16, frames, 4, 4), 1000 * torch.rand(batch, frames, generator=generator), conditions


def changed_head(model: FactorPortrait) -> FactorPortrait:
    """Blocks and head of a new model, which must not be zero."""
    with torch.no_grad():
        for parameter in model.dit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model


@pytest.mark.parametrize("chunks", [None, (2, 1)])
def test_all_cells_are_the_whole_transformer(chunks):
    torch.manual_seed(0)
    model, window = changed_head(FactorPortrait(TOY)).eval(), Window(0, 3, chunks)
    noise, timesteps, conditions = toy_clip(3)
    cells = torch.arange(16).expand(2, 4, 16)
    mask = window_mask(model, window, 16, noise.device)
    with torch.no_grad():
        expected = model.predict_clip(noise, timesteps, conditions, mask)
        found = predict_cells(model, noise, timesteps, conditions, cells, mask)
    assert expected.std() > 0.01
    torch.testing.assert_close(found.permute(0, 3, 1, 2).unflatten(3, (4, 4)), expected)


def test_cells_left_out_are_not_seen_and_the_others_keep_their_places():
    """Whatever lies in the other cells changes nothing; a cell's place does."""
    torch.manual_seed(0)
    model = changed_head(FactorPortrait(TOY)).eval()
    noise, timesteps, conditions = toy_clip(2)
    cells = torch.stack([torch.randperm(16)[:6].sort().values for _ in range(6)]).view(2, 3, 6)
    left_out = torch.ones(2, 3, 16).scatter(2, cells, 0).bool().view(2, 1, 3, 4, 4)

    def predict(noise: torch.Tensor, conditions: ClipConditions) -> torch.Tensor:
        with torch.no_grad():
            return predict_cells(model, noise, timesteps, conditions, cells)

    def elsewhere(x: torch.Tensor, slots: slice) -> torch.Tensor:
        return torch.where(left_out[:, :, slots], 7.0, x)

    changed = replace(
        conditions, pose_latents=elsewhere(conditions.pose_latents, slice(1, None)), rays=elsewhere(conditions.rays, slice(1, None))
    )
    found = predict(noise, conditions)
    torch.testing.assert_close(predict(elsewhere(noise, slice(1, None)), changed), found)
    streams = ("reference_latents", "pose_latents", "rays")
    shifted = replace(conditions, **{name: getattr(conditions, name).roll(1, 4) for name in streams})
    with torch.no_grad():
        moved = predict_cells(model, noise.roll(1, 4), timesteps, shifted, cells - cells % 4 + (cells + 1) % 4)
    assert not torch.allclose(moved, found)
    with pytest.raises(ValueError, match="tokens of one latent cell"):
        larger = FactorPortrait(replace(TOY, dit=replace(TOY.dit, patch_size=(1, 2, 2))))
        predict_cells(larger, noise, timesteps, conditions, cells)


def test_cells_on_the_head_or_with_detail_come_first():
    reference, clean, classes = torch.zeros(2, 16, 1, 4, 4), torch.zeros(4, 16, 2, 4, 4), torch.zeros(2, 2, 4, 4).long()
    reference[:, 0], clean[:, 0] = 9.0, 9.0  # brightness alone is flat
    classes[0, :, 1, :2] = 1
    clean[2, 3, 1, 3, 3] = clean[1, 5, 0, 0, 2] = reference[1, 2, 0, 2, 2] = 2.0  # the twin of clip 0; clip 1; its portrait
    seen = torch.zeros(2, 3, 16)
    for step in range(40):
        cells = draw_cells(Draw(0, "cells", step, 0), reference, clean, classes, 5)
        assert cells.shape == (4, 3, 5) and torch.equal(*cells.chunk(2))
        assert (cells.diff(dim=-1) > 0).all()
        seen.scatter_add_(2, cells[:2], torch.ones(2, 3, 5))
    always = [[[], [4, 5], [4, 5, 15]], [[10], [2], []]]
    for clip in range(2):
        for slot in range(3):
            assert (seen[clip, slot] == 40).nonzero().flatten().tolist() == always[clip][slot]
    assert (seen > 0).all()
    numbers = torch.arange(48.0).view(1, 3, 16, 1).expand(4, -1, -1, 2)
    torch.testing.assert_close(take_cells(numbers, cells)[0, 1, :, 0], 16.0 + cells[0, 1])


def test_euler_is_exact_for_a_straight_path():
    clean, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for steps, shift in ((1, 1.0), (4, 3.0)):
        assert torch.allclose(euler(lambda x, sigma: noise - clean, noise, steps, shift), clean, atol=1e-6)


def test_stream_of_one_chunk_equals_the_masked_clip(monkeypatch):
    torch.manual_seed(0)
    model, frames = changed_head(FactorPortrait(TOY)).eval(), TOY.generation.chunk_frames
    noise, _, conditions = toy_clip(frames)
    mask = stream_mask([frames], TOY.generation.window_frames, TOY.tokens_per_frame)

    @torch.no_grad()
    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.predict_clip(x, torch.full((2, frames), 1000 * sigma), conditions, mask).float()

    expected = euler(predict, noise, 2, 1.0)
    assert torch.equal(sample_stream(model, conditions, noise, 2, 1.0), expected)
    # The two would agree under any mask, were it not for what the mask hides.
    assert not torch.allclose(sample_clip(model, conditions, noise, 2, 1.0), expected, atol=1e-3)
    monkeypatch.setattr("demo.train.sampling.stream_mask", lambda *args: torch.ones_like(mask))
    assert not torch.allclose(sample_stream(model, conditions, noise, 2, 1.0), expected, atol=1e-3)


def test_a_stream_does_not_see_what_comes_later():
    torch.manual_seed(0)
    model = changed_head(FactorPortrait(TOY)).eval()
    noise, _, conditions = toy_clip(5)
    stream = sample_stream(model, conditions, noise, 2, 1.0)
    assert stream.shape == sample_clip(model, conditions, noise, 2, 1.0).shape == noise.shape
    with_other_future = noise.clone()
    with_other_future[:, :, 3:] += 1
    again = sample_stream(model, conditions, with_other_future, 2, 1.0)
    assert torch.equal(stream[:, :, :3], again[:, :, :3])
    assert not torch.equal(stream[:, :, 3:], again[:, :, 3:])


def toy_basis() -> CodeBasis:
    random = torch.randn(128, 52, generator=torch.Generator().manual_seed(0))
    return CodeBasis(torch.rand(52), torch.rand(52) + 0.1, torch.linalg.qr(random)[0].T)


def test_the_encoder_sees_both_performances_with_their_own_coefficients():
    """Pictures are as bright as their first coefficient says; where there are no twins, none are asked for."""
    amounts = {name: np.random.default_rng(i).integers(0, 256, (3, 5)) for i, name in enumerate(("", "twin_"))}

    class Store:
        twins = True

        def __len__(self):
            return 3

        def get(self, clip, name):
            version = "twin_" if name.startswith("twin_") else ""
            amount = amounts[version][clip]
            if name.endswith("frames"):
                return np.broadcast_to(amount[:, None, None, None], (5, 4, 4, 3)).astype(np.uint8)
            return np.broadcast_to(amount[:, None] / 255, (5, 52)).astype(np.float32)

        def has(self, clip, name):
            return self.twins

    store, draw = Store(), Draw(0, "test", 0, 0)
    images, coefficients = expression_phase.sample_images(store, draw, 64, torch.device("cpu"))
    assert images.shape == (64, 3, 4, 4) and coefficients.shape == (64, 52)
    torch.testing.assert_close((images[:, 0, 0, 0] + 1) / 2, coefficients[:, 0], atol=1e-6, rtol=0)
    drawn = {round(255 * float(value)) for value in coefficients[:, 0]}
    assert drawn & set(amounts[""].flatten()) and drawn & set(amounts["twin_"].flatten()) - set(amounts[""].flatten())
    store.twins = False
    _, coefficients = expression_phase.sample_images(store, Draw(0, "test", 0, 0), 64, torch.device("cpu"))
    assert {round(255 * float(value)) for value in coefficients[:, 0]} <= set(amounts[""].flatten())


def test_code_basis_probe_inverts_the_code():
    basis = toy_basis()
    coefficients = torch.rand(7, 52)
    assert torch.allclose(basis.coefficients(basis.code(coefficients)), coefficients, atol=1e-4)


def test_code_basis_is_found_again_in_the_weights():
    """A map without error, in half precision as it is shipped, and clips that are gone."""
    trained = CodeBasis(0.4 * torch.rand(52), torch.rand(52) + 0.5, random_basis(128, 3))
    neutral = trained.code(torch.zeros(52)).half().float()
    arkit = nn.Linear(52, 128)
    arkit.weight.data, arkit.bias.data = (trained.scale[:, None] * trained.basis).T.half().float(), neutral
    found = CodeBasis.from_weights(arkit, neutral, seed=3)
    coefficients = torch.rand(9, 52)
    assert torch.allclose(found.code(coefficients), trained.code(coefficients), atol=0.01)
    assert torch.allclose(found.coefficients(trained.code(coefficients)), coefficients, atol=0.01)
    with pytest.raises(CheckpointError, match="seed 4"):
        CodeBasis.from_weights(arkit, neutral, seed=4)


def toy_job(monkeypatch, work: Path) -> phases.Job:
    monkeypatch.setattr(phases, "MODEL", TOY)
    return phases.Job(replace(CPU, workers=1), work / "no data", work, work / "out")


def toy_data(folder: Path, **changes) -> dict[str, np.ndarray]:
    """Write one shard of toy clips and the folder's note; returns the arrays."""
    shard = toy_shard()
    settings = {"frames": 9, "size": 32, "seed": 0, "split": folder.name, "clips_per_shard": 16, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(settings))
    dataset.write_shard(folder / "shard-00000.npz", [{name: a[i] for name, a in shard.items()} for i in range(2)])
    return shard


@pytest.mark.parametrize("changes", [{"split": "train"}, {"size": 64}, {"frames": 5}, {"frames": 30}])
def test_clips_of_another_kind_are_refused(tmp_path, monkeypatch, changes):
    """Above all people that were trained on, where people are tested with."""
    job = toy_job(monkeypatch, tmp_path / "work")
    job.data = tmp_path / "data"
    toy_data(job.data / "test")
    assert len(job.store("test")) == 2
    toy_data(job.data / "test", **changes)
    with pytest.raises(UserError, match="expected split test, 32 pixels, 4n . 1 frames .*; found split") as caught:
        job.store("test")
    assert str(next(iter(changes.values()))) in caught.value.found
    (job.data / "test" / "dataset.json").unlink()
    with pytest.raises(UserError, match="no .*dataset.json"):
        job.store("test")


def test_shards_are_unpacked_again_when_they_change(tmp_path):
    clips, unpacked = tmp_path / "val", tmp_path / "unpacked"
    first = toy_data(clips)
    np.testing.assert_array_equal(ClipStore(clips, unpacked).get(1, "frames"), first["frames"][1])
    copy = unpacked / "shard-00000" / "frames.npy"
    before = copy.stat().st_mtime_ns
    assert len(ClipStore(clips, unpacked)) == 2 and copy.stat().st_mtime_ns == before, "what is there is not made again"
    note = copy.with_name("source.json")
    for spoil in (lambda: toy_data(clips, seed=1), lambda: toy_data(clips), lambda: note.write_text("{")):
        np.save(copy, np.zeros_like(first["frames"]))
        assert not ClipStore(clips, unpacked).get(1, "frames").any()
        spoil()
        np.testing.assert_array_equal(ClipStore(clips, unpacked).get(1, "frames"), first["frames"][1])
    assert [path.name for path in unpacked.iterdir()] == ["shard-00000"]


def test_copies_older_than_notes_are_believed_once(tmp_path):
    clips, unpacked = tmp_path / "val", tmp_path / "unpacked"
    toy_data(clips)
    ClipStore(clips, unpacked)
    copy = unpacked / "shard-00000"
    np.save(copy / "added.npy", np.arange(2))
    (copy / "source.json").unlink()
    assert ClipStore(clips, unpacked).get(1, "added") == 1
    assert ClipStore(clips, unpacked).get(1, "added") == 1
    toy_data(clips, seed=1)
    assert not ClipStore(clips, unpacked).has(1, "added")


def test_latents_of_other_clips_are_not_used(tmp_path, monkeypatch):
    job = toy_job(monkeypatch, tmp_path / "work")
    job.data, folder = tmp_path / "data", tmp_path / "work" / "latents" / "train"
    for split in ("train", "val"):
        toy_data(job.data / split)
        with pytest.raises(UserError, match="no latents in .*run python -m demo.train latents"):
            job.latents(split)
    phases.vae_trainer(job, PatchVAE(TOY.vae)).save()
    assert phases.run_latents(job)
    assert len(job.latents("train")) == 4 and len(job.latents("val")) == 2  # mirror images included
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for note in folder.glob("*.json"):
        note.unlink()  # as older versions left them
    assert phases.run_latents(job) and len(job.latents("train")) == 4
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}.items() <= made.items()
    toy_data(job.data / "train", seed=1)
    with pytest.raises(UserError, match="shard-00000-mirrored.npz; expected latents of .*run python -m demo.train latents"):
        phases.run_dit(job)
    job.deadline = time.monotonic()
    assert not phases.run_latents(job)
    job.deadline = math.inf
    assert phases.run_latents(job) and len(job.latents("train")) == 4
    assert all(made[path.name] != path.stat().st_mtime_ns for path in folder.glob("*.npz"))
    # Clips may go when they are encoded; what they were is still compared.
    (job.data / "train" / "shard-00000.npz").unlink()
    assert len(job.latents("train")) == 4
    settings = json.loads((job.data / "train" / "dataset.json").read_text())
    (job.data / "train" / "dataset.json").write_text(json.dumps(settings | {"seed": 2}))
    with pytest.raises(UserError, match="those of other clips; remove this file"):
        job.latents("train")


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Runs `python -m demo.train` with stand-ins for the phases; returns its exit code, and the jobs that phases got.

    unfinished, overdue: the phase that does not reach its end, and that in which the run's time ends.
    """

    def run(*arguments: str, unfinished: str = "", overdue: str = "") -> tuple[int, dict[str, phases.Job]]:
        jobs: dict[str, phases.Job] = {}
        for name in PHASES:

            def phase(job: phases.Job, name: str = name) -> bool:
                jobs[name] = job
                job.deadline = -math.inf if name == overdue else job.deadline
                return name != unfinished

            monkeypatch.setattr(phases, f"run_{name}", phase)
        line = [*arguments, "--data", str(tmp_path), "--work", str(tmp_path / "work")]
        return run_command("demo.train", lambda: main(line)), jobs

    return run


def test_a_run_ends_with_3_only_when_there_is_more_to_do(typed):
    """A phase that reached its end is finished, late or not."""
    assert typed("all")[0] == typed("all", overdue="evaluate")[0] == 0
    assert [typed(phase, "--stop-after", "0")[0] for phase in PHASES] == [0] * len(PHASES)
    assert typed("dit", "--stop-after", "0", unfinished="dit")[0] == MORE_TO_DO
    for case in ({"overdue": "dit"}, {"unfinished": "dit"}):
        code, jobs = typed("all", **case)
        assert code == MORE_TO_DO and list(jobs) == ["vae", "expression", "latents", "dit"]


def test_the_shipped_weights_are_not_where_training_writes(typed, tmp_path):
    for phase in ("dit", "export"):
        assert typed(phase)[1][phase].out == tmp_path / "work" / "checkpoint"
        assert typed(phase, "--out", "elsewhere")[1][phase].out == Path("elsewhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dit", "--device", "cudda"], "--device; expected cpu, cuda, or cuda:0 and so on; found 'cudda'"),
        (["dit", "--device", "meta"], "--device; expected cpu"),
        (["dit", "--device", "cuda:x"], "--device; expected cpu"),
        (["dit", "--device", "cuda:"], "--device; expected cpu"),
        (["dit", "--device", "cuda:99"], "device cuda:99; expected an NVIDIA GPU"),
        (["all", "--preset", "gpu"], "device cuda; expected an NVIDIA GPU that torch can use; found 0 of them; use --preset cpu"),
        (["evaluate", "--clips", "0"], "--clips; expected 1 or more; found 0"),
        (["vae", "--minutes", "-1"], "--minutes; expected 0 or more"),
        (["vae", "--stop-after", "nan"], "--stop-after; expected 0 or more"),
    ],
)
def test_bad_arguments_give_one_line_and_code_2(typed, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, jobs = typed(*arguments)
    out, err = capsys.readouterr()
    assert code == 2 and words in err and err.count("\n") == 1 and not out and not jobs


def test_the_transformer_without_latents_is_told_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phases, "MODEL", TOY)
    toy_data(tmp_path / "data" / "train")
    line = ["dit", "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    assert run_command("demo.train", lambda: main(line)) == 2
    assert "run python -m demo.train latents first" in capsys.readouterr().err


def test_training_goes_on_from_released_weights(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    statistics = {"latents_mean": (0.5,) * 16, "latents_std": (2.0,) * 16}
    model = FactorPortrait(replace(TOY, vae=replace(TOY.vae, **statistics)))
    job = toy_job(monkeypatch, tmp_path / "work")
    model.expression["controller"].neutral_code.copy_(torch.randn(52) @ random_basis(128, job.preset.seed))
    save_checkpoint(model, tmp_path / "released", torch.float16)
    phases.run_init(job, tmp_path / "released")
    again = phases.assemble(job)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name
    neutral = phases.code_basis(job).code(torch.zeros(52))
    assert torch.allclose(neutral, model.expression["controller"].neutral_code, atol=0.01)
    # What the phases start with (`prepare` empties the head) gives way to the released weights.
    prepare(again, torch.randn(2, 8, 128))
    trainer = phases.dit_trainer(job, again)
    trainer.resume()
    assert trainer.step == 0 and torch.equal(again.dit.head.head.weight, model.dit.head.head.weight.half().float())
    # Networks that are trained further count, not the copies that the transformer's state holds.
    vae = phases.vae_trainer(job, PatchVAE(TOY.vae))
    vae.resume()
    vae.ema.encoder.bias.data += 1
    vae.save()
    assert torch.equal(phases.assemble(job).vae.encoder.bias, vae.ema.encoder.bias)
    with pytest.raises(UserError, match="choose another --work"):
        phases.run_init(job, tmp_path / "released")
    assert phases.run_export(job) and load_checkpoint(job.out).config == model.config
    assert capsys.readouterr().out.startswith(f"{job.out}: ")


def test_weights_of_another_size_are_refused(tmp_path, monkeypatch):
    save_checkpoint(FactorPortrait(replace(TOY, fps=30.0)), tmp_path / "released")
    with pytest.raises(CheckpointError, match="train from the start"):
        phases.run_init(toy_job(monkeypatch, tmp_path / "work"), tmp_path / "released")


@pytest.mark.slow
def test_every_phase_from_clips_to_figures(tmp_path, monkeypatch):
    """All phases in order at toy size, cut by a deadline once, on clips that are rendered for it."""
    from demo.dataset import render_dataset

    monkeypatch.setattr(vae_phase, "CROP_SIDE", 16)
    for split in ("train", "val", "test"):
        render_dataset(tmp_path / "data" / split, 2, 29, 32, split=split)
    job = toy_job(monkeypatch, tmp_path / "work")
    short = {"steps": 2, "parts": 1, "batch": 4, "validate_every": 1}
    changed = {name: replace(getattr(CPU, name), **short) for name in ("vae", "expression", "dit")}
    job.preset, job.data = replace(job.preset, **changed), tmp_path / "data"
    job.clips, job.deadline = 1, time.monotonic()
    assert not phases.run_vae(job)
    assert job.out_of_time and phases.vae_trainer(job, PatchVAE(TOY.vae)).step == 0
    job.deadline = math.inf
    for phase in PHASES:
        assert getattr(phases, f"run_{phase}")(job)
    assert load_checkpoint(job.out).config == phases.config_with_statistics(job)
    assert np.isfinite(json.loads((job.work / "metrics.json").read_text())["means"]["clip_shift_1"]["psnr"])
    curves = [json.loads(line) for line in (job.work / "dit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curves if "val_expression_followed" in line] == [1, 2]
    names = {split: sorted(path.name for path in (job.work / "latents" / split).glob("*.npz")) for split in ("train", "val")}
    assert names == {"train": ["shard-00000-mirrored.npz", "shard-00000.npz"], "val": ["shard-00000.npz"]}


class MovingTexture:
    """Two clips of random cells of two pixels that move sideways, as a `ClipStore` gives them."""

    def __len__(self) -> int:
        return 2

    def get(self, clip: int, name: str) -> np.ndarray:
        cells = np.random.default_rng(clip).integers(0, 256, (16, 16, 3), np.uint8).repeat(2, 0).repeat(2, 1)
        return np.stack([np.roll(cells, t // 3, axis=1) for t in range(29)])

    def has(self, clip: int, name: str) -> bool:
        return name in ("frames", "normals")


def test_components_reconstruct_and_the_decoder_improves_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_phase, "CROP_SIDE", 32)
    torch.manual_seed(0)
    store = MovingTexture()
    vae = PatchVAE(TOY.vae)
    vae_phase.fit_components(vae, store, seed=0)
    rows = vae.encoder.weight.flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)
    linear = vae_phase.validate(vae, store, torch.device("cpu"))["val_psnr_frames"]
    with torch.no_grad():
        vae.encoder.weight[4:] = 0
    assert vae_phase.validate(vae, store, torch.device("cpu"))["val_psnr_frames"] < linear - 1
    vae_phase.fit_components(vae, store, seed=0)
    encoder = vae.encoder.weight.clone()
    vae_phase.train_only_decoder(vae)
    trainer = Trainer("vae", vae, toy_settings(steps=60, learning_rate=3e-3, ema_decay=0.9), tmp_path, 0, vae_phase.is_matrix)
    crops = {"budget": 1, "device": torch.device("cpu")}
    trainer.run(lambda vae, draw, part: vae_phase.vae_loss(vae, draw, *vae_phase.sample_crops(store, draw, **crops)))
    assert torch.equal(trainer.ema.encoder.weight, encoder)
    assert vae_phase.validate(trainer.ema, store, torch.device("cpu"))["val_psnr_frames"] > linear


def test_mirrored_actions_swap_sides():
    names = [ARKIT_NAMES[i] for i in MIRROR]
    assert [ARKIT_NAMES[MIRROR[i]] for i in MIRROR] == list(ARKIT_NAMES)
    assert names[ARKIT_NAMES.index("eyeLookInLeft")] == "eyeLookInRight"
    assert names[ARKIT_NAMES.index("jawOpen")] == "jawOpen"


def test_groups_repeat_the_first_frame():
    assert group_frames(np.arange(9)).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    K = np.tile(np.array([[40.0, 0, 16], [0, 40, 16], [0, 0, 1]]), (9, 1, 1))
    c2w = np.tile(np.eye(4), (9, 1, 1))
    c2w[:, 2, 3] = -np.linspace(1, 2, 9)
    rays = pack_rays(K, c2w, TOY)
    assert rays.shape == (24, 3, TOY.latent_height, TOY.latent_width)
    assert np.array_equal(rays[:6, 0], rays[18:, 0]) and not np.array_equal(rays[:6, 1], rays[18:, 1])
