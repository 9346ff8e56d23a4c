"""The graphs that public Wan models have for their conditions, each run once per clip or portrait.

Names follow DESIGN.md: `image_k.i`, `image_v.i` per block and `face_k.i`, `face_v.i` per adapter are inputs of the transformer as
`text_k.i` is. `condition_embed` gives the tokens of the frames, `reference_embed` those of slot 0 where a system has one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorportrait.export.models.animate import FoldedMotionEncoder
from factorportrait.export.models.dit import WanDiT
from factorportrait.export.models.taehv import TinyDecoder
from factorportrait.export.models.vae_stages import _FirstStage, _SteadyStage
from factorportrait.export.stages import EXAMPLE_BATCH, EXAMPLE_FRAMES, Stage, only
from factorportrait.model_config import FRAMES_PER_LATENT, DiTConfig, FusionConfig

# What embeds an input that is no stream of the patch embedding.
_PARTS = {"pose_latents": "pose_patch_embedding", "rays": "control_adapter"}


class ConditionTokens(nn.Module):
    """Everything that the frames' tokens are made of but the noise -> condition_tokens [B,F,T,D].

    Args:
        names: of the inputs in order: `STREAM_latents` of the patch embedding [B,C,F,h,w], `pose_latents` [B,C,F,h,w] of Animate,
            `rays` [B,24,F,H,W] of Control-Camera.
    """

    def __init__(self, dit: WanDiT, names: list[str]):
        super().__init__()
        self.names = names
        self.dit = only(dit, "patch_embedding", *(_PARTS[name] for name in names if name in _PARTS))

    def forward(self, *given: Tensor) -> Tensor:
        """See the class."""
        inputs = dict(zip(self.names, given, strict=True))
        pose, rays = inputs.pop("pose_latents", None), inputs.pop("rays", None)
        tokens = self.dit.embed_streams({name.removesuffix("_latents"): value for name, value in inputs.items()})
        if pose is not None:
            tokens = tokens + self.dit.embed_pose(pose)
        if rays is not None:
            tokens = tokens + self.dit.control_adapter(rays)
        return tokens


class ReferenceTokens(nn.Module):
    """Latents of the portrait [B,C,1,h,w] -> tokens of slot 0 [B,1,T,D] (Fun Control)."""

    def __init__(self, dit: WanDiT):
        super().__init__()
        self.ref_conv, self.patch_size = dit.ref_conv, dit.config.patch_size

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        frames = latents.squeeze(2).to(self.ref_conv.weight.dtype)
        return self.ref_conv(frames).flatten(2).transpose(1, 2).unsqueeze(1)


class FaceTokens(nn.Module):
    """Motion codes -> keys and values [B,F,M,D] of every adapter (Animate).

    codes [B,4F,E] in groups of four, as all that is per frame: the first group stands for slot 0 and is not looked at, the second
    one holds the first frame four times. Slot 0 has zero tokens.
    """

    def __init__(self, dit: WanDiT):
        super().__init__()
        self.face_encoder, self.adapters = dit.face_encoder, dit.face_adapter["fuser_blocks"]

    def forward(self, codes: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        # The first frame once: the aggregator takes 1 + 4N of them.
        tokens = self.face_encoder(codes[:, 2 * FRAMES_PER_LATENT - 1 :])
        tokens = F.pad(tokens, (0, 0, 0, 0, 1, 0))
        return tuple(tensor for adapter in self.adapters for tensor in adapter.keys_values(tokens))


def condition_stages(config: DiTConfig, fusion: FusionConfig) -> dict[str, tuple[str, ...]]:
    """Names of the stages that a config asks for, and which parts of the transformer each takes.

    Keys and values of text and picture are apart: see `ContextStage`.
    """
    stages: dict[str, tuple[str, ...]] = {}
    if set(fusion.streams) != {"noise"}:
        added = ("pose_patch_embedding",) if config.pose_channels is not None else ()
        added += ("control_adapter",) if config.ray_adapter is not None else ()
        stages["condition_embed"] = ("patch_embedding", *added)
    if config.reference_channels is not None:
        stages["reference_embed"] = ("ref_conv",)
    elif config.pose_channels is not None:
        stages["reference_embed"] = ("patch_embedding",)
    if config.face is not None:
        stages |= {"motion_encoder": ("motion_encoder",), "face_embed": ("face_encoder", "face_adapter")}
    return stages


def wan_stage(dit: WanDiT, name: str) -> Stage:
    """A stage of `condition_stages`, batch 1 but for the motion encoder; of the transformer it takes what is said there."""
    config, fusion = dit.config, dit.fusion
    if name not in condition_stages(config, fusion):
        raise ValueError(f"expected a stage of {', '.join(condition_stages(config, fusion)) or 'none'}, found {name}")
    rows, columns = (side * config.patch_size[1] for side in dit.grid)

    def latents(channels: int, frames: int = EXAMPLE_FRAMES, scale: int = 1) -> Tensor:
        return torch.zeros(1, channels, frames, rows * scale, columns * scale)

    sizes, outputs = None, ["condition_tokens"]
    streams = {f"{stream}_latents": latents(fusion.channels(stream)) for stream in fusion.streams if stream != "noise"}
    if name == "condition_embed":
        inputs = dict(streams)
        if config.pose_channels is not None:
            inputs["pose_latents"] = latents(config.pose_channels)
        if config.ray_adapter is not None:
            inputs["rays"] = latents(config.ray_adapter.channels, scale=config.ray_adapter.downscale)
        sizes = {name: {2: "F"} for name in inputs}
        module = ConditionTokens(dit, list(inputs))
    elif name == "reference_embed" and config.reference_channels is not None:
        inputs = {"reference_latents": latents(config.reference_channels, 1)}
        module = ReferenceTokens(dit)
    elif name == "reference_embed":
        # Slot 0 is the portrait, which has no pose: the pose's embedding, its bias too, is left out.
        inputs = {name: value[:, :, :1] for name, value in streams.items()}
        module = ConditionTokens(dit, list(inputs))
    elif name == "motion_encoder":
        inputs = {"image": torch.zeros(EXAMPLE_BATCH, 3, config.face.image_size, config.face.image_size)}
        module, outputs, sizes = FoldedMotionEncoder(dit.motion_encoder), ["code"], {"image": {0: "B"}}
    else:
        inputs = {"codes": torch.zeros(1, FRAMES_PER_LATENT * EXAMPLE_FRAMES, config.face.code_dim)}
        module, sizes = FaceTokens(dit), {"codes": {1: "4*F"}}
        outputs = [f"face_{part}.{i}" for i in range(len(dit.face_adapter["fuser_blocks"])) for part in "kv"]
    return Stage(name, module.eval(), tuple(inputs.values()), list(inputs), outputs, sizes)


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
