"""Autograd, closures, the profiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos

from .common import LR, Problem


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_the_step_records_no_graph(given: dict[str, Any], device: str) -> None:
    """Even where the gradients have one; autograd sees that the parameters have changed."""
    problem = Problem(device)
    optimizer = Amos(problem.params, **given)
    # The gradient of W depends on W.
    loss = (problem.weight.mv(problem.x) + problem.bias).square().sum()
    loss.backward(create_graph=True)
    held = problem.weight.square().sum()
    optimizer.step()
    assert torch.is_grad_enabled()
    for param in problem.params:
        assert param.is_leaf and param.requires_grad and param.grad_fn is None
        assert not any(value.requires_grad for value in optimizer.state[param].values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()
    optimizer.zero_grad()  # a gradient with a graph holds its parameter in a cycle


@pytest.mark.parametrize("outside", [True, False])
def test_the_closure(outside: bool, given: dict[str, Any]) -> None:
    """Called once, with gradients recorded whatever the mode outside; its loss is returned; the mode is put back."""
    problem = Problem()
    optimizer = Amos(problem.params, **given)
    modes: list[bool] = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        return problem.backward()

    expected = problem.backward()
    with torch.set_grad_enabled(outside):
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() == outside
    assert modes == [True] and torch.equal(loss, expected)
    assert optimizer.step() is None


def test_profiler(device: str) -> None:
    problem = Problem(device)
    optimizer = Amos(problem.params, lr=LR)
    problem.backward()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#Amos.step") == 1
    assert names.count("Optimizer.zero_grad#Amos.zero_grad") == 1
