"""Structure of a checkpoint's networks: the published ones, config.json in three dialects, and what the shapes say.

Shapes decide. A config adds what shapes cannot say (heads, eps), and where both speak they have to agree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from factorportrait.config import VAEConfig, checked_value, config_from_dict
from factorportrait.errors import CheckpointError
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.weights import layouts
from factorportrait.export.weights.files import LazyTensor, Weights, open_weights
from factorportrait.export.weights.fill import fill, summary
from factorportrait.model_config import DiTConfig, FaceConfig, FusionConfig, RayAdapterConfig

HEAD_DIM = 128  # of every Wan release
ADD_CONFIG = "put its config.json beside the weights"

WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497,
    0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251,
    1.9160,
)  # fmt: skip
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098,
    0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567,
    -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957,
    0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454,
    0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
    0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444,
    0.4089, 0.7468, 0.7744,
)  # fmt: skip
WAN21_VAE = VAEConfig(
    base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True),
    latents_mean=WAN21_MEAN, latents_std=WAN21_STD,
)  # fmt: skip
WAN22_VAE = VAEConfig(
    base_dim=160, decoder_base_dim=256, z_dim=48, dim_mult=(1, 2, 4, 4), num_res_blocks=2, patch_size=2,
    temporal_downsample=(False, True, True), latents_mean=WAN22_MEAN, latents_std=WAN22_STD, residual_resampling=True,
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A transformer: its sizes, and what its patch embedding takes."""

    dit: DiTConfig
    fusion: FusionConfig


def _wan(streams: str, z_dim: int = 16, **sizes: Any) -> Network:
    dit = DiTConfig(text_dim=4096, out_channels=z_dim, **sizes)
    return Network(dit, FusionConfig(streams=tuple(streams.split()), latent_channels=z_dim))


_1_3B = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
_5B = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
_GIVEN = "noise mask image"
PUBLISHED = {
    "Wan2.1-T2V-1.3B": _wan("noise", **_1_3B),
    "Wan2.1-T2V-14B": _wan("noise", **_14B),
    "Wan2.1-I2V-14B": _wan(_GIVEN, **_14B, image_dim=1280),
    "Wan2.2-TI2V-5B": _wan("noise", 48, **_5B),
    "Wan2.1-Fun-V1.1-1.3B-Control": _wan("noise control image", **_1_3B, image_dim=1280, reference_channels=16),
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera": _wan("noise image", **_1_3B, image_dim=1280, ray_adapter=RayAdapterConfig()),
    "Self-Forcing-1.3B": _wan("noise", **_1_3B),
    "Wan2.2-Animate-14B": _wan(_GIVEN, **_14B, image_dim=1280, pose_channels=16, face=FaceConfig()),
}
# What a patch embedding takes, by its channels in units of latents and masks.
_STREAMS = {(1, 0): "noise", (2, 4): _GIVEN, (2, 0): "noise image", (3, 0): "noise control image"}

# Theirs -> ours, for what a config says of a transformer.
_ORIGINAL = {
    "dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "num_heads", "num_layers": "num_layers", "out_dim": "out_channels",
    "freq_dim": "freq_dim", "text_dim": "text_dim", "eps": "eps", "patch_size": "patch_size",
    "cross_attn_norm": "cross_attn_norm",
}  # fmt: skip
_DIFFUSERS = {
    "num_attention_heads": "num_heads", "ffn_dim": "ffn_dim", "num_layers": "num_layers", "out_channels": "out_channels",
    "freq_dim": "freq_dim", "text_dim": "text_dim", "eps": "eps", "patch_size": "patch_size",
    "cross_attn_norm": "cross_attn_norm", "rope_max_seq_len": "max_position", "image_dim": "image_dim",
}  # fmt: skip
_DIFFUSERS_VAE = {
    "base_dim": "base_dim", "decoder_base_dim": "decoder_base_dim", "z_dim": "z_dim", "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks", "attn_scales": "attn_scales", "temperal_downsample": "temporal_downsample",
    "latents_mean": "latents_mean", "latents_std": "latents_std", "is_residual": "residual_resampling",
    "patch_size": "patch_size",
}  # fmt: skip
# Buffers of releases that are constants of the structure.
_CONSTANT = re.compile(r"(blocks\.\d+\.attn2\.norm_added_q\.weight|freqs|rope\..*)")
_BLUR = re.compile(r"motion_encoder\..*\.kernel")


