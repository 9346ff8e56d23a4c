"""Expression, pose and camera read from pictures of a known person, by fitting the true renderer to them.

Analysis by synthesis: who is shown and in which light is known here, so what a picture shows is the 52 coefficients, head
rotation and camera whose true render comes closest to it. Nothing is trained, and nothing comes from the model that is judged.

The face starts neutral and the head turned away from what was asked for. So a picture that says nothing is not read as right,
and reading true renders shows what the reader itself gets wrong. The camera does start where an explanation has it. Whether a
head has turned or the camera has moved around it is told by the shoulders alone, at the lower edge: where that matters, fits
start from each of both explanations, and the picture decides.

Gauss-Newton on softened pictures of half the size, first for the head, then for the camera, then for everything. The
derivative of a parameter is a difference of two renders; those of expressions are made once per moment at a neutral face for
all pictures of it, and again for the coefficients that a picture uses. Coefficients stay within 0..1 in every solution
(bounded least squares), and near 0 where a picture says little. Each channel may have a little gain and offset, so that a tint
is no expression. Residuals count as Huber (1964) weighs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from factorportrait.arkit import ARKIT_NAMES
from factorportrait.benchmarks.quality.cases import Motion, World

NUM_COEFFICIENTS = len(ARKIT_NAMES)
HEAD, ORBIT, SHIFT = (slice(NUM_COEFFICIENTS + 3 * i, NUM_COEFFICIENTS + 3 * (i + 1)) for i in range(3))
NUM_PARAMETERS = NUM_COEFFICIENTS + 9
ALL = np.arange(NUM_PARAMETERS)
COEFFICIENTS, POSE = ALL[:NUM_COEFFICIENTS], ALL[NUM_COEFFICIENTS:]
TURN = np.r_[ALL[HEAD], ALL[SHIFT]]  # what moves first: the camera stays at its explanation unless the picture says otherwise
NUM_NUISANCE = 6  # gain and offset of each channel
ROUNDS, ITERATIONS = 2, 2  # of derivatives, once head and camera are found; and of steps with the same ones
STEPS = np.r_[np.full(NUM_COEFFICIENTS, 0.4), np.full(6, np.radians(2.0)), np.full(3, 0.006)]  # of the differences; radians, metres
USED = 0.1  # coefficients above it get new derivatives in a new round
START_TURN = np.radians(2.5)  # how far off the head is where a fit starts
PRIOR = 0.3  # standard deviation of a coefficient, as the dataset draws them
PRIOR_CAMERA = np.radians(1.0)  # of the camera's turn away from where an explanation has it
NOISE = 30.0  # 8-bit levels that a value may be off; neighbours err together, so it is more than one value's error
HUBER = 20.0  # 8-bit levels beyond which a residual counts linearly
MAX_TURN, MAX_MOVE = np.radians(6.0), 0.02  # of one step; radians, metres
TINT_BOUNDS = np.r_[np.full(3, 40.0), np.full(3, 0.25 * 255)]  # offset in 8-bit levels, gain as what it makes of white
HIGH = np.r_[np.ones(NUM_COEFFICIENTS), np.full(6, MAX_TURN), np.full(3, MAX_MOVE)]  # coefficients as they are, the rest as changes
LOW = np.where(np.arange(NUM_PARAMETERS) < NUM_COEFFICIENTS, 0.0, -HIGH)
PRIORS = np.r_[np.full(NUM_COEFFICIENTS, (NOISE / PRIOR) ** 2), np.zeros(3), np.full(3, (NOISE / PRIOR_CAMERA) ** 2), np.zeros(3)]


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


class Start:
    """Where fits of a moment begin, with the derivatives that all of them use.

    Args:
        stage: must have been entered.
        base: T = 1; its coefficients are not looked at.
        values: what the fit begins with, about the base.
    """

    def __init__(self, stage: Stage, base: Motion, values: np.ndarray):
        self.stage, self.base, self.values = stage, base, values
        self.made = self.render(values)
        self._turn = self.columns(TURN, values, self.made)
        self._expression: np.ndarray | None = None

    def render(self, values: np.ndarray) -> np.ndarray:
        return soften(self.stage.picture(self.base, values))

    def columns(self, which: np.ndarray, values: np.ndarray, made: np.ndarray) -> np.ndarray:
        """Derivatives [values, parameters] of the softened picture about values, whose picture is `made`."""
        columns = np.empty((made.size, len(which)), np.float32)
        for column, i in zip(columns.T, which, strict=True):
            step = STEPS[i] if i >= NUM_COEFFICIENTS or values[i] < 0.5 else -STEPS[i]
            moved = values.copy()
            moved[i] += step
            column[:] = (self.render(moved) - made).ravel() / step
        return columns

    def expression(self) -> np.ndarray:
        """Derivatives of the coefficients at the base's neutral face."""
        if self._expression is None:
            still = np.zeros(NUM_PARAMETERS)
            self._expression = self.columns(COEFFICIENTS, still, self.render(still))
        return self._expression

    def pose(self, wanted: np.ndarray) -> tuple[float, np.ndarray]:
        """Softened picture -> the smallest cost of a neutral face, and where its head is."""
        return self._round(wanted, TURN, self._turn, self.values, self.made)

    def everything(self, wanted: np.ndarray, found: tuple[float, np.ndarray]) -> tuple[float, np.ndarray]:
        """The same with camera and expression, from what `pose` found."""
        made = self.render(found[1])
        again = self._round(wanted, POSE, self.columns(POSE, found[1], made), found[1], made)
        found = min(found, again, key=lambda pair: pair[0])
        for round_ in range(ROUNDS):
            values = found[1]
            made = self.render(values)
            expression = self.expression()
            if round_:
                used = np.flatnonzero(values[:NUM_COEFFICIENTS] > USED)
                expression = expression.copy()
                expression[:, used] = self.columns(used, values, made)
            columns = np.concatenate([expression, self.columns(POSE, values, made)], 1)
            again = self._round(wanted, ALL, columns, values, made)
            found = min(found, again, key=lambda pair: pair[0])
        return found

    def _round(
        self, wanted: np.ndarray, which: np.ndarray, columns: np.ndarray, values: np.ndarray, made: np.ndarray
    ) -> tuple[float, np.ndarray]:  # fmt: skip
        """Steps of some parameters with the same derivatives -> the smallest cost and where it is."""
        best = (np.inf, values)
        for _ in range(ITERATIONS):
            step, cost = solve(wanted, made, values, which, columns)
            best = min(best, (cost, values), key=lambda pair: pair[0])
            values = values.copy()
            values[which] += step
            made = self.render(values)
        return min(best, (cost_of(wanted, made, values)[0], values), key=lambda pair: pair[0])


