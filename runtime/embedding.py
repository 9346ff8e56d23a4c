"""Fused pose and camera embedding: from cameras and latents straight to condition tokens.

The patch embedding is a `Conv3d` with kernel and stride (1, 2, 2) over `[reference, noise, camera, pose]`, so it is
linear, and all but the noise's share of a token does not change from step to step. The extension computes that share
without ray maps, packed frames or a concatenated tensor in memory. Without the extension the same algebra runs in
NumPy; `implementation()` says which one is in use.

Ray channels are `[o x d, d]` with `d = R c`. They are linear in the direction `c` in the camera's own space, so six
channels of weights fold into three per frame, and four frames with the same intrinsics into three altogether
(`cpp_ext/kernels/rays.h`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from factorportrait.bundle import EMBED_BIAS, EMBED_WEIGHT
from factorportrait.cores import usable_cores
from factorportrait.engines.base import Engine
from factorportrait.errors import UserError
from factorportrait.model_config import ModelConfig
from factorportrait.runtime.kernel_embedding import KernelEmbedding, open_kernel_embedding
from factorportrait.runtime.media.camera import check_cameras

try:
    from factorportrait import _embed
except ImportError as error:
    _embed = None
    _missing = str(error)
else:
    _missing = ""

ENVIRONMENT = "FACTORPORTRAIT_EMBED"
KINDS = ("auto", "fused", "graph")
CHANNEL_NAMES = ("reference", "noise", "camera", "pose")
RAY_CHANNELS = 6
FRAMES_PER_GROUP = 4


class _Core(Protocol):
    """What both implementations offer. Arrays are checked before they come here."""

    def embed_reference(self, latents: np.ndarray | None, *, out: np.ndarray) -> None: ...

    def embed_chunk(
        self,
        K: np.ndarray | None,
        c2w: np.ndarray | None,
        pose_latents: np.ndarray | None,
        *,
        num_slots: int,
        out: np.ndarray,
    ) -> None: ...


def implementations() -> tuple[str, ...]:
    """Names that `FusedEmbedding(implementation=...)` takes on this machine besides "auto", the fastest last."""
    return ("numpy", *(_embed.supported_isas() if _embed else ()))


def implementation(name: str = "auto") -> str:
    """Resolve an implementation: "auto" is the fastest one, or what the variable FACTORPORTRAIT_EMBED names.

    Raises:
        ValueError: not a name of `implementations()`.
        UserError: the variable names none.
    """
    names, reason = implementations(), f"the C++ extension is not installed ({_missing})" if _missing else ""
    if name != "auto":
        if name not in names:
            raise ValueError(f"implementation: expected one of auto, {', '.join(names)}, got {name!r}{reason and '; ' + reason}")
        return name
    named = os.environ.get(ENVIRONMENT, "auto")
    if named not in ("auto", *names):
        raise UserError(
            ENVIRONMENT, expected=f"auto or {', '.join(names)}", found=named, action=reason or "choose one of these"
        )
    return names[-1] if named == "auto" else named


def describe_implementation() -> str:
    """One line for `doctor` and reports: what computes the embedding here, and why."""
    name = implementation()
    if name != "numpy":
        return f"C++ extension, {name}"
    return f"NumPy; the C++ extension is not installed ({_missing})" if _missing else "NumPy, as asked for"


def choose_embedding(
    kind: str, *, config: ModelConfig, arrays: Mapping[str, np.ndarray], engine: Engine
) -> tuple[FusedEmbedding | KernelEmbedding | None, str]:
    """What embeds a bundle's conditions, None for its graph `condition_embed`, and why.

    Args:
        kind: of `KINDS`; "auto" takes the extension where it is built and the engine works in the host's memory. "fused" are, on a
            device that runs them, the kernels of embed.cu; else the extension.
        arrays: the bundle's constants.
        engine: whose buffers take the tokens. A call has as many threads as its operators; where those run on a device, one per
            usable core.

    Raises:
        UserError: not of `KINDS`, "fused" for a bundle without the weights, or FACTORPORTRAIT_EMBED names nothing that runs here.
    """
    if kind not in KINDS:
        raise UserError("--embedding", expected=" or ".join(KINDS), found=kind, action="leave it out to have it chosen")
    if kind == "graph":
        return None, "asked for"
    if missing := [name for name in (EMBED_WEIGHT, EMBED_BIAS) if name not in arrays]:
        reason = f"the bundle's constants have no {missing[0]}: it was made by an older version"
        if kind == "fused":
            raise UserError("--embedding fused", expected="a bundle with weights for it", found=reason, action="export it again")
        return None, reason
    unknown = [name for name in config.fusion.streams if name not in CHANNEL_NAMES]
    if unknown:
        if kind == "fused":
            raise UserError(
                "--embedding fused", expected=f"streams {', '.join(CHANNEL_NAMES)}", found=", ".join(unknown),
                action="use --embedding graph",
            )  # fmt: skip
        return None, f"it knows no stream {unknown[0]}"
    if kind == "auto" and engine.device != "cpu":
        return None, f"the extension computes on the host, the engine on {engine.device}"
    if kind == "auto" and engine.name == "torch":
        return None, "the engine torch, which others are measured against, runs its own modules"
    if engine.device != "cpu" and set(config.fusion.streams) == set(CHANNEL_NAMES):
        kernels = open_kernel_embedding(config, engine, arrays[EMBED_WEIGHT], arrays[EMBED_BIAS])
        if kernels is not None:
            return kernels, f"CUDA kernels on {engine.device}"
    if implementation() == "numpy" and kind == "auto":
        return None, describe_implementation()
    fused = FusedEmbedding(
        arrays[EMBED_WEIGHT], arrays[EMBED_BIAS],
        channels={name: config.fusion.channels(name) for name in config.fusion.streams},
        latent_height=config.latent_height, latent_width=config.latent_width, stride=config.vae.spatial_stride,
        num_threads=getattr(engine, "threads", None) or usable_cores(),
    )  # fmt: skip
    return fused, describe_implementation()


class FusedEmbedding:
    """Embeds everything but the noise.

    Args:
        weight: `[D, C, 1, p, p]` (or `[D, C, p, p]`) float32, of the patch embedding.
        bias: `[D]` float32.
        channels: what the C input channels are, in their order: name -> count, names of `CHANNEL_NAMES`. "camera" has
            24 channels (the four frames of a group, one after the other) or 6 (its last frame).
        latent_height, latent_width: size of a latent frame in cells; a last odd row or column is left out, as by the
            convolution.
        stride: pixels of the output per latent cell.
        num_threads: bound on the threads of a call; 0 means one per CPU.
        implementation: "auto" or one of `implementations()`.

    Arrays come in and go out as NumPy arrays; anything with `__dlpack__` on the CPU is taken too, without a copy, and
    results have it.
    """

    def __init__(
        self,
        weight: Any,
        bias: Any,
        *,
        channels: Mapping[str, int],
        latent_height: int,
        latent_width: int,
        stride: int = 8,
        num_threads: int = 0,
        implementation: str = "auto",
    ):
        weight, bias = _array("weight", weight), _array("bias", bias)
        if weight.ndim == 5 and weight.shape[2] == 1:
            weight = weight[:, :, 0]
        if weight.ndim != 4 or weight.dtype != np.float32:
            raise _mismatch("weight", "float32 [D, C, 1, p, p]", weight)
        self.dim, num_channels = weight.shape[:2]
        self.patch_size = weight.shape[2:]
        _check("bias", bias, (self.dim,))
        unknown = [name for name in channels if name not in CHANNEL_NAMES]
        if unknown or sum(channels.values()) != num_channels:
            names = ", ".join(CHANNEL_NAMES)
            raise ValueError(f"channels: expected {names} with {num_channels} in all, got {dict(channels)}")
        self.channels = {name: int(channels.get(name, 0)) for name in CHANNEL_NAMES}
        if self.channels["camera"] not in (0, RAY_CHANNELS, FRAMES_PER_GROUP * RAY_CHANNELS):
            raise ValueError(f"channels: expected 0, 6 or 24 for camera, got {self.channels['camera']}")
        starts, start = dict.fromkeys(CHANNEL_NAMES, 0), 0
        for name, count in channels.items():
            starts[name], start = start, start + count
        self.latent_height, self.latent_width, self.stride = latent_height, latent_width, stride
        rows, columns = latent_height // self.patch_size[0], latent_width // self.patch_size[1]
        if rows < 1 or columns < 1 or not stride > 0:
            raise ValueError(
                f"latent_height, latent_width, stride: expected at least one patch of {self.patch_size} cells and a "
                f"positive stride, got {latent_height}, {latent_width}, {stride}"
            )
        self.tokens_per_frame = rows * columns
        if num_threads < 0:
            raise ValueError(f"num_threads: expected 0 (all) or more, got {num_threads}")
        self.implementation = globals()["implementation"](implementation)
        ranges = {name: (starts[name], self.channels[name]) for name in ("reference", "camera", "pose")}
        self._core: _Core
        if self.implementation == "numpy":
            self._core = _NumpyCore(
                weight, bias, latent_height=latent_height, latent_width=latent_width, stride=stride, **ranges
            )
        else:
            self._core = _embed.FusedEmbedding(
                np.ascontiguousarray(weight),
                np.ascontiguousarray(bias),
                latent_height=latent_height,
                latent_width=latent_width,
                stride=stride,
                num_threads=num_threads,
                isa=self.implementation,
                **ranges,
            )

    def embed_reference(self, latents: Any | None, *, out: Any | None = None, dtype: Any = np.float32) -> np.ndarray:
        """Tokens of slot 0: latents `[z, h, w]` float32, or None when it is dropped -> `[T, D]`.

        `dtype` is float32 or float16; it is not used when the tokens go to `out`.

        Raises:
            ValueError: a shape or dtype that does not fit, by name.
        """
        if latents is not None:
            latents = _latents("latents", latents, (self.channels["reference"], self.latent_height, self.latent_width))
        result, target = self._output(out, self.tokens_per_frame, dtype)
        self._core.embed_reference(latents, out=target)
        return result

    def embed_chunk(
        self,
        K: Any | None,
        c2w: Any | None,
        pose_latents: Any | None,
        *,
        num_slots: int | None = None,
        out: Any | None = None,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """Tokens of N latent frames.

        Args:
            K: `[F, 3, 3]`, or `[3, 3]` for all frames; pixels of the output, pixel centres at +0.5. float64 or float32.
            c2w: `[F, 4, 4]` OpenCV camera in head space. F is 4N; 4N-3 at the start of a clip, whose first latent frame
                holds frame 0 alone; or N with 6 camera channels, for the last frame of each group. K and c2w are None
                when the camera is dropped.
            pose_latents: `[z, N, h, w]` float32, or None when the pose is dropped.
            num_slots: N, needed only when `pose_latents` is None.
            out: `[N*T, D]` float32 or float16, C-contiguous; a new array of `dtype` otherwise.

        Raises:
            ValueError: a shape or dtype that does not fit, by name; a camera that has no rays.
        """
        if pose_latents is not None:
            pose_latents = _array("pose_latents", pose_latents)
            if num_slots is None and pose_latents.ndim == 4:
                num_slots = pose_latents.shape[1]
            shape = (self.channels["pose"], num_slots or 1, self.latent_height, self.latent_width)
            pose_latents = _latents("pose_latents", pose_latents, shape)
        if num_slots is None or num_slots < 1:
            raise ValueError(
                f"num_slots: expected at least 1 (it is needed when pose_latents is None), got {num_slots}"
            )
        if (K is None) != (c2w is None):
            raise ValueError("K, c2w: expected both or neither")
        if K is not None:
            K, c2w = _matrices("K", K), _matrices("c2w", c2w)
            if K.ndim == 2:
                K = K[None]
            allowed = {FRAMES_PER_GROUP * num_slots, FRAMES_PER_GROUP * num_slots - 3}
            if self.channels["camera"] == RAY_CHANNELS:
                allowed.add(num_slots)
            if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or len(c2w) not in allowed:
                counts = " or ".join(str(n) for n in sorted(allowed))
                raise _mismatch("c2w", f"[F, 4, 4] with F {counts} for {num_slots} slots", c2w)
            if K.ndim != 3 or K.shape[1:] != (3, 3) or len(K) not in (1, len(c2w)):
                raise _mismatch("K", f"[3, 3], [1, 3, 3] or {[len(c2w), 3, 3]}", K)
        result, target = self._output(out, num_slots * self.tokens_per_frame, dtype)
        self._core.embed_chunk(K, c2w, pose_latents, num_slots=num_slots, out=target)
        return result

    def embed_clip(
        self,
        reference_latents: Any | None,
        K: Any | None,
        c2w: Any | None,
        pose_latents: Any | None,
        *,
        num_slots: int | None = None,
        out: Any | None = None,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """Tokens of slot 0 and N latent frames: `[(1+N)*T, D]`. Arguments: see `embed_reference` and `embed_chunk`."""
        if num_slots is None:
            if pose_latents is None or len(pose_latents.shape) != 4:
                raise ValueError("num_slots: needed when pose_latents is not [z, N, h, w]")
            num_slots = pose_latents.shape[1]
        result, target = self._output(out, (1 + num_slots) * self.tokens_per_frame, dtype)
        self.embed_reference(reference_latents, out=target[: self.tokens_per_frame])
        self.embed_chunk(K, c2w, pose_latents, num_slots=num_slots, out=target[self.tokens_per_frame :])
        return result

    def _output(self, out: Any | None, rows: int, dtype: Any) -> tuple[Any, np.ndarray]:
        """What the caller gets, and the array that is written."""
        if out is None:
            if np.dtype(dtype) not in (np.float32, np.float16):
                raise ValueError(f"dtype: expected float32 or float16, got {np.dtype(dtype)}")
            array = _aligned_empty((rows, self.dim), np.dtype(dtype))
            return array, array
        array = _array("out", out)
        if not array.flags.writeable:
            # Some versions of NumPy hand out everything from DLPack as read-only; torch's tensors have another way.
            other = np.asarray(out)
            if other.flags.writeable and other.ctypes.data == array.ctypes.data:
                array = other
        if array.dtype not in (np.float32, np.float16) or array.shape != (rows, self.dim):
            raise _mismatch("out", f"float32 or float16 {[rows, self.dim]}", array)
        if not (array.flags.c_contiguous and array.flags.writeable and array.flags.aligned):
            raise ValueError("out: expected an array that is C-contiguous, aligned and writeable")
        return out, array


class _NumpyCore:
    """The same algebra in NumPy: folded camera weights and one matrix product per latent frame."""

    def __init__(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        *,
        reference: tuple[int, int],
        camera: tuple[int, int],
        pose: tuple[int, int],
        latent_height: int,
        latent_width: int,
        stride: float,
    ):
        patch_height, patch_width = weight.shape[2:]
        self.bias = bias.copy()
        self.patch = patch_height, patch_width
        self.tokens = latent_height // patch_height, latent_width // patch_width

        def part(start: int, count: int) -> np.ndarray:  # [count, p, p, D]
            return np.ascontiguousarray(weight[:, start : start + count].transpose(1, 2, 3, 0))

        self.reference_weight = part(*reference).reshape(-1, len(bias))
        self.pose_weight = part(*pose).reshape(-1, len(bias))
        frames = camera[1] // RAY_CHANNELS
        cells = patch_height * patch_width
        self.camera_weight = part(*camera).reshape(frames, RAY_CHANNELS, cells * len(bias)).astype(np.float64)
        y = (np.arange(self.tokens[0] * patch_height) + 0.5) * stride
        x = (np.arange(self.tokens[1] * patch_width) + 0.5) * stride
        self.pixels = np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), np.ones((len(y), len(x)))])  # [3, h, w]

    def embed_reference(self, latents: np.ndarray | None, *, out: np.ndarray) -> None:
        tokens = self.bias if latents is None else self._patches(latents) @ self.reference_weight + self.bias
        with np.errstate(over="ignore"):  # float16 output: too large becomes infinite, as in the extension
            out[:] = tokens

    def embed_chunk(
        self,
        K: np.ndarray | None,
        c2w: np.ndarray | None,
        pose_latents: np.ndarray | None,
        *,
        num_slots: int,
        out: np.ndarray,
    ) -> None:
        cameras = None
        frames_used = len(self.camera_weight)
        if K is not None and frames_used:
            cameras = K if len(K) == len(c2w) else np.broadcast_to(K, (len(c2w), 3, 3)), c2w
            check_cameras(*cameras)
        num_tokens = len(out) // num_slots
        for slot in range(num_slots):
            tokens = np.broadcast_to(self.bias, (num_tokens, len(self.bias)))
            if pose_latents is not None:
                tokens = tokens + self._patches(pose_latents[:, slot]) @ self.pose_weight
            if cameras is not None:
                group = [_group_frame(len(c2w), num_slots, slot, j) for j in range(FRAMES_PER_GROUP)][-frames_used:]
                patches, weight = self._fold(cameras[0][group], cameras[1][group])
                tokens = tokens + patches @ weight
            with np.errstate(over="ignore"):
                out[slot * num_tokens : (slot + 1) * num_tokens] = tokens

    def _patches(self, planes: np.ndarray) -> np.ndarray:
        """planes `[c, h, w]` -> `[T, c*p*p]`."""
        (height, width), (rows, columns) = self.patch, self.tokens
        planes = planes[:, : rows * height, : columns * width].reshape(-1, rows, height, columns, width)
        return planes.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)

    def _fold(self, K: np.ndarray, c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cameras `[frames, ...]` of a group -> directions `[T, rays*3*p*p]` and weights `[rays*3*p*p, D]`, float32."""
        rotation, origin = c2w[:, :3, :3], c2w[:, :3, 3]
        shared = (K == K[0]).all() and np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max() < 1e-6
        basis = rotation if shared else np.broadcast_to(np.eye(3), rotation.shape)
        moments = np.cross(origin[:, :, None], basis, axis=1)
        folds = np.concatenate([moments, basis], axis=1)  # [frames, 6, 3]
        folded = folds.transpose(0, 2, 1) @ self.camera_weight  # [frames, 3, p*p*D]
        maps = np.linalg.inv(K[:1]) if shared else rotation @ np.linalg.inv(K)
        if shared:
            folded = folded.sum(0, keepdims=True)
        directions = np.einsum("rij,jhw->rihw", maps, self.pixels)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        patches = self._patches(directions.reshape(-1, *directions.shape[2:]).astype(np.float32))
        return patches, folded.reshape(patches.shape[1], -1).astype(np.float32)