@dataclass(frozen=True)
class Opened:
    """A network's weights under our names, and its structure.

    Attributes:
        config: a `Network` or a `VAEConfig`.
        layout: which the file has: original or diffusers.
        notes: what was decided, for the user to see.
        causal: the weights are a causal training's generator, as Self-Forcing saves it.
    """

    config: Any
    tensors: Mapping[str, LazyTensor]
    where: str
    layout: str
    notes: tuple[str, ...] = field(default=())
    causal: bool = False


def open_transformer(path: str | Path) -> Opened:
    """Open a Wan transformer in any published layout.

    Args:
        path: as in `open_weights`; a config.json beside the weights is read where there is one.

    Raises:
        CheckpointError: see `open_weights`; or a weight that no table knows, or a config that contradicts the shapes.
    """
    weights = open_weights(path)
    layout, levels = _transformer_layout(weights)
    tensors, dropped = _without_constants(weights)
    tensors = layouts.from_layout(tensors, transformer_rows(levels), layout)
    data, file = _config_beside(Path(path), weights)
    notes = list(weights.notes) + ([f"left out constants: {len(dropped)} such as {dropped[0]}"] if dropped else [])
    network = transformer_of(tensors, weights.where, data, file)
    name = next((name for name, known in PUBLISHED.items() if _same_sizes(known, network)), "no published size")
    notes.append(f"{summary(tensors)}; {layout} layout; sizes of {name}, " + (f"{file}" if data else "inferred from shapes"))
    causal = any(name.startswith("generator") for name in weights.containers)
    return Opened(network, tensors, weights.where, layout, tuple(notes), causal)


def open_vae(path: str | Path) -> Opened:
    """Open a Wan 2.1 or 2.2 video VAE in either layout; see `open_transformer`.

    Raises:
        CheckpointError: see `open_transformer`; or sizes that were never published and no statistics of the latents.
    """
    weights = open_weights(path)
    keys = weights.tensors
    layout = "diffusers" if "quant_conv.weight" in keys else "original" if "encoder.conv1.weight" in keys else None
    if layout is None:
        raise _no_network(weights, "video VAE", "encoder.conv1.weight or quant_conv.weight")
    config = infer_vae(weights, layout)
    data, file = _config_beside(Path(path), weights)
    if data and not {"vae", "base_dim"} & set(data):
        data = None  # releases keep the transformer's config beside the VAE's file
    if data:
        config = _agreed(config, _vae_values(data, file), file)
    else:
        known = [c for c in (WAN21_VAE, WAN22_VAE) if replace(c, latents_mean=None, latents_std=None) == config]
        if not known:
            raise CheckpointError(
                f"{weights.where}", expected="a published size, whose latents have known means and deviations",
                found=f"base_dim {config.base_dim}, z_dim {config.z_dim}", action=ADD_CONFIG,
            )  # fmt: skip
        config = known[0]
    tensors = layouts.from_layout(keys, layouts.vae(config), layout)
    notes = (*weights.notes, f"{summary(tensors)}; {layout} layout; " + (f"{file}" if data else "inferred from shapes"))
    return Opened(config, tensors, weights.where, layout, notes)


def build_vae(opened: Opened, dtype: torch.dtype | None = None) -> VideoVAE:
    """The VAE of `open_vae` with its weights, in evaluation mode.

    Args:
        dtype: of the weights; None keeps the file's.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        vae = VideoVAE(opened.config)
    fill(vae, opened.tensors, opened.where, dtype=dtype, config="structure")
    return vae.eval().requires_grad_(False)


def transformer_rows(motion_levels: int) -> tuple[layouts.Row, ...]:
    """Names of every transformer here; motion_levels: of Animate's encoder, 0 without."""
    return layouts.TRANSFORMER + layouts.FUN + (layouts.animate(motion_levels) if motion_levels else ())


