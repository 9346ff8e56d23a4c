"""Cores: shared ones count once, and a container's quota is obeyed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from factorportrait import cores


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
    monkeypatch.setattr(cores, "MEMBERSHIP", write({"member": "0::/"}, tmp_path) / "member")
    monkeypatch.setattr(cores, "CGROUPS", write({"cpu.max": quota}, tmp_path))
    assert cores.usable_cores() == expected


def test_without_linux(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "none")
    assert cores.usable_cores() == 6
