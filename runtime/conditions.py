"""Driving frames in, chunk conditions out: codes, pose latents and rays gathered into groups of frames, then embedded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Buffer, Call, Engine, HostStage, Mirrored, allocate, dtype_name
from factorportrait.engines.base import slots as _slots_of
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.embedding import FusedEmbedding
from factorportrait.runtime.kernel_embedding import KernelEmbedder, KernelEmbedding
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
    pose_latents: Mirrored | None  # [1, 16, 1, h, w], where the engine has them; None where nothing follows the pose


class LatentRing:
    """Memory of the engine for latent frames that wait until a chunk has all of its own.

    Args:
        size: how many are kept; None never overwrites one.
    """

    def __init__(self, engine: Engine, size: int | None):
        self._engine, self._kept = engine, deque[Mirrored](maxlen=size)

    def keep(self, latents: Mirrored) -> Mirrored:
        """A copy, in new memory or in that of the oldest one."""
        kept = self._kept
        if kept.maxlen is not None and len(kept) == kept.maxlen:
            copied = kept[0]
        else:
            copied = Mirrored(self._engine, self._engine.zeros(latents.buffer.shape, dtype_name(latents.buffer)))
        if kept.maxlen is not None:
            kept.append(copied)
        self._engine.copy(latents.buffer, copied.buffer)
        return copied


class GroupEncoder:
    """Encodes driving frames one by one and gives a `Group` whenever a latent frame has all of its frames.

    Args:
        reuse: a picture like the one before keeps its code, as where the driving was filmed at a lower rate or stands still.
        neutral_code: [E] of a neutral face; gain: what the way from it to a frame's code is multiplied with.
        kept_groups: how many groups are used at the same time; the pose latents of older ones are overwritten. None for all.
    """

    def __init__(
        self, config: ModelConfig, engine: Engine, timings: Timings, *, reuse: bool = True,
        neutral_code: np.ndarray | None = None, gain: float = 1.0, kept_groups: int | None = None,
    ):  # fmt: skip
        self.config, self.timings, self._reuse = config, timings, reuse
        self._neutral_code, self._gain = neutral_code, np.float32(gain)
        self._pose, self._ring = StreamingVAE(engine, "encode"), LatentRing(engine, kept_groups)
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
            pose_latents = self._ring.keep(self._pose.run())
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
        self._config, self._engine = config, engine
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
            self._fed["reference_latents"].send()

    def reference(self) -> None:
        """Embed the reference."""
        self.compute()

    def load(self, groups: Sequence[Group]) -> None:
        """What is known of latent frames, for `compute` to embed."""
        poses, rays = self._fed["pose_latents"], self._fed["rays"]
        for i, group in enumerate(groups):
            self._engine.copy_slot(group.pose_latents.buffer, 0, poses.buffer, i)
        rays.array[0] = group_rays(self._config, groups)
        rays.send()

    def compute(self) -> None:
        """Embed latent frames from what lies on the device: calls of the engine, and nothing of the host's."""
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

    def load(self, groups: Sequence[Group]) -> None:
        """See `GraphEmbedder.load`; the host embeds them, so that is all."""
        K, c2w = (np.concatenate([getattr(group, name) for group in groups]) for name in ("K", "c2w"))
        pose = np.concatenate([group.pose_latents.fetch()[0] for group in groups], axis=1)
        for drops, out in zip(self._dropped, self._rows, strict=True):
            cameras = (None, None) if "camera" in drops else (K, c2w)
            self._fused.embed_chunk(*cameras, None if "pose" in drops else pose, num_slots=len(groups), out=out)
            if self._share is not None and "reference" not in drops:
                slots = out.reshape(-1, *self._share.shape)
                np.add(slots, self._share, out=slots, casting="same_kind")
        self._send()

    def compute(self) -> None:
        """See `GraphEmbedder.compute`."""

    def _send(self) -> None:
        for target in self._targets:
            target.send()


class Controller:
    """The expression controller for chunks of any size, which go on from one state on the device."""

    def __init__(self, engine: Engine):
        self._engine, self._runner = engine, engine.load("expression_controller")
        before, after = (
            allocate(engine, [tensor for tensor in side if tensor.name.startswith("state_")], {})
            for side in (self._runner.spec.inputs, self._runner.spec.outputs)
        )
        self._before, self._after = before, after
        self._first = self.bind(1, [])

    def bind(self, num_frames: int, targets: Sequence[Buffer]) -> Control:
        """Modulation [1, N, 6, D] of so many latent frames into all targets, bound once."""
        spec, sizes = self._runner.spec, {"N": num_frames}
        codes = allocate(self._engine, [tensor for tensor in spec.inputs if tensor.name == "codes"], sizes)["codes"]
        if not targets:  # a stage cannot be bound without
            outputs = [tensor for tensor in spec.outputs if tensor.name == "expression_modulation"]
            targets = list(allocate(self._engine, outputs, sizes).values())
        call = self._runner.bind(
            {"codes": codes, **self._before}, {"expression_modulation": targets[0], **self._after}
        )
        return Control(self._engine, Mirrored(self._engine, codes), call, tuple(targets))

    def begin(self, code: np.ndarray) -> None:
        """A new clip, whose first code [1, E] this is."""
        # The aggregator pads by repeating the first code: one group of it, from any state, leaves that padding behind.
        for buffer in self._before.values():
            state = Mirrored(self._engine, buffer)
            state.array[...] = 0
            state.send()
        self._first.load(np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1))
        self._first.compute()

    def advance(self) -> None:
        """What is computed next goes on from where the latest ended; until then it can be computed again."""
        for name, buffer in self._after.items():
            self._engine.copy(buffer, self._before[name.replace("state_out.", "state_in.")])


