"""What each layer costs when it alone is quantised: its network's output against fp32, on calibration samples."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from factorportrait.export.quantize.insert import quantize_graph
from factorportrait.export.quantize.recipe import Recipe, probe_session

# Which of a family's graphs is looked at, and its output.
PROBES = {"dit": ("dit_inplace", "dit"), "vae_encode": ("vae_encode_steady",), "vae_decode": ("vae_decode_steady",)}
NUM_SAMPLES = 2
REPORT = "sensitivity.csv"  # in an int8 bundle


@dataclass(frozen=True)
class Cost:
    """One group of layers quantised alone.

    Attributes:
        group: such as "dit/block 3 qkv"; layers: that it consists of.
        error: squared error of the network's first output over its squared size.
        weights: number of weights, which stands for the time that integers save.
    """

    group: str
    layers: tuple[str, ...]
    error: float
    weights: int

    @property
    def snr_db(self) -> float:
        """Signal to error; 200 where there is none."""
        return float(-10 * np.log10(max(self.error, 1e-20)))

    def to_dict(self) -> dict:
        """For the report."""
        return {**asdict(self), "snr_db": round(self.snr_db, 2)}


def group_of(layer: str) -> str:
    """Layers that are quantised together: those of one input, such as a block's q, k and v; others stand alone."""
    return re.sub(r"\.self_attn\.[qkv]$", ".self_attn.qkv", layer)


def groups_of(recipe: Recipe) -> dict[str, list[str]]:
    """Group -> its int8 layers."""
    groups: dict[str, list[str]] = {}
    for layer in recipe.candidates:
        groups.setdefault(group_of(layer), []).append(layer)
    return groups


def measure_costs(
    graphs: Mapping[str, Path],
    samples: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    recipe: Recipe,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cost]:
    """Quantise each group of layers alone and compare the first output of its network, the worst first."""
    groups, costs = groups_of(recipe), []
    references: dict[str, list[np.ndarray]] = {}
    for i, (group, layers) in enumerate(groups.items()):
        on_group(i, len(groups))
        family = group.partition("/")[0]
        stages = PROBES.get(family, (family,))
        stage = next((name for name in stages if samples.get(name)), None)
        if stage is None:
            continue
        # Spread over the recording, so that they come from several clips.
        recorded = samples[stage]
        chosen = [recorded[at] for at in np.linspace(0, len(recorded) - 1, NUM_SAMPLES).round().astype(int)]
        if stage not in references:
            references[stage] = _first_outputs(ir.load(graphs[stage]), graphs[stage], chosen)
        model = ir.load(graphs[stage])
        quantize_graph(model, recipe.only(layers).of(stage, model), "cpu")
        found = _first_outputs(model, graphs[stage], chosen)
        pairs = list(zip(found, references[stage], strict=True))
        error = sum(float(((a - b) ** 2).sum()) for a, b in pairs) / max(sum(float((b**2).sum()) for _, b in pairs), 1e-30)
        costs.append(Cost(group, tuple(layers), error, sum(recipe.weights[layer] for layer in layers)))
    on_group(len(groups), len(groups))
    return sorted(costs, key=lambda cost: -cost.error)


def _first_outputs(model: ir.Model, path: Path, samples: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    session, names = probe_session(model, path, ())
    return [session.run(names[:1], dict(sample))[0].astype(np.float64) for sample in samples]


def costs_table(costs: Sequence[Cost], limit: int = 20):
    """The most sensitive groups as a table for people."""
    from rich.table import Table

    shown = min(limit, len(costs))
    table = Table(title=f"What quantising one group alone costs: the worst {shown} of {len(costs)}", title_justify="left")
    table.add_column("group")
    for column in ("signal to error, dB", "weights"):
        table.add_column(column, justify="right")
    for cost in costs[:limit]:
        table.add_row(cost.group, f"{cost.snr_db:.1f}", f"{cost.weights:,}")
    return table


def write_report(path: Path, costs: Sequence[Cost], recipe: Recipe) -> None:
    """All groups as a table for spreadsheets, the most sensitive first, and what the recipe does with each."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["group", "signal_to_error_db", "weights", "mode"])
        for cost in costs:
            rows.writerow([cost.group, f"{cost.snr_db:.2f}", cost.weights, recipe.layers[cost.layers[0]].mode])


def families_of(recipe: Recipe) -> list[str]:
    """Networks with int8 layers."""
    return sorted({layer.partition("/")[0] for layer in recipe.candidates})


