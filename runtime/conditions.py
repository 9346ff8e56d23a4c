"""Driving frames in, chunk conditions out: codes, pose latents and rays gathered into groups of frames, then embedded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Buffer, Engine, HostStage, Mirrored, allocate
from factorportrait.engines.base import slots as _slots_of
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.embedding import FusedEmbedding
from factorportrait.runtime.loop import HOISTS, ChunkConditions
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
    K: np.ndarray  # [4, 3, 3], a clip's first camera four times
    c2w: np.ndarray  # [4, 4, 4]
    pose_latents: np.ndarray  # [16, h, w]


class GroupEncoder:
    """Encodes driving frames one by one and gives a `Group` whenever a latent frame has all of its frames.

    Args:
        reuse: a picture like the one before keeps its code, as where the driving was filmed at a lower rate or stands still.
        neutral_code: [E] of a neutral face; gain: what the way from it to a frame's code is multiplied with.
    """

    def __init__(
        self, config: ModelConfig, engine: Engine, timings: Timings, *, reuse: bool = True,
        neutral_code: np.ndarray | None = None, gain: float = 1.0,
    ):  # fmt: skip
        self.config, self.timings, self._reuse = config, timings, reuse
        self._neutral_code, self._gain = neutral_code, np.float32(gain)
        self._pose = StreamingVAE(engine, "encode")
        self._expression, self._arkit = HostStage(engine, "expression_encoder", B=1), HostStage(engine, "arkit_encoder", B=1)
        self._codes: list[np.ndarray] = []
        self._cameras: list[tuple[np.ndarray, np.ndarray]] = []
        self._seen: tuple[np.ndarray, np.ndarray] | None = None  # the latest picture, and its code
        self._first = True

    def reset(self) -> None:
        self._pose.reset()
        self._codes.clear()
        self._cameras.clear()
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
        self._cameras.append((np.array(frame.K, np.float64), np.array(frame.c2w, np.float64)))
        return self._complete() if len(self._codes) == size else None

    def encode_expression(self, frame: DrivingFrame) -> np.ndarray:
        """[1, E] from the picture or from the coefficients, as far from the neutral code as the gain says."""
        code = self._code(frame)
        return code if self._gain == 1 else self._neutral_code + self._gain * (code - self._neutral_code)

    def _code(self, frame: DrivingFrame) -> np.ndarray:
        with self.timings("expression"):
            if frame.coefficients is not None:
                return self._arkit(coefficients=np.asarray(frame.coefficients, np.float32)[None])["code"].copy()
            if frame.image is None:
                raise UserError(
                    "driving frame", expected="an image or 52 coefficients", found="neither", action="give one of them"
                )
            image = self._expression.inputs["image"][0]
            picture = resize(frame.image, image.shape[-1])
            if self._reuse and self._seen is not None and np.array_equal(picture, self._seen[0]):
                return self._seen[1]
            to_unit(picture, image)
            code = self._expression()["code"].copy()
            self._seen = picture.copy(), code  # a source may reuse its memory
            return code

    def _complete(self) -> Group:
        with self.timings("pose"):
            pose_latents = self._pose()[0, :, 0].copy()
        repeat = FRAMES_PER_LATENT if self._first else 1
        K, c2w = (np.stack(side * repeat) for side in (list(each) for each in zip(*self._cameras, strict=True)))
        group = Group(np.stack(self._codes * repeat, axis=1), K, c2w, pose_latents)
        self._codes.clear()
        self._cameras.clear()
        self._first = False
        return group


def group_rays(config: ModelConfig, groups: Sequence[Group]) -> np.ndarray:
    """Ray maps of N latent frames, float32 [C, N, h, w]: their four frames on channels, or the last one's."""
    used = slice(None) if config.fusion.rays == "packed" else slice(-1, None)
    K, c2w = (np.concatenate([getattr(group, name)[used] for group in groups]) for name in ("K", "c2w"))
    rays = ray_maps(K, c2w, config.height, config.width, config.vae.spatial_stride)
    return rays.reshape(len(groups), -1, *rays.shape[2:]).swapaxes(0, 1)


# What an input of `condition_embed` is called in `schedule.FACTORS`.
_FACTOR_OF = {"reference_latents": "reference", "pose_latents": "pose", "rays": "camera"}


