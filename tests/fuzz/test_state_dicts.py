"""State dicts that are damaged at random: they load, and step on, or are refused and nothing has changed."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import Any

import torch
from hypothesis import given

from amos_dist import Amos

from .cases import DTYPES, gradient, group, odd
from .oracle import Oracle, draw_gradients, members
from .outcome import ending, snapshot
from .profiles import examples, randoms


def stepped(draw: Random, groups: list[dict[str, Any]], steps: int) -> tuple[Amos, Oracle]:
    optimizer = Amos(groups, lr=0.1)
    oracle = Oracle(optimizer)
    oracle.follow(optimizer, lambda param: gradient(draw, param), times=steps)  # each step takes roundings over
    return optimizer, oracle


def damage(draw: Random, saved: dict[str, Any]) -> str:
    """Does one thing to a state dict, in place, and says which."""
    places: list[tuple[Any, Any]] = [(saved, key) for key in saved]
    for number, state in saved["state"].items():
        places += [(saved["state"], number), *((state, key) for key in state)] * 2
    for number, each in enumerate(saved["param_groups"]):
        places += [(saved["param_groups"], number), *((each, key) for key in each)]
    where, key = draw.choice(places)
    value = where[key]
    ways = ["drop", "odd", "odd", "none", "more"]
    if isinstance(value, torch.Tensor):
        ways += ["shape", "dtype", "number"] * 2
    if isinstance(value, list) and value:
        ways += ["shorter", "entry"] * 3
    way = draw.choice(ways)
    if way == "drop":
        del where[key]
    elif way == "none":
        where[key] = None
    elif way == "more" and isinstance(where, dict):
        where[draw.choice(("exp_avg", "moment", "row_moment", "x", 7, "momentum"))] = draw.choice((value, odd(draw)))
    elif way == "shape":
        where[key] = draw.choice((value.reshape(-1), value.reshape(-1)[:-1], value[None], value.new_zeros(2, 3)))
    elif way == "dtype":
        where[key] = value.to(draw.choice((*DTYPES, torch.int64, torch.bool, torch.complex64)))
    elif way == "number":
        where[key] = torch.full_like(value, draw.choice((math.nan, math.inf, -1.0, 0.5, 1e30)))
    elif way == "shorter":
        where[key] = value[:-1]
    elif way == "entry":
        where[key] = [odd(draw), *value[1:]]
    else:
        where[key] = odd(draw)
    return f"{way} of {key!r}"


@examples(250)
@given(randoms())
def test_a_damaged_state_dict(draw: Random) -> None:
    """Whatever was taken of it is gone when the good one is loaded."""
    groups = [group(draw, number, most=3) for number in range(draw.randint(1, 2))]
    optimizer, oracle = stepped(draw, groups, draw.randint(0, 2))
    good = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(good)
    done = damage(draw, saved)
    clean, kept = snapshot(optimizer), [param.detach().clone() for param, _, _ in members(optimizer)]
    said = ending(lambda: optimizer.load_state_dict(saved))
    if said is None:
        # It looked like a good one. It may still be refused by the next step, as a bad keyword in a group is.
        draw_gradients(optimizer, lambda param: gradient(draw, param))
        before = snapshot(optimizer)
        if (refused := ending(optimizer.step)) is not None:
            assert snapshot(optimizer) == before, f"{done}: {refused}"
        for (param, _, _), before_it in zip(members(optimizer), kept, strict=True):
            param.detach().copy_(before_it)
        optimizer.load_state_dict(good)
    assert snapshot(optimizer) == clean, f"{done}: {said}"
    oracle.follow(optimizer, lambda param: gradient(draw, param), times=2, where=f" after {done}: {said}")


@examples(50)
@given(randoms())
def test_groups_of_a_file_in_another_order(draw: Random) -> None:
    """torch.distributed.checkpoint hands them over as they were saved: sigmas follow the names, now and ever after."""
    groups = [group(draw, number, most=4) for number in range(draw.randint(1, 2))]
    optimizer, _ = stepped(draw, groups, draw.randint(0, 1))
    clean = snapshot(optimizer)
    for _ in range(2):
        saved = copy.deepcopy(optimizer.state_dict())
        for each in saved["param_groups"]:
            pairs = [*zip(each["param_names"], each["measured_sigma"], strict=True), ("frozen here", 0.7)]
            draw.shuffle(pairs)
            each["param_names"], each["measured_sigma"] = map(list, zip(*pairs, strict=True))
        optimizer.load_state_dict(saved)
        assert snapshot(optimizer) == clean


@examples(75)
@given(randoms())
def test_what_is_not_damaged_loads(draw: Random) -> None:
    """Into an optimizer that was built with the same groups and has other numbers."""
    groups = [group(draw, number, most=3) for number in range(draw.randint(1, 2))]
    copies = [
        {**each, "params": [(name, param.detach().clone().requires_grad_()) for name, param in each["params"]]}
        for each in groups
    ]
    other = Amos(copies, lr=0.1)
    optimizer, oracle = stepped(draw, groups, draw.randint(0, 2))
    for (param, _, _), (theirs, _, _) in zip(members(other), members(optimizer), strict=True):
        param.detach().copy_(theirs.detach())
    other.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        draw_gradients(optimizer, lambda param: gradient(draw, param))
        for (param, _, _), (theirs, _, _) in zip(members(other), members(optimizer), strict=True):
            param.grad = theirs.grad
        oracle.step(optimizer)
        other.step()
        oracle.check(other)
