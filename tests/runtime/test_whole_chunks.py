"""A chunk whose steps are one recorded call, as a CUDA graph is: here a list of what the first chunks put on the device.

A graph replays launches with the addresses and numbers of its recording. So does this engine, on the CPU: after a chunk of a kind
has been recorded, none of the loop's own code runs between its steps, and whatever still depended on it would come out wrong.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from engine_sessions import drifting_pictures, driving, latents_and_pictures

from factorportrait.bundle import Bundle
from factorportrait.engines.base import host_sum, mirrored_sum
from factorportrait.engines.ort import OrtEngine
from factorportrait.runtime import session as runtime_session
from factorportrait.runtime.schedule import flow_schedule
from factorportrait.runtime.session import OpenBundle, open_bundle


class ReplayingEngine:
    """ONNX Runtime on the CPU with graphs: the first chunk of a kind is run, the second recorded, later ones are replayed."""

    whole_chunks = True

    def __init__(self, engine: OrtEngine):
        self._engine, self._tape, self.recorded, self.replays = engine, None, 0, 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def load(self, name):
        return ReplayingRunner(self, self._engine.load(name))

    def put(self, call) -> None:
        """What goes to the device: it is run, or only written down."""
        call() if self._tape is None else self._tape.append(call)

    def copy(self, source, target) -> None:
        if source is not target:
            self.put(lambda: self._engine.copy(source, target))

    def weighted_sum(self, target, terms, spare, first=0):
        call = host_sum(target, terms, spare, first)
        return lambda: self.put(call)

    def capture(self, run):
        def calls():
            run()
            yield
            self._tape = tape = []
            run()
            self._tape = None
            self.recorded += 1
            while True:
                for call in tape:
                    call()
                self.replays += 1
                yield

        steps = calls()
        return lambda: next(steps)


class ReplayingRunner:
    def __init__(self, engine, runner):
        self.spec, self._engine, self._runner = runner.spec, engine, runner

    def bind(self, inputs, outputs):
        call = self._runner.bind(inputs, outputs)
        return lambda: self._engine.put(call)


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return open_bundle(tiny_bundle, threads=1)


@pytest.fixture
def replaying(tiny_bundle):
    bundle = Bundle(tiny_bundle)
    return OpenBundle(bundle, ReplayingEngine(OrtEngine(bundle, threads=1)))


@pytest.mark.parametrize("cache", ["inplace", "concat"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"guidance": "1.5"}, {"guidance": "expression=2,pose=1.5", "guidance_steps": 1}, {"solver": "renoise"},
        {"solver": "unipc", "steps": 4}, {"commit": "last-step"}, {"commit": "last-step", "guidance": "2", "guidance_steps": 1},
        {"steps": 4, "step_cache": 1e6},
    ],
    ids=str,
)  # fmt: skip
def test_streams(opened, replaying, cache, changes, monkeypatch):
    """61 frames: the ring goes around, so that every kind of chunk is replayed on other contents."""
    solver = changes.get("solver", "euler")
    monkeypatch.setattr(runtime_session, "flow_schedule", lambda steps, shift, _: flow_schedule(steps, shift, solver))
    changes = {name: value for name, value in changes.items() if name != "solver"}
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3, "cache": cache} | changes
    latents, pictures = latents_and_pictures(replaying, 61, **options)
    expected, expected_pictures = latents_and_pictures(opened, 61, **options)
    assert np.array_equal(latents, expected) and np.array_equal(pictures, expected_pictures)
    engine = replaying.engine
    # One kind for the first chunks, where the window fills, and one for each place in the ring that is copied to.
    assert 1 <= engine.recorded <= 3 and engine.replays > engine.recorded


@pytest.mark.parametrize("guidance", ["1", "1.5"])
def test_clips(opened, replaying, guidance):
    """A clip is one chunk: three of them, each with another portrait, are run, recorded and replayed."""
    options = {"mode": "clip", "steps": 2, "seed": 3, "guidance": guidance}
    sessions = [bundle.session(**options) for bundle in (opened, replaying)]
    for portrait in range(4):
        expected, found = (
            latents_and_pictures(bundle, 29, session=session, portrait_seed=portrait)[0]
            for bundle, session in zip((opened, replaying), sessions, strict=True)
        )
        assert np.array_equal(found, expected), portrait
    assert replaying.engine.recorded == 1 and replaying.engine.replays == 3


def test_a_new_portrait_and_a_last_chunk_of_another_size(opened, replaying):
    """47 frames end within a chunk; the second portrait's stream begins with an empty window again."""
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3}
    sessions = [bundle.session(**options) for bundle in (opened, replaying)]
    for portrait in (1, 2, 1):
        expected, found = (
            latents_and_pictures(bundle, 47, session=session, portrait_seed=portrait)[0]
            for bundle, session in zip((opened, replaying), sessions, strict=True)
        )
        assert np.array_equal(found, expected), portrait


