"""The gate: videos of a bundle with fewer bits against those of fp32, and against the truth.

`python -m factorportrait.export.quantize.gate FP32_BUNDLE BUNDLE` gives the figures of any two bundles of one checkpoint. With
`--engine torch` an fp16 bundle's are those of PyTorch, which rounds after every operator as a GPU does; ONNX Runtime's CPU
kernels compute most of it in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.bundle import Bundle
from factorportrait.errors import UserError
from factorportrait.export.quantize.clips import TEST_SPLIT, DrivenClip, demo_clips, longest_clip, media_clips


@dataclass(frozen=True)
class Limits:
    """What gates.toml lets pass."""

    min_psnr_db: float
    max_loss_db: float
    reason: str


@dataclass(frozen=True)
class Row:
    """One clip in one mode. `psnr_db` between the two videos; the other two against the truth, None without one."""

    clip: str
    mode: str
    psnr_db: float
    reference_db: float | None
    quantized_db: float | None


@dataclass(frozen=True)
class GateResult:
    """Figures of a bundle, and what they had to be."""

    precision: str
    limits: Limits
    rows: tuple[Row, ...]

    @property
    def psnr_db(self) -> float:
        """Between the two videos: of the mean squared error over all clips."""
        return float(-10 * np.log10(np.mean([10 ** (-row.psnr_db / 10) for row in self.rows])))

    @property
    def loss_db(self) -> float | None:
        """Mean PSNR against the truth, fp32's minus this bundle's."""
        losses = [row.reference_db - row.quantized_db for row in self.rows if row.reference_db is not None]
        return float(np.mean(losses)) if losses else None

    @property
    def passed(self) -> bool:
        """Whether both figures are within the limits; NaN is not."""
        loss = self.loss_db
        return self.psnr_db >= self.limits.min_psnr_db and (loss is None or loss <= self.limits.max_loss_db)

    def to_dict(self) -> dict:
        """For the manifest and --json."""
        loss = self.loss_db
        return {
            "precision": self.precision, "psnr_db": round(self.psnr_db, 3), "min_psnr_db": self.limits.min_psnr_db,
            "loss_db": None if loss is None else round(loss, 4), "max_loss_db": self.limits.max_loss_db,
            "passed": self.passed, "clips": [asdict(row) for row in self.rows],
        }  # fmt: skip


class GateFailed(UserError):
    """A bundle is worse than its precision may be; `result` has the table."""

    def __init__(self, result: GateResult, action: str):
        limits, loss = result.limits, result.loss_db
        found = f"{result.psnr_db:.1f} dB" + ("" if loss is None else f", {loss:.2f} dB lost")
        super().__init__(
            f"quality of the {result.precision} bundle",
            expected=f"{limits.min_psnr_db:g} dB or more between its videos and fp32's, {limits.max_loss_db:g} dB or less lost "
            "against the truth",
            found=found, action=action,
        )  # fmt: skip
        self.result = result


def load_limits(precision: str, max_loss_db: float | None = None) -> Limits:
    """Of a precision, from gates.toml, with a budget in the place of the table's."""
    table = _table()
    if precision not in table or precision == "clips":
        raise UserError("quality gate", expected="a precision of gates.toml", found=precision, action="compare another bundle")
    limits = Limits(**table[precision])
    return limits if max_loss_db is None else Limits(limits.min_psnr_db, max_loss_db, "--max-quality-loss-db")


def _table() -> dict:
    return tomllib.loads(Path(__file__).with_name("gates.toml").read_text(encoding="utf-8"))


def gate_clips(bundle: Bundle, folder: Path | None) -> list[DrivenClip]:
    """The clips to judge a bundle with: test people of the demo's world, or a user's own, which have no truth."""
    clips = _table()["clips"]
    frames = min(clips["frames"], longest_clip(bundle.config))
    if folder is not None:
        return media_clips(bundle, folder, frames)
    return demo_clips(bundle.config, TEST_SPLIT, clips["count"], frames, clips["seed"])


