"""Teach the VAE's decoder to go on for ever: train it in the state in which a long stream leaves it.

python -m demo.train.decoder --data DIR --work DIR --checkpoint DIR --minutes 10

The causal convolutions look back further than the 29 frames of a training clip, so a decoder that has seen only clips has
always had the zeros of the start in sight, and drifts once they are out of it. Here streams of pictures run forwards and
backwards through a clip without end; the caches are carried from step to step and gradients stop at them. The encoder is
frozen: latents, and what was trained on them, keep their meaning.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.train.data import ClipStore, to_unit
from demo.train.vae import LATENT_NOISE, psnr_of, reconstruction_loss
from factorportrait.export.checkpoint import load_checkpoint, save_checkpoint
from factorportrait.export.models.vae import VideoVAE

log = logging.getLogger(__name__)
LENGTHS = (8, 72)  # latent frames after which a stream begins anew


class Streams:
    """A batch of endless crops of one side, encoded and decoded together."""

    def __init__(self, store: ClipStore, rng: np.random.Generator, batch: int, side: int):
        self.store, self.rng, self.batch, self.side = store, rng, batch, side
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
        return to_unit(self.frames[:, index])

    def step(self, vae: VideoVAE, latent_frames: int, noise: float) -> tuple[Tensor, Tensor]:
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
                latents = latents.float() + noise * torch.randn_like(latents.float())
            if first:
                pictures, self.decoder_caches = vae.decode_first(latents)
            else:
                pictures, self.decoder_caches = vae.decode_steady(latents, self.decoder_caches)
            self.age += 1
            decoded.append(pictures.float())
            truth.append(frames)
        self.decoder_caches = [cache.detach() for cache in self.decoder_caches]
        return torch.cat(decoded, dim=2), torch.cat(truth, dim=2)


@torch.no_grad()
def validate(vae: VideoVAE, store: ClipStore, clips: int = 2, latent_frames: int = 50) -> list[float]:
    """PSNR of the 1st, 2nd, ... tenth part of streams of 197 frames of whole pictures."""
    streams = Streams(store, np.random.default_rng(0), clips, 128)
    streams.length = latent_frames
    with torch.autocast("cpu", torch.bfloat16):
        decoded, truth = streams.step(vae, latent_frames, 0.0)
    errors = (decoded - truth).square().mean((0, 1, 3, 4)).numpy()
    return [round(psnr_of(part.mean()), 2) for part in np.array_split(errors, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.train.decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder, rewritten at the end")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    stores = {name: ClipStore(args.data / name, args.work / "unpacked" / name) for name in ("train", "val")}
    model = load_checkpoint(args.checkpoint)
    vae = model.vae.requires_grad_(False)
    vae.set_conv_impl("conv3d")
    trained = [*vae.decoder.parameters(), *vae.conv2.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    noise = LATENT_NOISE / float(np.mean(model.config.vae.latents_std))
    rng = np.random.default_rng(0)
    # Whole pictures: the attention in the middle sees all of them, and crops taught it nothing about that.
    groups = [Streams(stores["train"], rng, 3, 128) for _ in range(6)]
    log.info("before: %s dB", validate(vae, stores["val"]))
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 20) * min(1.0, (1 - done) / 0.4)
        with torch.autocast("cpu", torch.bfloat16):
            decoded, truth = groups[step % len(groups)].step(vae, 2, noise)
        loss, mse = reconstruction_loss(decoded, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            log.info("%s", json.dumps({"step": step, "loss": round(loss.item(), 4), "psnr": round(psnr_of(mse.item()), 2)}))
            log.info("streams: %s dB", validate(vae, stores["val"]))
    log.info("after %d steps: %s dB", step, validate(vae, stores["val"]))
    vae.set_conv_impl("conv2d")
    save_checkpoint(model, args.checkpoint, torch.float16)


if __name__ == "__main__":
    main()
