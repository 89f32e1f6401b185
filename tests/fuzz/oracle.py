"""What the reference makes of each parameter, beside an optimizer that goes through any sequence of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amos_dist import Amos
from amos_dist.reference import _measured, amos_step, nearest_int8, widened_int8
from amos_dist.state import compute_dtype
from amos_dist.tables import seed_of_parameter

from ..conftest import TOLERANCES, Tolerance
from ..unit.compare import REFERENCE_KEYWORDS, assert_same, new_state

LOW = (torch.bfloat16, torch.float16)
Rules = Callable[[str], dict[str, Any]]


class Oracle:
    """One reference state for each parameter, by its number: a copy of an optimizer has the same numbers.

    Args:
        optimizer: newly built, or nothing of it has stepped. rules: the keywords that rules give a parameter, by name.
    """

    def __init__(self, optimizer: Amos, rules: Rules = lambda name: {}) -> None:
        self.rules = rules
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.starts: list[float | None] = []  # b of each parameter when its state was made
        self.measured: list[float | None] = []
        self.built: list[float] = []  # the lr of each parameter's group when it was added
        self.add(optimizer)

    def add(self, optimizer: Amos) -> None:
        """Takes the parameters that are new."""
        for number, (param, name, group) in enumerate(members(optimizer)):
            if number < len(self.params):
                continue
            given = {**group, **self.rules(name)}
            self.params.append(param.detach().clone())
            self.states.append({})
            self.starts.append(None)
            auto = given["sigma"] == "auto" and param.numel()
            self.measured.append(_measured(param, given["row_dims"], "auto") if auto else None)
            self.built.append(float(group["lr"]))

    def written(self, optimizer: Amos) -> None:
        """Somebody else has written to the parameters."""
        for param, (theirs, _, _) in zip(self.params, members(optimizer), strict=True):
            param.copy_(theirs.detach())

    def follow(self, optimizer: Amos, make: Callable[[Tensor], Tensor | None], times: int, where: str = "") -> None:
        """So many steps, with gradients that `make` gives for a parameter; after each all must be alike."""
        for t in range(1, times + 1):
            draw_gradients(optimizer, make)
            self.step(optimizer)
            optimizer.step()
            self.check(optimizer, f"step {t}{where}")

    def settings(self, number: int, name: str, group: dict[str, Any]) -> dict[str, Any]:
        rule = self.rules(name)
        found = {key: value for key, value in {**group, **rule}.items() if key in REFERENCE_KEYWORDS}
        found["lr"] = float(group["lr"])
        if "lr" in rule:
            found["lr"] *= rule["lr"] / self.built[number]
        if found["sigma"] == "auto":
            found["sigma"] = self.measured[number] or 0.5  # a parameter without elements needs none
        if isinstance(found["momentum_dtype"], str):
            found["momentum_dtype"] = getattr(torch, found["momentum_dtype"])
        if self.params[number].dtype == torch.float64:
            found["momentum_dtype"] = None
        found["row_dims"] = int(found["row_dims"])  # 1.0 passes for 1
        found["seed"] = seed_of_parameter(found["seed"], number)
        return found

    def step(self, optimizer: Amos) -> None:
        """The step that the optimizer is about to take, or has taken; it must still have its gradients."""
        some = list(members(optimizer))
        if any(param.grad is not None for param, _, _ in some):
            self._note_starts(some)
            self._round_momentum(some)
        if self._is_trial(optimizer, some) or self._is_skipped(some):
            return
        for number, (param, name, group) in enumerate(some):
            if param.grad is None:
                continue
            copy, state = self.params[number], self.states[number]
            follow_weights(state, copy)
            state.update(state or new_state(copy, self.starts[number] or 0.0))
            amos_step(copy, param.grad, state, **self.settings(number, name, group))

    def _note_starts(self, some: list[tuple[Tensor, str, dict[str, Any]]]) -> None:
        """State is made by the first call that finds any gradient, also where no step follows."""
        for number, (param, name, group) in enumerate(some):
            if self.starts[number] is None and (param.requires_grad or param.grad is not None):
                self.starts[number] = float({**group, **self.rules(name)}["decay_init"])

    def _round_momentum(self, some: list[tuple[Tensor, str, dict[str, Any]]]) -> None:
        """Another momentum_dtype is taken at the next call, of all parameters; also where no step follows."""
        for number, (param, name, group) in enumerate(some):
            state, given = self.states[number], self.settings(number, name, group)
            if given["momentum"] and "momentum" in state:
                momentum, dtype = state["momentum"], given["momentum_dtype"] or compute_dtype(param)
                if momentum.dtype != dtype and momentum.dtype == torch.int8:
                    momentum = widened_int8(momentum.view(-1), state.pop("momentum_scale")).view(momentum.shape)
                if momentum.dtype != dtype and dtype == torch.int8:
                    momentum, state["momentum_scale"] = _narrowed(momentum)
                state["momentum"] = momentum.to(dtype)

    def _is_trial(self, optimizer: Amos, some: list[tuple[Tensor, str, dict[str, Any]]]) -> bool:
        """The first step, with lr=0 and gradients of zero, is none.

        What is frozen takes part, where a step that was skipped has left it a state.
        """
        pairs = list(zip(some, self.states, strict=True))
        taken = [(p, g, s) for (p, _, g), s in pairs if p.requires_grad or optimizer.state.get(p) or p.grad is not None]
        return all(not (g["capturable"] or float(g["lr"]) or s) for _, g, s in taken) and not any(
            bool(p.grad.any()) for p, _, _ in taken if p.grad is not None
        )

    def _is_skipped(self, some: list[tuple[Tensor, str, dict[str, Any]]]) -> bool:
        """A gradient is not finite where somebody looks."""
        for number, (param, name, group) in enumerate(some):
            if param.grad is not None and group["on_nonfinite"] != "ignore" and not group["capturable"]:
                clip = self.settings(number, name, group)["clip_value"]
                if not bool((param.grad if clip is None else param.grad.double().clamp(-clip, clip)).isfinite().all()):
                    return True
        return False

    def check(self, optimizer: Amos, where: str = "") -> None:
        """The optimizer's parameters and state are these.

        Rounding to few bits is continuous nowhere: what is kept in few bits is taken over, so that one element that was
        rounded to the other neighbour is one, and not another training run.
        """
        for number, (param, name, _) in enumerate(members(optimizer)):
            copy, expected = self.params[number], self.states[number]
            state = optimizer.state.get(param, {})
            here = f"{where} {name} {tuple(param.shape)} {param.dtype}"
            if not expected:
                assert torch.equal(param.detach(), copy) or bool(copy.isnan().any()), f"{here} has moved"
                assert not float(state.get("step", 0)), f"{here} has counted a step"
            elif not param.numel():
                assert float(state["step"]) == expected["step"], here
            else:
                table = TOLERANCES[param.dtype]
                # Several steps; sums of float32 over many rows, one after another; and of few numbers, which cancel.
                tall = (5 + param.numel() / 500) * slack_of_few(param.numel())
                # A step that is skipped may have made state, and taken weights that were written into the master.
                state = {k: v for k, v in state.items() if k in expected or (k != "master" and bool(v.any()))}
                if "momentum_scale" in expected and "momentum_scale" not in state:
                    # Loaded, and not stepped since: float32, of the very numbers that the 8 bits had.
                    state["momentum"], state["momentum_scale"] = _narrowed(state["momentum"])
                kept = dict(state)  # what was written reaches the optimizer's own master with its next step only
                follow_weights(state, param.detach())
                follow_weights(expected, copy)
                tolerance = Tolerance(table.param * (1 if param.dtype in LOW else tall), table.state * tall)
                assert_same(param, state, copy, expected, where=here, tolerance=tolerance)
                if param.dtype in LOW:
                    assert not (beyond := beyond_neighbours(param.detach(), copy, tolerance.state)), f"{here}: {beyond}"
                if param.dtype in LOW or expected.get("momentum", copy).dtype in (*LOW, torch.int8):
                    copy.copy_(param.detach())
                    expected.update({key: value.clone() for key, value in kept.items() if key != "step"})


def slack_of_few(numel: int) -> float:
    """How many times as far off sums of so few numbers may be: they may cancel."""
    return 1 + 20 / max(1, numel)


def _narrowed(momentum: Tensor) -> tuple[Tensor, Tensor]:
    """In 8 bits, as what is loaded becomes; and the scales."""
    levels, scale = nearest_int8(momentum.reshape(-1).float())
    return levels.view(momentum.shape), scale


def follow_weights(state: dict[str, Any], param: Tensor) -> None:
    """Weights that somebody has written reach the master, if there is one."""
    if "master" in state:
        master = state["master"]
        state["master"] = torch.where(master.to(param.dtype) == param, master, param.float())


def beyond_neighbours(param: Tensor, expected: Tensor, slack: float) -> int:
    """How many elements of a low-precision parameter are neither what is expected, nor next to it.

    Args:
        slack: what float32 may be off, beside the largest.
    """
    size = expected.double().abs()
    largest = size[expected.isfinite()].max() if expected.isfinite().any() else 0.0
    smallest = torch.finfo(param.dtype).tiny * torch.finfo(param.dtype).eps
    unit = torch.finfo(param.dtype).eps * size + smallest + slack * largest
    apart = (param.double() - expected.double()).abs() > unit
    return int((apart & expected.isfinite()).sum())


def members(optimizer: Amos) -> list[tuple[Tensor, str, dict[str, Any]]]:
    """Each parameter, its name and its group, in the order of their numbers."""
    found = []
    for group in optimizer.param_groups:
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):  # none, or loaded from a damaged file: torch takes them as they are
            names = [f"param[{len(found) + i}]" for i in range(len(group["params"]))]
        found += [(param, name, group) for param, name in zip(group["params"], names, strict=True)]
    return found


def draw_gradients(optimizer: Amos, make: Callable[[Tensor], Tensor | None]) -> None:
    for param, _, _ in members(optimizer):
        param.grad = make(param)
