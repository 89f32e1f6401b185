"""Copies, pickles, and that nothing keeps an optimizer alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import lr_scheduler as lrs

from amos_dist import Amos

from .common import LR, same, same_run, trained
from .registration import AMOS


def public(optimizer: Amos) -> set[str]:
    return {key for key in vars(optimizer) if not key.startswith("_")}


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("count", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[Any], Any], count: int, given: dict[str, Any], device: str) -> None:
    """Of the optimizer and its model together: they have all public attributes, go on alike, and share nothing."""
    problem, optimizer = trained(given, count, device)
    twin, other = copied((problem, optimizer))
    assert public(other) == public(optimizer) and repr(other) == repr(optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    before = [param.detach().clone() for param in problem.params], copy.deepcopy(optimizer.state_dict())
    twin.steps(other, 2)
    assert same(before[0], problem.params) and same(before[1], optimizer.state_dict())
    problem.steps(optimizer, 2)
    assert same_run((problem, optimizer), (twin, other))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies_on_a_schedule(copied: Callable[[Any], Any]) -> None:
    """A schedule wraps the optimizer's `step`, which a copy must not inherit."""
    problem, optimizer = trained({"lr": 0.1})
    scheduler = lrs.StepLR(optimizer, 1, gamma=0.5)
    problem.steps(optimizer, 1)
    scheduler.step()
    twin, other = copied((problem, optimizer))
    assert other.param_groups[0]["lr"] == 0.05
    for each, its in (problem, optimizer), (twin, other):
        each.steps(its, 1)
    assert same_run((problem, optimizer), (twin, other))
    lrs.StepLR(other, 1)


@pytest.mark.parametrize("missing", [*AMOS.not_og_supported_flags, AMOS.not_og_supported_flags], ids=str)
def test_older_pickles(missing: Any) -> None:
    problem, optimizer = trained({"lr": LR})
    older = copy.deepcopy((problem, optimizer.__getstate__()))
    for flag in [missing] if isinstance(missing, str) else missing:
        del older[1]["param_groups"][0][flag]
    other = Amos.__new__(Amos)
    other.__setstate__(older[1])
    for each, its in (problem, optimizer), (older[0], other):
        each.steps(its, 1)
    assert same_run((problem, optimizer), (older[0], other))


@pytest.mark.parametrize("count", [0, 3])
def test_it_is_freed_at_once(count: int) -> None:
    """No cycle keeps it, and so its state, until the garbage is collected."""
    _problem, optimizer = trained({"lr": LR, "momentum": 0.9}, count)  # the model lives on
    optimizer.load_state_dict(optimizer.state_dict())
    found = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert found() is None
    finally:
        gc.enable()
