"""A slowdown on purpose, for the trials of `fp-bench compare`: no command of the product reaches it."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from factorportrait.engines.base import Buffers, Call, Engine, Runner

# Graphs that a stage of the report spends its time in. The transformer's steps and the commit share one.
GRAPHS_OF_STAGE = {
    "expression": ("expression_encoder", "arkit_encoder"),
    "pose": ("vae_encode_first", "vae_encode_steady"),
    "conditions": ("condition_embed", "expression_controller"),
    "step": ("dit", "dit_inplace"),
    "decode": ("vae_decode_first", "vae_decode_steady"),
}


class PlantedEngine:
    """Another engine, on which every run of `graphs` takes `factor` times as long. On a CPU, where a run is done when it returns.

    Args:
        factor: 1.1 is ten percent slower; the time is spent computing, as a slower kernel would.
    """

    def __init__(self, engine: Engine, graphs: Collection[str], factor: float):
        if factor < 1:
            raise ValueError(f"factor: expected 1 or more, found {factor}")
        self._engine, self._graphs, self._factor = engine, graphs, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def load(self, name: str) -> Runner:
        """See `factorportrait.engines.base.Engine`."""
        runner = self._engine.load(name)
        return PlantedRunner(runner, self._factor) if name in self._graphs else runner


class PlantedRunner:
    """Another runner, slower."""

    def __init__(self, runner: Runner, factor: float):
        self.spec, self._runner, self._factor = runner.spec, runner, factor

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """See `factorportrait.engines.base.Runner.bind`."""
        call, factor = self._runner.bind(inputs, outputs), self._factor

        def slowed() -> None:
            start = time.perf_counter_ns()
            call()
            end = start + factor * (time.perf_counter_ns() - start)
            while time.perf_counter_ns() < end:
                pass

        return slowed
