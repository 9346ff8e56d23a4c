"""An engine that shows what its stages are fed: for calibration, for parity checks on real inputs, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from factorportrait.engines.base import Arrays, Buffers, Call, Engine, Mirrored, Runner


class RecordingEngine:
    """Another engine, with `show(stage name, inputs)` before every run. The inputs are overwritten later: copy what is kept."""

    whole_chunks = False  # a replayed graph would show nothing

    def __init__(self, engine: Engine, show: Callable[[str, Arrays], None]):
        self._engine, self._show = engine, show

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def load(self, name: str) -> RecordingRunner:
        """See `factorportrait.engines.base.Engine`."""
        return RecordingRunner(self._engine, self._engine.load(name), self._show)


class RecordingRunner:
    """Another runner, with `show` before every run."""

    def __init__(self, engine: Engine, runner: Runner, show: Callable[[str, Arrays], None]):
        self.spec, self._engine, self._runner, self._show = runner.spec, engine, runner, show

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """See `factorportrait.engines.base.Runner.bind`."""
        call = self._runner.bind(inputs, outputs)
        mirrored = {name: Mirrored(self._engine, buffer) for name, buffer in inputs.items()}

        def recorded() -> None:
            self._show(self.spec.name, {name: each.fetch() for name, each in mirrored.items()})
            call()

        return recorded