def _group_frame(num_frames: int, num_slots: int, slot: int, j: int) -> int:
    """Which input frame is frame `j` of the group of `slot`? As `group_frame` in rays.h."""
    if num_frames == FRAMES_PER_GROUP * num_slots:
        return FRAMES_PER_GROUP * slot + j
    if num_frames == FRAMES_PER_GROUP * num_slots - 3:
        return 0 if slot == 0 else FRAMES_PER_GROUP * slot - 3 + j
    return slot


def _mismatch(name: str, expected: str, array: np.ndarray) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {array.dtype} {list(array.shape)}")


def _check(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise _mismatch(name, f"float32 {list(shape)}", array)


def _array(name: str, value: Any) -> np.ndarray:
    """An array over the memory of `value`: NumPy, or DLPack on the CPU. Lists are refused, their dtype is a guess."""
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__dlpack__"):
        raise ValueError(f"{name}: expected a NumPy array or an object with __dlpack__, got {type(value).__name__}")
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: expected a tensor on the CPU without gradient; DLPack says: {error}") from error


def _latents(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Checked latents. Channels and slots may lie anywhere; rows and columns are made contiguous."""
    array = _array(name, value)
    _check(name, array, shape)
    item, width = array.itemsize, array.shape[-1]
    dense = array.strides[-2:] == (item * width, item) and all(stride % item == 0 for stride in array.strides)
    return array if dense and array.flags.aligned else np.ascontiguousarray(array)


def _matrices(name: str, value: Any) -> np.ndarray:
    array = _array(name, value)
    if array.dtype not in (np.float64, np.float32):
        raise ValueError(f"{name}: expected float64 or float32, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float64)


def _aligned_empty(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, on a 64-byte line, so that whole lines can be written past the caches."""
    size = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