def rows_of(network: Network) -> tuple[layouts.Row, ...]:
    """Names of a network's weights."""
    return transformer_rows(len(network.dit.face.encoder_widths) if network.dit.face else 0)


def blur_constants(network: Network) -> dict[str, torch.Tensor]:
    """The buffers that the original layout of Animate has beside its weights: fixed filters [4,4]."""
    if network.dit.face is None:
        return {}
    places = (
        f"motion_encoder.enc.net_app.convs.{level}.{conv}.0.kernel"
        for level in range(1, len(network.dit.face.encoder_widths))
        for conv in ("conv2", "skip")
    )
    return {place: _blur_kernel() for place in places}


def transformer_of(
    tensors: Mapping[str, LazyTensor], where: str, data: Mapping[str, Any] | None = None, file: str = ""
) -> Network:
    """Structure of a transformer from its shapes under our names and, where there is one, its config.

    Args:
        data: a parsed config.json of ours (its part "dit" and "fusion"), the original or diffusers.
        file: what errors call it.

    Raises:
        CheckpointError: a weight is missing that says a size, or config and shapes contradict each other.
    """
    values = _transformer_values(data, file) if data else {}
    fusion = values.pop("fusion", None)
    in_channels = values.pop("in_channels", None)
    face = values.pop("face_interval", None)
    inferred = _infer_transformer(tensors, where, values.get("num_heads"), face)
    dit = _agreed(inferred, values, file)
    channels = tensors["patch_embedding.weight"].shape[1]
    if in_channels is not None and in_channels != channels:
        raise _contradiction(file, "in_channels", in_channels, channels)
    if fusion is None:
        masks = channels % dit.out_channels
        streams = _STREAMS.get((channels // dit.out_channels, masks))
        if streams is None:
            raise CheckpointError(
                f"{where}: patch_embedding.weight",
                expected=f"{', '.join(str(a * dit.out_channels + b) for a, b in _STREAMS)} channels", found=str(channels),
                action='say what they are: put a config.json with "dit" and "fusion" beside the weights',
            )  # fmt: skip
        fusion = FusionConfig(streams=tuple(streams.split()), latent_channels=dit.out_channels)
    elif fusion.in_channels != channels:
        raise _contradiction(file, "fusion: channels of all streams", fusion.in_channels, channels)
    return Network(dit, fusion)


def with_streams(
    tensors: Mapping[str, LazyTensor], source: FusionConfig, target: FusionConfig
) -> tuple[dict[str, LazyTensor], str]:
    """Widen or reorder a patch embedding for other streams, as FactorPortrait's conditioning on a released backbone.

    Streams of both keep their channels. New ones start as zeros, so that the network's output is at first what it was.

    Returns:
        The tensors with the new patch embedding, and a sentence that declares what is new.
    """
    old = tensors["patch_embedding.weight"]

    def load() -> torch.Tensor:
        weight = old.load()
        wide = weight.new_zeros(weight.shape[0], target.in_channels, *weight.shape[2:])
        for stream in target.streams:
            if stream in source.streams:
                wide[:, target.slice(stream)] = weight[:, source.slice(stream)]
        return wide

    new = [f"{stream} ({target.channels(stream)})" for stream in target.streams if stream not in source.streams]
    gone = [f"{stream} ({source.channels(stream)})" for stream in source.streams if stream not in target.streams]
    shape = (old.shape[0], target.in_channels, *old.shape[2:])
    declared = f"input channels initialised with zeros, untrained: {', '.join(new) or 'none'}; dropped: {', '.join(gone) or 'none'}"
    return {**tensors, "patch_embedding.weight": LazyTensor(shape, old.dtype, load)}, declared


# A layer of the encoder: its level and place (2.1 counts through all levels), and what it is.
_ENCODER_LAYER = re.compile(
    r"encoder\.(?:downsamples|down_blocks)\.(\d+)(?:\.(?:downsamples|resnets)\.(\d+)|\.(downsampler))?"
    r"\.(residual\.2|conv1|resample\.1|time_conv)\.weight"
)


def infer_vae(weights: Weights, layout: str) -> VAEConfig:
    """Sizes of a video VAE from its shapes, without the statistics of its latents.

    Raises:
        CheckpointError: a weight is missing that says one.
    """
    size = _Shapes(weights.tensors, weights.where)
    latent, first = ("conv2", "conv1") if layout == "original" else ("post_quant_conv", "conv_in")
    layers: dict[tuple[int, float], dict[str, int]] = {}
    nested = False
    for name in weights.tensors:
        if match := _ENCODER_LAYER.fullmatch(name):
            level, place, downsampler, kind = match.groups()
            nested = nested or place is not None
            order = int(level), math.inf if downsampler else int(place or 0)
            layers.setdefault(order, {})[kind] = size(name, 0)
    # Blocks up to each halving are a level; what follows the last one is a level too.
    levels: list[list[int]] = [[]]
    temporal = []
    for _, layer in sorted(layers.items()):
        if "resample.1" in layer:
            temporal.append("time_conv" in layer)
            levels.append([])
        else:
            levels[-1].append(layer.get("residual.2", layer.get("conv1", 0)))
    base_dim = size(f"encoder.{first}.weight", 0)
    blocks = {len(level) for level in levels}
    widths = [level[0] for level in levels if level]
    if len(blocks) != 1 or len(widths) < 2 or any(width % base_dim or not width for width in widths):
        raise CheckpointError(
            weights.where, expected=f"encoder levels of one depth, whose widths are multiples of {base_dim}",
            found="; ".join(", ".join(map(str, level)) for level in levels) or "none", action="copy the whole file",
        )  # fmt: skip
    mult = tuple(width // base_dim for width in widths)
    packed, decoder = size(f"encoder.{first}.weight", 1), size(f"decoder.{first}.weight", 0)
    return VAEConfig(
        base_dim=base_dim, z_dim=size(f"{latent}.weight", 0), dim_mult=mult, num_res_blocks=blocks.pop(),
        temporal_downsample=tuple(temporal), residual_resampling=nested,
        decoder_base_dim=decoder // mult[-1] if decoder != base_dim * mult[-1] else None,
        patch_size=None if packed == 3 else round((packed / 3) ** 0.5),
    )  # fmt: skip


class _Shapes:
    """Sizes by a weight's name; a missing weight is an error that says so."""

    def __init__(self, tensors: Mapping[str, LazyTensor], where: str):
        self.tensors, self.where = tensors, where

    def has(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, axis: int) -> int:
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor.shape) <= axis:
            found = "none" if tensor is None else f"shape {list(tensor.shape)}"
            raise CheckpointError(
                f"{self.where}: {name}", expected="the weight, which says a size", found=found, action="copy the whole file"
            )
        return tensor.shape[axis]


def _infer_transformer(
    tensors: Mapping[str, LazyTensor], where: str, num_heads: int | None, face_interval: int | None
) -> DiTConfig:
    size = _Shapes(tensors, where)
    dim = size("patch_embedding.weight", 0)
    patch = tensors["patch_embedding.weight"].shape[2:]
    if num_heads is None:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"{where}", expected=f"a width that is a multiple of {HEAD_DIM}, the head size of every release",
                found=f"{dim}, which leaves the number of heads open", action=ADD_CONFIG,
            )  # fmt: skip
        num_heads = dim // HEAD_DIM
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))}
    if blocks != set(range(len(blocks))):
        gaps = sorted(set(range(max(blocks))) - blocks)
        raise CheckpointError(
            f"{where}", expected=f"all blocks up to {max(blocks)}", found=f"none of number {gaps[0]}",
            action="copy the whole file",
        )  # fmt: skip
    return DiTConfig(
        dim=dim,
        ffn_dim=size("blocks.0.ffn.0.weight", 0),
        num_heads=num_heads,
        num_layers=len(blocks),
        out_channels=size("head.head.weight", 0) // (patch[0] * patch[1] * patch[2]),
        patch_size=tuple(patch),
        freq_dim=size("time_embedding.0.weight", 1),
        qk_norm=size.has("blocks.0.self_attn.norm_q.weight"),
        # Without cross-attention there is no norm before it that could show.
        cross_attn_norm=size.has("blocks.0.norm3.weight") or not size.has("text_embedding.0.weight"),
        text_dim=size("text_embedding.0.weight", 1) if size.has("text_embedding.0.weight") else None,
        image_dim=size("img_emb.proj.0.weight", 0) if size.has("img_emb.proj.0.weight") else None,
        reference_channels=size("ref_conv.weight", 1) if size.has("ref_conv.weight") else None,
        pose_channels=size("pose_patch_embedding.weight", 1) if size.has("pose_patch_embedding.weight") else None,
        face=_infer_face(size, len(blocks), face_interval) if size.has("motion_encoder.directions") else None,
        ray_adapter=_infer_rays(size) if size.has("control_adapter.conv.weight") else None,
    )


