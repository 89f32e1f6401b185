"""RelativeStep in one process: the closed forms of Su's rule, for each base optimizer."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import InverseSquareDecay, RelativeStep

from .bases import RATE, SIGMA, O, SignSGD, UncorrectedAdam, each_base, give_gradients, held, norm, params_of, train
from .compare import randn

# ---- closed forms ----------------------------------------------------------------------------------------------------


@each_base
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_step_is_a_share_of_the_scale(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    """|alpha_t u_t| = alpha_0 sqrt(k) sigma, whatever the size of the gradients."""
    params = params_of(dtype=dtype)
    optimizer = RelativeStep(make(params), lr=RATE, sigma=SIGMA, decay="none")
    for step, scale in enumerate((1.0, 1e-3, 100.0)):
        before = held(params)
        give_gradients(params, 10 * step, scale)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert norm(param - old) == pytest.approx(RATE * SIGMA * math.sqrt(param.numel()), rel=tolerance)


@each_base
def test_direction_is_the_bases_own(make: Any) -> None:
    params, twins = params_of(), params_of()
    optimizer, base = RelativeStep(make(params), lr=RATE, sigma=SIGMA, decay="none"), make(twins)
    for group in base.param_groups:
        group.update(lr=0.25, **({"weight_decay": 0.0} if "weight_decay" in group else {}))
    for step in range(4):
        before, old = held(params), held(twins)
        for some in (params, twins):
            give_gradients(some, 10 * step)
        optimizer.step()
        base.step()
        for param, start, twin, past in zip(params, before, twins, old, strict=True):
            moved, wanted = (param - start).detach(), (twin - past).detach()
            torch.testing.assert_close(moved / moved.norm(), wanted / wanted.norm(), rtol=1e-9, atol=1e-12)


@each_base
@pytest.mark.parametrize("q", [1.0, 3.0])
def test_without_a_gradient_it_shrinks(make: Any, q: float) -> None:
    """theta shrinks by exactly 1 - alpha_0^2 / (2 q)."""
    params = params_of()
    optimizer = RelativeStep(make(params), lr=RATE, sigma=SIGMA, q=q)
    for _ in range(3):
        before = held(params)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        assert all(
            torch.equal(param, old * (1 - RATE * RATE / (2 * q))) for param, old in zip(params, before, strict=True)
        )


@each_base
def test_both_together_in_one_update(make: Any) -> None:
    """theta' = theta - (alpha u + rho theta): the decay is of the old theta."""
    params, twins = params_of(), params_of()
    optimizer = RelativeStep(make(params), lr=RATE, sigma=SIGMA)
    alone = RelativeStep(make(twins), lr=RATE, sigma=SIGMA, decay="none")
    before = held(params)
    give_gradients(params)
    give_gradients(twins)
    optimizer.step()
    alone.step()
    for param, twin, old in zip(params, twins, before, strict=True):
        torch.testing.assert_close(param.detach(), twin.detach() - RATE**2 / 2 * old, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("of_base", [False, True])
def test_decay_by_a_scheduler(of_base: bool) -> None:
    """alpha_t = alpha_0 f(t), rho_t = alpha_0^2 / 2 f(t), so that alpha_t^2 falls as f^2."""
    params = params_of()
    optimizer = RelativeStep(O.AdamW(params), lr=RATE, sigma=SIGMA)
    scheduler = InverseSquareDecay(optimizer.base if of_base else optimizer, half_life=4)
    for t in range(9):
        f = 1 / (1 + (math.sqrt(2) - 1) * t / 4) ** 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(RATE * f)
        assert t != 8 or f == pytest.approx(0.2991, abs=5e-5)  # f(2 T)
        before = held(params)
        give_gradients(params, 10 * t)
        optimizer.step()
        scheduler.step()
        for param, old in zip(params, before, strict=True):
            moved = param.detach() - (1 - RATE**2 / 2 * f) * old
            assert norm(moved) == pytest.approx(RATE * f * SIGMA * math.sqrt(param.numel()), rel=1e-9)


def test_scale_as_initialized() -> None:
    """sigma="auto": the root mean square of the entries; sqrt(1 / fan_in) where they are zeros; 0.5 for vectors."""
    params = [*params_of(), torch.zeros(3, 8).double().requires_grad_(), torch.ones(6).double().requires_grad_()]
    wanted = [norm(p) / math.sqrt(p.numel()) for p in params[:2]] + [math.sqrt(1 / 8), 0.5]
    optimizer = RelativeStep(O.AdamW(params), lr=RATE, decay="none")
    for step in range(3):  # of what they were, not of what they are
        before = held(params)
        give_gradients(params, 10 * step)
        optimizer.step()
        for param, old, sigma in zip(params, before, wanted, strict=True):
            assert norm(param - old) == pytest.approx(RATE * sigma * math.sqrt(param.numel()), rel=1e-9)


@each_base
def test_lambs_norm(make: Any) -> None:
    """|alpha_t u_t| / |theta_t| = alpha_0, at every step."""
    params = params_of()
    optimizer = RelativeStep(make(params), lr=RATE, sigma="lamb", decay="none")
    for step in range(3):
        before = held(params)
        give_gradients(params, 10 * step)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert norm(param - old) / norm(old) == pytest.approx(RATE, rel=1e-12)


@pytest.mark.parametrize("norm_of", ["measured", "expected"])
def test_lamb_leaves_out(norm_of: str) -> None:
    """Vectors, which do not decay either; and a matrix of zeros moves as if its ratio were 1, but only then."""
    matrix, vector = torch.zeros(3, 4).double().requires_grad_(), randn(3, 6).double().requires_grad_()
    optimizer = RelativeStep(SignSGD([matrix, vector]), lr=RATE, sigma="lamb", norm=norm_of)
    before = held([vector])[0]
    give_gradients([matrix, vector])
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), -RATE * matrix.grad.sign())
    torch.testing.assert_close(vector.detach(), before - RATE * vector.grad.sign())
    old = held([matrix])[0]
    optimizer.step()
    assert norm(matrix - (1 - RATE**2 / 2) * old) == pytest.approx(RATE * norm(old), rel=1e-12)


