"""Which layers stay in float so that the budget on quality is met: the costliest first, as few as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from factorportrait.export.quantize.gate import GateResult
from factorportrait.export.quantize.recipe import Recipe
from factorportrait.export.quantize.sensitivity import Cost


@dataclass(frozen=True)
class Mix:
    """A recipe, the groups that it leaves in float beyond layers.toml, and its figures on the clips that it was chosen with."""

    recipe: Recipe
    in_float: tuple[str, ...]
    result: GateResult


def ranked(costs: Sequence[Cost], family_errors: Mapping[str, float]) -> list[Cost]:
    """Groups by what leaving them in float gains per weight that is not multiplied in integers.

    A network's share of the error of the video is spread over its groups as their errors at its output are.
    """
    totals: dict[str, float] = {}
    for cost in costs:
        family = cost.group.partition("/")[0]
        totals[family] = totals.get(family, 0.0) + cost.error

    def gain(cost: Cost) -> float:
        family = cost.group.partition("/")[0]
        share = cost.error / totals[family] if totals[family] else 0.0
        return family_errors.get(family, 0.0) * share / max(cost.weights, 1) ** 0.5

    return sorted(costs, key=gain, reverse=True)


def choose_mix(
    recipe: Recipe, order: Sequence[Cost], evaluate: Callable[[Recipe], GateResult], on_trial: Callable[[int, GateResult], None]
) -> Mix:
    """The mix with the fewest groups in float that passes, found by bisection along `order`.

    Args:
        evaluate: figures of a recipe against its limits.
        on_trial: told how many groups were left in float, and the figures.

    Returns:
        A mix that passed, or the best of those that did not.
    """
    tried: dict[int, Mix] = {}

    def trial(count: int) -> Mix:
        if count not in tried:
            left = order[:count]
            mixed = recipe.without([layer for cost in left for layer in cost.layers])
            tried[count] = Mix(mixed, tuple(cost.group for cost in left), evaluate(mixed))
            on_trial(count, tried[count].result)
        return tried[count]

    if trial(0).result.passed:
        return tried[0]
    if not trial(len(order)).result.passed:
        return max(tried.values(), key=lambda mix: mix.result.psnr_db)
    low, high = 0, len(order)
    step = 4
    while high - low > 1:
        # From the end where little is in float: a mix that passes is usually near it.
        middle = min(low + step, (low + high) // 2) if low + step < high else (low + high) // 2
        low, high, step = (low, middle, step) if trial(middle).result.passed else (middle, high, 2 * step)
    return tried[high]
