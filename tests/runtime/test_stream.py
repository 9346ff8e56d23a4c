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


def make_denoiser(opened, schedule, guidance, *, mode="stream", chunk=2, window=5, seed=7, in_place=False, start=0):
    config = opened.config
    noise = NoiseSource(seed, (16, config.latent_height, config.latent_width))
    return Denoiser(
        opened.engine, schedule, guidance, noise,
        mode=mode, chunk_frames=chunk, window_frames=window, timings=Timings(), in_place=in_place,
        start_frames=start,
    )  # fmt: skip


def run_stream(opened, schedule, sizes, window, chunk, rng_seed=0, guidance=None, in_place=False):
    """Latents [C, N, h, w], and the conditions they came from."""
    config = opened.config
    rng = np.random.default_rng(rng_seed)
    guidance = guidance or constant_guidance({}, schedule.num_steps)
    start = sizes[0] if sizes[0] < chunk else 0
    denoiser = make_denoiser(opened, schedule, guidance, chunk=chunk, window=window, in_place=in_place, start=start)
    sets = range(guidance.num_sets)
    reference = [random_conditions(rng, config, 1) for _ in sets]
    denoiser.set_reference([tokens for tokens, _ in reference], [modulation for _, modulation in reference])
    conditions, latents, first = [], [], 0
    for size in sizes:
        per_set = [random_conditions(rng, config, size) for _ in sets]
        chunk_conditions = ChunkConditions(first, [t for t, _ in per_set], [m for _, m in per_set])
        latents.append(denoiser.generate(chunk_conditions).fetch()[0].copy())
        conditions.append(per_set)
        first += size
    return np.concatenate(latents, axis=1), reference, conditions


