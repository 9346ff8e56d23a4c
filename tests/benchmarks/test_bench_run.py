"""fp-bench run as a user meets it: real rows in processes of their own, crashes, interrupts, refusals, cold starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import latency_reports
import numpy as np
import pytest

from factorportrait.benchmarks import cli, run
from factorportrait.benchmarks.cases import Case, ExportFailed, resolve
from factorportrait.benchmarks.measure import ProcessWorker, WorkerError, measure_case
from factorportrait.benchmarks.peers import PEERS
from factorportrait.benchmarks.schema import Limits, Work, read_report
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.runtime.embedding import implementation

CASES = """
[[case]]
name = "c"
peers = [{peers}]
steps = 2
frames = 21
threads = 1
repetitions = 2
max_repetitions = {repetitions}
max_seconds = 60
interval = 0.0001
cold_start = {cold}
"""


def case_file(tmp_path: Path, *peers: str, repetitions: int = 2, cold: bool = False) -> str:
    path = tmp_path / "cases.toml"
    names = ", ".join(f'"{peer}"' for peer in peers)
    path.write_text(CASES.format(peers=names, repetitions=repetitions, cold=str(cold).lower()))
    return str(path)


@pytest.fixture(scope="module")
def report(tiny_bundle, tmp_path_factory):
    """One run through the command line: our loop twice, diffusers, and a peer that is not there."""
    folder = tmp_path_factory.mktemp("bench")
    file = case_file(folder, "onnxruntime-cpu-eager", "diffusers", cold=True)
    assert cli.main(["run", str(tiny_bundle), "--cases", file, "--quick", "--output", str(folder / "out")]) == 0
    return read_report(folder / "out")


def test_every_row_has_its_raw_samples_and_its_figures(report):
    assert [result.key for result in report.results] == ["c/onnxruntime-cpu", "c/onnxruntime-cpu-eager", "c/diffusers"]
    for result in report.results[:2]:
        assert result.status == "ok" and len(result.repetitions) == 3 and result.stopped == "cap"
        for repetition in result.repetitions:
            assert [chunk.frames for chunk in repetition.chunks] == [5, 8, 8]
            assert [chunk.past_frames for chunk in repetition.chunks] == [0, 2, 3]
            assert [chunk.steady for chunk in repetition.chunks] == [False, False, True]
            for chunk in repetition.chunks:
                assert len(chunk.push_ms) == chunk.frames and sum(chunk.push_ms) <= chunk.wall_ms
                assert sum(chunk.stage_ms.values()) == pytest.approx(chunk.wall_ms, rel=0.02)
                expected = ["expression", "pose", "conditions", "step.0", "step.1", "commit", "decode", "other"]
                assert sorted(chunk.stage_ms) == sorted(expected)
            assert repetition.first_frame_ms > repetition.reference_ms
        assert 0.5 < result.accounted < 1 and result.execution == "serial"
        assert result.latency.arrival_fps == 24.0 and result.latency.arrival.p50 > result.latency.per_chunk.p50
        assert result.memory.host_peak_bytes > 2**20 and result.startup.load_s > 0
        cold = result.startup.cold_start_s
        assert cold > result.startup.load_s if result.peer == "onnxruntime-cpu" else cold is None
        assert {span.stage for span in result.waterfall} == {stage.name for stage in result.stages} - {"other"}
        assert sum(stage.share for stage in result.stages) == pytest.approx(1, abs=0.02)
        assert any(note.startswith("cache concat: a window of 5") for note in result.notes)


def test_graphs_have_their_work_and_their_limit(report):
    stages = {stage.name: stage for stage in report.results[0].stages}
    # The extension embeds the conditions where it is built: what is counted, the graph, did not run.
    uncounted = {"other"} | ({"conditions"} if implementation() != "numpy" else set())
    assert {name for name, stage in stages.items() if stage.work is None} == uncounted
    for stage in stages.values():
        if stage.work is not None:
            assert stage.limit_ms > 0 and stage.fraction == pytest.approx(stage.limit_ms / stage.per_chunk.p50, rel=1e-4)
    (limits,) = report.limits
    assert limits.threads == 1 and limits.matrix_flops["fp32"] > 1e9 and limits.copy_bytes_s > 1e8


def test_a_peer_that_is_only_a_transformer_has_stages_and_no_latency(report):
    result = report.results[2]
    assert result.status == "ok" and result.latency is None and result.startup.cold_start_s is None
    assert [stage.name for stage in result.stages] == ["step.0", "step.1", "other"]
    assert any("transformer alone" in note for note in result.notes)
    assert run.figures(result).startswith("step.0 ")


def test_the_machine_and_the_program_are_described(report):
    assert report.machine.cores >= 1 and report.machine.cpu != "unknown" and report.versions["onnxruntime"]
    assert report.code.version and "perf_counter_ns" in report.scope and report.seconds > 0
    assert not report.interrupted


def test_an_unavailable_bundle_is_a_row_that_says_why(tiny_bundle, tmp_path):
    """An export in a precision that is not there yet must not end the other cases."""
    options = cli.parser().parse_args(["run", "--cases", "smallest", "--output", str(tmp_path)])
    case = Case("c", bundle=str(tiny_bundle), precision="fp16", peers=("diffusers",))
    state = run.Run(time.perf_counter(), run.describe_machine(), 0.0, quick=True)
    run.measure_point(state, case, None)
    results = read_report(run.finish(state, options, tmp_path)).results
    assert run.exit_code(results) == run.EXIT_FAILED, "nothing was measured"
    assert [result.status for result in results] == ["unavailable"] * 2 and "fp16" in results[0].reason


def test_an_export_that_fails_is_a_failure_and_not_something_missing(monkeypatch, tmp_path):
    def fails(case):
        raise ExportFailed("making a bundle to measure", found="a graph that differs from torch", action="mend that")

    monkeypatch.setattr(run, "materialise", fails)
    state = run.Run(time.perf_counter(), run.describe_machine(), 0.0, quick=True)
    run.measure_point(state, Case("c", bundle="demo", precision="int8", peers=("diffusers",)), None)
    assert [result.status for result in state.results] == ["failed", "unavailable"]
    assert "differs from torch" in state.results[0].reason and "the case is int8" in state.results[1].reason


@pytest.mark.parametrize(("memory_gib", "words"), [(1e6, "needs 1e+06 GiB of memory"), (None, "the case is for tensorrt")])
def test_a_case_that_this_machine_cannot_run_is_not_even_exported(monkeypatch, memory_gib, words):
    monkeypatch.setattr(run, "materialise", lambda case: pytest.fail("exported in vain"))
    tensorrt = replace(PEERS["tensorrt"], unavailable=lambda case: "no NVIDIA GPU")
    monkeypatch.setitem(PEERS, "tensorrt", tensorrt)
    state = run.Run(time.perf_counter(), run.describe_machine(), 0.0, quick=True)
    case = Case("c", model="wan-1.3b", precision="fp16", engine="tensorrt", peers=("torch",), memory_gib=memory_gib)
    run.measure_point(state, case, None)
    assert [result.status for result in state.results] == ["unavailable"] * 2
    assert words in state.results[1].reason


def test_the_best_figures_of_a_run_are_its_limits():
    first = Limits("cpu", 2, {"fp32": 1e11, "int8": 4e11}, 1e10)
    second = Limits("cpu", 2, {"fp32": 2e11}, 5e9)
    assert run.best_of(first, second) == Limits("cpu", 2, {"fp32": 2e11, "int8": 4e11}, 1e10)


@pytest.fixture
def tiny_case(tiny_bundle) -> Case:
    case = Case("c", bundle=str(tiny_bundle), steps=1, frames=21, threads=1, repetitions=2, max_repetitions=2)
    return resolve(case, Bundle(tiny_bundle).config)


def test_a_process_that_dies_ends_its_row_alone(tiny_case, tiny_bundle):
    workers = {name: ProcessWorker(tiny_case, name, tiny_bundle) for name in ("onnxruntime-cpu", "onnxruntime-cpu-eager")}
    try:
        os.kill(workers["onnxruntime-cpu"]._process.pid, signal.SIGSEGV)
        dead, alive = measure_case(tiny_case, workers)
    finally:
        for worker in workers.values():
            worker.close()
    assert dead.status == "failed" and "SIGSEGV" in dead.reason
    assert alive.status == "ok" and len(alive.repetitions) == 2
    assert not any(worker._process.is_alive() for worker in workers.values())


def test_a_bundle_that_does_not_load_is_unavailable_and_an_error_of_a_peer_is_a_failure(tiny_case, tiny_bundle, tmp_path):
    with pytest.raises(WorkerError) as error:
        ProcessWorker(tiny_case, "onnxruntime-cpu", tmp_path)
    assert not error.value.available and "manifest.json" in error.value.reason
    worker = ProcessWorker(replace(tiny_case, mode="clip"), "onnxruntime-cpu", tiny_bundle)
    try:
        with pytest.raises(WorkerError) as error:
            worker.repeat(1000)  # longer than any clip
    finally:
        worker.close()
    assert error.value.available and "at most 33 frames" in error.value.reason


def test_ctrl_c_keeps_what_was_measured_and_marks_it(tiny_bundle, tmp_path):
    command = [sys.executable, "-m", "factorportrait.benchmarks.cli", "run", str(tiny_bundle)]
    command += ["--cases", case_file(tmp_path, repetitions=100_000), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if "round 2 " in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the rows' processes get it too
            break
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in rest and "interrupted" in rest
    report = read_report(tmp_path / "out")
    (result,) = report.results
    assert report.interrupted and result.status == "interrupted" and len(result.repetitions) >= 2
    assert result.latency.per_frame.p50 > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "smalest"], "did you mean smallest"),
        (["none-such-bundle", "--cases", "{file}"], "none-such-bundle"),
        (["--cases", "{file}", "--peers", "onxruntime-cpu"], "did you mean onnxruntime-cpu"),
        (["--cases", "{file}", "--output", "{file}"], "expected a folder"),
        (["--cases", "{file}", "--output", "{file}/below"], "expected a folder that can be written"),
        (["--cases", "{file}", "--against", "{bundle}"], "found no HEAD"),
        (["{bundle}", "--cases", "smallest", "--against", "{bundle}"], "found tiny"),
        (["{bundle}", "--cases", "{free}", "--against", "none-such-bundle"], "none-such-bundle"),
        (["{bundle}", "--cases", "{free}", "--against", "{bundle}", "--checkpoint", "c"], "no --checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, tiny_bundle, capsys, arguments, words):
    file = case_file(tmp_path)
    Path(file).write_text(Path(file).read_text().replace("[[case]]\n", f'[[case]]\nbundle = "{tiny_bundle}"\n'))
    if arguments[0] == "none-such-bundle":
        file = case_file(tmp_path)
    (tmp_path / "free").mkdir()
    places = {"{file}": file, "{bundle}": str(tiny_bundle), "{free}": case_file(tmp_path / "free")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    code = cli.main(["run", *arguments])
    complaint = capsys.readouterr().err
    assert code == 2 and words in complaint and complaint.count("\n") == 1


def test_the_list_names_cases_and_peers(capsys):
    assert cli.main(["run", "--list"]) == 0
    text = capsys.readouterr().out
    assert "smallest" in text and all(peer in text for peer in PEERS)


def test_two_bundles_take_turns_and_compare_pairs_them(tiny_bundle, tiny_fp16_bundle, tmp_path, capsys):
    """A bundle in another precision as head: its rows lie between those of base, and its name tells it apart."""
    file, out = case_file(tmp_path), tmp_path / "out"
    arguments = ["run", str(tiny_fp16_bundle), "--against", str(tiny_bundle), "--cases", file, "--quick", "--output", str(out)]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    base, head = read_report(out / "base"), read_report(out / "head")
    assert base.turns == head.turns is not None and base.limits == head.limits
    orders = [[repetition.order for repetition in report.results[0].repetitions] for report in (base, head)]
    assert orders == [[0, 3, 4], [1, 2, 5]]
    assert [report.results[0].config["precision"] for report in (base, head)] == ["fp32", "fp16"]
    assert base.results[0].key == head.results[0].key == "c/onnxruntime-cpu"
    assert base.results[0].source_key != head.results[0].source_key
    assert base.command[:5] == ("fp-bench", "run", tiny_fp16_bundle.name, "--against", tiny_bundle.name)
    assert cli.main(["compare", str(out / "base"), str(out / "head"), "--threshold", "500%"]) == 0
    table = capsys.readouterr().out
    assert f"{tiny_bundle.name} (fp32) → {tiny_fp16_bundle.name} (fp16)" in table and "compared in pairs" in table


def test_bundles_that_run_a_case_in_different_ways_are_not_compared(tiny_case):
    state = [run.Run(0.0, run.describe_machine(), 0.0, quick=True) for _ in run.SIDES]
    with pytest.raises(UserError, match="found steps 1 and 2"):
        run.measure_turns(state, [tiny_case, replace(tiny_case, steps=2)], None)


def test_a_failed_row_and_an_empty_report_are_no_success(report):
    good, failed = report.results[0], replace(report.results[1], status="failed")
    missing = replace(good, status="unavailable", repetitions=())
    assert run.exit_code([good, missing]) == 0
    assert run.exit_code([good, failed]) == run.exit_code([missing]) == run.exit_code([]) == run.EXIT_FAILED


@pytest.mark.parametrize(
    ("peer", "whole", "embedding", "counted"),
    [
        ("tensorrt", True, "auto", {"steps", "decode"}), ("tensorrt", True, "fused", {"decode"}),
        ("tensorrt", False, "auto", {"conditions", "decode"}), ("tensorrt", False, "fused", {"decode"}),
        ("onnxruntime-cpu", False, "graph", {"conditions", "decode"}),
    ],
)  # fmt: skip
def test_work_is_told_of_the_stage_that_does_it(peer, whole, embedding, counted):
    """Where a chunk is one call its conditions are in there; kernels in place of their graph are not counted."""
    chunk = {"conditions": 1.0, "decode": 2.0} | ({"steps": 30.0} if whole else {})
    row = latency_reports.result(
        [latency_reports.repetition(np.random.default_rng(0), 0.0, 0, {})], peer=peer, embedding=embedding
    )
    row = replace(row, stages=tuple(replace(row.stages[0], name=name, work=None) for name in chunk))
    works = {name: Work(1e9, {"linear": 1e9}, 1e6, 1e6) for name in ("conditions", "steps", "decode")}
    limits = Limits("any", 2, {"fp32": 1e11}, 1e10, {})
    gathered = SimpleNamespace(sources={"demo": run.Source("k", works)}, limits={"gpu": limits, "cpu 2": limits})
    found = run.completed(row, gathered)
    assert {stage.name for stage in found.stages if stage.work is not None} == counted
