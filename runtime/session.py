"""From a bundle to frames: `open_bundle(path).session(...)`, `set_reference`, `push`, `finish`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from factorportrait.bundle import NEUTRAL_CODE, Bundle
from factorportrait.engines.base import Engine, Mirrored, run_once
from factorportrait.engines.chain import ChainedEngine, stage_names
from factorportrait.engines.choose import open_engine
from factorportrait.errors import UserError
from factorportrait.model_config import FRAMES_PER_LATENT, SOLVERS, ModelConfig
from factorportrait.runtime.cache import choose_cache
from factorportrait.runtime.conditions import ConditionBuilder, DrivingFrame, Group, GroupEncoder
from factorportrait.runtime.embedding import choose_embedding
from factorportrait.runtime.looked_up import LookedUp
from factorportrait.runtime.loop import COMMITS, HOISTS, Denoiser, Latents
from factorportrait.runtime.pipeline import Pipeline, choose_overlap
from factorportrait.runtime.schedule import (
    NoiseSource,
    Schedule,
    flow_schedule,
    kept_steps,
    limit_guidance,
    parse_guidance,
)
from factorportrait.runtime.timing import Timings
from factorportrait.runtime.vae import StreamingVAE, to_pictures
from factorportrait.runtime.wan import WanConditions, WanEncoder, slot_rules, wan_guidance

# Loaded when a bundle is opened. The transformer comes with the first session, which decides between `dit` and `dit_inplace`.
STAGES = (
    "vae_encode_first",
    "vae_encode_steady",
    "vae_decode_first",
    "vae_decode_steady",
    "expression_encoder",
    "arkit_encoder",
    "expression_controller",
    "condition_embed",
    "time_embed",
)


MAX_SHIFT = 1000  # the tables of multistep solvers are finite up to here, for up to 100 steps


@dataclass(frozen=True)
class SessionOptions:
    """How to generate. None takes what the checkpoint was trained for.

    Attributes:
        mode: "stream" makes chunk after chunk, without end; "clip" one bounded clip with attention over all of it.
        steps: denoising steps.
        guidance: see `factorportrait.runtime.schedule.parse_guidance`.
        seed: of the noise.
        chunk_frames, window_frames: latent frames generated together, and seen (stream mode).
        cache: "auto", "inplace" or "concat", see `factorportrait.runtime.cache.choose_cache` (stream mode).
        embedding: "auto", "fused" or "graph", see `factorportrait.runtime.embedding.choose_embedding`.
        hoist: "all", "none", or some of `factorportrait.runtime.loop.HOISTS` with commas between them: what leaves the loop. The
            pictures are the same; less is slower, and shows what each brings.
        commit: whose keys and values later chunks see, see `factorportrait.runtime.loop.COMMITS` (stream mode).
        step_cache: threshold of `factorportrait.runtime.schedule.kept_steps`; 0 runs the transformer in every step.
        guidance_steps: guidance in the first so many steps only; None in all. With these three the pictures are others.
        overlap: "auto", "none", "media" or "stages", see `factorportrait.runtime.pipeline.OVERLAPS`: what `frames` and `chunks` do
            at the same time. The pictures are the same.
        quick_start: the first chunk is one latent frame and the second one shorter, so that the first picture comes early. A
            checkpoint trained on whole chunks alone has not seen such a start.
        prompt_embeddings, negative_embeddings, image_embeddings: files, see `factorportrait.runtime.looked_up.LookedUp`.
        expression_gain: how far expressions go: codes are moved away from the neutral face's by this factor. 0 is a neutral face.
        solver: of the flow-matching ODE, see `factorportrait.runtime.schedule.flow_schedule`.
        shift: of the timesteps towards noise; 1 spaces them evenly.
    """

    mode: str | None = None
    steps: int | None = None
    guidance: str | None = None
    seed: int = 0
    chunk_frames: int | None = None
    window_frames: int | None = None
    cache: str = "auto"
    embedding: str = "auto"
    hoist: str = "all"
    commit: str = COMMITS[0]
    step_cache: float = 0.0
    guidance_steps: int | None = None
    overlap: str = "none"
    quick_start: bool = False
    prompt_embeddings: Path | None = None
    negative_embeddings: Path | None = None
    image_embeddings: Path | None = None
    expression_gain: float = 1.0
    solver: str | None = None
    shift: float | None = None

    def resolve(self, config: ModelConfig) -> SessionOptions:
        """Fill in the checkpoint's values.

        Raises:
            UserError: a mode that the checkpoint was not trained for, or sizes that do not go together.
        """
        generation = config.generation
        mode = self.mode or ("stream" if "stream" in generation.modes else generation.modes[0])
        if mode not in generation.modes:
            raise UserError(
                "--mode",
                expected=" or ".join(generation.modes),
                found=mode,
                action="the checkpoint was not trained for others",
            )
        chunk = generation.chunk_frames if self.chunk_frames is None else self.chunk_frames
        window = generation.window_frames if self.window_frames is None else self.window_frames
        if not 1 <= chunk <= window <= generation.window_frames:
            raise UserError(
                "--chunk and --window",
                expected=f"1 <= chunk <= window <= {generation.window_frames}, the trained window",
                found=f"chunk {chunk}, window {window}",
                action="choose other values, or leave them out",
            )
        steps = generation.denoising_steps if self.steps is None else self.steps
        parse_hoist(self.hoist)
        if self.commit not in COMMITS:
            raise UserError("--commit", expected=" or ".join(COMMITS), found=self.commit, action="clean is what was trained")
        if not 0 <= self.step_cache < float("inf"):
            raise UserError("--step-cache", expected="0 or more", found=str(self.step_cache), action="0 switches it off")
        if not 0 <= self.expression_gain < float("inf"):
            raise UserError(
                "--expression-gain", expected="0 or more", found=str(self.expression_gain),
                action="1 leaves expressions as they are",
            )  # fmt: skip
        if self.expression_gain != 1 and not config.conditioning.shows_expression:
            raise UserError(
                "--expression-gain", expected="a system with expression codes", found=config.system, action="leave it out"
            )
        if self.guidance_steps is not None and self.guidance_steps < 0:
            raise UserError("--guidance-steps", expected="0 or more", found=str(self.guidance_steps), action="leave it out for all")
        guidance = f"{generation.guidance_scale:g}" if self.guidance is None else self.guidance
        solver = generation.solver if self.solver is None else self.solver
        if solver not in SOLVERS:
            raise UserError("--solver", expected=" or ".join(SOLVERS), found=solver, action="leave it out for the checkpoint's")
        shift = generation.timestep_shift if self.shift is None else self.shift
        if not 0 < shift <= MAX_SHIFT:
            raise UserError(
                "--shift", expected=f"more than 0, at most {MAX_SHIFT}", found=str(shift), action="1 spaces the steps evenly"
            )
        if self.step_cache and solver == "renoise":
            # A velocity is that of the noise it was predicted from, and this solver draws it anew in every step.
            raise UserError(
                "--step-cache", expected="a solver of the ODE", found="renoise", action="leave it out, or choose another --solver"
            )
        return replace(
            self, mode=mode, steps=steps, guidance=guidance, chunk_frames=chunk, window_frames=window, solver=solver, shift=shift
        )


def parse_hoist(text: str) -> tuple[str, ...]:
    """`SessionOptions.hoist` as names.

    Raises:
        UserError: another word.
    """
    names = {"all": HOISTS, "none": ()}.get(text, tuple(part.strip() for part in text.split(",")))
    if set(names) - set(HOISTS):
        expected = f"all, none, or some of {', '.join(HOISTS)}"
        raise UserError("--hoist", expected=expected, found=text, action="leave it out: all is fastest")
    return names


def embedded_steps(engine: Engine, schedule: Schedule) -> np.ndarray:
    """[steps, 6*D] what the schedule's timesteps add to the modulation of every block."""
    timesteps = np.asarray(schedule.timesteps, np.float32)
    embedded = [run_once(engine, "time_embed", {"timesteps": timestep[None, None]}) for timestep in timesteps]
    return np.stack([each["timestep_proj"].ravel() for each in embedded])


