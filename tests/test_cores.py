"""Cores and memory: shared cores count once, and a container's limits are obeyed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from factorportrait import cgroups, cores, memory


def write(files: dict[str, str], root: Path) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        # The smallest of the group and those around it.
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "800000 100000"}, 1.5),
        # The container sees its own group at the root.
        ("0::/docker/1234", {"cpu.max": "50000 100000"}, 0.5),
        (
            "3:memory:/x\n4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 4.0,
        ),
        ("4:cpu:/docker/1", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("5:cpuset:/x", {"cpuset/x/cpu.cfs_quota_us": "100000", "cpuset/x/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {"cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_quota_of_control_groups(tmp_path, membership, files, expected):
    member = write({"member": membership}, tmp_path) / "member"
    assert cores.cpu_quota(member, write(files, tmp_path / "cgroup")) == expected


def test_threads_of_one_core_count_once(tmp_path):
    names = {f"cpu{i}/topology/core_cpus_list": f"{i % 4},{i % 4 + 4}" for i in range(8)}
    folder = write(names, tmp_path)
    assert cores.physical_cores(range(8), folder) == 4
    assert cores.physical_cores({0, 4}, folder) == 1
    assert cores.physical_cores({0, 1, 9, 10}, folder) == 4  # of the last two nothing is known
    older = write({f"cpu{i}/topology/thread_siblings_list": "0-1" for i in range(2)}, tmp_path / "older")
    assert cores.physical_cores(range(2), older) == 1


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 3), ("max 1000", 4)])
def test_usable_cores(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", write({"member": "0::/"}, tmp_path) / "member")
    monkeypatch.setattr(cgroups, "ROOT", write({"cpu.max": quota}, tmp_path))
    assert cores.usable_cores() == expected


def test_without_linux(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "none")
    assert cores.usable_cores() == 6
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.available_memory() is None


UNLIMITED = str(2**63 - 4096)  # what version 1 says where there is no limit


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"memory.max": "1000", "memory.current": "300"}, 700),
        ("0::/", {"memory.max": "max", "memory.current": "300"}, None),
        ("0::/", {}, None),
        ("0::/", {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 500\ninactive_file 250\nactive_file 9"}, 350),
        ("0::/", {"memory.max": "1000", "memory.current": "1200"}, 0),
        # The least of the group and those around it, here outside's.
        (
            "0::/a",
            {"memory.max": "800", "memory.current": "500", "a/memory.max": "400", "a/memory.current": "50"}, 300,
        ),
        # The container sees its own group at the root.
        ("0::/docker/1234", {"memory.max": "1000", "memory.current": "1"}, 999),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x",
            {
                "memory/x/memory.limit_in_bytes": "1000", "memory/x/memory.usage_in_bytes": "600",
                "memory/x/memory.stat": "inactive_file 10\ntotal_inactive_file 90",
                "memory/memory.limit_in_bytes": UNLIMITED, "memory/memory.usage_in_bytes": "7",
            }, 490,
        ),
        ("4:memory:/", {"memory/memory.limit_in_bytes": UNLIMITED, "memory/memory.usage_in_bytes": "7"}, None),
        ("5:cpu:/", {"cpu/memory.limit_in_bytes": "1000", "cpu/memory.usage_in_bytes": "7"}, None),
    ],
)  # fmt: skip
def test_memory_of_control_groups(tmp_path, membership, files, expected):
    member = write({"member": membership}, tmp_path) / "member"
    assert memory.group_memory(member, write(files, tmp_path / "cgroup")) == expected


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 999_000), ("max", 2_048_000), ("9000000", 2_048_000)])
def test_the_container_decides_what_is_left(tmp_path, monkeypatch, limit, expected):
    files = {"member": "0::/", "meminfo": "MemTotal: 9000 kB\nMemAvailable:    2000 kB"}
    write(files | {"cgroup/memory.max": limit, "cgroup/memory.current": "1000"}, tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "member")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    assert memory.available_memory() == expected
