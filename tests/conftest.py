"""A tiny model, its checkpoint and its bundle, made once per session."""

from __future__ import annotations

import fcntl
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomise

from factorportrait.model_config import ModelConfig

# The tiny model gains nothing from threads, and on a busy machine they wait for each other.
torch.set_num_threads(1)
# A shell that runs the tests in the background has this signal ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The engine torch sets how many threads the whole process has: the next test has one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """32 x 32 pixels, 4 x 4 latent cells, 4 tokens per latent frame, two blocks of width 64."""
    return ModelConfig.from_dict(TINY)


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """FactorPortrait of `tiny_config` in fp32 on the CPU, random and non-degenerate. Read only."""
    from factorportrait.export.models.factorportrait import FactorPortrait

    model = FactorPortrait(tiny_config).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory) -> Path:
    """Folder with the weights of `tiny_model` in fp32. Read only: copy it to change it."""
    from factorportrait.export.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory, request) -> Path:
    """The fp32 bundle of `tiny_checkpoint` for ONNX Runtime. Read only: copy it to change it."""
    return kept_bundle(tiny_checkpoint, "fp32", tmp_path_factory, request.config)


@pytest.fixture(scope="session")
def tiny_fp16_bundle(tiny_checkpoint, tmp_path_factory, request) -> Path:
    """The fp16 bundle of `tiny_checkpoint` for all targets. Read only: copy it to change it."""
    return kept_bundle(tiny_checkpoint, "fp16", tmp_path_factory, request.config)


def kept_bundle(checkpoint: Path, precision: str, tmp_path_factory, config) -> Path:
    """Kept in pytest's cache, so that a second run exports only what changed since."""
    from factorportrait.export.build import build_bundle

    cache = getattr(config, "cache", None)
    folder = cache.mkdir("factorportrait") if cache else tmp_path_factory.mktemp("kept")
    path = tmp_path_factory.mktemp("bundle") / f"tiny-{precision}"
    # Two runs at once: the second waits for the first's bundle, and copies it, because a third may replace it.
    with open(folder / f"lock-{precision}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_bundle(checkpoint, folder / f"tiny-{precision}", precision=precision)
        shutil.copytree(folder / f"tiny-{precision}", path)
    return path
