"""Is B slower than A, on a machine that others use too? Changes are ratios of times; every figure comes with its interval.

Times of one machine drift, come in bursts and are correlated from one sample to the next, so a repetition counts as one sample,
whatever it is made of. Three designs, the strongest that the samples allow:

- `paired`: A and B took turns. Neighbours share the machine's mood, and only the ratio within a pair counts: the Hodges-Lehmann
  median of the log ratios, with the distribution-free interval of Wilcoxon's signed-rank test (Hollander, Wolfe and Chicken,
  Nonparametric Statistical Methods, 3.2-3.3).
- `rounds`: whole runs took turns (A B A B ...), in processes of their own. What differs from process to process is part of the
  noise (Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, 2013), so a round is one sample: Student's interval.
- `blocks`: one run after the other. The standard error of the ratio of medians comes from a bootstrap of circular blocks
  (Politis and Romano 1992) of sqrt(n) neighbouring repetitions, which keeps their correlation; what happened to the machine
  between the two runs it cannot know.

Intervals hold for all rows of a comparison at once (Bonferroni): a table of a hundred rows raises a false alarm as rarely as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from factorportrait.errors import UserError

CONFIDENCE = 0.95  # of all intervals of a comparison together
POWER = 0.95  # of the minimum detectable change
MIN_ROUNDS = 4  # Student's quantile of 3 rounds is above 4 standard errors
MIN_BLOCKS = 3
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Change:
    """Relative change of a time from A to B: 0.1 is 10 % slower.

    Attributes:
        low, high: of the interval; -1 and None where there are too few samples for one.
        detectable: the slowdown that would be seen to exceed the limit in 19 of 20 such comparisons; None without an interval.
        design: paired, rounds or blocks.
        samples: pairs, rounds, or repetitions of the shorter run.
    """

    estimate: float
    low: float
    high: float | None
    detectable: float | None
    design: str
    samples: int


def compare_paired(base: Sequence[float], head: Sequence[float], limit: float = 0.0, rows: int = 1) -> Change:
    """base, head [n]: times of repetitions that took turns, in the order of running; limit: of `Change.detectable`."""
    ratios = np.log(np.asarray(head, float)) - np.log(np.asarray(base, float))
    means, n = np.sort(_walsh(ratios)), len(ratios)
    outside = signed_rank_quantile(n, _tail(rows))
    interval = (means[outside - 1], means[-outside]) if outside else None
    return _change(float(np.median(means)), interval, limit, rows, "paired", n)


def compare_rounds(
    base: Sequence[Sequence[float]], head: Sequence[Sequence[float]], limit: float = 0.0, rows: int = 1
) -> Change:
    """base, head [rounds][repetitions]: round i of both ran one after the other, in processes of their own."""
    ratios = np.array([math.log(np.median(h) / np.median(b)) for b, h in zip(base, head, strict=True)])
    n, mean, interval = len(ratios), float(ratios.mean()), None
    if n >= MIN_ROUNDS:
        half = _student(rows, n - 1) * ratios.std(ddof=1) / math.sqrt(n)
        interval = (mean - half, mean + half)
    return _change(mean, interval, limit, rows, "rounds", n)


def compare_blocks(base: Sequence[float], head: Sequence[float], limit: float = 0.0, rows: int = 1) -> Change:
    """base, head [n], [m]: times of repetitions of two runs, each in the order of running."""
    logs = [np.log(np.asarray(times, float)) for times in (base, head)]
    estimate = float(np.median(logs[1]) - np.median(logs[0]))
    n = min(map(len, logs))
    blocks, interval = n // block_length(n), None
    if blocks >= MIN_BLOCKS:
        rng = np.random.default_rng(0)
        medians = [np.median(times[block_indices(len(times), BOOTSTRAPS, rng)], axis=1) for times in logs]
        half = _student(rows, blocks - 1) * float((medians[1] - medians[0]).std(ddof=1))
        interval = (estimate - half, estimate + half)
    return _change(estimate, interval, limit, rows, "blocks", n)


def _tail(rows: int) -> float:
    """Probability outside on either side, so that `rows` intervals hold together."""
    return (1 - CONFIDENCE) / 2 / rows


def _student(rows: int, freedom: int) -> float:
    """Standard errors to either side, so that `rows` intervals hold together."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise UserError(
            "fp-bench compare", expected="scipy for runs that did not take turns", found="none",
            action='pip install "factorportrait[bench]"',
        ) from error  # fmt: skip
    return float(t.ppf(1 - _tail(rows), freedom))


def _change(
    estimate: float, interval: tuple[float, float] | None, limit: float, rows: int, design: str, samples: int
) -> Change:
    """From logarithms to relative changes."""
    if interval is None:
        return Change(math.expm1(estimate), -1.0, None, None, design, samples)
    low, high = map(float, interval)
    # The interval's own half width stands for its quantile times the standard error.
    quantile = NormalDist().inv_cdf
    detectable = math.log1p(limit) + (high - low) / 2 * (1 + quantile(POWER) / quantile(1 - _tail(rows)))
    return Change(math.expm1(estimate), math.expm1(low), math.expm1(high), math.expm1(detectable), design, samples)


def _walsh(values: np.ndarray) -> np.ndarray:
    """values [n] -> means of all pairs i <= j, [n * (n + 1) / 2]."""
    i, j = np.triu_indices(len(values))
    return (values[i] + values[j]) / 2


def signed_rank_quantile(n: int, tail: float) -> int:
    """Which smallest and which largest pair mean bound the median; 0 where n is too small for that.

    The largest k with P(W <= k - 1) <= tail, W the sum of the positive of n signed ranks.
    """
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1
    for rank in range(1, n + 1):
        chances[rank:] = chances[rank:] + chances[:-rank]
        chances /= 2
    return int(np.searchsorted(np.cumsum(chances), tail, side="right"))


def block_length(n: int) -> int:
    return math.ceil(math.sqrt(n))


def block_indices(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices [count, n] of resamples of n neighbours in circular blocks."""
    length = block_length(n)
    starts = rng.integers(0, n, (count, -(-n // length)))
    return ((starts[..., None] + np.arange(length)) % n).reshape(count, -1)[:, :n]