def test_its_time_is_one_stage(replaying):
    session = replaying.session(mode="stream", chunk_frames=2, window_frames=4, steps=2)
    latents_and_pictures(replaying, 21, session=session)
    assert session.timings.calls["steps"] == 3 and not {"step", "commit"} & set(session.timings.calls)


def test_what_is_not_hoisted_runs_step_by_step(opened, replaying):
    """What is computed again before every pass is the host's work."""
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3}
    expected, _ = latents_and_pictures(opened, 21, **options)
    for hoist in ("none", "conditions,modulation", "time"):
        found, _ = latents_and_pictures(replaying, 21, hoist=hoist, **options)
        assert np.allclose(found, expected, atol=1e-5)
    assert replaying.engine.recorded == 0


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("weights", [[0.3], [1.0, -0.7], [0.1, 0.2, 0.7]])
def test_sums(tiny_bundle, first, weights):
    """NumPy, by way of a host, and torch give the same to the bit, also where the target is the first term."""
    import torch

    from factorportrait.engines.pytorch import TorchEngine

    rng, shape = np.random.default_rng(0), (1, 3, 4, 5, 6)
    target, *others = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    expected = target.copy()
    arrays = [target, *others][: len(weights)]
    total = arrays[0] * np.float32(weights[0])
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total = total + array * np.float32(weight)
    expected[:, :, first:] = total[:, :, first:]

    spare, terms = np.empty_like(target), list(zip(arrays, weights, strict=True))
    by_torch = [torch.from_numpy(array.copy()) for array in (target, *others)]
    engine = TorchEngine.__new__(TorchEngine)
    engine.torch = torch
    engine.weighted_sum(
        by_torch[0], list(zip(by_torch, weights, strict=False)), torch.empty(shape), first
    )()  # fmt: skip
    assert np.array_equal(by_torch[0].numpy(), expected)

    away = HostApart()
    kept = {id(array): array.copy() for array in arrays}
    mirrored_sum(away, kept[id(target)], [(kept[id(array)], weight) for array, weight in terms], first)()
    assert np.array_equal(kept[id(target)], expected)

    host_sum(target, terms, spare, first)()
    assert np.array_equal(target, expected)


class HostApart:
    """An engine whose buffers the host sees only through copies."""

    def mirror(self, buffer):
        return np.full_like(buffer, np.nan)

    def copy(self, source, target):
        target[...] = source


def test_a_session_that_is_dropped_frees_its_memory_at_once(replaying):
    """The recorded calls hold no cycle that would keep the cache until the next collection."""
    gc.collect()
    gc.disable()
    try:
        session = replaying.session(mode="stream", chunk_frames=2, window_frames=4, steps=2)
        session.set_reference(drifting_pictures(1, session.config.height, session.config.width, 9)[0])
        assert len(list(session.frames(driving(session.config, 29)))) == 29 and replaying.engine.replays
        denoiser = weakref.ref(session._denoiser)
        del session
        assert denoiser() is None
    finally:
        gc.enable()
