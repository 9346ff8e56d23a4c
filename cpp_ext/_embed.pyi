"""Condition tokens straight from cameras and latents. Use it through `factorportrait.runtime.embedding`."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

def supported_isas() -> tuple[str, ...]: ...

class FusedEmbedding:
    """`(start, count)` pairs are ranges of the weight's input channels.

    Arrays are used as they are, or refused with ValueError.
    """

    def __init__(
        self,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        *,
        reference: tuple[int, int],
        camera: tuple[int, int],
        pose: tuple[int, int],
        latent_height: int,
        latent_width: int,
        stride: float,
        num_threads: int = 0,
        isa: Literal["auto", "portable", "avx2", "avx512"] = "auto",
    ) -> None: ...
    def embed_reference(
        self, latents: NDArray[np.float32] | None, *, out: NDArray[np.float32] | NDArray[np.float16]
    ) -> None: ...
    def embed_chunk(
        self,
        K: NDArray[np.float64] | None,
        c2w: NDArray[np.float64] | None,
        pose_latents: NDArray[np.float32] | None,
        *,
        num_slots: int,
        out: NDArray[np.float32] | NDArray[np.float16],
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def tokens_per_frame(self) -> int: ...
