"""python -m factorportrait.benchmarks.gpu: what it makes of pytest's results, and what it says without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from factorportrait.benchmarks.gpu import EXIT_ALL_SKIPPED, run_benchmark, summarise
from factorportrait.engines.tensorrt.machine import find_gpu

RESULTS = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="good[torch]" time="0.5" />
<testcase classname="tests.gpu.test_a" name="bad" time="1"><failure message="assert 1 == 2&#10;more">...</failure></testcase>
<testcase classname="tests.gpu.test_a" name="broken" time="0"><error message="no fixture">...</error></testcase>
<testcase classname="tests.gpu.test_b" name="absent" time="0"><skipped message="tensorrt needs a GPU">...</skipped></testcase>
</testsuite></testsuites>"""


def test_summary(tmp_path):
    (tmp_path / "results.xml").write_text(RESULTS, encoding="utf-8")
    summary = summarise(tmp_path / "results.xml")
    assert summary["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert summary["tests"][0] == {"test": "test_a::good[torch]", "outcome": "passed", "seconds": 0.5, "reason": ""}
    assert [test["reason"] for test in summary["tests"][1:]] == ["assert 1 == 2", "no fixture", "tensorrt needs a GPU"]


def test_the_benchmark_is_part_of_the_summary(tmp_path):
    """The smallest case for real, and one that does not exist: its exit code, and no report."""
    found = run_benchmark(["smallest", "--quick"], tmp_path / "bench")
    assert found["exit_code"] == 0 and found["folder"] == "bench"
    assert any(result["latency"] for result in found["latency"]["results"]) and (tmp_path / "bench" / "latency.html").is_file()
    missing = run_benchmark(["no-such-case"], tmp_path / "none")
    assert missing["exit_code"] == 2 and missing["latency"] is None


@pytest.mark.skipif(not isinstance(find_gpu(), str), reason="this machine has a GPU: the command itself is the test")
def test_without_a_gpu_everything_is_skipped_and_that_is_said(tmp_path):
    command = [sys.executable, "-m", "factorportrait.benchmarks.gpu", "--json", str(tmp_path / "gpu.json"), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_ALL_SKIPPED, done.stdout + done.stderr
    assert "were skipped (no NVIDIA GPU" in done.stdout and "nothing was verified" in done.stdout
    summary = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert summary["counts"]["passed"] == summary["counts"]["failed"] == 0 < summary["counts"]["skipped"]
    assert summary["machine"]["obstacles"]["tensorrt"]["expected"] == "an NVIDIA GPU and its driver"
    assert all("no NVIDIA GPU" in test["reason"] for test in summary["tests"])
