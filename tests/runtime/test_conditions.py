"""Conditions in pieces equal conditions at once; the training's mask and the deployed cache mean the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runtime_oracle import relative_error

from factorportrait.engines.base import Mirrored
from factorportrait.export.checkpoint import load_checkpoint
from factorportrait.export.models.expression import ExpressionController
from factorportrait.export.models.factorportrait import ClipConditions, FactorPortrait, stream_mask
from factorportrait.runtime import embedding
from factorportrait.runtime.conditions import ConditionBuilder, Group, group_rays
from factorportrait.runtime.embedding import choose_embedding, implementations
from factorportrait.runtime.inputs import default_camera
from factorportrait.runtime.loop import ChunkConditions, Denoiser
from factorportrait.runtime.schedule import NoiseSource, constant_guidance, flow_schedule, parse_guidance
from factorportrait.runtime.session import open_bundle
from factorportrait.runtime.timing import Timings


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint).eval()


def make_denoiser(opened, window=5, chunk=2, guidance=None, mode="stream"):
    config = opened.config
    noise = NoiseSource(7, (16, config.latent_height, config.latent_width))
    return Denoiser(
        opened.engine, flow_schedule(1, 1.0), guidance or constant_guidance({}, 1), noise,
        mode=mode, chunk_frames=chunk, window_frames=window, timings=Timings(),
    )  # fmt: skip


def make_builder(opened, embedding="graph", guidance="1", mode="stream"):
    constants, guidance = opened.bundle.constants(), parse_guidance(guidance, 1)
    fused, _ = choose_embedding(embedding, config=opened.config, arrays=constants, engine=opened.engine)
    return ConditionBuilder(
        opened.config, opened.engine, guidance, constants["neutral_code"], Timings(),
        make_denoiser(opened, guidance=guidance, mode=mode).condition_buffers, clip=mode == "clip", fused=fused,
    )  # fmt: skip


def random_groups(opened, count, seed=0):
    config, rng = opened.config, np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    h, w = config.latent_height, config.latent_width
    K, c2w = default_camera(config)
    groups = []
    for _ in range(count):
        cameras, lenses = np.repeat(c2w[None], 4, axis=0), np.repeat(K[None], 4, axis=0)
        cameras[:, :3, 3] += 0.1 * normal(4, 3)
        cameras[:, :3, :3] @= np.linalg.qr(np.eye(3) + 0.1 * normal(4, 3, 3))[0]
        lenses[:, [0, 1], [0, 1]] *= 1 + 0.1 * normal(4, 1)
        pose = Mirrored(opened.engine, normal(1, 16, 1, h, w))
        groups.append(Group(normal(1, 4, config.expression.code_dim), lenses, cameras, pose))
    return groups


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 2, 3], [3, 3, 1], [1, 5, 1]])
def test_chunked_conditions_equal_the_whole_clip(opened, model, sizes):
    """The runtime carries the aggregator's state from chunk to chunk; torch sees all codes at once."""
    groups = random_groups(opened, sum(sizes))
    builder, chunks, first = make_builder(opened), [], 0
    for size in sizes:
        chunk = builder.chunk(groups[first : first + size], first)
        chunks.append((chunk.tokens[0].copy(), chunk.modulation[0].copy()))
        first += size
    tokens, modulation = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
    with torch.no_grad():
        codes = torch.from_numpy(np.concatenate([group.codes for group in groups], axis=1))
        expected = model.clip_modulation(codes)[:, 1:]
        pose = torch.from_numpy(np.concatenate([group.pose_latents.fetch() for group in groups], axis=2))
        rays = torch.from_numpy(group_rays(opened.config, groups).copy()[None])
        expected_tokens = model.dit.embed_conditions(torch.zeros_like(pose), rays, pose)
    assert relative_error(modulation, expected) <= 1e-4
    assert relative_error(tokens, expected_tokens) <= 1e-4


def with_reference_slots(opened, slots):
    """The bundle with `FusionConfig.reference_slots`: no weight and no graph depends on it."""
    config = replace(opened.config, fusion=replace(opened.config.fusion, reference_slots=slots))
    return SimpleNamespace(config=config, engine=opened.engine, bundle=opened.bundle)


