"""diffusers' transformer for Wan shapes: the denoising steps alone, without a K/V cache, for comparison of the stages `step.*`."""

from __future__ import annotations

import time
from pathlib import Path

from factorportrait.benchmarks.cases import Case
from factorportrait.benchmarks.peers.base import ChunkClock, Peer, Sample, missing_package
from factorportrait.benchmarks.schema import Memory, Startup
from factorportrait.bundle import Bundle
from factorportrait.model_config import FRAMES_PER_LATENT
from factorportrait.runtime.timing import Timings

TEXT_DIM = 64  # diffusers' blocks always have cross-attention: to one short token here


class DiffusersSubject:
    """WanTransformer3DModel with drawn weights; a chunk is its denoising steps over all slots that the chunk sees."""

    def __init__(self, case: Case, folder: Path):
        import torch
        from diffusers import WanTransformer3DModel

        start = time.perf_counter()
        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        self.case, self._torch, config = case, torch, Bundle(folder).config
        dit = config.dit
        self._model = WanTransformer3DModel(
            patch_size=dit.patch_size, num_attention_heads=dit.num_heads, attention_head_dim=dit.head_dim,
            in_channels=config.fusion.in_channels, out_channels=dit.out_channels, text_dim=TEXT_DIM, freq_dim=dit.freq_dim,
            ffn_dim=dit.ffn_dim, num_layers=dit.num_layers, cross_attn_norm=dit.cross_attn_norm, eps=dit.eps,
            qk_norm="rms_norm_across_heads" if dit.qk_norm else None, rope_max_seq_len=dit.max_position,
        ).eval().requires_grad_(False)  # fmt: skip
        self._grid = (config.fusion.in_channels, config.latent_height, config.latent_width)
        self._text = torch.zeros(1, 1, TEXT_DIM)
        self.startup = Startup(load_s=time.perf_counter() - start)
        self.notes = (
            "the transformer alone: no encoders, no commit, no decoder, so it has no latency of its own",
            "its blocks have cross-attention to one token, which ours lack: 4 SD^2 operations more per block",
        )
        if case.mode == "stream":
            self.notes += ("no K/V cache: every step computes all slots of the window",)

    def repeat(self, num_frames: int) -> Sample:
        """See `Subject.repeat`."""
        torch, case, timings = self._torch, self.case, Timings()
        timings.spans = spans = []
        groups = 1 + -(-(num_frames - 1) // FRAMES_PER_LATENT)
        if case.mode == "clip":
            slots, num_chunks, frames = 1 + groups, 1, num_frames
        else:
            slots, num_chunks, frames = 1 + case.window, -(-groups // case.chunk), FRAMES_PER_LATENT * case.chunk
        channels, height, width = self._grid
        latents = torch.randn(1, channels, slots, height, width)
        clock = ChunkClock(spans, time.perf_counter_ns())
        with torch.inference_mode():
            for index in range(num_chunks):
                start = time.perf_counter_ns()
                for step in range(case.steps):
                    with timings("step", step):
                        timestep = torch.tensor([1000.0 * (1 - step / case.steps)])
                        self._model(latents, timestep, self._text, return_dict=False)
                end = time.perf_counter_ns()
                clock.pushed(start, end)
                clock.chunk(frames, slots - 1 if index else 0, case.mode == "clip" or index > 0, end)
        return Sample(None, None, tuple(clock.chunks), tuple(clock.spans_ms))

    def memory(self) -> Memory:
        """See `Subject.memory`."""
        return Memory(weight_bytes=sum(tensor.nbytes for tensor in self._model.parameters()))


def _unavailable(case: Case) -> str:
    if case.guidance != "1":
        return "guidance is not measured with it"
    if case.precision != "fp32":
        return f"its weights are fp32, the case is {case.precision}"
    return missing_package("diffusers", "dev")


DIFFUSERS = Peer(
    "diffusers", "diffusers' WanTransformer3DModel, denoising steps alone", _unavailable, DiffusersSubject, whole=False
)
