"""The loop as one writes it first: no K/V cache, so every step computes all frames of the window, and nothing is hoisted.

It is the first bar of `fp-bench waterfall`. While the window does not move it gives what the cached stream gives; after that the
frames that it computes again see a shorter past than they saw when they were new.
"""

from __future__ import annotations

import time
from pathlib import Path

from factorportrait.benchmarks.cases import Case, session_options
from factorportrait.benchmarks.peers.base import Peer, missing_package
from factorportrait.benchmarks.peers.loop import LoopSubject, checkpoint_of
from factorportrait.bundle import Bundle
from factorportrait.engines.pytorch import TorchEngine, find_checkpoint
from factorportrait.runtime.loop import Denoiser
from factorportrait.runtime.session import OpenBundle, Session


class NaiveDenoiser(Denoiser):
    """Stream mode, one condition set, PyTorch on a CPU."""

    network = None  # export's WanDiT, set by whoever opens the session

    def set_reference(self, tokens, modulation) -> None:
        """Keep the reference's conditions; its slot is computed with the others in every step."""
        self._first = tokens[0].clone(), modulation[0].clone()
        self._finished: list[tuple] = []  # per chunk of the window: clean latents, tokens, modulation

    def _evaluate(self, slots, index: int, step: int, used: int) -> None:
        import torch

        from factorportrait.export.models.factorportrait import stream_mask

        own = slots.conditions[index]
        sizes = [latents.shape[2] for latents, _, _ in self._finished] + [slots.x.buffer.shape[2]]
        tokens, modulation = (
            torch.cat([self._first[i], *(chunk[1 + i] for chunk in self._finished), own[name]], dim=1)
            for i, name in enumerate(("condition_tokens", "expression_modulation"))
        )
        latents = torch.cat([*(chunk[0] for chunk in self._finished), slots.x.buffer], dim=2)
        blank = torch.zeros_like(latents[:, :, :1])
        timesteps = torch.zeros(1, 1 + sum(sizes))
        timesteps[:, -sizes[-1] :] = float(self.schedule.timesteps[step])
        with torch.inference_mode():
            temb, projected = self.network.embed_time(timesteps)
            velocity, _ = self.network(
                torch.cat([blank, latents], dim=2), tokens, modulation, temb, projected, torch.arange(1 + sum(sizes)),
                mask=stream_mask(sizes, self.window_frames, tokens.shape[2]),
            )  # fmt: skip
            slots.velocity.copy_(velocity[:, :, -sizes[-1] :])

    def _commit(self, slots, first_frame, used: int) -> None:
        own = slots.conditions[0]
        self._finished.append(
            (slots.x.buffer.clone(), own["condition_tokens"].clone(), own["expression_modulation"].clone())
        )
        while sum(latents.shape[2] for latents, _, _ in self._finished) > self.window_frames - slots.x.buffer.shape[2]:
            del self._finished[0]


class NaiveSession(Session):
    """A session whose denoiser recomputes."""

    denoiser_class = NaiveDenoiser


class NaiveSubject(LoopSubject):
    """The naive loop on PyTorch's modules."""

    def __init__(self, case: Case, folder: Path):
        from factorportrait.export.checkpoint import load_checkpoint

        start = time.perf_counter()
        bundle, checkpoint = Bundle(folder), checkpoint_of(case, folder)
        opened = OpenBundle(bundle, TorchEngine(bundle, checkpoint, device="cpu", threads=case.threads))
        model = load_checkpoint(find_checkpoint(bundle, checkpoint)).eval().requires_grad_(False)
        opened.load_s = time.perf_counter() - start
        self._network = model.dit
        super().__init__(case, opened)
        self.notes += ("every step computes all frames of the window: no K/V cache",)

    def make_session(self) -> Session:
        session = NaiveSession(self.opened, session_options(self.case))
        session._denoiser.network = self._network
        return session


def _unavailable(case: Case) -> str:
    if case.mode == "clip" or case.guidance != "1":
        return "it runs streams without guidance"
    return missing_package("torch", "export")


NAIVE = Peer(
    "torch-naive", "PyTorch without a K/V cache and without hoists: the loop as one writes it first", _unavailable, NaiveSubject
)
