"""NaN and infinite gradients: no parameter is stepped, or, unchecked, they go where the reference lets them go."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos

from .compare import KINDS, follow, gradients, parameters, randn

SHAPES = [(5, 70), (37,), (3, 4, 5)]


@pytest.mark.parametrize("fused", [True, False], ids=["native", "fallback"])
@pytest.mark.parametrize("clip_value", [None, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
@pytest.mark.parametrize("moments", KINDS)
def test_where_it_goes(moments: str, value: float, clip_value: float | None, fused: bool) -> None:
    params = parameters(torch.float32, SHAPES)

    def grads(t: int) -> list[torch.Tensor]:
        result = gradients(params)(t)
        if t == 2:  # in a vector's body and in a row's tail
            result[0][1, 3], result[0][3, 69], result[1][36], result[2][2, 3, 4] = value, value, value, value
        return result

    keywords: dict[str, Any] = {"momentum": 0.9, "clip_value": clip_value, "fused": fused, "on_nonfinite": "ignore"}
    optimizer = Amos(params, 0.05, sigma=0.3, moments=moments, **keywords)
    follow(optimizer, params, grads, steps=3)
    if value != value:
        assert params[0][1, 3].isnan() and params[1][36].isnan()
        if moments in ("row", "column", "full"):
            assert params[0][0, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    """NaN and infinities keep their kind when they are widened and rounded."""
    params = [randn(1, 4, 40, dtype=dtype).requires_grad_(), randn(2, 3, 40, dtype=dtype).requires_grad_()]
    with torch.no_grad():
        params[1][0, 0], params[1][0, 39], params[1][1, 1] = float("inf"), float("-inf"), float("nan")

    def grads(t: int) -> list[torch.Tensor]:
        result = [randn(10 * t, 4, 40, dtype=dtype), randn(10 * t + 1, 3, 40, dtype=dtype)]
        if t == 2:
            result[0][1, 1], result[0][2, 39] = float("inf"), float("nan")
        return result

    follow(Amos(params, 0.05, sigma=0.3, moments="row", on_nonfinite="ignore"), params, grads, steps=3)
    assert params[0][0].isfinite().all() and params[1][2].isfinite().all()


def test_overflow_of_the_parameter() -> None:
    """A float16 parameter that grows beyond 65504 becomes infinite, as torch rounds it."""
    param = torch.full((2, 17), 60000.0, dtype=torch.float16).requires_grad_()
    follow(Amos([param], lr=0.1, sigma=65504.0, moments="row"), [param], lambda t: [-torch.ones_like(param)], steps=1)
    assert param.isinf().all()


def mixed() -> list[Tensor]:
    """Several dtypes, so several calls of the kernels, and matrices, vectors and a scalar in each."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    shapes = [(5, 70), (37,), (3, 4, 5), (1, 9), ()]
    return [randn(10 * i + j, *s, dtype=d).requires_grad_() for i, d in enumerate(dtypes) for j, s in enumerate(shapes)]


def give(params: list[Tensor], step: int) -> None:
    for i, param in enumerate(params):
        param.grad = randn(1000 * step + i, *param.shape, dtype=param.dtype)


