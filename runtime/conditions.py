"""Driving frames in, chunk conditions out: codes, pose latents and rays gathered into groups of frames, then embedded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Buffer, Call, Engine, HostStage, Mirrored, allocate, slots
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.loop import ChunkConditions
from factorportrait.runtime.media.camera import ray_maps
from factorportrait.runtime.media.fit import resize
from factorportrait.runtime.schedule import Guidance
from factorportrait.runtime.timing import Timings
from factorportrait.runtime.vae import StreamingVAE, to_unit


@dataclass(frozen=True)
class DrivingFrame:
    """What one output frame is driven by.

    Attributes:
        normals: uint8 [H, W, 3], normals of the neutral head in its pose, seen by this frame's camera (DESIGN.md).
        K, c2w: [3, 3] pixels of the output, [4, 4] OpenCV camera in canonical head space.
        image: uint8 [*, *, 3], square face crop for the expression encoder; or
        coefficients: [52] ARKit coefficients in 0..1. One of the two is needed; coefficients win.
    """

    normals: np.ndarray
    K: np.ndarray
    c2w: np.ndarray
    image: np.ndarray | None = None
    coefficients: np.ndarray | None = None


@dataclass
class Group:
    """Conditions of one latent frame."""

    codes: np.ndarray  # [1, 4, E], a clip's first code four times
    rays: np.ndarray  # [C, h, w]
    pose_latents: np.ndarray  # [16, h, w]


class GroupEncoder:
    """Encodes driving frames one by one and gives a `Group` whenever a latent frame has all of its frames."""

    def __init__(self, config: ModelConfig, engine: Engine, timings: Timings):
        self.config, self.timings = config, timings
        self._pose = StreamingVAE(engine, "encode")
        self._expression, self._arkit = HostStage(engine, "expression_encoder", B=1), HostStage(engine, "arkit_encoder", B=1)
        self._codes: list[np.ndarray] = []
        self._rays: list[np.ndarray] = []
        self._first = True

    def reset(self) -> None:
        self._pose.reset()
        self._codes.clear()
        self._rays.clear()
        self._first = True

    def encode_reference(self, portrait: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> latents [1,16,1,h,w], which the next clip overwrites; begins a new clip."""
        self.reset()
        to_unit(portrait, self._pose.input[0, :, 0])
        latents = self._pose()
        self.reset()
        return latents

    @property
    def num_waiting(self) -> int:
        """Frames of a group that is not complete."""
        return len(self._codes)

    def push(self, frame: DrivingFrame) -> Group | None:
        size = 1 if self._first else FRAMES_PER_LATENT
        expected = (self.config.height, self.config.width, 3)
        if frame.normals.shape != expected or frame.normals.dtype != np.uint8:
            raise UserError(
                "normal map",
                expected=f"uint8 {list(expected)}",
                found=f"{frame.normals.dtype} {list(frame.normals.shape)}",
                action="render it at the bundle's size",
            )
        to_unit(frame.normals, self._pose.input[0, :, len(self._codes)])
        self._codes.append(self.encode_expression(frame))
        self._rays.append(self._ray_map(frame))
        return self._complete() if len(self._codes) == size else None

    def encode_expression(self, frame: DrivingFrame) -> np.ndarray:
        """[1, E] from the picture or from the coefficients."""
        with self.timings("expression"):
            if frame.coefficients is not None:
                return self._arkit(coefficients=np.asarray(frame.coefficients, np.float32)[None])["code"].copy()
            if frame.image is None:
                raise UserError(
                    "driving frame", expected="an image or 52 coefficients", found="neither", action="give one of them"
                )
            image = self._expression.inputs["image"][0]
            to_unit(resize(frame.image, image.shape[-1]), image)
            return self._expression()["code"].copy()

    def _ray_map(self, frame: DrivingFrame) -> np.ndarray:
        with self.timings("rays"):
            config = self.config
            return ray_maps(frame.K[None], frame.c2w[None], config.height, config.width, config.vae.spatial_stride)[0]

    def _complete(self) -> Group:
        with self.timings("pose"):
            pose_latents = self._pose()[0, :, 0].copy()
        repeat = FRAMES_PER_LATENT if self._first else 1
        rays = self._rays * repeat if self.config.fusion.rays == "packed" else self._rays[-1:]
        group = Group(np.stack(self._codes * repeat, axis=1), np.concatenate(rays), pose_latents)
        self._codes.clear()
        self._rays.clear()
        self._first = False
        return group


# What an input of `condition_embed` is called in `schedule.FACTORS`.
_FACTOR_OF = {"reference_latents": "reference", "pose_latents": "pose", "rays": "camera"}


@dataclass(frozen=True)
class _Embedding:
    """`condition_embed` bound for a number of latent frames: what is fed, and one call per condition set."""

    fed: dict[str, Mirrored]
    calls: list[Call]
    modulation: list[Mirrored | None]  # per set; None where the expression is dropped, and the buffer stays zero


