"""Muon for matrices, AdamW for everything else, in one optimiser (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.99), 1e-8


def orthogonalise(matrix: Tensor) -> Tensor:
    """[R, C] -> the nearest half-orthogonal matrix, roughly: singular values come out between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class MuonAdamW(torch.optim.Optimizer):
    """Parameters named in `matrices` are updated by Muon as [first axis, the rest]; the update has AdamW's usual size.

    Args:
        rates: of single parameters' learning rate, by their id, against 1 of the others.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        rates: Mapping[int, float] | None = None,
    ):
        self.rates = dict(rates or {})
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, run_all: Callable = map) -> None:  # noqa: D102
        """Update every parameter that has a gradient. run_all: `map`, or that of a pool of threads."""
        jobs = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        list(run_all(lambda job: self._update(*job), jobs))

    @torch.no_grad()
    def _update(self, group: dict, parameter: Tensor) -> None:
        state, lr = self.state[parameter], group["lr"] * self.rates.get(id(parameter), 1.0)
        gradient = parameter.grad.float()
        if group["muon"]:
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - MOMENTUM)
            matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)
            update = orthogonalise(matrix).view_as(gradient).float() * (0.2 * max(matrix.shape) ** 0.5)
        else:
            step = state.setdefault("step", torch.zeros(()))
            first = state.setdefault("first", torch.zeros_like(gradient))
            second = state.setdefault("second", torch.zeros_like(gradient))
            step += 1
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square(), 1 - BETAS[1])
            count = float(step)
            corrected = (second / (1 - BETAS[1] ** count)).sqrt_().add_(EPS)
            update = first / (1 - BETAS[0] ** count) / corrected
        if parameter.ndim > 1:
            parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(lr * update)
