"""Public Wan systems: driving frames and portrait -> what the frames of a clip, or a chunk of a stream, are generated from.

It takes the place of `GroupEncoder` and `ConditionBuilder`, which are FactorPortrait's. `factorportrait.systems` says what each
system is given; whatever of the driving it does not follow is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from factorportrait.bundle import EMBED_BIAS
from factorportrait.engines.base import Engine, HostStage, Mirrored, allocate
from factorportrait.engines.base import slots as _slots_of
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT, ModelConfig
from factorportrait.runtime.conditions import DrivingFrame, Group, LatentRing
from factorportrait.runtime.looked_up import LookedUp
from factorportrait.runtime.loop import ChunkConditions, Denoiser, Latents, SlotRules
from factorportrait.runtime.media.camera import ray_maps
from factorportrait.runtime.media.fit import resize
from factorportrait.runtime.schedule import FACTORS, Guidance
from factorportrait.runtime.timing import Timings
from factorportrait.runtime.vae import StreamingVAE, to_unit


def slot_rules(config: ModelConfig) -> SlotRules:
    """How a system's slots lie. A lead that is denoised like all others is a frame to the loop, and dropped behind it."""
    system = config.conditioning
    lead = int(system.reference in ("sink", "slot"))
    return SlotRules(lead=lead, lead_is_clean=system.reference == "sink", sink=system.sink_slots)


def wan_guidance(guidance: Guidance, config: ModelConfig) -> Guidance:
    """Guidance of all conditions at once is, in Wan, that of the text and the face alone: pictures and controls stay.

    Raises:
        UserError: a factor that the system does not look at; its pass would cost as much as any and change nothing.
    """
    system, everything = config.conditioning, frozenset(FACTORS)
    known = {"face": "expression", "pose": "pose", "camera": "camera"}
    seen = {known[name] for name in system.follows}
    seen |= {"reference"} if system.reference != "context" else set()
    seen |= {"text"} if config.dit.text_dim is not None else set()
    dropped = tuple(frozenset({"text", "expression"}) if drops == everything else drops for drops in guidance.dropped)
    for drops in dropped:
        if drops and not drops & seen:
            raise UserError(
                f"--guidance {', '.join(sorted(drops))}", expected=f"some of {', '.join(name for name in FACTORS if name in seen)}",
                found=f"{config.system}, which does not look at it", action="leave it out",
            )  # fmt: skip
    return Guidance(dropped, guidance.weights)


class WanEncoder:
    """Encodes driving frames one by one and gives a `Group` whenever a latent frame has all of its frames; see `GroupEncoder`."""

    def __init__(self, config: ModelConfig, engine: Engine, timings: Timings, kept_groups: int | None = None):
        self.config, self.timings, self._follows = config, timings, config.conditioning.follows
        self._vae, self._ring = StreamingVAE(engine, "encode"), LatentRing(engine, kept_groups)
        self._motion = HostStage(engine, "motion_encoder", B=1) if "face" in self._follows else None
        self._codes: list[np.ndarray] = []
        self._cameras: list[tuple[np.ndarray, np.ndarray]] = []
        self._first = True
        self._black: np.ndarray | None = None

    def reset(self) -> None:
        """Begin a new clip."""
        self._vae.reset()
        self._codes.clear()
        self._cameras.clear()
        self._first = True

    def encode_pictures(self, first: np.ndarray, num_latent_frames: int = 1, following: np.ndarray | None = None) -> np.ndarray:
        """A clip whose frames after the first are all alike, float32 [3,H,W] in -1..1 -> latents [1,C,F,h,w]; begins a new clip."""
        self.reset()
        latents = []
        for index in range(num_latent_frames):
            self._vae.input[...] = (first if index == 0 or following is None else following)[None, :, None]
            latents.append(self._vae().copy())
        self.reset()
        return np.concatenate(latents, axis=2)

    def encode_reference(self, portrait: np.ndarray) -> np.ndarray:
        """uint8 [H,W,3] -> latents [1,C,1,h,w]; begins a new clip."""
        return self.encode_pictures(to_unit(portrait, np.empty((3, *portrait.shape[:2]), np.float32)))

    @property
    def num_waiting(self) -> int:
        """Frames of a group that is not complete."""
        return len(self._codes)

    @property
    def blank_code(self) -> np.ndarray:
        """[1,E] of a black picture, which stands for no face."""
        if self._black is None:
            self._motion.inputs["image"][...] = -1
            self._black = self._motion()["code"].copy()
        return self._black

    def push(self, frame: DrivingFrame) -> Group | None:
        """Take a frame; gives a group when it is the last one of it."""
        if "pose" in self._follows:
            to_unit(frame.normals, self._vae.input[0, :, len(self._codes)])
        self._codes.append(self._code(frame))
        self._cameras.append((np.array(frame.K, np.float64), np.array(frame.c2w, np.float64)))
        return self._complete() if len(self._codes) == (1 if self._first else FRAMES_PER_LATENT) else None

    def _code(self, frame: DrivingFrame) -> np.ndarray:
        if self._motion is None:
            return np.zeros((1, 0), np.float32)
        if frame.image is None:
            raise UserError(
                "driving frame", expected="a picture of a face: this system takes no coefficients", found="none",
                action="drive it with a video or a folder of frames",
            )  # fmt: skip
        with self.timings("expression"):
            image = self._motion.inputs["image"][0]
            to_unit(resize(frame.image, image.shape[-1]), image)
            return self._motion()["code"].copy()

    def _complete(self) -> Group:
        if "pose" in self._follows:
            with self.timings("pose"):
                latents = self._ring.keep(self._vae.run())
        else:
            latents = None
        repeat = FRAMES_PER_LATENT if self._first else 1
        K, c2w = (np.stack([camera[i] for camera in self._cameras] * repeat) for i in range(2))
        group = Group(np.stack(self._codes * repeat, axis=1), K, c2w, latents)
        self._codes.clear()
        self._cameras.clear()
        self._first = False
        return group


