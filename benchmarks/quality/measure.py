"""The measurement: generate every case with the bundle, compare with the true render, keep the figures of every clip."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.benchmarks.quality import metrics
from factorportrait.benchmarks.quality.cases import (
    MODES,
    Autoencoder,
    Clip,
    Motion,
    World,
    describe_bundle,
    drive,
    make_clip,
    open_clips,
    regions,
    render,
)
from factorportrait.benchmarks.quality.fit import Fit, Reading, other_splits
from factorportrait.benchmarks.quality.report import SCHEMA, Report
from factorportrait.runtime.session import OpenBundle

REGION_EVERY = 4  # frames in which the colours of iris, hair, skin and lips are measured
READ_EVERY = 14  # frames in which expression, pose and camera are read: the first, the middle and the last of 29
READ = ("zeroed", "vae", "neutral_vae", "truth")  # what is read beside everything generated
FOLLOWED_FLOOR = 0.05  # sum of squared coefficients, without their means, below which a clip has no expression to follow
MAX_DISENTANGLEMENT_CASES = 8
SHEET_CLIPS = 8
STREAM_PERIOD = 100  # frames after which the driving of a stream repeats, so that every hundred shows the same
ZEROED = "expression=0"
ACTIONS = {  # what a person looks for in the sheet of single actions
    "mouth open": {"jawOpen": 0.9},
    "smile": {"mouthSmileLeft": 1.0, "mouthSmileRight": 1.0, "cheekSquintLeft": 0.6, "cheekSquintRight": 0.6},
    "pucker": {"mouthPucker": 1.0},
    "blink": {"eyeBlinkLeft": 1.0, "eyeBlinkRight": 1.0},
    "left eye": {"eyeBlinkLeft": 1.0},
    "brows up": {"browInnerUp": 1.0, "browOuterUpLeft": 1.0, "browOuterUpRight": 1.0},
    "look left": {"eyeLookOutLeft": 1.0, "eyeLookInRight": 1.0},
    "jaw right": {"jawRight": 1.0, "mouthRight": 0.6},
}
ACTION_FRAMES = 13
EXPRESSIONS = {
    "pictures": "pictures through the bundle's expression encoder",
    "arkit": "true ARKit coefficients through the bundle's map",
}


@dataclass(frozen=True)
class Settings:
    """What a run measures; see `fp-bench quality --help`.

    approximations: fields of `factorportrait.runtime.session.SessionOptions` that change the pictures, for all that is generated.
    self_only: every person driven by itself, nothing else and no reading of expression and pose: what `fp-bench pareto` needs.
    expression: what drives it, of `EXPRESSIONS`; "arkit" are the coefficients that the pictures were rendered with.
    expression_gain: of `SessionOptions`.
    """

    identities: int = 20
    frames: int = 29
    steps: tuple[int, ...] = ()
    modes: tuple[str, ...] = tuple(MODES)
    seed: int = 0
    generation: str | None = None
    stream: int = 0
    action_people: int = 2
    data: Path | None = None
    threads: int | None = None
    window: int | None = None
    approximations: Mapping[str, object] = field(default_factory=dict)
    self_only: bool = False
    expression: str = "pictures"
    expression_gain: float = 1.0


@dataclass
class Sheets:
    """Rows of (caption, pictures by title) for the contact sheets."""

    self_rows: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)
    cross_rows: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)
    action_rows: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)


def load_thresholds(path: Path | None = None) -> dict[str, float]:
    """Name -> value of the reviewed numbers in thresholds.toml."""
    text = (path or Path(__file__).with_name("thresholds.toml")).read_text(encoding="utf-8")
    return {name: entry["value"] for name, entry in tomllib.loads(text).items()}


class Bench:
    """One bundle, one world, one set of rulers."""

    def __init__(self, opened: OpenBundle, world: World, settings: Settings, lpips: metrics.Lpips):
        self.opened, self.world, self.settings, self.lpips = opened, world, settings, lpips
        self.config = opened.config
        self.autoencoder = Autoencoder(opened)
        self.thresholds = load_thresholds()
        own = self.config.generation.denoising_steps
        self.steps = settings.steps or (own,)
        self.primary_steps = own if own in self.steps else self.steps[0]
        options = opened.session(mode=settings.generation, window_frames=settings.window).options
        self.generation, self.window = options.mode, options.window_frames

    def generate(
        self, portrait: np.ndarray, expression: np.ndarray, normals: np.ndarray, motion: Motion, index: int,
        steps: int | None = None, guidance: str | None = None, mode: str | None = None,
    ) -> np.ndarray:  # fmt: skip
        """uint8 [T, H, W, 3]; the noise depends on the run's seed and `index` alone.

        Args:
            expression: pictures of `motion`'s.
            guidance: in place of the run's, in all steps.
        """
        sampler = {"guidance": "1", **self.settings.approximations}
        if guidance is not None:
            sampler |= {"guidance": guidance, "guidance_steps": None}
        return drive(
            self.opened, portrait, motion.coefficients if self.settings.expression == "arkit" else expression, normals, motion,
            steps=steps or self.primary_steps, mode=mode or self.generation,
            **sampler, window_frames=self.window, expression_gain=self.settings.expression_gain,
            seed=1000 * self.settings.seed + index,
        )  # fmt: skip

    def fit(self, clip: Clip, *motions: Motion) -> Fit | None:
        """The reader of pictures of the clip's person in a motion, with others to start from; None where nothing is read."""
        if self.settings.self_only:
            return None
        moments = [motion.select(slice(None, None, READ_EVERY)) for motion in motions]
        return Fit(self.world, clip.identity, clip.scene, clip.size, moments, also=clip.portrait_motion)

    def figures(self, name: str, pictures: np.ndarray, truth: Truth) -> dict[str, float | None]:
        """Every figure of a clip that was made one way; None where it cannot be measured."""
        out: dict[str, float | None] = {
            "psnr": metrics.psnr(pictures, truth.frames),
            "ssim": metrics.ssim(pictures, truth.frames),
            "lpips": self.lpips(pictures, truth.frames),
            "psnr_expression": metrics.psnr(pictures, truth.frames, truth.changed),
            "sharpness": metrics.sharpness(pictures, truth.frames, truth.inside),
            "flicker": metrics.flicker(pictures, truth.frames, self.thresholds["flicker_floor"]),
        }
        colours = metrics.region_colours(pictures[::REGION_EVERY], truth.regions, self.thresholds["region_pixels"])
        errors = metrics.colour_errors(colours, truth.colours)
        out |= {f"{name}_colour_error": errors.get(name) for name in ("iris", "hair", "skin", "lips")}
        out["identity_error"] = float(np.mean(list(errors.values()))) if errors else None
        read = name in READ or name.startswith("steps_")
        reading = truth.reading if name == "truth" else truth.read(pictures) if read else None
        return out | reading_errors(reading, truth.reading, truth.motion.select(slice(None, None, READ_EVERY)))

    def truth(self, clip: Clip, motion: Motion, frames: np.ndarray, normals: np.ndarray) -> Truth:
        """Everything that is known about a true render; the neutral render and the regions are made here."""
        neutral, _ = render(self.world, clip.identity, clip.scene, motion.neutral(), clip.size)
        masks = regions(
            self.world, clip, motion.select(slice(None, None, REGION_EVERY)), self.thresholds["region_change"]
        )
        fit = self.fit(clip, motion)
        return Truth(
            motion, frames, normals, neutral,
            metrics.changed_mask(frames, neutral, self.thresholds["expression_change"]),
            metrics.interior(normals, int(self.thresholds["sharpness_border"])),
            masks,
            metrics.region_colours(frames[::REGION_EVERY], masks, self.thresholds["region_pixels"]),
            fit, fit(frames[::READ_EVERY]) if fit else None,
        )  # fmt: skip

    def self_reenactment(self, clip: Clip, index: int, sheets: Sheets) -> dict[str, Any]:
        """The clip's own expression, pose and camera: every way of making it."""
        truth = self.truth(clip, clip.motion, clip.frames, clip.normals)
        made = {
            f"steps_{steps}": self.generate(clip.portrait, clip.frames, clip.normals, clip.motion, index, steps)
            for steps in self.steps
        }
        made["zeroed"] = self.generate(
            clip.portrait, clip.frames, clip.normals, clip.motion, index, guidance=ZEROED
        )  # fmt: skip
        made["vae"] = self.autoencoder(clip.frames)
        made["portrait_copied"] = np.broadcast_to(clip.portrait, clip.frames.shape)
        made["portrait_copied_vae"] = self.autoencoder(made["portrait_copied"])
        made["neutral"] = truth.neutral
        made["neutral_vae"] = self.autoencoder(truth.neutral)
        made["truth"] = clip.frames
        if len(sheets.self_rows) < SHEET_CLIPS:
            moment = truth.moment
            shown = {
                "portrait": clip.portrait, "truth": clip.frames[moment],
                "generated": made[f"steps_{self.primary_steps}"][moment], "expression zeroed": made["zeroed"][moment],
                "autoencoder": made["vae"][moment], "truth, neutral": truth.neutral[moment],
            }  # fmt: skip
            sheets.self_rows.append((f"{clip.name}, {MODES[clip.mode]}", shown))
        return {
            "person": clip.name, "mode": clip.mode, "changed_share": float(truth.changed.mean()),
            "methods": {name: self.figures(name, pictures, truth) for name, pictures in made.items()},
        }  # fmt: skip

    def cross_reenactment(self, clips: list[Clip], index: int, sheets: Sheets) -> dict[str, Any]:
        """Portrait of one, expression of the next, pose of the third, camera of the fourth, against that very render."""
        person, driver, poser, viewer = (clips[(index + k) % len(clips)] for k in range(4))
        motion = person.motion.mixed(driver.motion, poser.motion, viewer.motion)
        frames, normals = render(self.world, person.identity, person.scene, motion, person.size)
        truth = self.truth(person, motion, frames, normals)
        generated = self.generate(person.portrait, driver.frames, normals, motion, index)
        copied = np.broadcast_to(person.portrait, frames.shape)
        made = {f"steps_{self.primary_steps}": generated, "neutral": truth.neutral, "portrait_copied": copied}
        if len(sheets.cross_rows) < SHEET_CLIPS:
            moment = truth.moment
            shown = {
                "portrait A": person.portrait, "expression B": driver.frames[moment], "pose C": poser.frames[moment],
                "camera D": viewer.frames[moment], "truth": frames[moment], "generated": generated[moment],
            }  # fmt: skip
            sheets.cross_rows.append((f"{person.name} < {driver.name}", shown))
        methods = {name: self.figures(name, pictures, truth) for name, pictures in made.items()}
        drivers = self.colours(driver, driver.motion, driver.frames)
        for name, pictures in {**made, "truth": frames}.items():
            found = metrics.region_colours(pictures[::REGION_EVERY], truth.regions, self.thresholds["region_pixels"])
            errors = list(metrics.colour_errors(found, drivers).values())
            methods.setdefault(name, {})["identity_error_driver"] = float(np.mean(errors)) if errors else None
        return {
            "person": person.name, "expression": driver.name, "pose": poser.name, "camera": viewer.name, "methods": methods,
        }  # fmt: skip

    def colours(self, clip: Clip, motion: Motion, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Mean colours of the person's regions in every REGION_EVERY-th frame of a true render."""
        motion = motion.select(slice(None, None, REGION_EVERY))
        masks = regions(self.world, clip, motion, self.thresholds["region_change"])
        return metrics.region_colours(frames[::REGION_EVERY], masks, self.thresholds["region_pixels"])

    def disentanglement(self, clips: list[Clip], index: int) -> dict[str, Any]:
        """Changes of every factor's reading when one factor is taken from the next clip: generated, and true renders."""
        base, other = clips[index], clips[(index + 1) % len(clips)]
        variants = {
            None: (base, base, base.motion),
            "expression": (base, other, base.motion.mixed(expression=other.motion)),
            "pose": (base, base, base.motion.mixed(pose=other.motion)),
            "camera": (base, base, base.motion.mixed(camera=other.motion)),
            "identity": (other, base, base.motion),
        }
        about_base = self.fit(self._lit(base, base), base.motion)
        readings: dict[str | None, tuple[Traits, Traits]] = {}
        for factor, (person, driver, motion) in variants.items():
            fit = about_base
            if factor == "identity":
                fit = self.fit(self._lit(person, base), motion)
            elif factor in ("pose", "camera"):
                # Nothing changed, the head turned or the camera moved: which of them it was is for the picture to say.
                fit = self.fit(self._lit(base, base), motion, base.motion, *other_splits(motion, base.motion))
            readings[factor] = self._traits(base, person, driver, motion, index, fit)
        return {
            "person": base.name,
            "other": other.name,
            **{
                kind: {
                    factor: trait_changes(readings[None][side], readings[factor][side])
                    for factor in variants
                    if factor is not None
                }
                for side, kind in enumerate(("generated", "truth"))
            },
        }

    def _lit(self, person: Clip, base: Clip) -> Clip:
        """The person in the base clip's light, with the portrait that is taken there."""
        portrait, _ = render(self.world, person.identity, base.scene, person.portrait_motion, person.size)
        return replace(person, scene=base.scene, portrait=portrait[0])

    def _traits(
        self, base: Clip, person: Clip, driver: Clip, motion: Motion, index: int, fit: Fit | None
    ) -> tuple[Traits, Traits]:  # fmt: skip
        """What is read from the generated and from the true pictures of a combination, in the base clip's light."""
        lit = self._lit(person, base)
        frames, normals = render(self.world, person.identity, base.scene, motion, person.size)
        masks = regions(
            self.world, lit, motion.select(slice(None, None, REGION_EVERY)), self.thresholds["region_change"]
        )
        generated = self.generate(lit.portrait, driver.frames, normals, motion, index)
        few = self.thresholds["region_pixels"]
        return tuple(
            Traits(
                fit(pictures[::READ_EVERY]) if fit else None,
                metrics.region_colours(pictures[::REGION_EVERY], masks, few),
            )
            for pictures in (generated, frames)
        )

    def actions(self, clips: list[Clip], index: int, sheets: Sheets) -> dict[str, Any]:
        """Single actions of the next person, followed by this one with a still head in front of the camera."""
        person, driver = clips[index], clips[(index + 1) % len(clips)]
        still = np.zeros(ACTION_FRAMES, int)
        own, shown = person.portrait_motion.select(still), driver.portrait_motion.select(still)
        ease = np.clip(np.arange(ACTION_FRAMES) / 5, 0, 1)[:, None]
        truth_row: dict[str, np.ndarray] = {"portrait": person.portrait}
        made_row: dict[str, np.ndarray] = {"portrait": person.portrait}
        figures = {}
        fit = self.fit(person, own.select(slice(-1, None)))  # the head stands still
        for action, amounts in ACTIONS.items():
            target = np.zeros(len(ARKIT_NAMES))
            for name, amount in amounts.items():
                target[ARKIT_NAMES.index(name)] = amount
            motion, acted = (
                Motion((ease * target).astype(np.float32), m.rotation, m.translation, m.K, m.c2w) for m in (own, shown)
            )
            frames, normals = render(self.world, person.identity, person.scene, motion, person.size)
            driving, _ = render(self.world, driver.identity, driver.scene, acted, driver.size)
            neutral, _ = render(self.world, person.identity, person.scene, motion.neutral(), person.size)
            generated = self.generate(person.portrait, driving, normals, motion, index)
            changed = metrics.changed_mask(frames, neutral, self.thresholds["expression_change"])
            # Against the first pictures, which show a neutral face: what is always read is no action.
            first, last, true_first, true_last = (
                fit(shown) if fit else None for pictures in (generated, frames) for shown in (pictures[:1], pictures[-1:])
            )
            figures[action] = {
                "psnr_expression": metrics.psnr(generated, frames, changed),
                "neutral_psnr_expression": metrics.psnr(neutral, frames, changed),
                "followed": followed(stacked(first, last), stacked(true_first, true_last)),
            }
            truth_row[action], made_row[action] = frames[-1], generated[-1]
        sheets.action_rows += [(f"{person.name}, truth", truth_row), (f"{person.name}, generated", made_row)]
        return {"person": person.name, "driver": driver.name, "actions": figures}

    def stream(self, num_frames: int) -> dict[str, Any]:
        """One long stream whose driving goes to and fro, so that every hundred frames shows the same motion."""
        clip = make_clip(
            self.world, self.config, "all", STREAM_PERIOD // 2 + 1, self.settings.seed, self.settings.identities
        )  # fmt: skip
        period = np.r_[0 : STREAM_PERIOD // 2, STREAM_PERIOD // 2 : 0 : -1]
        order = np.tile(period, -(-num_frames // STREAM_PERIOD))[:num_frames]
        truth = clip.frames[order]
        generated = self.generate(
            clip.portrait, truth, clip.normals[order], clip.motion.select(order), self.settings.identities, mode="stream"
        )
        hundreds = [
            metrics.psnr(generated[start : start + STREAM_PERIOD], truth[start : start + STREAM_PERIOD])
            for start in range(0, num_frames, STREAM_PERIOD)
        ]
        generation = self.config.generation
        return {
            "person": clip.name, "frames": num_frames, "period": STREAM_PERIOD, "psnr_by_hundred": hundreds,
            "loss_db": hundreds[0] - hundreds[-1],
            "seam_ratio": metrics.seam_ratio(generated, truth, generation.chunk_frames),
        }  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """A true render and what follows from it.

    Attributes:
        frames, normals, neutral: uint8 [T, H, W, 3]; neutral is the render without expression.
        changed: [T, H, W] of pixels that expression changes; inside: of pixels inside the head.
        regions, colours: of every REGION_EVERY-th frame.
        fit, reading: of every READ_EVERY-th frame: the reader, and what it reads from the truth; None where nothing is read.
    """

    motion: Motion
    frames: np.ndarray
    normals: np.ndarray
    neutral: np.ndarray
    changed: np.ndarray
    inside: np.ndarray
    regions: dict[str, np.ndarray]
    colours: dict[str, np.ndarray]
    fit: Fit | None
    reading: Reading | None

    def read(self, pictures: np.ndarray) -> Reading | None:
        """Of pictures [T, H, W, 3] of the same moments."""
        return self.fit(pictures[::READ_EVERY]) if self.fit else None

    @property
    def moment(self) -> int:
        """The frame in which expression changes most."""
        return int(self.changed.sum((1, 2)).argmax())


@dataclass(frozen=True)
class Traits:
    """What the four factors look like in a clip."""

    reading: Reading | None
    colours: dict[str, np.ndarray]


def reader_notes(results: list[dict[str, Any]]) -> dict[str, float] | None:
    """How well the reader reads the true renders of this run, from a neutral start; None without readings.

    explained: share of the squared known coefficients; the others are mean errors.
    """
    rows = [case["methods"]["truth"] for case in results]
    if not rows or rows[0]["expression_error_known"] is None:
        return None
    names = ("expression_explained", "expression_error_known", "pose_error_known_deg")
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}


def reader_doubt(notes: dict[str, float] | None, least: float) -> str:
    """Why the reader's figures say little; empty when they can be trusted."""
    if notes is None or notes["expression_explained"] >= least:
        return ""
    found = 100 * notes["expression_explained"]
    return f"the reader explains {found:.0f} % of the true renders' expressions, {100 * least:.0f} % are needed"


def stacked(*readings: Reading | None) -> np.ndarray | None:
    """Coefficients [T, 52] of readings, one behind the other."""
    if any(reading is None for reading in readings):
        return None
    return np.concatenate([reading.coefficients for reading in readings])


def followed(found: np.ndarray | None, truth: np.ndarray | None, known: np.ndarray | None = None) -> float | None:
    """How far the truth's changes of expression are followed: slope of coefficients [T, 52] read from pictures over the truth's.

    Both without their means over the moments, so that what is always read counts for nothing. 0: not at all, 1: wholly; None where
    the truth does not change.

    Args:
        known: coefficients [T, 52] of the truth: they tell whether it changes. Readings of a still face vary.
    """
    if found is None or truth is None:
        return None
    found, truth, known = (values - values.mean(0) for values in (found, truth, truth if known is None else known))
    size = float(np.square(truth).sum())
    changes = min(size, float(np.square(known).sum()))
    return float((found * truth).sum()) / size if changes > FOLLOWED_FLOOR else None


def reading_errors(found: Reading | None, truth: Reading | None, known: Motion) -> dict[str, float | None]:
    """Expression (mean |coefficient|) and pose errors (degrees), against the reading of the truth, and against what is known.

    The first cancels what the reader itself gets wrong, the second is absolute and has the reader's own error as its floor.
    """
    names = (
        "expression_error", "pose_error_deg", "expression_followed", "expression_error_known", "pose_error_known_deg",
        "expression_explained",
    )  # fmt: skip
    if found is None or truth is None:
        return dict.fromkeys(names)
    missed = np.square(found.coefficients - known.coefficients).sum()
    values = (
        np.abs(found.coefficients - truth.coefficients).mean(),
        metrics.angles_deg(found.seen, truth.seen).mean(),
        followed(found.coefficients, truth.coefficients, known.coefficients),
        np.abs(found.coefficients - known.coefficients).mean(),
        metrics.angles_deg(found.seen, known.seen_rotation).mean(),
        1 - missed / max(np.square(known.coefficients).sum(), 1e-6),
    )
    return {name: None if value is None else float(value) for name, value in zip(names, values, strict=True)}


def trait_changes(a: Traits, b: Traits) -> dict[str, float | None]:
    """Change of each factor's reading: coefficients, degrees, degrees, 8-bit levels."""
    colours = metrics.colour_errors(a.colours, b.colours)
    identity = float(np.mean(list(colours.values()))) if colours else None
    if a.reading is None or b.reading is None:
        return {"expression": None, "pose": None, "camera": None, "identity": identity}
    return {
        "expression": float(np.abs(a.reading.coefficients - b.reading.coefficients).mean()),
        "pose": float(metrics.angles_deg(a.reading.head, b.reading.head).mean()),
        "camera": float(metrics.angles_deg(a.reading.camera, b.reading.camera).mean()),
        "identity": identity,
    }


def measure(opened: OpenBundle, settings: Settings, say: Callable[[str], None]) -> tuple[Report, Sheets]:
    """Run everything. `say` gets one line per case."""
    began = time.perf_counter()
    lpips = metrics.Lpips.load()
    world = World()
    bench, sheets = Bench(opened, world, settings, lpips), Sheets()
    clips: list[Clip] = []
    results: list[dict[str, Any]] = []
    wanted = open_clips(
        world, opened.config, settings.identities, settings.frames, settings.modes, settings.seed, settings.data
    )
    for index, clip in enumerate(wanted):
        clips.append(clip)
        results.append(bench.self_reenactment(clip, index, sheets))
        found = results[-1]["methods"][f"steps_{bench.primary_steps}"]
        say(f"self {index + 1}/{settings.identities} {clip.name} {clip.mode}: {found['psnr']:.2f} dB")
    others = {"cross": [], "disentanglement": [], "actions": []}
    if len(clips) > 1 and not settings.self_only:
        others = _others(bench, clips, sheets, say)
    stream = None
    if settings.stream:
        say(f"stream of {settings.stream} frames")
        stream = bench.stream(settings.stream)
    report = Report(
        schema=SCHEMA,
        bundle=describe_bundle(opened.bundle),
        settings={
            "identities": settings.identities, "frames": settings.frames, "steps": list(bench.steps),
            "primary_steps": bench.primary_steps, "modes": list(settings.modes), "seed": settings.seed,
            "generation": bench.generation, "chunk_frames": opened.config.generation.chunk_frames,
            "window_frames": bench.window, "approximations": dict(settings.approximations),
            "clips": "rendered" if settings.data is None else "shards of the test split",
            "expression": EXPRESSIONS[settings.expression], "expression_gain": settings.expression_gain,
        },
        thresholds=bench.thresholds,
        rulers={
            "reader": (notes := reader_notes(results)),
            "reader_missing": "" if notes else "they are not read with --self-only",
            "reader_doubt": reader_doubt(notes, bench.thresholds["reader_explained"]),
            "lpips_missing": lpips.reason,
        },
        clips=results,
        stream=stream,
        seconds=round(time.perf_counter() - began, 1),
        **others,
    )  # fmt: skip
    return report, sheets


def _others(bench: Bench, clips: list[Clip], sheets: Sheets, say: Callable[[str], None]) -> dict[str, list[dict]]:
    """What needs several people."""
    out: dict[str, list[dict]] = {"cross": [], "disentanglement": [], "actions": []}
    for index in range(len(clips)):
        out["cross"].append(bench.cross_reenactment(clips, index, sheets))
        say(f"cross {index + 1}/{len(clips)}")
    for index in range(min(len(clips), MAX_DISENTANGLEMENT_CASES)):
        out["disentanglement"].append(bench.disentanglement(clips, index))
        say(f"disentanglement {index + 1}/{min(len(clips), MAX_DISENTANGLEMENT_CASES)}")
    for index in range(bench.settings.action_people):
        out["actions"].append(bench.actions(clips, index, sheets))
        say(f"actions {index + 1}/{bench.settings.action_people}")
    return out
