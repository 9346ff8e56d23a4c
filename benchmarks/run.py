"""fp-bench run: cases in, latency.json out; with --against two of them, whose bundles took turns."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

from factorportrait.benchmarks.cases import (
    CASES,
    Case,
    ExportFailed,
    is_demo,
    load_cases,
    materialise,
    near,
    resolve,
    session_options,
    shipped_names,
)
from factorportrait.benchmarks.limits import measure_gpu_limits, measure_limits
from factorportrait.benchmarks.machine import describe_code, describe_machine, load_average, noise_of, versions
from factorportrait.benchmarks.measure import Interrupted, ProcessWorker, WorkerError, bounded, measure_case
from factorportrait.benchmarks.peers import PEERS
from factorportrait.benchmarks.schema import BUNDLE_KEYS, Limits, Machine, Report, Result, Sweep, Work, write_report
from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.runtime.embedding import implementation

SCOPE = (
    "wall time by perf_counter_ns; from driving frames in memory (normals, camera, face crop) to pictures uint8 [H, W, 3] in host "
    "memory; reading the driving and writing the video only in cases with io; loading, export and warm-up not counted"
)
QUICK = {"repetitions": 2, "max_repetitions": 3, "max_seconds": 20.0}
COLD_STARTS = 3
EXIT_FAILED = 1
SIDES = ("base", "head")


@dataclass(frozen=True)
class Source:
    """A case's bundle: its key, and the work of every stage in a chunk; without it, `note` says why."""

    key: str
    works: Mapping[str, Work]
    note: str = ""


@dataclass
class Run:
    """What a run has gathered so far."""

    started: float
    machine: Machine
    load: float | None
    quick: bool
    limits: dict[str, Limits] = field(default_factory=dict)  # "cpu THREADS" or "gpu"
    results: list[Result] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)  # by case


def run_cases(options: argparse.Namespace) -> int:
    """Measure the cases of a command line. The exit code is EXIT_FAILED where a row failed, or none has figures.

    Raises:
        UserError: an unknown case, peer or key, a bundle that is not there, or a place that cannot be written.
    """
    if options.list:
        print_list()
        return 0
    if options.against is not None:
        return run_turns(options)
    cases = chosen_cases(options)
    check_output(options.output)
    run = Run(time.perf_counter(), describe_machine(), load_average(), options.quick)
    try:
        for case in cases:
            for point, sweep in case.points():
                measure_point(run, point, sweep)
                print_rows([completed(result, run) for result in run.results[-len(case.rows) :]])
        if not run.quick:
            measure_limits_again(run)
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        if isinstance(error, Interrupted):
            run.results += error.results
            error = error.__cause__
        say(f"partial report: {finish(run, options, options.output, interrupted=True)}")
        raise error from None
    print(f"fp-bench: {finish(run, options, options.output)}")
    return exit_code(run.results)


def run_turns(options: argparse.Namespace) -> int:
    """Measure two bundles on the engine of every case, repetition by repetition in turns, so that compare can pair them.

    Raises:
        UserError: as `run_cases`, and a case that names its own bundle or model, or that the bundles run differently.
    """
    if options.bundle is None:
        raise UserError("--against", expected="fp-bench run HEAD --against BASE", found="no HEAD", action="name a bundle folder")
    if options.checkpoint is not None:
        raise UserError("--against", expected="no --checkpoint", found=options.checkpoint, action="it is for rows of one bundle")
    sides = [chosen_cases(replace_options(options, bundle=bundle)) for bundle in (options.against, options.bundle)]
    for base in sides[0]:
        if base.bundle != options.against:
            raise UserError(
                f"case {base.name} with --against", expected="a case without a bundle or model of its own",
                found=base.bundle or base.model, action="leave it out",
            )  # fmt: skip
    for folder in (options.output / side for side in SIDES):
        check_output(folder)
    started, machine, load, limits = time.perf_counter(), describe_machine(), load_average(), {}
    runs = [Run(started, machine, load, options.quick, limits) for _ in SIDES]
    turns = uuid.uuid4().hex

    def written(interrupted: bool = False) -> str:
        reports = (
            finish(run, options, options.output / side, interrupted, turns) for run, side in zip(runs, SIDES, strict=True)
        )
        return " ".join(map(str, reports))

    try:
        for cases in zip(*sides, strict=True):
            for points in zip(*(case.points() for case in cases), strict=True):
                measure_turns(runs, [case for case, _ in points], points[0][1])
        if not options.quick:
            measure_limits_again(runs[0])
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        say(f"partial reports: {written(interrupted=True)}")
        raise (error.__cause__ if isinstance(error, Interrupted) else error) from None
    print(f"fp-bench: compare them with: fp-bench compare {written()}")
    return exit_code([result for run in runs for result in run.results])


