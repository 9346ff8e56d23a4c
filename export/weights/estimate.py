"""What the export of a large transformer takes, told before it starts: disk, memory and time of an export block by block."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from factorportrait.errors import UserError
from factorportrait.export.weights.files import LazyTensor
from factorportrait.memory import available_memory

# Bytes of a part's weight in torch, which computes what a graph is checked against; the graph and its session come on top.
TORCH_BYTES = 4
# Measured with 1 and 3 blocks of width 1536 on two cores: 98 and 107 MiB beside the weights, 14.5 and 25.8 seconds. The programs
# themselves (torch, ONNX Runtime, transformers) take half a gibibyte.
EXPORTER_BYTES = 650 * 2**20
SECONDS_PER_PART = 9.0
SECONDS_PER_BLOCK = 6.0
# What copying and hashing take beside it; a slow disk, so that a plan errs on the long side.
DISK_BYTES_PER_SECOND = 150 * 2**20
# Small constants and the graphs themselves, beside the weights.
GRAPH_SHARE = 0.02
MORE_MEMORY = "close other programs, or use a machine with more memory"


@dataclass(frozen=True)
class ExportPlan:
    """An export in parts.

    Attributes:
        part_blocks: blocks of each part.
        disk_bytes: that the bundle takes while it is written; an older one stays until the end.
        memory_bytes: of the process at its peak, the pages of the mapped source not counted.
        seconds: rough, on two cores.
    """

    part_blocks: tuple[int, ...]
    disk_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        parts = f"{len(self.part_blocks)} parts of up to {max(self.part_blocks)} blocks"
        return (
            f"{parts}: {_gib(self.disk_bytes)} on disk, {_gib(self.memory_bytes)} of memory, "
            f"about {math.ceil(self.seconds / 60)} minutes"
        )


def plan_export(
    tensors: Mapping[str, LazyTensor], weight_bytes: int, blocks_per_part: int = 1, beside_bytes: int = 0
) -> ExportPlan:
    """Plan the export of a transformer and of the smaller networks beside it.

    Args:
        tensors: its weights under our names; only shapes are looked at.
        weight_bytes: of a weight in the graph: 4 for fp32, 2 for fp16, 1 for int8.
        blocks_per_part: blocks that are exported together; all in one where it is large.
        beside_bytes: of the other networks' weights in fp32, which are in memory from the start to the end.
    """
    if blocks_per_part < 1 or weight_bytes < 1:
        raise ValueError(f"expected positive numbers, found {blocks_per_part} blocks and {weight_bytes} bytes")
    blocks: dict[int, int] = {}
    outside = 0
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        if match := re.match(r"blocks\.(\d+)\.", name):
            blocks[int(match[1])] = blocks.get(int(match[1]), 0) + count
        else:
            outside += count
    if not blocks:
        raise ValueError("expected the weights of a transformer, found no blocks")
    order = sorted(blocks)
    groups = [order[start : start + blocks_per_part] for start in range(0, len(order), blocks_per_part)]
    # What lies outside of the blocks goes with a part of its own: embeddings, head, adapters.
    largest = max(outside, *(sum(blocks[block] for block in group) for group in groups))
    beside = beside_bytes * weight_bytes // TORCH_BYTES
    disk = int(((sum(blocks.values()) + outside) * weight_bytes + beside) * (1 + GRAPH_SHARE))
    seconds = SECONDS_PER_PART * (len(groups) + 1) + SECONDS_PER_BLOCK * len(order) + 2 * disk / DISK_BYTES_PER_SECOND
    # A graph of another network is made beside its weights as one of the transformer is.
    memory = max(largest * (TORCH_BYTES + 2 * weight_bytes), 2 * beside) + beside_bytes + EXPORTER_BYTES
    return ExportPlan(tuple(map(len, groups)), disk, memory, seconds)


def check_room(plan: ExportPlan, output: Path, memory_bytes: int | None = None) -> None:
    """Raises UserError unless disk and memory are there.

    Args:
        output: where the bundle will be.
        memory_bytes: that may be used; None asks the system.
    """
    place = next(parent for parent in (output.resolve(), *output.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < plan.disk_bytes:
        raise UserError(
            f"--output {output}", expected=f"{_gib(plan.disk_bytes)} of free disk", found=_gib(free),
            action="free some space, or choose another place with --output",
        )  # fmt: skip
    smaller = max(plan.part_blocks) > 1
    action = "export fewer blocks at a time with --blocks-per-graph" if smaller else MORE_MEMORY
    check_memory("fp-export", plan.memory_bytes, action, memory_bytes)


def check_memory(what: str, needed_bytes: int, action: str, memory_bytes: int | None = None) -> None:
    """Raises UserError unless so much memory is there.

    Args:
        memory_bytes: that may be used; None asks the system.
    """
    memory = available_memory() if memory_bytes is None else memory_bytes
    if memory is not None and memory < needed_bytes:
        raise UserError(what, expected=f"{_gib(needed_bytes)} of free memory", found=_gib(memory), action=action)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
