"""The plans of a bundle, each built in a process of its own unless the store has it."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from factorportrait.bundle import Bundle
from factorportrait.engines.tensorrt.builder import Job
from factorportrait.engines.tensorrt.machine import Machine
from factorportrait.engines.tensorrt.plans import Options, Plan, PlanStore, Request
from factorportrait.errors import UserError

TARGET = "tensorrt"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """`stage`, number `step` of `num_steps`, is at `fraction` 0..1 of its build; `phase` is what TensorRT calls its work."""

    step: int
    num_steps: int
    stage: str
    fraction: float = 0.0
    phase: str = ""


OnProgress = Callable[[Progress], None]


def requests_of(bundle: Bundle, machine: Machine, options: Options, stages: Collection[str] | None = None) -> list[Request]:
    """A request per stage of the bundle as TensorRT runs it, in the manifest's order.

    Args:
        stages: only these; None for all.

    Raises:
        BundleError: the bundle is not for TensorRT, or has no such stage.
    """
    names = stages if stages is not None else bundle.manifest.target_stages(TARGET)
    return [Request(bundle, bundle.stage(name, TARGET), machine, options) for name in names]


def build_plans(
    bundle: Bundle,
    store: PlanStore,
    machine: Machine,
    options: Options | None = None,
    *,
    stages: Collection[str] | None = None,
    again: bool = False,
    on_progress: OnProgress = lambda progress: None,
    notice: Callable[[str], None] = _log.warning,
) -> list[tuple[Plan, bool]]:
    """All plans of a bundle, and for each whether it was built now.

    Args:
        bundle: with graphs for TensorRT.
        store: where plans are kept.
        machine: this one, from `machine.probe`.
        options: how to build; None for the defaults.
        stages: only these; None for all.
        again: build though there are plans.
        on_progress: called now and then.
        notice: is given lines for the user: why a plan is built again, that another process builds.

    Raises:
        UserError: the bundle is not for TensorRT, a graph is refused, or the plans cannot be written.
    """
    requests = requests_of(bundle, machine, options or Options(), stages)
    done = []
    for i, request in enumerate(requests):
        on_progress(Progress(i, len(requests), request.spec.name))
        done.append(get_plan(store, request, again=again, on_progress=on_progress, notice=notice, place=(i, len(requests))))
    return done


def get_plan(
    store: PlanStore,
    request: Request,
    *,
    again: bool = False,
    on_progress: OnProgress = lambda progress: None,
    notice: Callable[[str], None] = _log.warning,
    place: tuple[int, int] = (0, 1),
) -> tuple[Plan, bool]:
    """One plan, from the store or built now; see `build_plans`."""
    name = request.spec.name

    def build(path: Path) -> None:
        notice(f"plan of {name}: {'asked to build again' if again else store.why_missing(request)}; building")
        log = store.folder / f"{store.path(request).name}.log"
        job = Job(
            name, str(request.bundle.file(request.spec.file).resolve()), str(path), str(store.timing_cache(request.machine)),
            str(log), tuple(request.profiles), request.options,
        )  # fmt: skip

        def hear(message: dict) -> None:
            if "notice" in message:
                notice(message["notice"])
            elif "fraction" in message:
                on_progress(Progress(*place, name, message["fraction"], message["phase"]))

        run_job(job, hear)
        log.unlink(missing_ok=True)

    return store.get(request, build, again=again, on_wait=lambda: notice(f"plan of {name}: waiting for another build to end"))


def run_job(job: Job, hear: Callable[[dict], None]) -> None:
    """Build in a process of its own, its messages in the job's log.

    Args:
        hear: is given what the process tells, see `builder.build`.

    Raises:
        UserError: the process says why it failed, or ended without a word.
    """
    # -P: a folder called tensorrt where the user stands is not the library.
    command = [sys.executable, "-P", "-m", "factorportrait.engines.tensorrt.builder"]
    ended: dict = {}
    with (
        open(job.log, "w", encoding="utf-8") as log,
        # A session of its own: Ctrl-C reaches this process, which ends that one.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            process.stdin.write(job.to_json())
            process.stdin.close()
            for line in process.stdout:
                message = _message(line)
                if message is None:
                    log.write(line)
                elif "done" in message or "error" in message:
                    ended = message
                else:
                    hear(message)
        except BrokenPipeError:
            pass  # it ended before it read; its exit code says how
        except BaseException:
            process.kill()
            raise
    if "error" in ended:
        error = ended["error"]
        raise UserError(error["what"], expected=error["expected"], found=error["found"], action=error["action"])
    if "done" not in ended:
        raise UserError(
            f"building the plan of {job.stage}", expected="TensorRT to build it", found=_ending(process.returncode),
            action=f"all messages are in {job.log}; a graph that ends the library is worth a report with its file",
        )  # fmt: skip


def _message(line: str) -> dict | None:
    """What a line of the process says; None for what the library printed itself."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process killed, as the system does when memory is short"
    if code < 0:
        return f"a crash of the library ({signal.Signals(-code).name})"
    return f"a process that ended with code {code}"
