"""diffusers' models of a structure of ours, with weights that hide nothing. Independent code, as far as there is any."""

from __future__ import annotations

import dataclasses

import torch
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel, WanTransformer3DModel

from factorportrait.config import VAEConfig
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.weights import layouts
from factorportrait.export.weights.files import LazyTensor
from factorportrait.export.weights.networks import PUBLISHED, Network, blur_constants, rows_of
from factorportrait.model_config import FaceConfig


def vae_arguments(config: VAEConfig) -> dict:
    """Arguments of AutoencoderKLWan, which leaves applying `latents_mean` and `latents_std` to its caller."""
    packing = config.pixel_patch**2
    return {
        "base_dim": config.base_dim, "decoder_base_dim": config.decoder_base_dim, "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult), "num_res_blocks": config.num_res_blocks, "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample), "is_residual": config.residual_resampling,
        "latents_mean": list(config.latents_mean or [0.0] * config.z_dim),
        "latents_std": list(config.latents_std or [1.0] * config.z_dim),
        "in_channels": config.in_channels * packing, "out_channels": config.out_channels * packing,
        "patch_size": config.patch_size, "scale_factor_temporal": config.temporal_stride,
        "scale_factor_spatial": config.spatial_stride,
    }  # fmt: skip


def diffusers_vae(config: VAEConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan(**vae_arguments(config)).eval()


def transformer_arguments(network: Network) -> dict:
    """Arguments of WanTransformer3DModel or WanAnimateTransformer3DModel."""
    dit, face = network.dit, network.dit.face
    arguments = {
        "patch_size": dit.patch_size, "num_attention_heads": dit.num_heads, "attention_head_dim": dit.head_dim,
        "in_channels": network.fusion.in_channels, "out_channels": dit.out_channels, "text_dim": dit.text_dim,
        "freq_dim": dit.freq_dim, "ffn_dim": dit.ffn_dim, "num_layers": dit.num_layers,
        "cross_attn_norm": dit.cross_attn_norm, "eps": dit.eps, "rope_max_seq_len": dit.max_position,
        "image_dim": dit.image_dim, "added_kv_proj_dim": dit.dim if dit.image_dim else None,
    }  # fmt: skip
    if face is None:
        return arguments
    sizes = {str(face.image_size // 2**level): width for level, width in enumerate(face.encoder_widths)}
    return arguments | {
        "latent_channels": dit.pose_channels, "motion_encoder_channel_sizes": sizes,
        "motion_encoder_size": face.image_size, "motion_style_dim": face.style_dim, "motion_dim": face.motion_dim,
        "motion_encoder_dim": face.code_dim, "face_encoder_hidden_dim": face.hidden_dim,
        "face_encoder_num_heads": face.num_tokens, "inject_face_latents_blocks": face.block_interval,
    }  # fmt: skip


def diffusers_transformer(network: Network) -> WanTransformer3DModel | WanAnimateTransformer3DModel:
    kind = WanAnimateTransformer3DModel if network.dit.face else WanTransformer3DModel
    return kind(**transformer_arguments(network)).eval()


def with_noise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight is drawn: fresh norms of one and biases of zero would hide a swapped name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("scale_shift_table", "modulation", "padding_tokens")):
                parameter.copy_(0.5 * noise)
            elif name.startswith("motion_encoder") and parameter.dim() > 1:
                parameter.copy_(noise)  # its layers divide by the root of their width themselves
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def lazy(weights) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in weights.items()}


def small(name: str, **sizes) -> Network:
    """A published network with one head of 128, so that shapes say everything."""
    known = PUBLISHED[name]
    sizes = {"dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 2, "freq_dim": 32, "text_dim": 20} | sizes
    if known.dit.image_dim:
        sizes["image_dim"] = 12
    if known.dit.face:
        sizes["face"] = FaceConfig(
            image_size=16, encoder_widths=(4, 6, 8), style_dim=10, motion_dim=3, code_dim=14, hidden_dim=8, num_tokens=2,
            block_interval=2,
        )  # fmt: skip
    return Network(dataclasses.replace(known.dit, **sizes), known.fusion)


def random_weights(network: Network, seed: int = 0) -> dict[str, torch.Tensor]:
    return with_noise(WanDiT(network.dit, network.fusion, 4, 4), seed).state_dict()


def original_of(network: Network, weights) -> dict[str, torch.Tensor]:
    return layouts.to_layout(weights, rows_of(network), "original") | blur_constants(network)
