"""Checkpoints of random weights in the layouts that the real ones are published in: to try the whole path without a download.

    python -m factorportrait.export.weights.synthetic SYSTEM FOLDER [--layers 2] [--tiny]

Widths are the true ones, so names, shapes and sizes of a block are those of the release; only the depth is cut. The pictures that
come out are noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from factorportrait.config import VAEConfig
from factorportrait.errors import UserError
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.vae import VideoVAE
from factorportrait.export.weights import layouts
from factorportrait.export.weights.encoders import CLIP_HEAD_DIM, import_transformers, original_names
from factorportrait.export.weights.networks import PUBLISHED, WAN21_VAE, WAN22_VAE, Network, blur_constants, rows_of
from factorportrait.files import whole_folder
from factorportrait.model_config import FaceConfig

SHARD_BYTES = 2 * 2**30
IMAGE_TOKENS_SIDE = 16  # 224 pixels in patches of 14, and a class token: 257


@dataclass(frozen=True)
class Release:
    """How a checkpoint is published.

    Attributes:
        network: key of `PUBLISHED`.
        layout: "diffusers" (folders), "original" (files side by side) or "causal" (a .pt with generator_ema).
    """

    network: str
    layout: str
    vae: VAEConfig = WAN21_VAE


RELEASES = {
    "t2v-1.3b": Release("Wan2.1-T2V-1.3B", "diffusers"),
    "t2v-14b": Release("Wan2.1-T2V-14B", "original"),
    "ti2v-5b": Release("Wan2.2-TI2V-5B", "diffusers", WAN22_VAE),
    "fun-control": Release("Wan2.1-Fun-V1.1-1.3B-Control", "original"),
    "fun-camera": Release("Wan2.1-Fun-V1.1-1.3B-Control-Camera", "original"),
    "self-forcing": Release("Self-Forcing-1.3B", "causal"),
    "animate-14b": Release("Wan2.2-Animate-14B", "diffusers"),
}


def main(arguments: list[str] | None = None) -> int:
    """Write a synthetic checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m factorportrait.export.weights.synthetic",
        description="Write a checkpoint of random weights in a published layout.",
    )
    parser.add_argument("system", choices=RELEASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="blocks of the transformer (default 2)")
    parser.add_argument("--tiny", action="store_true", help="width 128 and a VAE of a few channels, for tests")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        write_release(options.system, options.folder, layers=options.layers, tiny=options.tiny, seed=options.seed)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def write_release(name: str, folder: Path, *, layers: int = 2, tiny: bool = False, seed: int = 0) -> None:
    """Write a checkpoint.

    Args:
        name: of `RELEASES`.
        folder: is replaced.
        tiny: one head of 128, a small VAE and face encoder; names and structure stay.
    """
    release = RELEASES[name]
    if release.layout != "causal":
        import_transformers("the encoders of a synthetic release")
    network = _network(release.network, layers, tiny)
    vae = _small(release.vae) if tiny else release.vae
    make = torch.Generator().manual_seed(seed)
    with whole_folder(folder) as into:
        # A generator of its own: one seed gives one VAE, whatever it stands beside.
        transformer, video = _transformer(network, make), _vae(vae, torch.Generator().manual_seed(seed))
        if release.layout == "diffusers":
            _write_diffusers(into, network, vae, transformer, video)
        else:
            _write_original(into, release, network, vae, transformer, video)
        if release.layout == "causal":
            # This release has no text encoder of its own: a prompt's embeddings come as a file.
            np.save(into / "prompt.npy", torch.randn(9, network.dit.text_dim, generator=make).numpy())
        else:
            _write_text_encoder(into, release.layout, network.dit.text_dim, seed)
            if network.dit.image_dim is not None:
                _write_image_encoder(into, release.layout, network.dit.image_dim, seed)


def _small(vae: VAEConfig) -> VAEConfig:
    """A VAE with the strides of a release and as few layers as its structure allows."""
    if vae.patch_size is not None:
        return replace(vae, base_dim=8, decoder_base_dim=None, num_res_blocks=1)
    # Packed pixels in the place of the first level.
    return replace(vae, base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), patch_size=2)


