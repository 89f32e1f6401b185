"""Su's decays as schedulers: their closed forms, warm-up, resuming, with any optimizer."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from amos_dist import Amos, IntegralDecay, InverseSquareDecay, InverseTimeDecay, RelativeStep, weight_decay_for

from .compare import randn

BOTH = [InverseSquareDecay, InverseTimeDecay, IntegralDecay]


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
    ("kind", "at_twice"),
    [
        (InverseSquareDecay, 1 / (1 + 2 * (math.sqrt(2) - 1)) ** 2),
        (IntegralDecay, 1 / (2 * math.sqrt(2) - 1) ** 2),
        (InverseTimeDecay, 1 / 3),
    ],
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


# ---- any p_t ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 7, lambda t: 0.3, [[0, 2.0]], [[0, 2.0], [9, 2.0]]])
def test_a_constant_p_is_the_inverse_square(p: Any) -> None:
    expected = rates(InverseSquareDecay(sgd(1.0), 7.5), 40)
    assert rates(IntegralDecay(sgd(1.0), 7.5, p=p), 40) == pytest.approx(expected, rel=1e-12)


def test_a_p_that_falls_with_the_scale_is_the_inverse_time() -> None:
    """p_t = p_0 exp(-S_t) = p_0 / sqrt(1 + 2 a p_0 t), with 2 a p_0 = 1 / T."""
    expected = rates(InverseTimeDecay(sgd(1.0), 7.5), 40)
    got = rates(IntegralDecay(sgd(1.0), 7.5, p=lambda t: 3 / math.sqrt(1 + t / 7.5)), 40)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("as_function", [False, True])
def test_any_p(as_function: bool) -> None:
    """exp(-S_t) = 1 / (1 + a P(t)); here p = 0 up to 3, then rises to 2 at 7, and stays: P by hand."""
    knots = [[3, 0.0], [7, 2.0]]

    def p(t: float) -> float:
        return min(2.0, max(0.0, (t - 3) / 2))

    def area(t: float) -> float:
        return 0.0 if t < 3 else (t - 3) ** 2 / 4 if t < 7 else 4 + 2 * (t - 7)

    half_life = 9.5
    seen = rates(IntegralDecay(sgd(1.0), half_life, warmup=2, p=p if as_function else knots), 30)
    a = (math.sqrt(2) - 1) / area(half_life)
    assert seen[2:] == pytest.approx([1 / (1 + a * area(t)) ** 2 for t in range(28)], rel=1e-12)
    assert seen[:6] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("as_function", [False, True])
def test_any_p_resumes(as_function: bool) -> None:
    knots: Any = [[0, 1.0], [4, 0.5], [6, 2.0]]
    p: Any = (lambda t: 1 + t * t) if as_function else knots
    whole = rates(IntegralDecay(sgd(1.0), 5, warmup=2, p=p), 12)
    scheduler = IntegralDecay(sgd(1.0), 5, warmup=2, p=p)
    rates(scheduler, 6)
    saved = pickle.loads(pickle.dumps([scheduler.state_dict(), scheduler.optimizer.state_dict()]))
    resumed = IntegralDecay(sgd(1.0), 99, p=p if as_function else 1.0)
    resumed.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    assert rates(resumed, 6) == whole[6:]


@pytest.mark.parametrize(
    ("p", "words"),
    [
        (-1.0, "p=-1.0 at t=0.0 is out of range"),
        (math.nan, "p=nan at"),
        (lambda t: 1 - t, "p=-.* at t=.* is out of range"),
        ([[0, 1.0], [3, -1.0]], "p=-1.0 at t=3.0"),
        ([[3, 1.0], [2, 1.0]], "no list of pairs"),
        ([], "no list of pairs"),
        ([[50, 0.0], [60, 1.0]], "p is 0 up to half_life=10"),
        ("abc", "is no list of pairs"),
        ([1, 2], "is no list of pairs"),
        (None, "is no list of pairs"),
        ([[math.nan, 1.0]], "is no list of pairs"),
    ],
)
def test_bad_p(p: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IntegralDecay(sgd(1.0), 10, p=p)


# ---- weight decay that is coupled ------------------------------------------------------------------------------------


def factor(kind: Any, t: float) -> float:
    return 1 / (1 + t / 3) if kind is InverseTimeDecay else 1 / (1 + (math.sqrt(2) - 1) * t / 3) ** 2


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD, torch.optim.Adafactor])
def test_coupled_weight_decay(kind: Any, make: Any) -> None:
    """Gradients of zero: theta shrinks by 1 - rho_t, rho_t = alpha_0^2 / (2 q) f(t), where lr_0 = alpha_0 sigma."""
    share, sigma, q = 0.3, 0.2, 1.5
    first, second = (randn(i, 3, 4).double().requires_grad_() for i in range(2))
    groups = [{"params": [first]}, {"params": [second], "sigma": 2 * sigma, "lr": share * 2 * sigma}]
    optimizer = make(groups, lr=share * sigma, weight_decay=0.9)
    scheduler = kind(optimizer, half_life=3, warmup=1, sigma=sigma, q=q)
    for t in range(8):
        before = first.detach().clone(), second.detach().clone()
        for param in (first, second):
            param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        rho = share**2 / (2 * q) * (0.5 if t == 0 else factor(kind, t - 1))
        for param, old in zip((first, second), before, strict=True):
            torch.testing.assert_close(param.detach(), (1 - rho) * old, rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(weight_decay_for(share * sigma, sigma, q))


def test_weight_decay_that_is_independent_of_the_rate() -> None:
    optimizer = torch.optim.AdamW([randn(1, 3).requires_grad_()], lr=0.06)
    scheduler = InverseSquareDecay(optimizer, half_life=3, sigma=0.2, independent=True)
    for t in range(6):
        rho = 0.3**2 / 2 * factor(InverseSquareDecay, t)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(rho, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_weight_decay_is_left_alone() -> None:
    """Without sigma; and where the optimizer's own sigma says it all."""
    optimizer = torch.optim.AdamW([randn(1, 3).requires_grad_()], weight_decay=0.7)
    rates(InverseSquareDecay(optimizer, 3), 4)
    assert optimizer.param_groups[0]["weight_decay"] == 0.7
    wrapped = RelativeStep(torch.optim.AdamW([randn(1, 3).requires_grad_()], weight_decay=0.7), sigma=0.5)
    rates(InverseSquareDecay(wrapped, 3), 4)
    assert wrapped.param_groups[0]["weight_decay"] == 0.7
    rates(InverseSquareDecay(Amos([randn(1, 3).requires_grad_()], lr=0.1, sigma=0.5), 3), 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.Adam(p), "Adam adds its weight_decay to the gradient"),
        (lambda p: torch.optim.NAdam(p), "NAdam adds its weight_decay to the gradient"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "SGD adds its weight_decay to the gradient"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop adds its weight_decay to the gradient"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS has no weight_decay that could be coupled"),
        (lambda p: Amos(p, lr=0.1), "Amos has a weight decay that follows from its own sigma"),
        (lambda p: RelativeStep(torch.optim.AdamW(p)), "RelativeStep has a weight decay that follows from its own"),
    ],
)
def test_weight_decay_that_cannot_be_coupled(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InverseSquareDecay(make([randn(1, 3, 4).requires_grad_()]), 3, sigma=0.1)


class OwnMuon(torch.optim.Muon):
    pass


@pytest.mark.parametrize("kind", [InverseSquareDecay, InverseTimeDecay, IntegralDecay])
@pytest.mark.parametrize("make", [torch.optim.Muon, OwnMuon, torch.optim.Adafactor, torch.optim.SGD])
def test_coupling_to_directions_that_are_no_adams_is_warned_of(make: Any, kind: Any) -> None:
    with pytest.warns(UserWarning, match="directions do not have entries of about 1") as found:
        kind(make([randn(1, 3, 4).requires_grad_()], lr=0.1), 3, sigma=0.1)
    assert [warning.filename for warning in found] == [__file__]  # the line that builds it


def test_a_sigma_that_is_no_number() -> None:
    optimizer = torch.optim.AdamW([{"params": [randn(1, 3).requires_grad_()], "sigma": "auto"}])
    with pytest.raises(ValueError, match="sigma='auto' of a parameter group is no number"):
        InverseSquareDecay(optimizer, 3, sigma=0.1)


def test_a_group_that_is_added_later() -> None:
    optimizer = torch.optim.AdamW([randn(1, 3).requires_grad_()])
    scheduler = InverseSquareDecay(optimizer, 3)
    optimizer.add_param_group({"params": [randn(2, 3).requires_grad_()]})
    with pytest.raises(ValueError, match="has 2 parameter groups, and had 1"):
        scheduler.step()


@pytest.mark.parametrize(("name", "value"), [("sigma", 0), ("sigma", -1.0), ("q", 0), ("q", math.nan)])
def test_bad_coupling(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is out of range"):
        InverseSquareDecay(torch.optim.AdamW([randn(1, 3)]), 3, **{"sigma": 0.1, name: value})
