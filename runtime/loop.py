"""The denoising loop: for each step predict, guide, step; then commit the chunk's keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Buffer, Buffers, Call, Engine, Mirrored, allocate
from factorportrait.runtime.cache import ConcatCache, InPlaceCache, frame_positions
from factorportrait.runtime.schedule import Guidance, NoiseSource, Schedule
from factorportrait.runtime.timing import Timings

# What is computed once instead of in every pass of a chunk: condition tokens and expression modulation once per chunk, time
# embeddings once per schedule, the reference's keys and values once per portrait, the code of a picture once while it stays.
HOISTS = ("conditions", "modulation", "time", "reference", "features")
# Whose keys and values later chunks see. clean: those of a pass of its own over the finished frames. last-step: those of the last
# denoising step, whose frames still held noise; one pass less.
COMMITS = ("clean", "last-step")


@dataclass
class ChunkConditions:
    """What a chunk is generated from, per condition set of the guidance; F slots.

    What the host knows of it is on the device already; `compute` makes tokens and modulation of that.

    Attributes:
        first_frame: index of the first latent frame, 0-based, the reference not counted; None for the reference.
        tokens: per set [1, F, T, D] from `condition_embed`.
        modulation: per set [1, F, 6, D] from `expression_controller`.
        compute: calls of the engine that fill them, the same object for all chunks of a kind, which may be recorded with the
            steps; None where they are filled. It must not keep the denoiser alive.
        again: what computes them anew, where that is not hoisted out of the loop; run before every pass.
        given: clean latents [1, C, F, h, w] that are known and only committed.
    """

    first_frame: int | None
    tokens: list[Buffer]
    modulation: list[Buffer]
    compute: Call | None = None
    again: tuple[Callable[[], None], ...] = ()
    given: np.ndarray | None = None


@dataclass(frozen=True)
class Latents:
    """Clean latents where the engine has them, behind the first slots of memory [1, C, F, h, w].

    They are overwritten by the next chunk of this size.
    """

    memory: Mirrored
    first: int = 0

    @property
    def num_frames(self) -> int:
        return self.memory.array.shape[2] - self.first

    def fetch(self) -> np.ndarray:
        """[1, C, N, h, w] on the host, as soon as they are computed."""
        return self.memory.fetch()[:, :, self.first :]


@dataclass(frozen=True)
class SlotRules:
    """How a system's slots lie; the defaults are FactorPortrait's.

    Attributes:
        lead: slots in front of a clip that hold no noise.
        lead_is_clean: those are at timestep 0, not at the step's.
        sink: slots in front of a stream's cache.
    """

    lead: int = 1
    lead_is_clean: bool = True
    sink: int = 1


class _Slots:
    """Everything that chunks of F slots need: buffers, time embeddings of the whole schedule, and the bound calls."""

    def __init__(self, denoiser: Denoiser, num_slots: int):
        engine, spec, sizes = denoiser.engine, denoiser.dit.spec, {"F": num_slots}
        outputs = [tensor for tensor in spec.outputs if tensor.name == "velocity"]
        inputs = [tensor for tensor in spec.inputs if tensor.name in ("noise_latents", "positions")]
        self.x, self.positions = (Mirrored(engine, buffer) for buffer in allocate(engine, inputs, sizes).values())
        self.velocity = allocate(engine, outputs, sizes)["velocity"]
        own = ("condition_tokens", "expression_modulation", "face_k", "face_v")
        conditions = [tensor for tensor in spec.inputs if tensor.name.split(".")[0] in own]
        self.conditions = [allocate(engine, conditions, sizes) for _ in range(denoiser.guidance.num_sets)]
        # The clip's slot 0 holds no noise; x keeps it zero, and `frames` is a view of the others.
        self.x.array[...] = 0
        self.first = first = denoiser.rules.lead if denoiser.mode == "clip" else 0
        self.frames, self.latents = self.x.array[:, :, first:], Latents(self.x, first)
        schedule = denoiser.schedule

        def like_x() -> Buffer:
            return engine.zeros(self.x.buffer.shape, "float32")

        self.spare, self.history = like_x(), [like_x() for _ in range(schedule.outputs.shape[1])]
        self.noise = {step: Mirrored(engine, like_x()) for step in np.flatnonzero(schedule.noise).tolist()}
        timed = first if denoiser.rules.lead_is_clean else 0
        self.embed_time = [self._bind_time(denoiser, t, num_slots, timed) for t in (*denoiser.schedule.timesteps, 0.0)]
        for call, _ in self.embed_time:
            call()
        self.calls: dict[tuple[int, int, int], Call] = {}
        self.sums: dict[object, Call] = {}
        self.chunks: dict[object, Call] = {}
        self._engine = engine

    def sum(self, key: object, target: Buffer, terms: list[tuple[Buffer, float]]) -> None:
        """target = weighted sum of the frames of the terms; bound under `key` when it is first asked for."""
        if key not in self.sums:
            self.sums[key] = self._engine.weighted_sum(target, terms, self.spare, self.first)
        self.sums[key]()

    @staticmethod
    def _bind_time(denoiser: Denoiser, timestep: float, num_slots: int, first: int) -> tuple[Call, dict[str, Buffer]]:
        engine, runner = denoiser.engine, denoiser.time_embed
        inputs, outputs = (allocate(engine, side, {"F": num_slots}) for side in (runner.spec.inputs, runner.spec.outputs))
        timesteps = Mirrored(engine, inputs["timesteps"])
        timesteps.array[:, :first], timesteps.array[:, first:] = 0, timestep
        timesteps.send()
        return runner.bind(inputs, outputs), outputs


class Denoiser:
    """Generates latent frames chunk by chunk ("stream"), or all of a clip at once ("clip").

    In stream mode a chunk sees the reference and a window of clean frames through one K/V cache per condition set. In clip
    mode slot 0 is the reference and attention is bidirectional over all slots; nothing is cached.

    Args:
        in_place: update the cache in the graph (`dit_inplace`); else `dit` is given the past. See `choose_cache`.
        hoist: of `HOISTS`, what leaves the loop; the results are the same.
        commit: of `COMMITS`.
        start_frames: see `ConcatCache`.
        evaluated: per step, is the transformer run? Else the velocity of the step before is taken again (`kept_steps`).
        rules: see `SlotRules`.
        looked_up: per condition set what cross-attention looks up beside the frames: keys and values of text and picture.
    """

    def __init__(
        self,
        engine: Engine,
        schedule: Schedule,
        guidance: Guidance,
        noise: NoiseSource,
        *,
        mode: str,
        chunk_frames: int,
        window_frames: int,
        timings: Timings,
        in_place: bool = False,
        hoist: Collection[str] = HOISTS,
        commit: str = COMMITS[0],
        start_frames: int = 0,
        evaluated: Sequence[bool] | None = None,
        rules: SlotRules = SlotRules(),  # noqa: B008 (frozen)
        looked_up: Sequence[Buffers] | None = None,
    ):
        self.engine, self.schedule, self.guidance, self.noise = engine, schedule, guidance, noise
        self.mode, self.window_frames, self.timings, self._hoist = mode, window_frames, timings, hoist
        self.rules = rules
        self._looked_up = [{}] * guidance.num_sets if looked_up is None else list(looked_up)
        self._clean_commit = commit == "clean"
        self._evaluated = [True] * schedule.num_steps if evaluated is None else list(evaluated)
        self.dit, self.time_embed = engine.load("dit_inplace" if in_place else "dit"), engine.load("time_embed")
        if in_place:
            self.cache = InPlaceCache(engine, self.dit, guidance.num_sets, window_frames, sink=rules.sink)
        else:
            clip = mode == "clip"
            self.cache = ConcatCache(
                engine, self.dit, guidance.num_sets, chunk_frames, window_frames, clip=clip, sink=rules.sink,
                start_frames=start_frames,
            )  # fmt: skip
        self._slots: dict[int, _Slots] = {}
        self._reference: _Slots | None = None  # where it is computed anew for every chunk

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def condition_buffers(self, num_slots: int) -> tuple[list[Buffer], list[Buffer]]:
        """Tokens and modulation per set for F slots, to be written in place. Who gives others to `generate` has them copied."""
        conditions = self._slots_of(num_slots).conditions
        return [each["condition_tokens"] for each in conditions], [each["expression_modulation"] for each in conditions]

    def slot_conditions(self, num_slots: int) -> list[dict[str, Buffer]]:
        """Per set everything that chunks of F slots are conditioned on, by the names of the transformer's inputs."""
        return self._slots_of(num_slots).conditions

    def set_reference(self, tokens: list[Buffer], modulation: list[Buffer]) -> None:
        """Compute the sink once per portrait: one slot at timestep 0 that attends only to itself. Per set [1,1,...]."""
        slots = self._slots_of(1)
        if "reference" not in self._hoist:
            # Kept apart: a chunk of one latent frame has the same buffers.
            slots = self._reference = self._reference or _Slots(self, 1)
        self._commit_reference(slots, tokens, modulation)

    def _commit_reference(self, slots: _Slots, tokens: list[Buffer], modulation: list[Buffer]) -> None:
        slots.x.array[...] = 0
        slots.x.send()
        self._commit(slots, None, self._place(slots, ChunkConditions(None, tokens, modulation)))

    def generate(self, chunk: ChunkConditions) -> Latents:
        """Clean latents of the chunk's frames. On a device this returns before they are computed."""
        _, num_slots, *_ = chunk.tokens[0].shape
        slots = self._slots_of(num_slots)
        if self._reference is not None:
            with self.timings("reference"):
                kept = self._reference.conditions
                names = "condition_tokens", "expression_modulation"
                self._commit_reference(self._reference, *([each[name] for each in kept] for name in names))
        used = self._place(slots, chunk)
        if chunk.given is not None:
            slots.frames[...] = chunk.given
            slots.x.send()
            self._compute(chunk)
            self._commit(slots, chunk.first_frame, used)
            return slots.latents
        self._draw(slots, chunk.first_frame)
        if self.engine.whole_chunks and not chunk.again and "time" in self._hoist:
            with self.timings("steps"):
                self._whole_chunk(slots, chunk, used)
            return slots.latents
        self._compute(chunk)
        for step in range(self.schedule.num_steps):
            with self.timings("step", step):
                if self._evaluated[step]:
                    self._repeat(slots, chunk, step)
                self._step(slots, step, used, chunk.first_frame)
        if self.mode == "stream" and self._clean_commit:
            with self.timings("commit"):
                self._repeat(slots, chunk, self.schedule.num_steps)
                self._commit(slots, chunk.first_frame, used)
        return slots.latents

    def _compute(self, chunk: ChunkConditions) -> None:
        if chunk.compute is not None:
            with self.timings("conditions"):
                chunk.compute()

    def _draw(self, slots: _Slots, first_frame: int) -> None:
        """The noise that the chunk starts from, and what its steps add, to the device."""
        first, num_frames = slots.first, slots.frames.shape[2]
        for step, target in ((0, slots.x), *((step + 1, each) for step, each in slots.noise.items())):
            self.noise.draw(first_frame, num_frames, step, target.array[:, :, first:])
            target.send()

    def _whole_chunk(self, slots: _Slots, chunk: ChunkConditions, used: int) -> None:
        """Conditions, every step and the commit as one call, recorded where the device has graphs.

        Positions, places in the ring and what conditions are made of lie in memory; what is left to tell chunks apart is the key.
        """
        first_frame, num_slots = chunk.first_frame, len(slots.positions.array)
        key = chunk.compute, used, self.cache.moves(first_frame, num_slots)
        if key not in slots.chunks:
            # The denoiser keeps the call, so the call must not keep the denoiser: a cycle would hold the device's memory.
            denoiser, compute = weakref.proxy(self), chunk.compute
            slots.chunks[key] = self.engine.capture(lambda: denoiser._run_chunk(compute, num_slots, used, first_frame))
        slots.chunks[key]()

    def _run_chunk(self, compute: Call | None, num_slots: int, used: int, first_frame: int) -> None:
        slots = self._slots_of(num_slots)
        if compute is not None:
            compute()
        for step in range(self.schedule.num_steps):
            self._step(slots, step, used, first_frame)
        if self.mode == "stream" and self._clean_commit:
            self._commit(slots, first_frame, used)

    def _slots_of(self, num_slots: int) -> _Slots:
        if num_slots not in self._slots:
            self._slots[num_slots] = _Slots(self, num_slots)
        return self._slots[num_slots]

    def _repeat(self, slots: _Slots, chunk: ChunkConditions, step: int) -> None:
        """Compute before a pass what is not hoisted out of the loop."""
        for compute in chunk.again:
            compute()
        if "time" not in self._hoist:
            call, _ = slots.embed_time[step]
            call()

    def _place(self, slots: _Slots, chunk: ChunkConditions) -> int:
        """Conditions and positions of a chunk go to the device; gives the number of slots of the cache that it uses."""
        for kept, tokens, modulation in zip(slots.conditions, chunk.tokens, chunk.modulation, strict=True):
            self.engine.copy(tokens, kept["condition_tokens"])
            self.engine.copy(modulation, kept["expression_modulation"])
        num_slots, first = len(slots.positions.array), chunk.first_frame
        if self.mode == "clip" or first is None:
            slots.positions.array[:] = np.arange(num_slots)
        else:
            frames = np.arange(first, first + num_slots)
            slots.positions.array[:] = frame_positions(frames, first + num_slots, self.window_frames, self.rules.sink)
        slots.positions.send()
        return self.cache.place(first, num_slots)

    def _step(self, slots: _Slots, step: int, used: int, first_frame: int) -> None:
        """One step of the schedule: the guided velocity, or that of the step before, and x with the newest velocities."""
        history, schedule = slots.history, self.schedule
        if self._evaluated[step]:
            self._predict(slots, step, used, first_frame)
        else:
            now, before = (history[each % len(history)] for each in (step, step - 1))
            if now is not before:
                slots.sum(("kept", step), now, [(before, 1.0)])
        terms = [(slots.x.buffer, schedule.sample[step])]
        for age, coefficient in enumerate(schedule.outputs[step][: step + 1]):
            if coefficient:
                terms.append((history[(step - age) % len(history)], coefficient))
        if step in slots.noise:
            terms.append((slots.noise[step].buffer, schedule.noise[step]))
        slots.sum(("step", step), slots.x.buffer, terms)

    def _predict(self, slots: _Slots, step: int, used: int, first_frame: int) -> None:
        """Guided velocity of the frames into the history: the weighted sum over the condition sets."""
        guided = slots.history[step % len(slots.history)]
        # The last step's keys and values are kept of every set, also where its velocity does not count.
        keep = self.mode == "stream" and not self._clean_commit and step == self.schedule.num_steps - 1
        started = False
        for i, weight in enumerate(self.guidance.weights[step]):
            if weight == 0 and not keep:
                continue
            self._evaluate(slots, i, step, used)
            if keep:
                self.cache.commit(i, first_frame, len(slots.positions.array))
            if weight == 0:
                continue
            slots.sum(("guided", step, i), guided, [(guided, 1.0)] * started + [(slots.velocity, weight)])
            started = True

    def _commit(self, slots: _Slots, first_frame: int | None, used: int) -> None:
        """One run of every set at timestep 0 on the clean frames, whose keys and values are kept."""
        for i in range(self.guidance.num_sets):
            self._evaluate(slots, i, self.schedule.num_steps, used)
            self.cache.commit(i, first_frame, len(slots.positions.array))

    def _evaluate(self, slots: _Slots, index: int, step: int, used: int) -> None:
        """One run of the transformer for condition set `index`; row `num_steps` of the time embeddings is timestep 0."""
        key = index, step, used
        if key not in slots.calls:
            inputs, outputs = self.cache.tensors(index, len(slots.positions.array), used)
            own = {"noise_latents": slots.x.buffer, "positions": slots.positions.buffer}
            _, time = slots.embed_time[step]
            inputs = {**own, **slots.conditions[index], **self._looked_up[index], **time, **inputs}
            slots.calls[key] = self.dit.bind(inputs, {"velocity": slots.velocity, **outputs})
        slots.calls[key]()
