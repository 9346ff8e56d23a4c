"""diffusers' models of a structure of ours, with weights that hide nothing. Independent code, as far as there is any."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel, WanTransformer3DModel

from factorportrait.config import VAEConfig
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.weights import layouts
from factorportrait.export.weights.files import LazyTensor
from factorportrait.export.weights.fill import fill
from factorportrait.export.weights.networks import PUBLISHED, Network, Opened, blur_constants, rows_of
from factorportrait.export.weights.synthetic import diffusers_config, diffusers_vae_config
from factorportrait.model_config import FaceConfig


def diffusers_vae(config: VAEConfig) -> AutoencoderKLWan:
    """Leaves applying `latents_mean` and `latents_std` to its caller."""
    return AutoencoderKLWan(**diffusers_vae_config(config)).eval()


def diffusers_transformer(network: Network) -> WanTransformer3DModel | WanAnimateTransformer3DModel:
    kind = WanAnimateTransformer3DModel if network.dit.face else WanTransformer3DModel
    return kind(**diffusers_config(network)).eval()


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


def built(opened: Opened) -> WanDiT:
    """The transformer of `open_transformer` with its weights, for latents of 4 x 4."""
    with torch.device("meta"):
        dit = WanDiT(opened.config.dit, opened.config.fusion, 4, 4)
    fill(dit, opened.tensors, opened.where, config="structure")
    dit._build_rotary_tables()
    return dit.eval().requires_grad_(False)


def embed_nothing(dit: WanDiT, batch: int, frames: int) -> torch.Tensor:
    """Condition tokens [B,F,T,D] of a network that has no stream but the noise: the bias."""
    rows, columns = dit.grid
    return dit.patch_embedding.bias.expand(batch, frames, rows * columns, -1)


def embed_reference(dit: WanDiT, latents: torch.Tensor) -> torch.Tensor:
    """Reference latents [B,C,1,h,w] -> tokens [B,1,T,D] of slot 0 (Fun Control); its noise is zero."""
    return dit.embed_patches(latents, dit.ref_conv.weight.unsqueeze(2), dit.ref_conv.bias)


def embed_face(dit: WanDiT, codes: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Motion codes [B,1+4N,code_dim] -> keys and values [B,2+N,M,D] of every adapter; slot 0 has zero tokens (Animate)."""
    tokens = F.pad(dit.face_encoder(codes), (0, 0, 0, 0, 1, 0))
    return [adapter.keys_values(tokens) for adapter in dit.face_adapter["fuser_blocks"]]