@dataclass(frozen=True, eq=False)
class Control:
    """The controller bound to the codes of N latent frames, and to where their modulation goes."""

    engine: Engine
    codes: Mirrored
    call: Call
    targets: tuple[Buffer, ...]

    def load(self, codes: np.ndarray) -> None:
        """Codes [1, 4N, E] to the device."""
        np.copyto(self.codes.array, codes, casting="no")
        self.codes.send()

    def compute(self) -> None:
        """Calls of the engine, and nothing of the host's."""
        self.call()
        for target in self.targets[1:]:
            self.engine.copy(self.targets[0], target)


@dataclass(frozen=True, eq=False)
class _Slots:
    """How slots of a number get their conditions; calling it is all that the device has to do for a chunk.

    Attributes:
        control: None for the reference, whose modulation stays.
        reference: tokens and modulation of a clip's reference, and where they lie in front of its slots.
    """

    engine: Engine
    controller: Controller
    embedder: GraphEmbedder | FusedEmbedder | KernelEmbedder
    control: Control | None
    reference: list[tuple[Buffer, Buffer]]

    def __call__(self) -> None:
        self.controller.advance()
        self.control.compute()
        self.embedder.compute()
        for source, target in self.reference:
            self.engine.copy(source, target)


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
        fused: FusedEmbedding | KernelEmbedding | None = None,
        hoist: Collection[str] = HOISTS,
    ):
        self.config, self.engine, self.guidance, self.timings = config, engine, guidance, timings
        self._buffers, self._clip, self._fused, self._hoist = buffers, clip, fused, hoist
        self._controller = Controller(engine)
        self._bound: dict[tuple[int, bool], _Slots] = {}
        self._neutral = self._neutral_modulation(np.ascontiguousarray(neutral_code, np.float32)[None])
        self._begun = False
        self._reference: np.ndarray | None = None  # latents [1, C, 1, h, w]

    def reset(self) -> None:
        self._begun = False

    def reference(self, latents: np.ndarray) -> tuple[list[Buffer], list[Buffer]]:
        """Reference latents [1,C,1,h,w] -> per set condition tokens [1,1,T,D] and modulation [1,1,6,D] of slot 0."""
        self._reference = latents.copy()  # the caller's memory is the encoder's, which holds the poses next
        for bound in self._bound.values():
            bound.embedder.set_reference(self._reference)
        self._slots(1, is_reference=True).embedder.reference()
        tokens, modulation = self._buffers(1)
        for target, drops in zip(modulation, self.guidance.dropped, strict=True):
            if "expression" not in drops:
                self.engine.copy(self._neutral, target)
        return tokens, modulation

    def chunk(self, groups: list[Group], first_frame: int) -> ChunkConditions:
        """Conditions of consecutive latent frames; call once per chunk, in order. The next chunk of this size overwrites them."""
        again, compute = [], None
        with self.timings("conditions"):
            slots, codes = self._slots(len(groups), is_reference=False), np.concatenate([group.codes for group in groups], axis=1)
            if not self._begun:
                self._controller.begin(codes[:, 0])
                self._begun = True
            slots.control.load(codes)
            slots.embedder.load(groups)
            if "conditions" not in self._hoist:
                again += [lambda: slots.embedder.load(groups), slots.embedder.compute]
            if "modulation" not in self._hoist:
                again.append(slots.control.compute)
            if self.engine.whole_chunks and not again:
                compute = slots  # with the steps
            else:
                slots()
        return ChunkConditions(first_frame, *self._buffers(len(groups) + self._clip), compute, tuple(again))

    def _slots(self, num_frames: int, *, is_reference: bool) -> _Slots:
        key = num_frames, is_reference
        if key not in self._bound:
            self._bound[key] = self._bind(num_frames, is_reference)
        return self._bound[key]

    def _bind(self, num_frames: int, is_reference: bool) -> _Slots:
        first = 1 if self._clip and not is_reference else 0
        whole = self._buffers(first + num_frames)
        tokens, modulation = (
            [_slots_of(self.engine, buffer, first, first + num_frames) for buffer in side] for side in whole
        )
        dropped = self.guidance.dropped
        of_reference = ["reference_latents"] if is_reference or self.config.fusion.reference_slots == "all" else []
        of_frames = [] if is_reference else ["pose_latents", "rays"]
        if self._fused is None:
            embedder = GraphEmbedder(self.config, self.engine, dropped, tokens, of_reference + of_frames)
        elif isinstance(self._fused, KernelEmbedding):
            embedder = KernelEmbedder(
                self._fused, dropped, tokens, with_reference=bool(of_reference), with_frames=bool(of_frames)
            )
        else:
            embedder = FusedEmbedder(self._fused, self.engine, dropped, tokens, bool(of_reference and of_frames))
        if self._reference is not None:
            embedder.set_reference(self._reference)
        followed = [target for target, drops in zip(modulation, dropped, strict=True) if "expression" not in drops]
        control = None if is_reference else self._controller.bind(num_frames, followed)
        of_clip = [
            (one, _slots_of(self.engine, every, 0, 1))
            for ones, wholes in (zip(self._buffers(1), whole, strict=True) if first else ())
            for one, every in zip(ones, wholes, strict=True)
        ]
        return _Slots(self.engine, self._controller, embedder, control, of_clip)

    def _neutral_modulation(self, code: np.ndarray) -> Buffer:
        """[1, 1, 6, D] of a neutral face that code [1, E] stands for, on the device."""
        self._controller.begin(code)
        self._controller.advance()
        control = self._controller.bind(1, [])
        control.load(np.repeat(code[:, None], FRAMES_PER_LATENT, axis=1))
        control.compute()
        return control.targets[0]
