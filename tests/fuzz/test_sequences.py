"""Any sequence of what users and frameworks do with an optimizer, beside one reference state for each parameter."""

from __future__ import annotations

import copy
import io
import pickle
from random import Random
from typing import Any

import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from amos_dist import Amos

from .cases import OPTIONS, gradient, group, values
from .oracle import Oracle, draw_gradients, members
from .outcome import ending, snapshot
from .profiles import examples, randoms
from .test_settings import odd_group
from .test_state_dicts import damage

# What may be changed in a group between two steps; the rest shapes the state.
CHANGEABLE = tuple(key for key in OPTIONS if key not in ("moments", "decay_init", "fused", "foreach"))


class Sequences(RuleBasedStateMachine):
    """An optimizer, and what the reference says of its parameters."""

    optimizer: Amos
    oracle: Oracle

    @initialize(draw=randoms())
    def build(self, draw: Random) -> None:
        self.optimizer = Amos([group(draw, 0, most=3)], lr=0.1)
        self.oracle = Oracle(self.optimizer)

    @invariant()
    def is_the_reference(self) -> None:
        if hasattr(self, "oracle"):
            self.oracle.check(self.optimizer)

    @rule(draw=randoms())
    def backward(self, draw: Random) -> None:
        draw_gradients(self.optimizer, lambda param: gradient(draw, param) if param.requires_grad else None)

    @rule(draw=randoms())
    def train(self, draw: Random) -> None:
        for _ in range(2):
            self.backward(draw)
            self.step()
            self.is_the_reference()  # which takes over what is rounded to few bits

    @rule()
    def step(self) -> None:
        self.oracle.step(self.optimizer)
        self.optimizer.step()

    @rule()
    def forget(self) -> None:
        self.optimizer.zero_grad()

    @rule()
    def zeros(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    @rule(draw=randoms())
    def freeze_or_thaw(self, draw: Random) -> None:
        param = draw.choice(members(self.optimizer))[0]
        param.requires_grad_(not param.requires_grad)

    @rule(draw=randoms())
    def change_a_keyword(self, draw: Random) -> None:
        each = draw.choice(self.optimizer.param_groups)
        if draw.randrange(2):
            each["lr"] = draw.choice((0.05, 0.002, torch.tensor(0.03)))
        else:
            key = draw.choice(CHANGEABLE)
            each[key] = draw.choice(OPTIONS[key])

    @rule(draw=randoms())
    def change_to_something_odd(self, draw: Random) -> None:
        """`moments` of a group whose state was made for others, too."""
        if all(param.grad is None for param, _, _ in members(self.optimizer)):
            return  # then step() looks at nothing
        each = draw.choice(self.optimizer.param_groups)
        key = draw.choice(("moments", "row_dims", "lr", "momentum", "beta", "seed"))
        old, each[key] = each[key], draw.choice(("column", "row", -1, None, float("nan"), "x"))
        if each[key] != old:
            before = snapshot(self.optimizer)
            assert ending(self.optimizer.step) is not None, f"{key}={each[key]!r}"
            assert snapshot(self.optimizer) == before
        each[key] = old

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(draw=randoms())
    def add_a_group(self, draw: Random) -> None:
        self.optimizer.add_param_group(group(draw, len(self.optimizer.param_groups), most=2))
        self.oracle.add(self.optimizer)

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(draw=randoms())
    def add_an_odd_group(self, draw: Random) -> None:
        before = snapshot(self.optimizer)
        if ending(lambda: self.optimizer.add_param_group(odd_group(draw, self.optimizer))) is None:
            self.oracle.add(self.optimizer)
        else:
            assert snapshot(self.optimizer) == before

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer.load_state_dict(torch.load(file, weights_only=False))

    @rule(draw=randoms())
    def load_what_is_damaged(self, draw: Random) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        good = copy.deepcopy(saved)
        damage(draw, saved)
        before = snapshot(self.optimizer)
        if ending(lambda: self.optimizer.load_state_dict(saved)) is None:
            self.optimizer.load_state_dict(good)  # it was another good one, of which nothing may be left
        assert snapshot(self.optimizer) == before

    @rule(draw=randoms())
    def resume(self, draw: Random) -> None:
        """Another process: the same parameters, other numbers in the groups, the state from the file."""
        groups: list[dict[str, Any]] = []
        saved, lr = copy.deepcopy(self.optimizer.state_dict()), draw.choice((0.5, 0.1))
        for each in self.optimizer.param_groups:
            names = each.get("param_names")
            some = [param.detach().clone().requires_grad_(param.requires_grad) for param in each["params"]]
            groups.append({
                **{key: each[key] for key in ("moments", "row_dims", "sigma")},
                "params": list(zip(names, some, strict=True)) if names else some,
            })  # fmt: skip
        with torch.no_grad():
            for each in groups:  # sigma="auto" must not be measured of what a training has made of them
                for pair in each["params"]:
                    (pair[1] if isinstance(pair, tuple) else pair).nan_to_num_(0.0, 0.0, 0.0)
        other = Amos(groups, lr=lr)
        for (param, _, _), (theirs, _, _) in zip(members(other), members(self.optimizer), strict=True):
            param.detach().copy_(theirs.detach())
            param.grad = theirs.grad
        other.load_state_dict(saved)
        self.optimizer = other

    @rule()
    def copy(self) -> None:
        self.optimizer = copy.deepcopy(self.optimizer)

    @rule()
    def pickle(self) -> None:
        self.optimizer = pickle.loads(pickle.dumps(self.optimizer))

    @rule(draw=randoms())
    def write_weights(self, draw: Random) -> None:
        """A checkpoint of the model, or an average of weights."""
        param = draw.choice(members(self.optimizer))[0]
        with torch.no_grad():
            param.copy_(values(draw.randrange(10**6), tuple(param.shape), param.dtype))
        self.oracle.written(self.optimizer)


TestSequences = Sequences.TestCase
TestSequences.settings = examples(100, stateful_step_count=25)
