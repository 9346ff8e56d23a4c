"""python -m demo.train vae|expression|latents|dit|export|evaluate|all --preset cpu|gpu --data DIR --work DIR

The checkpoint is written to WORK/checkpoint unless --out says otherwise, by `export`, and by `dit` while it trains.
`init --from CHECKPOINT` makes states of released weights, so that training goes on from there.
Every phase continues from its state in --work and skips what is finished; --minutes bounds the time that a phase may take in all.
--stop-after bounds this run: it saves and ends with exit code 3 when there is more to do, and the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

from demo.presets import PRESETS
from demo.train import phases
from factorportrait.command import run_command
from factorportrait.errors import UserError

log = logging.getLogger(__name__)
PHASES = ("vae", "expression", "latents", "dit", "export", "evaluate")
MORE_TO_DO = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("phase", choices=("init", *PHASES, "all"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test of demo.dataset")
    parser.add_argument("--work", type=Path, required=True, help="states, curves and cached latents")
    parser.add_argument("--out", type=Path, help="checkpoint folder of dit and export (default: WORK/checkpoint)")
    parser.add_argument("--from", dest="start", type=Path, default=Path("demo/checkpoint"), help="checkpoint folder of init")
    parser.add_argument("--minutes", type=float, help="time of this phase, all runs together (default: the preset's)")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="time of this run")
    parser.add_argument("--device", help="cpu or cuda (default: the preset's)")
    parser.add_argument("--clips", type=int, default=32, help="test clips of evaluate")
    args = parser.parse_args(arguments)
    check_arguments(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    deadline = time.monotonic() + 60 * args.stop_after
    out = args.out or args.work / "checkpoint"
    job = phases.Job(PRESETS[args.preset], args.data, args.work, out, args.minutes, args.device, args.clips, deadline)
    log.info("%s on %s", args.phase, job.device)  # what no phase can run on is said before anything is read
    if args.phase == "init":
        phases.run_init(job, args.start)
        return 0
    wanted = PHASES if args.phase == "all" else (args.phase,)
    for phase in wanted:
        finished = getattr(phases, f"run_{phase}")(job)
        if not finished or (job.out_of_time and phase != wanted[-1]):
            return MORE_TO_DO
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: UserError: a number that no run can have."""
    for name, least in (("clips", 1), ("minutes", 0), ("stop_after", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN is nothing
            raise UserError(
                f"--{name.replace('_', '-')}", expected=f"{least} or more", found=str(value), action="choose another number"
            )


if __name__ == "__main__":
    raise SystemExit(run_command("demo.train", main))
