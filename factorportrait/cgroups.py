"""The control groups of Linux that this process is in: what a container may use is written there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def tightest(controller: str, read: Callable[[Path], float | None], membership: Path, root: Path) -> float | None:
    """The smallest of what `read` finds in `group_folders`, None being no limit; None where there is none at all."""
    found = map(read, group_folders(controller, membership, root))
    return min((limit for limit in found if limit is not None), default=None)


def group_folders(controller: str, membership: Path, root: Path) -> Iterator[Path]:
    """Folders of the process's groups and of those around them, as far as they are there, for versions 1 and 2.

    Args:
        controller: such as "cpu" or "memory".
        membership: Linux's /proc/self/cgroup; root: where control groups are mounted.
    """
    # A container may see its own group at the root, under a path that exists outside only.
    for line in read_text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mounts = dict.fromkeys([root / controllers, root / controller]) if controllers else [root]
        for mount in mounts:
            inner = PurePosixPath(path.lstrip("/"))
            yield from (mount / part for part in (inner, *inner.parents))


def read_text(path: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
