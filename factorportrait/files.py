"""Files appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from factorportrait.errors import UserError


def part_path(path: str | os.PathLike) -> Path:
    """A temporary name in the same folder, so that the final rename is atomic. Keeps the suffix, which decides the format."""
    path = Path(path)
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the block succeeds, delete it when it fails.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = part_path(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        except OSError as error:
            raise write_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Like `whole_file` for a folder: an existing folder of that name is replaced only at the end.

    Raises:
        UserError: the parent folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = part_path(path)
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                old = part_path(path)
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        except OSError as error:
            raise write_error(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_error(path: Path, error: OSError) -> UserError:
    """Say what to do about an `OSError` met while writing `path`."""
    import errno

    reason = {
        errno.ENOSPC: ("the disk is full", "free some space, or choose another place with --output"),
        errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another place with --output"),
        errno.EACCES: ("no permission to write there", "choose a folder that you can write to with --output"),
        errno.EPERM: ("no permission to write there", "choose a folder that you can write to with --output"),
        errno.EROFS: ("a read-only file system", "choose a folder that you can write to with --output"),
        errno.ENOTDIR: ("a file where a folder should be", "choose another place with --output"),
    }.get(error.errno, (str(error), "choose another place with --output"))
    return UserError(f"cannot write {path}", expected="a place to write to", found=reason[0], action=reason[1])


def sha256_file(path: str | os.PathLike) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