def open_bundle(
    path: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    eager: bool = False,
    spin: bool = True,
    verify: bool = True,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    plans: str | Path | None = None,
    notice: Callable[[str], None] | None = None,
) -> OpenBundle:
    """Open a bundle and load its graphs.

    Args:
        path: folder made by fp-export.
        engine: of `factorportrait.engines.choose.NAMES`; None takes the best one that runs the bundle here.
        threads: of one operator on the CPU; None for every core that the process may use.
        eager: plain calls instead of bound buffers and CUDA graphs; the same numbers, slower.
        spin: threads of ONNX Runtime keep their cores while a stage runs; False is better where other programs want them.
        verify: read all files first and compare their digests.
        checkpoint, device: for the engine torch: the folder that the bundle was exported from, and where to run it.
        plans: for TensorRT: the folder of its plans, if they are not in the user's cache.
        notice: is given lines for the user, such as that TensorRT builds a plan.

    Raises:
        BundleError: missing, damaged or newer than this program.
        UserError: the engine cannot run here.
    """
    start = time.perf_counter()
    bundle = Bundle(path)
    if verify:
        bundle.verify()
    loaded, reason = open_engine(
        bundle, engine, threads=threads, eager=eager, spin=spin, checkpoint=checkpoint, device=device, plans=plans, notice=notice
    )
    stages = bundle.manifest.target_stages(loaded.target)
    if stage_names(stages) != set(stages):
        loaded = ChainedEngine(loaded, bundle)
    for name in STAGES:
        if name in stages:
            loaded.load(name)
    return OpenBundle(bundle, loaded, load_s=time.perf_counter() - start, engine_reason=reason)