def everything(optimizer: Amos, params: list[Tensor]) -> list[Tensor]:
    states = [optimizer.state[p] for p in params]
    return [each.detach().clone() for each in (*params, *(v for state in states for v in state.values()))]


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("fused", [True, False], ids=["native", "fallback"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
@pytest.mark.parametrize("moments", KINDS)
def test_skips(moments: str, value: float, fused: bool) -> None:
    """Whichever parameter has it: nothing changes, and the steps after it are as if it had not been."""
    one, other = mixed(), mixed()
    keywords: dict[str, Any] = {"moments": moments, "momentum": 0.9, "master_weights": True, "fused": fused}
    optimizer, never = Amos(one, 0.05, sigma=0.3, **keywords), Amos(other, 0.05, sigma=0.3, **keywords)
    skipped = 0
    for step in range(4):
        for each in (one, other):
            give(each, step)
        optimizer.step()
        never.step()
        for bad in one[step::4]:
            if value == 1e30 and bad.dtype == torch.float64:  # its square is a number there
                continue
            before = everything(optimizer, one)
            good = bad.grad
            assert good is not None
            bad.grad = good.clone()
            bad.grad.view(-1)[-1] = value
            optimizer.step()
            bad.grad = good
            skipped += 1
            assert optimizer.skipped_steps == skipped
            for a, b in zip(before, everything(optimizer, one), strict=True):
                assert torch.equal(a, b)
    for a, b in zip(everything(optimizer, one), everything(never, other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:the gradient of")
@pytest.mark.parametrize("moments", KINDS)
def test_what_is_left_of_a_skipped_step_does_not_count(moments: str) -> None:
    """The parameter that had it has no gradient in the next step."""
    params = mixed()
    optimizer = Amos(params, 0.05, sigma=0.3, moments=moments)
    give(params, 0)
    assert params[0].grad is not None
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    give(params, 1)
    params[0].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(params[1], before)
    assert float(optimizer.state[params[0]]["step"]) == 0


def test_raises() -> None:
    params = [("first", randn(1, 4, 5).requires_grad_()), ("second.weight", randn(2, 6).requires_grad_())]
    optimizer = Amos(params, 0.05, sigma=0.3, on_nonfinite="raise")
    tensors = [tensor for _, tensor in params]
    give(tensors, 0)
    optimizer.step()
    before = everything(optimizer, tensors)
    assert tensors[1].grad is not None
    tensors[1].grad[3] = float("inf")
    with pytest.raises(RuntimeError, match=r"'second.weight' is not finite.*\. Nothing has changed"):
        optimizer.step()
    for a, b in zip(before, everything(optimizer, tensors), strict=True):
        assert torch.equal(a, b)
    give(tensors, 1)
    optimizer.step()
    assert not torch.equal(tensors[0], before[0])


def test_says_so_once_and_counts() -> None:
    params = [("a", randn(1, 4, 5).requires_grad_())]
    optimizer = Amos(params, 0.05, sigma=0.3)
    params[0][1].grad = torch.full((4, 5), float("nan"))
    with pytest.warns(UserWarning, match="the gradient of 'a' is not finite") as told:
        optimizer.step()
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped_steps == copy.deepcopy(optimizer).skipped_steps == 2


def test_what_is_clipped_is_finite() -> None:
    """clip_value bounds an infinity before anything else; of NaN nothing is known."""
    params = [randn(1, 4, 5).requires_grad_()]
    optimizer = Amos(params, 0.05, sigma=0.3, moments="row", clip_value=0.5)
    params[0].grad = torch.full((4, 5), float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert params[0].isfinite().all()


def test_any_group_can_ask() -> None:
    """A group that is not looked at does not make others skip; one that raises is heard."""
    calm, strict = randn(1, 4, 5).requires_grad_(), randn(2, 4, 5).requires_grad_()
    groups = [{"params": [calm], "on_nonfinite": "ignore"}, {"params": [strict], "on_nonfinite": "raise"}]
    optimizer = Amos(groups, 0.05, sigma=0.3)
    give([calm, strict], 0)
    assert calm.grad is not None and strict.grad is not None
    calm.grad[0, 0] = float("nan")
    optimizer.step()
    assert calm[0, 0].isnan() and strict.isfinite().all()
    strict.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    optimizer.param_groups[1]["on_nonfinite"] = "skip"
    with pytest.warns(UserWarning, match="no parameter was stepped"):
        optimizer.step()
    with pytest.raises(ValueError, match="on_nonfinite='never' is unknown"):
        Amos([calm], 0.05, on_nonfinite="never")
    with pytest.raises(TypeError, match="on_nonfinite"):
        Amos([("a", calm)], 0.05, rules=[{"match": "a", "on_nonfinite": "raise"}])
