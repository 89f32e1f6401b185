"""Parameter groups and names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from amos_dist import Amos, settings
from tests.unit.compare import randn

from .common import LR, Problem, named_or_not, same, same_run, through_a_file, trained


def test_groups_are_like_optimizers_of_their_own(given: dict[str, Any], device: str) -> None:
    together, apart = Problem(device), Problem(device)
    bias = {**given, "lr": 0.125, "extra_l2": 0.01}
    optimizer = Amos([{"params": [together.weight]}, {"params": [together.bias], **bias}], **given)
    own = [Amos([apart.weight], **given), Amos([apart.bias], **bias)]
    first = float(together.backward())
    for _ in range(20):
        together.steps(optimizer, 1)
        apart.backward()
        for each in own:
            each.step()
    for param, alone, each in zip(together.params, apart.params, own, strict=True):
        assert torch.equal(param, alone) and same(optimizer.state[param], each.state[alone])
    last = float(together.backward())
    assert last > first if given.get("maximize") else last < first


def test_lr_of_a_group(given: dict[str, Any], device: str) -> None:
    """It wins over the optimizer's, which is nothing here: so the other group stays where it is."""
    problem, other = Problem(device), randn(9, 2).to(device).requires_grad_()
    before = other.detach().clone()
    optimizer = Amos([{"params": problem.params, **given}, {"params": [other], "extra_l2": 0.0}], lr=1e-28)
    first = float(problem.backward())
    for _ in range(20):
        other.grad = torch.ones_like(other)
        problem.steps(optimizer, 1)
    last = float(problem.backward())
    assert last > first if given.get("maximize") else last < first
    assert torch.equal(other, before)


def test_defaults_fill_groups_that_say_nothing(chosen: dict[str, Any]) -> None:
    weight, bias = Problem().params
    groups: list[dict[str, Any]] = [{"params": [weight], "beta": 0.5, "tag": "first"}, {"params": [bias]}]
    optimizer = Amos(groups, **chosen)
    first, second = optimizer.param_groups
    assert first["beta"] == 0.5 and first["tag"] == "first" and "tag" not in second
    expected = {**settings.DEFAULTS, **chosen}
    assert {key: second[key] for key in settings.KEYWORDS} == expected
    assert set(optimizer.defaults) == set(settings.KEYWORDS)


def test_a_group_that_is_added_later(given: dict[str, Any], device: str) -> None:
    expected, found = trained(given, 0, device), Problem(device)
    optimizer = Amos([found.weight], **given)
    optimizer.add_param_group({"params": found.bias})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    for problem, each in (expected, (found, optimizer)):
        problem.steps(each, 3)
    assert same_run((found, optimizer), expected)


def test_a_group_added_after_loading_can_be_copied_and_saved() -> None:
    """Loading makes torch write a keyword into the defaults that Amos refuses."""
    problem, optimizer = trained({"lr": LR})
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [randn(1, 2, 3).requires_grad_()]})
    optimizer.add_param_group({**optimizer.param_groups[-1], "params": [randn(2, 2, 3).requires_grad_()]})
    assert all(set(group) == set(optimizer.param_groups[0]) for group in optimizer.param_groups)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    problem.steps(optimizer, 1)


BAD_GROUPS: dict[str, tuple[Callable[[Problem], Any], type[Exception], str]] = {
    "no dict": (lambda problem: [problem.bias], TypeError, "param_group must be a dict"),
    "a set": (lambda problem: {"params": {problem.bias}}, TypeError, "ordered collections"),
    "no tensor": (lambda problem: {"params": [1.0]}, TypeError, "can only optimize Tensors"),
    "no leaf": (lambda problem: {"params": [problem.bias * 2]}, ValueError, "non-leaf"),
    "known already": (lambda problem: {"params": [problem.weight]}, ValueError, "more than one parameter group"),
    "names": (lambda problem: {"params": [("bias", problem.bias)]}, ValueError, "cannot add param group with names"),
    "a bad value": (lambda problem: {"params": [problem.bias], "beta": 2.0}, ValueError, "beta=2 is out of range"),
    "an integer": (lambda problem: {"params": [torch.ones(3).int()]}, TypeError, "is int32"),
}


@pytest.mark.parametrize("what", BAD_GROUPS)
def test_a_bad_group_is_refused_and_changes_nothing(what: str) -> None:
    make, error, message = BAD_GROUPS[what]
    problem = Problem()
    optimizer = Amos([problem.weight], lr=LR)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.add_param_group(make(problem))
    assert same(optimizer.state_dict(), before)
    optimizer.add_param_group({"params": [problem.bias]})
    problem.steps(optimizer, 1)
    assert same_run((problem, optimizer), trained({"lr": LR}, 1))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Amos([], lr=LR)


def test_zero_grad(given: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = Amos(problem.params, **given)
    problem.backward()
    kept = [param.grad for param in problem.params]
    optimizer.zero_grad(set_to_none=False)
    for param, grad in zip(problem.params, kept, strict=True):
        assert grad is not None and param.grad is grad and not grad.any()
    optimizer.zero_grad()
    assert all(param.grad is None for param in problem.params)


def test_it_can_be_printed(given: dict[str, Any]) -> None:
    weight, bias = Problem().params
    text = repr(Amos([{"params": [weight]}, {"params": [bias]}], **given))
    assert text.startswith("Amos (") and "Parameter Group 0" in text and "Parameter Group 1" in text
    assert all(f"    {key}: " in text for key in settings.KEYWORDS)


def test_names_go_round() -> None:
    problem = Problem()
    optimizer = Amos(problem.listed(named=True), lr=LR)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert same(optimizer.param_groups[0]["params"], problem.params)
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("loader_named", [False, True], ids=["into unnamed", "into named"])
@named_or_not
def test_named_and_unnamed_load_each_other(
    chosen: dict[str, Any], device: str, named: bool, loader_named: bool
) -> None:
    problem, optimizer = trained(chosen, 3, device, named)
    other_problem = problem.clone()
    other = Amos(other_problem.listed(loader_named), **chosen)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    names = other.state_dict()["param_groups"][0].get("param_names")
    assert names == (["weight", "bias"] if named or loader_named else None)
    for each, its in (problem, optimizer), (other_problem, other):
        each.steps(its, 1)
    assert same_run((problem, optimizer), (other_problem, other))


def test_names_of_the_file_win() -> None:
    """torch's rule: what is loaded has names, so they are taken."""
    problem = Problem()
    optimizer = Amos([("a", problem.weight), ("b", problem.bias)], lr=LR)
    other = Amos(Problem().listed(named=True), lr=LR)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["a", "b"]