def _network(name: str, layers: int, tiny: bool) -> Network:
    known = PUBLISHED[name]
    dit = replace(known.dit, num_layers=layers)
    if dit.face is not None:
        # An adapter behind the first of two blocks, as behind the first of five.
        dit = replace(dit, face=replace(dit.face, block_interval=min(dit.face.block_interval, layers)))
    if tiny:
        dit = replace(dit, dim=128, ffn_dim=64, num_heads=1, freq_dim=32, text_dim=24)
        if dit.image_dim is not None:
            dit = replace(dit, image_dim=16)
        if dit.face is not None:
            face = FaceConfig(
                image_size=32, encoder_widths=(4, 6, 8, 8), style_dim=10, motion_dim=3, code_dim=14, hidden_dim=8, num_tokens=2,
                block_interval=dit.face.block_interval,
            )  # fmt: skip
            dit = replace(dit, face=face)
    return Network(dit, known.fusion)


def _transformer(network: Network, make: torch.Generator) -> dict[str, Tensor]:
    """bfloat16, and float32 for norms, modulations and small tables, as releases have them."""
    with torch.device("meta"):
        shapes = WanDiT(network.dit, network.fusion, 4, 4).state_dict()
    return {name: _drawn(name, shape.shape, make) for name, shape in shapes.items()}


def _vae(config: VAEConfig, make: torch.Generator) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = VideoVAE(config).state_dict()
    return {name: _drawn(name, shape.shape, make).float() for name, shape in shapes.items()}


def _drawn(name: str, shape: torch.Size, make: torch.Generator) -> Tensor:
    """Values that keep a signal's size from layer to layer."""
    noise = torch.randn(shape, generator=make)
    last = name.rpartition(".")[2]
    if last in ("modulation", "padding_tokens"):
        return 0.3 * noise
    if name.startswith("motion_encoder") and noise.dim() > 1:
        return noise.bfloat16()  # its layers divide by the root of their width themselves
    if last == "gamma" or noise.dim() == 1 and last == "weight":
        return 1 + 0.1 * noise
    if noise.dim() == 1:
        return (0.1 * noise).bfloat16()
    return (noise * noise[0].numel() ** -0.5).bfloat16()


def diffusers_config(network: Network) -> dict:
    """What diffusers' config.json says of a transformer: arguments of WanTransformer3DModel or WanAnimateTransformer3DModel."""
    dit, face = network.dit, network.dit.face
    config = {
        "patch_size": list(dit.patch_size), "num_attention_heads": dit.num_heads, "attention_head_dim": dit.head_dim,
        "in_channels": network.fusion.in_channels, "out_channels": dit.out_channels, "text_dim": dit.text_dim,
        "freq_dim": dit.freq_dim, "ffn_dim": dit.ffn_dim, "num_layers": dit.num_layers,
        "cross_attn_norm": dit.cross_attn_norm, "eps": dit.eps, "rope_max_seq_len": dit.max_position,
        "image_dim": dit.image_dim, "added_kv_proj_dim": dit.dim if dit.image_dim else None,
    }  # fmt: skip
    if face is None:
        return config
    return config | {
        "latent_channels": dit.pose_channels, "motion_encoder_size": face.image_size, "motion_style_dim": face.style_dim,
        "motion_encoder_channel_sizes": {
            str(face.image_size // 2**level): width for level, width in enumerate(face.encoder_widths)
        },
        "motion_dim": face.motion_dim, "motion_encoder_dim": face.code_dim, "face_encoder_hidden_dim": face.hidden_dim,
        "face_encoder_num_heads": face.num_tokens, "inject_face_latents_blocks": face.block_interval,
    }  # fmt: skip


def diffusers_vae_config(vae: VAEConfig) -> dict:
    """What diffusers' config.json says of a VAE: arguments of AutoencoderKLWan."""
    packing = vae.pixel_patch**2
    return {
        "base_dim": vae.base_dim, "decoder_base_dim": vae.decoder_base_dim, "z_dim": vae.z_dim, "dim_mult": list(vae.dim_mult),
        "num_res_blocks": vae.num_res_blocks, "attn_scales": [], "temperal_downsample": list(vae.temporal_downsample),
        "is_residual": vae.residual_resampling, "latents_mean": list(vae.latents_mean or [0.0] * vae.z_dim),
        "latents_std": list(vae.latents_std or [1.0] * vae.z_dim), "in_channels": vae.in_channels * packing,
        "out_channels": vae.out_channels * packing, "patch_size": vae.patch_size, "scale_factor_temporal": vae.temporal_stride,
        "scale_factor_spatial": vae.spatial_stride,
    }  # fmt: skip


def _write_diffusers(
    folder: Path, network: Network, vae: VAEConfig, transformer: dict[str, Tensor], video: dict[str, Tensor]
) -> None:
    tensors = layouts.to_layout(transformer, rows_of(network), "diffusers")
    _write_sharded(folder / "transformer", tensors, diffusers_config(network))
    _write_vae(folder / "vae", vae, video)
    _write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})


