"""Does `fp-bench compare` keep its promise on this machine?

    python -m factorportrait.benchmarks.trials --output benchmarks/results/compare_trials.json

Twenty trials of about a third of a minute on two cores: seven minutes, no trial is begun after fifteen (`--seconds`).

Every trial measures three rows of one small case in turns: a base, an identical head, and a head in which one stage was made
slower by a planted share. The plant waits, busily and inside the stage, for that share of the time that it has just taken.
`compare` then judges base against both heads with its usual thresholds. The record keeps every verdict; a record with fewer
trials than asked for is continued by the same command; one of other settings has to be removed first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from factorportrait.benchmarks.cases import Case, materialise, resolve
from factorportrait.benchmarks.compare import CaseComparison, Thresholds, compare
from factorportrait.benchmarks.machine import describe_code, describe_machine, load_average
from factorportrait.benchmarks.measure import LocalWorker, measure_case
from factorportrait.benchmarks.peers.loop import LoopSubject
from factorportrait.benchmarks.schema import Noise, Report, Result
from factorportrait.bundle import Bundle
from factorportrait.command import run_command
from factorportrait.errors import UserError
from factorportrait.files import whole_file
from factorportrait.runtime import session
from factorportrait.runtime.session import open_bundle
from factorportrait.runtime.timing import Timings

KIND = "factorportrait compare trials"
PLANTED = {"steps": "step", "pose": "pose", "decode": "decode"}  # stage of compare -> of the runtime
ASKED = 19 / 20


class SlowTimings(Timings):
    """Makes a stage last longer by a share of its own time."""

    def __init__(self, stage: str, share: float):
        super().__init__()
        self._stage, self._share = stage, share

    @contextlib.contextmanager
    def __call__(self, stage: str, index: int | None = None) -> Iterator[None]:
        with super().__call__(stage, index):
            start = time.perf_counter_ns()
            yield
            if stage == self._stage:
                now = time.perf_counter_ns()
                end = now + self._share * (now - start)
                while time.perf_counter_ns() < end:
                    pass


def small_case(pairs: int) -> Case:
    """Small shapes, so that a trial takes seconds, and steps enough for every planted stage to last some milliseconds.

    A tenth of 1.5 ms, what `pose` takes at 32 pixels, is hardly more than the smallest change that `compare` reports at all
    (0.1 ms): there 16 and 18 of 20 slowdowns were caught with 40 and 80 pairs.
    """
    return Case(
        "trial",
        model="tiny",
        resolution=64,
        mode="stream",
        steps=8,
        frames=45,
        threads=1,
        repetitions=pairs,
        max_repetitions=pairs,
        max_seconds=600.0,
    )


def run_trial(case: Case, folder: Path, stage: str, share: float) -> dict[str, Any]:
    """Measure the three rows and judge them; case: resolved."""
    started, load = time.perf_counter(), load_average()
    workers = {}
    for name in ("base", "identical", "planted"):
        # A bundle of its own, as two builds would have.
        opened = open_bundle(folder, threads=case.threads)
        # The same clock in all three, which costs some microseconds itself.
        planted = share if name == "planted" else 0.0
        with mock.patch.object(session, "Timings", functools.partial(SlowTimings, PLANTED[stage], planted)):
            workers[name] = LocalWorker(LoopSubject(case, opened))
    results = dict(zip(workers, measure_case(case, workers), strict=True))
    identical, planted = (judge(results["base"], results[name]) for name in ("identical", "planted"))
    return {
        "planted_stage": stage,
        "caught": planted.faults == (stage,),
        "faults": planted.faults,
        "quiet": identical.verdict != "regression",
        "planted": rows_of(planted),
        "identical": rows_of(identical),
        "load": load,
        "seconds": round(time.perf_counter() - started, 1),
    }


def judge(base: Result, head: Result, thresholds: Thresholds | None = None) -> CaseComparison:
    """compare's verdict on two rows that took turns."""
    machine, code = describe_machine(), describe_code()
    reports = [
        Report("", (), "", machine, code, {}, (), Noise(), (dataclasses.replace(row, key="trial"),), 0.0, turns="trial")
        for row in (base, head)
    ]
    return compare(reports[:1], reports[1:], thresholds or Thresholds()).cases[0]


