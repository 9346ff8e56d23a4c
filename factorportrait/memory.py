"""How much memory the machine has left, or the container."""

from __future__ import annotations

import re
from pathlib import Path

from factorportrait import cgroups
from factorportrait.cgroups import read_text, tightest

MEMINFO = Path("/proc/meminfo")
NO_LIMIT = 2**62  # version 1 has no word for it, but a number of this size


def available_memory() -> int | None:
    """Bytes that a new process may take without swapping, and without being killed; None where the system does not say."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", read_text(MEMINFO))
    machine = int(found[1]) * 1024 if found else None
    groups = group_memory(cgroups.MEMBERSHIP, cgroups.ROOT)
    return min((free for free in (machine, groups) if free is not None), default=None)


def group_memory(membership: Path, root: Path) -> int | None:
    """Bytes that the process's control groups leave, versions 1 and 2; None where they do not limit it.

    Args:
        membership: Linux's /proc/self/cgroup; root: where control groups are mounted.
    """
    return tightest("memory", _left, membership, root)


def _left(folder: Path) -> int | None:
    limit, used = read_text(folder / "memory.max"), read_text(folder / "memory.current")
    if not limit:
        limit, used = read_text(folder / "memory.limit_in_bytes"), read_text(folder / "memory.usage_in_bytes")
    if not (limit.isdecimal() and used.isdecimal()) or int(limit) >= NO_LIMIT:  # no such file, or "max"
        return None
    # Files that were read once are given up before anything is killed. Version 1 sums up those of groups inside on another line.
    files = re.findall(r"^(?:total_)?inactive_file (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(used) + max(map(int, files), default=0))
