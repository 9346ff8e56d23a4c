"""Names of Wan VAE weights and config entries: the original layout, as in `vae.py`, and diffusers' AutoencoderKLWan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from factorportrait.config import VAEConfig, config_from_dict
from factorportrait.errors import CheckpointError

Value = TypeVar("Value")

# Inside a residual block.
RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
# Outside of the levels, for "encoder" and "decoder".
TRUNK = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}
# Diffusers' config entries that do not change the structure checked here.
IGNORED = ("dropout", "scale_factor_temporal", "scale_factor_spatial", "clip_output")


def to_diffusers(state_dict: Mapping[str, Value], config: VAEConfig) -> dict[str, Value]:
    """Rename the keys of the original layout to diffusers'; the values are the same objects.

    Raises:
        CheckpointError: a key is not part of the layout.
    """
    return {_to_diffusers(key, config): value for key, value in state_dict.items()}


def from_diffusers(state_dict: Mapping[str, Value], config: VAEConfig) -> dict[str, Value]:
    """Rename diffusers' keys to the original layout; the values are the same objects.

    Raises:
        CheckpointError: a key is not part of the layout.
    """
    return {_from_diffusers(key, config): value for key, value in state_dict.items()}


def config_from_diffusers(data: Mapping[str, Any], where: str) -> VAEConfig:
    """Read the config.json of an AutoencoderKLWan. Its channels are counted after packing, ours before.

    Raises:
        CheckpointError: an unknown entry, or the residual structure of Wan 2.2, which `vae.py` does not have.
    """
    if data.get("is_residual"):
        raise CheckpointError(
            f"{where}: is_residual", expected="false, the structure of Wan 2.1", found="true, the structure of Wan 2.2",
            action="take a VAE of Wan 2.1",
        )  # fmt: skip
    skipped = {"is_residual", "temperal_downsample", *IGNORED}
    ours = {key: value for key, value in data.items() if key not in skipped and not key.startswith("_")}
    if "temperal_downsample" in data:
        ours["temporal_downsample"] = data["temperal_downsample"]
    patch = ours.get("patch_size")
    packing = patch**2 if isinstance(patch, int) and patch > 0 else 1
    for name in ("in_channels", "out_channels"):
        if isinstance(ours.get(name), int):
            ours[name] //= packing
    return config_from_dict(VAEConfig, ours, where)


def config_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan for the same structure. Its caller has to apply `latents_mean` and `latents_std`."""
    packing = config.pixel_patch**2
    return {
        "base_dim": config.base_dim,
        "decoder_base_dim": config.decoder_base_dim,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": list(config.attn_scales),
        "temperal_downsample": list(config.temporal_downsample),
        "latents_mean": list(config.latents_mean or [0.0] * config.z_dim),
        "latents_std": list(config.latents_std or [1.0] * config.z_dim),
        "is_residual": False,
        "in_channels": config.in_channels * packing,
        "out_channels": config.out_channels * packing,
        "patch_size": config.patch_size,
        "scale_factor_temporal": config.temporal_stride,
        "scale_factor_spatial": config.spatial_stride,
    }


def _to_diffusers(key: str, config: VAEConfig) -> str:
    if match := re.fullmatch(r"(conv[12])\.(weight|bias)", key):
        return f"{'quant_conv' if match[1] == 'conv1' else 'post_quant_conv'}.{match[2]}"
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", key):
        return f"encoder.down_blocks.{match[1]}.{_renamed(match[2], RESIDUAL)}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", key):
        # The original counts layers; diffusers counts levels of residual blocks with one upsampler.
        level, layer = divmod(int(match[1]), _decoder_level_layers(config))
        place = f"resnets.{layer}" if layer <= config.num_res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{place}.{_renamed(match[2], RESIDUAL)}"
    if match := re.fullmatch(r"(encoder|decoder)\.(.+)", key):
        renamed = _renamed(match[2], TRUNK)
        if renamed != match[2]:
            return f"{match[1]}.{_inside_middle(renamed, RESIDUAL)}"
    raise _unknown(key, "the original Wan VAE layout")


def _from_diffusers(key: str, config: VAEConfig) -> str:
    residual, trunk = ({new: old for old, new in names.items()} for names in (RESIDUAL, TRUNK))
    if match := re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", key):
        return f"{'conv2' if match[1] else 'conv1'}.{match[2]}"
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", key):
        return f"encoder.downsamples.{match[1]}.{_renamed(match[2], residual)}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", key):
        layer = int(match[3]) if match[2] == "resnets" else config.num_res_blocks + 1
        place = int(match[1]) * _decoder_level_layers(config) + layer
        return f"decoder.upsamples.{place}.{_renamed(match[4], residual)}"
    if match := re.fullmatch(r"(encoder|decoder)\.(.+)", key):
        renamed = _renamed(_inside_middle(match[2], residual), trunk)
        if renamed != match[2]:
            return f"{match[1]}.{renamed}"
    raise _unknown(key, "diffusers' AutoencoderKLWan layout")


def _decoder_level_layers(config: VAEConfig) -> int:
    if config.attn_scales:
        raise CheckpointError(
            "attn_scales", expected="an empty list", found=str(config.attn_scales),
            action="keep the original layout: diffusers has no attention between the levels of the decoder",
        )  # fmt: skip
    return config.num_res_blocks + 2


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """Replace the leading part of a key, when it is one of `names`."""
    for old, new in names.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return key


def _inside_middle(key: str, names: Mapping[str, str]) -> str:
    """Rename what follows `mid_block.resnets.N.`."""
    match = re.fullmatch(r"(mid_block\.resnets\.\d+\.)(.+)", key)
    return match[1] + _renamed(match[2], names) if match else key


def _unknown(key: str, layout: str) -> CheckpointError:
    return CheckpointError(f"weight {key!r}", expected=f"a name of {layout}", action="take weights of Wan 2.1's VAE")
