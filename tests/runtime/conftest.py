"""Fixtures of the runtime's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

INPUTS = Path(__file__).parents[2] / "demo" / "inputs"


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Small tensors on many threads only get in each other's way."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def inputs() -> Path:
    """The files that the repository ships for its demo."""
    return INPUTS
