"""However the loop is run, the latents are the same: nothing hoisted and plain calls, against every hoist, cache and overlap.

The baseline computes everything in every pass, with ONNX Runtime's plain calls and a cache that is given as the past. What runs
the same kernels on the same data agrees to the bit; sums in another order may differ by 1e-4 of the largest value.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine_sessions import drifting_pictures, driving, latents_and_pictures
from runtime_oracle import relative_error

from factorportrait.errors import UserError
from factorportrait.model_config import SOLVERS
from factorportrait.runtime.loop import HOISTS
from factorportrait.runtime.schedule import constant_guidance, flow_schedule, kept_steps, limit_guidance, parse_guidance
from factorportrait.runtime.session import open_bundle

FRAMES = 29  # eight latent frames, the longest clip is nine
STREAMS = [("stream", 1, 1), ("stream", 1, 5), ("stream", 2, 2), ("stream", 2, 4), ("stream", 3, 3), ("stream", 3, 5)]
WHOLE_WINDOW = ("stream", 2, 5, 13)  # four latent frames in a window of five


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


@pytest.fixture(scope="module")
def eager(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1, eager=True)


def run(bundle, mode, chunk, window, guidance, frames=FRAMES, **changes):
    options = {"mode": mode, "chunk_frames": chunk, "window_frames": window, "guidance": guidance, "steps": 2, "seed": 3}
    return latents_and_pictures(bundle, frames, **options | changes)


@pytest.mark.parametrize("guidance", ["1", "1.5"])
@pytest.mark.parametrize(
    ("mode", "chunk", "window", "frames"), [*((*each, FRAMES) for each in STREAMS), WHOLE_WINDOW, ("clip", 2, 5, FRAMES)]
)
def test_every_way_of_running_agrees(opened, eager, mode, chunk, window, frames, guidance):
    given = mode, chunk, window, guidance, frames
    plain = {"hoist": "none", "embedding": "graph", "cache": "concat"}
    latents, pictures = run(eager, *given, **plain)
    for changes in (plain, plain | {"hoist": "all"}, plain | {"hoist": "all", "overlap": "stages"}):
        found, found_pictures = run(opened, *given, **changes)
        assert np.array_equal(found, latents), changes
        assert np.array_equal(found_pictures, pictures), changes
    fast, fast_pictures = run(opened, *given)
    assert relative_error(fast, latents) <= 1e-4
    assert np.abs(fast_pictures.astype(int) - pictures).max() <= 1
    for overlap in ("media", "stages"):
        found, found_pictures = run(opened, *given, overlap=overlap)
        assert np.array_equal(found, fast) and np.array_equal(found_pictures, fast_pictures), overlap


@pytest.mark.parametrize("hoist", HOISTS)
@pytest.mark.parametrize("embedding", ["graph", "fused"])
def test_every_hoist_alone(opened, hoist, embedding):
    """One hoist left out: the same bits, and its stage really runs more often."""
    others = ",".join(name for name in HOISTS if name != hoist)
    given = ("stream", 2, 4, "1.5")
    latents, _ = run(opened, *given, embedding=embedding)
    found, _ = run(opened, *given, embedding=embedding, hoist=others)
    assert np.array_equal(found, latents)


@pytest.fixture
def counted(tiny_bundle):
    """An open bundle, and how often each of its stages has run."""
    opened = open_bundle(tiny_bundle, threads=1)
    counts: dict[str, int] = {}
    load = opened.engine.load

    class Counted:
        def __init__(self, runner):
            self.spec, self._runner = runner.spec, runner

        def bind(self, inputs, outputs):
            call, name = self._runner.bind(inputs, outputs), self.spec.name

            def counted():
                counts[name] = counts.get(name, 0) + 1
                call()

            return counted

    opened.engine.load = lambda name: Counted(load(name))
    return opened, counts


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_codes_of_pictures_that_return(counted, gain):
    """A A B B A, shown in one array that the source fills again: each picture has its own code, and the encoder runs thrice."""
    opened, counts = counted
    frames = driving(opened.config, 5)
    shown = [frames[i].image for i in (0, 0, 4, 4, 0)]
    expected = opened.session(hoist="none", expression_gain=gain)._encoder
    codes = [expected.encode_expression(replace(frame, image=image)) for frame, image in zip(frames, shown, strict=True)]
    assert np.array_equal(codes[0], codes[1]) and np.abs(codes[0] - codes[2]).max() > 1e-3

    def source(memory):
        for frame, image in zip(frames, shown, strict=True):
            memory[...] = image
            yield replace(frame, image=memory)

    runs, pictures = {}, {}
    for hoist in ("features", "none"):
        session = opened.session(mode="stream", chunk_frames=1, window_frames=4, steps=1, hoist=hoist, expression_gain=gain)
        session.set_reference(drifting_pictures(1, 32, 32, 9)[0])
        counts.clear()
        kept, push = [], session._encoder.encode_expression
        session._encoder.encode_expression = lambda frame, kept=kept, push=push: kept.append(push(frame)) or kept[-1]
        pictures[hoist] = np.stack(list(session.frames(source(np.empty_like(shown[0])))))
        runs[hoist] = counts["expression_encoder"]
        assert np.array_equal(kept[:5], codes), hoist
    assert np.array_equal(pictures["features"], pictures["none"])
    assert runs == {"features": 3, "none": 5}


def test_hoists_save_calls(counted):
    """How often each stage runs for a still picture: once hoisted, and in every pass when not."""
    opened, counts = counted

    def calls(hoist):
        session = opened.session(mode="stream", chunk_frames=1, window_frames=4, steps=2, embedding="graph", hoist=hoist)
        counts.clear()
        session.set_reference(drifting_pictures(1, 32, 32, 9)[0])
        still = driving(opened.config, 1)[0]
        assert len(list(session.frames([still] * 13))) == 13
        return dict(counts)

    with_all, with_none = calls("all"), calls("none")
    # Four chunks of two steps and a commit; the reference; the reference's own time embeddings where it is not hoisted: 3 rows.
    assert with_all["condition_embed"] == 1 + 4 and with_none["condition_embed"] == 1 + 4 * (1 + 3)
    assert with_none["expression_controller"] - with_all["expression_controller"] == 4 * 3
    assert with_none["time_embed"] - with_all["time_embed"] == 4 * 3 + 3
    assert with_none["dit_inplace"] - with_all["dit_inplace"] == 4
    assert with_all["expression_encoder"] == 1 and with_none["expression_encoder"] == 13


def test_words_that_are_no_hoist(opened):
    with pytest.raises(UserError, match="--hoist; expected all, none, or some of conditions"):
        opened.session(hoist="time,everything")


@pytest.mark.parametrize("cache", ["inplace", "concat"])
@pytest.mark.parametrize("guidance", ["1", "2"])
def test_commit_of_the_last_step(opened, cache, guidance):
    """Keys and values of the last step are kept: what the commit pass would have found had the last step changed nothing."""
    given = ("stream", 2, 4, guidance)
    last, _ = run(opened, *given, cache=cache, commit="last-step")
    other, _ = run(opened, *given, cache="inplace" if cache == "concat" else "concat", commit="last-step")
    assert relative_error(last, other) <= 1e-4
    clean, _ = run(opened, *given, cache=cache)
    assert np.array_equal(last[:, :, :2], clean[:, :, :2]) and relative_error(last, clean) > 1e-3
    session = opened.session(mode="stream", commit="last-step", chunk_frames=2, window_frames=4, cache=cache)
    latents_and_pictures(opened, 9, session=session)
    assert "commit" not in session.timings.calls
    with pytest.raises(UserError, match="--commit; expected clean or last-step"):
        opened.session(commit="never")


def test_guidance_in_the_first_steps(opened):
    """None of them is no guidance, all of them is guidance, and the sets' caches follow the stream all the same."""
    given = ("stream", 2, 4)
    none, _ = run(opened, *given, "2", guidance_steps=0)
    assert relative_error(none, run(opened, *given, "1")[0]) <= 1e-6
    every, _ = run(opened, *given, "2", guidance_steps=2)
    assert np.array_equal(every, run(opened, *given, "2")[0])
    first, _ = run(opened, *given, "2", guidance_steps=1)
    assert relative_error(first, every) > 1e-3 and relative_error(first, none) > 1e-3
    limited = limit_guidance(parse_guidance("expression=0", 3), 1)
    assert limited.dropped == (frozenset(), frozenset(["expression"]))
    assert limited.weights.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert limit_guidance(constant_guidance({"all": 3.0}, 2), 5).weights.tolist() == [[3, -2]] * 2


