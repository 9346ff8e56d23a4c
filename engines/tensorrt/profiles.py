"""Which sizes a stage's plan is built for: ranges of its symbolic sizes, from the manifest and the generation's config.

A plan's scratch memory follows the largest sizes of a profile, so uses that differ much have a profile each. TensorRT tunes its
kernels for the size in the middle and accepts everything between the ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from factorportrait.bundle import StageSpec
from factorportrait.engines.base import tensor_shape
from factorportrait.model_config import FRAMES_PER_LATENT, TEXT_TOKENS, ModelConfig

# Of CLIP's picture encoder (ViT-H/14 at 224 pixels): 16 x 16 patches and a class token; first-and-last-frame models look at two.
IMAGE_TOKENS = 257


@dataclass(frozen=True)
class Range:
    """Sizes from `low` to `high`; `best` is what the kernels are chosen for."""

    low: int
    best: int
    high: int

    def __post_init__(self):
        if not 0 <= self.low <= self.best <= self.high:
            raise ValueError(f"expected 0 <= low <= best <= high, found {self.low}, {self.best}, {self.high}")


Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Profile:
    """One range of use.

    Attributes:
        name: for people.
        shapes: per input its smallest, best and largest shape; inputs of fixed size are left out.
    """

    name: str
    shapes: Mapping[str, Shapes]

    def holds(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes can be run with it."""
        return all(
            all(low <= size <= high for low, size, high in zip(lows, shapes[name], highs, strict=True))
            for name, (lows, _, highs) in self.shapes.items()
        )


def profiles_of(spec: StageSpec, config: ModelConfig) -> list[Profile]:
    """The profiles of a stage, none for one whose sizes are all fixed.

    Raises:
        ValueError: the graph has a symbolic size that this module does not know.
    """
    symbols = {str(size).rpartition("*")[2] for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)}
    if not symbols:
        return []
    profiles = []
    for name, ranges in _uses(spec, config).items():
        if unknown := sorted(symbols - set(ranges)):
            raise ValueError(f"stage {spec.name}: no range for the sizes {', '.join(unknown)}")
        sides = ({symbol: getattr(sizes, side) for symbol, sizes in ranges.items()} for side in ("low", "best", "high"))
        low, best, high = sides
        profiles.append(
            Profile(
                name,
                {
                    tensor.name: (tensor_shape(tensor, low), tensor_shape(tensor, best), tensor_shape(tensor, high))
                    for tensor in spec.inputs
                    if any(isinstance(size, str) for size in tensor.shape)
                },
            )
        )
    return profiles


def _uses(spec: StageSpec, config: ModelConfig) -> dict[str, dict[str, Range]]:
    """Per use of a stage the range of every size that it may have; DESIGN.md explains the sizes."""
    generation = config.generation
    chunk, window = generation.chunk_frames, generation.window_frames
    sink, clip_slots = config.conditioning.sink_slots, config.conditioning.lead_slots + generation.max_clip_frames
    modes = generation.modes
    text = {"L": Range(TEXT_TOKENS, TEXT_TOKENS, TEXT_TOKENS), "I": Range(1, IMAGE_TOKENS, 2 * IMAGE_TOKENS)}
    if "S" in {size for tensor in spec.inputs for size in tensor.shape}:
        # The cache in place: the first slot alone up to the whole window; the last chunk of a stream may be a short one.
        return {"stream": {**text, "F": Range(1, chunk, chunk), "S": Range(1, sink + window, sink + window)}}
    if any(tensor.name == "past_positions" for tensor in spec.inputs):
        uses = {}
        if "stream" in modes:
            # No past for the reference; then the reference and, once the window is full, all of it but the chunk. A session
            # may ask for shorter chunks than the config's, which look back on more.
            past = Range(0, sink + window - chunk, sink + window - 1)
            uses["stream"] = {**text, "F": Range(1, chunk, chunk), "P": past}
        if "clip" in modes:
            uses["clip"] = {**text, "F": Range(1, clip_slots, clip_slots), "P": Range(0, 0, 0)}
        return uses
    longest = max(clip_slots if "clip" in modes else 1, chunk)
    often = chunk if "stream" in modes else longest
    slots = Range(1, often, longest)
    return {"all": {**text, "B": Range(1, 1, FRAMES_PER_LATENT), "N": slots, "F": slots}}
