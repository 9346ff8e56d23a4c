"""The shipped GitHub workflow: pinned actions, scripts that a shell reads, commands that fp-bench and the Makefile know."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from factorportrait.benchmarks import cli
from factorportrait.benchmarks.cases import shipped_names

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / ".github" / "workflows" / "benchmark.yml").read_text(encoding="utf-8")
STEPS = [step for job in yaml.safe_load(TEXT)["jobs"].values() for step in job["steps"]]


def test_every_action_is_pinned_to_a_commit_and_names_its_version():
    uses = re.findall(r"uses: (.*)", TEXT)
    assert len(uses) == sum("uses" in step for step in STEPS) > 5
    for use in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use), use


def test_scripts_are_valid_bash():
    for script in (step["run"] for step in STEPS if "run" in step):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_commands_are_known():
    """Every call of fp-bench is parsed by its own parser; shell variables stand for one word."""
    text = "\n".join(step["run"] for step in STEPS if "run" in step).replace("\\\n", " ")
    variables = {"CASES": "smallest", "pairs[@]": "a"}
    calls = re.findall(r"/fp-bench (.*?)(?:\)|\|\||;|>|$)", text, re.MULTILINE)
    assert {call.split()[0] for call in calls} == {"run", "report", "compare"}
    for call in calls:
        call = re.sub(r"\$\{?([\w@\[\]]+)\}?", lambda match: variables.get(match[1], "x"), call)
        options = cli.parser().parse_args(shlex.split(call))
        assert set(getattr(options, "cases", None) or []) <= set(shipped_names())
    for target in re.findall(r"make -C \w+ (\S+)", text):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["chart", "latency", "rounds"])
def test_what_is_kept_is_named_once(name):
    assert sum(step.get("with", {}).get("name") == name and "upload" in step["uses"] for step in STEPS if "uses" in step) == 1
