"""The fused embedding on a GPU: cameras and latents that lie there -> condition tokens, by the kernels of embed.cu.

The mathematics is that of `factorportrait.runtime.embedding`: rays are made for each latent cell where they are multiplied, so ray
maps and concatenated streams never exist. Everything but the cameras' upload may be a part of a recorded chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from factorportrait.engines.base import Buffer, Engine, Kernels, Mirrored, dtype_name
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.media.camera import check_cameras

if TYPE_CHECKING:
    from factorportrait.runtime.conditions import Group

FILE = "embed.cu"
KERNELS = ("embed_prepare_cameras", "embed_fold_cameras", "embed_tokens_f32", "embed_tokens_f16")
RAY_CHANNELS = 6
# Threads along each axis of a block, as embed.cu wants them, and the tokens and columns of a block.
CAMERAS_PER_BLOCK, COLUMNS_PER_BLOCK, SIDE, TILE = 4, 16, 16, 64


class KernelEmbedding:
    """The patch embedding's weights on the device, in the kernels' order.

    Args:
        kernels: of `FILE`.
        weight, bias: [D, C, 1, p, p] and [D] float32, C as in the config's streams.
    """

    def __init__(self, config: ModelConfig, engine: Engine, kernels: Kernels, weight: np.ndarray, bias: np.ndarray):
        self.config, self.engine, self.kernels = config, engine, kernels
        self.dim, _, _, *patch = weight.shape
        self.patch = tuple(patch)
        self.rows, self.columns = config.latent_height // patch[0], config.latent_width // patch[1]
        self.cells = patch[0] * patch[1]
        camera, *latents = (
            weight[:, config.fusion.slice(name), 0].reshape(self.dim, -1, self.cells) for name in ("camera", "reference", "pose")
        )
        self.camera_channels = camera.shape[1]
        self.camera_weight = self._upload(camera.transpose(2, 1, 0))  # [cell, channel, D]
        # [channel, cell, D], the reference's channels in front of the pose's.
        self.latent_weight = self._upload(np.concatenate([each.reshape(self.dim, -1) for each in latents], axis=1).T)
        self.bias = self._upload(bias)

    def _upload(self, array: np.ndarray) -> Buffer:
        buffer = self.engine.zeros(array.shape, str(array.dtype))
        host = Mirrored(self.engine, buffer)
        host.array[...] = array
        host.send()
        return buffer


class KernelEmbedder:
    """Condition tokens of F slots; see `factorportrait.runtime.conditions.GraphEmbedder`.

    Args:
        dropped: per condition set the factors that are taken away.
        tokens: per set the buffer [1, F, T, D] that is written, float32 or float16.
        with_reference, with_frames: what these slots hold.
    """

    def __init__(
        self, embedding: KernelEmbedding, dropped: Sequence[frozenset[str]], tokens: Sequence[Buffer], *, with_reference: bool,
        with_frames: bool,
    ):  # fmt: skip
        self._embedding, self._dropped, self._tokens = embedding, dropped, tokens
        self._with_reference, self._with_frames = with_reference, with_frames
        engine, config, num_slots = embedding.engine, embedding.config, tokens[0].shape[1]
        self._num_slots, channels = num_slots, config.vae.z_dim
        plane = config.latent_height * config.latent_width
        latents = engine.zeros((1, 2 * channels, num_slots, config.latent_height, config.latent_width), "float32")
        shape, pose_at = (1, channels, *latents.shape[2:]), channels * num_slots * plane
        self._latents = {"reference": engine.view(latents, shape), "pose": engine.view(latents, shape, pose_at)}
        if with_frames:
            per_slot = embedding.camera_channels // RAY_CHANNELS
            frames = num_slots * FRAMES_PER_LATENT
            self._K, self._c2w = (Mirrored(engine, engine.zeros((frames, size, size), "float64")) for size in (3, 4))
            self._maps = engine.zeros((num_slots, per_slot, 9), "float64")
            self._folds = engine.zeros((num_slots, embedding.camera_channels, 3), "float64")
            self._folded = engine.zeros((num_slots, per_slot * embedding.cells * 3, embedding.dim), "float32")
            self._bad = engine.zeros((1,), "uint32")

    def set_reference(self, latents: np.ndarray) -> None:
        """Reference latents [1, C, 1, h, w] for all slots that hold them."""
        if self._with_reference:
            engine = self._embedding.engine
            kept = Mirrored(engine, engine.zeros(latents.shape, "float32"))
            kept.array[...] = latents
            kept.send()
            for slot in range(self._num_slots):
                engine.copy_slot(kept.buffer, 0, self._latents["reference"], slot)

    def reference(self) -> None:
        """Embed the reference."""
        self.compute()

    def load(self, groups: Sequence[Group]) -> None:
        """What is known of latent frames, for `compute` to embed.

        Raises:
            ValueError: a camera that has no rays.
        """
        cameras = [np.concatenate([getattr(group, name) for group in groups]) for name in ("K", "c2w")]
        check_cameras(*cameras)  # the kernels leave what they made of the chunk before where a camera has no rays
        for kept, matrices in zip((self._K, self._c2w), cameras, strict=True):
            kept.array[...] = matrices
            kept.send()
        for slot, group in enumerate(groups):
            self._embedding.engine.copy_slot(group.pose_latents.buffer, 0, self._latents["pose"], slot)

    def compute(self) -> None:
        """Embed latent frames from what lies on the device: calls of the engine, and nothing of the host's."""
        if self._with_frames:
            self._fold_cameras()
        for drops, out in zip(self._dropped, self._tokens, strict=True):
            self._embed(drops, out)

    def _fold_cameras(self) -> None:
        """Matrices of every camera, and the camera's weights with them."""
        embedding, slots, i32 = self._embedding, self._num_slots, np.int32
        per_slot = embedding.camera_channels // RAY_CHANNELS
        frames = i32(slots * FRAMES_PER_LATENT)
        # One ray per frame, also where frames share their rotation: what a recorded chunk does must not depend on its data.
        embedding.kernels.launch(
            "embed_prepare_cameras", (-(-slots * per_slot // CAMERAS_PER_BLOCK), 1, 1), (CAMERAS_PER_BLOCK, 1, 1), self._K.buffer,
            frames, self._c2w.buffer, frames, i32(slots), i32(per_slot), i32(per_slot), self._maps, self._folds, self._bad,
        )  # fmt: skip
        embedding.kernels.launch(
            "embed_fold_cameras", (-(-embedding.dim // COLUMNS_PER_BLOCK), slots, 1), (COLUMNS_PER_BLOCK, 1, 1),
            embedding.camera_weight, self._folds, i32(embedding.cells), i32(embedding.camera_channels), i32(per_slot),
            i32(embedding.dim), self._folded,
        )  # fmt: skip

    def _embed(self, drops: frozenset[str], out: Buffer) -> None:
        embedding, config, i32, i64 = self._embedding, self._embedding.config, np.int32, np.int64
        engine, plane, channels = embedding.engine, config.latent_height * config.latent_width, config.vae.z_dim
        held = {"reference": self._with_reference, "pose": self._with_frames}
        used = [name for name in held if held[name] and name not in drops]
        first = used[0] if used else "pose"
        row = 0 if first == "reference" else channels * embedding.cells * embedding.dim
        weight = engine.view(embedding.latent_weight, (len(used) * channels * embedding.cells, embedding.dim), row if used else 0)
        rays = embedding.camera_channels // RAY_CHANNELS if self._with_frames and "camera" not in drops else 0
        tokens = embedding.rows * embedding.columns
        maps, folded = (self._maps, self._folded) if self._with_frames else (embedding.bias, embedding.bias)  # not read
        embedding.kernels.launch(
            "embed_tokens_f16" if dtype_name(out) == "float16" else "embed_tokens_f32",
            (-(-embedding.dim // TILE), -(-tokens // TILE), self._num_slots), (SIDE, SIDE, 1),
            self._latents[first], i64(plane * self._num_slots), i64(plane), i32(len(used) * channels), weight, maps, i32(rays),
            folded, embedding.bias, i32(embedding.patch[0]), i32(embedding.patch[1]), i32(config.latent_width),
            i32(embedding.columns), i32(tokens), i32(embedding.dim), np.float64(config.vae.spatial_stride), out,
        )  # fmt: skip


def open_kernel_embedding(
    config: ModelConfig, engine: Engine, weight: np.ndarray, bias: np.ndarray
) -> KernelEmbedding | None:
    """The kernels with a bundle's weights; None where the engine's device runs none."""
    kernels = engine.kernels(FILE, KERNELS)
    return None if kernels is None else KernelEmbedding(config, engine, kernels, weight, bias)
