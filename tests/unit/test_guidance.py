"""Numbers to start from, against their closed forms and against Amos itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from amos_dist import decay_after, lr_for_half_life, reference, suggest_lr, weight_decay_for
from amos_dist.guidance import half_life


def test_suggested_rate() -> None:
    assert suggest_lr(1875) == pytest.approx(1 / math.sqrt(1875))  # the paper's MNIST run
    assert suggest_lr(40_000) == pytest.approx(0.005)  # BERT's
    assert suggest_lr(600, 0.15) == pytest.approx(1 / math.sqrt(4000))


def test_weight_decay() -> None:
    """lr / (2 q sigma^2): near the customary 0.1 and 0.01."""
    assert weight_decay_for(1e-4, 0.02) == pytest.approx(0.125)
    assert weight_decay_for(2e-5, 0.02) == pytest.approx(0.025)
    assert weight_decay_for(1e-4, 0.02, q=5) == pytest.approx(0.025)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("steps", [1e4, 1e6])
def test_halves_after_about_so_many_steps(steps: float, sigma: float) -> None:
    assert 4 < steps * lr_for_half_life(steps, sigma) ** 2 < 9
    assert half_life(lr_for_half_life(steps, sigma), sigma) == pytest.approx(steps, rel=1e-9)


@pytest.mark.parametrize("keywords", [{}, {"c_coef": 1.0, "d_coef": 0.1}, {"c_coef": 0.0}])
@pytest.mark.parametrize(("steps", "sigma"), [(60, 0.3), (400, 0.05), (400, 1.0)])
def test_against_amos_itself(steps: int, sigma: float, keywords: dict[str, float]) -> None:
    """d, read off the decay that reference.amos_step keeps on random gradients, is 1/2 after that many steps."""
    lr = lr_for_half_life(steps, sigma, **keywords)
    d_coef = keywords.get("d_coef", 0.25)
    param, state = torch.zeros(1, 40_000, dtype=torch.float64), {}
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(2 * steps):
        b = float(state["decay"]) if state else 0.0
        rates.append(1 / (1 + d_coef * math.sqrt(lr * sigma) * b))
        if rates[-1] < 0.5:
            break
        grad = torch.randn(1, 40_000, generator=generator, dtype=torch.float64)
        reference.amos_step(param, grad, state, lr=lr, sigma=sigma, moments="row", **keywords)
    assert len(rates) - 1 == pytest.approx(steps, rel=0.01, abs=1)
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.5, rel=0.05)


def simulated(steps: int, lr: float, c_coef: float) -> float:
    """b of reference.amos_step after steps with random gradients."""
    param, state = torch.zeros(1, 10_000, dtype=torch.float64), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        grad = torch.randn(1, 10_000, generator=generator, dtype=torch.float64)
        reference.amos_step(param, grad, state, lr=lr, sigma=0.1, moments="row", c_coef=c_coef)
    return float(state["decay"])


@pytest.mark.parametrize(("lr", "c_coef"), [(0.01, 0.25), (0.05, 0.25), (0.1, 0.25), (0.1, 2.0), (0.05, 0.0)])
def test_decay_after_so_many_steps_is_that_of_the_reference(lr: float, c_coef: float) -> None:
    assert decay_after(500, lr, c_coef=c_coef) == pytest.approx(simulated(500, lr, c_coef), rel=0.01)


def test_decay_after_few_steps_and_after_many() -> None:
    assert decay_after(0, 0.1) == 0
    assert decay_after(1, 0.1) == pytest.approx(0.01, rel=0.01)  # lr^2
    assert decay_after(500, 0.01) == pytest.approx(math.expm1(500 * 0.01**2), rel=1e-3)
    assert decay_after(300_000, 0.005) == pytest.approx(293, rel=0.01)  # the paper's BERT, by its recurrence
    steps, lr = 1e9, 0.01  # far on b grows with the square of the steps
    assert decay_after(2 * steps, lr) / decay_after(steps, lr) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("sigma", [0.02, 0.5])
def test_the_rate_is_half_at_the_decay_after_its_half_life(sigma: float) -> None:
    b = decay_after(half_life(0.01, sigma), 0.01)
    assert 1 / (1 + 0.25 * math.sqrt(0.01 * sigma) * b) == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: suggest_lr(0), "batches=0 is out of range"),
        (lambda: suggest_lr(10, 1.5), "predicted=1.5 is out of range"),
        (lambda: suggest_lr(10, 0.0), "predicted=0.0 is out of range"),
        (lambda: weight_decay_for(-1, 1), "lr=-1 is out of range"),
        (lambda: weight_decay_for(1, 0), "sigma=0 is out of range"),
        (lambda: weight_decay_for(1, 1, q=math.nan), "q=nan is out of range"),
        (lambda: lr_for_half_life(math.inf, 1), "steps=inf is out of range"),
        (lambda: lr_for_half_life(100, -1), "sigma=-1 is out of range"),
        (lambda: lr_for_half_life(1, 0.02), "steps=1 is too few"),
        (lambda: lr_for_half_life(1e300, 0.02), "is too many"),
        (lambda: lr_for_half_life("a", 0.02), "steps='a' is out of range"),  # type: ignore[arg-type]
        (lambda: half_life(0.1, 0.1, c_coef=-1), "c_coef=-1 is out of range"),
        (lambda: decay_after(-1, 0.1), "steps=-1 is out of range"),
        (lambda: decay_after(math.inf, 0.1), "steps=inf is out of range"),
        (lambda: decay_after(10, 0), "lr=0 is out of range"),
        (lambda: decay_after(10, 0.1, c_coef=math.nan), "c_coef=nan is out of range"),
        (lambda: decay_after(1e6, 0.5, c_coef=0), "bring b beyond what float32 can hold"),
    ],
)
def test_bad_values(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
