"""The decoder's training: streams carry their caches, gradients stop at them, and lengths are those of the stream."""

from __future__ import annotations

import numpy as np
import torch

from demo.train.decoder import Streams
from factorportrait.config import VAEConfig
from factorportrait.export.models.vae import VideoVAE


class Store:
    """Two clips of seven frames."""

    def __init__(self):
        self.clips = np.random.default_rng(0).integers(0, 255, (2, 7, 16, 16, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.clips)

    def get(self, clip, name):
        return self.clips[clip]


def tiny_vae() -> VideoVAE:
    torch.manual_seed(0)
    config = VAEConfig(
        base_dim=8, z_dim=4, dim_mult=(1, 1, 2), num_res_blocks=1, temporal_downsample=(True, True), patch_size=2
    )
    return VideoVAE(config)


def test_steps_equal_one_long_decode():
    """Three steps of three latent frames see what the whole clip, there and back, gives in one go."""
    vae, streams = tiny_vae(), Streams(Store(), np.random.default_rng(1), 2, 16)
    streams.length = 100
    frames = streams.frames  # there and back: 7 + 5
    assert frames.shape[1] == 12 and np.array_equal(frames[:, 7:], frames[:, 5:0:-1])
    with torch.no_grad():
        parts = [streams.step(vae, 3, 0.0) for _ in range(3)]
        decoded, truth = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
        expected = vae.decode(vae.encode(truth))
    assert truth.shape[2] == 1 + 8 * 4
    assert torch.allclose(decoded, expected, atol=1e-4)


def test_gradients_stop_at_the_caches_and_streams_begin_anew():
    vae, streams = tiny_vae(), Streams(Store(), np.random.default_rng(1), 1, 16)
    for _ in range(3):
        streams.length = 3
        decoded, truth = streams.step(vae, 3, 0.1)
        (decoded - truth).square().mean().backward()  # a second pass through a freed graph would raise
        assert streams.age == 3 and decoded.shape[2] == 9
        assert not any(cache.requires_grad for cache in streams.decoder_caches)
