"""The causal VAE one latent frame at a time: two graphs and two sets of cache buffers that swap places."""

from __future__ import annotations

import numpy as np

from factorportrait.bundle import StageSpec
from factorportrait.engines.base import Runner
from factorportrait.errors import UserError


def cache_names(spec: StageSpec, side: str) -> list[str]:
    tensors = spec.inputs if side == "in" else spec.outputs
    return [tensor.name for tensor in tensors if tensor.name.startswith(f"cache_{side}.")]


class StreamingVAE:
    """One direction of the VAE, with state. The first call runs the *first* graph, later ones the *steady* one.

    Args:
        first, steady: runners of `vae_encode_*` or `vae_decode_*`.
        source: name of the data input, "frames" or "latents"; target: name of the data output.
    """

    def __init__(self, first: Runner, steady: Runner, source: str, target: str):
        self._first, self._steady = first, steady
        self._source, self._target = source, target
        names = cache_names(steady.spec, "in")
        shapes = {name: steady.spec.input(name).shape for name in names}
        self._numbers = [name.removeprefix("cache_in.") for name in names]
        self._now, self._next = (
            {number: np.zeros(shapes[f"cache_in.{number}"], np.float32) for number in self._numbers} for _ in range(2)
        )
        first_out = {name.removeprefix("cache_out.") for name in cache_names(first.spec, "out")}
        self._untouched_by_first = [number for number in self._numbers if number not in first_out]
        self._first_numbers = [number for number in self._numbers if number in first_out]
        self._started = False
        self._results: dict[bool, np.ndarray] = {}

    def reset(self) -> None:
        """Begin a new clip."""
        self._started = False

    def __call__(self, data: np.ndarray) -> np.ndarray:
        """data [1, C, n, *, *] float32 -> the stage's output; the array is overwritten by the next call but one of its kind."""
        runner = self._steady if self._started else self._first
        numbers = self._numbers if self._started else self._first_numbers
        inputs = {self._source: data}
        if self._started:
            inputs |= {f"cache_in.{number}": self._now[number] for number in self._numbers}
        outputs = {f"cache_out.{number}": self._next[number] for number in numbers}
        outputs[self._target] = self._result(runner)
        result = runner.run(inputs, outputs)[self._target]
        if not self._started:
            # Layers that the first latent frame passes by begin with zeros; the buffers may hold an earlier clip.
            for number in self._untouched_by_first:
                self._next[number][...] = 0
        self._now, self._next = self._next, self._now
        self._started = True
        return result

    def _result(self, runner: Runner) -> np.ndarray:
        if self._started not in self._results:
            spec = next(tensor for tensor in runner.spec.outputs if tensor.name == self._target)
            self._results[self._started] = np.zeros(spec.shape, np.float32)
        return self._results[self._started]


def to_unit(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] -> out float32 [3,H,W] in -1..1."""
    np.multiply(image.transpose(2, 0, 1), np.float32(1 / 127.5), out=out, casting="unsafe")
    out -= 1
    return out


def to_pictures(frames: np.ndarray) -> list[np.ndarray]:
    """float32 [1,3,n,H,W] in -1..1 -> n pictures uint8 [H,W,3].

    Raises:
        UserError: a value is not finite; a black picture would hide it.
    """
    if not np.isfinite(frames).all():
        raise UserError(
            "the decoder's frames",
            expected="finite numbers",
            found="not-a-number or infinity",
            action="check the bundle with fp-export inspect BUNDLE --verify, or use one of higher precision",
        )
    scaled = (frames[0].transpose(1, 2, 3, 0) + 1) * 127.5
    return list(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
