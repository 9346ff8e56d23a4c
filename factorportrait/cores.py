"""How many cores a process may keep busy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from factorportrait import cgroups
from factorportrait.cgroups import read_text, tightest

CPUS = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores that this process may run on, or fewer where its container has a smaller quota of time.

    ONNX Runtime and PyTorch count the machine's cores. In a container that may use 2 of 64, their 64 threads spend the quota in
    waiting for each other; and two threads of one core multiply matrices no faster than one.
    """
    cores = physical_cores(allowed_cpus(), CPUS)
    quota = cpu_quota(cgroups.MEMBERSHIP, cgroups.ROOT)
    return max(1, cores if quota is None else min(cores, int(quota)))


def allowed_cpus() -> set[int]:
    """Logical processors that this process may run on."""
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int], folder: Path) -> int:
    """Cores that the logical processors `cpus` belong to; all of them count where the system does not tell.

    Args:
        folder: of Linux's /sys/devices/system/cpu.
    """
    seen = set()
    for cpu in cpus:
        topology = folder / f"cpu{cpu}" / "topology"
        siblings = read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list")
        seen.add(siblings or str(cpu))
    return len(seen)


def cpu_quota(membership: Path, root: Path) -> float | None:
    """Cores' worth of time that the process's control groups allow, versions 1 and 2; None where they do not limit it.

    Args:
        membership: Linux's /proc/self/cgroup; root: where control groups are mounted.
    """
    return tightest("cpu", _quota, membership, root)


def _quota(folder: Path) -> float | None:
    words = read_text(folder / "cpu.max").split()
    words = words or [read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")]
    try:
        quota, period = (float(word) for word in words)
    except ValueError:  # no such file, or "max"
        return None
    return quota / period if quota > 0 and period > 0 else None
