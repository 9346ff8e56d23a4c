"""The store of plans: what a plan is kept for, two builds at once, killed builds, damaged files, list and prune. No TensorRT."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from plan_bundles import DECODER, ENCODER, MACHINE, write_bundle

from factorportrait.bundle import Bundle, TensorSpec
from factorportrait.engines.tensorrt import build, engine, machine
from factorportrait.engines.tensorrt.builder import Job
from factorportrait.engines.tensorrt.plans import (
    Options,
    PlanStore,
    Request,
    read_timing_cache,
    status_of,
    write_timing_cache,
)
from factorportrait.errors import BundleError, UserError
from factorportrait.export import plan_cli
from factorportrait.export.cli import main

WAIT_S = 60.0


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle(write_bundle(tmp_path / "bundle", (ENCODER, DECODER)))


@pytest.fixture
def store(tmp_path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


@pytest.fixture
def request_(bundle) -> Request:
    return Request(bundle, bundle.stage("arkit_encoder", "tensorrt"), MACHINE)


def write_plan(path: Path) -> None:
    path.write_bytes(b"plan")


def refuse(path: Path) -> None:
    raise AssertionError("built again")


def test_a_plan_is_built_once(store, request_):
    plan, built = store.get(request_, write_plan)
    assert built and plan.file.read_bytes() == b"plan" and plan.stage == "arkit_encoder"
    again, built = store.get(request_, refuse)
    assert not built and again == plan
    _, built = store.get(request_, write_plan, again=True)
    assert built


@pytest.mark.parametrize(
    "part, value, said",
    [
        ("tensorrt", "11.3.1.2", "TensorRT was 11.4.0.106, is 11.3.1.2"),
        ("gpu", "NVIDIA Test 2", "the GPU was NVIDIA Test 1, is NVIDIA Test 2"),
        ("sm", "9.0", "its compute capability was 8.9, is 9.0"),
        ("os", "win32-AMD64", "the system was linux-x86_64, is win32-AMD64"),
    ],
)
def test_a_plan_of_another_machine_is_never_used(store, request_, part, value, said):
    store.get(request_, write_plan)
    other = replace(request_, machine=replace(MACHINE, **{part: value}))
    assert store.find(other) is None
    assert store.why_missing(other) == said
    _, built = store.get(other, write_plan)
    assert built and len(store.plans()) == 2
    assert store.find(request_) and store.find(other)


def test_another_graph_weights_sizes_or_flags_make_another_plan(store, request_, tmp_path):
    store.get(request_, write_plan)
    folder = request_.bundle.path
    (folder / ENCODER.file).write_bytes(b"another graph")
    graph = Request(Bundle(write_bundle(folder, (ENCODER,))), ENCODER, MACHINE)
    with_weights = replace(ENCODER, data=("shared.data",))
    weights = Request(Bundle(write_bundle(folder, (with_weights,))), with_weights, MACHINE)
    wider = replace(ENCODER, inputs=(TensorSpec("coefficients", "float32", ("N", 52)),))
    others = [graph, weights, replace(request_, spec=wider), replace(request_, options=Options(optimization_level=5))]
    keys = {request.parts.key for request in (request_, *others)}
    assert len(keys) == 5
    assert store.why_missing(graph) == "the graph has changed"
    assert store.why_missing(others[2]) == "the sizes to build for have changed"
    assert store.why_missing(others[3]).startswith("the flags was version_compatible False, optimization_level 3, is")
    (tmp_path / "moved").mkdir()
    for name in ("manifest.json", ENCODER.file):
        (tmp_path / "moved" / name).write_bytes((folder / name).read_bytes())
    write_bundle(tmp_path / "moved", (ENCODER,))
    assert Request(Bundle(tmp_path / "moved"), ENCODER, MACHINE).parts == graph.parts  # by content, not by place


def test_a_version_compatible_plan_serves_later_versions_of_its_major(store, request_):
    compatible = replace(request_, options=Options(version_compatible=True))
    store.get(compatible, write_plan)
    newer = replace(MACHINE, tensorrt="11.9.0")
    assert store.find(replace(compatible, machine=newer)) is not None
    assert store.find(replace(compatible, machine=replace(MACHINE, tensorrt="12.0.1"))) is None
    assert store.find(replace(request_, machine=newer)) is None


def test_a_run_takes_the_latest_plan_whatever_its_flags(store, request_):
    """`fp-export build --optimization-level 5` is not in vain."""
    assert store.find_any(request_) is None
    store.get(request_, write_plan)
    chosen = replace(request_, options=Options(optimization_level=5, workspace_bytes=10**9))
    best, _ = store.get(chosen, write_plan)
    assert store.find_any(request_) == best != store.find(request_)
    compatible, _ = store.get(replace(request_, options=Options(version_compatible=True)), write_plan)
    assert store.find_any(request_) == compatible and compatible.version_compatible and not best.version_compatible
    newer = replace(request_, machine=replace(MACHINE, tensorrt="11.9.0"))
    assert store.find_any(newer) == compatible
    for other in (replace(MACHINE, sm="9.0"), replace(MACHINE, gpu="NVIDIA Test 2"), replace(MACHINE, tensorrt="12.0.1")):
        assert store.find_any(replace(request_, machine=other)) is None
    (request_.bundle.path / ENCODER.file).write_bytes(b"another graph")
    changed = Request(Bundle(write_bundle(request_.bundle.path, (ENCODER, DECODER))), ENCODER, MACHINE)
    assert store.find_any(changed) is None


@pytest.mark.parametrize("damage", ["plan truncated", "metadata truncated", "metadata of another plan", "plan missing"])
def test_a_damaged_plan_is_built_again(store, request_, damage):
    plan, _ = store.get(request_, write_plan)
    metadata = plan.folder / "plan.json"
    if damage == "plan truncated":
        plan.file.write_bytes(b"pl")
    elif damage == "plan missing":
        plan.file.unlink()
    elif damage == "metadata truncated":
        metadata.write_bytes(metadata.read_bytes()[:40])
    else:
        metadata.write_text(metadata.read_text().replace("8.9", "9.0"))
    assert store.find(request_) is None
    plan, built = store.get(request_, write_plan)
    assert built and plan.file.read_bytes() == b"plan"


def test_a_failed_build_leaves_nothing(store, request_):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise UserError("graph", action="mend it")

    with pytest.raises(UserError):
        store.get(request_, fail)
    assert store.plans() == [] and [path.name for path in store.folder.iterdir()] == ["build.lock"]


def _get(folder: str, bundle: str, journal: str, start) -> None:
    """In a process of its own: wait for the start, then get the plan slowly."""
    found = Bundle(bundle)

    def slowly(path: Path) -> None:
        with open(journal, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        path.write_bytes(b"plan")

    start.wait(WAIT_S)
    request = Request(found, found.stage("arkit_encoder", "tensorrt"), MACHINE)
    plan, _ = PlanStore(folder).get(request, slowly)
    assert plan.file.read_bytes() == b"plan"


def test_two_builds_at_once(store, bundle, tmp_path):
    context = multiprocessing.get_context("fork")
    start, journal = context.Barrier(2), tmp_path / "journal"
    arguments = (str(store.folder), str(bundle.path), str(journal), start)
    processes = [context.Process(target=_get, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(journal.read_text().splitlines()) == 1  # the second waited, and took what the first had built


def _build_for_ever(folder: str, bundle: str, ready) -> None:
    found = Bundle(bundle)

    def half(path: Path) -> None:
        path.write_bytes(b"half a pl")
        ready.set()
        time.sleep(WAIT_S)

    PlanStore(folder).get(Request(found, found.stage("arkit_encoder", "tensorrt"), MACHINE), half)


def test_a_killed_build(store, request_):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_build_for_ever, args=(str(store.folder), str(request_.bundle.path), ready))
    process.start()
    assert ready.wait(WAIT_S)
    os.kill(process.pid, signal.SIGKILL)
    process.join(WAIT_S)
    assert store.find(request_) is None and store.plans() == []
    assert len(store.left_overs()) == 1
    waited = []
    plan, built = store.get(request_, write_plan, on_wait=lambda: waited.append(1))
    assert built and not waited and plan.file.read_bytes() == b"plan"
    assert store.left_overs() == []


def test_who_waits_is_told(store, request_):
    waited = []
    with store.lock():
        # In another thread, since this one holds the lock.
        thread = threading.Thread(target=lambda: store.get(request_, write_plan, on_wait=lambda: waited.append(1)))
        thread.start()
        deadline = time.monotonic() + WAIT_S
        while not waited and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waited and store.find(request_) is None
    thread.join(WAIT_S)
    assert store.find(request_) is not None


def test_timing_cache(tmp_path):
    path = tmp_path / "plans" / "timing.cache"
    assert read_timing_cache(path) == (b"", "")
    write_timing_cache(path, b"times" * 100)
    assert read_timing_cache(path) == (b"times" * 100, "")
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:10], b"", b"\0" * 600):
        path.write_bytes(content)
        times, wrong = read_timing_cache(path)
        assert times == b"" and "truncated or no timing cache" in wrong and "\n" not in wrong


def test_timing_caches_of_two_machines_are_two(store):
    assert store.timing_cache(MACHINE) != store.timing_cache(replace(MACHINE, tensorrt="11.5.0"))


def _job(tmp_path: Path) -> Job:
    return Job("arkit_encoder", "x.onnx", str(tmp_path / "plan"), str(tmp_path / "times"), str(tmp_path / "log"), (), Options())


@pytest.mark.parametrize(
    "source, said",
    [
        ("import os; print('last words', flush=True); os.kill(os.getpid(), 11)", "a crash of the library (SIGSEGV)"),
        ("import os; os.kill(os.getpid(), 9)", "its process killed, as the system does when memory is short"),
        ("import os; os._exit(7)", "a process that ended with code 7"),
        ("raise ImportError('libnvinfer.so.11')", "ImportError: libnvinfer.so.11"),
        ("__version__ = '10.9.0'", "TensorRT 10.9.0"),
    ],
)
def test_a_library_that_dies_is_one_line(tmp_path, monkeypatch, source, said):
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError) as caught:
        build.run_job(_job(tmp_path), lambda message: None)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "plan").exists()
    if "last words" in source:
        assert "last words" in (tmp_path / "log").read_text()


def test_nobody_to_talk_to(tmp_path):
    """A builder whose caller is gone reads an empty job, and ends."""
    command = [sys.executable, "-m", "factorportrait.engines.tensorrt.builder"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode != 0


def test_no_gpu(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "find_gpu", lambda: "no driver")
    with pytest.raises(UserError, match="--engine tensorrt; expected an NVIDIA GPU and its driver; found no driver; look at"):
        engine.TensorRTEngine(bundle)
    assert main(["build", str(bundle.path), "--plans", str(tmp_path / "plans")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fp-export: error: TensorRT plans; expected an NVIDIA GPU") and message.count("\n") == 1
    assert not (tmp_path / "plans").exists()


def test_a_damaged_bundle_is_not_built(bundle, store, monkeypatch, capsys):
    """The key of a plan is made of the manifest's digests: a graph that is another one would be kept under the wrong key."""
    monkeypatch.setattr(machine, "probe", lambda what: MACHINE)
    graph = bundle.path / ENCODER.file
    graph.write_bytes(graph.read_bytes()[::-1])
    assert main(["build", str(bundle.path), "--plans", str(store.folder)]) == 2
    assert "expected sha256" in capsys.readouterr().err and not store.folder.exists()


