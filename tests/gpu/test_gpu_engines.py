"""Engines on a GPU: against ONNX Runtime on the CPU, CUDA graphs against plain calls, a new portrait, the cache in place."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from engine_sessions import latents_and_pictures

from factorportrait.engines.base import DeviceArray, host_sum, run_once, slots
from factorportrait.errors import UserError

# TensorRT compiles attention in half precision alone.
ENGINES = [("torch", "fp32"), ("torch", "fp16"), ("onnxruntime-cuda", "fp32"), ("onnxruntime-cuda", "fp16"), ("tensorrt", "fp16")]
# max|a-b| / max|b| of latents after two steps. fp32: TF32 is off, other sums. fp16: one rounding is 5e-4, two blocks and two steps.
LIMITS = {"fp32": 1e-3, "fp16": 2e-2}
STREAM = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3}
CLIP = {"mode": "clip", "steps": 2, "seed": 3}


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def expected(open_on):
    """Latents of ONNX Runtime on the CPU in fp32."""
    reference = open_on("onnxruntime-cpu")
    return {
        "stream": latents_and_pictures(reference, 29, cache="concat", **STREAM)[0],
        "clip": latents_and_pictures(reference, 29, **CLIP)[0],
    }


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("cache", ["inplace", "concat"])
def test_streams_equal_the_cpu(open_on, expected, engine, precision, eager, cache):
    """29 frames go around the ring twice, so that captured calls are replayed on new contents."""
    latents, pictures = latents_and_pictures(open_on(engine, precision, eager), 29, cache=cache, **STREAM)
    assert error(latents, expected["stream"]) <= LIMITS[precision]
    assert len(pictures) == 29


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.parametrize("guidance", ["1", "1.5"])
def test_clips_equal_the_cpu(open_on, expected, engine, precision, guidance):
    opened = open_on(engine, precision)
    latents, _ = latents_and_pictures(opened, 29, guidance=guidance, **CLIP)
    right = expected["clip"]
    if guidance != "1":
        right, _ = latents_and_pictures(open_on("onnxruntime-cpu"), 29, guidance=guidance, **CLIP)
    assert error(latents, right) <= LIMITS[precision]


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_replayed_graphs_equal_plain_calls(open_on, engine, precision):
    """The same kernels in the same order; some libraries choose others while a graph is captured, so not to the bit."""
    (eager, _), (replayed, _) = (
        latents_and_pictures(open_on(engine, precision, each), 45, cache="inplace", **STREAM) for each in (True, False)
    )
    assert error(replayed, eager) <= LIMITS[precision] / 10
    assert error(replayed[:, :, 2:4], eager[:, :, 4:6]) > 0.1  # a check of the check: chunks differ


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_a_new_portrait_after_the_capture(open_on, engine, precision):
    """A session that has captured its graphs gives for another portrait what a fresh session gives."""
    opened = open_on(engine, precision, False)
    session = opened.session(cache="inplace", **STREAM)
    first, _ = latents_and_pictures(opened, 29, session=session, portrait_seed=1)
    second, _ = latents_and_pictures(opened, 29, session=session, portrait_seed=2)
    fresh, _ = latents_and_pictures(opened, 29, portrait_seed=2, cache="inplace", **STREAM)
    assert error(second, fresh) <= LIMITS[precision] / 10
    assert error(first, second) > 1e-2


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_two_sessions_in_two_threads(open_on, engine, precision):
    """They share an engine, its stream and its scratch memory, and capture while the other one computes."""
    opened, found = open_on(engine, precision, False), {}

    def draw(seed):
        found[seed] = latents_and_pictures(opened, 45, portrait_seed=seed, cache="inplace", **STREAM)[0]

    workers = [threading.Thread(target=draw, args=(seed,)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in (1, 2):
        alone, _ = latents_and_pictures(opened, 45, portrait_seed=seed, cache="inplace", **STREAM)
        assert error(found[seed], alone) <= LIMITS[precision] / 10


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_sums_on_the_device_equal_numpy(open_on, engine, precision):
    """Guidance and the scheduler's step, to the bit; the second call of a target that is its own first term adds again."""
    device = open_on(engine, precision, False).engine
    assert device.whole_chunks, "no kernel for sums: " + getattr(getattr(device, "_sums", None), "reason", "")
    rng, shape, weights, first = np.random.default_rng(0), (1, 16, 3, 33, 35), (0.9, -0.7, 1.3), 1
    arrays = [rng.standard_normal(shape).astype(np.float32) for _ in weights]
    buffers = [device.zeros(shape, "float32") for _ in range(4)]
    for array, buffer in zip(arrays, buffers, strict=False):
        device.copy(array, buffer)
    call = device.weighted_sum(buffers[0], list(zip(buffers, weights, strict=False)), buffers[3], first)
    add = host_sum(arrays[0], list(zip(arrays, weights, strict=True)), np.empty(shape, np.float32), first)
    found = device.mirror(buffers[0])
    for _ in range(2):
        call()
        add()
        device.copy(buffers[0], found)
        assert np.array_equal(found, arrays[0])


