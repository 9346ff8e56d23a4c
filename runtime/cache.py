"""Keys and values of the frames that a chunk looks back on: slot 0 is the reference (the sink), then a ring of latent frames.

Keys are stored unrotated, so their positions are data: the sink has 0, and the frames of the window count from 1 however long the
stream runs. While the ring fills, its used part is a prefix: a view of it is contiguous, with no copy and no mask. A system without
a sink counts slots and positions of the frames from 0.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from factorportrait.engines.base import Buffer, Buffers, Engine, Mirrored, Runner, allocate, itemsize, slots
from factorportrait.errors import UserError

KINDS = ("auto", "inplace", "concat")


def choose_cache(
    kind: str, *, engine_in_place: bool, stages: Collection[str], chunk_frames: int, window_frames: int
) -> tuple[bool, str]:
    """Is the cache updated in place, and why (not)?

    Args:
        kind: of `KINDS`; "auto" updates in place wherever that works.
        engine_in_place: `Engine.in_place`.
        stages: names of the bundle's stages for that engine.

    Raises:
        UserError: not of `KINDS`, or "inplace" where it does not work.
    """
    if kind not in KINDS:
        raise UserError("--cache", expected=" or ".join(KINDS), found=kind, action="leave it out to have it chosen")
    obstacle = ""
    if window_frames % chunk_frames:
        obstacle = f"a window of {window_frames} latent frames is no multiple of a chunk of {chunk_frames}"
    elif not engine_in_place:
        obstacle = "the engine cannot write what it reads"
    elif "dit_inplace" not in stages:
        obstacle = "the bundle has no stage dit_inplace: it was made by an older version"
    if kind == "inplace" and obstacle:
        raise UserError("--cache inplace", expected="a cache that can be", found=obstacle, action="use --cache concat")
    if kind == "concat" or obstacle:
        return False, obstacle or "asked for"
    return True, "asked for" if kind == "inplace" else "no copies"


def check_room(free_bytes: int | None, cache_bytes: int, frame_bytes: int, window_frames: int, sink: int) -> None:
    """Before anything is allocated: does the cache fit?

    Args:
        free_bytes: of the device; None where nobody knows, and then nothing is checked.
        frame_bytes: of the cache, for one latent frame of the window.

    Raises:
        UserError: it does not; the longest window that does in place, which takes the most slots, is named.
    """
    if free_bytes is None or cache_bytes <= free_bytes:
        return
    fitting = free_bytes // frame_bytes - sink
    raise UserError(
        f"the cache of keys and values for a window of {window_frames} latent frames",
        expected=f"{cache_bytes / 1e6:.0f} MB of free memory", found=f"{free_bytes / 1e6:.0f} MB",
        action=f"--window {fitting} would fit, or end other programs" if fitting > 0 else "end other programs",
    )  # fmt: skip


class _Cache:
    """Static memory for all condition sets: per set and block keys and values [1, slots, T, D]."""

    def __init__(self, engine: Engine, dit: Runner, num_sets: int, num_slots: int, window_frames: int, prefix: str, sink: int):
        self._engine, self._sink = engine, sink
        self.ring, self.window_frames = num_slots - sink, window_frames  # entries behind the sink
        _, _, tokens, dim = dit.spec.input("condition_tokens").shape
        tensors = [tensor for tensor in dit.spec.inputs if tensor.name.startswith((f"{prefix}_k.", f"{prefix}_v."))]
        of_frame = num_sets * tokens * dim * sum(itemsize(tensor.dtype) for tensor in tensors)
        self.nbytes = num_slots * of_frame
        check_room(engine.free_bytes(), self.nbytes, of_frame, window_frames, sink)
        self._memory: list[dict[str, Buffer]] = [
            {tensor.name.partition("_")[2]: engine.zeros((1, num_slots, tokens, dim), tensor.dtype) for tensor in tensors}
            for _ in range(num_sets)
        ]
        self._integers: dict[tuple[str, int], Mirrored] = {}

    def _fill(self, name: str, values: np.ndarray) -> None:
        mirrored = self._integer(name, len(values))
        mirrored.array[:] = values
        mirrored.send()

    def _integer(self, name: str, size: int) -> Mirrored:
        if (name, size) not in self._integers:
            self._integers[name, size] = Mirrored(self._engine, self._engine.zeros((size,), "int64"))
        return self._integers[name, size]


class ConcatCache(_Cache):
    """For `dit`: it is given the past and gives the chunk's keys and values, which are copied into the ring when the chunk is done.

    The ring holds the window without the chunk. In clip mode there are no slots and nothing is kept.

    Args:
        start_frames: of a first chunk that is shorter than the others. The second one looks back on it, also where whole chunks
            are as long as the window and look back on nothing.
    """

    stage = "dit"

    def __init__(
        self, engine: Engine, dit: Runner, num_sets: int, chunk_frames: int, window_frames: int,
        *, clip: bool = False, sink: int = 1, start_frames: int = 0,
    ):  # fmt: skip
        num_slots = 0 if clip else sink + max(window_frames - chunk_frames, start_frames)
        super().__init__(engine, dit, num_sets, num_slots, window_frames, "past", sink)
        self._spec, self._new = dit.spec, {}

    def place(self, first_frame: int | None, num_frames: int) -> int:
        """Say which frames come next, the reference being None; gives the number of slots that they look back on."""
        if first_frame is None or self.ring < 0:
            return 0
        frames, end = ring_frames(self.ring, first_frame), first_frame + num_frames
        frames = frames[frames >= end - self.window_frames]  # all of them, or none behind a short first chunk: a prefix
        positions = frame_positions(frames, end, self.window_frames, self._sink)
        self._fill("past_positions", np.concatenate([np.arange(self._sink), positions]))
        return self._sink + len(frames)

    def tensors(self, index: int, num_frames: int, used: int) -> tuple[Buffers, Buffers]:
        """What to bind for set `index`, by the names of the stage."""
        past = {f"past_{name}": slots(self._engine, memory, 0, used) for name, memory in self._memory[index].items()}
        return {"past_positions": self._integer("past_positions", used).buffer, **past}, self._outputs(num_frames)

    def commit(self, index: int, first_frame: int | None, num_frames: int) -> None:
        """Keep what the latest run gave. Frames that do not fit are left out; so are all of them in clip mode."""
        for source, target, count in self.moves(first_frame, num_frames):
            for name, memory in self._memory[index].items():
                new = slots(self._engine, self._outputs(num_frames)[f"new_{name}"], source, source + count)
                self._engine.copy(new, slots(self._engine, memory, target, target + count))

    def moves(self, first_frame: int | None, num_frames: int) -> tuple[tuple[int, int, int], ...]:
        """What `commit` copies: runs of slots (from, to, how many) that lie one behind the other in the chunk and in the memory."""
        if first_frame is None:
            return ((0, 0, 1),)
        moves, source = [], max(0, num_frames - self.ring)
        while self.ring > 0 and source < num_frames:
            entry = (first_frame + source) % self.ring
            count = min(num_frames - source, self.ring - entry)
            moves.append((source, self._sink + entry, count))
            source += count
        return tuple(moves)

    def _outputs(self, num_frames: int) -> dict[str, Buffer]:
        # The sets share them: a set's run is committed before the next set's.
        if num_frames not in self._new:
            tensors = [tensor for tensor in self._spec.outputs if tensor.name.startswith("new_")]
            self._new[num_frames] = allocate(self._engine, tensors, {"F": num_frames})
        return self._new[num_frames]


class InPlaceCache(_Cache):
    """For `dit_inplace`: it writes the chunk's keys and values into the ring itself, and attends to all used slots.

    The ring holds the window with the chunk, a multiple of it: a chunk's slots are those of the frames that leave the window. Every
    step writes them anew, and the commit pass leaves the clean values there, so nothing is ever copied.
    """

    stage = "dit_inplace"

    def __init__(self, engine: Engine, dit: Runner, num_sets: int, window_frames: int, *, sink: int = 1):
        _, _, self._tokens, _ = dit.spec.input("condition_tokens").shape
        rows = dit.spec.input("cache_k.0").shape[2]
        # TensorRT wants a fixed number of slots: its graph takes the whole memory, and sees as many as `key_positions` has.
        self._capacity = rows // self._tokens if isinstance(rows, int) else None
        super().__init__(engine, dit, num_sets, self._capacity or sink + window_frames, window_frames, "cache", sink)
        self.ring = window_frames

    def place(self, first_frame: int | None, num_frames: int) -> int:
        """Say which frames come next, the reference being None; gives the number of slots that they see, their own among them."""
        frames = ring_frames(self.ring, 0 if first_frame is None else first_frame + num_frames)
        start = 0 if first_frame is None else self._sink + first_frame % self.ring
        if start + num_frames > self._sink + self.ring:
            raise ValueError(f"frames {first_frame} to {first_frame + num_frames - 1} do not lie together in a ring of {self.ring}")
        end = 0 if first_frame is None else first_frame + num_frames
        positions = frame_positions(frames, end, self.window_frames, self._sink)
        self._fill("key_positions", np.concatenate([np.arange(self._sink), positions]))
        self._fill("write_index", np.array([start]))
        return self._sink + len(frames)

    def tensors(self, index: int, num_frames: int, used: int) -> tuple[Buffers, Buffers]:
        """What to bind for set `index`, by the names of the stage: the same memory goes in and comes out."""
        integers = {name: self._integer(name, size).buffer for name, size in (("key_positions", used), ("write_index", 1))}
        inputs, outputs = integers, {}
        for name, memory in self._memory[index].items():
            *_, dim = memory.shape
            part, block = name.split(".")
            row = self._engine.view(memory, (1, 1, (self._capacity or used) * self._tokens, dim))
            inputs[f"cache_{name}"] = outputs[f"cache_{part}_out.{block}"] = row
        return inputs, outputs

    def moves(self, first_frame: int | None, num_frames: int) -> tuple[()]:
        """What `commit` copies: nothing, so one chunk is like every other."""
        return ()

    def commit(self, index: int, first_frame: int | None, num_frames: int) -> None:
        """Nothing to do: the latest run left it in its place."""


def frame_positions(frames: np.ndarray, chunk_end: int, window_frames: int, first: int = 1) -> np.ndarray:
    """Rotary positions of latent frames (0-based) for a chunk that ends before frame `chunk_end`: `first` and on, window_frames."""
    return first + frames - max(0, chunk_end - window_frames)


def ring_frames(ring: int, end: int) -> np.ndarray:
    """Latent frames in the used entries of a ring after all frames before `end` were written, frame f into entry f % ring."""
    entries = np.arange(min(ring, end))
    return end - 1 - (end - 1 - entries) % ring if len(entries) else entries