def _write_original(
    folder: Path, release: Release, network: Network, vae: VAEConfig, transformer: dict[str, Tensor], video: dict[str, Tensor]
) -> None:
    tensors = layouts.to_layout(transformer, rows_of(network), "original") | blur_constants(network)
    folder.mkdir(parents=True, exist_ok=True)
    if release.layout == "causal":
        # As the training saved it: two copies' names, of which the average is deployed.
        torch.save({"generator_ema": {f"model.{name}": value for name, value in tensors.items()}}, folder / "self_forcing_dmd.pt")
    else:
        dit = network.dit
        config = {
            "dim": dit.dim, "ffn_dim": dit.ffn_dim, "num_heads": dit.num_heads, "num_layers": dit.num_layers, "eps": dit.eps,
            "freq_dim": dit.freq_dim, "in_dim": network.fusion.in_channels, "out_dim": dit.out_channels, "text_len": 512,
        }  # fmt: skip
        _write_sharded(folder, tensors, config)
    if vae == WAN21_VAE:
        torch.save(layouts.to_layout(video, layouts.vae(vae), "original"), folder / "Wan2.1_VAE.pth")
    else:
        _write_vae(folder / "vae", vae, video)  # of a size that was never published, so its config has to say more than shapes


def _write_vae(folder: Path, vae: VAEConfig, video: dict[str, Tensor]) -> None:
    _write_sharded(folder, layouts.to_layout(video, layouts.vae(vae), "diffusers"), diffusers_vae_config(vae))


def _write_sharded(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """safetensors of up to `SHARD_BYTES`, with an index where there are several."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(tensors))
    stem = "diffusion_pytorch_model"
    names = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        save_file({key: value.contiguous() for key, value in shard.items()}, folder / name)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": places})
    _write_json(folder / "config.json", config)


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_text_encoder(folder: Path, layout: str, text_dim: int, seed: int) -> None:
    """A UMT5 of one thin layer and a tokenizer of letters, where the release has a large one."""
    transformers = import_transformers("a text encoder")
    # transformers brings tokenizers along.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = transformers.UMT5Config(
        vocab_size=len(letters), d_model=text_dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.UMT5EncoderModel(config).to(torch.bfloat16)
    if layout == "diffusers":
        fast.save_pretrained(folder / "tokenizer")
        model.save_pretrained(folder / "text_encoder")
    else:
        fast.save_pretrained(folder / "google" / "umt5-xxl")
        names = original_names(model.encoder.state_dict(), layouts.TEXT_ENCODER)
        torch.save(names, folder / "models_t5_umt5-xxl-enc-bf16.pth")


def _write_image_encoder(folder: Path, layout: str, image_dim: int, seed: int) -> None:
    transformers = import_transformers("a picture encoder")
    torch.manual_seed(seed)
    patch = 14
    config = transformers.CLIPVisionConfig(
        hidden_size=image_dim, intermediate_size=2 * image_dim, num_hidden_layers=2,
        num_attention_heads=max(image_dim // CLIP_HEAD_DIM, 1), hidden_act="gelu",
        image_size=patch * (IMAGE_TOKENS_SIDE if image_dim > 100 else 2), patch_size=patch,
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config)
    if layout == "diffusers":
        model.save_pretrained(folder / "image_encoder")
        return
    names = original_names(getattr(model, "vision_model", model).state_dict(), layouts.IMAGE_ENCODER)
    # The other half of the release's file, which is not looked at.
    beside = {"log_scale": [], "visual.head": [image_dim, 4], "textual.token_embedding.weight": [9, 4]}
    names |= {name: torch.zeros(shape) for name, shape in beside.items()}
    torch.save(names, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
