"""The loop that all phases share: micro-batches on threads, EMA, checkpoints, curves.

Every random number of a part is drawn from (seed, phase, step, part), so a resumed run equals an uninterrupted one and the
number of threads changes nothing.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from demo.presets import PhaseSettings
from demo.train.muon import MuonAdamW

log = logging.getLogger(__name__)
Metrics = dict[str, float]


class Draw:
    """Random numbers of one part of one step."""

    def __init__(self, seed: int, phase: str, step: int, part: int):
        self.rng = np.random.default_rng([seed, zlib.crc32(phase.encode()), step, part])
        self.generator = torch.Generator().manual_seed(int(self.rng.integers(2**62)))

    def normal(self, shape, device: torch.device) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(device)

    def uniform(self, shape, device: torch.device) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(device)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


PartLoss = Callable[[nn.Module, Draw, int], tuple[Tensor, Metrics]]


def save_atomically(state: dict, path: Path) -> None:
    """torch.save under a temporary name, then rename."""
    temporary = path.with_name(f"{path.name}.part.{os.getpid()}")
    torch.save(state, temporary)
    os.replace(temporary, path)


def append_line(path: Path, entry: dict) -> None:
    """One JSON object per line."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def learning_rate(settings: PhaseSettings, step: int, elapsed_s: float) -> float:
    """Warm-up, constant, linear to zero over the last `cooldown` of the steps or of the time."""
    done = step / settings.steps
    if settings.minutes is not None:
        done = max(done, elapsed_s / (60 * settings.minutes))
    falling = min(1.0, max(0.0, 1 - done) / settings.cooldown) if settings.cooldown else 1.0
    return settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * falling


class Trainer:
    """Trains one module; `work/<phase>.pt` is its state, `work/<phase>.jsonl` its curve.

    Args:
        module: what is trained, on its device.
        is_matrix: whether Muon updates the parameter of this name and tensor.
        workers: threads that take parts; more than 1 means that each runs its operators on one core.
        deadline: of `time.monotonic`, at which a run stops with its state saved, although its phase is not done.
        rate_of: share of the learning rate that the parameter of a name gets.
    """

    def __init__(
        self,
        phase: str,
        module: nn.Module,
        settings: PhaseSettings,
        work: Path,
        seed: int,
        is_matrix: Callable[[str, Tensor], bool],
        workers: int = 1,
        deadline: float = math.inf,
        rate_of: Callable[[str], float] = lambda name: 1.0,
    ):
        self.phase, self.module, self.settings, self.work, self.seed = phase, module, settings, work, seed
        self.deadline = deadline
        self.ema = copy.deepcopy(module).requires_grad_(False)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if p.ndim > 1 and is_matrix(name, p)]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters if id(p) not in chosen]
        rates = {id(p): rate_of(name) for name, p in named}
        self.optimizer = MuonAdamW(matrices, others, settings.learning_rate, settings.weight_decay, rates)
        self.device = self.parameters[0].device
        self.step, self.elapsed_s = 0, 0.0
        self.pool = ThreadPoolExecutor(workers) if workers > 1 else None
        if self.pool:
            torch.set_num_threads(1)
        work.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.phase}.pt"

    @property
    def done(self) -> bool:
        late = self.settings.minutes is not None and self.elapsed_s >= 60 * self.settings.minutes
        return late or self.step >= self.settings.steps

    def resume(self) -> None:
        """Continue from the checkpoint, when there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        log.info("%s: resumed at step %d after %.0f s", self.phase, self.step, self.elapsed_s)

    def save(self) -> None:
        state = {"module": self.module.state_dict(), "ema": self.ema.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "elapsed_s": self.elapsed_s}
        save_atomically(state, self.checkpoint)

    def run(
        self,
        part_loss: PartLoss,
        validate: Callable[[nn.Module], Metrics] | None = None,
        before_step: Callable[[int], None] | None = None,
        log_every: int = 20,
    ) -> bool:
        """Train until the settings' end, or until the deadline; returns whether it is the end.

        Args:
            part_loss: module, draw, part index -> loss and what to log.
            validate: of the averaged weights, every `validate_every` steps and at the end.
            before_step: called with the step, such as to look for new data.
        """
        seen: dict[str, list[float]] = {}
        saved_at = self.elapsed_s
        while not self.done and time.monotonic() < self.deadline:
            began = time.perf_counter()
            if before_step:
                before_step(self.step)
            rate = learning_rate(self.settings, self.step, self.elapsed_s)
            metrics = self.train_step(part_loss, rate)
            self.elapsed_s += time.perf_counter() - began
            for name, value in metrics.items():
                seen.setdefault(name, []).append(value)
            if self.step % log_every == 0:
                self._log({"lr": rate, **{name: float(np.mean(values)) for name, values in seen.items()}})
                seen = {}
            if self.elapsed_s - saved_at > self.settings.save_every_s:
                self.save()
                saved_at = self.elapsed_s
            if validate and (self.step % self.settings.validate_every == 0 or self.done):
                self.save()
                self._log(validate(self.ema))
        self.save()
        return self.done

    def _log(self, metrics: Metrics) -> None:
        entry = {"phase": self.phase, "step": self.step, "elapsed_s": round(self.elapsed_s, 1)}
        entry |= {name: float(f"{value:.5g}") for name, value in metrics.items()}
        append_line(self.work / f"{self.phase}.jsonl", entry)
        log.info("%s", json.dumps(entry))

    def train_step(self, part_loss: PartLoss, rate: float) -> Metrics:
        """One update from the mean gradient of all parts."""
        run_all = self.pool.map if self.pool else map
        results = list(run_all(lambda part: self._part(part_loss, part), range(self.settings.parts)))
        for parameter, *gradients in zip(self.parameters, *(gradients for gradients, _ in results), strict=True):
            known = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = sum(known[1:], known[0]) / len(results) if known else None
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step(run_all)
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages = list(self.ema.parameters())
            current = [p.detach() for p in self.module.parameters()]
            torch._foreach_lerp_(averages, current, 1 - decay)
        self.step += 1
        names = {name for _, metrics in results for name in metrics}
        means = {name: float(np.mean([m[name] for _, m in results if name in m])) for name in sorted(names)}
        return {**means, "gradient_norm": float(norm)}

    def _part(self, part_loss: PartLoss, part: int) -> tuple[tuple[Tensor | None, ...], Metrics]:
        draw = Draw(self.seed, self.phase, self.step, part)
        # Without the cache of cast weights: it would be shared by threads whose graphs must stay apart.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss, metrics = part_loss(self.module, draw, part)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return gradients, {"loss": loss.item(), **metrics}
