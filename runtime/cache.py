"""Keys and values of the frames that a chunk looks back on: the reference as sink, then a ring of latent frames."""

from __future__ import annotations

import numpy as np


class KVCache:
    """Static memory for one condition set.

    Every block's buffer is [1, 1 + ring, T, D]: entry 0 is the reference (the sink), entry 1 + f % ring the latent frame f.
    Keys are stored unrotated, so their positions are data: the sink has 0, and the frames of the window count from 1 however
    long the stream runs. While the ring fills, its used part is a prefix: a view of it is contiguous, with no copy and no mask.
    """

    def __init__(self, num_blocks: int, window_frames: int, chunk_frames: int, tokens: int, dim: int, dtype=np.float32):
        self.window_frames = window_frames
        self.ring = window_frames - chunk_frames
        shape = (1, 1 + self.ring, tokens, dim)
        self.keys = [np.zeros(shape, dtype) for _ in range(num_blocks)]
        self.values = [np.zeros(shape, dtype) for _ in range(num_blocks)]
        self._frame_of_entry = np.full(self.ring, -1, np.int64)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def reset(self) -> None:
        """Forget all frames; the sink stays until it is written again."""
        self._frame_of_entry[:] = -1

    def write_sink(self, block: int, key: np.ndarray, value: np.ndarray) -> None:
        """key, value [1, 1, T, D]."""
        self.keys[block][:, :1] = key
        self.values[block][:, :1] = value

    def entries(self, first_frame: int, num_frames: int) -> np.ndarray:
        """Ring entries, 0-based behind the sink, that the frames are written to; earlier frames that do not fit are left out."""
        frames = np.arange(max(first_frame, first_frame + num_frames - self.ring), first_frame + num_frames)
        return frames % self.ring if self.ring else frames[:0]

    def commit(self, block: int, first_frame: int, key: np.ndarray, value: np.ndarray) -> None:
        """Store the clean keys and values [1, N, T, D] of a finished chunk; call `advance` after the last block."""
        entries = self.entries(first_frame, key.shape[1])
        skipped = key.shape[1] - len(entries)
        for i, entry in enumerate(entries):
            self.keys[block][:, 1 + entry] = key[:, skipped + i]
            self.values[block][:, 1 + entry] = value[:, skipped + i]

    def advance(self, first_frame: int, num_frames: int) -> None:
        """Say that the frames are in the ring now."""
        entries = self.entries(first_frame, num_frames)
        end = first_frame + num_frames
        self._frame_of_entry[entries] = np.arange(end - len(entries), end)

    def past(self, chunk_end: int) -> tuple[int, np.ndarray]:
        """Entries that a chunk ending before frame `chunk_end` sees, the sink among them, and their positions [entries] int64."""
        used = int((self._frame_of_entry >= 0).sum())
        positions = np.zeros(1 + used, np.int64)
        positions[1:] = frame_positions(self._frame_of_entry[:used], chunk_end, self.window_frames)
        return 1 + used, positions


def frame_positions(frames: np.ndarray, chunk_end: int, window_frames: int) -> np.ndarray:
    """Rotary positions of latent frames (0-based) for a chunk that ends before frame `chunk_end`: 1..window_frames."""
    return 1 + frames - max(0, chunk_end - window_frames)
