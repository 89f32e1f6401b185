"""RelativeStep in one process: the closed forms of Su's rule, for each base optimizer, and an optimizer's duties."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos, InverseSquareDecay, RelativeStep, relative_parts

from .compare import randn

SHAPES = ((7, 5), (4, 9))
RATE, SIGMA = 0.1, 0.02


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam without bias correction."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * p.grad
                state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * p.grad.square()
                p.sub_(state["m"] / state["v"].sqrt().clamp(min=1e-300), alpha=group["lr"])


class SignSGD(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


O = torch.optim
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": O.SGD,
    "momentum": functools.partial(O.SGD, momentum=0.9),
    "Nesterov": functools.partial(O.SGD, momentum=0.9, nesterov=True),
    "Adam": O.Adam,
    "Adam, up": functools.partial(O.Adam, maximize=True),
    "AdamW": O.AdamW,
    "AdamW, fused": functools.partial(O.AdamW, fused=True),
    "AdamW, foreach": functools.partial(O.AdamW, foreach=True),
    "Adam without bias correction": UncorrectedAdam,
    "Adafactor": O.Adafactor,
    "Muon": O.Muon,
}
each_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(shapes or SHAPES)]


def give_gradients(params: list[Tensor], seed: int = 50, scale: float = 1.0) -> None:
    for i, param in enumerate(params):
        param.grad = (scale * randn(seed + i, *param.shape)).to(param.dtype)


def held(params: list[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range, scheduler: Any = None) -> None:
    for step in steps:
        give_gradients(params, 100 * step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


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


# ---- an optimizer like any other -------------------------------------------------------------------------------------


@each_base
def test_the_bases_own_rate_and_decay_take_no_part(make: Any) -> None:
    params, twins = params_of(), params_of()
    optimizer, other = make(params), make(twins)
    for group in other.param_groups:
        group.update(lr=7.0, weight_decay=0.3) if "weight_decay" in group else group.update(lr=7.0)
    train(RelativeStep(optimizer, lr=RATE), params, range(3))
    train(RelativeStep(other, lr=RATE), twins, range(3))
    assert all(map(torch.equal, params, twins))


@each_base
@pytest.mark.parametrize("decay", ["weights", "spectral"])
@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle"])
def test_resume(make: Any, decay: str, way: str) -> None:
    """To the bit: the base's state, sigma as measured then, the rate and the power iteration."""

    def build(params: list[Tensor], half_life: float) -> tuple[RelativeStep, Any]:
        optimizer = RelativeStep(make(params), lr=RATE, decay=decay)
        return optimizer, InverseSquareDecay(optimizer, half_life)

    params = params_of()
    optimizer, scheduler = build(params, 3.0)
    train(optimizer, params, range(3), scheduler)
    if way == "file":
        file = io.BytesIO()
        torch.save([held(params), optimizer.state_dict(), scheduler.state_dict()], file)
        file.seek(0)
        weights, state, schedule = torch.load(file)
        again = [weight.requires_grad_() for weight in weights]
        resumed, follower = build(again, 9.0)
        follower.load_state_dict(schedule)
        resumed.load_state_dict(state)
    else:
        clone = copy.deepcopy if way == "deepcopy" else lambda pair: pickle.loads(pickle.dumps(pair))
        resumed, follower = clone((optimizer, scheduler))
        again = resumed.param_groups[0]["params"]
    assert resumed.base.param_groups is resumed.param_groups
    assert resumed.base.state is resumed.state
    assert not any("spectral_vector" in state for state in resumed.state.values())  # the base would count it as its own
    train(optimizer, params, range(3, 6), scheduler)
    train(resumed, again, range(3, 6), follower)
    assert all(map(torch.equal, params, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once; the power iteration is float32, also after loading."""
    params = params_of(dtype=dtype)
    optimizer = RelativeStep(O.SGD(params), lr=1.0, sigma=1.0, decay="spectral")
    start = held(params)
    train(optimizer, params, range(1))
    reference = params_of(dtype=torch.float32)
    for param, old in zip(reference, start, strict=True):
        param.data.copy_(old)
    exact = RelativeStep(O.SGD(reference), lr=1.0, sigma=1.0, decay="spectral")
    for param, twin in zip(params, reference, strict=True):
        twin.grad = param.grad.float()
    exact.step()
    for param, twin in zip(params, reference, strict=True):
        torch.testing.assert_close(param.float(), twin.detach(), rtol=2**-7, atol=2**-7)
    saved = optimizer.state_dict()
    assert saved["state"][0]["spectral_vector"].dtype == torch.float32
    again = params_of(dtype=dtype)
    resumed = RelativeStep(O.SGD(again), lr=1.0)
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state_dict()["state"][0]["spectral_vector"], saved["state"][0]["spectral_vector"])
    assert resumed.param_groups[0]["decay"] == "spectral"


def test_groups_have_their_own_keywords() -> None:
    first, second, third = params_of((3, 4), (5, 2), (4, 4))
    base = O.AdamW([{"params": [first], "sigma": 0.5, "decay": "none", "lr": 0.3}, {"params": [second], "lr": 0.2}])
    optimizer = RelativeStep(base, sigma=0.1, decay="none")
    optimizer.add_param_group({"params": [third], "lr": 0.1, "sigma": "lamb"})
    assert [len(group["params"]) for group in base.param_groups] == [1, 1, 1]
    before = held([first, second, third])
    give_gradients([first, second, third])
    optimizer.step()
    moved = [norm(p - old) for p, old in zip((first, second, third), before, strict=True)]
    wanted = [0.3 * 0.5 * math.sqrt(12), 0.2 * 0.1 * math.sqrt(10), 0.1 * norm(before[2])]
    assert moved == pytest.approx(wanted, rel=1e-9)


def test_a_group_that_cannot_be_added_changes_nothing() -> None:
    params, (other,) = params_of(), params_of((3, 3))
    optimizer = RelativeStep(O.AdamW(params), lr=RATE)
    with pytest.raises(ValueError, match="sigma=-1 is out of range"):
        optimizer.add_param_group({"params": [other], "sigma": -1})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 1
    optimizer.add_param_group({"params": [other]})
    assert optimizer.param_groups[1]["lr"] == RATE


def test_parameters_without_a_gradient_stay() -> None:
    params = params_of((3, 4), (5, 2), (4, 4))
    params[2].requires_grad_(False)
    optimizer = RelativeStep(O.AdamW(params), lr=RATE)
    before = held(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [False, True, True]
    assert len(optimizer.state[params[1]]) == 0
    optimizer.zero_grad()
    assert params[0].grad is None
    optimizer.step()
    assert torch.equal(params[1], before[1])


def test_buckets_make_no_difference(monkeypatch: Any) -> None:
    """The base steps some tensors at a time, so that zeros for all of them are not needed at once."""
    params, twins = params_of((3, 4), (5, 2), (4, 4)), params_of((3, 4), (5, 2), (4, 4))

    def groups(some: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": some[:2], "sigma": 0.3}, {"params": some[2:]}]

    train(RelativeStep(O.AdamW(groups(params)), lr=RATE, decay="spectral"), params, range(3))
    monkeypatch.setattr(relative_parts, "LARGEST", 11)
    optimizer, seen = RelativeStep(O.AdamW(groups(twins)), lr=RATE, decay="spectral"), []
    optimizer.base.register_step_pre_hook(
        lambda base, *_: seen.append([p.numel() for g in base.param_groups for p in g["params"]])
    )
    train(optimizer, twins, range(3))
    assert seen == [[12], [10], [16]] * 3
    assert all(map(torch.equal, params, twins))
    assert [group["lr"] for group in optimizer.base.param_groups] == [RATE, RATE]


def test_a_base_that_fails_leaves_the_parameters_alone() -> None:
    params = params_of()
    optimizer = RelativeStep(O.Muon(params), lr=RATE)
    before, pointers = held(params), [p.data_ptr() for p in params]

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = optimizer.base.register_step_pre_hook(fail)
    give_gradients(params)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [p.data_ptr() for p in params] == pointers
    assert optimizer.param_groups[0]["lr"] == RATE
    assert optimizer.param_groups[0]["params"] == optimizer.base.param_groups[0]["params"] == params
    handle.remove()
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_hooks_closure_names_and_rates_that_are_tensors() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = RelativeStep(O.AdamW(model.named_parameters()), lr=torch.tensor(RATE))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    rate = optimizer.param_groups[0]["lr"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert min(losses) < 0.5 * losses[0]
    assert seen == ["before", "after"] * 20
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_it_trains() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs = torch.randn(64, 8)
    targets = inputs[:, :1] * inputs[:, 1:2]
    optimizer = RelativeStep(O.AdamW(model.parameters()), lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_other_schedulers() -> None:
    params = params_of()
    optimizer = RelativeStep(O.AdamW(params), lr=RATE)
    plateau = O.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * RATE)
    assert optimizer.param_groups[0]["peak_lr"] == RATE


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bases_that_are_refused() -> None:
    params = params_of()
    with pytest.raises(ValueError, match=r"Amos has Su's step and weight decay already. Use it as it is"):
        RelativeStep(Amos(params, lr=RATE))
    with pytest.raises(ValueError, match="RelativeStep has Su's step and weight decay already"):
        RelativeStep(RelativeStep(O.SGD(params)))
    for make, why in ((O.LBFGS, "calls the closure"), (O.ASGD, "averages"), (O.SparseAdam, "are sparse")):
        with pytest.raises(ValueError, match=why):
            RelativeStep(make(params))
    with pytest.raises(TypeError, match="is no torch optimizer"):
        RelativeStep(params)
    with pytest.raises(TypeError, match=r"parameter '0 of group 0' is torch.complex64"):
        RelativeStep(O.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]))


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        *(("sigma", value, "sigma=.* is out of range") for value in (0, -1.0, math.inf, math.nan, "paper")),
        *(("q", value, "q=.* is out of range") for value in (0, -1.0, math.nan)),
        *(("lr", value, "lr=.* is out of range") for value in (-1.0, math.inf, math.nan)),
        ("norm", "l2", "norm='l2' is unknown. Use one of 'measured', 'expected'"),
        ("decay", "l2", "decay='l2' is unknown. Use one of 'weights', 'spectral', 'none'"),
        ("norm", "expected", "norm='expected' does not fit SGD"),
    ],
)
def test_bad_values(keyword: str, value: Any, words: str) -> None:
    params = params_of()
    with pytest.raises(ValueError, match=words):
        RelativeStep(O.SGD(params), **{"lr": RATE, keyword: value})
    optimizer = RelativeStep(O.SGD(params), lr=RATE)
    optimizer.param_groups[0][keyword] = value
    give_gradients(params)
    before = held(params)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_state_of_another_optimizer() -> None:
    params = params_of()
    optimizer = RelativeStep(O.AdamW(params), lr=RATE)
    with pytest.raises(ValueError, match="no 'peak_lr': it was not saved by a RelativeStep"):
        optimizer.load_state_dict(O.AdamW(params_of()).state_dict())
    assert optimizer.param_groups[0]["lr"] == RATE