def test_an_export_elsewhere_says_where_plans_are_built(bundle, monkeypatch):
    monkeypatch.setattr(machine, "find_gpu", lambda: "no driver")
    plans, line = plan_cli.plans_after_export(bundle.path)
    assert plans is None
    assert line == f"no TensorRT plans built here (no driver); on the machine that runs them: fp-export build {bundle.path}"


def test_a_bundle_for_others(tmp_path, monkeypatch, capsys):
    path = write_bundle(tmp_path / "other", (ENCODER,), targets=("cpu",))
    assert main(["build", str(path)]) == 2
    assert "expected graphs for tensorrt; found graphs for cpu" in capsys.readouterr().err
    with pytest.raises(BundleError):
        build.requests_of(Bundle(path), MACHINE, Options())


@pytest.fixture
def stocked(store, bundle, request_):
    """Three plans: one that fits, one of an older TensorRT, one of a bundle that is gone."""
    store.get(request_, write_plan)
    store.get(replace(request_, machine=replace(MACHINE, tensorrt="11.3.0")), write_plan)
    gone = Bundle(write_bundle(bundle.path.with_name("gone"), (DECODER,)))
    store.get(Request(gone, DECODER, MACHINE), write_plan)
    (gone.path / "manifest.json").unlink()
    return store


