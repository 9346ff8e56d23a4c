"""What several threads put on one CUDA stream, by the order of the calls of CUDA's runtime; no GPU."""

from __future__ import annotations

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from factorportrait.engines.tensorrt import cuda


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
        "cudaStreamEndCapture": lambda *_: 1,
        "cudaGraphInstantiate": lambda *_: 2,
    }

    class Runtime:
        cudaStreamNonBlocking = 1
        cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
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


def test_nothing_of_another_thread_is_recorded(device, calls):
    buffer, values = device.zeros((4,), "float32"), np.ones(4, np.float32)
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
    actions = (lambda: device.copy(values, buffer), lambda: device.zeros((2,), "float32"), device.synchronize, replay)

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
    # Memory may be asked for at any time; what goes on the stream waits.
    assert {thread for thread, name in calls[start:end] if name != "cudaMalloc"} == {"recorder"}
    later = {name for thread, name in calls[end:] if thread == "other"}
    assert {"cudaMemcpyAsync", "cudaMemsetAsync", "cudaStreamSynchronize", "cudaGraphLaunch"} <= later


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