@pytest.mark.parametrize("slots", ["first", "all"])
@pytest.mark.parametrize("mode", ["stream", "clip"])
@pytest.mark.parametrize("guidance", ["1", "all=2", "pose=2,camera=0.5", "reference=1.5,expression=2"])
def test_fused_embedding_equals_the_graph(opened, slots, mode, guidance, monkeypatch):
    """Reference and chunks, every factor dropped in turn; on every instruction set of this machine and on NumPy."""
    opened = with_reference_slots(opened, slots)
    guidance, groups = guidance.removeprefix("all="), random_groups(opened, 5)
    latents = np.random.default_rng(1).standard_normal((1, 16, 1, 4, 4)).astype(np.float32)
    tokens = {}
    for name in ("graph", *implementations()):
        monkeypatch.setenv("FACTORPORTRAIT_EMBED", "auto" if name == "graph" else name)
        builder = make_builder(opened, "graph" if name == "graph" else "fused", guidance, mode)
        reference, _ = builder.reference(latents)
        found = [np.concatenate([one.ravel() for one in reference])]
        for first, size in ((0, 3), (3, 2)):
            chunk = builder.chunk(groups[first : first + size], first)
            found.append(np.concatenate([one.ravel() for one in chunk.tokens]))
        tokens[name] = np.concatenate(found)
    assert len(tokens) > 1
    for name, found in tokens.items():
        assert relative_error(found, tokens["graph"]) <= 1e-5, name
    assert relative_error(tokens["graph"][::-1], tokens["graph"]) > 0.1  # a check of the check


@pytest.mark.parametrize("embedding", ["graph", "fused"])
@pytest.mark.parametrize("slots", ["first", "all"])
def test_tokens_equal_those_of_training(opened, model, slots, embedding):
    """Slots of two portraits one after the other, as `clip_condition_tokens` lays them out."""
    opened = with_reference_slots(opened, slots)
    builder = make_builder(opened, embedding)
    rng, groups = np.random.default_rng(2), random_groups(opened, 3)
    found, expected = [], []
    for _ in range(2):
        latents = rng.standard_normal((1, 16, 1, 4, 4)).astype(np.float32)
        lent = latents.copy()
        reference, _ = builder.reference(lent)
        lent[:] = np.nan  # as the encoder does, which writes the poses into the same memory
        builder.reset()
        tokens = [reference[0].copy()]
        for first, size in ((0, 1), (1, 2)):
            tokens.append(builder.chunk(groups[first : first + size], first).tokens[0].copy())
        found.append(np.concatenate(tokens, axis=1))
        conditions = ClipConditions(
            torch.from_numpy(latents),
            torch.from_numpy(np.concatenate([group.pose_latents.fetch() for group in groups], axis=2)),
            torch.from_numpy(group_rays(opened.config, groups).copy()[None]),
            torch.zeros(1, 4, 6, 64),
        )
        with torch.no_grad():
            trained = SimpleNamespace(config=opened.config, dit=model.dit)
            expected.append(FactorPortrait.clip_condition_tokens(trained, conditions).numpy())
    for got, wanted in zip(found, expected, strict=True):
        assert relative_error(got, wanted) <= 1e-4
    same = relative_error(found[0][:, 1:], found[1][:, 1:]) == 0
    assert same == (slots == "first"), "the frames hold the portrait where it stands in all slots, and only there"


def test_state_matters(opened):
    """A check of the check: without the state of the chunk before, the modulation is another one."""
    groups = random_groups(opened, 4)
    whole = make_builder(opened).chunk(groups, 0).modulation[0]
    alone = make_builder(opened).chunk(groups[2:], 2).modulation[0]
    assert relative_error(alone, whole[:, 2:]) > 1e-2


@pytest.mark.parametrize(("threads", "expected"), [(3, 3), (None, 5)])
def test_threads_of_the_fused_embedding(opened, threads, expected, monkeypatch):
    """The engine's; on a device it has none on the host, and the embedding takes the cores that the process may use."""
    monkeypatch.setattr(embedding, "usable_cores", lambda: 5)
    monkeypatch.setattr(embedding, "FusedEmbedding", lambda *_, num_threads, **__: num_threads)
    engine = SimpleNamespace(name="any", device="cuda:0", kernels=lambda *_: None, threads=threads)
    found, _ = choose_embedding("fused", config=opened.config, arrays=opened.bundle.constants(), engine=engine)
    assert found == expected


