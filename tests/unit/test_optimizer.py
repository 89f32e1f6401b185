"""The numbers of class Amos, native and in plain torch, are those of the reference: any kind, dtype, shape, setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos

from ..conftest import TOLERANCES, Tolerance
from .compare import KINDS, SHAPES, follow, gradients, parameters, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FEW = [(), (37,), (5, 7), (67, 33), (2, 3, 2, 5, 3)]
MATRICES = [shape for shape in SHAPES if len(shape) > 1]

fused_or_not = pytest.mark.parametrize("fused", [True, False], ids=["native", "fallback"])


@fused_or_not
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds(dtype: torch.dtype, moments: str, momentum: float, fused: bool) -> None:
    params = parameters(dtype)
    optimizer = Amos(params, lr=0.05, sigma=0.4, beta=0.9, moments=moments, momentum=momentum, fused=fused)
    follow(optimizer, params, steps=3)


SETTINGS: dict[str, dict[str, Any]] = {
    "maximize": {"maximize": True},
    "clip_value": {"clip_value": 0.02},
    "extra_l2": {"extra_l2": 0.01},
    "coefficients": {"c_coef": 3.0, "d_coef": 2.0},
    "bfloat16 momentum": {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    "beta 0": {"beta": 0.0},
    "decay_init": {"decay_init": 40.0},
    "lr 0": {"lr": 0.0},
    "large lr": {"lr": 1.0},
    "all": {"maximize": True, "clip_value": 0.05, "extra_l2": 0.01, "c_coef": 1.0, "momentum": 0.5},
}


@fused_or_not
@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting: str, moments: str, fused: bool) -> None:
    given = {"lr": 0.1, "sigma": 0.4, "beta": 0.9, **SETTINGS[setting]}
    params = parameters(torch.float32, FEW)
    # A momentum that is rounded to the other side moves its element by 2^-9 of a step.
    tolerance = Tolerance(param=2e-5, state=2e-6) if "momentum_dtype" in given else None
    follow(Amos(params, moments=moments, fused=fused, **given), params, steps=3, tolerance=tolerance)


eps_in_every_kind = pytest.mark.parametrize(
    "moments",
    [
        *KINDS,
    ],
)


@fused_or_not
@eps_in_every_kind
def test_eps(moments: str, fused: bool) -> None:
    """An eps that many second moments are below."""
    params = parameters(torch.float32, FEW)
    follow(Amos(params, lr=0.1, sigma=0.4, moments=moments, eps=1e-3, fused=fused), params)


@fused_or_not
@eps_in_every_kind
def test_gradients_smaller_than_eps(moments: str, fused: bool) -> None:
    """Squares that float32 cannot hold, or hardly."""
    params = parameters(torch.float32, FEW)
    tiny = lambda t: [g * 10.0 ** (-19 - t) for g in gradients(params)(t)]  # noqa: E731
    follow(Amos(params, lr=0.1, sigma=0.4, moments=moments, fused=fused), params, tiny)


@fused_or_not
@pytest.mark.parametrize("extra_l2", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("moments", KINDS)
def test_rows_and_columns_without_gradient(moments: str, dtype: torch.dtype, extra_l2: float, fused: bool) -> None:
    """Zeros in the first step, or in all; of a whole parameter, too: second moments of zero."""
    params = parameters(dtype, FEW)

    def grads(t: int) -> list[Tensor]:
        result = gradients(params)(t)
        result[3][5], result[3][:, 32] = 0, 0
        if t < 3:
            result[1][:], result[2][:, 1], result[2][3], result[3][:, ::2], result[4][:] = 0, 0, 0, 0, 0
        return result

    optimizer = Amos(params, 0.1, sigma=0.3, moments=moments, momentum=0.9, extra_l2=extra_l2, fused=fused)
    before = params[4].detach().clone()
    follow(optimizer, params, grads, steps=2)
    assert extra_l2 or torch.equal(params[4], before)
    follow(Amos(params, 0.1, sigma=0.3, moments=moments, extra_l2=extra_l2, fused=fused), params, grads, steps=4)
    assert all(param.isfinite().all() for param in params)


@fused_or_not
@pytest.mark.parametrize("row_dims", [1, 2, 3])
@pytest.mark.parametrize("moments", KINDS)
def test_row_dims(moments: str, row_dims: int, fused: bool) -> None:
    params = parameters(torch.float32, [shape for shape in SHAPES if len(shape) > row_dims])
    follow(Amos(params, 0.05, sigma=0.3, moments=moments, row_dims=row_dims, fused=fused), params)


@fused_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps(dtype: torch.dtype, fused: bool) -> None:
    params = parameters(dtype, [(9, 20), (37,)])
    optimizer = Amos(params, lr=0.1, sigma=0.4, beta=0.99, momentum=0.9, fused=fused)
    # An element that is rounded to the other side feels it in the next steps too.
    low = dtype in (torch.bfloat16, torch.float16)
    tolerance = Tolerance(2 * TOLERANCES[dtype].param, 1e-5) if low else None
    ready = [gradients(params)(t) for t in range(7)]
    follow(optimizer, params, lambda t: ready[t % 7], steps=100, tolerance=tolerance)


@fused_or_not
@pytest.mark.parametrize("moments", KINDS)
def test_decay_far_from_its_start(moments: str, fused: bool) -> None:
    """b large, so that c and d are far from one: what short runs hardly see."""
    params = parameters(torch.float64, MATRICES)
    optimizer = Amos(params, lr=0.9, sigma=0.4, moments=moments, fused=fused)
    follow(optimizer, params, lambda t: gradients(params)(t % 3), steps=30)
    assert all(optimizer.state[p]["decay"].max() > 5 for p in params)


# ---- memory: strides, offsets, nothing at all --------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def strided(x: Tensor) -> Tensor:
    apart = torch.zeros(*x.shape, 2, dtype=x.dtype)
    apart[..., 1] = x
    return apart[..., 1]


def unaligned(x: Tensor) -> Tensor:
    """Contiguous, but not from an address that a vector would like."""
    base = torch.zeros(x.numel() + 3, dtype=x.dtype)
    view = base[3:].view(x.shape)
    view.copy_(x)
    return view


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


@fused_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_grad", [channels_last, transposed, strided, unaligned, expanded, None])
@pytest.mark.parametrize("of_param", [channels_last, transposed, strided, unaligned])
def test_layouts(of_param: Any, of_grad: Any, dtype: torch.dtype, fused: bool) -> None:
    """One parameter for each kind of moments."""
    params = [of_param(p.detach()).requires_grad_() for p in parameters(dtype, [(6, 5, 3, 3)] * len(KINDS))]
    if of_param is not unaligned:
        assert not params[0].is_contiguous()
    groups = [{"params": [p], "moments": moments} for p, moments in zip(params, KINDS, strict=True)]

    def grads(t: int) -> list[Tensor | None]:
        return [of_grad(g) if of_grad and g is not None else g for g in gradients(params)(t)]

    follow(Amos(groups, 0.05, sigma=0.3, momentum=0.9, fused=fused), params, grads, steps=2)


@fused_or_not
@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_no_elements(shape: tuple[int, ...], moments: str, fused: bool) -> None:
    empty, full = torch.zeros(shape, requires_grad=True), randn(1, 3, 4).requires_grad_()
    optimizer = Amos([empty, full], lr=0.1, momentum=0.9, moments=moments, fused=fused)
    empty.grad, full.grad = torch.zeros(shape), randn(2, 3, 4)
    before = full.detach().clone()
    optimizer.step()
    assert empty.shape == shape and not torch.equal(full, before)


# ---- which parameters move ---------------------------------------------------------------------------------


@fused_or_not
@pytest.mark.parametrize("moments", KINDS)
def test_each_has_its_own_step_number(moments: str, fused: bool) -> None:
    """A parameter without a gradient waits: its t does not move, so its bias correction starts later."""
    params = parameters(torch.float32)

    def grads(t: int) -> list[Tensor | None]:
        return [g if (t + i) % 3 else None for i, g in enumerate(gradients(params)(t))]

    follow(Amos(params, 0.05, sigma=0.3, moments=moments, momentum=0.9, fused=fused), params, grads, steps=6)


@fused_or_not
def test_unused_in_one_dtype_only(fused: bool) -> None:
    params = [randn(1, 3, 4).requires_grad_(), randn(2, 3, 4).bfloat16().requires_grad_()]
    follow(Amos(params, 0.05, sigma=0.3, fused=fused), params, lambda t: [randn(t, 3, 4), None])


@fused_or_not
def test_frozen_parameters_stay_and_can_be_thawed(fused: bool) -> None:
    params = parameters(torch.float32, [(3, 4), (4, 5)])
    params[1].requires_grad_(False)
    before = params[1].clone()
    optimizer = Amos(params, lr=0.1, sigma=0.3, fused=fused)
    for _ in range(2):
        params[0].grad = randn(1, 3, 4)
        optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state
    params[1].requires_grad_()
    params[1].grad = randn(2, 4, 5)
    optimizer.step()
    assert not torch.equal(params[1], before)
    assert int(optimizer.state[params[0]]["step"]) == 3 and int(optimizer.state[params[1]]["step"]) == 1


@fused_or_not
def test_mixed_dtypes_and_groups_with_their_own_settings(fused: bool) -> None:
    shapes = [(5, 7), (37,), (3, 4, 5)]
    params = [p for dtype in DTYPES for p in parameters(dtype, shapes)]
    groups: list[dict[str, Any]] = [
        {"params": params[:4], "lr": 0.02, "moments": "row", "momentum": 0.9},
        {"params": params[4:5], "sigma": 1.0, "beta": 0.5, "moments": "full", "extra_l2": 0.1},
        {"params": params[5:9], "clip_value": 0.1, "c_coef": 1.0, "d_coef": 0.0, "moments": "column"},
        {"params": params[9:], "maximize": True, "moments": "row", "eps": 1e-4},
    ]
    follow(Amos(groups, lr=0.1, sigma=0.3, fused=fused), params)


@fused_or_not
def test_settings_follow_a_schedule(fused: bool) -> None:
    """Every number of a group may change between steps."""
    params = parameters(torch.float32)
    optimizer = Amos(params, lr=0.1, sigma=0.3, momentum=0.9, fused=fused)

    def grads(t: int) -> list[Tensor | None]:
        group = optimizer.param_groups[0]
        group.update(lr=0.1 / t, sigma=0.3 + 0.1 * t, beta=1 - 0.2 / t, momentum=0.5 + 0.1 * t, extra_l2=0.01 * t)
        return gradients(params)(t)

    follow(optimizer, params, grads)


@fused_or_not
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_take_low_precision_gradients(low: torch.dtype, fused: bool) -> None:
    params = parameters(torch.float32, FEW)
    for param in params:
        param.grad_dtype = None
    grads = lambda t: [g.to(low) for g in gradients(params)(t)]  # noqa: E731
    follow(Amos(params, 0.05, sigma=0.3, fused=fused), params, grads)


@pytest.mark.parametrize(
    "fused",
    [False, True],
)
def test_gradients_of_several_dtypes(fused: bool) -> None:
    params = parameters(torch.float32, [(5, 7), (37,), (4, 6)])
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for param in params:
        param.grad_dtype = None
    grads = lambda t: [g.to(dtype) for g, dtype in zip(gradients(params)(t), dtypes, strict=True)]  # noqa: E731
    follow(Amos(params, 0.05, sigma=0.3, fused=fused), params, grads)


# ---- what the state looks like -----------------------------------------------------------------------------

STATE_SHAPES = {  # of a (4, 3, 2) parameter with row_dims = 1
    "factored": {"row_moment": (4, 1, 1), "column_moment": (1, 3, 2), "decay": (4, 1, 1)},
    "row": {"row_moment": (4, 1, 1), "decay": (4, 1, 1)},
    "column": {"column_moment": (1, 3, 2), "decay": (1, 3, 2)},
    "scalar": {"moment": (1, 1, 1), "decay": (1, 1, 1)},
    "full": {"moment": (4, 3, 2), "decay": (4, 3, 2)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moments", KINDS)
def test_state(moments: str, dtype: torch.dtype) -> None:
    param = randn(1, 4, 3, 2, dtype=dtype).requires_grad_()
    optimizer = Amos([param], lr=0.1, moments=moments, momentum=0.9)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = dict(optimizer.state[param])
    step = state.pop("step")
    assert step.shape == () and step.dtype == torch.float32 and step == 1
    expected = {**STATE_SHAPES[moments], "momentum": (4, 3, 2)}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in state.values()} == {wide}


def test_momentum_dtype_for_each() -> None:
    params = [randn(1, 3, 4).requires_grad_(), randn(2, 3, 4).bfloat16().requires_grad_()]
    double = randn(3, 3, 4).double().requires_grad_()
    optimizer = Amos([*params, double], lr=0.1, momentum=0.9, momentum_dtype="bfloat16")
    for param in (*params, double):
        param.grad = torch.ones_like(param)
    optimizer.step()
    dtypes = [optimizer.state[p]["momentum"].dtype for p in (*params, double)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float64]


def test_state_for_the_unused_too() -> None:
    """A checkpoint must be complete whichever gradients there were."""
    used, unused = randn(1, 3, 4).requires_grad_(), randn(2, 3, 4).requires_grad_()
    optimizer = Amos([used, unused], lr=0.1)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert set(optimizer.state[unused]) == set(optimizer.state[used])
    assert optimizer.state[unused]["step"] == 0


@fused_or_not
def test_half_subnormals_survive_flushing(fused: bool | None) -> None:
    """Some programs tell the processor to flush subnormal floats to zero: float16's are not subnormal in float32."""
    values = torch.tensor([3e-5, -6e-8, 6.0e-5, 1.0], dtype=torch.float16)
    param = values.clone().requires_grad_()
    param.grad = torch.zeros_like(param)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        Amos([param], lr=0.01, sigma=0.5, fused=fused).step()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(param.detach(), values)
