"""The reference, against a few lines of numpy written from the paper, and what must hold for any input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import amos_dist
from amos_dist.reference import amos_step, effective_moments, matrix_view

from ..conftest import TOLERANCES, relative_error
from .compare import KINDS, randn

F64 = TOLERANCES[torch.float64]
AXES = {"row": 1, "column": 0, "scalar": (0, 1)}


def by_hand(theta: np.ndarray, grads: list[np.ndarray], moments: str, **given: Any) -> np.ndarray:
    """Algorithm 1 for a matrix, in the paper's letters: xi, eta (sigma), chi (clip_value), mu (momentum)."""
    xi, eta, beta = given["lr"], given["sigma"], given["beta"]
    chi, mu = given.get("clip_value", np.inf), given.get("momentum", 0)
    v = b = m = C = 0.0
    for t, raw in enumerate(grads, start=1):
        g = np.minimum(np.maximum(raw, -chi), chi)
        square = g**2
        if moments == "full":
            G = square
        elif moments == "factored":
            G = square.mean(axis=1, keepdims=True)
        else:
            G = square.mean(axis=AXES[moments], keepdims=True)
        v = beta * v + (1 - beta) * G
        per_element = v
        if moments == "factored":
            C = beta * C + (1 - beta) * square.mean(axis=0, keepdims=True)
            per_element = v * C / v.mean()  # R_i C_j / mean(R)
        debias = 1 - beta**t
        c = (1 + given.get("c_coef", 0.25) * xi**0.5 * b) ** -0.5
        d = 1 / (1 + given.get("d_coef", 0.25) * (xi * eta) ** 0.5 * b)
        gamma = c * xi**2 * G / (v / debias)
        sign = -1 if given.get("maximize") else 1
        l2 = gamma / 2 + given.get("extra_l2", 0)
        step = d * (xi * eta * sign * g / np.sqrt(per_element / debias) + l2 * theta)
        b = b + gamma * (1 + b)
        m = mu * m + (1 - mu) * step
        theta = theta - m
    return theta