@pytest.mark.parametrize(
    ("sizes", "window", "in_place"),
    [
        ([1] * 9, 5, False),
        ([1] * 7, 1, False),
        ([2] * 6, 4, False),
        ([2] * 6, 5, False),
        ([3] * 5, 3, False),
        ([3] * 5, 4, False),
        ([3] * 5, 6, False),
        ([1, 3, 3, 3, 3], 7, False),
        ([1, 2, 3, 3, 3], 3, False),
        ([1, 1, 2, 2], 2, False),
        ([2] * 3, 16, False),
        ([1] * 9, 5, True),
        ([1] * 7, 1, True),
        ([2] * 6, 4, True),
        ([3] * 5, 3, True),
        ([3] * 5, 6, True),
        ([1, 2, 3, 3, 3], 3, True),
        ([2] * 3, 16, True),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_stream_equals_recomputation(opened, model, sizes, window, in_place, solver):
    """Windows that are and are not multiples of the chunk, of exactly one chunk, past the ring's wrap, and never full."""
    assert_recomputed(opened, model, flow_schedule(2, shift=3.0, solver=solver), sizes, window, in_place)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_solvers_that_look_back_in_a_stream(opened, model, solver):
    """Velocities of earlier steps come from the loop's own memory, and none from the chunk before."""
    schedule = flow_schedule(4, shift=3.0, solver=solver)
    assert abs(schedule.outputs[2, 1:]).max() > 1e-3
    assert_recomputed(opened, model, schedule, [2, 2], 4, False)


def assert_recomputed(opened, model, schedule, sizes, window, in_place):
    found, reference, conditions = run_stream(opened, schedule, sizes, window, max(sizes), in_place=in_place)

    def noise(first, count, step):
        shape = (1, 16, count, opened.config.latent_height, opened.config.latent_width)
        source = NoiseSource(7, (16, *shape[3:]))
        return torch.from_numpy(source.draw(first, count, step, np.zeros(shape, np.float32))[0]).double()

    def convert(pair):
        return tuple(torch.from_numpy(array[0]).double() for array in pair)

    rows = list(zip(schedule.timesteps, schedule.sample, schedule.outputs, schedule.noise, strict=True))
    expected = recompute(model, convert(reference[0]), [convert(chunk[0]) for chunk in conditions], noise, rows, window)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("guided", [False, True])
def test_both_caches_give_the_same_stream(opened, chunk, guided):
    """Three times around the ring, with and without guidance: the keys come in another order, so only rounding differs."""
    schedule = flow_schedule(2, shift=3.0)
    guidance = constant_guidance({"all": 1.5, "pose": 2.0} if guided else {}, 2)
    sizes, window = [chunk] * 7, 2 * chunk
    concat, in_place = (
        run_stream(opened, schedule, sizes, window, chunk, guidance=guidance, in_place=each)[0] for each in (False, True)
    )
    assert relative_error(in_place, concat) <= 1e-4


def test_two_streams_in_place_do_not_disturb_each_other(opened):
    schedule, guidance = flow_schedule(1, 1.0), constant_guidance({}, 1)
    alone, reference, conditions = run_stream(opened, schedule, [2] * 5, 4, 2, in_place=True)
    denoisers = [make_denoiser(opened, schedule, guidance, window=4, in_place=True) for _ in range(2)]
    for denoiser, (tokens, modulation) in zip(denoisers, (reference[0], [part[:, ::-1] for part in reference[0]]), strict=True):
        denoiser.set_reference([tokens], [modulation])
    latents = []
    for i, ((tokens, modulation),) in enumerate(conditions):
        latents.append(denoisers[0].generate(ChunkConditions(2 * i, [tokens], [modulation])).fetch()[0].copy())
        denoisers[1].generate(ChunkConditions(2 * i, [-tokens], [modulation]))
    assert np.array_equal(np.concatenate(latents, axis=1), alone)


def test_the_cache_stays_where_it_is(opened):
    """Keys and values are allocated once; what the graph reads and what it writes is that memory, in every chunk."""
    config = opened.config
    denoiser = make_denoiser(opened, flow_schedule(2, 1.0), constant_guidance({}, 2), window=4, in_place=True)
    bound = []
    bind = denoiser.dit.bind

    class Spy:
        spec = denoiser.dit.spec

        def bind(self, inputs, outputs):
            bound.append((inputs, outputs))
            return bind(inputs, outputs)

    denoiser.dit = Spy()
    memory = denoiser.cache._memory[0]
    addresses = {name: array.ctypes.data for name, array in memory.items()}
    rng = np.random.default_rng(0)
    tokens, modulation = random_conditions(rng, config, 1)
    denoiser.set_reference([tokens], [modulation])
    sink = memory["k.0"][:, 0].copy()
    for i in range(6):
        before = memory["k.0"].copy()
        tokens, modulation = random_conditions(rng, config, 2)
        denoiser.generate(ChunkConditions(2 * i, [tokens], [modulation]))
        changed = [slot for slot in range(5) if not np.array_equal(before[:, slot], memory["k.0"][:, slot])]
        assert changed == [1 + 2 * i % 4, 2 + 2 * i % 4]  # the chunk's own slots, nothing else
    assert np.array_equal(memory["k.0"][:, 0], sink) and sink.any()
    # One reference, and two steps and a commit for a window that fills and for the full one.
    assert len(bound) == 1 + 3 * 2
    for inputs, outputs in bound:
        for name, address in addresses.items():
            part, block = name.split(".")
            assert inputs[f"cache_{name}"].ctypes.data == outputs[f"cache_{part}_out.{block}"].ctypes.data == address
    slots, (rows, dim) = 5, (config.tokens_per_frame, config.dit.dim)
    assert denoiser.cache_bytes == sum(array.nbytes for array in memory.values()) == 4 * slots * rows * dim * 4


def test_frames_that_do_not_lie_together_are_refused(opened):
    denoiser = make_denoiser(opened, flow_schedule(1, 1.0), constant_guidance({}, 1), window=4, in_place=True)
    tokens, modulation = random_conditions(np.random.default_rng(0), opened.config, 2)
    with pytest.raises(ValueError, match="do not lie together in a ring of 4"):
        denoiser.generate(ChunkConditions(3, [tokens], [modulation]))


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
        latents.append(denoiser.generate(ChunkConditions(first, [tokens] * 2, [modulation] * 2)).fetch()[0].copy())
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
        results.append(denoiser.generate(chunk).fetch().copy())
    assert relative_error(results[1], results[0]) <= 1e-4
