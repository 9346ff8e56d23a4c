"""The graphs that public Wan models have beside FactorPortrait's: what they are conditioned on, computed once per clip or portrait.

Names follow DESIGN.md: `image_k.i`, `image_v.i` per block and `face_k.i`, `face_v.i` per adapter are inputs of the transformer as
`text_k.i` is; every `*_tokens` is added to, or put before, `condition_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from factorportrait.export.models.animate import FoldedMotionEncoder
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.taehv import TinyDecoder
from factorportrait.export.models.vae_stages import _FirstStage, _SteadyStage
from factorportrait.export.stages import EXAMPLE_BATCH, EXAMPLE_FRAMES, EXAMPLE_TEXT, Stage


class _Method(nn.Module):
    """A method of the transformer: tensors in, and out a tensor or the tensors of pairs."""

    def __init__(self, dit: WanDiT, method: Callable):
        super().__init__()
        self.dit, self.method = dit, method.__name__

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = getattr(self.dit, self.method)(*args)
        return out if isinstance(out, Tensor) else tuple(tensor for pair in out for tensor in pair)


class _Streams(nn.Module):
    """Latents of every stream but the noise, in the order of the config -> condition_tokens [B,F,T,D]."""

    def __init__(self, dit: WanDiT):
        super().__init__()
        self.dit = dit

    def forward(self, *latents: Tensor) -> Tensor:
        names = [stream for stream in self.dit.fusion.streams if stream != "noise"]
        return self.dit.embed_streams(dict(zip(names, latents, strict=True)))


def wan_stages(dit: WanDiT, face_frames: int = 77) -> list[Stage]:
    """Stages of what a config has, batch 1 but for the motion encoder.

    Args:
        face_frames: driving frames of a clip, 1 + a multiple of 4; Animate was trained with 77.

    Raises:
        ValueError: another number of frames.
    """
    if (face_frames - 1) % 4:
        raise ValueError(f"face_frames: expected 1 + a multiple of 4, found {face_frames}")
    config, fusion = dit.config, dit.fusion
    rows, columns = (side * config.patch_size[1] for side in dit.grid)

    def latents(channels: int, frames: int = EXAMPLE_FRAMES, scale: int = 1) -> Tensor:
        return torch.zeros(1, channels, frames, rows * scale, columns * scale)

    def pairs(prefix: str, number: int) -> list[str]:
        return [f"{prefix}_{part}.{i}" for i in range(number) for part in "kv"]

    stages = []

    def add(name: str, module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], sizes: dict[str, dict] | None = None):
        stages.append(Stage(name, module.eval(), tuple(inputs.values()), list(inputs), outputs, sizes))

    streams = [stream for stream in fusion.streams if stream != "noise"]
    if streams:
        inputs = {f"{stream}_latents": latents(fusion.channels(stream)) for stream in streams}
        add("stream_embed", _Streams(dit), inputs, ["condition_tokens"], {name: {2: "F"} for name in inputs})
    if config.image_dim is not None:
        inputs = {"image": torch.zeros(1, EXAMPLE_TEXT, config.image_dim)}
        add("image_embed", _Method(dit, dit.embed_image), inputs, pairs("image", config.num_layers), {"image": {1: "L"}})
    if config.reference_channels is not None:
        inputs = {"reference_latents": latents(config.reference_channels, 1)}
        add("reference_embed", _Method(dit, dit.embed_reference), inputs, ["reference_tokens"])
    if config.pose_channels is not None:
        inputs = {"pose_latents": latents(config.pose_channels)}
        add("pose_embed", _Method(dit, dit.embed_pose), inputs, ["pose_tokens"], {"pose_latents": {2: "F"}})
    if config.ray_adapter is not None:
        inputs = {"rays": latents(config.ray_adapter.channels, scale=config.ray_adapter.downscale)}
        add("ray_embed", dit.control_adapter, inputs, ["ray_tokens"], {"rays": {2: "F"}})
    if config.face is not None:
        size = config.face.image_size
        inputs = {"image": torch.zeros(EXAMPLE_BATCH, 3, size, size)}
        add("motion_encoder", FoldedMotionEncoder(dit.motion_encoder), inputs, ["code"], {"image": {0: "B"}})
        inputs = {"codes": torch.zeros(1, face_frames, config.face.code_dim)}
        add("face_embed", _Method(dit, dit.embed_face), inputs, pairs("face", len(dit.face_adapter["fuser_blocks"])))
    return stages


def tiny_decoder_stages(decoder: TinyDecoder, height: int, width: int) -> list[Stage]:
    """`vae_decode_first` and `vae_decode_steady` of a tiny decoder, in the place of the VAE's own."""
    config = decoder.config
    shapes = decoder.cache_shapes(height, width)["decode"].steady
    latents = torch.zeros(1, config.z_dim, 1, height // config.spatial_stride, width // config.spatial_stride)
    caches = tuple(torch.zeros(shape, dtype=decoder.decoder[1].weight.dtype) for shape in shapes.values())
    names = [[f"cache_{way}.{i}" for i in range(len(caches))] for way in ("in", "out")]
    return [
        Stage(
            "vae_decode_first", _FirstStage(decoder, "decode_first", list(range(len(caches)))).eval(), (latents,),
            ["latents"], ["frames", *names[1]],
        ),
        Stage(
            "vae_decode_steady", _SteadyStage(decoder, "decode_steady").eval(), (latents, *caches),
            ["latents", *names[0]], ["frames", *names[1]],
        ),
    ]  # fmt: skip