@pytest.mark.parametrize(("engine", "precision"), [pair for pair in ENGINES if pair[0] != "torch"])
@pytest.mark.parametrize("options", [STREAM, CLIP], ids=lambda options: options["mode"])
@pytest.mark.parametrize("guidance", ["1", "1.5"])
def test_the_embedding_by_kernels_equals_the_graph(open_on, engine, precision, options, guidance):
    opened = open_on(engine, precision)
    (found, _), (expected, _) = (
        latents_and_pictures(opened, 29, embedding=kind, guidance=guidance, **options) for kind in ("fused", "graph")
    )
    assert opened.session(embedding="fused", **options).embedding_reason.startswith("CUDA kernels")
    assert error(found, expected) <= LIMITS[precision]


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_a_slot_is_copied_on_the_device(open_on, engine, precision):
    device = open_on(engine, precision).engine
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 16, slots, 7, 9)).astype(np.float32) for slots in (3, 4)]
    buffers = [device.zeros(array.shape, "float32") for array in arrays]
    for array, buffer in zip(arrays, buffers, strict=True):
        device.copy(array, buffer)
    device.copy_slot(buffers[0], 2, buffers[1], 1)
    found = device.mirror(buffers[1])
    device.copy(buffers[1], found)
    arrays[1][:, :, 1] = arrays[0][:, :, 2]
    assert np.array_equal(found, arrays[1])


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_a_chunk_is_one_call(open_on, engine, precision):
    """With graphs its steps are one stage; with plain calls each step has its own time."""
    for eager in (True, False):
        opened = open_on(engine, precision, eager)
        session = opened.session(cache="inplace", **STREAM)
        latents_and_pictures(opened, 29, session=session)
        assert ("steps" in session.timings.calls) != eager and ("commit" in session.timings.calls) == eager


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.parametrize("eager", [True, False])
def test_the_cache_stays_in_place(open_on, engine, precision, eager):
    """After the reference and every chunk, only the slots that were written differ, and no address does."""
    opened = open_on(engine, precision, eager)
    session = opened.session(cache="inplace", **STREAM)
    device, memory = opened.engine, session._denoiser.cache._memory[0]

    def address(buffer):
        return buffer.address if isinstance(buffer, DeviceArray) else buffer.data_ptr()

    def read():
        kept = {}
        for name, buffer in memory.items():
            kept[name] = device.mirror(buffer)
            device.copy(buffer, kept[name])
        return kept

    addresses = {name: address(buffer) for name, buffer in memory.items()}
    generate, snapshots = session._denoiser.generate, []

    def watched(chunk):
        snapshots.append(read())
        return generate(chunk)

    session._denoiser.generate = watched
    latents_and_pictures(opened, 45, session=session)
    snapshots.append(read())
    assert {name: address(buffer) for name, buffer in memory.items()} == addresses
    for i, (before, after) in enumerate(zip(snapshots[:-1], snapshots[1:], strict=True)):
        first = 1 + 2 * i % 4
        for name in memory:
            same = [np.array_equal(before[name][:, slot], after[name][:, slot]) for slot in range(5)]
            assert same == [slot not in (first, first + 1) for slot in range(5)], (i, name)
            assert after[name][:, 0].any()