class GraphEmbedder:
    """Condition tokens of F slots by the graph `condition_embed`, bound once.

    Args:
        dropped: per condition set the factors that are taken away.
        tokens: per set the buffer [1, F, T, D] that is written.
        given: of the graph's inputs those that these slots hold; the others are zero.
    """

    def __init__(
        self, config: ModelConfig, engine: Engine, dropped: Sequence[frozenset[str]], tokens: Sequence[Buffer], given: Sequence[str]
    ):
        self._config = config
        runner = engine.load("condition_embed")
        sizes = {"F": tokens[0].shape[1]}
        zeros, fed = (allocate(engine, runner.spec.inputs, sizes) for _ in range(2))
        self._fed = {name: Mirrored(engine, fed[name]) for name in given}
        self._calls = []
        for drops, target in zip(dropped, tokens, strict=True):
            used = {name: fed if name in given and _FACTOR_OF[name] not in drops else zeros for name in fed}
            inputs = {name: source[name] for name, source in used.items()}
            self._calls.append(runner.bind(inputs, {"condition_tokens": target}))

    def set_reference(self, latents: np.ndarray) -> None:
        """Reference latents [1,C,1,h,w] for all slots that hold them."""
        if "reference_latents" in self._fed:
            self._fed["reference_latents"].array[...] = latents

    def reference(self) -> None:
        """Embed the reference."""
        self._run()

    def frames(self, groups: Sequence[Group]) -> None:
        """Embed latent frames."""
        for i, group in enumerate(groups):
            self._fed["pose_latents"].array[0, :, i] = group.pose_latents
        self._fed["rays"].array[0] = group_rays(self._config, groups)
        self._run()

    def _run(self) -> None:
        for fed in self._fed.values():
            fed.send()
        for call in self._calls:
            call()


class FusedEmbedder:
    """The same by `FusedEmbedding`, on the host: no ray maps, no graph, straight into the buffers where the engine lets it.

    Args:
        in_frames: the slots are frames that hold the reference as well; its share of their tokens is computed once per portrait.
    """

    def __init__(
        self, fused: FusedEmbedding, engine: Engine, dropped: Sequence[frozenset[str]], tokens: Sequence[Buffer], in_frames: bool
    ):
        self._fused, self._dropped = fused, dropped
        self._targets = [Mirrored(engine, target) for target in tokens]
        self._rows = [target.array.reshape(-1, target.array.shape[-1]) for target in self._targets]
        self._in_frames = in_frames
        self._latents: np.ndarray | None = None
        self._share: np.ndarray | None = None  # [T, D] of the reference in the tokens of a frame

    def set_reference(self, latents: np.ndarray) -> None:
        """See `GraphEmbedder.set_reference`."""
        self._latents = latents[0, :, 0]
        if self._in_frames:
            self._share = self._fused.embed_reference(self._latents) - self._fused.embed_reference(None)

    def reference(self) -> None:
        """See `GraphEmbedder.reference`."""
        for drops, out in zip(self._dropped, self._rows, strict=True):
            self._fused.embed_reference(None if "reference" in drops else self._latents, out=out)
        self._send()

    def frames(self, groups: Sequence[Group]) -> None:
        """See `GraphEmbedder.frames`."""
        K, c2w = (np.concatenate([getattr(group, name) for group in groups]) for name in ("K", "c2w"))
        pose = np.stack([group.pose_latents for group in groups], axis=1)
        for drops, out in zip(self._dropped, self._rows, strict=True):
            cameras = (None, None) if "camera" in drops else (K, c2w)
            self._fused.embed_chunk(*cameras, None if "pose" in drops else pose, num_slots=len(groups), out=out)
            if self._share is not None and "reference" not in drops:
                slots = out.reshape(-1, *self._share.shape)
                np.add(slots, self._share, out=slots, casting="same_kind")
        self._send()

    def _send(self) -> None:
        for target in self._targets:
            target.send()


@dataclass(frozen=True)
class _Slots:
    """What embeds a number of latent frames, and per set where their modulation goes: None where the expression is dropped."""

    embedder: GraphEmbedder | FusedEmbedder
    modulation: list[Mirrored | None]

    def modulate(self, modulation: np.ndarray) -> None:
        for kept in self.modulation:
            if kept is not None:
                kept.array[...] = modulation
                kept.send()


