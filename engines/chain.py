"""A stage that was cut into ranges of blocks, as one: what a range gives as `hidden_states` the next one takes."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace

from factorportrait.bundle import Bundle, StageSpec, stage_parts
from factorportrait.engines.base import Buffers, Call, Engine, Runner, allocate, symbol_sizes

HIDDEN = "hidden_states"


def stage_names(stages: Collection[str]) -> set[str]:
    """Names of stages as `ChainedEngine.load` takes them: those of ranges, and of the wholes that they make."""
    whole = {key.rsplit("_", 2)[0] for key in stages if stage_parts({key: None}, key.rsplit("_", 2)[0])}
    return {*stages, *whole}


class ChainedEngine:
    """An engine that loads a stage whole also where the bundle has ranges of its blocks; in everything else the engine itself."""

    def __init__(self, engine: Engine, bundle: Bundle):
        self._engine, self._bundle = engine, bundle
        self._chains: dict[str, ChainRunner] = {}

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def load(self, name: str) -> Runner:
        """See `factorportrait.engines.base.Engine`."""
        parts = stage_parts(self._bundle.manifest.target_stages(self._engine.target), name)
        if not parts:
            return self._engine.load(name)
        if name not in self._chains:
            self._chains[name] = ChainRunner(self._engine, name, [self._engine.load(part) for part in parts])
        return self._chains[name]


class ChainRunner:
    """Runners one after another; `spec` has the inputs and outputs of all but what passes between them."""

    def __init__(self, engine: Engine, name: str, runners: list[Runner]):
        self._engine, self._runners = engine, runners
        specs = [runner.spec for runner in runners]
        inputs = {tensor.name: tensor for spec in specs for tensor in spec.inputs if tensor.name != HIDDEN}
        outputs = {tensor.name: tensor for spec in specs for tensor in spec.outputs if tensor.name != HIDDEN}
        first = specs[0]
        files = tuple({file: None for spec in specs for file in spec.files if file != first.file})
        self.spec: StageSpec = replace(
            first, name=name, inputs=tuple(inputs.values()), outputs=tuple(outputs.values()), data=files
        )
        # Ranges read one buffer and write the other, in turns: memory of two, however many there are.
        self._between: dict[tuple[int, ...], list[Buffers]] = {}
        # Sessions share those buffers, so one runs all its ranges before another begins. Where there are graphs the lock is the
        # engine's: a recorded chunk is replayed under that one alone, and who records holds it, so that a second could deadlock.
        lock = getattr(engine, "lock", None)
        self._lock = lock if hasattr(lock, "acquire") else threading.RLock()

    def bind(self, inputs: Buffers, outputs: Buffers) -> Call:
        """See `factorportrait.engines.base.Runner.bind`."""
        sizes = symbol_sizes(self.spec.inputs, inputs)
        calls = []
        for place, runner in enumerate(self._runners):
            sides = []
            for given, tensors, turn in ((inputs, runner.spec.inputs, place - 1), (outputs, runner.spec.outputs, place)):
                names = [tensor.name for tensor in tensors]
                own = {name: given[name] for name in names if name != HIDDEN}
                sides.append(own | ({HIDDEN: self._hidden(sizes, turn)} if HIDDEN in names else {}))
            calls.append(runner.bind(*sides))

        def call() -> None:
            with self._lock:
                for part in calls:
                    part()

        return call

    def _hidden(self, sizes: dict[str, int], turn: int):
        tensor = next((tensor for runner in self._runners for tensor in runner.spec.outputs if tensor.name == HIDDEN), None)
        if tensor is None:
            raise ValueError(f"stage {self.spec.name}: no range gives {HIDDEN}")
        key = tuple(sizes[str(size)] for size in tensor.shape if isinstance(size, str))
        with self._lock:
            if key not in self._between:
                self._between[key] = [allocate(self._engine, [tensor], sizes)[HIDDEN] for _ in range(2)]
            return self._between[key][turn % 2]
