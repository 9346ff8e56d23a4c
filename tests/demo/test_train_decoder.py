"""The decoder's training: streams carry their caches, gradients stop at them, and lengths are those of the stream."""

from __future__ import annotations

import numpy as np
import torch

from demo.presets import PhaseSettings
from demo.train.decoder import Streams, stream_loss, train_only_decoder, validate
from demo.train.trainer import Draw, Trainer
from factorportrait.config import VAEConfig
from factorportrait.export.models.vae import VideoVAE

CPU = torch.device("cpu")
DRAW = Draw(0, "test", 0, 0)


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
    vae, streams = tiny_vae(), Streams(Store(), np.random.default_rng(1), 2, 16, CPU)
    streams.length = 100
    frames = streams.frames  # there and back: 7 + 5
    assert frames.shape[1] == 12 and np.array_equal(frames[:, 7:], frames[:, 5:0:-1])
    with torch.no_grad():
        parts = [streams.step(vae, 3, 0.0, DRAW) for _ in range(3)]
        decoded, truth = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
        expected = vae.decode(vae.encode(truth))
    assert truth.shape[2] == 1 + 8 * 4
    assert torch.allclose(decoded, expected, atol=1e-4)


def test_gradients_stop_at_the_caches_and_streams_begin_anew():
    vae, streams = tiny_vae(), Streams(Store(), np.random.default_rng(1), 1, 16, CPU)
    for _ in range(3):
        streams.length = 3
        decoded, truth = streams.step(vae, 3, 0.1, DRAW)
        (decoded - truth).square().mean().backward()  # a second pass through a freed graph would raise
        assert streams.age == 3 and decoded.shape[2] == 9
        assert not any(cache.requires_grad for cache in streams.decoder_caches)


def test_training_leaves_the_encoder_alone_and_resumes(tmp_path):
    settings = PhaseSettings(steps=3, parts=1, batch=1, learning_rate=1e-3, warmup_steps=1)

    def trainer() -> Trainer:
        vae = tiny_vae()
        train_only_decoder(vae)
        return Trainer("decoder", vae, settings, tmp_path, 0, lambda *_: False)

    first, streams = trainer(), Streams(Store(), np.random.default_rng(1), 1, 16, CPU)
    before = {name: value.clone() for name, value in first.module.state_dict().items()}
    first.run(lambda vae, draw, part: stream_loss(vae, streams, draw), lambda vae: validate(vae, Store(), CPU, 1, 5, 16))
    moved = {name.split(".")[0] for name, value in first.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"decoder", "conv2"}
    second = trainer()
    second.resume()
    assert second.done and all(map(torch.equal, first.parameters, second.parameters))
