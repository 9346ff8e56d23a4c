"""One command for a machine with an NVIDIA GPU: tests/gpu and the benchmark, with whichever engines are there.

    python -m factorportrait.benchmarks.gpu [--json gpu.json] [--cases wan-1.3b-512] [pytest's arguments]

Leaves a JSON summary, which holds the benchmark's latency.json as well; its report lies in a folder beside it. Exit code
0: some tests ran, none failed, and the benchmark ended well. 1: something failed. 3: all tests were skipped, so nothing is
verified.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from factorportrait.command import run_command
from factorportrait.engines.choose import NAMES, obstacle
from factorportrait.engines.tensorrt.machine import find_gpu
from factorportrait.errors import UserError
from factorportrait.files import whole_file

EXIT_ALL_SKIPPED = 3
CASES = "wan-1.3b-512"
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13", "torch", "cuda-python", "cuda-core", "numpy")


def main(arguments: list[str] | None = None) -> int:
    """Run the tests and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m factorportrait.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="the summary (default: gpu.json)")
    parser.add_argument("--cases", default=CASES, help=f"of fp-bench run, with commas; '' for no benchmark (default: {CASES})")
    options, pytest_arguments = parser.parse_known_args(arguments)
    cases = [case.strip() for case in options.cases.split(",") if case.strip()]
    return run_command("benchmarks.gpu", lambda: run(options.json, cases, pytest_arguments))


def run(output: Path, cases: list[str], pytest_arguments: list[str]) -> int:
    """Run tests/gpu and, where some of them ran, the benchmark; write the summary and print it."""
    tests = Path(__file__).resolve().parent.parent / "tests" / "gpu"
    if not tests.is_dir():
        raise UserError(
            "tests/gpu", expected="a checkout, which has the tests", found=f"no {tests}",
            action="clone the repository, and pip install -e . there",
        )  # fmt: skip
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", str(tests), "-m", "gpu", f"--junitxml={results}", *pytest_arguments]
        code = subprocess.run(command, cwd=tests.parent.parent, check=False).returncode
        if not results.is_file():
            raise UserError("pytest", expected="results", found=f"exit code {code}", action="see its message above")
        summary = summarise(results) | {"machine": describe_machine(), "seconds": round(time.time() - started, 1)}
    counts = summary["counts"]
    num_run = counts["passed"] + counts["failed"]
    write(output, summary)  # what is known so far is kept, whatever the benchmark does
    benchmark = None
    if num_run and cases:
        benchmark = run_benchmark(cases, output.with_name(output.stem + "-bench"))
        write(output, summary | {"benchmark": benchmark})
    if not num_run:
        gpu = find_gpu()
        why = f"no NVIDIA GPU: {gpu}" if isinstance(gpu, str) else "see the reasons above"
        print(f"All {counts['skipped']} tests were skipped ({why}): nothing was verified. Summary: {output}")
        return EXIT_ALL_SKIPPED
    ended = "" if benchmark is None else f" Benchmark: exit code {benchmark['exit_code']}, {benchmark['folder']}."
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped.{ended} Summary: {output}")
    bad = counts["failed"] or code not in (0, 1) or (benchmark is not None and benchmark["exit_code"])
    return 1 if bad else 0


def write(output: Path, summary: dict) -> None:
    with whole_file(output) as file:
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def run_benchmark(cases: list[str], folder: Path) -> dict:
    """fp-bench run and report into a folder -> exit code, folder, and the report where there is one."""
    program = [sys.executable, "-m", "factorportrait.benchmarks.cli"]
    code = subprocess.run([*program, "run", "--cases", *cases, "--output", str(folder)], check=False).returncode
    found = folder / "latency.json"
    if code == 0:
        subprocess.run([*program, "report", str(folder)], check=False)
    report = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None
    return {"cases": cases, "exit_code": code, "folder": folder.name, "latency": report}


def summarise(results: Path) -> dict:
    """Counts, and per test its outcome, its seconds and, where it did not pass, the reason, from pytest's JUnit file."""
    tests = []
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.get("message") or "").strip().split("\n")[0]
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        tests.append({"test": name, "outcome": outcome, "seconds": float(case.get("time", 0)), "reason": reason})
    found = Counter(test["outcome"] for test in tests)
    return {"counts": {outcome: found[outcome] for outcome in ("passed", "failed", "skipped")}, "tests": tests}


def describe_machine() -> dict:
    """The GPU, the packages, and what stands against each engine; no names of hosts or people."""
    gpu = find_gpu()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    engines = {name: asdict(against) if (against := obstacle(name)) else None for name in NAMES}
    return {
        "gpu": {"missing": gpu} if isinstance(gpu, str) else asdict(gpu),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "versions": versions, "obstacles": engines,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
