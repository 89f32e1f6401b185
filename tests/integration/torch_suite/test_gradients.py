"""Which gradients there are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from amos_dist import Amos
from tests.unit.compare import randn

from .common import LR, Problem, same, same_run, trained


def test_nothing_happens_without_gradients(given: dict[str, Any], device: str) -> None:
    params = [randn(i, 2, 3).to(device) for i in range(2)]
    before = copy.deepcopy(params)
    optimizer = Amos(params, **given)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1.0
    assert optimizer.step() is None
    assert same(params, before) and not optimizer.state


def test_gradients_of_zero_move_nothing(given: dict[str, Any], device: str) -> None:
    """But `extra_l2`, as weight decay would."""
    param = randn(1, 5, 1).to(device).requires_grad_()
    before = param.detach().clone()
    optimizer = Amos([param], **given)
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before) != bool(given.get("extra_l2"))
    assert optimizer.state[param]["step"] == 2


def test_gradients_come_and_go(given: dict[str, Any], device: str) -> None:
    """A parameter without one waits: as an optimizer of its own that is not asked."""
    together, apart = Problem(device), Problem(device)
    optimizer = Amos(together.params, **given)
    own = [Amos([param], **given) for param in apart.params]
    for t in range(6):
        for problem in (together, apart):
            problem.backward()
        if t % 3:
            which = t % 2
            together.params[which].grad = apart.params[which].grad = None
        optimizer.step()
        for each in own:
            each.step()
    assert same(together.params, apart.params)
    for param, alone, each in zip(together.params, apart.params, own, strict=True):
        assert same(optimizer.state[param], each.state[alone])


def test_gradients_of_other_strides(given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 0, device)
    for t in range(4):
        problem.backward()
        grad = problem.weight.grad
        assert grad is not None
        if t % 2:
            problem.weight.grad = grad.t().contiguous().t()
        optimizer.step()
    assert same_run((problem, optimizer), trained(given, 4, device))


def test_a_parameter_may_get_other_memory(given: dict[str, Any], device: str) -> None:
    expected, found = trained(given, 4, device), trained(given, 2, device)
    for param in found[0].params:
        param.data = param.detach().clone()
    found[0].steps(found[1], 2)
    assert same_run(found, expected)


def test_repeated_parameters_step_once(given: dict[str, Any], device: str) -> None:
    """torch only warns of them (test_errors). One of two states would be lost, and two threads write to one place."""
    twice, once = Problem(device), trained(given, 3, device)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = Amos([*twice.params, twice.weight], **given)
    twice.steps(optimizer, 3)
    assert same_run((twice, optimizer), once)


def test_the_state_is_not_empty(given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 1, device)
    assert set(optimizer.state) == set(problem.params)
    assert all(len(state) > 1 and state["step"] == 1 for state in optimizer.state.values())


def test_scaled_gradients(given: dict[str, Any], device: str) -> None:
    """GradScaler: a step with an infinite gradient is left out, and a power of two changes no bit of the others."""
    problem, expected = Problem(device), trained(given, 2, device)
    optimizer, scaler = Amos(problem.params, **given), torch.amp.GradScaler(device, init_scale=1024.0)
    for t in range(3):
        optimizer.zero_grad()
        loss = (problem.weight.mv(problem.x) + problem.bias).square().sum()
        scaler.scale(loss).backward()
        if t == 1:
            assert problem.bias.grad is not None
            problem.bias.grad[3] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert same_run((problem, optimizer), expected)


def test_meta_parameters_are_refused_by_the_kernels() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    optimizer = Amos(model.parameters(), lr=LR, sigma=0.5, fused=True)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="fused=True cannot be had on 'meta'"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
