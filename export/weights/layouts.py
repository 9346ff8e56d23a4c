"""Names of Wan weights: one table per network, ours beside the original release and diffusers.

Ours are the original names but for Animate's motion encoder, whose original numbers hide what a layer does. A row renames a
module, or a parameter that has no module of its own; `{}` stands for a number. Where values change too, the row says how, and
every change is exact: halves of a matrix, or axes of length 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from factorportrait.config import VAEConfig
from factorportrait.errors import CheckpointError

LAYOUTS = ("original", "diffusers")


@dataclass(frozen=True)
class Row:
    """One module's name in three layouts.

    Attributes:
        ours: in `export/models`.
        diffusers: there; several where diffusers keeps slices of one matrix apart (along axis 0).
        original: in the authors' release; None where it is the same as ours.
        bias_axes: the original's bias has axes of length 1 around it, [1,C,1,1].
    """

    ours: str
    diffusers: str | tuple[str, ...]
    original: str | None = None
    bias_axes: bool = False

    def names(self, layout: str) -> tuple[str, ...]:
        """This row's names in a layout."""
        if layout == "original":
            return (self.ours if self.original is None else self.original,)
        return (self.diffusers,) if isinstance(self.diffusers, str) else self.diffusers


_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}

TRANSFORMER = (
    Row("patch_embedding", "patch_embedding"),
    Row("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    Row("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    Row("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    Row("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    Row("time_projection.1", "condition_embedder.time_proj"),
    Row("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    Row("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    Row("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    Row("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    *(Row(f"blocks.{{}}.self_attn.{ours}", f"blocks.{{}}.attn1.{theirs}") for ours, theirs in _PROJECTIONS.items()),
    *(Row(f"blocks.{{}}.cross_attn.{ours}", f"blocks.{{}}.attn2.{theirs}") for ours, theirs in _PROJECTIONS.items()),
    *(Row(f"blocks.{{}}.cross_attn.{ours}", f"blocks.{{}}.attn2.{theirs}") for ours, theirs in _IMAGE.items()),
    # The trap: the affine norm before cross-attention is the third of the original and the second of diffusers.
    Row("blocks.{}.norm3", "blocks.{}.norm2"),
    Row("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    Row("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    Row("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    Row("head.head", "proj_out"),
    Row("head.modulation", "scale_shift_table"),
)

# Wan2.1-Fun: diffusers has no such model, so these names are the original's there too.
FUN = (
    Row("ref_conv", "ref_conv"),
    Row("control_adapter.conv", "control_adapter.conv"),
    Row("control_adapter.residual_blocks.{}.conv1", "control_adapter.residual_blocks.{}.conv1"),
    Row("control_adapter.residual_blocks.{}.conv2", "control_adapter.residual_blocks.{}.conv2"),
)

_APPEARANCE = "motion_encoder.enc.net_app.convs"


def animate(num_levels: int) -> tuple[Row, ...]:
    """Wan2.2-Animate beside `TRANSFORMER`. num_levels: of the motion encoder, which number its last convolution."""
    return (
        Row("pose_patch_embedding", "pose_patch_embedding"),
        Row("face_adapter.fuser_blocks.{}.linear1_q", "face_adapter.{}.to_q"),
        Row("face_adapter.fuser_blocks.{}.linear1_kv", ("face_adapter.{}.to_k", "face_adapter.{}.to_v")),
        Row("face_adapter.fuser_blocks.{}.linear2", "face_adapter.{}.to_out"),
        Row("face_adapter.fuser_blocks.{}.q_norm", "face_adapter.{}.norm_q"),
        Row("face_adapter.fuser_blocks.{}.k_norm", "face_adapter.{}.norm_k"),
        *(Row(f"face_encoder.{name}.conv", f"face_encoder.{name}") for name in ("conv1_local", "conv2", "conv3")),
        Row("face_encoder.out_proj", "face_encoder.out_proj"),
        Row("face_encoder.padding_tokens", "face_encoder.padding_tokens"),
        Row("motion_encoder.conv_in", "motion_encoder.conv_in", f"{_APPEARANCE}.0.0"),
        Row("motion_encoder.conv_in.act", "motion_encoder.conv_in.act_fn", f"{_APPEARANCE}.0.1", bias_axes=True),
        *(row for level in range(num_levels - 1) for row in _motion_level(level)),
        Row("motion_encoder.conv_out", "motion_encoder.conv_out", f"{_APPEARANCE}.{num_levels}"),
        Row("motion_encoder.linears.{}", "motion_encoder.motion_network.{}", "motion_encoder.enc.fc.{}"),
        Row(
            "motion_encoder.directions", "motion_encoder.motion_synthesis_weight", "motion_encoder.dec.direction.weight"
        ),
    )


def _motion_level(level: int) -> Iterable[Row]:
    ours, theirs, original = (
        f"{stem}.{number}"
        for stem, number in (
            ("motion_encoder.levels", level), ("motion_encoder.res_blocks", level), (_APPEARANCE, level + 1),
        )
    )  # fmt: skip
    yield Row(f"{ours}.conv1", f"{theirs}.conv1", f"{original}.conv1.0")
    yield Row(f"{ours}.conv1.act", f"{theirs}.conv1.act_fn", f"{original}.conv1.1", bias_axes=True)
    yield Row(f"{ours}.conv2", f"{theirs}.conv2", f"{original}.conv2.1")
    yield Row(f"{ours}.conv2.act", f"{theirs}.conv2.act_fn", f"{original}.conv2.2", bias_axes=True)
    yield Row(f"{ours}.skip", f"{theirs}.conv_skip", f"{original}.skip.1")


# Inside a residual block of the VAE.
_RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2", "shortcut": "conv_shortcut",
}  # fmt: skip
_ATTENTION = ("norm", "to_qkv", "proj")
_RESAMPLE = ("resample.1", "time_conv")


def vae(config: VAEConfig) -> tuple[Row, ...]:
    """Wan 2.1's and 2.2's video VAE. The original counts layers, diffusers levels, so the numbers come from the config.

    Raises:
        CheckpointError: attention between levels, which diffusers does not have.
    """
    if config.attn_scales:
        raise CheckpointError(
            "attn_scales", expected="an empty list", found=str(config.attn_scales),
            action="keep the original layout: diffusers has no attention between the levels of the decoder",
        )  # fmt: skip
    rows = [Row("conv1", "quant_conv"), Row("conv2", "post_quant_conv")]
    for part in ("encoder", "decoder"):
        rows += [Row(f"{part}.conv1", f"{part}.conv_in")]
        rows += [Row(f"{part}.head.0", f"{part}.norm_out"), Row(f"{part}.head.2", f"{part}.conv_out")]
        rows += _residual(f"{part}.middle.0", f"{part}.mid_block.resnets.0")
        rows += [Row(f"{part}.middle.1.{name}", f"{part}.mid_block.attentions.0.{name}") for name in _ATTENTION]
        rows += _residual(f"{part}.middle.2", f"{part}.mid_block.resnets.1")
    num_blocks, num_levels = config.num_res_blocks, len(config.dim_mult)
    for level in range(num_levels):
        for layer in range(num_blocks + 1):
            place = level * (num_blocks + 1) + layer  # a level of the encoder is its blocks and a resampling
            ours, theirs = f"encoder.downsamples.{place}", f"encoder.down_blocks.{place}"
            if config.residual_resampling:
                ours = f"encoder.downsamples.{level}.downsamples.{layer}"
                theirs = f"encoder.down_blocks.{level}." + (f"resnets.{layer}" if layer < num_blocks else "downsampler")
            if layer < num_blocks:
                rows += _residual(ours, theirs)
            elif level < num_levels - 1:
                rows += [Row(f"{ours}.{name}", f"{theirs}.{name}") for name in _RESAMPLE]
        for layer in range(num_blocks + 2):  # and of the decoder one block more
            ours = f"decoder.upsamples.{level * (num_blocks + 2) + layer}"
            last = "upsamplers.0"
            if config.residual_resampling:
                ours, last = f"decoder.upsamples.{level}.upsamples.{layer}", "upsampler"
            if layer <= num_blocks:
                rows += _residual(ours, f"decoder.up_blocks.{level}.resnets.{layer}")
            elif level < num_levels - 1:
                rows += [Row(f"{ours}.{name}", f"decoder.up_blocks.{level}.{last}.{name}") for name in _RESAMPLE]
    return tuple(rows)


def _residual(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.{old}", f"{theirs}.{new}") for old, new in _RESIDUAL.items()]


# The encoders that releases keep beside their transformer. Ours are the names of the authors' files; diffusers' releases have
# models of transformers. Of CLIP it is the half for pictures; the other one, for text, Wan does not use.
TEXT_ENCODER = (
    Row("token_embedding", "embed_tokens"),
    *(Row(f"blocks.{{}}.attn.{name}", f"block.{{}}.layer.0.SelfAttention.{name}") for name in "qkvo"),
    Row("blocks.{}.norm1", "block.{}.layer.0.layer_norm"),
    Row("blocks.{}.norm2", "block.{}.layer.1.layer_norm"),
    Row("blocks.{}.ffn.gate.0", "block.{}.layer.1.DenseReluDense.wi_0"),
    Row("blocks.{}.ffn.fc1", "block.{}.layer.1.DenseReluDense.wi_1"),
    Row("blocks.{}.ffn.fc2", "block.{}.layer.1.DenseReluDense.wo"),
    Row("blocks.{}.pos_embedding.embedding", "block.{}.layer.0.SelfAttention.relative_attention_bias"),
    Row("norm", "final_layer_norm"),
)
_CLIP_BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
}  # fmt: skip
IMAGE_ENCODER = (
    Row("visual.patch_embedding", "embeddings.patch_embedding"),
    Row("visual.cls_embedding", "embeddings.class_embedding"),
    Row("visual.pos_embedding", "embeddings.position_embedding.weight"),
    Row("visual.pre_norm", "pre_layrnorm"),
    Row("visual.transformer.{}.attn.to_qkv", tuple(f"encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv")),
    *(Row(f"visual.transformer.{{}}.{ours}", f"encoder.layers.{{}}.{theirs}") for ours, theirs in _CLIP_BLOCK.items()),
    Row("visual.post_norm", "post_layernorm"),
)


def to_layout(weights: Mapping[str, Any], rows: Iterable[Row], layout: str) -> dict[str, Any]:
    """Our names -> a layout's. Values are the same objects where the row only renames.

    Args:
        weights: tensors or `LazyTensor`s by name; any value where no row changes values.
        rows: tables of this module.
        layout: "original" or "diffusers".

    Raises:
        CheckpointError: a name is in no row.
    """
    table = _compiled(rows, "ours")
    found = {}
    for key, value in weights.items():
        row, numbers, last = _find(key, table, "ours")
        names = [name.format(*numbers) + last for name in row.names(layout)]
        if len(names) > 1:
            found |= zip(names, value.chunk(len(names), 0), strict=True)
        elif row.bias_axes and layout == "original" and last == ".bias":
            found[names[0]] = value.reshape(1, -1, 1, 1)
        else:
            found[names[0]] = value
    return found


def from_layout(weights: Mapping[str, Any], rows: Iterable[Row], layout: str) -> dict[str, Any]:
    """A layout's names -> ours; see `to_layout`.

    Raises:
        CheckpointError: a name is in no row, or of several slices one is missing.
    """
    rows = tuple(rows)
    table = _compiled(rows, layout)
    found: dict[str, Any] = {}
    slices: dict[str, dict[int, Any]] = {}
    for key, value in weights.items():
        row, numbers, last = _find(key, table, layout)
        ours, names = row.ours.format(*numbers) + last, row.names(layout)
        if len(names) > 1:
            place = [name.format(*numbers) + last for name in names].index(key)
            slices.setdefault(ours, {})[place] = value
            found[ours] = None  # keeps the place in the order
        elif row.bias_axes and layout == "original" and last == ".bias":
            found[ours] = value.reshape(-1)
        else:
            found[ours] = value
    known = _compiled(rows, "ours")
    for ours, parts in slices.items():
        row, numbers, last = _find(ours, known, "ours")
        names = row.names(layout)
        missing = [names[place].format(*numbers) + last for place in range(len(names)) if place not in parts]
        if missing:
            raise CheckpointError(
                f"weight {missing[0]!r}", expected=f"beside {names[next(iter(parts))].format(*numbers) + last!r}",
                found="none", action="copy the whole checkpoint",
            )  # fmt: skip
        found[ours] = _joined([parts[place] for place in range(len(names))])
    return found


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else type(parts[0]).join(parts)


def _compiled(rows: Iterable[Row], layout: str) -> list[tuple[re.Pattern, Row]]:
    return [
        (re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")), row)
        for row in rows
        for name in ((row.ours,) if layout == "ours" else row.names(layout))
    ]


def _match(key: str, table: list[tuple[re.Pattern, Row]]) -> tuple[Row, tuple[str, ...], str] | None:
    stem, dot, last = key.rpartition(".")
    for name, suffix in ((key, ""), (stem, dot + last)):
        for pattern, row in table:
            if match := pattern.fullmatch(name):
                return row, match.groups(), suffix
    return None


def _find(key: str, table: list[tuple[re.Pattern, Row]], layout: str) -> tuple[Row, tuple[str, ...], str]:
    found = _match(key, table)
    if found is None:
        stem = re.sub(r"\.\d+\.", ".{}.", key.rpartition(".")[0])
        near = difflib.get_close_matches(stem, [pattern.pattern.replace("\\", "") for pattern, _ in table], n=1)
        names = {"ours": "our layout", "original": "the original Wan layout", "diffusers": "diffusers' Wan layout"}
        raise CheckpointError(
            f"weight {key!r}", expected=f"a name of {names[layout]}" + (f" (nearest: {near[0]})" if near else ""),
            action="take weights of a network that is listed there",
        )  # fmt: skip
    return found
