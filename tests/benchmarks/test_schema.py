"""The latency report: what is written is read back, and what is not a report of this schema is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from whole_report import make_report

from factorportrait.benchmarks.schema import REPORT_FILE, SCHEMA, read_report, to_json, write_report
from factorportrait.errors import UserError


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    report = make_report()
    path = write_report(tmp_path / "out", report)
    assert path == tmp_path / "out" / REPORT_FILE
    found = read_report(path)
    assert found == read_report(tmp_path / "out")
    # Six digits of every number are kept, the second time all there are.
    assert read_report(write_report(tmp_path / "again.json", found)) == found
    assert found.results[0].latency.per_frame.p50 == pytest.approx(report.results[0].latency.per_frame.p50, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data | {"schema": SCHEMA + 1}, ["newer"]),
        (lambda data: data | {"schema": SCHEMA - 1}, ["older"]),
        (lambda data: data | {"schema": None}, ["fp-bench run"]),
        (lambda data: data | {"kind": "quality"}, ["quality"]),
        (lambda data: {key: value for key, value in data.items() if key != "noise"}, ["missing noise"]),
        (lambda data: data | {"secondss": 1}, ["secondss", "seconds"]),
        (lambda data: data | {"results": [data["results"][0] | {"repetitions": [{"order": "x"}]}]}, ["results: 0: repetitions: 0"]),
        (lambda data: [], ["something else"]),
    ],
)  # fmt: skip
def test_what_is_no_report_of_this_schema_is_refused(tmp_path, change, words):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(change(json.loads(to_json(make_report())))))
    with pytest.raises(UserError) as error:
        read_report(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message or (word == "newer" and "update factorportrait" in message)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_an_unreadable_file_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="fp-bench run"):
        read_report(path)


def test_a_number_that_json_lacks_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_report(tmp_path, replace(make_report(), seconds=float("nan")))
    assert not list(tmp_path.iterdir())


def test_machines_are_told_apart_by_what_decides_times():
    machine = make_report().machine
    assert replace(machine, cpu_mhz=(1.0,), memory_bytes=1).identity == machine.identity
    assert replace(machine, cores=7).identity != machine.identity
    assert replace(machine, gpus=()).identity != machine.identity