def _infer_face(size: _Shapes, num_layers: int, interval: int | None) -> FaceConfig:
    widths = [size("motion_encoder.conv_in.weight", 0)]
    while size.has(f"motion_encoder.levels.{len(widths) - 1}.conv2.weight"):
        widths.append(size(f"motion_encoder.levels.{len(widths) - 1}.conv2.weight", 0))
    hidden = size("face_encoder.conv2.conv.weight", 0)
    adapters = len({key.split(".")[2] for key in size.tensors if key.startswith("face_adapter.fuser_blocks.")})
    return FaceConfig(
        image_size=2 ** (len(widths) + 1), encoder_widths=tuple(widths),
        style_dim=size("motion_encoder.conv_out.weight", 0), motion_dim=size("motion_encoder.directions", 1),
        code_dim=size("motion_encoder.directions", 0), hidden_dim=hidden,
        num_tokens=size("face_encoder.conv1_local.conv.weight", 0) // hidden,
        block_interval=interval or -(-num_layers // max(adapters, 1)),
    )  # fmt: skip


def _infer_rays(size: _Shapes) -> RayAdapterConfig:
    blocks = 0
    while size.has(f"control_adapter.residual_blocks.{blocks}.conv1.weight"):
        blocks += 1
    # Six ray channels of four frames; what is left of the convolution's channels are the pixels of a cell.
    cell = size("control_adapter.conv.weight", 1) // RayAdapterConfig.channels
    return RayAdapterConfig(downscale=max(round(cell**0.5), 1), num_blocks=max(blocks, 1))


def _transformer_values(data: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What a config says, under our names, besides "in_channels", "fusion" and "face_interval"."""
    if "dit" in data:
        dit = config_from_dict(DiTConfig, data["dit"], f"{file}: dit")
        fusion = config_from_dict(FusionConfig, data.get("fusion", {}), f"{file}: fusion")
        return {"fusion": fusion, **{name: getattr(dit, name) for name in data["dit"]}}
    if "num_attention_heads" in data:
        names, channels = _DIFFUSERS, "in_channels"
    elif "num_heads" in data and "dim" in data:
        names, channels = _ORIGINAL, "in_dim"
    else:
        raise CheckpointError(
            file, expected='a config of ours ("dit"), of the original ("dim", "num_heads") or of diffusers ("num_attention_heads")',
            found=", ".join(list(data)[:5]) or "an empty object", action="take the config.json that belongs to the weights",
        )  # fmt: skip
    found = {ours: data[theirs] for theirs, ours in names.items() if data.get(theirs) is not None}
    hints = {"eps": float, "cross_attn_norm": bool, "patch_size": tuple[int, ...]}
    found = {name: checked_value(hints.get(name, int), value, f"{file}: {name}") for name, value in found.items()}
    if names is _DIFFUSERS and isinstance(data.get("attention_head_dim"), int):
        found["dim"] = data["attention_head_dim"] * found["num_heads"]
    for theirs, ours in ((channels, "in_channels"), ("inject_face_latents_blocks", "face_interval")):
        if isinstance(data.get(theirs), int):
            found[ours] = data[theirs]
    return found


def _vae_values(data: Mapping[str, Any], file: str) -> dict[str, Any]:
    if "vae" in data:
        vae = config_from_dict(VAEConfig, data["vae"], f"{file}: vae")
        return {name: getattr(vae, name) for name in data["vae"]}
    known = {ours: data[theirs] for theirs, ours in _DIFFUSERS_VAE.items() if data.get(theirs) is not None}
    # Through the dataclass, which checks every type; structure that shapes decide is compared, not taken.
    config = config_from_dict(VAEConfig, known, file)
    return {name: getattr(config, name) for name in known}


def _agreed(inferred: Any, values: Mapping[str, Any], file: str) -> Any:
    """The inferred config with what only a config can say; raises where both differ."""
    only_config = {"eps", "rope_theta", "max_position", "num_heads", "latents_mean", "latents_std", "attn_scales", "face"}
    if getattr(inferred, "text_dim", 0) is None:
        only_config.add("cross_attn_norm")
    for name, value in values.items():
        seen = getattr(inferred, name)
        as_encoder = name == "decoder_base_dim" and seen is None and value == inferred.base_dim
        if name not in only_config and value != seen and not as_encoder:
            raise _contradiction(file, name, value, seen)
    return replace(inferred, **{name: value for name, value in values.items() if name in only_config})


def _contradiction(file: str, name: str, says: Any, shapes: Any) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name}", expected=f"{shapes}, as the shapes of the weights say", found=str(says),
        action="take config and weights of one download",
    )  # fmt: skip


def _config_beside(path: Path, weights: Weights) -> tuple[dict[str, Any] | None, str]:
    file = (path if path.is_dir() else weights.files[0].parent) / "config.json"
    if not file.is_file():
        return None, ""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}", expected="JSON", found=str(error), action="correct the file") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}", expected="a JSON object", found=type(data).__name__, action="correct the file")
    return data, str(file)


def _transformer_layout(weights: Weights) -> tuple[str, int]:
    """Layout, and levels of Animate's motion encoder."""
    keys = weights.tensors
    if any(key.startswith("condition_embedder.") for key in keys):
        layout, level = "diffusers", r"motion_encoder\.res_blocks\.(\d+)\.conv1\.weight"
    elif "time_embedding.0.weight" in keys:
        layout, level = "original", r"motion_encoder\.enc\.net_app\.convs\.(\d+)\.conv1\.0\.weight"
    else:
        raise _no_network(weights, "Wan transformer", "time_embedding.0.weight or condition_embedder.*")
    levels = sum(re.fullmatch(level, key) is not None for key in keys)
    return layout, levels + 1 if levels else 0


def _no_network(weights: Weights, network: str, marks: str) -> CheckpointError:
    return CheckpointError(
        weights.where, expected=f"weights of a {network}, which have {marks}",
        found=", ".join(list(weights.tensors)[:3]), action="name the file of this network",
    )  # fmt: skip


def _without_constants(weights: Weights) -> tuple[dict[str, LazyTensor], list[str]]:
    dropped = [name for name in weights.tensors if _CONSTANT.fullmatch(name) or _BLUR.fullmatch(name)]
    for name in dropped:
        if _BLUR.fullmatch(name) and not torch.equal(weights.tensors[name].load().float(), _blur_kernel()):
            raise CheckpointError(
                f"{weights.where}: {name}", expected="the filter 1, 3, 3, 1 of the release", found="another",
                action="use the published model",
            )  # fmt: skip
    return {name: tensor for name, tensor in weights.tensors.items() if name not in dropped}, dropped


def _blur_kernel() -> torch.Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return taps[:, None] * taps / 64


def _same_sizes(known: Network, found: Network) -> bool:
    return known.fusion == found.fusion and replace(known.dit, eps=found.dit.eps, max_position=found.dit.max_position) == found.dit
