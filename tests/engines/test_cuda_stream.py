"""What several threads put on one CUDA stream, by the order of the calls of CUDA's runtime; no GPU."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from factorportrait.engines.base import DeviceArray
from factorportrait.engines.tensorrt import cuda
from factorportrait.engines.tensorrt.engine import TensorRTEngine, _Call


@pytest.fixture
def calls():
    return []


@pytest.fixture
def device(calls, monkeypatch):
    """A device whose runtime writes down which thread called what, and answers as CUDA does when all is well."""
    addresses = itertools.count(1 << 20, 4096)
    values = {
        "cudaStreamCreateWithFlags": lambda *_: 7,
        "cudaMalloc": lambda *_: next(addresses),
        "cudaMallocHost": lambda *_: next(addresses),
        "cudaStreamEndCapture": lambda *_: 1,
        "cudaGraphInstantiate": lambda *_: 2,
    }

    class Runtime:
        cudaStreamNonBlocking = 1
        cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4, cudaMemcpyDeviceToDevice=3)
        cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

        def __getattr__(self, name):
            def function(*arguments):
                calls.append((threading.current_thread().name, name))
                return (0, values[name](*arguments)) if name in values else (0,)

            return function

    pytest.importorskip("cuda.bindings")
    from cuda import bindings

    monkeypatch.setattr(bindings, "runtime", Runtime(), raising=False)
    return cuda.Device()


def copied_rows(target, target_pitch, source, source_pitch, width, height, kind, stream):
    """cudaMemcpy2DAsync on the host, by its documentation."""
    assert width <= min(target_pitch, source_pitch) and kind == 3 and stream == 7
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
    return (0,)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("slots", "places"), [((3, 1), (2, 0)), ((1, 4), (0, 3)), ((2, 2), (1, 0))])
def test_a_slot_is_copied(device, monkeypatch, dtype, slots, places):
    monkeypatch.setattr(device.runtime, "cudaMemcpy2DAsync", copied_rows, raising=False)
    rng = np.random.default_rng(0)
    source, target = (rng.standard_normal((2, 5, count, 3, 4)).astype(dtype) for count in slots)
    expected = target.copy()
    expected[:, :, places[1]] = source[:, :, places[0]]
    arrays = [DeviceArray(each.ctypes.data, each.shape, dtype, None) for each in (source, target)]
    device.copy_slot(arrays[0], places[0], arrays[1], places[1])
    assert np.array_equal(target, expected)


def test_nothing_of_another_thread_is_recorded(device, calls):
    buffer, values = device.zeros((4,), "float32"), np.ones(4, np.float32)
    slots = device.zeros((1, 1, 2, 2, 2), "float32")
    replay = device.capture(lambda: None)
    recording, tried = threading.Event(), threading.Event()

    def enqueue():
        recording.set()
        tried.wait(10)
        time.sleep(0.05)  # long enough for who does not wait
        device.zeros((1,), "float32")  # the recording thread itself may go on

    recorder = threading.Thread(target=device.capture, args=(enqueue,), name="recorder")
    recorder.start()
    assert recording.wait(10)
    actions = (
        lambda: device.copy(values, buffer), lambda: device.zeros((2,), "float32"), lambda: device.pinned((2,), "float32"),
        device.synchronize, replay, lambda: device.copy_slot(slots, 0, slots, 1),
    )  # fmt: skip

    def act(action):
        tried.set()
        action()

    others = [threading.Thread(target=act, args=(action,), name="other") for action in actions]
    for thread in others:
        thread.start()
    for thread in (recorder, *others):
        thread.join(10)
        assert not thread.is_alive()
    names = [name for _, name in calls]
    start = len(names) - names[::-1].index("cudaStreamBeginCapture")
    end = names.index("cudaStreamEndCapture", start)
    assert {thread for thread, _ in calls[start:end]} == {"recorder"}
    later = {name for thread, name in calls[end:] if thread == "other"}
    assert {"cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaStreamSynchronize", "cudaGraphLaunch"} <= later
    assert {"cudaMalloc", "cudaMemsetAsync", "cudaMallocHost", "cudaFree"} <= later


def test_a_recording_that_fails_lets_the_others_go_on(device, calls):
    def fail():
        raise RuntimeError("cannot be captured")

    with pytest.raises(RuntimeError, match="cannot be captured"):
        device.capture(fail)
    assert calls[-1][1] == "cudaStreamEndCapture"
    other = threading.Thread(target=device.synchronize, name="other")
    other.start()
    other.join(10)
    assert ("other", "cudaStreamSynchronize") in calls


def test_another_thread_does_not_take_part_in_a_chunk(device):
    """While one thread runs a chunk whose calls have no graphs of their own, the other one's call waits and keeps its own."""
    engine = SimpleNamespace(cuda=device, eager=False, in_chunk=False)
    inside, tried, seen = threading.Event(), threading.Event(), []

    def chunk():
        inside.set()
        tried.wait(10)
        time.sleep(0.05)  # long enough for who does not wait
        own()
        seen.append("chunk done")

    own = _Call(engine, "own", lambda: seen.append(("own", engine.in_chunk)), ())
    foreign = _Call(engine, "foreign", lambda: seen.append(("foreign", engine.in_chunk)), ())
    whole = TensorRTEngine.capture(engine, chunk)

    def call_foreign():
        tried.set()
        foreign()

    threads = [threading.Thread(target=whole), threading.Thread(target=call_foreign)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert seen == [("own", True), "chunk done", ("foreign", False)]
