"""NaN and infinite gradients go where the reference lets them go: nowhere else, and no crash."""

from __future__ import annotations

import pytest
import torch

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

    optimizer = Amos(params, 0.05, sigma=0.3, moments=moments, momentum=0.9, clip_value=clip_value, fused=fused)
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

    follow(Amos(params, 0.05, sigma=0.3, moments="row"), params, grads, steps=3)
    assert params[0][0].isfinite().all() and params[1][2].isfinite().all()


def test_overflow_of_the_parameter() -> None:
    """A float16 parameter that grows beyond 65504 becomes infinite, as torch rounds it."""
    param = torch.full((2, 17), 60000.0, dtype=torch.float16).requires_grad_()
    follow(Amos([param], lr=0.1, sigma=65504.0, moments="row"), [param], lambda t: [-torch.ones_like(param)], steps=1)
    assert param.isinf().all()