class OpenBundle:
    """A bundle with its graphs loaded; sessions share them. `engine_reason` says in words why it is this engine."""

    def __init__(self, bundle: Bundle, engine: Engine, load_s: float = 0.0, engine_reason: str = "given"):
        self.bundle, self.engine, self.load_s, self.engine_reason = bundle, engine, load_s, engine_reason

    @property
    def config(self) -> ModelConfig:
        return self.bundle.config

    def session(self, options: SessionOptions | None = None, **changes) -> Session:
        """A session with its own state; keywords are fields of `SessionOptions`."""
        start = time.perf_counter()
        session = Session(self, options or SessionOptions(**changes))
        self.load_s += time.perf_counter() - start  # the first one loads the transformer
        return session


@dataclass(frozen=True)
class _Work:
    """What a chunk is generated from: its latent frames, the index of the first, and how many of its pictures are wanted."""

    groups: list[Group]
    first_frame: int
    num_frames: int


class Session:
    """One portrait, driven frame by frame. Not for use by several threads at once.

    >>> session = open_bundle("demo-fp32").session(seed=1)
    >>> session.set_reference(portrait)            # uint8 [H, W, 3]
    >>> for picture in session.frames(driving):    # an iterable of DrivingFrame
    ...     show(picture)
    """

    denoiser_class = Denoiser

    def __init__(self, opened: OpenBundle, options: SessionOptions):
        self.config = opened.config
        self.options = options = options.resolve(self.config)
        self.timings = Timings()
        engine, stages = opened.engine, stage_names(opened.bundle.manifest.target_stages(opened.engine.target))
        is_wan = not self.config.conditioning.shows_expression
        guidance = parse_guidance(options.guidance, options.steps)
        if options.guidance_steps is not None:
            guidance = limit_guidance(guidance, options.guidance_steps)
        if is_wan:
            guidance = wan_guidance(guidance, self.config)
        schedule = flow_schedule(options.steps, options.shift, options.solver)
        noise = NoiseSource(options.seed, (self.config.vae.z_dim, self.config.latent_height, self.config.latent_width))
        constants, hoist = opened.bundle.constants(), parse_hoist(options.hoist)
        clip, in_place, self.cache_reason = options.mode == "clip", False, "clip mode keeps nothing"
        if not clip:
            in_place, self.cache_reason = choose_cache(
                options.cache, engine_in_place=engine.in_place, stages=stages,
                chunk_frames=options.chunk_frames, window_frames=options.window_frames,
            )  # fmt: skip
        self._looked_up = LookedUp(
            opened.bundle, engine, guidance, prompt=options.prompt_embeddings, negative=options.negative_embeddings,
            image=options.image_embeddings,
        )  # fmt: skip
        self._denoiser = self.denoiser_class(
            engine, schedule, guidance, noise, mode=options.mode, chunk_frames=options.chunk_frames,
            window_frames=options.window_frames, timings=self.timings, in_place=in_place,
            hoist=hoist, commit=options.commit, start_frames=self._start_frames(),
            evaluated=kept_steps(embedded_steps(engine, schedule), options.step_cache) if options.step_cache else None,
            rules=slot_rules(self.config), looked_up=self._looked_up.tensors,
        )  # fmt: skip
        self.overlap, self.overlap_reason = choose_overlap(options.overlap, engine, options.mode)
        kept_groups = self._kept_groups()
        if is_wan:
            self.embedding, self.embedding_reason = "graph", "the fused one is FactorPortrait's"
            self._encoder = WanEncoder(self.config, engine, self.timings, kept_groups)
            self._builder = WanConditions(
                self.config, engine, guidance, self._denoiser, self._encoder, self._looked_up, constants, self.timings,
                options.chunk_frames,
            )  # fmt: skip
        else:
            self._encoder = GroupEncoder(
                self.config, engine, self.timings, reuse="features" in hoist, neutral_code=constants[NEUTRAL_CODE],
                gain=options.expression_gain, kept_groups=kept_groups,
            )  # fmt: skip
            fused, self.embedding_reason = choose_embedding(options.embedding, config=self.config, arrays=constants, engine=engine)
            self.embedding = "graph" if fused is None else "fused"
            self._builder = ConditionBuilder(
                self.config, engine, guidance, constants[NEUTRAL_CODE], self.timings, self._denoiser.condition_buffers, clip=clip,
                fused=fused, hoist=hoist,
            )  # fmt: skip
        self._decoder = StreamingVAE(engine, "decode")
        self._engine = engine
        self._restart()

    @property
    def cache(self) -> str:
        """ "inplace" or "concat"; `cache_reason` says why."""
        return "inplace" if self._denoiser.cache.stage == "dit_inplace" else "concat"

    @property
    def cache_bytes(self) -> int:
        """Memory of the K/V caches."""
        return self._denoiser.cache_bytes

    def _restart(self) -> None:
        self._has_reference = False
        self._encoder.reset()
        self._builder.reset()
        self._decoder.reset()
        self._groups: list[Group] = []
        self._num_pushed = 0
        self._num_taken = 0  # those of them that a chunk has
        self._num_encoded = 0  # latent frames that a chunk has
        self._last: DrivingFrame | None = None
        self._started: float | None = None
        self.timings.first_frame_s = None
        self._chunk_before: float | None = None
        self._busy_s = 0.0
        self._finished = False
        self._kept: dict[tuple[int, ...], list[Mirrored]] = {}

    def set_reference(self, portrait: np.ndarray) -> None:
        """Begin a clip of this person; what was generated before is forgotten.

        Args:
            portrait: uint8 [H, W, 3] at the bundle's size (`factorportrait.runtime.media.portrait.load_portrait` makes it).
        """
        expected = (self.config.height, self.config.width, 3)
        if portrait.shape != expected or portrait.dtype != np.uint8:
            raise UserError(
                "portrait",
                expected=f"uint8 {list(expected)}",
                found=f"{portrait.dtype} {list(portrait.shape)}",
                action="read it with load_portrait",
            )
        self._restart()
        self._started = self._chunk_before = time.perf_counter()
        with self.timings("reference"):
            if isinstance(self._builder, WanConditions):
                self._builder.set_portrait(portrait)
            else:
                tokens, modulation = self._builder.reference(self._encoder.encode_reference(portrait))
                if self.options.mode == "stream":
                    self._denoiser.set_reference(tokens, modulation)
            self._has_reference = True

    def push(self, frame: DrivingFrame) -> list[np.ndarray]:
        """Take one driving frame; give the pictures uint8 [H, W, 3] that became ready, often none.

        Raises:
            UserError: no reference yet, the clip is finished, or a clip longer than the checkpoint's (clip mode).
        """
        self._check_begun("push")
        return self._pictures_of(self._take, frame)

    def finish(self) -> list[np.ndarray]:
        """End the clip: the last chunk is completed by repeating the last frame, and the surplus is not given out."""
        if not self._has_reference or self._finished:
            return []
        pictures = self._pictures_of(self._complete)
        self._finished = True
        return pictures

    def frames(self, driving: Iterable[DrivingFrame]) -> Iterator[np.ndarray]:
        """Pictures for all of `driving`, as soon as they are ready; see `chunks`."""
        for pictures in self.chunks(driving):
            yield from pictures

    def chunks(self, driving: Iterable[DrivingFrame]) -> Iterator[list[np.ndarray]]:
        """Pictures for all of `driving`, chunk by chunk, as soon as they are ready.

        With an overlap `driving` is iterated in another thread, ahead of the pictures. What it raises is raised here, after the
        pictures of the chunks before. Who leaves early begins again with `set_reference`.
        """
        self._check_begun("frames")
        if self.overlap == "none":
            for frame in driving:
                if pictures := self.push(frame):
                    yield pictures
            if pictures := self.finish():
                yield pictures
            return
        self._finished = True  # `push` and `finish` have nothing to do with this clip
        with Pipeline() as line:
            # As little ahead as keeps all threads busy: more would make the driving older than it has to be, and need memory.
            frames = line.ahead(driving, FRAMES_PER_LATENT * self.options.chunk_frames, "driving", wait=False)
            if self.overlap == "media":
                for frame in frames:
                    if pictures := self._pictures_of(self._take, frame):
                        yield pictures
                if pictures := self._pictures_of(self._complete):
                    yield pictures
                return
            latents = self._latents(line.ahead(self._works(frames), 1, "encoder"))
            for pictures in line.ahead(self._decoded(line.ahead(latents, 1, "denoiser")), 1, "decoder"):
                self._account(None, pictures)
                yield pictures

    def _pictures_of(self, gather: Callable[..., _Work | None], *arguments) -> list[np.ndarray]:
        """Pictures of the chunk that `gather` completes, `_take` or `_complete`: all of it in the caller's thread, and timed."""
        start = time.perf_counter()
        work = gather(*arguments)
        pictures = [] if work is None else self._decode(self._generate(work), work.num_frames)
        self._account(time.perf_counter() - start, pictures)
        return pictures

    def _works(self, frames: Iterator[DrivingFrame]) -> Iterator[_Work]:
        for frame in frames:
            if (work := self._take(frame)) is not None:
                yield work
        if (work := self._complete()) is not None:
            yield work

    def _latents(self, works: Iterator[_Work]) -> Iterator[tuple[Latents, int]]:
        for index, work in enumerate(works):
            latents = self._generate(work)
            # The next chunk overwrites them while the decoder reads: one copy is at the decoder's, one waits, one is written.
            memory = latents.memory.buffer
            if memory.shape not in self._kept:
                copies = (Mirrored(self._engine, self._engine.zeros(memory.shape, "float32")) for _ in range(3))
                self._kept[memory.shape] = list(copies)
            kept = self._kept[memory.shape][index % 3]
            self._engine.copy(memory, kept.buffer)
            yield Latents(kept, latents.first), work.num_frames

    def _decoded(self, latents: Iterator[tuple[Latents, int]]) -> Iterator[list[np.ndarray]]:
        for latent_frames, num_frames in latents:
            yield self._decode(latent_frames, num_frames)

    def check_length(self, num_frames: int) -> None:
        """Raises UserError when a clip of so many frames is longer than the checkpoint's (clip mode)."""
        limit = 1 + FRAMES_PER_LATENT * (self.config.generation.max_clip_frames - 1)
        if self.options.mode == "clip" and num_frames > limit:
            raise UserError(
                "--mode clip",
                expected=f"at most {limit} frames, the length of the training",
                found=f"{num_frames} frames of driving",
                action=f"use --mode stream, or --frames {limit}",
            )

    def _check_begun(self, what: str) -> None:
        if not self._has_reference or self._finished:
            found = "a finished clip" if self._finished else "none"
            raise UserError(what, expected="a portrait first", found=found, action="call set_reference")

    def _take(self, frame: DrivingFrame) -> _Work | None:
        """Encode a driving frame; gives a chunk's work when it is the last one of it. One that is refused counts for nothing."""
        self.check_length(self._num_pushed + 1)
        self._encode(frame)
        self._num_pushed += 1
        self._last = frame
        return self._cut() if self.options.mode == "stream" and len(self._groups) == self._chunk_size() else None

    def _complete(self) -> _Work | None:
        """The work of what is left at the end of a clip, completed with its last frame."""
        if not self._encoder.num_waiting and not self._groups:
            return None
        wanted = self._chunk_size() if self.options.mode == "stream" else 0
        while self._encoder.num_waiting or len(self._groups) < wanted:
            self._encode(self._last)
        return self._cut()

    def _encode(self, frame: DrivingFrame) -> None:
        group = self._encoder.push(frame)
        if group is not None:
            self._groups.append(group)

    def _chunk_size(self) -> int:
        """Latent frames of the chunk that is gathered."""
        size, start = self.options.chunk_frames, self._start_frames()
        # A short one, then what is missing to a whole chunk: behind that, chunks lie in the ring as they always do.
        return {0: start, start: size - start}.get(self._num_encoded, size) if start else size

    def _start_frames(self) -> int:
        """Latent frames of a first chunk that is shorter than the others; 0 where it is not."""
        return int(self.options.quick_start and self.options.chunk_frames > 1)

    def _kept_groups(self) -> int:
        """Latent frames whose conditions are used at the same time."""
        of_chunk = self.config.generation.max_clip_frames if self.options.mode == "clip" else self.options.chunk_frames
        # Where stages overlap a chunk is denoised, one waits, one is encoded; and the encoder may be one picture further.
        return 4 * of_chunk if self.overlap == "stages" else of_chunk

    def _cut(self) -> _Work:
        groups, self._groups = self._groups, []
        work = _Work(groups, self._num_encoded, self._num_pushed - self._num_taken)
        self._num_encoded += len(groups)
        self._num_taken = self._num_pushed
        return work

    def _generate(self, work: _Work) -> Latents:
        latents = self._denoiser.generate(self._builder.chunk(work.groups, work.first_frame))
        return self._builder.frames_of(latents) if isinstance(self._builder, WanConditions) else latents

    def _decode(self, latents: Latents, num_frames: int) -> list[np.ndarray]:
        """Clean latents -> their first `num_frames` pictures."""
        pictures: list[np.ndarray] = []
        for slot in range(latents.first, latents.first + latents.num_frames):
            with self.timings("decode"):
                pictures += to_pictures(self._decoder.run_slot(latents.memory.buffer, slot).fetch())
        return pictures[:num_frames]

    def _account(self, busy_s: float | None, pictures: list[np.ndarray]) -> None:
        """Note that so much time was spent, None where stages of several chunks share it, and what came out."""
        now = time.perf_counter()
        self._busy_s += busy_s or 0.0
        if pictures:
            if self.timings.first_frame_s is None:
                self.timings.first_frame_s = now - self._started
            self.timings.add_chunk(None if busy_s is None else self._busy_s, now - self._chunk_before, len(pictures))
            self._busy_s, self._chunk_before = 0.0, now
