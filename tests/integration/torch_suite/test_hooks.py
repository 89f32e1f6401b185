"""Hooks of the step and of state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from amos_dist import Amos

from .common import LR, Problem, same, through_a_file, trained


def test_step_hooks(given: dict[str, Any]) -> None:
    """Each is called once a step, with what step() was called with, until it is taken off."""
    problem = Problem()
    optimizer = Amos(problem.params, **given)
    seen: list[Any] = []

    def note(what: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((what, opt is optimizer, args[1:], kwargs, problem.weight.clone()))

    handles = [optimizer.register_step_pre_hook(note("pre")), optimizer.register_step_post_hook(note("post"))]
    before = problem.weight.detach().clone()
    optimizer.step(problem.backward)
    (pre, post) = seen
    assert pre[:4] == ("pre", True, (problem.backward,), {}) and torch.equal(pre[4], before)
    assert post[:4] == ("post", True, (problem.backward,), {}) and torch.equal(post[4], problem.weight)
    assert not torch.equal(before, problem.weight)
    optimizer.step(closure=problem.backward)
    assert [each[2:4] for each in seen[2:]] == [((), {"closure": problem.backward})] * 2
    for handle in handles:
        handle.remove()
    optimizer.step(problem.backward)
    assert len(seen) == 4


def test_hooks_run_without_gradients_too() -> None:
    optimizer = Amos([torch.ones(2)], lr=LR)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "post"]


def test_step_hooks_of_all_optimizers() -> None:
    """Global ones are outermost, and those of another optimizer stay its own."""
    one, other = Amos(Problem().params, lr=LR), torch.optim.SGD(Problem().params, lr=LR)
    seen: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        one.register_step_pre_hook(note("one before")),
        one.register_step_post_hook(note("one after")),
        other.register_step_pre_hook(note("other before")),
        other.register_step_post_hook(note("other after")),
    ]
    try:
        for optimizer, name in ((one, "one"), (other, "other"), (one, "one")):
            seen.clear()
            optimizer.step()
            assert seen == ["all before", f"{name} before", f"{name} after", "all after"]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    one.step()
    assert not seen


def test_a_step_hook_may_change_the_arguments() -> None:
    problem = Problem()
    optimizer = Amos(problem.params, lr=LR)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {"closure": problem.backward}))
    before = problem.weight.detach().clone()
    assert float(optimizer.step()) > 0
    assert not torch.equal(problem.weight, before)


def test_a_step_hook_that_returns_nonsense_is_refused() -> None:
    problem, optimizer = trained({"lr": LR})
    before = problem.weight.detach().clone()
    optimizer.register_step_pre_hook(lambda *_: 1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        problem.steps(optimizer, 1)
    assert torch.equal(problem.weight, before)


def test_hooks_of_a_subclass_run_once() -> None:
    class Mine(Amos):
        """Has step() of its parent."""

    seen: list[str] = []
    optimizer = Mine(Problem().params, lr=LR)
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["post"]


def test_state_dict_hooks(given: dict[str, Any]) -> None:
    """One before that puts a thing of its own into the state, and one after that takes it out again."""
    problem, optimizer = trained(given)

    def before(opt: Any) -> None:
        opt.state["test"] = 1

    def after(opt: Any, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "had test": found["state"].pop("test", None)}

    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["had test"] is None
    handle.remove()
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["state"]["test"] == 1
    optimizer.register_state_dict_post_hook(after)
    found = optimizer.state_dict()
    assert found["had test"] == 1 and set(found["state"]) == {0, 1}
    # With it in the state, all else goes on.
    problem.steps(optimizer, 1)
    copied = copy.deepcopy(optimizer)
    assert copied.state["test"] == 1  # type: ignore[index]
    optimizer.load_state_dict(through_a_file(found))
    problem.steps(optimizer, 1)


def test_state_dict_hooks_in_their_order() -> None:
    _, optimizer = trained({"lr": LR})
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre 1"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre 0"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda opt, found: seen.append("post 1"))
    optimizer.register_state_dict_post_hook(lambda opt, found: seen.append("post 0"), prepend=True)
    for _ in range(2):
        seen.clear()
        optimizer.state_dict()
        assert seen == ["pre 0", "pre 1", "post 0", "post 1"]


def test_a_state_dict_hook_may_return_another_dict() -> None:
    """Its tensors own their memory all the same: else a file would hold the whole buffer for each."""
    _, optimizer = trained({"lr": LR})
    expected = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda opt, found: {"inside": found})
    found = optimizer.state_dict()
    assert found.keys() == {"inside"} and same(found["inside"], expected)
    for state in found["inside"]["state"].values():
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def set_lr(value: float) -> Callable[[Any, dict[str, Any]], None]:
    def hook(optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = value

    return hook


def with_lr(value: float) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    def hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = value
        return changed

    return hook


def test_load_hooks_in_their_order(given: dict[str, Any]) -> None:
    """Those before may write into the dict or return another; those after find all loaded."""
    _, optimizer = trained(given)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_lr(0.002))
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(with_lr(0.003), prepend=True)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(with_lr(0.004))
    seen: list[Any] = []

    def after(opt: Any) -> None:
        seen.append((opt.param_groups[0]["lr"], same(opt.state_dict()["state"], saved["state"])))
        opt.state["was here"] = True

    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("first"), prepend=True)
    optimizer.load_state_dict(saved)
    assert seen == ["first", (0.004, True)]
    assert optimizer.state["was here"] is True  # type: ignore[index]
    assert optimizer.param_groups[0]["lr"] == 0.004


def test_load_hooks_are_as_many_as_before() -> None:
    """Amos uses hooks of its own while it loads and saves, and takes them off, also where something fails."""
    _, optimizer = trained({"lr": LR})
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError):
        optimizer.load_state_dict({"state": {}})

    def fails(*_: Any) -> None:
        raise KeyError("mine")

    optimizer.register_state_dict_pre_hook(fails)
    with pytest.raises(KeyError, match="mine"):
        optimizer.state_dict()
    kinds = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    assert [len(getattr(optimizer, f"_optimizer_{kind}_hooks")) for kind in kinds] == [1, 0, 0, 0]
