"""Su's decays as schedulers: their closed forms, warm-up, resuming, with any optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from amos_dist import Amos, InverseSquareDecay, InverseTimeDecay

from .compare import randn

BOTH = [InverseSquareDecay, InverseTimeDecay]


def sgd(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [randn(i, 3)], "lr": lr} for i, lr in enumerate(rates)])


def rates(scheduler: Any, steps: int) -> list[float]:
    """The first group's lr at step 0, 1, …"""
    seen = []
    for _ in range(steps):
        seen.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("kind", "at_twice"), [(InverseSquareDecay, 1 / (2 * math.sqrt(2) - 1) ** 2), (InverseTimeDecay, 1 / 3)]
)
def test_half_life(kind: Any, at_twice: float) -> None:
    seen = rates(kind(sgd(0.4), half_life=10), 21)
    assert seen[0] == 0.4
    assert seen[10] == pytest.approx(0.2, rel=1e-12)
    assert seen[20] == pytest.approx(0.4 * at_twice, rel=1e-12)


def test_closed_forms() -> None:
    """1 / (1 + a p t)^2 with a p = (sqrt(2) - 1) / T, and 1 / (1 + 2 a p_0 t) with a p_0 = 1 / (2 T); a is alpha_0."""
    T, steps = 7.5, range(40)
    square = [1 / (1 + (math.sqrt(2) - 1) / T * t) ** 2 for t in steps]
    time = [1 / (1 + 2 * (1 / (2 * T)) * t) for t in steps]
    assert rates(InverseSquareDecay(sgd(1.0), T), 40) == pytest.approx(square, rel=1e-12)
    assert rates(InverseTimeDecay(sgd(1.0), T), 40) == pytest.approx(time, rel=1e-12)


@pytest.mark.parametrize("kind", BOTH)
def test_warmup(kind: Any) -> None:
    """Rises in equal steps, never from zero, reaches the full rate at step `warmup`, and only then decays."""
    seen = rates(kind(sgd(1.0), half_life=10, warmup=4), 15)
    assert seen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert seen[14] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", BOTH)
def test_groups_keep_their_ratio(kind: Any) -> None:
    optimizer = sgd(1.0, 0.25)
    rates(kind(optimizer, half_life=3), 5)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first == pytest.approx(4 * second) and first < 0.5


@pytest.mark.parametrize("kind", BOTH)
def test_resume(kind: Any) -> None:
    whole = rates(kind(sgd(1.0), half_life=5, warmup=2), 12)
    scheduler = kind(sgd(1.0), half_life=5, warmup=2)
    rates(scheduler, 6)
    saved = scheduler.state_dict(), scheduler.optimizer.state_dict()
    resumed = kind(sgd(1.0), half_life=99, warmup=7)
    resumed.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    assert rates(resumed, 6) == whole[6:]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_with_amos(tensor_lr: bool) -> None:
    param = randn(1, 3, 4).requires_grad_()
    optimizer = Amos([param], lr=torch.tensor(0.1) if tensor_lr else 0.1)
    param.grad = torch.ones_like(param)
    assert rates(InverseSquareDecay(optimizer, half_life=2), 3)[2] == pytest.approx(0.05)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("name", "value"),
    [("half_life", v) for v in (0, -1, math.inf, math.nan)] + [("warmup", v) for v in (-1, math.inf, math.nan)],
)
def test_bad_values(kind: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value} is out of range"):
        kind(sgd(1.0), **{"half_life": 10, name: value})


@pytest.mark.parametrize("kind", BOTH)
def test_torch_and_so_deepspeed_know_the_name(kind: Any) -> None:
    assert getattr(torch.optim.lr_scheduler, kind.__name__) is kind
