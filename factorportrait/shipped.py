"""Where the shipped demo lies, and where a bundle goes when nobody says. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from factorportrait.errors import CheckpointError, UserError

DEMO_NAME = "demo"


def demo_folder() -> Path:
    """The demo of the installed package, or of the checkout that this file is in.

    Raises:
        UserError: neither has one.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "demo", package.parent / "demo"):
        if folder.is_dir():
            return folder
    raise UserError(
        "the shipped demo", expected=f"a folder {package / 'demo'}", found="none",
        action="install factorportrait again, or name your own files",
    )  # fmt: skip


def shipped_checkpoint() -> Path:
    """The demo's checkpoint folder.

    Raises:
        CheckpointError: this copy has none.
    """
    folder = demo_folder() / "checkpoint"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "the shipped demo checkpoint", expected=f"a config.json in {folder}", found="none",
            action="name a checkpoint folder: fp-export CHECKPOINT",
        )  # fmt: skip
    return folder


def shipped_inputs() -> Path:
    """The demo's portraits and driving clips.

    Raises:
        UserError: this copy has none.
    """
    folder = demo_folder() / "inputs"
    if not folder.is_dir():
        raise UserError(
            "the shipped demo inputs", expected=f"a folder {folder}", found="none",
            action="name your own files: fp-run --portrait P --driving D",
        )  # fmt: skip
    return folder


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/factorportrait, or ~/.cache/factorportrait."""
    # The specification has relative paths ignored.
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "factorportrait"


def default_bundle_path(name: str, precision: str) -> Path:
    """Where the bundle of the checkpoint called `name` goes without --output; the shipped demo is called "demo"."""
    return cache_folder() / "bundles" / f"{name}-{precision}"