def tint_of(wanted: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a gain and an offset of each channel explain: derivatives [values, 6], what is left [values], weights of that."""
    tints = np.zeros((*made.shape, NUM_NUISANCE), np.float32)
    for channel in range(3):
        tints[..., channel, channel] = 1
        tints[..., channel, 3 + channel] = made[..., channel] / 255
    tints = tints.reshape(-1, NUM_NUISANCE)
    left = target = (wanted - made).ravel()
    weights = np.ones_like(target)
    for _ in range(2):
        weighted = tints * weights[:, None]
        amounts = np.linalg.solve(weighted.T @ tints + np.eye(NUM_NUISANCE), weighted.T @ target)
        left = target - tints @ amounts.clip(-TINT_BOUNDS, TINT_BOUNDS).astype(np.float32)
        weights = np.minimum(1, HUBER / np.maximum(np.abs(left), 1e-6))
    return tints, left, weights


def cost_of(wanted: np.ndarray, made: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Huber's cost of what is left behind the best tint, with the priors'; derivatives of the tint, and weights."""
    tints, left, weights = tint_of(wanted, made)
    size = np.abs(left)
    huber = np.where(size < HUBER, left**2, HUBER * (2 * size - HUBER)).sum(dtype=np.float64)
    return float(huber + (PRIORS * np.square(values)).sum()), tints, weights


def solve(
    wanted: np.ndarray, made: np.ndarray, values: np.ndarray, which: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, float]:  # fmt: skip
    """The change of the parameters `which` that explains most of what is left, within their bounds; and the cost before it."""
    from scipy.linalg import cholesky, solve_triangular
    from scipy.optimize import lsq_linear

    cost, tints, weights = cost_of(wanted, made, values)
    matrix = np.concatenate([columns, tints], 1)
    weighted = matrix * weights[:, None]
    prior = np.r_[np.maximum(PRIORS[which], 1e-3), np.ones(NUM_NUISANCE)]
    at = np.r_[np.where(PRIORS[which] > 0, values[which], 0), np.zeros(NUM_NUISANCE)]
    factor = cholesky((weighted.T @ matrix).astype(np.float64) + np.diag(prior))
    target = weighted.T @ (wanted - made).ravel() - prior * at
    low, high = (np.r_[bound[which], tint] for bound, tint in ((LOW, -TINT_BOUNDS), (HIGH, TINT_BOUNDS)))
    inside = np.r_[which < NUM_COEFFICIENTS, np.zeros(NUM_NUISANCE, bool)]
    low, high = (np.where(inside, bound - at, bound) for bound in (low, high))
    high = np.maximum(high, low + 1e-9)
    found = lsq_linear(factor, solve_triangular(factor, target, trans=1), (low, high), method="bvls")
    return found.x[: len(which)], cost


class Fit:
    """Fits about every moment of motions of one person.

    Args:
        motions: explanations of T moments to start from, such as the motion asked for and those of `other_splits`.
        also: moments to start from besides in every one, such as the portrait's: a picture that ignores the pose asked for
            is then read where it is. The start that is nearest once its head is fitted counts.
    """

    def __init__(
        self, world: World, identity: Any, scene: Any, size: tuple[int, int], motions: Sequence[Motion], also: Motion | None = None
    ):  # fmt: skip
        self._stage = Stage(world, identity, scene, size)
        self._stage.enter()
        *explanations, self._also = (
            [Start(self._stage, moments.select(slice(t, t + 1)), turned_away(t)) for t in range(len(moments))] if moments else []
            for moments in (*motions, also)
        )
        self._moments = list(zip(*explanations, strict=True))

    def __call__(self, pictures: np.ndarray) -> Reading:
        """uint8 [T, H, W, 3], T of the motion."""
        self._stage.enter()
        rows = []
        for moment, picture in zip(self._moments, pictures, strict=True):
            wanted = soften(picture)
            starts = [(start, start.pose(wanted)) for start in (*moment, *self._also)]
            start, found = min(starts, key=lambda pair: pair[1][0])
            cost, values = start.everything(wanted, found)
            head, camera = apart(start.base, values)
            rows.append((values[:NUM_COEFFICIENTS], head, camera[:3, :3].T, cost))
        return Reading(*(np.stack(column) for column in zip(*rows, strict=True)))


def turned_away(moment: int) -> np.ndarray:
    """Parameters of a neutral face whose head is off, about an axis that changes from moment to moment."""
    values = np.zeros(NUM_PARAMETERS)
    values[HEAD] = START_TURN * np.eye(3)[moment % 3]
    return values


def other_splits(motion: Motion, before: Motion) -> list[Motion]:
    """The same view of the head with the other's head, and with the other's camera: all by moving around it, all by turning it."""
    turn = before.rotation @ np.swapaxes(motion.rotation, 1, 2)
    c2w = motion.c2w.copy()
    c2w[:, :3, :3] = turn @ motion.c2w[:, :3, :3]
    c2w[:, :3, 3] = (turn @ motion.c2w[:, :3, 3:])[..., 0]
    turned = np.swapaxes(before.camera_rotation, 1, 2) @ motion.seen_rotation
    return [
        replace(motion, rotation=before.rotation, translation=before.translation, c2w=c2w),
        replace(motion, rotation=turned, K=before.K, c2w=before.c2w),
    ]
