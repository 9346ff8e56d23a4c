"""Frozen configurations, read from JSON. No torch here: the runtime imports this module."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from factorportrait.errors import CheckpointError

Config = TypeVar("Config")


def config_from_dict(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Build the frozen dataclass `cls` from a JSON object; lists become tuples, so that the config stays hashable.

    Args:
        cls: the dataclass.
        data: its fields by name; fields with a default may be missing.
        where: what the errors call the source, such as "config.json: vae".

    Raises:
        CheckpointError: `data` is no object, has a key that is not a field, lacks a field, or a value is refused.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(where, expected="a JSON object", found=type(data).__name__)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        action = f"did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(
            f"{where}: unknown key {unknown[0]!r}", expected="one of " + ", ".join(fields), action=action
        )
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise CheckpointError(f"{where}: missing " + ", ".join(missing), action="add it")
    try:
        return cls(**{name: _frozen(value) for name, value in data.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def config_to_dict(config: Any) -> dict[str, Any]:
    """The JSON object that `config_from_dict` reads back to an equal config."""
    return {field.name: _thawed(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of a causal video VAE with the structure of Wan 2.1.

    Attributes:
        base_dim: channels of the encoder's first level; level i has `base_dim * dim_mult[i]`.
        z_dim: latent channels.
        dim_mult: one multiplier per level; between two levels height and width halve.
        num_res_blocks: residual blocks per encoder level; a decoder level has one more.
        temporal_downsample: for each step between levels, in encoder order, whether time halves too.
        decoder_base_dim: the decoder's `base_dim`; None for the encoder's.
        attn_scales: scales (1, 1/2, ...) whose levels have attention after each residual block.
        patch_size: pixels of a patch are packed on channels before the first convolution; None for no packing.
        in_channels, out_channels: channels of a pixel, before packing.
        latents_mean, latents_std: of the raw latents, one number per channel; None for 0 and 1.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    decoder_base_dim: int | None = None
    attn_scales: tuple[float, ...] = ()
    patch_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("base_dim", "z_dim", "num_res_blocks", "decoder_base_dim", "patch_size", "in_channels"):
            value = getattr(self, name)
            if value is None and name in ("decoder_base_dim", "patch_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{name}", expected="a positive integer", found=repr(value))
        for name in ("dim_mult", "temporal_downsample", "attn_scales"):
            if not isinstance(getattr(self, name), tuple):
                raise CheckpointError(f"{name}", expected="a list", found=repr(getattr(self, name)))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                "temporal_downsample",
                expected=f"one flag per step between the {len(self.dim_mult)} levels of dim_mult",
                found=f"{len(self.temporal_downsample)} flags",
            )
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, tuple) or len(value) != self.z_dim):
                raise CheckpointError(f"{name}", expected=f"{self.z_dim} numbers, one per latent channel")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise CheckpointError("latents_std", expected="numbers above 0", found=str(min(self.latents_std)))

    @property
    def pixel_patch(self) -> int:
        """Pixels along one side of a patch."""
        return self.patch_size or 1

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a latent cell."""
        return self.pixel_patch * 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        """Frames of every latent frame but the first, which has one."""
        return 2 ** sum(self.temporal_downsample)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in latent cells of a picture of `height` x `width` pixels.

        Raises:
            CheckpointError: the picture is no whole number of cells.
        """
        if height % self.spatial_stride or width % self.spatial_stride:
            raise CheckpointError(
                "the size of the frames does not fit the VAE",
                expected=f"multiples of {self.spatial_stride}",
                found=f"{height} x {width}",
            )
        return height // self.spatial_stride, width // self.spatial_stride

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of 1 + n * temporal_stride frames.

        Raises:
            CheckpointError: the clip does not end with a whole group.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal_stride:
            raise CheckpointError(
                "the clip does not fit the VAE",
                expected=f"1 + n * {self.temporal_stride} frames",
                found=f"{num_frames}",
            )
        return 1 + (num_frames - 1) // self.temporal_stride
