"""Expression, pose and camera read from pictures of a known person, by fitting the true renderer to them.

Analysis by synthesis: who is shown and in which light is known here, so what a picture shows is the 52 coefficients, head
rotation and camera whose true render comes closest to it. Nothing is trained, and nothing comes from the model that is judged.

Gauss-Newton on softened pictures of half the size, from a NEUTRAL face (a face that does not move reads as one that does not
move). The derivative of a parameter is a difference of two renders, made once per moment for all pictures of it; those of
parameters that a picture uses are made again about what was found. Each channel may have another gain and offset, so that a
tint is no expression. Residuals count as Huber (1964) weighs them. Coefficients that a picture says little about stay near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.benchmarks.quality.cases import Motion, World

NUM_COEFFICIENTS = len(ARKIT_NAMES)
HEAD, ORBIT, SHIFT = (slice(NUM_COEFFICIENTS + 3 * i, NUM_COEFFICIENTS + 3 * (i + 1)) for i in range(3))
NUM_PARAMETERS = NUM_COEFFICIENTS + 9
NUM_NUISANCE = 6  # gain and offset of each channel
ROUNDS, ITERATIONS = 2, 2  # of derivatives, and of steps with the same ones
STEPS = np.r_[np.full(NUM_COEFFICIENTS, 0.4), np.full(6, np.radians(2.0)), np.full(3, 0.006)]  # of the differences; radians, metres
USED = 0.1  # coefficients above it get new derivatives in a new round
PRIOR = 0.3  # standard deviation of a coefficient, as the dataset draws them
NOISE = 30.0  # 8-bit levels that a value may be off; neighbours err together, so it is more than one value's error
HUBER = 20.0  # 8-bit levels beyond which a residual counts linearly
MAX_TURN = np.radians(6.0)  # of one iteration
MAX_MOVE = 0.02  # metres


@dataclass(frozen=True)
class Reading:
    """What T pictures show: coefficients [T, 52] and rotations [T, 3, 3].

    Attributes:
        head: head space, against the shoulders (pose).
        camera: world -> camera: how the shoulders are seen.
        cost: [T], what is left of the difference; comparable between readings of the same pictures.
    """

    coefficients: np.ndarray
    head: np.ndarray
    camera: np.ndarray
    cost: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """[T, 3, 3] head -> camera."""
        return self.camera @ self.head

    @staticmethod
    def best(readings: Sequence[Reading]) -> Reading:
        """Of several readings of the same pictures, moment by moment, that with the smallest cost."""
        choice = np.stack([reading.cost for reading in readings]).argmin(0)
        moments = np.arange(len(choice))
        return Reading(
            *(
                np.stack([getattr(reading, name) for reading in readings])[choice, moments]
                for name in ("coefficients", "head", "camera", "cost")
            )
        )


def rotation_from_vector(vector: np.ndarray) -> np.ndarray:
    """Axis times angle [3] in radians -> [3, 3] (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = np.asarray(vector) / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def soften(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] of even sides -> [H/2, W/2, 3] float32: the mean of four, then [1 2 1]/4 both ways."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    small = picture.reshape(height, 2, width, 2, 3).astype(np.float32).mean((1, 3))
    padded = np.pad(small, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


class Stage:
    """One person in one scene, in front of the true renderer."""

    def __init__(self, world: World, identity: Any, scene: Any, size: tuple[int, int]):
        self._renderer = world.dataset.renderer_for(*size)
        self._head = identity.head()
        self._appearance = world.appearance.Appearance(identity, self._head, scene)

    def enter(self) -> None:
        """Make this person the one whom the (shared) renderer draws."""
        self._renderer.set_appearance(self._appearance)

    def picture(self, base: Motion, values: np.ndarray) -> np.ndarray:
        """base: one moment (T = 1); values [NUM_PARAMETERS]: coefficients, and changes to base's head and camera."""
        head, camera = apart(base, values)
        coefficients = values[:NUM_COEFFICIENTS]
        return self._renderer.picture(self._head, coefficients, head, base.translation[0], base.K[0], camera)


def apart(base: Motion, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters about a moment -> head rotation [3, 3], c2w [4, 4]: turned about the head, then moved along its axes."""
    head = rotation_from_vector(values[HEAD]) @ base.rotation[0]
    camera = base.c2w[0].astype(np.float64).copy()
    turn = rotation_from_vector(values[ORBIT])
    camera[:3, :3] = turn @ camera[:3, :3]
    camera[:3, 3] = turn @ camera[:3, 3] + camera[:3, :3] @ values[SHIFT]
    return head, camera


class MomentFit:
    """The fit about one moment of a motion: derivatives at a neutral face once, then any number of pictures."""

    def __init__(self, stage: Stage, base: Motion):
        """The stage must have been entered. base: T = 1; its coefficients are not looked at."""
        self._stage, self._base = stage, base
        still = np.zeros(NUM_PARAMETERS)
        self._neutral = self._made(still)
        self._derivative = np.stack([self._column(i, still, self._neutral) for i in range(NUM_PARAMETERS)], 1)

    def first(self, picture: np.ndarray) -> tuple[float, np.ndarray]:
        """uint8 [H, W, 3] -> cost and parameters after the first round, whose derivatives are there already."""
        return self._round(soften(picture), np.zeros(NUM_PARAMETERS), self._neutral, self._derivative)

    def read(self, picture: np.ndarray, found: tuple[float, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """The same and what `first` found -> coefficients [52], head [3, 3], world -> camera [3, 3], cost."""
        wanted = soften(picture)
        for _ in range(ROUNDS - 1):
            values = found[1]
            made = self._made(values)
            again = self._round(wanted, values, made, self._renewed(values, made))
            found = min(found, again, key=lambda pair: pair[0])
        cost, values = found
        head, camera = apart(self._base, values)
        return values[:NUM_COEFFICIENTS], head, camera[:3, :3].T, cost

    def _round(
        self, wanted: np.ndarray, values: np.ndarray, made: np.ndarray, derivative: np.ndarray
    ) -> tuple[float, np.ndarray]:  # fmt: skip
        """Steps with the same derivatives from values, whose picture is `made` -> the smallest cost and where it is."""
        best = (np.inf, values)
        for _ in range(ITERATIONS):
            step, cost = self._step(wanted, made, values, derivative)
            best = min(best, (cost, values), key=lambda pair: pair[0])
            values = limited(values, step)
            made = self._made(values)
        return min(best, (self._step(wanted, made, values, derivative)[1], values), key=lambda pair: pair[0])

    def _made(self, values: np.ndarray) -> np.ndarray:
        return soften(self._stage.picture(self._base, values))

    def _column(self, i: int, values: np.ndarray, made: np.ndarray) -> np.ndarray:
        """Derivative of the softened picture by parameter i about values, whose picture is `made`."""
        step = STEPS[i] if i >= NUM_COEFFICIENTS or values[i] < 0.5 else -STEPS[i]
        moved = values.copy()
        moved[i] += step
        return (self._made(moved) - made).ravel() / step

    def _renewed(self, values: np.ndarray, made: np.ndarray) -> np.ndarray:
        """Derivatives with those renewed that matter here: of coefficients that are used, and of head and camera."""
        derivative = self._derivative.copy()
        used = np.flatnonzero(values[:NUM_COEFFICIENTS] > USED)
        for i in (*used, *range(NUM_COEFFICIENTS, NUM_PARAMETERS)):
            derivative[:, i] = self._column(i, values, made)
        return derivative

    def _step(
        self, wanted: np.ndarray, made: np.ndarray, values: np.ndarray, derivative: np.ndarray
    ) -> tuple[np.ndarray, float]:  # fmt: skip
        """The change of the parameters that explains most of what is left, and the cost before it."""
        nuisance = np.zeros((*made.shape, NUM_NUISANCE), np.float32)
        for channel in range(3):
            nuisance[..., channel, channel] = 1
            nuisance[..., channel, 3 + channel] = made[..., channel] / 255
        nuisance = nuisance.reshape(-1, NUM_NUISANCE)
        target = (wanted - made).ravel()
        # Gain and offset first, by themselves: so a tint is not taken for movement, and the cost is that of the best tint.
        weights = np.ones_like(target)
        for _ in range(2):
            normal = (nuisance * weights[:, None]).T @ nuisance + np.diag([1e-3] * 3 + [20.0] * 3)
            tint = np.linalg.solve(normal, (nuisance * weights[:, None]).T @ target)
            left = target - nuisance @ tint
            weights = np.minimum(1, HUBER / np.maximum(np.abs(left), 1e-6))
        prior = np.r_[np.full(NUM_COEFFICIENTS, (NOISE / PRIOR) ** 2), np.full(9, 1e-3), [1e-3] * 3 + [20.0] * 3]
        matrix = np.concatenate([derivative, nuisance], 1)
        weighted = matrix * weights[:, None]
        at = np.r_[values[:NUM_COEFFICIENTS], np.zeros(9 + NUM_NUISANCE)]
        step = np.linalg.solve(weighted.T @ matrix + np.diag(prior), weighted.T @ target - prior * at)
        huber = np.where(np.abs(left) < HUBER, left**2, HUBER * (2 * np.abs(left) - HUBER)).sum()
        return step[:NUM_PARAMETERS], float(huber + (prior * at**2).sum())


def limited(values: np.ndarray, step: np.ndarray) -> np.ndarray:
    """values + step, with turns and moves no larger than the derivatives are good for, and coefficients in 0..1."""
    step = step.copy()
    for part, most in ((HEAD, MAX_TURN), (ORBIT, MAX_TURN), (SHIFT, MAX_MOVE)):
        step[part] *= min(1.0, most / max(float(np.linalg.norm(step[part])), 1e-12))
    out = values + step
    out[:NUM_COEFFICIENTS] = out[:NUM_COEFFICIENTS].clip(0, 1)
    return out


class Fit:
    """Fits about every moment of a motion of one person.

    Args:
        also: moments to start from besides, such as the portrait's: a picture that ignores the pose asked for is then
            read where it is. The start that is nearest after its first round counts.
    """

    def __init__(
        self, world: World, identity: Any, scene: Any, size: tuple[int, int], motion: Motion, also: Motion | None = None
    ):  # fmt: skip
        self._stage = Stage(world, identity, scene, size)
        self._stage.enter()
        self._moments = [MomentFit(self._stage, motion.select(slice(t, t + 1))) for t in range(len(motion))]
        self._also = [MomentFit(self._stage, also.select(slice(t, t + 1))) for t in range(len(also))] if also else []

    def __call__(self, pictures: np.ndarray) -> Reading:
        """uint8 [T, H, W, 3], T of the motion."""
        self._stage.enter()
        rows = []
        for moment, picture in zip(self._moments, pictures, strict=True):
            starts = [(fit, fit.first(picture)) for fit in (moment, *self._also)]
            nearest, found = min(starts, key=lambda start: start[1][0])
            rows.append(nearest.read(picture, found))
        return Reading(*(np.stack(column) for column in zip(*rows, strict=True)))