def test_step_cache(opened):
    """Which steps run is a table; a skipped one takes the velocity of the step before."""
    table = np.array([[1.0, 1.0], [1.1, 1.1], [1.21, 1.21], [1.331, 1.331], [1.3311, 1.3311]])  # each 10 % above, the last hardly
    assert kept_steps(table, 0.0) == [True] * 5
    assert kept_steps(table, 0.15) == [True, False, True, False, True]
    assert kept_steps(table, 9.0) == [True, False, False, False, True]
    assert kept_steps(table[:1], 9.0) == [True]
    given = ("stream", 2, 4, "1")
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "seed": 3}
    session = opened.session(**options, steps=4, step_cache=1e6)
    calls = []
    predict = session._denoiser._predict
    session._denoiser._predict = lambda slots, step, *rest: calls.append(step) or predict(slots, step, *rest)
    latents_and_pictures(opened, 5, session=session)
    assert calls == [0, 3]
    # With two steps both always run.
    assert np.array_equal(run(opened, *given, step_cache=1e6)[0], run(opened, *given)[0])
    with pytest.raises(UserError, match="--step-cache; expected 0 or more"):
        opened.session(step_cache=-1.0)


def test_solver_and_shift(opened):
    """Options take the checkpoint's place: what its config would give, and every one of them is another table."""
    given = ("stream", 2, 4, "1")
    found = {name: run(opened, *given, steps=4, solver=name)[0] for name in SOLVERS}
    generation = opened.config.generation
    assert np.array_equal(found[generation.solver], run(opened, *given, steps=4)[0])
    shifted, _ = run(opened, *given, steps=4, shift=3.0)
    everything = [*found.values(), shifted]
    for i, latents in enumerate(everything):
        assert all(not np.array_equal(latents, other) for other in everything[:i])
    session = opened.session(mode="stream", steps=4, solver="unipc", shift=3.0)
    expected = flow_schedule(4, 3.0, "unipc")
    assert np.array_equal(session._denoiser.schedule.outputs, expected.outputs) and expected.outputs.shape == (4, 4)
    assert np.array_equal(session._denoiser.schedule.timesteps, expected.timesteps)
    for wrong, words in (({"solver": "magic"}, "--solver; expected euler or"), ({"shift": float("nan")}, "--shift; expected more"),
                         ({"shift": 1e6}, "--shift; expected more"), ({"solver": "renoise", "step_cache": 1.0}, "--step-cache")):
        with pytest.raises(UserError, match=words):
            opened.session(**wrong)


def test_expression_gain(opened):
    """1 changes nothing, 0 is a neutral face, and in between and beyond codes lie on the line through both."""
    given = ("stream", 2, 4, "1")
    as_driven, _ = run(opened, *given)
    assert np.array_equal(run(opened, *given, expression_gain=1.0)[0], as_driven)
    frame = driving(opened.config, 1)[0]
    codes = {gain: opened.session(expression_gain=gain)._encoder.encode_expression(frame) for gain in (0.0, 1.0, 2.5)}
    neutral = opened.bundle.constants()["neutral_code"]
    assert np.array_equal(codes[0.0][0], neutral) and np.abs(codes[1.0] - neutral).max() > 1e-3
    assert np.allclose(codes[2.5] - neutral, 2.5 * (codes[1.0] - neutral), atol=1e-5)
    assert relative_error(run(opened, *given, expression_gain=2.5)[0], as_driven) > 1e-4
    for gain in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--expression-gain; expected 0 or more"):
            opened.session(expression_gain=gain)
