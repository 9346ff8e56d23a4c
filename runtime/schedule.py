"""Schedules and guidance as tables: the loop reads numbers, it knows no scheduler by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from factorportrait.errors import UserError
from factorportrait.runtime import solvers

FACTORS = ("reference", "expression", "pose", "camera", "text")


@dataclass(frozen=True)
class Schedule:
    """One row per denoising step: `x = sample * x + sum(outputs[i] * v[i]) + noise * fresh noise`, `v[0]` the newest output.

    Attributes:
        timesteps: [steps], in 0..1000.
        sample: [steps].
        outputs: [steps, history]; a one-step scheduler has history 1.
        noise: [steps]; zero for a deterministic one.
    """

    timesteps: np.ndarray
    sample: np.ndarray
    outputs: np.ndarray
    noise: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def shifted_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """[num_steps + 1] noise levels from 1 to 0, moved towards noise by `shift`, as the authors of Wan sample."""
    return solvers.wan_sigmas(num_steps, shift)


def flow_schedule(num_steps: int, shift: float, solver: str = "euler", sigmas: np.ndarray | None = None) -> Schedule:
    """Flow matching, x = (1 - sigma) * clean + sigma * noise, the network predicting v = noise - clean.

    Args:
        num_steps: at least 1.
        shift: timestep shift; 1 for none.
        solver: "euler" integrates the ODE, and "flow-match" does on the levels of diffusers' scheduler of that name;
            "renoise" predicts the clean latent and noises it anew to the next sigma (consistency sampling, Song et al. 2023,
            algorithm 1), for networks distilled to few steps, such as Self-Forcing's;
            "unipc" and "dpm++" are multistep solvers of order 2, whose tables look back on all steps.
        sigmas: [num_steps + 1] levels from noise to 0 in place of the solver's own, such as `solvers.dynamic_sigmas`.

    Raises:
        UserError: num_steps is not positive.
        ValueError: another solver, or another number of sigmas.
    """
    if num_steps < 1:
        raise UserError("--steps", expected="1 or more", found=str(num_steps), action="4 is a good start")
    if solver not in _SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(_SOLVERS)}, found {solver!r}")
    levels, table = _SOLVERS[solver]
    sigmas = levels(num_steps, shift) if sigmas is None else np.asarray(sigmas, np.float64)
    if sigmas.shape != (num_steps + 1,):
        raise ValueError(f"sigmas: expected {num_steps + 1}, found {sigmas.shape}")
    timesteps = solvers.TRAIN_STEPS * sigmas[:-1]
    if table is None:
        now, following = sigmas[:-1], sigmas[1:]
        return Schedule(timesteps, 1 - following, (-now * (1 - following))[:, None], following)
    if table is not solvers.euler:
        # The multistep schedulers of diffusers hand the network whole timesteps, cut off, and compute with rounded levels.
        timesteps, sigmas = np.trunc(timesteps), solvers.as_float32(sigmas)
    return Schedule(timesteps, np.ones(num_steps), table(sigmas), np.zeros(num_steps))


# Noise levels and coefficients by a solver's name; "renoise" is no table of velocities.
_SOLVERS = {
    "euler": (solvers.wan_sigmas, solvers.euler),
    "flow-match": (solvers.flow_match_sigmas, solvers.euler),
    "renoise": (solvers.wan_sigmas, None),
    "unipc": (solvers.unipc_sigmas, solvers.unipc),
    "dpm++": (solvers.dpm_sigmas, solvers.dpm_solver),
}


def kept_steps(embeddings: np.ndarray, threshold: float) -> list[bool]:
    """In which steps the transformer is run when a step may take the velocity of the one before: step caching.

    After TeaCache (Liu et al. 2024, arXiv 2411.19108): while the modulation of the network changes little, so does its output. The
    relative L1 changes of the time embedding are summed since the last run, and a step whose sum stays below the threshold is
    skipped. They are known before the stream begins, so which steps run does not depend on data. The first and the last step do.

    Args:
        embeddings: [steps, ...], what the time embedding modulates the blocks with.
        threshold: 0 skips nothing.
    """
    kept, changed = [], 0.0
    for step, now in enumerate(embeddings):
        before = embeddings[step - 1]
        changed += float(np.abs(now - before).mean() / np.abs(before).mean()) if step else 0.0
        run = step in (0, len(embeddings) - 1) or changed >= threshold
        kept.append(run)
        if run:
            changed = 0.0
    return kept


@dataclass(frozen=True)
class Guidance:
    """Which conditions are dropped in each set, and how the sets' outputs are weighted in each step.

    Attributes:
        dropped: per set the factors that are taken away.
        weights: [steps, sets]; rows sum to 1. A set with weight 0 is not evaluated in that step.
    """

    dropped: tuple[frozenset[str], ...]
    weights: np.ndarray

    @property
    def num_sets(self) -> int:
        return len(self.dropped)


def constant_guidance(scales: dict[str, float], num_steps: int) -> Guidance:
    """Per-factor guidance with the same scale in all steps: v + sum((s_f - 1) * (v - v without f)).

    The factor "all" drops every condition at once, which is classifier-free guidance (Ho and Salimans 2022).
    """
    dropped: list[frozenset[str]] = [frozenset()]
    weights = [1.0]
    for factor, scale in scales.items():
        if scale == 1.0:
            continue
        dropped.append(frozenset(FACTORS) if factor == "all" else frozenset([factor]))
        weights.append(1.0 - scale)
        weights[0] += scale - 1.0
    used = [i for i, weight in enumerate(weights) if weight]
    return Guidance(tuple(dropped[i] for i in used), np.tile(np.array(weights)[used], (num_steps, 1)))


def limit_guidance(guidance: Guidance, num_guided: int) -> Guidance:
    """The same in the first `num_guided` steps; in those after, all conditions and no guidance (Kynkäänniemi et al. 2024)."""
    if num_guided >= len(guidance.weights):
        return guidance
    dropped, weights = guidance.dropped, guidance.weights
    if frozenset() not in dropped:
        dropped, weights = (frozenset(), *dropped), np.pad(weights, ((0, 0), (1, 0)))
    weights = weights.copy()
    weights[num_guided:] = [float(not drops) for drops in dropped]
    return Guidance(dropped, weights)


def parse_guidance(text: str, num_steps: int) -> Guidance:
    """`1` (none), `2.5` (all conditions together) or `expression=2,pose=1.5`.

    Raises:
        UserError: not of this form, an unknown factor, or a scale that is not finite.
    """
    expected = f"a number, or a list such as expression=2,pose=1.5 of {', '.join(FACTORS)}"
    error = UserError("--guidance", expected=expected, found=repr(text), action="1 switches guidance off")
    scales: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([a-z]+)\s*=\s*)?([-+0-9.eE]+)\s*", part)
        name = match and (match.group(1) or "all")
        if not match or name in scales or name not in (*FACTORS, "all") or (name == "all" and "," in text):
            raise error
        try:
            scales[name] = float(match.group(2))
        except ValueError:
            raise error from None
        if not np.isfinite(scales[name]):
            raise error
    return constant_guidance(scales, num_steps)


class NoiseSource:
    """Noise that depends on the seed, the latent frame and the step alone, so it does not change with the chunking.

    Philox (Salmon et al. 2011) keyed by the seed; the counter holds the latent frame and the step.
    """

    def __init__(self, seed: int, shape: tuple[int, int, int]):
        self._key = seed % 2**128
        self._drawn = np.zeros(shape, np.float32)  # [C, h, w]

    def draw(self, first_frame: int, num_frames: int, step: int, out: np.ndarray) -> np.ndarray:
        """Fill out [1, C, num_frames, h, w] float32 with standard normal noise."""
        for i in range(num_frames):
            generator = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, step, first_frame + i]))
            out[0, :, i] = generator.standard_normal(out=self._drawn, dtype=np.float32)
        return out