class ConditionBuilder:
    """Groups -> `ChunkConditions`, one variant per condition set; carries the expression controller's state.

    Args:
        buffers: number of slots -> tokens and modulation per set that the transformer reads (`Denoiser.condition_buffers`).
        clip: slot 0 of a chunk is the reference.
    """

    def __init__(
        self,
        config: ModelConfig,
        engine: Engine,
        guidance: Guidance,
        neutral_code: np.ndarray,
        timings: Timings,
        buffers: Callable[[int], tuple[list[Buffer], list[Buffer]]],
        *,
        clip: bool = False,
    ):
        self.config, self.engine, self.guidance, self.timings = config, engine, guidance, timings
        self._buffers, self._clip = buffers, clip
        self._embed = engine.load("condition_embed")
        self._controllers: dict[int, HostStage] = {}
        self._embeddings: dict[tuple[int, bool], _Embedding] = {}
        self._neutral = self._neutral_modulation(np.ascontiguousarray(neutral_code, np.float32)[None])
        self._state: dict[str, np.ndarray] | None = None

    def reset(self) -> None:
        self._state = None

    def reference(self, latents: np.ndarray) -> tuple[list[Buffer], list[Buffer]]:
        """Reference latents [1,16,1,h,w] -> per set condition tokens [1,1,T,D] and modulation [1,1,6,D] of slot 0."""
        tokens, modulation = self._buffers(1)
        embedding = self._embedding(1, is_reference=True)
        embedding.fed["reference_latents"].array[...] = latents
        self._run(embedding, self._neutral)
        return tokens, modulation

    def chunk(self, groups: list[Group], first_frame: int) -> ChunkConditions:
        """Conditions of consecutive latent frames; call once per chunk, in order. The next chunk of this size overwrites them."""
        with self.timings("conditions"):
            modulation = self._modulate(np.concatenate([group.codes for group in groups], axis=1))
            embedding = self._embedding(len(groups), is_reference=False)
            for i, group in enumerate(groups):
                embedding.fed["pose_latents"].array[0, :, i] = group.pose_latents
                embedding.fed["rays"].array[0, :, i] = group.rays
            self._run(embedding, modulation)
            chunk = ChunkConditions(first_frame, *self._buffers(len(groups) + self._clip))
            if self._clip:
                for one, every in zip(self._buffers(1), (chunk.tokens, chunk.modulation), strict=True):
                    for reference, whole in zip(one, every, strict=True):
                        self.engine.copy(reference, slots(self.engine, whole, 0, 1))
        return chunk

    def _run(self, embedding: _Embedding, modulation: np.ndarray) -> None:
        for fed in embedding.fed.values():
            fed.send()
        for call in embedding.calls:
            call()
        for kept in embedding.modulation:
            if kept is not None:
                kept.array[...] = modulation
                kept.send()

    def _embedding(self, num_frames: int, *, is_reference: bool) -> _Embedding:
        key = num_frames, is_reference
        if key not in self._embeddings:
            self._embeddings[key] = self._bind(num_frames, is_reference)
        return self._embeddings[key]

    def _bind(self, num_frames: int, is_reference: bool) -> _Embedding:
        first = 1 if self._clip and not is_reference else 0
        tokens, modulation = (
            [slots(self.engine, buffer, first, first + num_frames) for buffer in side]
            for side in self._buffers(first + num_frames)
        )
        zeros, fed = (allocate(self.engine, self._embed.spec.inputs, {"F": num_frames}) for _ in range(2))
        given = {"reference_latents"} if is_reference else {"pose_latents", "rays"}
        calls = []
        for dropped, target in zip(self.guidance.dropped, tokens, strict=True):
            used = {name: fed if name in given and _FACTOR_OF[name] not in dropped else zeros for name in fed}
            inputs = {name: source[name] for name, source in used.items()}
            calls.append(self._embed.bind(inputs, {"condition_tokens": target}))
        kept = [
            None if "expression" in dropped else Mirrored(self.engine, target)
            for dropped, target in zip(self.guidance.dropped, modulation, strict=True)
        ]
        return _Embedding({name: Mirrored(self.engine, fed[name]) for name in sorted(given)}, calls, kept)

    def _control(self, codes: np.ndarray, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """codes [1, 4N, E] -> modulation [1, N, 6, D], which the next call overwrites, and a state of its own."""
        num_frames = codes.shape[1] // FRAMES_PER_LATENT
        if num_frames not in self._controllers:
            self._controllers[num_frames] = HostStage(self.engine, "expression_controller", N=num_frames)
        results = self._controllers[num_frames](codes=codes, **{f"state_in.{name}": value for name, value in state.items()})
        state = {name.partition(".")[2]: value.copy() for name, value in results.items() if name.startswith("state_out.")}
        return results["expression_modulation"], state

    def _initial_state(self, code: np.ndarray) -> dict[str, np.ndarray]:
        # The aggregator pads by repeating the first code: one group of it, from any state, leaves that padding behind.
        tensors = self.engine.load("expression_controller").spec.inputs
        zeros = {
            tensor.name.partition(".")[2]: np.zeros(tensor.shape, tensor.dtype)
            for tensor in tensors
            if tensor.name.startswith("state_in.")
        }
        return self._control(np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1), zeros)[1]

    def _modulate(self, codes: np.ndarray) -> np.ndarray:
        if self._state is None:
            self._state = self._initial_state(codes[:, 0])
        modulation, self._state = self._control(codes, self._state)
        return modulation

    def _neutral_modulation(self, code: np.ndarray) -> np.ndarray:
        group = np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1)
        return self._control(group, self._initial_state(code))[0].copy()
