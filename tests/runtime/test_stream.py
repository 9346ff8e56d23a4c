"""The cached stream equals recomputation from the whole history; see runtime_oracle.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runtime_oracle import relative_error
from runtime_oracle import stream as recompute

from factorportrait.export.checkpoint import load_checkpoint
from factorportrait.runtime.loop import ChunkConditions, Denoiser
from factorportrait.runtime.schedule import Guidance, NoiseSource, constant_guidance, flow_schedule
from factorportrait.runtime.session import open_bundle
from factorportrait.runtime.timing import Timings


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint).double().eval()


def random_conditions(rng, config, count):
    tokens = rng.standard_normal((1, count, config.tokens_per_frame, config.dit.dim)).astype(np.float32)
    modulation = (0.3 * rng.standard_normal((1, count, 6, config.dit.dim))).astype(np.float32)
    return tokens, modulation


def make_denoiser(opened, schedule, guidance, *, mode="stream", chunk=2, window=5, seed=7, in_place=False):
    config = opened.config
    noise = NoiseSource(seed, (16, config.latent_height, config.latent_width))
    return Denoiser(
        opened.engine, schedule, guidance, noise,
        mode=mode, chunk_frames=chunk, window_frames=window, timings=Timings(), in_place=in_place,
    )  # fmt: skip


def run_stream(opened, schedule, sizes, window, chunk, rng_seed=0, guidance=None):
    """Latents [C, N, h, w], and the conditions they came from."""
    config = opened.config
    rng = np.random.default_rng(rng_seed)
    guidance = guidance or constant_guidance({}, schedule.num_steps)
    denoiser = make_denoiser(opened, schedule, guidance, chunk=chunk, window=window)
    sets = range(guidance.num_sets)
    reference = [random_conditions(rng, config, 1) for _ in sets]
    denoiser.set_reference([tokens for tokens, _ in reference], [modulation for _, modulation in reference])
    conditions, latents, first = [], [], 0
    for size in sizes:
        per_set = [random_conditions(rng, config, size) for _ in sets]
        chunk_conditions = ChunkConditions(first, [t for t, _ in per_set], [m for _, m in per_set])
        latents.append(denoiser.generate(chunk_conditions)[0].copy())
        conditions.append(per_set)
        first += size
    return np.concatenate(latents, axis=1), reference, conditions


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ([1] * 9, 5),
        ([1] * 7, 1),
        ([2] * 6, 4),
        ([2] * 6, 5),
        ([3] * 5, 3),
        ([3] * 5, 4),
        ([3] * 5, 6),
        ([1, 3, 3, 3, 3], 7),
        ([2] * 3, 16),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_stream_equals_recomputation(opened, model, sizes, window, solver):
    """Windows that are and are not multiples of the chunk, of exactly one chunk, past the ring's wrap, and never full."""
    schedule = flow_schedule(2, shift=3.0, solver=solver)
    found, reference, conditions = run_stream(opened, schedule, sizes, window, max(sizes))

    def noise(first, count, step):
        shape = (1, 16, count, opened.config.latent_height, opened.config.latent_width)
        source = NoiseSource(7, (16, *shape[3:]))
        return torch.from_numpy(source.draw(first, count, step, np.zeros(shape, np.float32))[0]).double()

    def convert(pair):
        return tuple(torch.from_numpy(array[0]).double() for array in pair)

    rows = list(zip(schedule.timesteps, schedule.sample, schedule.outputs[:, 0], schedule.noise, strict=True))
    expected = recompute(model, convert(reference[0]), [convert(chunk[0]) for chunk in conditions], noise, rows, window)
    assert relative_error(found, expected) <= 1e-4


def test_window_matters(opened):
    """A check of the check: another window gives other pictures once the ring is full."""
    schedule = flow_schedule(1, 1.0)
    narrow, *_ = run_stream(opened, schedule, [2] * 5, 2, 2)
    wide, *_ = run_stream(opened, schedule, [2] * 5, 5, 2)
    assert np.array_equal(narrow[:, :2], wide[:, :2])
    assert relative_error(narrow[:, 2:], wide[:, 2:]) > 1e-2


def test_a_set_of_weight_zero_changes_nothing(opened):
    schedule = flow_schedule(2, 1.0)
    plain, *_ = run_stream(opened, schedule, [2, 2], 5, 2)
    guidance = Guidance((frozenset(), frozenset(["expression"])), np.array([[1.0, 0.0], [1.0, 0.0]]))
    config = opened.config
    denoiser = make_denoiser(opened, schedule, guidance)
    rng = np.random.default_rng(0)
    reference = random_conditions(rng, config, 1)
    denoiser.set_reference([reference[0]] * 2, [reference[1]] * 2)
    latents = []
    for first in (0, 2):
        tokens, modulation = random_conditions(rng, config, 2)
        latents.append(denoiser.generate(ChunkConditions(first, [tokens] * 2, [modulation] * 2))[0].copy())
    assert np.array_equal(np.concatenate(latents, axis=1), plain)


def test_guidance_of_equal_sets_cancels(opened):
    """v + (s - 1) (v - v) = v: both sets with the same conditions, so only rounding differs."""
    schedule = flow_schedule(2, 1.0)
    rng_a, rng_b = np.random.default_rng(3), np.random.default_rng(3)
    results = []
    for rng, guidance in ((rng_a, constant_guidance({}, 2)), (rng_b, constant_guidance({"all": 3.0}, 2))):
        denoiser = make_denoiser(opened, schedule, guidance)
        reference = random_conditions(rng, opened.config, 1)
        denoiser.set_reference([reference[0]] * guidance.num_sets, [reference[1]] * guidance.num_sets)
        tokens, modulation = random_conditions(rng, opened.config, 2)
        chunk = ChunkConditions(0, [tokens] * guidance.num_sets, [modulation] * guidance.num_sets)
        results.append(denoiser.generate(chunk).copy())
    assert relative_error(results[1], results[0]) <= 1e-4
