"""Low-rank updates merged into a network's weights (LoRA, arXiv 2106.09685): W + alpha/rank * up @ down.

Names of the original release, of diffusers and PEFT, and of trainers that write underscores for points are understood.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from factorportrait.errors import CheckpointError
from factorportrait.export.weights import layouts
from factorportrait.export.weights.files import LazyTensor, Weights
from factorportrait.export.weights.networks import Opened, rows_of

_PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_KEY = re.compile(r"(?P<stem>.+?)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.(?P<kind>weight|bias)"
                  r"|(?P<single>alpha|diff|diff_b))")  # fmt: skip
_UNDERSCORES = ("lora_unet_", "lora_transformer_")
# Updates of other kinds, which are no such product.
_OTHERS = re.compile(r"\.(dora_scale|lokr_\w+|hada_\w+|oft_\w+|lora_mid)\b")
_ACTION = "take a LoRA that was trained for this network"


@dataclass
class _Update:
    """What a LoRA has for one module."""

    parts: dict[str, LazyTensor] = field(default_factory=dict)  # down, up, up_bias, alpha, diff, diff_b


def merge_lora(opened: Opened, lora: Weights, scale: float = 1.0) -> Opened:
    """A network whose weights are updated when they are read; nothing is read now but ranks' scales.

    Args:
        opened: a transformer.
        lora: of `open_weights`.
        scale: of the whole update.

    Raises:
        CheckpointError: not a LoRA, for another network, of two ranks, or of a kind that is no low-rank product.
    """
    if other := next((name for name in lora.tensors if _OTHERS.search(name)), None):
        raise CheckpointError(
            f"{lora.where}: {other}", expected="lora_A and lora_B, or lora_down and lora_up", found="another kind of update",
            action="merge it with its own tool first",
        )  # fmt: skip
    updates = _parsed(lora)
    rows = rows_of(opened.config)
    # The layout whose modules it names; a tie is a LoRA for another network, which is said below.
    bases = {layout: layouts.to_layout(opened.tensors, rows, layout) for layout in layouts.LAYOUTS}
    named = {layout: _with_points(updates, base) for layout, base in bases.items()}
    modules = {layout: {name.rpartition(".")[0] for name in base} for layout, base in bases.items()}
    layout = max(layouts.LAYOUTS, key=lambda layout: len(modules[layout] & set(named[layout])))
    base, updates = bases[layout], named[layout]
    unknown = [stem for stem in updates if stem not in modules[layout]]
    if unknown:
        near = difflib.get_close_matches(unknown[0], modules[layout], n=1)
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        raise CheckpointError(
            f"{lora.where}", expected=f"updates of this network's modules, in the {layout} layout",
            found=f"{unknown[0]}{more}" + (f" (nearest: {near[0]})" if near else ""), action=_ACTION,
        )  # fmt: skip
    for stem, update in updates.items():
        _apply(base, stem, update, scale, lora.where)
    merged = layouts.from_layout(base, rows, layout)
    ranks = sorted({update.parts["down"].shape[0] for update in updates.values() if "down" in update.parts})
    note = f"{lora.where}: {len(updates)} modules updated, rank {', '.join(map(str, ranks)) or 'full'}, scale {scale:g}"
    return replace(opened, tensors={name: merged[name] for name in opened.tensors}, notes=(*opened.notes, note))


def _parsed(lora: Weights) -> dict[str, _Update]:
    updates: dict[str, _Update] = {}
    for name, tensor in lora.tensors.items():
        match = _KEY.fullmatch(name)
        if not match:
            raise CheckpointError(
                f"{lora.where}: {name}", expected="names of a LoRA, which end in lora_A.weight, lora_down.weight, alpha or diff",
                found="another name", action="name a LoRA's file",
            )  # fmt: skip
        part = match["single"] or _PARTS[match["part"]] + ("_bias" if match["kind"] == "bias" else "")
        updates.setdefault(match["stem"], _Update()).parts[part] = tensor
    for stem, update in updates.items():
        missing = {"down", "up"} - set(update.parts)
        if len(missing) == 1 or ("alpha" in update.parts and missing):
            raise CheckpointError(
                f"{lora.where}: {stem}", expected="both factors of the product", found=f"no {' and no '.join(sorted(missing))}",
                action="copy the whole file",
            )  # fmt: skip
    return updates


def _with_points(updates: dict[str, _Update], base: Mapping[str, LazyTensor]) -> dict[str, _Update]:
    """Stems of trainers that write `lora_unet_blocks_0_self_attn_q` -> blocks.0.self_attn.q."""
    if not any(stem.startswith(_UNDERSCORES) for stem in updates):
        return updates
    known = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in base}
    shorts = {stem: next((stem.removeprefix(p) for p in _UNDERSCORES if stem.startswith(p)), stem) for stem in updates}
    return {known.get(short, short): updates[stem] for stem, short in shorts.items()}


def _apply(base: dict[str, LazyTensor], stem: str, update: _Update, scale: float, where: str) -> None:
    parts = update.parts
    if "down" in parts:
        weight, down, up = base[f"{stem}.weight"], parts["down"], parts["up"]
        rank = down.shape[0]
        if len(up.shape) < 2 or up.shape[1] != rank:
            raise CheckpointError(
                f"{where}: {stem}", expected=f"an up factor of rank {rank}, as down has", found=f"shape {list(up.shape)}",
                action="take both factors of one training",
            )  # fmt: skip
        numbers = [_size(down.shape[1:]), up.shape[0]]
        if numbers != [_size(weight.shape[1:]), weight.shape[0]] or _size(up.shape[2:]) != 1:
            raise CheckpointError(
                f"{where}: {stem}", expected=f"a product for shape {list(weight.shape)}",
                found=f"down {list(down.shape)}, up {list(up.shape)}", action=_ACTION,
            )  # fmt: skip
        factor = scale * (float(parts["alpha"].load()) / rank if "alpha" in parts else 1.0)
        base[f"{stem}.weight"] = _sum(weight, lambda: factor * (up.load().float().flatten(1) @ down.load().float().flatten(1)))
    for part, name in (("diff", "weight"), ("diff_b", "bias"), ("up_bias", "bias")):
        if part not in parts:
            continue
        key = f"{stem}.{name}"
        if key not in base or base[key].shape != parts[part].shape:
            raise CheckpointError(
                f"{where}: {stem}.{part}", expected=f"shape {list(base[key].shape)}" if key in base else f"a {name} to add to",
                found=f"{list(parts[part].shape)}", action=_ACTION,
            )  # fmt: skip
        base[key] = _sum(base[key], lambda part=part: scale * parts[part].load().float())


def _sum(weight: LazyTensor, delta) -> LazyTensor:
    """The weight plus an update, added in float32 and rounded once to the weight's type."""
    return replace(
        weight, load=lambda: (weight.load().float() + delta().reshape(weight.shape)).to(weight.dtype)
    )


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
