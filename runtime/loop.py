"""The denoising loop: for each step predict, guide, step; then commit the chunk's keys and values."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Runner
from factorportrait.runtime.cache import KVCache, frame_positions
from factorportrait.runtime.schedule import Guidance, NoiseSource, Schedule
from factorportrait.runtime.timing import Timings


@dataclass
class ChunkConditions:
    """What a chunk is generated from, per condition set of the guidance; F slots.

    Attributes:
        first_frame: index of the first latent frame, 0-based, the reference not counted.
        tokens: per set [1, F, T, D] from `condition_embed`.
        modulation: per set [1, F, 6, D] from `expression_controller`.
    """

    first_frame: int
    tokens: list[np.ndarray]
    modulation: list[np.ndarray]


class TimeTable:
    """Time embeddings of the whole schedule, computed once: row `steps` is timestep 0, of clean frames."""

    def __init__(self, runner: Runner, schedule: Schedule, num_slots: int, reference_first: bool):
        self._rows = []
        for timestep in (*schedule.timesteps, 0.0):
            timesteps = np.full((1, num_slots), timestep, np.float32)
            if reference_first:
                timesteps[0, 0] = 0
            outputs = runner.run({"timesteps": timesteps})
            self._rows.append({name: np.ascontiguousarray(outputs[name]) for name in ("temb", "timestep_proj")})

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self._rows[step]


class Denoiser:
    """Generates latent frames chunk by chunk ("stream"), or all of a clip at once ("clip").

    In stream mode a chunk sees the reference and a window of clean frames through one K/V cache per condition set. In clip
    mode slot 0 is the reference and attention is bidirectional over all slots; nothing is cached.
    """

    def __init__(
        self,
        dit: Runner,
        time_embed: Runner,
        schedule: Schedule,
        guidance: Guidance,
        noise: NoiseSource,
        *,
        mode: str,
        chunk_frames: int,
        window_frames: int,
        timings: Timings,
    ):
        self.dit, self.time_embed = dit, time_embed
        self.schedule, self.guidance, self.noise = schedule, guidance, noise
        self.mode, self.window_frames, self.timings = mode, window_frames, timings
        self.num_blocks = sum(spec.name.startswith("past_k.") for spec in dit.spec.inputs)
        *_, tokens, dim = dit.spec.input("past_k.0").shape
        _, self.channels, _, self.height, self.width = dit.spec.input("noise_latents").shape
        self.tokens, self.dim = tokens, dim
        num_caches = guidance.num_sets if mode == "stream" else 0
        self.caches = [KVCache(self.num_blocks, window_frames, chunk_frames, tokens, dim) for _ in range(num_caches)]
        self._empty = np.zeros((1, 0, tokens, dim), np.float32)
        self._time: dict[int, TimeTable] = {}
        self._buffers: dict[int, dict[str, np.ndarray]] = {}

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def reset(self) -> None:
        """Begin a new clip with the same reference."""
        for cache in self.caches:
            cache.reset()

    def set_reference(self, tokens: list[np.ndarray], modulation: list[np.ndarray]) -> None:
        """Compute the sink once per portrait: one slot at timestep 0 that attends only to itself. Per set [1,1,...]."""
        latents = np.zeros((1, self.channels, 1, self.height, self.width), np.float32)
        for i, cache in enumerate(self.caches):
            outputs = self._evaluate(
                i, latents, self.schedule.num_steps, tokens[i], modulation[i], np.zeros(1, np.int64)
            )
            for block in range(self.num_blocks):
                cache.write_sink(block, outputs[f"new_k.{block}"], outputs[f"new_v.{block}"])

    def generate(self, chunk: ChunkConditions) -> np.ndarray:
        """Clean latents [1, C, N, h, w] of the chunk's frames; the array is reused by the next chunk of this size."""
        x, frames, fresh = self._start(chunk)
        positions = self._positions(chunk)
        history: deque[np.ndarray] = deque(maxlen=self.schedule.outputs.shape[1])
        for step in range(self.schedule.num_steps):
            with self.timings("step"):
                history.appendleft(self._predict(x, step, chunk, positions))
                self._step(frames, history, step, chunk.first_frame, fresh)
        if self.mode == "stream":
            with self.timings("commit"):
                self._commit(x, chunk, positions)
        return frames

    def _start(self, chunk: ChunkConditions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # The clip's slot 0 holds no noise; x keeps it zero, and `frames` is the view of the others.
        slots = chunk.tokens[0].shape[1]
        buffers = self._slot_buffers(slots)
        x = buffers["x"]
        frames = x if self.mode == "stream" else x[:, :, 1:]
        self.noise.draw(chunk.first_frame, frames.shape[2], 0, frames)
        return x, frames, buffers["fresh"][:, :, : frames.shape[2]]

    def _predict(self, x: np.ndarray, step: int, chunk: ChunkConditions, positions: np.ndarray) -> np.ndarray:
        """Guided velocity of the frames: the weighted sum over the condition sets."""
        guided = None
        for i, weight in enumerate(self.guidance.weights[step]):
            if weight == 0:
                continue
            velocity = self._evaluate(i, x, step, chunk.tokens[i], chunk.modulation[i], positions, chunk)["velocity"]
            velocity = velocity if self.mode == "stream" else velocity[:, :, 1:]
            if guided is None:
                guided = velocity * np.float32(weight)
            else:
                guided += velocity * np.float32(weight)
        return guided

    def _step(self, frames: np.ndarray, history: deque, step: int, first_frame: int, fresh: np.ndarray) -> None:
        schedule = self.schedule
        frames *= np.float32(schedule.sample[step])
        for coefficient, output in zip(schedule.outputs[step], history, strict=False):
            if coefficient:
                frames += np.float32(coefficient) * output
        if schedule.noise[step]:
            frames += np.float32(schedule.noise[step]) * self.noise.draw(first_frame, frames.shape[2], step + 1, fresh)

    def _commit(self, x: np.ndarray, chunk: ChunkConditions, positions: np.ndarray) -> None:
        for i, cache in enumerate(self.caches):
            outputs = self._evaluate(
                i, x, self.schedule.num_steps, chunk.tokens[i], chunk.modulation[i], positions, chunk
            )
            for block in range(self.num_blocks):
                cache.commit(block, chunk.first_frame, outputs[f"new_k.{block}"], outputs[f"new_v.{block}"])
            cache.advance(chunk.first_frame, x.shape[2])

    def _positions(self, chunk: ChunkConditions) -> np.ndarray:
        slots = chunk.tokens[0].shape[1]
        if self.mode == "clip":
            return np.arange(slots, dtype=np.int64)
        frames = np.arange(chunk.first_frame, chunk.first_frame + slots)
        return frame_positions(frames, chunk.first_frame + slots, self.window_frames)

    def _evaluate(
        self,
        index: int,
        x: np.ndarray,
        step: int,
        tokens: np.ndarray,
        modulation: np.ndarray,
        positions: np.ndarray,
        chunk: ChunkConditions | None = None,
    ) -> dict[str, np.ndarray]:
        """One run of the transformer for condition set `index`; without `chunk` (the reference) nothing is looked back on."""
        slots = x.shape[2]
        past_positions = np.zeros(0, np.int64)
        past_k = past_v = [self._empty] * self.num_blocks
        if self.mode == "stream" and chunk is not None:
            cache = self.caches[index]
            used, past_positions = cache.past(chunk.first_frame + slots)
            past_k, past_v = ([buffer[:, :used] for buffer in buffers] for buffers in (cache.keys, cache.values))
        inputs = {
            "noise_latents": x,
            "condition_tokens": tokens,
            "expression_modulation": modulation,
            **self._time_table(slots)[step],
            "positions": positions,
            "past_positions": past_positions,
        }
        for block in range(self.num_blocks):
            inputs[f"past_k.{block}"], inputs[f"past_v.{block}"] = past_k[block], past_v[block]
        return self.dit.run(inputs, self._slot_buffers(slots)["outputs"])

    def _time_table(self, slots: int) -> TimeTable:
        if slots not in self._time:
            self._time[slots] = TimeTable(self.time_embed, self.schedule, slots, reference_first=self.mode == "clip")
        return self._time[slots]

    def _slot_buffers(self, slots: int) -> dict:
        if slots not in self._buffers:
            shape = (1, self.channels, slots, self.height, self.width)
            outputs = {"velocity": np.zeros(shape, np.float32)}
            for block in range(self.num_blocks):
                for name in (f"new_k.{block}", f"new_v.{block}"):
                    outputs[name] = np.zeros((1, slots, self.tokens, self.dim), np.float32)
            self._buffers[slots] = {
                "x": np.zeros(shape, np.float32),
                "fresh": np.zeros(shape, np.float32),
                "outputs": outputs,
            }
        return self._buffers[slots]