class ConditionBuilder:
    """Groups -> `ChunkConditions`, one variant per condition set; carries the expression controller's state.

    Args:
        buffers: number of slots -> tokens and modulation per set that the transformer reads (`Denoiser.condition_buffers`).
        clip: slot 0 of a chunk is the reference.
        fused: what embeds in place of the graph `condition_embed`; None for the graph. See `choose_embedding`.
        hoist: what is computed once per chunk instead of in every pass, of "conditions" and "modulation".
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
        fused: FusedEmbedding | None = None,
        hoist: Collection[str] = HOISTS,
    ):
        self.config, self.engine, self.guidance, self.timings = config, engine, guidance, timings
        self._buffers, self._clip, self._fused, self._hoist = buffers, clip, fused, hoist
        self._controllers: dict[int, HostStage] = {}
        self._bound: dict[tuple[int, bool], _Slots] = {}
        self._neutral = self._neutral_modulation(np.ascontiguousarray(neutral_code, np.float32)[None])
        self._state: dict[str, np.ndarray] | None = None
        self._reference: np.ndarray | None = None  # latents [1, C, 1, h, w]

    def reset(self) -> None:
        self._state = None

    def reference(self, latents: np.ndarray) -> tuple[list[Buffer], list[Buffer]]:
        """Reference latents [1,C,1,h,w] -> per set condition tokens [1,1,T,D] and modulation [1,1,6,D] of slot 0."""
        self._reference = latents.copy()  # the caller's memory is the encoder's, which holds the poses next
        for bound in self._bound.values():
            bound.embedder.set_reference(self._reference)
        slots = self._slots(1, is_reference=True)
        slots.embedder.reference()
        slots.modulate(self._neutral)
        return self._buffers(1)

    def chunk(self, groups: list[Group], first_frame: int) -> ChunkConditions:
        """Conditions of consecutive latent frames; call once per chunk, in order. The next chunk of this size overwrites them."""
        with self.timings("conditions"):
            slots, codes = self._slots(len(groups), is_reference=False), np.concatenate([group.codes for group in groups], axis=1)
            before = self._initial_state(codes[:, 0]) if self._state is None else self._state
            modulation, self._state = self._control(codes, before)
            slots.modulate(modulation)
            slots.embedder.frames(groups)
            buffers = self._buffers(len(groups) + self._clip)
            if self._clip:
                for one, every in zip(self._buffers(1), buffers, strict=True):
                    for reference, whole in zip(one, every, strict=True):
                        self.engine.copy(reference, _slots_of(self.engine, whole, 0, 1))
        again = []
        if "conditions" not in self._hoist:
            again.append(lambda: slots.embedder.frames(groups))
        if "modulation" not in self._hoist:
            again.append(lambda: slots.modulate(self._control(codes, before)[0]))
        return ChunkConditions(first_frame, *buffers, tuple(again))

    def _slots(self, num_frames: int, *, is_reference: bool) -> _Slots:
        key = num_frames, is_reference
        if key not in self._bound:
            self._bound[key] = self._bind(num_frames, is_reference)
        return self._bound[key]

    def _bind(self, num_frames: int, is_reference: bool) -> _Slots:
        first = 1 if self._clip and not is_reference else 0
        tokens, modulation = (
            [_slots_of(self.engine, buffer, first, first + num_frames) for buffer in side]
            for side in self._buffers(first + num_frames)
        )
        dropped = self.guidance.dropped
        of_reference = ["reference_latents"] if is_reference or self.config.fusion.reference_slots == "all" else []
        of_frames = [] if is_reference else ["pose_latents", "rays"]
        if self._fused is None:
            embedder = GraphEmbedder(self.config, self.engine, dropped, tokens, of_reference + of_frames)
        else:
            embedder = FusedEmbedder(self._fused, self.engine, dropped, tokens, bool(of_reference and of_frames))
        if self._reference is not None:
            embedder.set_reference(self._reference)
        kept = [
            None if "expression" in drops else Mirrored(self.engine, target)
            for drops, target in zip(dropped, modulation, strict=True)
        ]
        return _Slots(embedder, kept)

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

    def _neutral_modulation(self, code: np.ndarray) -> np.ndarray:
        group = np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1)
        return self._control(group, self._initial_state(code))[0].copy()
