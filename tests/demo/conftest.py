"""Tests of the demo world; `demo` is a folder at the top of the repository, not part of the installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def warp():
    return pytest.importorskip("warp", reason="the demo world needs NVIDIA Warp: pip install 'factorportrait[demo]'")


@pytest.fixture(scope="session")
def identity():
    from demo.world.appearance import Identity

    return Identity.sample(3, "test")


@pytest.fixture(scope="session")
def head(identity):
    return identity.head()


@pytest.fixture(scope="session")
def inputs() -> Path:
    return ROOT / "demo" / "inputs"
