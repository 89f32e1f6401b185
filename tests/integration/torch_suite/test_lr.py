"""lr: a number, a tensor, on a schedule."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as lrs

from amos_dist import Amos
from tests.conftest import relative_error

from .common import LR, Problem, same, same_run, trained


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr(given: dict[str, Any], device: str, shape: tuple[int, ...]) -> None:
    """The same bits as with a float; it is read, not kept, and neither replaced nor written to."""
    lr = torch.full(shape, 0.0625)
    number, tensor = trained({**given, "lr": 0.0625}, 0, device), trained({**given, "lr": lr}, 0, device)
    for _ in range(5):
        for problem, optimizer in (number, tensor):
            problem.steps(optimizer, 1)
        assert same_run(number, tensor)
        assert tensor[1].param_groups[0]["lr"] is lr and lr.flatten().tolist() == [0.0625]
    as_before = copy.deepcopy(number)
    lr.fill_(0.25)
    number[1].param_groups[0]["lr"] = 0.25
    for problem, optimizer in (number, tensor, as_before):
        problem.steps(optimizer, 1)
    assert same_run(number, tensor) and not same_run(number, as_before)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_on_the_device(device: str, capturable: bool) -> None:
    lr = torch.tensor(0.0625, device=device)
    given = {"lr": lr, "capturable": capturable}
    assert same_run(trained(given, 3, device), trained({**given, "lr": 0.0625}, 3, device))


def test_loaded_lr_is_the_loaders_own(given: dict[str, Any], device: str) -> None:
    """A schedule that writes into one tensor must not reach the other optimizer, or the file's contents."""
    given["lr"] = torch.tensor(0.25)
    problem, optimizer = trained(given, 2, device)
    saved = optimizer.state_dict()
    other = Amos(problem.clone().params, **{**given, "lr": torch.tensor(0.5)})
    other.load_state_dict(saved)
    lr = other.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) and lr.shape == () and float(lr) == 0.25
    lr.fill_(0.125)
    assert float(saved["param_groups"][0]["lr"]) == float(optimizer.param_groups[0]["lr"]) == 0.25


def test_capturable_counts_on_the_device(chosen: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(chosen, 2, device)
    where = device if chosen.get("capturable") else "cpu"
    assert {optimizer.state[param]["step"].device.type for param in problem.params} == {where}


@pytest.mark.parametrize("capturable", [False, True])
def test_lr_of_two_numbers_at_the_step(capturable: bool) -> None:
    problem, optimizer = trained({"lr": LR, "capturable": capturable}, 1)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with pytest.raises(TypeError, match="is not a number"):
        problem.steps(optimizer, 1)
    assert same(optimizer.state_dict()["state"], before)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": functools.partial(lrs.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": functools.partial(lrs.MultiStepLR, milestones=[2, 4], gamma=0.5),
    "LambdaLR": functools.partial(lrs.LambdaLR, lr_lambda=lambda t: 1 / (1 + t)),
    "MultiplicativeLR": functools.partial(lrs.MultiplicativeLR, lr_lambda=lambda t: 0.9),
    "ExponentialLR": functools.partial(lrs.ExponentialLR, gamma=0.8),
    "ConstantLR": functools.partial(lrs.ConstantLR, factor=0.25, total_iters=3),
    "LinearLR": functools.partial(lrs.LinearLR, start_factor=0.25, total_iters=4),
    "PolynomialLR": functools.partial(lrs.PolynomialLR, total_iters=10, power=2.0),
    "CosineAnnealingLR": functools.partial(lrs.CosineAnnealingLR, T_max=6),
    "CosineAnnealingWarmRestarts": functools.partial(lrs.CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": functools.partial(lrs.OneCycleLR, max_lr=0.2, total_steps=8),
    "CyclicLR": functools.partial(lrs.CyclicLR, base_lr=0.05, max_lr=0.2, step_size_up=3),
    "SequentialLR": lambda opt: lrs.SequentialLR(
        opt, [lrs.ConstantLR(opt, 0.1, 2), lrs.ExponentialLR(opt, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda opt: lrs.ChainedScheduler([lrs.LinearLR(opt, 0.5, total_iters=3)], optimizer=opt),
    "ReduceLROnPlateau": functools.partial(lrs.ReduceLROnPlateau, patience=0, threshold=100.0, threshold_mode="abs"),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_a_tensor_lr(name: str, capturable: bool, device: str) -> None:
    """They fill the tensor, in float32, and do not replace it; the optimizer is in order with them, so none warns.

    OneCycleLR and CyclicLR move the momentum as well.
    """
    runs = []
    for lr in (0.0625, torch.tensor(0.0625)):
        problem = Problem(device)
        optimizer = Amos(problem.params, lr=lr, momentum=0.9, capturable=capturable)
        scheduler, seen = SCHEDULES[name](optimizer), []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if name == "SequentialLR":  # of torch's own making: it steps a schedule by number
                warnings.filterwarnings("ignore", "The epoch parameter")
            for _ in range(6):
                loss = optimizer.step(problem.backward)
                seen.append((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["momentum"])))
                scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
        assert not isinstance(lr, Tensor) or optimizer.param_groups[0]["lr"] is lr
        runs.append((problem, seen))
    (numbers, seen), (tensors, seen_too) = runs
    assert len(set(seen)) > 1
    assert torch.allclose(torch.tensor(seen), torch.tensor(seen_too), rtol=1e-5, atol=1e-9)
    for one, other in zip(numbers.params, tensors.params, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_a_schedule_warns_of_the_wrong_order() -> None:
    """torch looks at whether `step` was called, through a wrapper that it puts around it."""
    problem = Problem()
    optimizer = Amos(problem.params, lr=LR)
    scheduler = lrs.StepLR(optimizer, 2)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\).* before .*optimizer\.step\(\)"):
        scheduler.step()
