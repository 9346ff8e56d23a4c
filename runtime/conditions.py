"""Driving frames in, chunk conditions out: codes, pose latents and rays gathered into groups of frames, then embedded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Runner
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

    def __init__(self, config: ModelConfig, runners: Mapping[str, Runner], timings: Timings):
        self.config, self.timings = config, timings
        self._runners = runners
        self._pose = StreamingVAE(runners["vae_encode_first"], runners["vae_encode_steady"], "frames", "latents")
        self._pixels = {n: np.zeros((1, 3, n, config.height, config.width), np.float32) for n in (1, FRAMES_PER_LATENT)}
        side = config.expression.image_size
        self._image = np.zeros((1, 3, side, side), np.float32)
        self._codes: list[np.ndarray] = []
        self._rays: list[np.ndarray] = []
        self._first = True

    def reset(self) -> None:
        self._pose.reset()
        self._codes.clear()
        self._rays.clear()
        self._first = True

    @property
    def num_waiting(self) -> int:
        """Frames of a group that is not complete."""
        return len(self._codes)

    def push(self, frame: DrivingFrame) -> Group | None:
        size = 1 if self._first else FRAMES_PER_LATENT
        pixels = self._pixels[size]
        expected = (self.config.height, self.config.width, 3)
        if frame.normals.shape != expected or frame.normals.dtype != np.uint8:
            raise UserError(
                "normal map",
                expected=f"uint8 {list(expected)}",
                found=f"{frame.normals.dtype} {list(frame.normals.shape)}",
                action="render it at the bundle's size",
            )
        to_unit(frame.normals, pixels[0, :, len(self._codes)])
        self._codes.append(self.encode_expression(frame))
        self._rays.append(self._ray_map(frame))
        return self._complete(pixels) if len(self._codes) == size else None

    def encode_expression(self, frame: DrivingFrame) -> np.ndarray:
        """[1, E] from the picture or from the coefficients."""
        with self.timings("expression"):
            if frame.coefficients is not None:
                inputs = {"coefficients": np.asarray(frame.coefficients, np.float32)[None]}
                return self._runners["arkit_encoder"].run(inputs)["code"].copy()
            if frame.image is None:
                raise UserError(
                    "driving frame", expected="an image or 52 coefficients", found="neither", action="give one of them"
                )
            to_unit(resize(frame.image, self._image.shape[-1]), self._image[0])
            return self._runners["expression_encoder"].run({"image": self._image})["code"].copy()

    def _ray_map(self, frame: DrivingFrame) -> np.ndarray:
        with self.timings("rays"):
            config = self.config
            return ray_maps(frame.K[None], frame.c2w[None], config.height, config.width, config.vae.spatial_stride)[0]

    def _complete(self, pixels: np.ndarray) -> Group:
        with self.timings("pose"):
            pose_latents = self._pose(pixels)[0, :, 0].copy()
        repeat = FRAMES_PER_LATENT if self._first else 1
        rays = self._rays * repeat if self.config.fusion.rays == "packed" else self._rays[-1:]
        group = Group(np.stack(self._codes * repeat, axis=1), np.concatenate(rays), pose_latents)
        self._codes.clear()
        self._rays.clear()
        self._first = False
        return group


class ConditionBuilder:
    """Groups -> `ChunkConditions`, one variant per condition set; carries the expression controller's state."""

    def __init__(
        self, config: ModelConfig, runners: Mapping[str, Runner], guidance: Guidance, neutral_code: np.ndarray, timings
    ):
        self.config, self.guidance, self.timings = config, guidance, timings
        self._controller, self._embed = runners["expression_controller"], runners["condition_embed"]
        self._state_names = [
            spec.name.removeprefix("state_in.")
            for spec in self._controller.spec.inputs
            if spec.name.startswith("state_in.")
        ]
        self._neutral_code = np.ascontiguousarray(neutral_code, np.float32)[None]
        self._state: dict[str, np.ndarray] | None = None
        self._ray_shape = (config.fusion.ray_channels, config.latent_height, config.latent_width)

    def reset(self) -> None:
        self._state = None

    def reference(self, latents: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Reference latents [1,16,1,h,w] -> per set condition tokens [1,1,T,D] and modulation [1,1,6,D] of slot 0."""
        zeros = np.zeros((1, self._ray_shape[0], 1, *self._ray_shape[1:]), np.float32)
        neutral = self._neutral_modulation()
        tokens, modulation = [], []
        for dropped in self.guidance.dropped:
            kept = np.zeros_like(latents) if "reference" in dropped else latents
            tokens.append(self._tokens(kept, np.zeros_like(latents), zeros))
            modulation.append(np.zeros_like(neutral) if "expression" in dropped else neutral)
        return tokens, modulation

    def chunk(self, groups: list[Group], first_frame: int) -> ChunkConditions:
        """Conditions of consecutive latent frames; call once per chunk, in order."""
        with self.timings("conditions"):
            full = self._modulate(np.concatenate([group.codes for group in groups], axis=1))
            pose = np.ascontiguousarray(np.stack([group.pose_latents for group in groups], axis=1)[None])
            rays = np.ascontiguousarray(np.stack([group.rays for group in groups], axis=1)[None])
            tokens, modulation = [], []
            for dropped in self.guidance.dropped:
                tokens.append(
                    self._tokens(
                        np.zeros_like(pose),
                        np.zeros_like(pose) if "pose" in dropped else pose,
                        np.zeros_like(rays) if "camera" in dropped else rays,
                    )
                )
                modulation.append(np.zeros_like(full) if "expression" in dropped else full)
        return ChunkConditions(first_frame, tokens, modulation)

    def _tokens(self, reference: np.ndarray, pose: np.ndarray, rays: np.ndarray) -> np.ndarray:
        inputs = {"reference_latents": reference, "pose_latents": pose, "rays": rays}
        return self._embed.run(inputs)["condition_tokens"]

    def _control(self, codes: np.ndarray, state: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        outputs = self._controller.run({"codes": codes, **{f"state_in.{name}": value for name, value in state.items()}})
        return outputs["expression_modulation"], {name: outputs[f"state_out.{name}"] for name in self._state_names}

    def _initial_state(self, code: np.ndarray) -> dict[str, np.ndarray]:
        # The aggregator pads by repeating the first code: one group of it, from any state, leaves that padding behind.
        zeros = {
            name: np.zeros(self._controller.spec.input(f"state_in.{name}").shape, np.float32)
            for name in self._state_names
        }
        return self._control(np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1), zeros)[1]

    def _modulate(self, codes: np.ndarray) -> np.ndarray:
        if self._state is None:
            self._state = self._initial_state(codes[:, 0])
        modulation, self._state = self._control(codes, self._state)
        return modulation

    def _neutral_modulation(self) -> np.ndarray:
        code = self._neutral_code
        group = np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1)
        return self._control(group, self._initial_state(code))[0]