@pytest.mark.parametrize("given", [
    {},
    {"momentum": 0.8},
    {"clip_value": 0.3},
    {"extra_l2": 0.2},
    {"c_coef": 2.0, "d_coef": 0.7},
    {"maximize": True},
    {"maximize": True, "momentum": 0.5, "extra_l2": 0.1, "clip_value": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("moments", KINDS)
def test_by_hand(moments: str, given: dict[str, Any]) -> None:
    settings = {"lr": 0.3, "sigma": 0.7, "beta": 0.8, **given}
    theta = randn(1, 3, 4, dtype=torch.float64)
    grads = [randn(t, 3, 4, dtype=torch.float64) for t in range(2, 6)]
    expected = by_hand(theta.numpy(), [g.numpy() for g in grads], moments, **settings)
    state: dict[str, Any] = {}
    for grad in grads:
        amos_step(theta, grad, state, moments=moments, **settings)
    assert relative_error(theta, torch.from_numpy(expected)) <= F64.param
    assert state["step"] == len(grads)


def test_first_step_in_plain_numbers() -> None:
    """t = 1: v_hat = g^2, so the step is xi sigma sign(g) + xi^2 theta / 2, and b is xi^2."""
    theta, state = torch.tensor([2.0], dtype=torch.float64), {}
    amos_step(theta, torch.tensor([-5.0], dtype=torch.float64), state, lr=0.1, sigma=0.5)
    assert theta.item() == pytest.approx(2 + 0.1 * 0.5 - 0.1**2 / 2 * 2, rel=1e-14)
    assert state["decay"].item() == pytest.approx(0.01, rel=1e-14)


def test_factored_with_flat_columns_is_row() -> None:
    """All columns with the same mean square: w is one, and nothing differs from "row"."""
    signs = randn(1, 8, 4, dtype=torch.float64).sign()
    rows = 2.0 ** torch.arange(-4, 4, dtype=torch.float64).view(8, 1)  # means of these are exact
    results = []
    for moments in ("factored", "row"):
        theta, state = randn(2, 8, 4, dtype=torch.float64), {}
        for t in range(3):
            amos_step(theta, 4.0**t * rows * signs, state, lr=0.3, sigma=0.4, moments=moments)
        results.append((theta, state["row_moment"], state["decay"]))
    for factored, row in zip(*results, strict=True):
        assert torch.equal(factored, row)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("moments", KINDS)
def test_zero_gradient_changes_nothing(moments: str, momentum: float, dtype: torch.dtype) -> None:
    theta, state = randn(1, 3, 4, dtype=dtype), {}
    before = theta.clone()
    for _ in range(3):
        amos_step(theta, torch.zeros_like(theta), state, lr=0.3, sigma=0.5, moments=moments, momentum=momentum)
    assert torch.equal(theta, before)
    assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))


def test_zero_gradient_with_extra_l2_shrinks() -> None:
    theta = torch.ones(3, 4, dtype=torch.float64)
    amos_step(theta, torch.zeros_like(theta), {}, lr=0.3, sigma=0.5, extra_l2=0.25)
    assert torch.equal(theta, torch.full_like(theta, 0.75))


def test_a_row_or_column_without_gradient_stays() -> None:
    theta, grad = randn(1, 4, 5), randn(2, 4, 5)
    grad[1], grad[:, 2] = 0, 0
    before, state = theta.clone(), {}
    amos_step(theta, grad, state, lr=0.3, sigma=0.5)
    assert torch.equal(theta[1], before[1])  # no decay either: b is per row
    assert theta.isfinite().all() and not torch.equal(theta[0], before[0])


@pytest.mark.parametrize("moments", KINDS)
def test_scale_of_the_gradient_does_not_matter(moments: str) -> None:
    results = []
    for scale in (1.0, 2.0**20):
        theta, state = randn(1, 3, 4, dtype=torch.float64), {}
        for t in range(3):
            amos_step(theta, scale * randn(t, 3, 4, dtype=torch.float64), state, lr=0.3, sigma=0.5, moments=moments)
        results.append(theta)
    assert torch.equal(*results)


def test_dtypes_of_state() -> None:
    for dtype, wide in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        theta, state = randn(1, 3, 4, dtype=dtype), {}
        amos_step(theta, randn(2, 3, 4, dtype=dtype), state, lr=0.1, sigma=0.5, momentum=0.9)
        assert theta.dtype == dtype
        assert {value.dtype for value in state.values() if isinstance(value, Tensor)} == {wide}


@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_vectors_are_scalar_unless_full(shape: tuple[int, ...], moments: str) -> None:
    assert effective_moments(shape, moments) == ("full" if moments == "full" else "scalar")
    state: dict[str, Any] = {}
    amos_step(randn(1, *shape), randn(2, *shape), state, lr=0.1, sigma=0.5, moments=moments)
    assert state["moment"].numel() == (torch.Size(shape).numel() if moments == "full" else 1)


def test_matrix_view() -> None:
    assert matrix_view((), 1) == (1, 1)
    assert matrix_view((2, 3, 4), 1) == (2, 12)
    assert matrix_view((2, 3, 4), 2) == (6, 4)


@pytest.mark.parametrize("moments", ["rows", "", None, "Factored"])
def test_unknown_moments(moments: Any) -> None:
    with pytest.raises(ValueError, match=r"moments=.* is unknown\. Use one of 'factored'"):
        amos_step(randn(1, 2, 3), randn(2, 2, 3), {}, lr=0.1, sigma=0.5, moments=moments)


@pytest.mark.parametrize(("shape", "row_dims"), [((2, 3), 0), ((2, 3), 2), ((2, 3, 4), 3), ((2, 3, 4), -1)])
@pytest.mark.parametrize("moments", ["factored", "row", "column"])
def test_bad_row_dims(moments: str, shape: tuple[int, ...], row_dims: int) -> None:
    theta, state = randn(1, *shape), {}
    before = theta.clone()
    with pytest.raises(ValueError, match=f"row_dims={row_dims} leaves no row or no column"):
        amos_step(theta, randn(2, *shape), state, lr=0.1, sigma=0.5, moments=moments, row_dims=row_dims)
    assert torch.equal(theta, before) and not state


def test_row_dims_does_not_matter_where_there_are_no_rows() -> None:
    for shape, moments in [((3,), "factored"), ((), "row"), ((2, 3), "scalar"), ((2, 3), "full")]:
        assert effective_moments(shape, moments, row_dims=2) in ("scalar", "full")


def test_sigma_auto_is_measured_once_as_the_optimizer_does() -> None:
    torch.manual_seed(0)
    for value in (torch.randn(4, 6), torch.zeros(4, 6), torch.randn(5)):
        state: dict[str, Any] = {}
        param = value.clone().requires_grad_()
        optimizer, expected = amos_dist.Amos([param], lr=0.1), value.clone()
        for _ in range(2):
            param.grad = torch.randn_like(value)
            optimizer.step()
            amos_step(expected, param.grad, state, lr=0.1)
        assert relative_error(param.detach(), expected) <= TOLERANCES[torch.float32].param
