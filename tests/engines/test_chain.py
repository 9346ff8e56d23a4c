"""A stage in ranges of blocks: sessions in several threads share its runners and the memory between them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from factorportrait.bundle import StageSpec, TensorSpec
from factorportrait.engines.chain import HIDDEN, ChainRunner

PATIENCE_S = 60  # how long a test waits for something that takes milliseconds


class Engine:
    """As much of an engine as a chain asks for."""

    def zeros(self, shape, dtype):
        return np.zeros(tuple(shape), dtype)


class Part:
    """One range: it copies its input to its output; `meanwhile` is called when it has, if this is the first call of all."""

    def __init__(self, taken, given, meanwhile=None):
        inputs, outputs = ((TensorSpec(name, "float32", (1, "F")),) for name in (taken, given))
        self.spec, self._names, self._meanwhile = StageSpec("part", "part.onnx", inputs, outputs), (taken, given), meanwhile

    def bind(self, inputs, outputs):
        taken, given = self._names

        def call():
            outputs[given][...] = inputs[taken]
            meanwhile, self._meanwhile = self._meanwhile, None
            if meanwhile is not None:
                meanwhile()

        return call


@pytest.mark.parametrize("with_device", [False, True])
def test_two_threads_do_not_meet_between_the_ranges(with_device):
    """The second thread is let go when the first is between its ranges, where both have one buffer."""
    engine, entered, second = Engine(), threading.Event(), None
    if with_device:
        engine.lock = threading.RLock()

    def let_the_second_go():
        second.start()
        assert entered.wait(PATIENCE_S)
        second.join(0.1)  # without a lock it would be through by now

    chain = ChainRunner(engine, "dit", [Part("x", HIDDEN, let_the_second_go), Part(HIDDEN, "y")])
    inputs = [np.full((1, 3), value, np.float32) for value in (1, 2)]
    outputs = [np.zeros((1, 3), np.float32) for _ in range(2)]
    first_call, second_call = (chain.bind({"x": x}, {"y": y}) for x, y in zip(inputs, outputs, strict=True))
    second = threading.Thread(target=lambda: (entered.set(), second_call()))
    first_call()
    second.join(PATIENCE_S)
    assert not second.is_alive()
    assert np.array_equal(outputs, inputs)


def test_a_device_has_one_lock():
    """Who records a chunk holds the stream's lock and asks for the chain's: a lock of its own would be taken both ways round."""
    engine = Engine()
    engine.lock = threading.RLock()
    assert ChainRunner(engine, "dit", [Part("x", HIDDEN), Part(HIDDEN, "y")])._lock is engine.lock
