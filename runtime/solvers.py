"""Solvers of the flow-matching ODE as tables of coefficients, in float64.

A solver is written as in its paper, on rows that stand for samples: row . (x_0, v_0, v_1, ...) is the sample, where x_0 is the
noise and v_k what the network says in step k. Every one of them leaves x_0 with weight 1, so a step adds velocities of this and
earlier steps to the sample, and a table needs nothing else: x_{k+1} = x_k + sum_j b[k, j] v_{k-j}.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

TRAIN_STEPS = 1000
# At sigma 1 nothing is left of the clean latent and its log signal-to-noise ratio is infinite: diffusers starts just below.
FIRST_SIGMA = 1 - 1e-6

Row = np.ndarray  # [1 + steps]


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels moved towards noise (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def wan_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """[num_steps + 1] from 1 to 0, as the authors of Wan sample."""
    return shift_sigmas(np.linspace(1.0, 0.0, num_steps + 1), shift)


def flow_match_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """[num_steps + 1] as diffusers' FlowMatchEulerDiscreteScheduler: its lowest level is shifted before the spacing and again."""
    lowest = shift_sigmas(np.array(1 / TRAIN_STEPS), shift)
    return np.append(shift_sigmas(np.linspace(1.0, lowest, num_steps), shift), 0.0)


def dynamic_sigmas(num_steps: int, mu: float) -> np.ndarray:
    """[num_steps + 1] with diffusers' dynamic shifting, whose exponential of mu is the shift; mu follows from the resolution."""
    return np.append(shift_sigmas(np.linspace(1.0, 1 / TRAIN_STEPS, num_steps), math.exp(mu)), 0.0)


def unipc_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """[num_steps + 1] as diffusers' UniPCMultistepScheduler with flow sigmas: from just below 1 to 0."""
    sigmas = shift_sigmas(np.linspace(1.0, 1 / TRAIN_STEPS, num_steps + 1)[:-1], shift)
    sigmas[0] = FIRST_SIGMA
    return np.append(sigmas, 0.0)


def dpm_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """[num_steps + 1] as diffusers' DPMSolverMultistepScheduler with flow sigmas: from 0.999, shifted, to 0."""
    sigmas = 1.0 - np.linspace(1.0, 1 / TRAIN_STEPS, num_steps + 1)
    return np.append(shift_sigmas(sigmas, shift)[:0:-1], 0.0)


def euler(sigmas: np.ndarray) -> np.ndarray:
    """[steps, 1]: x + (next sigma - sigma) v."""
    return np.diff(sigmas)[:, None]


def dpm_solver(sigmas: np.ndarray) -> np.ndarray:
    """[steps, steps]: DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv 2211.01095, algorithm 2); first and last of order 1."""
    alphas, lambdas = _signal(sigmas)
    num_steps = len(sigmas) - 1

    def step(k: int, x: Row, clean: list[Row]) -> Row:
        h = lambdas[k + 1] - lambdas[k]
        estimate = clean[-1]
        if 0 < k < num_steps - 1:
            ratio = (lambdas[k] - lambdas[k - 1]) / h
            estimate = estimate + (clean[-1] - clean[-2]) / (2 * ratio)
        return sigmas[k + 1] / sigmas[k] * x - alphas[k + 1] * math.expm1(-h) * estimate

    return _table(sigmas, step)


def unipc(sigmas: np.ndarray, order: int = 2) -> np.ndarray:
    """[steps, steps]: UniPC with B(h) = e^h - 1, on clean estimates (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 and 7).

    The order grows from 1 and falls to 1 towards the end; every step but the first corrects the sample it starts from.
    """
    alphas, lambdas = _signal(sigmas)
    num_steps = len(sigmas) - 1
    used = 0  # order of the step before
    last: Row | None = None  # its corrected sample

    def update(x: Row, start: int, clean: list[Row], order: int, now: Row | None) -> Row:
        """From level `start` to the next; clean[-1] was seen at `start`, `now` at the end of a step that is corrected."""
        h = lambdas[start + 1] - lambdas[start]
        ratios = [(lambdas[start - i] - lambdas[start]) / h for i in range(1, order)]
        slopes = [(clean[-1 - i] - clean[-1]) / ratio for i, ratio in enumerate(ratios, 1)]
        ratios = np.array([*ratios, 1.0])
        b, phi, factorial = [], math.expm1(-h) / -h - 1, 1
        for i in range(1, order + 1):
            b.append(phi * factorial / math.expm1(-h))
            factorial *= i + 1
            phi = phi / -h - 1 / factorial
        powers = ratios[None] ** np.arange(order)[:, None]
        # The paper's closed forms where there is one unknown.
        if now is None:
            weights = [0.5] if order == 2 else np.linalg.solve(powers[:-1, :-1], b[:-1]) if order > 2 else []
        else:
            slopes.append(now - clean[-1])
            weights = [0.5] if order == 1 else np.linalg.solve(powers, b)
        change = sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), np.zeros_like(x))
        return sigmas[start + 1] / sigmas[start] * x - alphas[start + 1] * math.expm1(-h) * (clean[-1] + change)

    def step(k: int, x: Row, clean: list[Row]) -> Row:
        nonlocal used, last
        if k > 0:
            x = update(last, k - 1, clean[:-1], used, clean[-1])
        used, last = min(order, num_steps - k, k + 1), x
        return update(x, k, clean, used, None)

    return _table(sigmas, step)


def as_float32(sigmas: np.ndarray) -> np.ndarray:
    """The levels as diffusers keeps them: a sigma just below 1 leaves a signal level that float32 rounds by 5 percent."""
    return sigmas.astype(np.float32).astype(np.float64)


def _signal(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signal levels and half log signal-to-noise ratios; the last of these is infinite."""
    with np.errstate(divide="ignore"):
        return 1 - sigmas, np.log(1 - sigmas) - np.log(sigmas)


def _table(sigmas: np.ndarray, step: Callable[[int, Row, list[Row]], Row]) -> np.ndarray:
    """Run a solver on rows. step(k, sample, clean estimates so far) -> the next sample."""
    num_steps = len(sigmas) - 1
    basis = np.eye(1 + num_steps)
    x, clean, table = basis[0], [], np.zeros((num_steps, num_steps))
    for k in range(num_steps):
        clean.append(x - sigmas[k] * basis[1 + k])
        after = step(k, x, clean)
        table[k, : k + 1] = (after - x)[1 : k + 2][::-1]
        x = after
    return table
