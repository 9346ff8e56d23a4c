"""The causal VAE one latent frame at a time: two graphs and two sets of cache buffers that swap places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from factorportrait.engines.base import Buffer, Buffers, Call, Engine, Mirrored, Runner, allocate
from factorportrait.errors import UserError

# Data input and output of a direction.
_DATA = {"encode": ("frames", "latents"), "decode": ("latents", "frames")}


class StreamingVAE:
    """One direction of the VAE, "encode" or "decode", with state: the first call runs the *first* graph, all others *steady*.

    The caches stay on the device. The steady graph is bound twice, reading one set of caches and writing the other.
    """

    def __init__(self, engine: Engine, direction: str):
        first, steady = (engine.load(f"vae_{direction}_{kind}") for kind in ("first", "steady"))
        self._engine = engine
        self._source, self._target = _DATA[direction]
        caches = [tensor for tensor in steady.spec.inputs if tensor.name.startswith("cache_in.")]
        names = [tensor.name.partition(".")[2] for tensor in caches]
        now, following = (dict(zip(names, allocate(engine, caches, {}).values(), strict=True)) for _ in range(2))
        written = {tensor.name.partition(".")[2] for tensor in first.spec.outputs}
        # Layers that the first latent frame passes by begin with zeros; their caches may hold an earlier clip.
        self._zeroed = [Mirrored(engine, now[name]) for name in names if name not in written]
        self._first = self._bind(engine, first, {}, {name: now[name] for name in names if name in written})
        data = self._bind(engine, steady, now, following)
        self._steady = [data, self._bind(engine, steady, following, now, data)]
        self.reset()

    def reset(self) -> None:
        """Begin a new clip."""
        self._num_calls = 0

    @property
    def input(self) -> np.ndarray:
        """Where the next call's data belongs, float32 [1, C, n, *, *]."""
        return self._next().source.array

    def __call__(self) -> np.ndarray:
        """Run on `input` -> the stage's output; the array is overwritten by the next call of its kind."""
        return self.run().fetch()

    def run(self) -> Mirrored:
        """The same without waiting: the output where the engine has it."""
        self._next().source.send()
        return self._run()

    def run_slot(self, memory: Buffer, slot: int) -> Mirrored:
        """Run on a slot of memory [1, C, F, h, w] of the engine, for stages whose data is one slot; nothing passes the host."""
        self._engine.copy_slot(memory, slot, self._next().source.buffer, 0)
        return self._run()

    def _run(self) -> Mirrored:
        piece = self._next()
        if self._num_calls == 0:
            for cache in self._zeroed:
                cache.array[...] = 0
                cache.send()
        piece.call()
        self._num_calls += 1
        return piece.target

    def _next(self) -> _Piece:
        return self._steady[(self._num_calls - 1) % 2] if self._num_calls else self._first

    def _bind(self, engine: Engine, runner: Runner, now: Buffers, following: Buffers, data: _Piece | None = None) -> _Piece:
        """Bind a graph to caches, and to the data buffers of `data` or to new ones."""
        if data is None:
            source, target = (
                Mirrored(engine, allocate(engine, [tensor for tensor in side if tensor.name == name], {})[name])
                for side, name in ((runner.spec.inputs, self._source), (runner.spec.outputs, self._target))
            )
        else:
            source, target = data.source, data.target
        call = runner.bind(
            {self._source: source.buffer, **{f"cache_in.{name}": buffer for name, buffer in now.items()}},
            {self._target: target.buffer, **{f"cache_out.{name}": buffer for name, buffer in following.items()}},
        )
        return _Piece(source, target, call)


@dataclass(frozen=True)
class _Piece:
    """One bound graph with its data."""

    source: Mirrored
    target: Mirrored
    call: Call


def to_unit(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] -> out float32 [3,H,W] in -1..1."""
    np.multiply(image.transpose(2, 0, 1), np.float32(1 / 127.5), out=out, casting="unsafe")
    out -= 1
    return out


def to_pictures(frames: np.ndarray) -> list[np.ndarray]:
    """float32 [1,3,n,H,W] in -1..1, which is used up, -> n pictures uint8 [H,W,3].

    Raises:
        UserError: a value is not finite; a black picture would hide it.
    """
    if not np.isfinite(frames.sum()):
        raise UserError(
            "the decoder's frames",
            expected="finite numbers",
            found="not-a-number or infinity",
            action="check the bundle with fp-export inspect BUNDLE --verify, or use one of higher precision",
        )
    # In place, so that nothing large is allocated but the pictures.
    frames += 1
    frames *= np.float32(127.5)
    np.rint(frames, out=frames)
    np.clip(frames, 0, 255, out=frames)
    _, _, num, height, width = frames.shape
    pictures = np.empty((num, height, width, 3), np.uint8)
    np.copyto(pictures, frames[0].transpose(1, 2, 3, 0), casting="unsafe")
    return list(pictures)
