"""Where the shipped demo lies, and where a bundle goes when nobody says. No torch here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from factorportrait.bundle import Bundle
from factorportrait.checkpoint_files import checkpoint_digests
from factorportrait.errors import CheckpointError, UserError

DEMO_NAME = "demo"
# A folder `demo` with neither is somebody else's: site-packages may hold a package of that name.
DEMO_PARTS = ("inputs", "checkpoint")


def demo_folder() -> Path:
    """The demo of the installed package, or of the checkout that this file is in.

    Raises:
        UserError: neither has one.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "demo", package.parent / "demo"):
        if any((folder / part).is_dir() for part in DEMO_PARTS):
            return folder
    raise UserError(
        "the shipped demo", expected=f"a folder {package / 'demo'} with {' or '.join(DEMO_PARTS)}", found="none",
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


def is_shipped_checkpoint(path: Path) -> bool:
    """Whether `path` is the demo's checkpoint folder."""
    try:
        return path.resolve() == shipped_checkpoint().resolve()
    except UserError:
        return False


def default_bundle_path(name: str, precision: str, checkpoint: Path | None = None) -> Path:
    """Where a bundle goes without --output.

    Args:
        name: of the checkpoint, for people; the shipped demo is called "demo".
        precision: of the bundle.
        checkpoint: the folder; None for the shipped demo's. Two folders of one name get two bundles.
    """
    if checkpoint is not None and not is_shipped_checkpoint(checkpoint):
        name += "-" + hashlib.sha256(os.fsencode(checkpoint.resolve())).hexdigest()[:8]
    return cache_folder() / "bundles" / f"{name}-{precision}"


def demo_bundle_is_current(path: Path) -> bool:
    """Whether `path` is a readable bundle of the shipped checkpoint as it is now, and not of an older or another one."""
    try:
        return Bundle(path).manifest.provenance.get("checkpoint_files") == checkpoint_digests(shipped_checkpoint())
    except (UserError, OSError):
        return False
