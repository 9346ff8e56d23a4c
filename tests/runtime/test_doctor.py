"""fp-run doctor: what it says is there is there, and every missing thing has a command."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from factorportrait.runtime import doctor
from factorportrait.runtime.cli import main


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_run"] is True
    found = {finding["name"]: finding for finding in report["findings"]}
    assert importlib.metadata.version("onnxruntime") in found["onnxruntime"]["detail"]
    assert found["torch"]["present"]  # the tests need it
    assert all(finding["present"] or finding["action"] for finding in found.values())


def test_missing_packages_are_named_with_the_command(monkeypatch, capsys):
    """A machine without Warp and without PyAV: the first is only missing, without the second nothing runs."""
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in ("warp", "av") else real(name))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (warp,) = [line for line in lines if line.split()[1] == "warp"]
    assert warp.startswith("missing") and 'pip install "factorportrait[mesh]"' in warp
    assert lines[-1].startswith("This machine cannot run bundles yet")


def test_unknown_option():
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--bogus"])
    assert stop.value.code == 2