@pytest.mark.parametrize("aggregator", ["causal_conv", "window", "mean"])
def test_every_aggregator_streams(tiny_config, aggregator):
    config = replace(tiny_config.expression, aggregator=aggregator)
    torch.manual_seed(0)
    controller = ExpressionController(config, 24).eval()
    codes = torch.randn(2, 4 * 6, config.code_dim)
    with torch.no_grad():
        whole, _ = controller(codes, controller.initial_state(codes[:, 0]))
        state, parts = controller.initial_state(codes[:, 0]), []
        for part in codes.split([4, 12, 8], dim=1):
            modulation, state = controller(part, state)
            parts.append(modulation)
    assert whole.shape == (2, 6, 6, 24)
    assert relative_error(torch.cat(parts, dim=1), whole) <= 1e-5


def test_causal_aggregator_is_a_padded_convolution(tiny_config):
    """The definition: two convolutions of 3 with stride 2 over 1 + 4 (N - 1) codes, both padded by repeating the first value."""
    controller = ExpressionController(tiny_config.expression, 24).eval()
    codes = torch.randn(1, 13, tiny_config.expression.code_dim)
    grouped = torch.cat([codes[:, :1].expand(-1, 4, -1), codes[:, 1:]], dim=1)
    with torch.no_grad():
        found, _ = controller(grouped, controller.initial_state(codes[:, 0]))
        x = codes.transpose(1, 2)
        for convolution in (controller.conv1, controller.conv2):
            x = convolution(torch.nn.functional.pad(x, (2, 0), mode="replicate"))
            x = torch.nn.functional.silu(x) if convolution is controller.conv1 else x
        expected = controller.projection(x.transpose(1, 2)).unflatten(-1, (6, -1))
    assert found.shape == (1, 4, 6, 24)
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2, 2], [1, 1, 1]])
def test_training_mask_equals_the_deployed_cache(opened, model, sizes):
    """`predict_clip` under `stream_mask`, past chunks clean at timestep 0, predicts what the cached stream does."""
    config, window = opened.config, 5
    rng = np.random.default_rng(4)
    frames = sum(sizes)
    h, w = config.latent_height, config.latent_width
    conditions = ClipConditions(
        reference_latents=torch.from_numpy(rng.standard_normal((1, 16, 1, h, w)).astype(np.float32)),
        pose_latents=torch.from_numpy(rng.standard_normal((1, 16, frames, h, w)).astype(np.float32)),
        rays=torch.from_numpy(rng.standard_normal((1, 24, frames, h, w)).astype(np.float32)),
        expression_modulation=torch.from_numpy(0.3 * rng.standard_normal((1, 1 + frames, 6, 64)).astype(np.float32)),
    )
    with torch.no_grad():
        tokens = model.clip_condition_tokens(conditions).numpy()
    modulation = conditions.expression_modulation.numpy()
    denoiser = make_denoiser(opened, window, max(sizes))
    denoiser.set_reference([tokens[:, :1]], [modulation[:, :1]])
    clean, first = [], 0
    for size in sizes:
        slots = slice(1 + first, 1 + first + size)
        chunk = ChunkConditions(first, [tokens[:, slots].copy()], [modulation[:, slots].copy()])
        clean.append(denoiser.generate(chunk).fetch().copy())
        first += size
    last = sizes[-1]
    start = denoiser.noise.draw(frames - last, last, 0, np.zeros((1, 16, last, h, w), np.float32))
    latents = torch.from_numpy(np.concatenate([*clean[:-1], start], axis=2))
    timesteps = torch.zeros(1, frames)
    timesteps[:, frames - last :] = 1000.0
    mask = stream_mask(sizes, window, config.tokens_per_frame)
    with torch.no_grad():
        velocity = model.predict_clip(latents, timesteps, conditions, mask)[:, :, frames - last :]
    assert relative_error(clean[-1], start - velocity.numpy()) <= 1e-4