def rows_of(case: CaseComparison) -> dict[str, dict[str, Any]]:
    """Stage -> what compare says of it, rounded."""
    return {
        row.stage: {
            "base_ms": round(row.base_ms, 4),
            "change": round(row.change.estimate, 4),
            "low": round(row.change.low, 4),
            "high": None if row.change.high is None else round(row.change.high, 4),
            "limit": round(row.limit, 4),
            "verdict": row.verdict,
        }
        for row in case.rows
    }


def run(options: argparse.Namespace) -> int:
    """Run the trials that are missing, record them after each, print what came of them.

    Raises:
        UserError: another file lies in the record's place.
    """
    case = small_case(options.pairs)
    if options.bundle:
        case = dataclasses.replace(case, model=None, bundle=str(options.bundle))
    folder = materialise(case)
    case = resolve(case, Bundle(folder).config)
    settings = {
        "pairs": options.pairs,
        "share": options.share,
        "thresholds": dataclasses.asdict(Thresholds()),
        "case": case.to_config(),
    }
    trials = read_trials(options.output, settings)
    start = time.perf_counter()
    while len(trials) < options.trials and time.perf_counter() - start < options.seconds:
        stage = list(PLANTED)[len(trials) % len(PLANTED)]
        trials.append(run_trial(case, folder, stage, options.share))
        write_trials(options.output, settings, trials)
        last = trials[-1]
        found = "caught" if last["caught"] else f"missed ({', '.join(last['faults']) or 'nothing'} found)"
        quiet = "quiet" if last["quiet"] else "raised an alarm"
        print(
            f"trial {len(trials)}: {stage} {found}, identical builds {quiet}, {last['seconds']} s, load {last['load']:.1f}",
            flush=True,
        )
    return summary(trials, options.trials)


def summary(trials: Sequence[dict[str, Any]], asked: int) -> int:
    caught, quiet = (sum(trial[name] for trial in trials) for name in ("caught", "quiet"))
    print(f"{caught} of {len(trials)} caught and attributed, {quiet} of {len(trials)} identical builds quiet")
    if len(trials) < asked:
        print(f"{asked - len(trials)} trials are missing: run the command again")
    return 0 if len(trials) >= asked and min(caught, quiet) >= ASKED * len(trials) else 1


def read_trials(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Trials of an earlier run with the same settings."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"--output {path}", expected="a record of trials", found=str(error), action="choose another file"
        ) from error
    if not isinstance(data, dict) or data.get("kind") != KIND or data["settings"] != json.loads(json.dumps(settings)):
        raise UserError(
            f"--output {path}",
            expected="no file, or a record with the same settings",
            found="another one",
            action="remove it",
        )
    return data["trials"]


def write_trials(path: Path, settings: dict[str, Any], trials: list[dict[str, Any]]) -> None:
    machine, code = describe_machine(), describe_code()
    record = {
        "kind": KIND,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{machine.system}, {machine.cpu}, {machine.cores} cores",
        "priority": priority(),
        "commit": code.commit,
        "settings": settings,
        "caught": sum(trial["caught"] for trial in trials),
        "quiet": sum(trial["quiet"] for trial in trials),
        "count": len(trials),
        "trials": trials,
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def priority() -> str:
    """Of this process, and on Linux of its session, which is what counts there between sessions."""
    group = Path("/proc/self/autogroup")
    session = group.read_text().partition(" ")[2].strip() if group.is_file() else ""  # a process without a group has an empty file
    return f"nice {os.nice(0)}" + (f", session {session}" if session else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m factorportrait.benchmarks.trials", description=__doc__)
    parser.add_argument(
        "--output", "-o", type=Path, default=Path("trials.json"), help="the record (default trials.json)"
    )
    parser.add_argument("--bundle", type=Path, help="bundle folder (default: a tiny one, exported where it is missing)")
    parser.add_argument("--trials", type=int, default=20, help="default 20")
    parser.add_argument("--pairs", type=int, default=60, help="repetitions of every row (default 60)")
    parser.add_argument("--share", type=float, default=0.1, help="planted slowdown of one stage (default 0.1)")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no trial after so long; run again to go on")
    options = parser.parse_args(argv)
    return run_command("trials", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
