"""bfloat16 and float16 parameters: float32 masters in the state, and stochastic rounding."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from amos_dist import Amos, fallback
from amos_dist.reference import stochastic_bfloat16
from amos_dist.tables import seed_of_parameter

from ..conftest import TOLERANCES
from .compare import KINDS, follow, gradients, parameters, randn
from .tables import make_case

native = torch.ops.amos_dist
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KEYWORDS: dict[str, Any] = {"lr": 0.05, "sigma": 0.3, "beta": 0.9}

# ---- masters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_master_follows_the_reference(dtype: torch.dtype, kind: str, momentum: float, fused: bool) -> None:
    params = parameters(dtype)
    optimizer = Amos(params, moments=kind, momentum=momentum, master_weights=True, fused=fused, **KEYWORDS)
    follow(optimizer, params, tolerance=TOLERANCES[dtype])
    for param in params:
        master = optimizer.state[param]["master"]
        assert master.dtype == F32 and torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_master_is_the_float32_run(dtype: torch.dtype) -> None:
    """With gradients that do not depend on it, the master is what a float32 parameter would be, to the bit."""
    low, wide = parameters(dtype), [param.detach().float().requires_grad_() for param in parameters(dtype)]
    optimizers = Amos(low, master_weights=True, **KEYWORDS), Amos(wide, **KEYWORDS)
    for t in range(1, 5):
        for a, b, grad in zip(low, wide, gradients(low)(t), strict=True):
            a.grad, b.grad = grad, grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(optimizers[0].state[a]["master"], b) for a, b in zip(low, wide, strict=True))


def test_master_of_a_float32_parameter_is_none() -> None:
    param = torch.ones(3, 4, requires_grad=True)
    param.grad = torch.ones(3, 4)
    optimizer = Amos([param], master_weights=True, **KEYWORDS)
    optimizer.step()
    assert "master" not in optimizer.state[param]


def test_master_survives_a_checkpoint() -> None:
    def steps(optimizer: Amos, params: list[torch.Tensor], at: range) -> None:
        for t in at:
            for param, grad in zip(params, gradients(params)(t), strict=True):
                param.grad = grad
            optimizer.step()

    params = parameters(BF16)
    optimizer = Amos(params, master_weights=True, **KEYWORDS)
    steps(optimizer, params, range(1, 4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    steps(optimizer, params, range(4, 7))
    again = [weight.requires_grad_() for weight in weights]
    resumed = Amos(again, master_weights=True, **KEYWORDS)
    resumed.load_state_dict(saved)
    assert resumed.state[again[3]]["master"].dtype == F32
    steps(resumed, again, range(4, 7))
    for a, b in zip(params, again, strict=True):
        assert torch.equal(a, b) and torch.equal(optimizer.state[a]["master"], resumed.state[b]["master"])


def test_master_of_another_shape_is_refused() -> None:
    params = parameters(BF16)
    optimizer = Amos(params, master_weights=True, **KEYWORDS)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["master"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"the state 'master' of 'param\[3\]' has shape \(2, 2\), expected \(5, 7\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("low", [BF16, F16])
@pytest.mark.parametrize("momentum_dtype", [None, F32, BF16])
def test_low_param_in_the_op(low: torch.dtype, momentum_dtype: torch.dtype | None) -> None:
    """Both phases of a cut parameter, and the one of a whole one, write the rounded parameter."""
    for cut in (True, False):
        case = make_case(5, ("factored", "row", "column"), F32, low, momentum_dtype, cut=cut, low=True)
        for op in ("sums_", "slots_", "update_") if cut else ("step_",):
            getattr(native, op)(*case.arguments(op))
        held = [(case.param[b[0]], case.low_param[b[0]], slice(b[1], b[1] + b[2] * b[3])) for b in case.blocks.tolist()]
        assert all(torch.equal(param[part].to(low), copied[part]) for param, copied, part in held)


# ---- stochastic rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum_dtype", "stochastic"), [(None, True), (F32, True), (BF16, True), (torch.int8, True), (torch.int8, False)]
)
@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_cut_pieces(seed: int, momentum_dtype: torch.dtype | None, stochastic: bool) -> None:
    """The kernels' random numbers are the reference's, to the bit, wherever a piece begins."""
    case = make_case(seed, ("factored", "row", "column"), BF16, BF16, momentum_dtype, stochastic=stochastic)
    case.hyper[:, 10] = 1  # to maximize, the kernels give A the sign and plain torch the gradient
    for op in ("sums_", "slots_"):
        getattr(native, op)(*case.arguments(op))
    twin = case.clone()
    native.update_(*case.arguments("update_"))
    fallback.update_(*twin.arguments("update_"))
    assert all(map(torch.equal, case.changed(), twin.changed()))


@pytest.mark.parametrize("first", [0, 2**32 - 37, 2**32 + 5, 2**40 - 50, 2**62])
def test_rounding_of_huge_parameters(first: int) -> None:
    """Elements are counted in 64 bits, also where the lower 32 overflow inside a vector."""
    case = make_case(1, ("row",), BF16, BF16, cut=False, stochastic=True, largest=90)
    case.blocks[:, 15] = first
    twin = case.clone()
    for op in ("sums_", "slots_", "update_"):
        getattr(native, op)(*case.arguments(op))
        getattr(fallback, op)(*twin.arguments(op))
    different = sum(int((a != b).sum()) for a, b in zip(case.param, twin.param, strict=True))
    assert different <= 2  # where the last bit of float32 decides


def test_rounding_is_unbiased() -> None:
    """Up as often as the cut-off part says, independently from element to element, step to step and seed to seed."""
    n, draw = 1 << 16, random.Random(0)
    index = torch.arange(n)
    for part in (0.1, 0.5, 0.77):
        values = torch.full((n,), 1 + part / 128)
        ups = []
        for _ in range(4):
            rounded = stochastic_bfloat16(values, index, draw.randrange(2**32), draw.randrange(1, 10**6)).float()
            assert set(rounded.unique().tolist()) <= {1.0, 1 + 1 / 128}
            ups.append((rounded > 1).double())
            deviation = 4.5 * (part * (1 - part) / n) ** 0.5
            assert abs(float(ups[-1].mean()) - part) < deviation
        pairs = [(ups[0][:-1], ups[0][1:]), (ups[0][:-64], ups[0][64:]), (ups[0], ups[1]), (ups[2], ups[3])]
        for a, b in pairs:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4.5 / n**0.5


def test_rounding_of_special_values() -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -3.5, 2.0**-130])
    for t in range(1, 30):
        rounded = stochastic_bfloat16(values, torch.arange(7), 5, t)
        assert torch.equal(rounded[:4], values[:4].bfloat16()) and rounded[4].isnan() and rounded[5] == -3.5


@pytest.mark.parametrize("fused", [True, False])
def test_small_steps_are_not_lost(fused: bool) -> None:
    """A step of a thousandth of the spacing of bfloat16s: rounding to nearest never moves, by chance the mean does."""
    moved = {}
    for stochastic in (False, True):
        param = torch.ones(64, 64, dtype=BF16, requires_grad=True)
        optimizer = Amos([param], 1e-4, sigma=0.1, stochastic_rounding=stochastic, fused=fused)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[stochastic] = 1 - float(param.detach().double().mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(50 * 1e-4 * 0.1, rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_follows_the_reference(kind: str) -> None:
    params = parameters(BF16)
    follow(Amos(params, moments=kind, stochastic_rounding=True, seed=7, **KEYWORDS), params)


def test_seeds() -> None:
    grad = randn(3, 40, 40).bfloat16()

    def run(seed: int) -> list[torch.Tensor]:
        params = [torch.ones(40, 40, dtype=BF16, requires_grad=True) for _ in range(2)]
        optimizer = Amos(params, stochastic_rounding=True, seed=seed, **KEYWORDS)
        for param in params:
            param.grad = grad
        optimizer.step()
        return params

    first, same, other = run(1), run(1), run(2)
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])  # parameters have numbers of their own
    assert len({seed_of_parameter(seed, key) for seed in range(100) for key in range(100)}) == 10000