WAYS = {
    "nothing hoisted": {"hoist": "none"},
    "reference anew": {"hoist": "conditions,modulation,time,features"},
    "fused embedding": {"embedding": "fused"},
    "files overlap": {"overlap": "media"},
    "quick start": {"quick_start": True},
    "commit of the last step": {"commit": "last-step"},
    "guidance": {"guidance": "1.5"},
    "guidance in one step": {"guidance": "1.5", "guidance_steps": 1},
    "step cache": {"steps": 4, "step_cache": 1e6},
}


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_equals_the_cpu(open_on, engine, precision, way):
    """With captured graphs, twice in one session: the second clip replays what the first one captured."""
    options = {**STREAM, "cache": "inplace", **WAYS[way]}
    right, _ = latents_and_pictures(open_on("onnxruntime-cpu"), 29, **{**options, "overlap": "none"})
    opened = open_on(engine, precision, False)
    session = opened.session(**options)
    for _ in range(2):
        found, pictures = latents_and_pictures(opened, 29, session=session)
        assert error(found, right) <= LIMITS[precision]
        assert len(pictures) == 29


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_hoists_change_nothing_on_a_device(open_on, engine, precision):
    """The same kernels on the same data; closer than two engines are to each other."""
    opened = open_on(engine, precision, False)
    hoisted, _ = latents_and_pictures(opened, 29, cache="inplace", **STREAM)
    repeated, _ = latents_and_pictures(opened, 29, cache="inplace", hoist="none", **STREAM)
    assert error(repeated, hoisted) <= LIMITS[precision] / 10


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_stages_do_not_overlap_on_a_device(open_on, engine, precision):
    """They share one stream and scratch memory; files overlap by themselves."""
    opened = open_on(engine, precision, False)
    with pytest.raises(UserError, match="--overlap stages; expected an engine on the CPU"):
        opened.session(overlap="stages")
    assert opened.session(overlap="auto").overlap == "media"


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_memory_of_the_device(open_on, engine, precision):
    """Zeros, views, copies both ways and within the device."""
    device = open_on(engine, precision).engine
    buffer = device.zeros((1, 4, 3, 2), "float32")
    mirror = device.mirror(buffer)
    device.copy(buffer, mirror)
    assert not mirror.any()
    mirror[...] = np.arange(24).reshape(1, 4, 3, 2)
    device.copy(mirror, buffer)
    device.copy(slots(device, buffer, 3, 4), slots(device, buffer, 0, 1))
    found = device.mirror(buffer)
    device.copy(device.view(buffer, (1, 1, 12, 2)), found.reshape(1, 1, 12, 2))
    mirror[:, 0] = mirror[:, 3]
    assert np.array_equal(found, mirror)


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
@pytest.mark.parametrize("eager", [True, False])
def test_a_stage_alone_answers_again_and_again(open_on, engine, precision, eager):
    """The same call on new inputs: a graph that replayed stale ones would repeat its first answer."""
    opened, reference = open_on(engine, precision, eager), open_on("onnxruntime-cpu").engine
    rng = np.random.default_rng(0)
    for _ in range(4):
        arrays = {"coefficients": rng.uniform(0, 1, (1, 52)).astype(np.float32)}
        expected = np.array(run_once(reference, "arkit_encoder", arrays)["code"])
        assert error(run_once(opened.engine, "arkit_encoder", arrays)["code"], expected) <= LIMITS[precision]