class Judge:
    """Generates clips with the fp32 bundle once, and compares other bundles with that."""

    def __init__(self, reference: Bundle, clips: Sequence[DrivenClip], *, threads: int | None = None, seed: int = 0):
        if not clips:
            raise UserError("quality gate", expected="at least one clip", found="none", action="name a folder of clips")
        self.clips, self.threads, self.seed = list(clips), threads, seed
        self.modes = reference.config.generation.modes
        self._videos = self._generate(reference)

    def compare(
        self, bundle: Bundle, limits: Limits, on_clip: Callable[[str], None] = lambda name: None, **opening: Any
    ) -> GateResult:
        """Figures of a bundle of the same checkpoint; `opening` are keywords of `open_bundle`, such as the engine."""
        videos = self._generate(bundle, on_clip, **opening)
        rows = []
        for clip in self.clips:
            for mode in self.modes:
                expected, found = self._videos[clip.name, mode], videos[clip.name, mode]
                truth = clip.truth
                rows.append(
                    Row(
                        clip.name, mode, psnr(found, expected),
                        None if truth is None else psnr(expected, truth), None if truth is None else psnr(found, truth),
                    )
                )  # fmt: skip
        return GateResult(bundle.manifest.precision, limits, tuple(rows))

    def _generate(
        self, bundle: Bundle, on_clip: Callable[[str], None] = lambda name: None, **opening: Any
    ) -> dict[tuple[str, str], np.ndarray]:
        from factorportrait.runtime.session import open_bundle

        opened = open_bundle(bundle.path, threads=self.threads, verify=False, **opening)
        videos = {}
        for clip in self.clips:
            on_clip(clip.name)
            for mode in self.modes:
                session = opened.session(mode=mode, seed=self.seed)
                session.set_reference(clip.portrait)
                videos[clip.name, mode] = np.stack(list(session.frames(clip.driving)))
        return videos


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """dB of uint8 videos; 100 where they are equal."""
    error = float(np.mean((found.astype(np.float32) - expected.astype(np.float32)) ** 2))
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


def gate_table(result: GateResult):
    """The figures as a table for people."""
    from rich.table import Table

    title = f"{result.precision} against fp32: limits {result.limits.min_psnr_db:g} dB and {result.limits.max_loss_db:g} dB lost"
    table = Table(title=title, title_justify="left")
    for column in ("clip", "mode"):
        table.add_column(column)
    for column in ("video against video", "fp32 against truth", "this against truth"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(row.clip, row.mode, f"{row.psnr_db:.1f}", _db(row.reference_db), _db(row.quantized_db))
    loss = "" if result.loss_db is None else f"{result.loss_db:.3f} dB lost"
    table.add_row("all", "passed" if result.passed else "missed", f"{result.psnr_db:.1f}", "", loss)
    return table


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Compare two bundles of one checkpoint and return 2 if the gate is missed."""
    from factorportrait.command import run_command

    parser = argparse.ArgumentParser(prog="python -m factorportrait.export.quantize.gate", description=__doc__)
    parser.add_argument("reference", type=Path, metavar="FP32_BUNDLE")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--clips", type=Path, metavar="DIR", help="clips of your own (default: test people of the demo's world)")
    parser.add_argument("--engine", metavar="NAME", help="of BUNDLE, such as torch (default: the best one that runs here)")
    parser.add_argument("--checkpoint", type=Path, help="the bundles' checkpoint, for --engine torch (default: the demo's)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)

    def run() -> int:
        from rich.console import Console

        reference, bundle = Bundle(options.reference), Bundle(options.bundle)
        judge = Judge(reference, gate_clips(reference, options.clips), threads=options.threads)
        limits = load_limits(bundle.manifest.precision)
        result = judge.compare(bundle, limits, engine=options.engine, checkpoint=options.checkpoint)
        print(json.dumps(result.to_dict())) if options.json else Console().print(gate_table(result))
        return 0 if result.passed else 2

    return run_command(parser.prog, run)


if __name__ == "__main__":
    sys.exit(main())
