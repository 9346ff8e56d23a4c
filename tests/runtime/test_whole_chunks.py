"""A chunk whose steps are one recorded call, as a CUDA graph is: here a list of what the first chunks put on the device.

A graph replays launches with the addresses and numbers of its recording. So does this engine, on the CPU: after a chunk of a kind
has been recorded, none of the loop's own code runs between its steps, and whatever still depended on it would come out wrong.
Its host sees the device's memory only through copies, which are counted.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from engine_sessions import drifting_pictures, driving, latents_and_pictures

from factorportrait.bundle import Bundle
from factorportrait.engines.base import host_sum, mirrored_sum
from factorportrait.engines.ort import OrtEngine
from factorportrait.engines.pytorch import TorchEngine
from factorportrait.runtime.session import OpenBundle, open_bundle


class ReplayingEngine:
    """ONNX Runtime on the CPU with graphs: the first chunk of a kind is run, the second recorded, later ones are replayed."""

    whole_chunks = True

    def __init__(self, engine: OrtEngine):
        self._engine, self._tape, self.recorded, self.replays = engine, None, 0, 0
        self.hosts, self.to_host, self.to_device, self.runs = {}, [], [], Counter()

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def load(self, name):
        return ReplayingRunner(self, self._engine.load(name))

    def put(self, call) -> None:
        """What goes to the device: it is run, or only written down."""
        call() if self._tape is None else self._tape.append(call)

    def mirror(self, buffer):
        host = np.full_like(buffer, 99)  # what is not fetched comes out wrong
        self.hosts[id(host)] = host
        return host

    def copy(self, source, target) -> None:
        if source is target:
            return
        hosts = [id(each) in self.hosts for each in (source, target)]
        if any(hosts):
            assert self._tape is None, "the host's memory in a graph"
            (self.to_device if hosts[0] else self.to_host).append(source.shape)
            self._engine.copy(source, target)
        else:
            self.put(lambda: self._engine.copy(source, target))

    def copy_slot(self, source, source_slot, target, target_slot) -> None:
        assert not {id(source), id(target)} & self.hosts.keys()
        self.put(lambda: self._engine.copy_slot(source, source_slot, target, target_slot))

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
        call, engine, name = self._runner.bind(inputs, outputs), self._engine, self.spec.name

        def run() -> None:
            engine.runs[name, engine._tape is not None] += 1
            engine.put(call)

        return run


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
def test_streams(opened, replaying, cache, changes):
    """61 frames: the ring goes around, so that every kind of chunk is replayed on other contents."""
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3, "cache": cache, "embedding": "graph"}
    options |= changes
    latents, pictures = latents_and_pictures(replaying, 61, **options)
    expected, expected_pictures = latents_and_pictures(opened, 61, **options)
    assert np.array_equal(latents, expected) and np.array_equal(pictures, expected_pictures)
    engine = replaying.engine
    # One kind for the first chunks, where the window fills, and one for each place in the ring that is copied to.
    assert 1 <= engine.recorded <= 3 and engine.replays > engine.recorded


@pytest.mark.parametrize("guidance", ["1", "1.5"])
@pytest.mark.parametrize("embedding", ["graph", "fused"])
def test_clips(opened, replaying, guidance, embedding):
    """A clip is one chunk: three of them, each with another portrait, are run, recorded and replayed."""
    options = {"mode": "clip", "steps": 2, "seed": 3, "guidance": guidance, "embedding": embedding}
    sessions = [bundle.session(**options) for bundle in (opened, replaying)]
    for portrait in range(4):
        expected, found = (
            latents_and_pictures(bundle, 29, session=session, portrait_seed=portrait)[0]
            for bundle, session in zip((opened, replaying), sessions, strict=True)
        )
        assert np.array_equal(found, expected), portrait
    assert replaying.engine.recorded == 1 and replaying.engine.replays == 3


@pytest.mark.parametrize("embedding", ["graph", "fused"])
@pytest.mark.parametrize("slots", ["first", "all"])
def test_a_new_portrait_and_a_last_chunk_of_another_size(tiny_bundle, embedding, slots):
    """47 frames end within a chunk; the second portrait's stream begins with an empty window again."""
    bundles = [Bundle(tiny_bundle) for _ in range(2)]
    for bundle in bundles:  # no weight and no graph depends on which slots hold the reference
        config = replace(bundle.config, fusion=replace(bundle.config.fusion, reference_slots=slots))
        bundle.manifest = replace(bundle.manifest, config=config)
    engines = [OrtEngine(bundle, threads=1) for bundle in bundles]
    opened, replaying = OpenBundle(bundles[0], engines[0]), OpenBundle(bundles[1], ReplayingEngine(engines[1]))
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3, "embedding": embedding}
    sessions = [bundle.session(**options) for bundle in (opened, replaying)]
    for portrait in (1, 2, 1):
        expected, found = (
            latents_and_pictures(bundle, 47, session=session, portrait_seed=portrait)[0]
            for bundle, session in zip((opened, replaying), sessions, strict=True)
        )
        assert np.array_equal(found, expected), portrait


