"""What a back end offers: stages of a bundle, loaded once and run by tensor name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from factorportrait.bundle import StageSpec

Arrays = Mapping[str, np.ndarray]


class Runner(Protocol):
    """One loaded stage."""

    spec: StageSpec

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, np.ndarray]:
        """Run the stage once.

        Args:
            inputs: every input of the stage by name, C-contiguous, with the dtype of its spec.
            outputs: arrays that the stage writes into, by output name. Outputs not named are allocated.

        Returns:
            All outputs by name; those of `outputs` are the same objects.
        """


class Engine(Protocol):
    """A back end with its device."""

    name: str

    def load(self, spec: StageSpec) -> Runner:
        """Load a stage of the bundle that the engine was opened with."""
