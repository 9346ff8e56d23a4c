"""The session against torch, whole clips at once; lengths, determinism, guidance and errors."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from runtime_oracle import relative_error

from factorportrait.engines.ort import session_options
from factorportrait.errors import UserError
from factorportrait.export.checkpoint import load_checkpoint
from factorportrait.export.models.factorportrait import ClipConditions
from factorportrait.runtime.conditions import DrivingFrame
from factorportrait.runtime.inputs import default_camera
from factorportrait.runtime.media.camera import ray_maps
from factorportrait.runtime.schedule import FACTORS, Guidance, NoiseSource, flow_schedule, parse_guidance
from factorportrait.runtime.session import open_bundle
from factorportrait.runtime.timing import Timings
from factorportrait.runtime.vae import to_pictures


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint).eval()


def smooth_pictures(count, height, width, seed):
    """uint8 [count, height, width, 3]: colours that drift from frame to frame."""
    rng = np.random.default_rng(seed)
    y, x, t = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 3, width), np.linspace(0, 2, count), indexing="ij")
    phase = rng.uniform(0, 6, (3, 4))
    waves = [np.sin(p[0] * x + p[1] * y + 3 * p[2] * t + p[3]) for p in phase]
    return np.ascontiguousarray((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8).transpose(2, 0, 1, 3))


def driving_frames(config, count, seed=0, coefficients=False):
    K, c2w = default_camera(config)
    normals = smooth_pictures(count, config.height, config.width, seed)
    images = smooth_pictures(count, config.expression.image_size, config.expression.image_size, seed + 1)
    table = np.random.default_rng(seed).uniform(0, 1, (count, 52)).astype(np.float32)
    frames = []
    for i in range(count):
        moved = c2w.copy()
        moved[0, 3] += 0.01 * i
        source = {"coefficients": table[i]} if coefficients else {"image": images[i]}
        frames.append(DrivingFrame(normals[i], K, moved, **source))
    return frames


def portrait(config):
    return smooth_pictures(1, config.height, config.width, 99)[0]


def render(opened, frames, **options):
    session = opened.session(**options)
    session.set_reference(portrait(opened.config))
    return list(session.frames(frames))


@pytest.mark.parametrize("mode", ["stream", "clip"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9, 13, 14, 31])
def test_as_many_frames_out_as_in(opened, mode, count):
    pictures = render(opened, driving_frames(opened.config, count), mode=mode, steps=1)
    assert len(pictures) == count
    assert all(picture.shape == (32, 32, 3) and picture.dtype == np.uint8 for picture in pictures)


@pytest.mark.parametrize("mode", ["stream", "clip"])
@pytest.mark.parametrize("count", [3, 7])
def test_a_refused_frame_counts_for_nothing(opened, mode, count):
    """Frames that cannot be taken, in the middle and at the end: as many pictures as there were others, and the same ones."""
    frames = driving_frames(opened.config, count)
    blank = replace(frames[0], image=None)
    session, pictures = opened.session(mode=mode, steps=1), []
    session.set_reference(portrait(opened.config))
    for i, frame in enumerate(frames):
        pictures += session.push(frame)
        if i in (1, count - 1):
            with pytest.raises(UserError, match="driving frame; expected an image"):
                session.push(blank)
    pictures += session.finish()
    assert np.array_equal(np.stack(pictures), np.stack(render(opened, frames, mode=mode, steps=1)))


@torch.no_grad()
def torch_clip(model, frames, steps, seed, drop_expression=False):
    """The clip in torch: whole-clip VAE, aggregator and attention; [3, T, H, W] in -1..1."""
    config = model.config
    count = 1 + 4 * -(-(len(frames) - 1) // 4)
    frames = frames + [frames[-1]] * (count - len(frames))

    def unit(pictures):
        return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    def grouped(values):  # frame 0 four times, then every frame
        return torch.cat([values[:1].expand(4, *values.shape[1:]), values[1:]])

    if frames[0].image is not None:
        codes = model.expression["encoder"](unit([frame.image for frame in frames])[0].transpose(0, 1))
    else:
        codes = model.expression["arkit"](torch.from_numpy(np.stack([frame.coefficients for frame in frames])))
    rays = ray_maps(
        np.stack([frame.K for frame in frames]), np.stack([frame.c2w for frame in frames]),
        config.height, config.width, config.vae.spatial_stride,
    )  # fmt: skip
    rays = grouped(torch.from_numpy(rays)).unflatten(0, (-1, 4)).flatten(1, 2).transpose(0, 1)[None]
    conditions = ClipConditions(
        reference_latents=model.vae.encode_whole(unit([portrait(config)])),
        pose_latents=model.vae.encode_whole(unit([frame.normals for frame in frames])),
        rays=rays,
        expression_modulation=model.clip_modulation(grouped(codes)[None]) * (0.0 if drop_expression else 1.0),
    )
    latent_frames = conditions.pose_latents.shape[2]
    shape = (1, 16, latent_frames, config.latent_height, config.latent_width)
    noise = NoiseSource(seed, (16, *shape[3:])).draw(0, latent_frames, 0, np.zeros(shape, np.float32))
    x = torch.from_numpy(noise)
    sigmas = torch.linspace(1, 0, steps + 1).double()
    shift = config.generation.timestep_shift
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        timesteps = torch.full((1, latent_frames), float(1000 * now))
        x = x + float(following - now) * model.predict_clip(x, timesteps, conditions)
    return x[0], model.vae.decode_whole(x)[0].clamp(-1, 1)


@pytest.mark.parametrize("coefficients", [False, True])
@pytest.mark.parametrize("count", [1, 9, 12])
def test_clip_mode_equals_torch(opened, model, count, coefficients):
    """Streaming VAE, streaming aggregator, condition tokens, the loop and the decoder, against whole-clip code."""
    frames = driving_frames(opened.config, count, coefficients=coefficients)
    latents, pixels = torch_clip(model, frames, steps=3, seed=5)
    session = opened.session(mode="clip", steps=3, seed=5)
    session.set_reference(portrait(opened.config))
    kept = []
    generate = session._denoiser.generate

    def kept_too(chunk):
        latents = generate(chunk)
        kept.append(latents.fetch().copy())
        return latents

    session._denoiser.generate = kept_too
    pictures = np.stack(list(session.frames(frames)))
    assert relative_error(kept[0][0], latents) <= 1e-4
    expected = (pixels[:, :count].permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert np.abs(pictures - expected).max() <= 0.5 + 0.02  # half a level of rounding, and 1e-4 of the range


def test_dropped_expression_is_zero_modulation(opened, model):
    """--guidance expression=0 leaves only the set without expression: weight 0 for the full set, 1 for the other."""
    frames = driving_frames(opened.config, 5)
    guidance = parse_guidance("expression=0", 2)
    assert guidance.weights.tolist() == [[1.0]] * 2  # the full set has weight 0 and is not even kept
    assert guidance.dropped == (frozenset(["expression"]),)
    pictures = np.stack(render(opened, frames, mode="clip", steps=2, guidance="expression=0"))
    _, pixels = torch_clip(model, frames, steps=2, seed=0, drop_expression=True)
    expected = (pixels.permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert np.abs(pictures - expected).max() <= 0.52


@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_same_seed_same_bytes(opened, tiny_bundle, mode):
    frames = driving_frames(opened.config, 14)
    first = np.stack(render(opened, frames, mode=mode, seed=3))
    again = np.stack(render(open_bundle(tiny_bundle, threads=1), frames, mode=mode, seed=3))
    other = np.stack(render(opened, frames, mode=mode, seed=4))
    two_threads = np.stack(render(open_bundle(tiny_bundle, threads=2), frames, mode=mode, seed=3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.abs(first.astype(int) - two_threads).max() <= 1


def test_how_threads_wait_changes_no_picture(opened, tiny_bundle):
    frames = driving_frames(opened.config, 14)
    spinning, sleeping = (
        render(open_bundle(tiny_bundle, threads=2, spin=spin), frames, guidance="1.5", seed=3) for spin in (True, False)
    )
    assert np.array_equal(np.stack(spinning), np.stack(sleeping))


@pytest.mark.parametrize(
    ("spin", "entry"), [(True, "session.force_spinning_stop"), (False, "session.intra_op.allow_spinning")]
)
def test_threads_of_one_stage_leave_the_cores_to_the_next(spin, entry):
    assert session_options(2, spin).get_session_config_entry(entry) == ("1" if spin else "0")


@pytest.mark.parametrize("mode", ["stream", "clip"])
def test_eager_equals_bound(opened, tiny_bundle, mode):
    frames = driving_frames(opened.config, 14)
    bound = render(opened, frames, mode=mode, guidance="1.5")
    eager = render(open_bundle(tiny_bundle, threads=1, eager=True), frames, mode=mode, guidance="1.5")
    assert np.array_equal(np.stack(bound), np.stack(eager))


def test_a_session_can_begin_again(opened):
    """A new portrait forgets the old clip: cache, ring, VAE and aggregator state."""
    frames = driving_frames(opened.config, 20)
    session = opened.session(steps=2)
    session.set_reference(portrait(opened.config)[::-1].copy())
    list(session.frames(frames[::-1]))
    session.set_reference(portrait(opened.config))
    assert np.array_equal(np.stack(list(session.frames(frames))), np.stack(render(opened, frames, steps=2)))


def test_two_sessions_do_not_disturb_each_other(opened):
    frames = driving_frames(opened.config, 14)
    alone = render(opened, frames, steps=1)
    sessions = [opened.session(steps=1), opened.session(steps=1, seed=8)]
    for session in sessions:
        session.set_reference(portrait(opened.config))
    interleaved = [
        picture for frame in frames for picture, *_ in [[s.push(frame) for s in sessions]] for picture in picture
    ]
    interleaved += sessions[0].finish()
    assert np.array_equal(np.stack(interleaved), np.stack(alone))


def test_stream_frames_do_not_depend_on_what_follows(opened):
    """Causality: the first chunks of a longer clip are those of a shorter one."""
    frames = driving_frames(opened.config, 29)
    longer, shorter = render(opened, frames), render(opened, frames[:13])
    assert np.array_equal(np.stack(longer[:13]), np.stack(shorter))


def test_errors(opened):
    config = opened.config
    with pytest.raises(UserError, match="--mode clip; expected at most 33 frames"):
        render(opened, driving_frames(config, 34), mode="clip", steps=1)
    with pytest.raises(UserError, match="portrait; expected uint8"):
        opened.session().set_reference(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="call set_reference"):
        opened.session().push(driving_frames(config, 1)[0])
    session = opened.session(steps=1)
    session.set_reference(portrait(config))
    list(session.frames(driving_frames(config, 3)))
    with pytest.raises(UserError, match="found a finished clip; call set_reference"):
        session.push(driving_frames(config, 1)[0])
    with pytest.raises(UserError, match="the trained window"):
        opened.session(chunk_frames=4, window_frames=3)
    with pytest.raises(UserError, match="--steps; expected 1 or more"):
        opened.session(steps=0)


@pytest.mark.parametrize(
    "text", ["", "x", "pose", "pose=", "gaze=2", "2,3", "pose=1,pose=2", "2,pose=1", "nan", "1e999"]
)
def test_guidance_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--guidance; expected a number"):
        parse_guidance(text, 2)


def test_guidance_rows_sum_to_one():
    guidance = parse_guidance("expression=2.5,pose=1.5,camera=1", 3)
    assert [sorted(dropped) for dropped in guidance.dropped] == [[], ["expression"], ["pose"]]
    assert np.allclose(guidance.weights.sum(axis=1), 1)


def test_noise_does_not_depend_on_the_chunking():
    source = NoiseSource(11, (16, 4, 4))
    whole = source.draw(0, 6, 0, np.zeros((1, 16, 6, 4, 4), np.float32))
    parts = [source.draw(first, 2, 0, np.zeros((1, 16, 2, 4, 4), np.float32)) for first in (0, 2, 4)]
    assert np.array_equal(whole, np.concatenate(parts, axis=2))
    assert not np.array_equal(whole, source.draw(0, 6, 1, np.zeros_like(whole)))
    many = NoiseSource(0, (16, 64, 64)).draw(0, 8, 0, np.zeros((1, 16, 8, 64, 64), np.float32))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_schedule_recovers_the_clean_latent_of_a_perfect_network(solver):
    """With v = noise - clean known exactly, every schedule ends at the clean latent."""
    rng = np.random.default_rng(0)
    clean, x = rng.standard_normal((2, 50))
    schedule = flow_schedule(5, 3.0, solver)
    for step in range(schedule.num_steps):
        sigma = schedule.timesteps[step] / 1000
        velocity = (x - clean) / sigma
        x = (
            schedule.sample[step] * x
            + schedule.outputs[step, 0] * velocity
            + schedule.noise[step] * rng.standard_normal(50)
        )
    assert np.allclose(x, clean)


def test_progressive_guidance_is_a_table_too():
    """DeX-Portrait (arXiv 2512.15524): 35 steps, scale 2.5, first without expression, then with it blended in over 5 steps.

    Three sets (all, without expression, nothing) and their weights say everything: 74 evaluations, as many as the paper's schedule
    has once the blend of weight zero is skipped.
    """
    scale = 2.5
    weights = []
    for t in range(35, 0, -1):
        blend = min(max((30 - t) / 5, 0.0), 1.0)
        weights.append([scale * blend, scale * (1 - blend), 1 - scale])
    guidance = Guidance((frozenset(), frozenset(["expression"]), frozenset(FACTORS)), np.array(weights))
    assert np.allclose(guidance.weights.sum(axis=1), 1)
    assert int((guidance.weights != 0).sum()) == 74


def test_clip_mode_keeps_no_cache(opened):
    assert opened.session(mode="clip").cache_bytes == 0
    assert opened.session(mode="stream").cache_bytes > 0


def test_a_picture_that_is_not_finite_is_an_error():
    frames = np.zeros((1, 3, 1, 4, 4), np.float32)
    assert to_pictures(frames)[0].shape == (4, 4, 3)
    frames[0, 0, 0, 1, 2] = np.nan
    with pytest.raises(UserError, match="expected finite numbers"):
        to_pictures(frames)


def test_percentiles_are_over_frames():
    """Two chunks, of 1 and 3 frames: the median frame belongs to the larger one."""
    timings = Timings()
    timings.add_chunk(busy_s=0.1, wall_s=0.2, num_frames=1)
    timings.add_chunk(busy_s=0.03, wall_s=0.06, num_frames=3)
    assert timings.frame_ms(50) == pytest.approx(10) and timings.frame_ms(50, "wall") == pytest.approx(20)
    assert timings.frame_ms(100) == pytest.approx(100) and timings.num_frames == 4
    assert timings.last_frame_ms == pytest.approx(20)


def test_a_window_that_does_not_fit_the_memory(opened, monkeypatch):
    own = opened.config.generation.window_frames
    needed = opened.session().cache_bytes
    monkeypatch.setattr(opened.engine, "free_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=f"window of {own} latent frames; expected .* would fit") as refused:
        opened.session()
    fitting = int(re.search(r"--window (\d+) would fit", str(refused.value))[1])
    assert 1 <= fitting < own
    assert opened.session(window_frames=fitting).cache_bytes < needed
    monkeypatch.setattr(opened.engine, "free_bytes", lambda: None)  # nobody knows: nothing is refused
    opened.session()
