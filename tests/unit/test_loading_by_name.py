"""torch.distributed.checkpoint loads state by name: sigmas that were measured must find their parameters too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from amos_dist import Amos


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 3))


def stepped(model: nn.Module, groups: Any, **keywords: Any) -> Amos:
    optimizer = Amos(groups, lr=0.02, **keywords)
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


def sigmas(optimizer: Amos) -> dict[str, float]:
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    measured = [scale for group in optimizer.param_groups for scale in group["measured_sigma"]]
    return dict(zip(names, measured, strict=True))


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("kept", [(4, 3, 2, 1, 0), (1, 2, 3, 4), (0, 1, 2, 3, 4)], ids=["reversed", "fewer", "same"])
def test_sigma_follows_the_name(kept: tuple[int, ...], flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    one, two = model_of(1), model_of(2)
    saved = stepped(one, list(one.named_parameters()))
    expected = sigmas(saved)
    named = list(two.named_parameters())
    for i, (_, param) in enumerate(named):
        param.requires_grad_(i in kept)
    loader = Amos([named[i] for i in kept], lr=0.02)
    set_optimizer_state_dict(two, loader, get_optimizer_state_dict(one, saved, options=options), options=options)
    for i, scale in zip(kept, loader.param_groups[0]["measured_sigma"], strict=True):
        assert scale == expected[named[i][0]]
        assert loader._constants_of(kept.index(i), loader.param_groups[0]).numbers[1] == scale


def test_without_names_fewer_parameters_are_refused() -> None:
    one, two = model_of(1), model_of(2)
    saved = stepped(one, one.parameters())
    two[0].weight.requires_grad_(False)
    loader = Amos([p for p in two.parameters() if p.requires_grad], lr=0.02)
    with pytest.raises(ValueError, match=r"has no sigma for 'param\[0\]'. Build the optimizer with the groups"):
        set_optimizer_state_dict(two, loader, get_optimizer_state_dict(one, saved))


def test_groups_in_another_order() -> None:
    one, two = model_of(1), model_of(1)
    groups = [{"params": [p for p in model.parameters() if p.dim() == dims]} for model in (one, two) for dims in (1, 2)]
    saved = stepped(one, groups[:2], sigma=0.2)
    loader = Amos(groups[3:1:-1], lr=0.02, sigma=0.2)
    set_optimizer_state_dict(two, loader, get_optimizer_state_dict(one, saved))
    two.load_state_dict(one.state_dict())
    for model, optimizer in ((one, saved), (two, loader)):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("what", ["looked at", "something beside"])
def test_users_may_look_at_the_state_and_put_things_there(what: str) -> None:
    """Neither makes a new plan, for which other ranks would be asked to agree."""
    model = model_of(1)
    model[1].weight.requires_grad_(False)
    optimizer = stepped(model, model.parameters())
    plans = [plan for some in optimizer._plans.values() for plan in some.values()]
    if what == "looked at":
        assert not optimizer.state[model[1].weight]
    else:
        optimizer.state[model[0].weight]["grad_norm"] = torch.zeros(())
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    assert [plan for some in optimizer._plans.values() for plan in some.values()] == plans
    assert float(optimizer.state[model[0].weight]["step"]) == 2