def replace_options(options: argparse.Namespace, **changes) -> argparse.Namespace:
    """A changed copy."""
    return argparse.Namespace(**{**vars(options), **changes})


def measure_turns(runs: Sequence[Run], cases: Sequence[Case], sweep: Sweep | None) -> None:
    """Measure one case on the bundles of base and head, and add a row to each of their runs."""
    folders = [materialise(case) for case in cases]
    bundles = [Bundle(folder) for folder in folders]
    cases = [resolve(case, bundle.config) for case, bundle in zip(cases, bundles, strict=True)]
    base, head = ({k: v for k, v in case.to_config().items() if k not in BUNDLE_KEYS} for case in cases)
    if different := [name for name in base if base[name] != head[name]]:
        name = different[0]
        raise UserError(
            f"case {cases[0].name} with --against", expected="bundles that run it alike",
            found=f"{name} {base[name]} and {head[name]}", action=f"give the case a {name} of its own, or compare others",
        )  # fmt: skip
    case = cases[0]
    say(f"{case.name}: base and head on {case.engine}")
    for key in needed_limits(runs[0], case):
        if key not in runs[0].limits:
            keep_limits(runs[0], key)
    for run, one, bundle in zip(runs, cases, bundles, strict=True):
        run.sources[case.name] = count_work(one, bundle)

    def keep(results: Sequence[Result]) -> None:
        for run, one, result in zip(runs, cases, results, strict=True):
            run.results.append(
                replace(result, key=f"{case.name}/{case.engine}", peer=case.engine, config=one.to_config())
            )

    rows = {side: (one, case.engine, folder) for side, one, folder in zip(SIDES, cases, folders, strict=True)}
    try:
        with opened_workers(rows) as workers:
            keep(measure_case(case, workers, sweep=sweep, origin=runs[0].started, on_round=progress(case)))
    except Interrupted as error:
        keep(error.results)
        raise
    for side, run in zip(SIDES, runs, strict=True):
        run.machine = describe_machine(run.machine)
        print(f"{side} ", end="")
        print_rows([completed(run.results[-1], run)])


def exit_code(results: Sequence[Result]) -> int:
    """EXIT_FAILED where a row failed, or none has figures: what is not available here is no failure."""
    return EXIT_FAILED if any(r.status == "failed" for r in results) or not any(r.repetitions for r in results) else 0


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases, their peers known; bundles that they name are there."""
    cases = load_cases(options.cases, options.bundle)
    if options.peers is not None:
        names = tuple(name.strip() for name in options.peers.split(",") if name.strip())
        cases = [replace(case, engine=names[0], peers=names[1:]) if names else replace(case, peers=()) for case in cases]
    if options.checkpoint is not None:
        cases = [replace(case, checkpoint=options.checkpoint) if case.bundle == options.bundle else case for case in cases]
    if options.quick:
        cases = [replace(case, **QUICK) for case in cases]
    for case in cases:
        for name in case.rows:
            if name not in PEERS:
                raise UserError(
                    f"case {case.name}: peer {name!r}", expected="one of " + ", ".join(PEERS), found="an unknown one",
                    action=near(name, list(PEERS)) or "choose another",
                )  # fmt: skip
        if case.model is None and not is_demo(case):
            materialise(case)  # nothing is made, only looked at
    return cases


def check_output(folder: Path) -> None:
    """Raises UserError before anything is measured that could not be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}", expected="a folder", found="a file", action="choose another place")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--output {folder}", expected="a folder that can be written", found=error.strerror or str(error),
            action="choose another place",
        ) from error  # fmt: skip


def measure_point(run: Run, case: Case, sweep: Sweep | None) -> None:
    """Measure one case and add its rows to the run's. What cannot run is a row that says why."""
    say(f"{case.name}: {', '.join(case.rows)}")
    reasons = unavailable_rows(case, run.machine)

    def without_rows(why: str = "", failed: bool = False) -> None:
        rows = {name: WorkerError(reason or why, available=failed and not reason) for name, reason in reasons.items()}
        run.results += measure_case(case, rows, sweep=sweep)

    if all(reasons.values()):
        return without_rows()
    try:
        folder = materialise(case)
        bundle = Bundle(folder)
        case = resolve(case, bundle.config)
    except UserError as error:
        return without_rows(str(error), failed=isinstance(error, ExportFailed))
    for key in needed_limits(run, case):
        if key not in run.limits:
            keep_limits(run, key)
    run.sources[case.name] = count_work(case, bundle)
    with opened_workers({name: (case, name, folder) for name in case.rows}) as workers:
        results = measure_case(case, workers, sweep=sweep, origin=run.started, on_round=progress(case))
    run.machine = describe_machine(run.machine)
    first = len(run.results)
    run.results += results
    for i, result in enumerate(results, first):
        if case.cold_start and result.peer == case.engine:
            run.results[i] = with_cold_start(result, case, folder, 1 if run.quick else COLD_STARTS)