@pytest.mark.parametrize("options", [{"mode": "stream", "chunk_frames": 2, "window_frames": 4}, {"mode": "clip"}], ids=str)
def test_conditions_are_a_part_of_it(replaying, options):
    """What makes tokens and modulation is recorded with the steps, and runs outside of them only for the portrait."""
    session, engine = replaying.session(steps=2, embedding="graph", guidance="1.5", **options), replaying.engine
    for portrait in (1, 2):
        latents_and_pictures(replaying, 29, session=session, portrait_seed=portrait)
    stages = {name for name, recorded in engine.runs if recorded}
    assert {"condition_embed", "expression_controller"} < stages and stages & {"dit", "dit_inplace"}
    engine.runs.clear()
    for portrait in (3, 4, 5):
        latents_and_pictures(replaying, 29, session=session, portrait_seed=portrait)
    assert not any(recorded for _, recorded in engine.runs)
    # Of the portrait: its tokens with and without it. Of the clip's beginning: the state behind its first code.
    assert engine.runs["condition_embed", False] == 3 * 2 and engine.runs["expression_controller", False] == 3


def test_latents_stay_on_the_device(replaying):
    """Between the driving's pictures and the frames nothing comes back to the host but the code of a picture."""
    config = replaying.config
    session = replaying.session(mode="stream", chunk_frames=2, window_frames=4, steps=2, embedding="graph")
    session.set_reference(drifting_pictures(1, config.height, config.width, 9)[0])
    frames = driving(config, 45)
    for frame in frames[:29]:
        session.push(frame)
    engine = replaying.engine
    engine.to_host.clear()
    engine.to_device.clear()
    pictures = sum((session.push(frame) for frame in frames[29:45]), [])
    assert len(pictures) == 16
    side, code = (1, 3, 4, config.height, config.width), (1, config.expression.code_dim)
    assert Counter(engine.to_host) == {code: 16, side: 4}
    noise = (1, config.vae.z_dim, 2, config.latent_height, config.latent_width)
    assert engine.to_device.count(noise) == 2  # what the chunks begin with, not what they end with
    assert sum(shape[1] == config.vae.z_dim for shape in engine.to_device if len(shape) == 5) == 2


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
    engine.torch, engine.lock = torch, contextlib.nullcontext()
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


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "torch"])
def test_copying_a_slot(tiny_bundle, tiny_checkpoint, name):
    bundle = Bundle(tiny_bundle)
    engine = OrtEngine(bundle) if name != "torch" else TorchEngine(bundle, tiny_checkpoint, device="cpu")
    source, target = engine.zeros((1, 2, 3, 4, 5), "float32"), engine.zeros((1, 2, 4, 4, 5), "float32")
    host = engine.mirror(source)
    host[...] = np.random.default_rng(0).standard_normal(host.shape)
    engine.copy_slot(source, 2, target, 1)
    found = engine.mirror(target)
    assert np.array_equal(found[:, :, 1], host[:, :, 2]) and not found[:, :, [0, 2, 3]].any()
    wrong = [
        (source, 3, target, 0), (source, -1, target, 0), (source, 0, target, 4),
        (source, 0, engine.zeros((1, 2, 4, 5, 4), "float32"), 0), (source, 0, engine.zeros((1, 2, 4, 4, 5), "float16"), 0),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match="copy of slot"):
            engine.copy_slot(*arguments)


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
