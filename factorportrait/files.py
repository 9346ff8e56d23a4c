"""Files appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from factorportrait.errors import UserError

DAY_S = 24 * 3600.0


def part_path(path: str | os.PathLike) -> Path:
    """A temporary name in the same folder, so that the final rename is atomic. Keeps the suffix, which decides the format.

    The name says which process on which machine made it, so that what a killed process leaves can be told from work in
    progress.

    Raises:
        UserError: the path is the root of a file system, which has no name.
    """
    return _hidden_path(path, "part")


def _hidden_path(path: str | os.PathLike, kind: str) -> Path:
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.name:
        raise UserError(
            f"cannot write {path}", expected="a path with a name", found="a root folder", action="name something in it"
        )
    return path.with_name(f".{path.stem}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{kind}{path.suffix}")


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

    What killed processes left of the same folder is removed first.

    Raises:
        UserError: the parent folder cannot be written or the disk is full.
    """
    # Through links, so that what is renamed at the end is the folder and not the link.
    path = Path(path).resolve()
    temporary = part_path(path)
    try:
        try:
            _remove_left_over(path)
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                _swap(temporary, path)
            else:
                os.replace(temporary, path)
        except OSError as error:
            raise write_error(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of the folder `path`, or leave `path` as it was."""
    old = _hidden_path(path, "old")
    try:
        os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_left_over(path: Path) -> None:
    """Remove hidden folders of `path` whose process is gone; without the folder itself, its old version comes back first."""
    name = re.compile(rf"\.{re.escape(path.stem)}\.([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}\.(part|old){re.escape(path.suffix)}")
    for folder in path.parent.iterdir() if path.parent.is_dir() else ():
        match = name.fullmatch(folder.name)
        if not match or folder.is_symlink() or not folder.is_dir():
            continue
        machine, process, kind = match.groups()
        if _is_alive(int(process)) if machine == _machine() else time.time() - _last_change(folder) < DAY_S:
            continue
        if kind == "old" and not path.exists():
            os.replace(folder, path)
        else:
            shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _machine() -> str:
    """Eight hex digits that processes share when they see each other's numbers: the same machine and the same container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere, asking would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _last_change(folder: Path) -> float:
    """Time of the newest change of a folder or of what lies in it."""
    try:
        return max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
    except OSError:
        return time.time()


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
