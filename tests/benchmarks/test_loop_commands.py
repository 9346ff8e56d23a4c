"""fp-bench waterfall, stream and threads: the rows generate the same, the reports say what was measured."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from factorportrait.benchmarks import cli, loop_commands, stream, threads, waterfall
from factorportrait.benchmarks.cases import Case, resolve
from factorportrait.benchmarks.machine import describe_machine
from factorportrait.benchmarks.measure import summarise
from factorportrait.benchmarks.peers import PEERS
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.runtime.loop import HOISTS
from factorportrait.runtime.session import SessionOptions, open_bundle


@pytest.fixture(scope="module")
def case(tiny_bundle, tiny_checkpoint):
    small = Case("tiny", str(tiny_bundle), str(tiny_checkpoint), chunk=2, window=4, steps=2, threads=1, frames=29, mode="stream")
    return resolve(small, Bundle(tiny_bundle).config)


def test_all_rows_generate_what_the_naive_loop_does(case, tiny_bundle):
    """Over the frames in which the window stands still; behind those the naive loop sees less, and so differs."""
    changes, found, longer = {}, {}, {}
    for row in waterfall.ROWS:
        changes |= row.changes
        subject = PEERS[row.peer].open(dataclasses.replace(case, **changes), tiny_bundle)
        found[row.name] = waterfall.latents_of(subject, 13)
        if row.name in ("naive", "overlap"):
            longer[row.name] = waterfall.latents_of(subject, 29)
    expected = found["naive"]
    assert expected.shape[2] == 4 and len(found) == 12
    for name, latents in found.items():
        assert np.abs(latents - expected).max() <= waterfall.LIMIT * np.abs(expected).max(), name
    assert np.abs(longer["naive"] - longer["overlap"]).max() > 1e-3


def test_steady_chunks_of_an_overlapped_row(case, tiny_bundle):
    """Not those that fill the queues, nor those that come when the driving has ended; as many as a serial row has, or more."""
    sample = PEERS["onnxruntime-cpu-stages"].open(case, tiny_bundle).repeat(29)
    steady = [chunk.steady for chunk in sample.chunks]
    serial = PEERS["onnxruntime-cpu"].open(case, tiny_bundle).repeat(29)
    assert not any(steady[:7]) and not steady[-1] and sum(steady) >= 1
    assert sum(chunk.frames for chunk in sample.chunks) == 29 + 14 * 8
    assert all(len(chunk.arrival_ms) == chunk.frames for chunk in sample.chunks)
    assert not any(chunk.arrival_ms for chunk in serial.chunks) and sum(chunk.steady for chunk in serial.chunks) == 3


def test_every_row_adds_something():
    """No row is the row before, and together they end at what ships."""
    changes, seen = {}, []
    for row in waterfall.ROWS:
        changes |= row.changes
        seen.append((row.peer, tuple(sorted(changes.items()))))
    assert len(set(seen)) == len(waterfall.ROWS)
    assert changes == {"embedding": "auto", "hoist": "all", "cache": "auto"}
    for name in HOISTS:
        assert any(name in row.changes.get("hoist", "") or row.changes.get("hoist") == "all" for row in waterfall.ROWS), name


@pytest.fixture
def found():
    bars = [
        waterfall.Bar("naive", "everything", "torch-naive", "", summarise([[40.0, 41.0]]), 0.0),
        waterfall.Bar("graphs", "ONNX <Runtime>", "onnxruntime-cpu", "", summarise([[10.0, 10.0]]), 2e-7),
        waterfall.Bar("TensorRT", "plans", "tensorrt", "no driver"),
    ]
    config = {"resolution": 32, "steps": 2, "chunk": 2, "window": 4, "threads": 1}
    return waterfall.Waterfall("tiny", config, tuple(bars), 29, 13, describe_machine(), 1.0, ("others ran",))


def test_waterfall_page_and_text(found, tmp_path):
    paths = waterfall.write_waterfall(tmp_path / "out", [found])
    data = json.loads(paths[0].read_text())
    assert data["waterfalls"][0]["bars"][1]["frame_ms"]["p50"] == 10.0 and data["schema"] == waterfall.SCHEMA
    page = paths[1].read_text()
    assert "<svg" in page and "ONNX &lt;Runtime&gt;" in page and "http" not in page.replace("http://www.w3.org", "")
    text = waterfall.waterfall_text(found)
    assert "4.05x the first  error 2.0e-07" in text and "TensorRT           no driver" in text and "noisy: others ran" in text


def test_a_row_that_differs_fails_the_command(found, monkeypatch, tmp_path, capsys):
    wrong = dataclasses.replace(found.bars[1], error=0.1)
    for bars, code in ((found.bars, 0), ((found.bars[0], wrong), loop_commands.EXIT_MISSED)):
        result = dataclasses.replace(found, bars=bars)
        monkeypatch.setattr(waterfall, "measure_waterfall", lambda case, say, quick, result=result: result)
        assert cli.main(["waterfall", "--output", str(tmp_path)]) == code
    assert "graphs does not generate what the first row does" in capsys.readouterr().out
    with pytest.raises(UserError, match="--case; expected demo or wan"):
        waterfall.waterfall_case("other")


def test_stream_report(tiny_bundle, tmp_path, capsys):
    output = tmp_path / "stream.json"
    code = cli.main(["stream", str(tiny_bundle), "--frames", "161", "--steps", "1", "--threads", "1", "--output", str(output)])
    data = json.loads(output.read_text())
    assert code in (0, loop_commands.EXIT_MISSED)  # how fast it was is another matter
    assert sum(quarter["chunks"] for quarter in data["quarters"]) == len(data["chunk_ms"]) - 1
    assert 0 < data["allocated_bytes"] < stream.LARGE_BYTES
    assert data["frames"] == 161 and "161 frames: last quarter" in capsys.readouterr().out
    assert cli.main(["stream", str(tiny_bundle), "--frames", "9"]) == 2


def test_objections(tiny_bundle):
    quarters = tuple(stream.Quarter(10, 20.0, 20.0, 100 * 2**20) for _ in range(4))
    good = stream.StreamReport({}, 1000, describe_machine(), 1.0, quarters, 0.01, 0.01, 1000, 5000, (20.0,), (1,))
    assert good.objections == []
    for changes, words in (
        ({"slower": 0.04}, "slower"), ({"growth_bytes": 2**21}, "grew"), ({"allocated_bytes": stream.LARGE_BYTES}, "allocated"),
    ):  # fmt: skip
        (objection,) = dataclasses.replace(good, **changes).objections
        assert words in objection
    opened = open_bundle(tiny_bundle, threads=1)
    session, kept = opened.session(mode="stream", steps=1), []
    generate = type(session._denoiser).generate

    def wasteful(denoiser, chunk):
        kept.append(np.ones(2 * stream.LARGE_BYTES, np.uint8))
        return generate(denoiser, chunk)

    with pytest.MonkeyPatch.context() as patch:  # a check of the check
        patch.setattr(type(session._denoiser), "generate", wasteful)
        options = SessionOptions(mode="stream", steps=1).resolve(opened.config)
        assert stream.allocated_bytes(opened, options) > stream.LARGE_BYTES


def test_numbers_of_threads():
    assert [threads.numbers_of_threads(cores) for cores in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert loop_commands.thread_numbers("4, 1,1") == [1, 4] and loop_commands.thread_numbers(None) is None
    for wrong in ("", "0", "1,", "two", "1;2", "²"):
        with pytest.raises(UserError, match="--threads; expected numbers from 1"):
            loop_commands.thread_numbers(wrong)


def test_threads_are_named_where_they_are_clearly_faster():
    def row(number, spin, *ms):
        return threads.Row(number, spin, frame_ms=summarise([list(ms)] * 3))

    slow, usual, close, fast = row(1, True, 20.0, 20.0), row(2, True, 10.0, 12.0), row(2, False, 9.0, 11.0), row(4, True, 5.0, 5.0)
    missing = threads.Row(8, True, "no such engine")
    found = threads.Threads("demo", 2, (slow, usual, close, fast, missing), describe_machine(), ("others ran",))
    assert found.usual is usual and found.fastest is fast
    text = threads.threads_text(found)
    assert "fastest: fp-run --threads 4\n" in text and "noisy: others ran" in text
    assert "--threads 8            no such engine" in text
    found = dataclasses.replace(found, rows=(slow, usual, close))
    assert found.fastest is close and "none is clearly faster than --threads 2, what" in threads.threads_text(found)
    assert dataclasses.replace(found, rows=(missing,)).fastest is None


def test_threads_command(tiny_bundle, tmp_path, capsys):
    output = tmp_path / "threads.json"
    assert cli.main(["threads", str(tiny_bundle), "--threads", "1", "--quick", "--output", str(output)]) == 0
    data = json.loads(output.read_text())
    assert [(row["threads"], row["spin"], row["reason"]) for row in data["rows"]] == [(1, True, ""), (1, False, "")]
    assert all(row["frame_ms"]["p50"] > 0 for row in data["rows"]) and "--threads 1 --no-spin" in capsys.readouterr().out
    assert cli.main(["threads", str(tiny_bundle), "--threads", "4096"]) == 2
    assert "at most" in capsys.readouterr().err
