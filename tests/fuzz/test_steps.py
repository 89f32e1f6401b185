"""Steps of random parameters with random keywords are those of the reference."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given

from amos_dist import Amos, settings

from .cases import OPTIONS, gradient, group, keywords
from .oracle import Oracle
from .profiles import examples, randoms


@examples(300)
@given(randoms())
def test_steps_are_those_of_the_reference(draw: Random) -> None:
    groups = [group(draw, number) for number in range(draw.randint(1, 3))]
    optimizer = Amos(groups, lr=0.1)
    oracle = Oracle(optimizer)
    oracle.follow(optimizer, lambda param: gradient(draw, param), times=draw.randint(2, 5) - 1)


def random_rule(draw: Random, names: list[str], dims: int) -> dict[str, Any]:
    """A rule for one of the parameters, or for several: "p1" is in many groups."""
    name = draw.choice(names)
    match = draw.choice((name.replace(".", r"\.") + "$", name.split(".")[1] + "$"))
    given = keywords(draw, [(1,) * dims], often=0.2)
    kept = {key: value for key, value in given.items() if key in settings.PER_PARAMETER and draw.random() < 0.7}
    if "lr" in kept:
        kept["lr"] = 0.02
    return {"match": match, **kept}


@examples(100)
@given(randoms())
def test_rules(draw: Random) -> None:
    """The first rule that matches a name wins, keyword by keyword over the group's."""
    groups = [group(draw, number) for number in range(draw.randint(1, 3))]
    for each in groups:
        each["lr"] = each["lr"] or 0.07  # a rule's lr is a ratio
        for key in ("master_weights", "capturable"):
            each.pop(key, None)
    names = [name for each in groups for name, _ in each["params"]]
    fewest = min((p.dim() for each in groups for _, p in each["params"] if p.dim() > 1), default=2)
    rules: list[dict[str, Any]] = []
    for name in names:
        each = random_rule(draw, [name], fewest)
        # refuse_useless: a rule must be the first for some parameter
        taken = {n for n in names for before in rules if _matches(before, n)}
        if any(_matches(each, n) and n not in taken for n in names):
            rules.append(each)
    optimizer = Amos(groups, lr=0.1, rules=rules)

    def of(name: str) -> dict[str, Any]:
        found = next((each for each in rules if _matches(each, name)), {})
        return {key: value for key, value in found.items() if key != "match"}

    oracle = Oracle(optimizer, of)
    oracle.follow(optimizer, lambda param: gradient(draw, param), times=draw.randint(2, 4) - 1)


def _matches(rule: dict[str, Any], name: str) -> bool:
    import re

    return bool(re.search(rule["match"], name))


def test_options_are_all_keywords() -> None:
    """A keyword that is new must be fuzzed too."""
    assert set(OPTIONS) | {"lr", "sigma", "row_dims"} == set(settings.KEYWORDS)