def test_expected_norm() -> None:
    """SignSGD's direction has exactly sqrt(k), and so has Adam's first; later Adam's is shorter."""
    for make, steps in ((SignSGD, 3), (functools.partial(O.Adam, eps=0.0), 1)):
        params, twins = params_of(), params_of()
        train(RelativeStep(make(params), lr=RATE, norm="expected"), params, range(steps))
        train(RelativeStep(make(twins), lr=RATE), twins, range(steps))
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-14)
    params = params_of()
    optimizer = RelativeStep(O.AdamW(params), lr=RATE, sigma=SIGMA, norm="expected", decay="none")
    train(optimizer, params, range(3))
    before = held(params)
    train(optimizer, params, range(3, 4))
    assert all(
        0.1 < norm(p - b) / (RATE * SIGMA * math.sqrt(p.numel())) < 0.9 for p, b in zip(params, before, strict=True)
    )


def test_expected_norm_of_adafactor() -> None:
    """Its own relative step is undone: its direction has entries of about 1."""
    params = params_of((64, 64))
    optimizer = RelativeStep(O.Adafactor(params), lr=RATE, sigma=SIGMA, norm="expected", decay="none")
    for step in range(4):
        before = held(params)
        give_gradients(params, step)
        optimizer.step()
        assert norm(params[0] - before[0]) / (RATE * SIGMA * 64) == pytest.approx(1, rel=0.05)
    assert optimizer.param_groups[0]["eps"] == O.Adafactor(params).param_groups[0]["eps"]


def test_bias_correction_makes_no_difference() -> None:
    """The measured norm takes it out again."""
    params, twins = params_of(), params_of()
    train(RelativeStep(O.Adam(params, eps=0.0), lr=RATE), params, range(5))
    train(RelativeStep(UncorrectedAdam(twins), lr=RATE), twins, range(5))
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-10, atol=1e-12)


# ---- spectral decay --------------------------------------------------------------------------------------------------


def top(matrix: Tensor) -> Tensor:
    """sigma_1 u_1 v_1^T."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values[0] * torch.outer(left[:, 0], right[0])


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (4, 3, 2, 2)])
def test_spectral_decay(shape: tuple[int, ...]) -> None:
    """theta' = theta - rho sigma_1 u_1 v_1^T, once the power iteration has settled, here at a rate of 0."""
    (param,) = params_of(shape)
    optimizer = RelativeStep(O.SGD([param]), lr=RATE, decay="spectral", q=0.5)
    param.grad = torch.zeros_like(param)
    start = held([param])[0]
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(300):
        optimizer.step()
    assert torch.equal(param, start)
    optimizer.param_groups[0]["lr"] = RATE
    optimizer.step()
    expected = start.flatten(1) - RATE**2 * top(start.flatten(1))
    torch.testing.assert_close(param.detach().flatten(1), expected, rtol=1e-9, atol=1e-9)
    before, after = torch.linalg.svdvals(start.flatten(1)), torch.linalg.svdvals(param.detach().flatten(1))
    assert float(after[0]) == pytest.approx((1 - RATE**2) * float(before[0]), rel=1e-9)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-9, atol=1e-9)  # only the largest


def test_spectral_decay_follows_a_moving_matrix() -> None:
    params, twins = params_of((9, 6)), params_of((9, 6))
    for some in (params, twins):
        some[0].data += 4 * torch.outer(randn(2, 9), randn(3, 6))  # one singular value is far above the others
    optimizer = RelativeStep(O.AdamW(params), lr=0.02, decay="spectral")
    alone = RelativeStep(O.AdamW(twins), lr=0.02, decay="none")
    train(optimizer, params, range(100))
    twins[0].data.copy_(params[0].data)
    groups = alone.state_dict()["param_groups"]
    alone.load_state_dict(copy.deepcopy({**optimizer.state_dict(), "param_groups": groups}))
    before = held(params)[0]
    train(optimizer, params, range(100, 101))
    train(alone, twins, range(100, 101))
    taken = (twins[0] - params[0]).detach() / (0.02**2 / 2)
    assert norm(taken - top(before)) / norm(taken) < 0.05


def test_spectral_decay_of_rank_one_is_exact_at_once() -> None:
    (left, right) = params_of((6,), (4,))
    param = torch.outer(left, right).detach().requires_grad_()
    before = held([param])[0]
    param.grad = torch.zeros_like(param)
    RelativeStep(O.SGD([param]), lr=RATE, decay="spectral").step()
    torch.testing.assert_close(param.detach(), (1 - RATE**2 / 2) * before, rtol=1e-12, atol=1e-14)


def test_spectral_decay_of_vectors_and_zeros() -> None:
    """A vector is its own largest part. A matrix of zeros has none, and the iteration goes on from where it was."""
    vector, zeros = randn(1, 6).double().requires_grad_(), torch.zeros(3, 4).double().requires_grad_()
    before = held([vector])[0]
    for param in (vector, zeros):
        param.grad = torch.zeros_like(param)
    optimizer = RelativeStep(O.SGD([vector, zeros]), lr=RATE, decay="spectral")
    optimizer.step()
    assert torch.equal(vector, before * (1 - RATE * RATE / 2))
    assert not zeros.any()
    give_gradients([zeros])
    optimizer.step()
    assert zeros.isfinite().all() and zeros.any()
