"""Base optimizers of every kind for RelativeStep, and parameters for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .compare import randn

SHAPES = ((7, 5), (4, 9))
RATE, SIGMA = 0.1, 0.02


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam without bias correction."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * p.grad
                state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * p.grad.square()
                p.sub_(state["m"] / state["v"].sqrt().clamp(min=1e-300), alpha=group["lr"])


class SignSGD(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


O = torch.optim
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": O.SGD,
    "momentum": functools.partial(O.SGD, momentum=0.9),
    "Nesterov": functools.partial(O.SGD, momentum=0.9, nesterov=True),
    "Adam": O.Adam,
    "Adam, up": functools.partial(O.Adam, maximize=True),
    "AdamW": O.AdamW,
    "AdamW, fused": functools.partial(O.AdamW, fused=True),
    "AdamW, foreach": functools.partial(O.AdamW, foreach=True),
    "Adam without bias correction": UncorrectedAdam,
    "Adafactor": O.Adafactor,
    "Muon": O.Muon,
}
each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(shapes or SHAPES)]


def give_gradients(params: list[Tensor], seed: int = 50, scale: float = 1.0) -> None:
    for i, param in enumerate(params):
        param.grad = (scale * randn(seed + i, *param.shape)).to(param.dtype)


def held(params: list[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range, scheduler: Any = None) -> None:
    for step in steps:
        give_gradients(params, 100 * step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
