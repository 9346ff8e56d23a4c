"""Frozen configurations, read from JSON. No torch here: the runtime imports this module."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from factorportrait.errors import CheckpointError

Config = TypeVar("Config")
CORRECT = "correct config.json"
_KINDS = {
    bool: ("true or false", "flags"), int: ("an integer", "integers"), float: ("a number", "numbers"),
    str: ("a string", "strings"), type(None): ("null", "nulls"),
}  # fmt: skip


def config_from_dict(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Build the frozen dataclass `cls` from a JSON object; its annotations say what a value may be.

    Lists become tuples, so that the config stays hashable; integers become floats where those are meant.

    Args:
        cls: the dataclass.
        data: its fields by name; fields with a default may be missing.
        where: what the errors call the source, such as "config.json: vae".

    Raises:
        CheckpointError: `data` is no object, has a key that is not a field, lacks a field, or a value is of another type
            or refused.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(where, expected="a JSON object", found=type(data).__name__, action=CORRECT)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise CheckpointError(
            f"{where}: unknown key {unknown[0]!r}{hint}", expected="one of " + ", ".join(fields), action=CORRECT
        )
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise CheckpointError(f"{where}: missing " + ", ".join(missing), action="add it")
    kinds = _annotations(cls)
    values = {name: checked_value(kinds[name], value, f"{where}: {name}") for name, value in data.items()}
    try:
        return cls(**values)
    except CheckpointError as error:
        raise CheckpointError(
            f"{where}: {error.what}", expected=error.expected, found=error.found, action=error.action
        ) from error


def checked_value(kind: Any, value: Any, where: str) -> Any:
    """A parsed JSON value as an annotation wants it.

    Args:
        kind: bool, int, float, str, a dataclass, Any, or a tuple, a union or a Mapping of these.
        value: what the file says.
        where: what the error calls it.

    Raises:
        CheckpointError: it is something else; a number is not finite.
    """
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else config_from_dict(kind, value, where)
    if get_origin(kind) in (Union, types.UnionType) and isinstance(value, Mapping):
        parts = [part for part in get_args(kind) if dataclasses.is_dataclass(part)]
        if parts:
            known = (part for part in parts if set(value) <= {field.name for field in dataclasses.fields(part)})
            return config_from_dict(next(known, parts[0]), value, where)
    if not _fits(kind, value):
        found = json.dumps(value, default=repr, ensure_ascii=False)
        found = found if len(found) <= 60 else found[:57] + "..."
        raise CheckpointError(where, expected=_described(kind), found=found, action=CORRECT)
    return _converted(kind, value, where)


def require_positive(config: Any, *names: str) -> None:
    """Raises CheckpointError unless each of these numbers, or lists of numbers, is above 0; None is let pass."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or not all(number > 0 for number in numbers):
            kind = "integer" if all(isinstance(number, int) for number in numbers) else "number"
            expected = f"a list of positive {kind}s" if isinstance(value, tuple) else f"a positive {kind}"
            found = str(list(value) if isinstance(value, tuple) else value)
            raise CheckpointError(name, expected=expected, found=found, action=CORRECT)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The JSON object that `config_from_dict` reads back to an equal config."""
    return {field.name: _thawed(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


_annotations = functools.cache(get_type_hints)


def _fits(kind: Any, value: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if dataclasses.is_dataclass(kind):
        return isinstance(value, (kind, Mapping))
    if origin in (Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if parts[1:] == (...,):
            return all(_fits(parts[0], item) for item in value)
        return len(value) == len(parts) and all(map(_fits, parts, value))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(parts[1], item) for item in value.values())
    if kind is float:
        try:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        except OverflowError:  # an integer beyond every float
            return False
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _converted(kind: Any, value: Any, where: str) -> Any:
    """A value that fits."""
    origin, parts = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else config_from_dict(kind, value, where)
    if origin in (Union, types.UnionType):
        return _converted(next(part for part in parts if _fits(part, value)), value, where)
    if origin is tuple:
        each = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return tuple(_converted(part, item, f"{where}: {i}") for i, (part, item) in enumerate(zip(each, value, strict=True)))
    if origin is Mapping:
        return {name: _converted(parts[1], item, f"{where}: {name}") for name, item in value.items()}
    return float(value) if kind is float else value


def _described(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return "a JSON object"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, parts))
    if origin is Mapping:
        return "a JSON object" + (f" of {_KINDS[parts[1]][1]}" if parts[1] in _KINDS else "")
    if origin is tuple:
        number = "" if parts[1:] == (...,) else f"{len(parts)} "
        items = _KINDS[parts[0]][1] if parts[0] in _KINDS else _described(parts[0])
        return f"a list of {number}{items}"
    return "a JSON object" if dataclasses.is_dataclass(kind) else _KINDS[kind][0]


def _thawed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


class LatentGrid:
    """How the latents of a causal video VAE lie over frames. A part of the VAE configs.

    Attributes:
        spatial_stride: pixels along one side of a latent cell.
        temporal_stride: frames of every latent frame but the first, which has one.
    """

    spatial_stride: int
    temporal_stride: int

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
                action="choose another height and width",
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
                action="choose another number of frames",
            )
        return 1 + (num_frames - 1) // self.temporal_stride

    def _check_statistics(self) -> None:
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.z_dim:
                raise CheckpointError(
                    name, expected=f"{self.z_dim} numbers, one per latent channel", found=str(len(value)), action=CORRECT
                )
        require_positive(self, "latents_std")


@dataclasses.dataclass(frozen=True)
class VAEConfig(LatentGrid):
    """Sizes of a causal video VAE with the structure of Wan 2.1, or with `residual_resampling` that of Wan 2.2.

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
        residual_resampling: Wan 2.2: every level has a shortcut around it that only averages or repeats, and upsampling
            keeps the channels.
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
    residual_resampling: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "base_dim", "z_dim", "dim_mult", "num_res_blocks", "decoder_base_dim", "patch_size")
        require_positive(self, "in_channels", "out_channels")
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise CheckpointError(
                "temporal_downsample",
                expected=f"one flag per step between the {len(self.dim_mult)} levels of dim_mult",
                found=f"{len(self.temporal_downsample)} flags",
                action=CORRECT,
            )
        self._check_statistics()
        if self.residual_resampling and self.attn_scales:
            raise CheckpointError(
                "attn_scales", expected="an empty list, as Wan 2.2 has", found=str(list(self.attn_scales)), action=CORRECT
            )

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


@dataclasses.dataclass(frozen=True)
class PatchVAEConfig(LatentGrid):
    """Sizes of a light causal video VAE: a linear encoder of patches of four frames, and a small decoder.

    Attributes:
        z_dim: latent channels.
        cell_size: pixels along one side of a patch, which becomes one latent cell.
        cell_dim, cell_blocks: channels and residual blocks of the decoder at the cells, once per latent frame.
        fine_dim, fine_blocks: the same at `cell_size / 2` times as many cells a side, for every frame.
        latents_mean, latents_std: of the raw latents, one number per channel; None for 0 and 1.
    """

    z_dim: int
    cell_size: int = 8
    cell_dim: int = 128
    cell_blocks: int = 3
    fine_dim: int = 64
    fine_blocks: int = 2
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    in_channels: ClassVar[int] = 3
    temporal_stride: ClassVar[int] = 4

    def __post_init__(self) -> None:
        require_positive(self, "z_dim", "cell_size", "cell_dim", "cell_blocks", "fine_dim", "fine_blocks")
        if self.cell_size % 2:
            raise CheckpointError("cell_size", expected="an even number of pixels", found=str(self.cell_size), action=CORRECT)
        self._check_statistics()

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a latent cell."""
        return self.cell_size
