"""The PyTorch engine runs whole sessions like ONNX Runtime does, from the same loop."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from engine_sessions import latents_and_pictures

from factorportrait.bundle import Bundle
from factorportrait.engines import pytorch
from factorportrait.engines.base import allocate
from factorportrait.engines.ort import OrtEngine
from factorportrait.engines.pytorch import TorchEngine, find_checkpoint
from factorportrait.errors import UserError
from factorportrait.runtime.session import OpenBundle, open_bundle


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle(tiny_bundle)


@pytest.fixture(scope="module")
def by_ort(bundle):
    return OpenBundle(bundle, OrtEngine(bundle, threads=1))


@pytest.fixture(scope="module")
def by_torch(bundle, tiny_checkpoint):
    return OpenBundle(bundle, TorchEngine(bundle, tiny_checkpoint, device="cpu", threads=1))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "clip", "guidance": "1.5"},
        {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "cache": "inplace"},
        {"mode": "stream", "chunk_frames": 2, "window_frames": 5, "cache": "concat"},
    ],
)
def test_sessions_equal_onnx_runtime(by_ort, by_torch, options):
    """Stream past the wrap of the ring with both caches, and a clip with guidance."""
    (latents, pictures), (expected, expected_pictures) = (
        latents_and_pictures(opened, 29, steps=2, seed=3, **options) for opened in (by_torch, by_ort)
    )
    assert np.abs(latents - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(pictures.astype(int) - expected_pictures).max() <= 1


def test_the_cache_is_updated_in_place(by_torch, monkeypatch):
    """torch writes into the memory that it is given: no output of the cache is copied."""
    session, tensor = by_torch.session(mode="stream", chunk_frames=2, window_frames=4), by_torch.engine.torch.Tensor
    memory = session._denoiser.cache._memory[0]
    addresses, copied, copy = {name: buffer.data_ptr() for name, buffer in memory.items()}, [], tensor.copy_

    def watched(target, source):
        copied.append(target.data_ptr())
        return copy(target, source)

    monkeypatch.setattr(tensor, "copy_", watched)
    latents_and_pictures(by_torch, 13, session=session)
    assert session.cache == "inplace" and copied and not set(copied) & set(addresses.values())
    assert {name: buffer.data_ptr() for name, buffer in memory.items()} == addresses
    assert all(buffer.any() for buffer in memory.values())


def test_nobody_asks_the_device_while_a_graph_is_recorded(bundle, tiny_checkpoint, monkeypatch):
    """Memory, copies, sums and calls wait for the engine's lock; as on a GPU, but for the graphs themselves."""
    monkeypatch.setattr(pytorch, "_captured", lambda run, torch, pool: run)
    engine = TorchEngine(bundle, tiny_checkpoint, device="cpu", threads=1)
    engine.graphs, engine._pool, engine.lock = True, None, threading.RLock()
    first, second = (engine.zeros((1, 2, 3, 4, 4), "float32") for _ in range(2))
    half = engine.zeros((2,), "bfloat16")
    add = engine.weighted_sum(first, [(second, 1.0)], second)
    runner = engine.load("arkit_encoder")
    stage = runner.bind(*(allocate(engine, side, {"B": 1}) for side in (runner.spec.inputs, runner.spec.outputs)))
    actions = {
        "zeros": lambda: engine.zeros((1,), "float32"), "copy": lambda: engine.copy(first, second), "sum": add, "stage": stage,
        "slot": lambda: engine.copy_slot(first, 0, second, 1), "chunk": engine.capture(lambda: None),
        "mirror": lambda: engine.mirror(half),
    }  # fmt: skip
    waiting, done = [threading.Event() for _ in actions], []

    def act(name, begun):
        begun.set()
        actions[name]()
        done.append(name)

    threads = [threading.Thread(target=act, args=each) for each in zip(actions, waiting, strict=True)]
    with engine.lock:
        for thread, begun in zip(threads, waiting, strict=True):
            thread.start()
            assert begun.wait(10)
        time.sleep(0.2)  # long enough for who does not wait
        assert not done
    for thread in threads:
        thread.join(10)
    assert sorted(done) == sorted(actions)


def test_threads_are_those_that_the_process_may_use(bundle, tiny_checkpoint, monkeypatch):
    """torch would count the machine's cores, also where a container may use few of them."""
    monkeypatch.setattr(pytorch, "usable_cores", lambda: 3)
    for given, expected in ((None, 3), (2, 2)):
        engine = TorchEngine(bundle, tiny_checkpoint, device="cpu", threads=given)
        assert engine.threads == engine.torch.get_num_threads() == expected


def test_another_checkpoint_is_refused(bundle, tiny_checkpoint, tmp_path):
    assert find_checkpoint(bundle, tiny_checkpoint) == tiny_checkpoint
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = other / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"tiny"', '"small"'), encoding="utf-8")
    with pytest.raises(UserError, match="other files; name its folder with --checkpoint"):
        find_checkpoint(bundle, other)
    with pytest.raises(UserError, match="the one that .* was exported from"):
        find_checkpoint(bundle, None)  # the shipped one


def test_what_torch_cannot_run_is_refused(bundle, tiny_checkpoint, tiny_bundle):
    with pytest.raises(UserError, match="--device cuda:7; expected a device that torch can use"):
        open_bundle(tiny_bundle, engine="torch", checkpoint=tiny_checkpoint, device="cuda:7")
    quantised = Bundle(tiny_bundle)
    quantised.manifest = dataclasses.replace(quantised.manifest, precision="int8")
    with pytest.raises(UserError, match="found int8"):
        TorchEngine(quantised, tiny_checkpoint, device="cpu")
    with pytest.raises(UserError, match="dtype; expected float32"):
        TorchEngine(bundle, tiny_checkpoint, device="cpu", dtype="int4")


def test_bfloat16_stays_near(bundle, by_ort, tiny_checkpoint):
    """Eight bits of mantissa; NumPy has no such type, so the host holds those buffers in float32."""
    opened = OpenBundle(bundle, TorchEngine(bundle, tiny_checkpoint, device="cpu", dtype="bfloat16", threads=1))
    options = {"mode": "stream", "chunk_frames": 2, "window_frames": 4, "steps": 2, "seed": 3}
    (latents, _), (expected, _) = (latents_and_pictures(each, 13, **options) for each in (opened, by_ort))
    error = np.linalg.norm(latents - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05
