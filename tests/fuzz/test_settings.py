"""Random JSON documents and groups: an optimizer that steps, or a declared error and nothing changed."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import torch
from hypothesis import given
from torch import Tensor

from amos_dist import Amos, settings

from .cases import document, gradient, group, odd, shape, values
from .oracle import Oracle, draw_gradients
from .outcome import ending, snapshot
from .profiles import examples, randoms

SHAPES = ((5, 7), (37,), (3, 4, 5), ())


def named(draw: Random) -> list[tuple[str, Tensor]]:
    pairs = []
    for i, size in enumerate(SHAPES[: draw.randint(1, 4)]):
        dtype = draw.choice((torch.float32, torch.bfloat16))
        pairs.append((f"{i}.{'weight' if len(size) > 1 else 'bias'}", values(i, size, dtype).requires_grad_()))
    return pairs


def first_rule(rules: Any, name: str) -> dict[str, Any]:
    found = next((each for each in rules or () if re.search(each["match"], name)), {})
    return {key: value for key, value in found.items() if key != "match"}


@examples(600)
@given(randoms())
def test_json(draw: Random) -> None:
    """DeepSpeed calls Amos(parameters, **params)."""
    given_params = json.loads(json.dumps(document(draw, settings.KEYWORDS)))
    pairs = named(draw)
    before = [p.detach().clone() for _, p in pairs]
    made: list[Amos] = []
    said = ending(lambda: made.append(Amos(pairs, **given_params)))
    assert all(torch.equal(p, b) for (_, p), b in zip(pairs, before, strict=True))
    if said is not None:
        return
    (optimizer,) = made
    steps_or_says(draw, optimizer, lambda name: first_rule(given_params.get("rules"), name))


def steps_or_says(draw: Random, optimizer: Amos, rules: Any = lambda name: {}) -> None:
    """Keywords that no other keyword contradicts are good ones: the optimizer steps."""
    Oracle(optimizer, rules).follow(
        optimizer, lambda param: values(draw.randrange(10**6), tuple(param.shape), param.dtype), times=2
    )


@examples(200)
@given(randoms())
def test_a_group_with_something_odd(draw: Random) -> None:
    """add_param_group: the group is in, and steps, or nothing has changed and the others go on."""
    optimizer = Amos([group(draw, 0)], lr=0.1)
    oracle = Oracle(optimizer)
    draw_gradients(optimizer, lambda param: gradient(draw, param))
    oracle.step(optimizer)
    optimizer.step()
    oracle.check(optimizer)
    before, known = snapshot(optimizer), set(vars(optimizer))
    said = ending(lambda: optimizer.add_param_group(odd_group(draw, optimizer)))
    if said is not None:
        assert snapshot(optimizer) == before and set(vars(optimizer)) == known
    oracle.add(optimizer)
    oracle.follow(optimizer, lambda param: gradient(draw, param), times=2, where=f" after {said}")


def odd_group(draw: Random, optimizer: Amos) -> Any:
    """A group as a user may get it wrong, or right."""
    if draw.randrange(30) == 0:
        return odd(draw)
    found: dict[str, Any] = group(draw, 1)
    what = draw.randrange(8)
    if what == 0:
        found["params"] = odd(draw)
    elif what == 1:
        found["params"].append(odd(draw))
    elif what == 2:
        found["params"].append(("again", optimizer.param_groups[0]["params"][0]))
    elif what == 3:
        dtype = draw.choice((torch.int64, torch.bool, torch.complex64))
        found["params"].append(("other", torch.zeros(shape(draw), dtype=dtype)))
    elif what == 4:
        bad = values(3, (2, 3), torch.float32, draw.choice(("nan", "inf"))).requires_grad_()
        found["params"].append(("bad", bad))
    elif what == 5:
        found["params"] = [param for _, param in found["params"]]  # torch asks for names in all groups or in none
    else:
        key = draw.choice((*settings.KEYWORDS, "momentun", "weight_decay", "params", "amos_group", "measured_sigma"))
        found[key] = odd(draw)
    return found


@examples(150)
@given(randoms())
def test_a_keyword_is_changed_between_steps(draw: Random) -> None:
    """Schedulers and users write into groups: the next step takes it, or says what is wrong and changes nothing."""
    optimizer = Amos([group(draw, number) for number in range(2)], lr=0.1)
    oracle = Oracle(optimizer)
    for t in range(3):
        draw_gradients(optimizer, lambda param: gradient(draw, param, missing=0))
        each, key = draw.choice(optimizer.param_groups), draw.choice(settings.KEYWORDS)
        old, new = each[key], odd(draw)
        # True for 1 and 1.0 for 1 pass unseen, and mean the same.
        each[key] = old if repr(new) == repr(old) else new  # a tensor cannot be held against 10**400
        before = snapshot_but(each, key, old, optimizer)
        said = ending(optimizer.step)
        if said is not None:
            each[key] = old
            assert snapshot(optimizer) == before, said
            optimizer.step()
        oracle.step(optimizer)
        oracle.check(optimizer, f"step {t} after {key}: {said}")


def snapshot_but(each: dict[str, Any], key: str, value: Any, optimizer: Amos) -> Any:
    """The snapshot of `optimizer` with the old value in place of the new one."""
    now, each[key] = each[key], value
    try:
        return snapshot(optimizer)
    finally:
        each[key] = now