def listed(store: PlanStore, capsys) -> list[dict]:
    assert main(["plans", "list", "--plans", str(store.folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["entries"]


def test_list(stocked, monkeypatch, capsys):
    monkeypatch.setattr(machine, "probe", lambda what: MACHINE)
    entries = {(entry["stage"], entry["tensorrt"]): entry for entry in listed(stocked, capsys)}
    assert len(entries) == 3
    current = entries["arkit_encoder", MACHINE.tensorrt]
    assert (current["state"], current["gpu"], current["bytes"]) == ("current", "NVIDIA Test 1", 4) and current["age_s"] < 600
    old = entries["arkit_encoder", "11.3.0"]
    assert (old["state"], old["reason"]) == ("stale", "TensorRT was 11.3.0, is 11.4.0.106")
    assert entries["vae_decode_first", MACHINE.tensorrt]["state"] == "stale"
    assert main(["plans", "list", "--plans", str(stocked.folder)]) == 0
    table = capsys.readouterr().out
    assert "arkit" in table and "3 plans" in table


def test_without_a_gpu_nobody_can_tell(stocked, monkeypatch, capsys):
    monkeypatch.setattr(machine, "find_gpu", lambda: "no driver")
    states = [entry["state"] for entry in listed(stocked, capsys)]
    assert sorted(states) == ["stale", "unknown", "unknown"]


def test_prune(stocked, monkeypatch, capsys):
    monkeypatch.setattr(machine, "probe", lambda what: MACHINE)
    (stocked.folder / "arkit_encoder-0123456789abcdef.log").write_text("a build that failed")
    (stocked.folder / "mine.txt").write_text("not a plan")
    before = sorted(path.name for path in stocked.folder.iterdir())
    assert main(["plans", "prune", "--dry-run", "--plans", str(stocked.folder)]) == 0
    assert capsys.readouterr().out.count("would remove") == 3
    assert sorted(path.name for path in stocked.folder.iterdir()) == before
    assert main(["plans", "prune", "--plans", str(stocked.folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 3
    (kept,) = stocked.plans()
    assert kept.parts.tensorrt == MACHINE.tensorrt and (stocked.folder / "mine.txt").exists()
    write_timing_cache(stocked.timing_cache(MACHINE), b"times")
    assert main(["plans", "prune", "--all", "--plans", str(stocked.folder)]) == 0
    assert sorted(path.name for path in stocked.folder.iterdir()) == ["build.lock", "mine.txt"]
    assert main(["plans", "prune", "--plans", str(stocked.folder / "never"), "--json"]) == 0


def test_a_changed_bundle_makes_its_plans_stale(store, request_):
    plan, _ = store.get(request_, write_plan)
    assert status_of(plan, MACHINE).state == "current"
    (request_.bundle.path / ENCODER.file).write_bytes(b"another graph")
    write_bundle(request_.bundle.path, (ENCODER, DECODER))
    assert status_of(plan, MACHINE).reason == "the graph has changed"


def test_a_folder_that_cannot_be_written(request_, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        PlanStore(tmp_path / "file").get(request_, write_plan)
