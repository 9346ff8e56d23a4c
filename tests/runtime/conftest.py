"""Fixtures of the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

INPUTS = Path(__file__).parents[2] / "demo" / "inputs"


@pytest.fixture(scope="session")
def inputs() -> Path:
    """The files that the repository ships for its demo."""
    return INPUTS