def unavailable_rows(case: Case, machine: Machine) -> dict[str, str]:
    """Row -> why it cannot run here, or "": what is known without a bundle, so that nothing is exported in vain."""
    if case.memory_gib is not None and machine.memory_bytes is not None and machine.memory_bytes < case.memory_gib * 2**30:
        here = f"{machine.memory_bytes / 2**30:.1f}"
        found = f"too large for this machine: it needs {case.memory_gib:g} GiB of memory, here are {here}"
        return dict.fromkeys(case.rows, found)
    reasons = {name: PEERS[name].unavailable(case) for name in case.rows}
    if PEERS[case.engine].device == "cuda" and (reason := reasons[case.engine]):
        # On a processor its peers would compute for hours, and be compared with nothing.
        reasons = {name: own or f"the case is for {case.engine}: {reason}" for name, own in reasons.items()}
    return reasons


@contextlib.contextmanager
def opened_workers(rows: Mapping[str, tuple[Case, str, Path]]) -> Iterator[dict[str, ProcessWorker | WorkerError]]:
    """A process per row, loaded one after another. rows: name -> case, peer, bundle folder."""
    workers: dict[str, ProcessWorker | WorkerError] = {}
    try:
        for name, (case, peer, folder) in rows.items():
            if reason := PEERS[peer].unavailable(case):
                workers[name] = WorkerError(reason, available=False)
                continue
            try:
                workers[name] = ProcessWorker(case, peer, folder)
            except WorkerError as error:
                workers[name] = error
        yield workers
    finally:
        for worker in workers.values():
            if isinstance(worker, ProcessWorker):
                worker.close()


def needed_limits(run: Run, case: Case) -> list[str]:
    """Keys of `Run.limits` that bound the rows of a case."""
    return [f"cpu {case.threads}", *(["gpu"] if run.machine.gpus else [])]


def keep_limits(run: Run, key: str) -> None:
    """Measure what the machine can do, in a process of its own because thread pools stay. The best figures of a run count."""
    device, _, threads = key.partition(" ")
    call = (measure_gpu_limits, run.quick) if device == "gpu" else (measure_limits, int(threads), run.quick)
    # Ctrl-C is for this process.
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), **quiet) as pool:
        try:
            found = pool.submit(*call).result()
        except BrokenProcessPool:
            found = None
    if found is not None:
        run.limits[key] = best_of(run.limits[key], found) if key in run.limits else found


def measure_limits_again(run: Run) -> None:
    """At the end of a run: a limit that was taken while somebody else computed would flatter every row."""
    for key in list(run.limits):
        keep_limits(run, key)


def best_of(first: Limits, second: Limits) -> Limits:
    """The higher one of every rate."""
    rates = {
        kind: max(limits.matrix_flops[kind] for limits in (first, second) if kind in limits.matrix_flops)
        for kind in {**first.matrix_flops, **second.matrix_flops}
    }  # fmt: skip
    return replace(first, matrix_flops=rates, copy_bytes_s=max(first.copy_bytes_s, second.copy_bytes_s))


