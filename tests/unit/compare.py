"""Steps an optimizer and the reference side by side, and compares parameters and state after every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amos_dist import Amos
from amos_dist.reference import amos_step, widened_int8
from amos_dist.state import compute_dtype
from amos_dist.tables import seed_of_parameter

from ..conftest import TOLERANCES, Tolerance, relative_error

KINDS = ("factored", "row", "column", "scalar", "full")
# Odd sizes; 1 x n and n x 1; rows longer than a chunk of the kernels (4096); rows and columns beyond their unrolling.
SHAPES = ((), (1,), (37,), (5, 7), (1, 70), (70, 1), (67, 33), (3, 4999), (3, 4, 5), (6, 3, 3, 3), (2, 3, 2, 5, 3))
REFERENCE_KEYWORDS = set(inspect.signature(amos_step).parameters)


def new_state(param: Tensor, decay_init: float) -> dict[str, Any]:
    """The reference's state before the first step; it knows no `decay_init`, but goes on from the b that is there."""
    return {"decay": torch.tensor(decay_init, dtype=compute_dtype(param))} if decay_init else {}


Gradients = Callable[[int], Sequence[Tensor | None]]


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [(randn(i, *shape, dtype=dtype) / 2).requires_grad_() for i, shape in enumerate(shapes)]


def gradients(params: Sequence[Tensor]) -> Gradients:
    """Gradients of very different sizes from row to row and from step to step."""

    def at(t: int) -> list[Tensor | None]:
        result: list[Tensor | None] = []
        for i, param in enumerate(params):
            g = randn(1000 * t + i, *param.shape) * 0.3**t
            if param.dim() > 1:
                g *= torch.logspace(-2, 0, len(param)).view(-1, *[1] * (param.dim() - 1))
            result.append(g.to(param.dtype))
        return result

    return at


def assert_same(
    param: Tensor, state: dict[str, Any], expected: Tensor, expected_state: dict[str, Any], **how: Any
) -> None:
    """how: tolerance (default: the table's), where (for messages)."""
    tolerance: Tolerance = how.get("tolerance") or TOLERANCES[param.dtype]
    where = how.get("where", "")
    assert param.dtype == expected.dtype
    assert relative_error(param, expected) <= tolerance.param, where
    if param.dtype in (torch.bfloat16, torch.float16) and not how.get("tolerance"):
        # Rounded to nearest, ties to even, as torch does: few elements lie where the last bit of float32 decides.
        different = int((param != expected).logical_and(~expected.isnan()).sum())
        assert different <= 1 + 0.02 * param.numel(), where
    assert set(state) == set(expected_state), where
    assert int(state["step"]) == expected_state["step"], where
    for key, value in expected_state.items():
        if key == "step":
            continue
        assert state[key].dtype == value.dtype, f"{where}, {key}"
        if key == "momentum_scale" or value.dtype == torch.int8:
            assert_same_in_eight_bits(state, expected_state, where)
            continue
        bound = TOLERANCES[torch.bfloat16].param if value.dtype == torch.bfloat16 else tolerance.state
        assert relative_error(state[key], value) <= bound, f"{where}, {key}"


def assert_same_in_eight_bits(state: dict[str, Any], expected: dict[str, Any], where: str = "") -> None:
    """Few elements lie where the last bit of float32 decides, and these are rounded to the other neighbour."""
    scale, other = state["momentum_scale"].view(-1), expected["momentum_scale"]
    torch.testing.assert_close(scale, other, rtol=4e-5, atol=1e-30, equal_nan=True, msg=f"{where}, momentum_scale")
    levels, wanted = state["momentum"].view(-1), expected["momentum"].view(-1)
    unit = widened_int8(torch.ones_like(levels), other)
    apart = (widened_int8(levels, scale) - widened_int8(wanted, other)).abs() / unit
    assert not bool((apart > 1.01).any()), f"{where}, momentum"
    # A scale that is NaN makes any level NaN.
    assert int(((levels != wanted) & ~unit.isnan()).sum()) <= 1 + 0.02 * levels.numel(), f"{where}, momentum"


def follow(
    optimizer: Amos,
    params: Sequence[Tensor],
    grads: Gradients | None = None,
    steps: int = 4,
    tolerance: Tolerance | None = None,
    **changed: Any,
) -> None:
    """Compares `steps` steps of `optimizer` with the reference's. Settings are those of the groups, sigma a number.

    Args:
        grads: t -> a gradient for each parameter, or None for one that has none at this step.
        changed: settings that the groups do not show (those of rules).
    """
    grads = grads or gradients(params)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    expected = [param.detach().clone() for param in params]
    states: list[dict[str, Any]] = [{} for _ in params]
    for t in range(1, steps + 1):
        for i, (param, copy, state, grad) in enumerate(zip(params, expected, states, grads(t), strict=True)):
            param.grad = grad
            given = {**group_of[id(param)], **changed}
            settings = {key: value for key, value in given.items() if key in REFERENCE_KEYWORDS}
            settings["lr"] = float(settings["lr"])
            settings["seed"] = seed_of_parameter(settings["seed"], i)
            if grad is not None:
                state.update(state or new_state(param, given["decay_init"]))
                amos_step(copy, grad, state, **settings)
        optimizer.step()
        for i, (param, copy, state) in enumerate(zip(params, expected, states, strict=True)):
            if state:
                where = f"parameter {i} {tuple(param.shape)}, step {t}"
                assert_same(param, optimizer.state[param], copy, state, tolerance=tolerance, where=where)
                if state.get("momentum", copy).dtype == torch.int8:  # one other neighbour is no other training run
                    copy.copy_(param.detach())
                    state |= {key: value.clone() for key, value in optimizer.state[param].items() if key != "step"}
            else:
                assert torch.equal(param, copy), f"parameter {i} has no gradient and has moved"