class WanConditions:
    """Groups and the portrait -> `ChunkConditions`.

    Args:
        constants: of the bundle.
        chunk_frames: latent frames that the portrait stands still for at the start of a stream.
    """

    def __init__(
        self, config: ModelConfig, engine: Engine, guidance: Guidance, denoiser: Denoiser, encoder: WanEncoder, looked_up: LookedUp,
        constants: Mapping[str, np.ndarray], timings: Timings, chunk_frames: int,
    ):  # fmt: skip
        self.config, self.engine, self.guidance, self.timings = config, engine, guidance, timings
        self._denoiser, self._encoder, self._looked_up = denoiser, encoder, looked_up
        self._system, self._constants, self._chunk_frames = config.conditioning, constants, chunk_frames
        self._portrait: np.ndarray | None = None  # latents [1,C,F,h,w]
        self._first_c2w: np.ndarray | None = None
        self._empty: dict[int, np.ndarray] = {}

    def reset(self) -> None:
        """Begin a new clip."""
        self._portrait = self._first_c2w = None

    def set_portrait(self, portrait: np.ndarray) -> None:
        """uint8 [H,W,3] -> its latents and embeddings."""
        self._looked_up.set_portrait(portrait)
        picture = to_unit(portrait, np.empty((3, *portrait.shape[:2]), np.float32))
        frames = self._chunk_frames if self._system.reference == "context" else 1
        self._portrait = self._encoder.encode_pictures(picture, frames)

    def chunk(self, groups: list[Group], first_frame: int) -> ChunkConditions:
        """Conditions of consecutive latent frames; call once per chunk, in order. The next chunk of this size overwrites them."""
        with self.timings("conditions"):
            lead = self._system.lead_slots
            conditions = self._denoiser.slot_conditions(lead + len(groups))
            for target, dropped in zip(conditions, self.guidance.dropped, strict=True):
                self._embed_tokens(target, groups, lead, dropped)
                if self.config.dit.face is not None:
                    self._embed_face(target, groups, "expression" in dropped)
            names = ("condition_tokens", "expression_modulation")
            tokens, modulation = ([each[name] for each in conditions] for name in names)
        given = None
        if self._system.reference == "context" and first_frame + len(groups) <= self._chunk_frames:
            given = self._portrait[:, :, first_frame : first_frame + len(groups)]
        return ChunkConditions(first_frame, tokens, modulation, given=given)

    def frames_of(self, latents: Latents) -> Latents:
        """What the loop generated without a lead that was denoised with it."""
        return Latents(latents.memory, latents.first + 1) if self._system.reference == "noised" else latents

    def _embed_tokens(self, target: dict, groups: list[Group], lead: int, dropped: frozenset[str]) -> None:
        tokens = target["condition_tokens"]
        if set(self.config.fusion.streams) == {"noise"}:
            kept = Mirrored(self.engine, tokens)
            kept.array[...] = self._constants[EMBED_BIAS]
            kept.send()
            return
        frames = self._frame_inputs(groups, dropped)
        self._run("condition_embed", frames, _slots_of(self.engine, tokens, lead, lead + len(groups)), {"F": len(groups)})
        if lead:
            inputs = self._reference_inputs(dropped)
            self._run("reference_embed", inputs, _slots_of(self.engine, tokens, 0, 1), {})

    def _frame_inputs(self, groups: list[Group], dropped: frozenset[str]) -> dict[str, np.ndarray]:
        """Inputs of `condition_embed` by name; what is not named is zero."""
        system, inputs = self._system, {}
        if "pose" in system.follows and "pose" not in dropped:
            poses = np.concatenate([group.pose_latents.fetch() for group in groups], axis=2)
            inputs["control_latents" if "control" in system.streams else "pose_latents"] = poses
        if system.reference == "start" and "reference" not in dropped:
            inputs["image_latents"] = np.zeros((*self._portrait.shape[:2], len(groups), *self._portrait.shape[3:]), np.float32)
            inputs["image_latents"][:, :, :1] = self._portrait
        if system.reference == "noised":
            # Frames that are not given are grey ones to this network, not zero latents.
            inputs["image_latents"] = self._grey(len(groups))
        if "camera" in system.follows and "camera" not in dropped:
            inputs["rays"] = np.stack([self._rays(group) for group in groups], axis=1)[None]
        return inputs

    def _reference_inputs(self, dropped: frozenset[str]) -> dict[str, np.ndarray]:
        if "reference" in dropped:
            return {}
        if self._system.reference == "slot":
            return {"reference_latents": self._portrait}
        _, _, _, height, width = self._portrait.shape
        return {"image_latents": self._portrait, "mask_latents": np.ones((1, FRAMES_PER_LATENT, 1, height, width), np.float32)}

    def _grey(self, num_frames: int) -> np.ndarray:
        """Latents [1,C,N,h,w] of grey frames."""
        if num_frames not in self._empty:
            self._empty[num_frames] = self._encoder.encode_pictures(
                np.zeros((3, self.config.height, self.config.width), np.float32), num_frames
            )
        return self._empty[num_frames]

    def _rays(self, group: Group) -> np.ndarray:
        """[24,H,W] of a latent frame, value c of frame t at 4c + t; cameras are seen from the first one, as in the training."""
        if self._first_c2w is None:
            self._first_c2w = group.c2w[0]
        c2w = np.linalg.inv(self._first_c2w) @ group.c2w
        rays = ray_maps(group.K, c2w, self.config.height, self.config.width, 1)  # [4,6,H,W]
        return rays.transpose(1, 0, 2, 3).reshape(-1, *rays.shape[2:])

    def _embed_face(self, target: dict, groups: list[Group], dropped: bool) -> None:
        blank = np.repeat(self._encoder.blank_code[:, None], FRAMES_PER_LATENT, axis=1)
        # The first group stands for slot 0, which has no face.
        codes = [blank, *(blank if dropped else group.codes for group in groups)]
        runner = self.engine.load("face_embed")
        inputs = allocate(self.engine, runner.spec.inputs, {"F": len(codes)})
        fed = Mirrored(self.engine, inputs["codes"])
        fed.array[...] = np.concatenate(codes, axis=1)
        fed.send()
        runner.bind(inputs, {tensor.name: target[tensor.name] for tensor in runner.spec.outputs})()

    def _run(self, stage: str, arrays: Mapping[str, np.ndarray], tokens, sizes: dict[str, int]) -> None:
        """Run a stage of conditions into a part of the transformer's tokens. Once per clip, so it is bound anew."""
        runner = self.engine.load(stage)
        inputs = allocate(self.engine, runner.spec.inputs, sizes)
        for name, array in arrays.items():
            fed = Mirrored(self.engine, inputs[name])
            fed.array[...] = array
            fed.send()
        runner.bind(inputs, {"condition_tokens": tokens})()