def with_cold_start(result: Result, case: Case, folder: Path, times: int) -> Result:
    """Time fresh processes to their first picture."""
    if result.status != "ok" or not PEERS[result.peer].whole:
        return result
    request = json.dumps({"case": dataclasses.asdict(case), "peer": result.peer, "folder": str(folder)})
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.Popen(
            [sys.executable, "-m", "factorportrait.benchmarks.cold", request], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            if done.stdout.readline() != b"picture\n":
                return replace(result, notes=(*result.notes, "cold start: a fresh process made no picture"))
            seconds.append(time.perf_counter() - start)
        finally:
            done.kill()
            done.communicate()
    return replace(result, startup=replace(result.startup, cold_start_s=statistics.median(seconds)))


def count_work(case: Case, bundle: Bundle) -> Source:
    """Count the operations of a case's stages."""
    key = bundle.manifest.source_key
    try:
        from factorportrait.benchmarks.flops import chunk_work

        works = chunk_work(bundle, session_options(case), num_frames=case.frames, coefficients=case.io and uses_coefficients())
        return Source(key, works)
    except (ImportError, UserError) as error:
        return Source(key, {}, f"operations were not counted: {error}")


def completed(result: Result, run: Run) -> Result:
    """A row with its bundle's key, and its stages with their work and their limit.

    Stages of a peer that is only a part do other work than ours, so they have neither.
    """
    if (source := run.sources.get(result.case)) is None:
        return result
    peer, works = PEERS[result.peer], source.works
    result = replace(result, source_key=source.key, notes=(*result.notes, *([source.note] if source.note else [])))
    limits = run.limits.get("gpu" if peer.device == "cuda" else f"cpu {result.config['threads']}")
    if not peer.whole or limits is None:
        return result
    precision = peer.precision or result.config["precision"]
    embedding, uncounted = result.config.get("embedding", "auto"), set()
    if embedding == "fused" or peer.fused and embedding != "graph" and implementation() != "numpy":
        uncounted = {"conditions", "steps"}  # the graph that was counted did not run
    elif any(stage.name == "steps" for stage in result.stages):
        uncounted = {"conditions"}  # this stage only sends what they are made of
    works = {name: work for name, work in works.items() if name not in uncounted}
    stages = (
        bounded(stage, works[stage.name], limits, precision) if stage.name in works else stage for stage in result.stages
    )
    return replace(result, stages=tuple(stages))


def uses_coefficients() -> bool:
    """Whether the shipped driving of cases with io gives ARKit coefficients instead of pictures."""
    from factorportrait.runtime.media.driving import open_driving
    from factorportrait.shipped import shipped_inputs

    return open_driving(shipped_inputs() / "driving_clip").coefficients is not None


def finish(
    run: Run, options: argparse.Namespace, output: Path, interrupted: bool = False, turns: str | None = None
) -> Path:
    """Write the report."""
    spins = [repetition.spin_ms for result in run.results for repetition in result.repetitions]
    noise = noise_of(spins, None, run.load)
    measured = [result.noise for result in run.results if result.repetitions]
    steal, other = (
        max((share for row in measured if (share := getattr(row, name)) is not None), default=None)
        for name in ("steal_share", "other_share")
    )
    disturbed = sum(row.noisy for row in measured)
    reasons = (*noise.reasons, *([f"{disturbed} of {len(measured)} rows were disturbed"] if disturbed else ()))
    report = Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command_of(options), scope=SCOPE, machine=run.machine,
        code=describe_code(), versions=versions(), limits=tuple(run.limits.values()),
        noise=replace(noise, steal_share=steal, other_share=other, reasons=reasons),
        results=tuple(completed(result, run) for result in run.results), seconds=time.perf_counter() - run.started,
        interrupted=interrupted, turns=turns,
    )  # fmt: skip
    for reason in report.noise.reasons:
        say(f"noisy: {reason}")
    return write_report(output, report)


def command_of(options: argparse.Namespace) -> tuple[str, ...]:
    """What was asked for, without where files lie."""
    bundle = [Path(options.bundle).name] if options.bundle else []
    against = ["--against", Path(options.against).name] if options.against else []
    cases = ["--cases", *(Path(name).name for name in options.cases)]
    peers = ["--peers", options.peers] if options.peers is not None else []
    return ("fp-bench", "run", *bundle, *against, *cases, *peers, *(["--quick"] if options.quick else []))


def progress(case: Case):
    """Says how far a case is, on stderr."""

    def on_round(rounds: int, width: float | None) -> None:
        wide = "" if width is None else f", interval ±{width:.1%}"
        say(f"{case.name}: round {rounds} of at most {case.max_repetitions}{wide}")

    return on_round


def print_rows(results: Sequence[Result]) -> None:
    """One line per row on stdout."""
    for result in results:
        print(f"{result.key:<36} {figures(result)}", flush=True)


def figures(result: Result) -> str:
    """The row in words."""
    if result.status != "ok":
        return f"{result.status}: {result.reason}"
    if result.latency is None:
        return ", ".join(f"{stage.name} {stage.per_chunk.p50:.1f} ms" for stage in result.stages)
    latency, limits = result.latency, [stage.limit_ms for stage in result.stages]
    text = (
        f"{latency.per_frame.p50:8.2f} ms/frame  p90 {latency.per_frame.p90:.2f}  {latency.throughput_fps:.1f} fps  "
        f"arrival to picture {latency.arrival.p50:.0f} ms  first frame {latency.first_frame.p50:.0f} ms"
    )
    if any(limits):
        text += f"  {sum(filter(None, limits)) / latency.per_chunk.p50:.0%} of the limit"
    if result.startup.cold_start_s is not None:
        text += f"  cold start {result.startup.cold_start_s:.1f} s"
    return text + ("  noisy" if result.noise.noisy else "")


def print_list() -> None:
    """Cases and peers."""
    for name in shipped_names():
        first = (CASES / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
        print(f"case {name:<22} {first.lstrip('# ')}")
    for peer in PEERS.values():
        print(f"peer {peer.name:<22} {peer.description}")


def say(line: str) -> None:
    print(f"fp-bench: {line}", file=sys.stderr, flush=True)
