"""Names of Wan transformer weights: the original layout, as in `dit.py`, and diffusers' WanTransformer3DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from factorportrait.errors import CheckpointError

Value = TypeVar("Value")

# Original -> diffusers, whole prefixes. Inside a block the name follows `blocks.N.`.
TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    # The trap: the affine norm before cross-attention is the third of the original and the second of diffusers.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}


def to_diffusers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the keys of the original layout to diffusers'; the values are the same objects.

    Raises:
        CheckpointError: a key is not part of the layout.
    """
    return {_rename(key, TOP, BLOCK, "the original Wan layout"): value for key, value in state_dict.items()}


def from_diffusers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Rename diffusers' keys to the original layout; the values are the same objects.

    Raises:
        CheckpointError: a key is not part of the layout.
    """
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, BLOCK))
    where = "diffusers' WanTransformer3DModel layout"
    return {_rename(key, top, block, where): value for key, value in state_dict.items()}


def _rename(key: str, top: Mapping[str, str], block: Mapping[str, str], layout: str) -> str:
    prefix, rest, names = "", key, top
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", key):
        prefix, rest, names = match[1], match[2], block
    stem, _, last = rest.rpartition(".")
    for old, suffix in ((rest, ""), (stem, f".{last}")):
        if old in names:
            return prefix + names[old] + suffix
    raise CheckpointError(f"weight {key!r}", expected=f"a name of {layout}", action="take weights of a Wan transformer")
