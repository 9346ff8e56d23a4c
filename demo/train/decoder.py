"""Phase 2: teach the VAE's decoder to go on for ever, by training it in the state in which a long stream leaves it.

The causal convolutions look back further than the 29 frames of a training clip, so a decoder that has seen only clips has
always had the zeros of the start in sight, and drifts once they are out of it. Here streams of pictures run forwards and
backwards through a clip without end; the caches are carried from step to step and gradients stop at them. The encoder is
frozen: latents, and what is trained on them, keep their meaning.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from demo.train.data import ClipStore, to_unit
from demo.train.trainer import Draw, Metrics
from demo.train.vae import LATENT_NOISE, psnr_of, reconstruction_loss
from factorportrait.export.models.vae import VideoVAE

LENGTHS = (8, 72)  # latent frames after which a stream begins anew
STREAMS_PER_PART = 3  # that take turns, so that one step's pictures are not the next one's
STEP_LATENT_FRAMES = 2
VALIDATION_TENTHS = (1, 2, 5, 10)


class Streams:
    """A batch of endless crops of one side, encoded and decoded together."""

    def __init__(self, store: ClipStore, rng: np.random.Generator, batch: int, side: int, device: torch.device):
        self.store, self.rng, self.batch, self.side, self.device = store, rng, batch, side, device
        self.restart()

    def restart(self) -> None:
        """Other clips and crops, at the beginning of a stream."""
        clips = []
        for clip in self.rng.integers(len(self.store), size=self.batch):
            frames = self.store.get(int(clip), "frames")
            top, left = (self.rng.integers(frames.shape[axis] - self.side + 1) for axis in (1, 2))
            frames = frames[:, top : top + self.side, left : left + self.side]
            clips.append(np.concatenate([frames, frames[-2:0:-1]]))  # there and back
        self.frames = np.stack(clips)
        self.position, self.age = 0, 0
        self.length = int(self.rng.integers(*LENGTHS))
        self.encoder_caches, self.decoder_caches = None, None

    def take(self, count: int) -> Tensor:
        """The next frames [B, 3, count, S, S]."""
        index = (self.position + np.arange(count)) % self.frames.shape[1]
        self.position += count
        return to_unit(self.frames[:, index], self.device)

    def step(self, vae: VideoVAE, latent_frames: int, noise: float, draw: Draw) -> tuple[Tensor, Tensor]:
        """Decoded and true frames of the next latent frames; gradients reach back to the caches and no further."""
        if self.age >= self.length:
            self.restart()
        decoded, truth = [], []
        for _ in range(latent_frames):
            first = self.age == 0
            frames = self.take(1 if first else 4)
            with torch.no_grad():
                if first:
                    latents, self.encoder_caches = vae.encode_first(frames)
                else:
                    latents, self.encoder_caches = vae.encode_steady(frames, self.encoder_caches)
                latents = latents.float() + noise * draw.normal(latents.shape, self.device)
            if first:
                pictures, self.decoder_caches = vae.decode_first(latents)
            else:
                pictures, self.decoder_caches = vae.decode_steady(latents, self.decoder_caches)
            self.age += 1
            decoded.append(pictures.float())
            truth.append(frames)
        self.decoder_caches = [cache.detach() for cache in self.decoder_caches]
        return torch.cat(decoded, dim=2), torch.cat(truth, dim=2)


def train_only_decoder(vae: VideoVAE) -> None:
    """Gradients for the decoder, and for nothing that makes latents."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.conv2.requires_grad_(True)


def stream_loss(vae: VideoVAE, streams: Streams, draw: Draw) -> tuple[Tensor, Metrics]:
    """Loss of the next pictures of a stream."""
    # Latents are normalised here, the noise is that of the raw ones.
    noise = LATENT_NOISE / float(vae.latents_std.mean())
    decoded, truth = streams.step(vae, STEP_LATENT_FRAMES, noise, draw)
    loss, mse = reconstruction_loss(decoded, truth)
    return loss, {"psnr": psnr_of(mse.item())}


@torch.no_grad()
def validate(
    vae: VideoVAE, store: ClipStore, device: torch.device, clips: int = 2, latent_frames: int = 50, side: int = 128
) -> Metrics:
    """PSNR of some tenths of streams of 197 frames of whole pictures."""
    streams = Streams(store, np.random.default_rng(0), clips, side, device)
    streams.length = latent_frames
    with torch.autocast(device.type, torch.bfloat16):
        decoded, truth = streams.step(vae, latent_frames, 0.0, Draw(0, "validate", 0, 0))
    tenths = np.array_split((decoded - truth).square().mean((0, 1, 3, 4)).cpu().numpy(), 10)
    return {f"val_psnr_tenth_{tenth}": psnr_of(tenths[tenth - 1].mean()) for tenth in VALIDATION_TENTHS}
