"""fp-bench threads: how many threads an operator should have on this machine, measured with the bundle that is to run.

Every row is the loop as fp-run drives it, with another number of threads, and with and without spinning; rows run in turns, each in
a process of its own, as in `fp-bench run`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from factorportrait.benchmarks.cases import load_cases, materialise, resolve
from factorportrait.benchmarks.machine import describe_machine
from factorportrait.benchmarks.measure import measure_case
from factorportrait.benchmarks.run import opened_workers
from factorportrait.benchmarks.schema import Machine, Summary
from factorportrait.bundle import Bundle
from factorportrait.cores import usable_cores
from factorportrait.files import whole_file
from factorportrait.runtime.pipeline import default_threads

SCHEMA = 1
PEERS = {True: "onnxruntime-cpu", False: "onnxruntime-cpu-no-spin"}
FRAMES, REPETITIONS, MAX_REPETITIONS = 45, 3, 8


@dataclass(frozen=True)
class Row:
    """One way to run. spin: see `factorportrait.engines.ort.session_options`; reason: why it has no figures, else ""."""

    threads: int
    spin: bool
    reason: str = ""
    frame_ms: Summary | None = None

    @property
    def flags(self) -> str:
        """Of fp-run."""
        return f"--threads {self.threads}" + ("" if self.spin else " --no-spin")


@dataclass(frozen=True)
class Threads:
    """All rows; default: the threads that fp-run takes when it is not told."""

    bundle: str
    default: int
    rows: tuple[Row, ...]
    machine: Machine
    noise: tuple[str, ...]

    @property
    def fastest(self) -> Row | None:
        """The row with the smallest median, None where nothing ran."""
        return min((row for row in self.rows if row.frame_ms), key=lambda row: row.frame_ms.p50, default=None)

    @property
    def usual(self) -> Row | None:
        """The row that fp-run takes when it is not told."""
        return next((row for row in self.rows if row.frame_ms and row.spin and row.threads == self.default), None)


def numbers_of_threads(cores: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    return sorted({cores, *(1 << i for i in range(cores.bit_length()) if 1 << i <= cores)})


def measure_threads(bundle: str | None, numbers: list[int] | None, say: Callable[[str], None], *, quick: bool = False) -> Threads:
    """Time all rows.

    Args:
        bundle: a bundle folder; None for the shipped demo in fp32.
        numbers: of threads; None for `numbers_of_threads`.

    Raises:
        UserError: the bundle is missing or does not fit, or more threads than usable cores.
        Interrupted: the run was stopped.
    """
    (case,) = (case for case in load_cases(["demo"], bundle) if case.name == "demo")
    case = replace(case, cold_start=False, frames=min(case.frames, FRAMES), repetitions=1 if quick else REPETITIONS)
    case = replace(case, max_repetitions=1 if quick else MAX_REPETITIONS)
    folder = materialise(case)
    config = Bundle(folder).config
    rows = [Row(number, spin) for number in numbers or numbers_of_threads(usable_cores()) for spin in (True, False)]
    cases = {row.flags: (resolve(replace(case, threads=row.threads), config), PEERS[row.spin], folder) for row in rows}
    say(f"{len(rows)} rows in turns")
    with opened_workers(cases) as workers:
        results = {result.peer: result for result in measure_case(next(iter(cases.values()))[0], workers)}
    measured = []
    for row in rows:
        result = results[row.flags]
        measured.append(replace(row, reason=result.reason, frame_ms=result.latency.per_frame if result.latency else None))
    noise = tuple(dict.fromkeys(reason for result in results.values() for reason in result.noise.reasons))
    default = default_threads("none") or usable_cores()
    return Threads(str(bundle or case.bundle), default, tuple(measured), describe_machine(), noise)


def threads_text(found: Threads) -> str:
    """For a terminal."""
    lines = [f"{found.bundle}: ms per frame, all rows in turns; fp-run takes {found.default} when it is not told"]
    for row in found.rows:
        if row.frame_ms is None:
            lines.append(f"  {row.flags:<22} {row.reason or 'no figures'}")
        else:
            lines.append(f"  {row.flags:<22} {row.frame_ms.p50:8.2f} ms  ({row.frame_ms.low:.2f} to {row.frame_ms.high:.2f})")
    lines += [f"  noisy: {reason}" for reason in found.noise]
    fastest, usual = found.fastest, found.usual
    if fastest is not None and (usual is None or fastest.frame_ms.high < usual.frame_ms.low):
        lines.append(f"fastest: fp-run {fastest.flags}")
    elif fastest is not None:
        lines.append(f"none is clearly faster than {usual.flags}, what fp-run takes when it is not told")
    return "\n".join(lines) + "\n"


def write_threads(path: Path, found: Threads) -> None:
    """As JSON."""
    with whole_file(path) as file:
        file.write_text(json.dumps({"schema": SCHEMA, **asdict(found)}, indent=1) + "\n", encoding="utf-8")
