"""RelativeStep as an optimizer like any other, in one process; and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos, InverseSquareDecay, RelativeStep, relative_parts

from .bases import RATE, O, each_base, give_gradients, held, norm, params_of, train


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


def test_a_scheduler_that_was_there_first() -> None:
    """The peak is the rate before the warm-up has lowered it."""
    base = O.AdamW([{"params": params_of()}], lr=RATE)
    torch.optim.lr_scheduler.LambdaLR(base, lambda t: (t + 1) / 10)
    optimizer = RelativeStep(base)
    (group,) = optimizer.param_groups
    assert group["peak_lr"] == RATE and group["lr"] == pytest.approx(RATE / 10)
    other = O.SGD(params_of(), lr=RATE)
    O.lr_scheduler.LambdaLR(other, lambda t: 0.1)
    with pytest.warns(UserWarning, match=r"build schedulers after RelativeStep"):
        wrapped = RelativeStep(other, lr=2 * RATE)
    O.lr_scheduler.LambdaLR(wrapped, lambda t: 0.5)  # it would have begun with the first one's peak
    assert wrapped.param_groups[0]["peak_lr"] == 2 * RATE and wrapped.param_groups[0]["lr"] == RATE


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


def test_a_base_is_as_it_was_where_it_is_refused() -> None:
    """So that the next try is judged by its own values; and a base has one RelativeStep."""
    base = O.SGD(params_of(), lr=0.5)
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match="sigma=-1 is out of range"):
        RelativeStep(base, lr=RATE, sigma=-1)
    for group, was in zip(base.param_groups, before, strict=True):
        assert group.keys() == was.keys() and all(group[key] is was[key] for key in was)
    assert RelativeStep(base, lr=RATE, sigma=0.1).param_groups[0]["sigma"] == 0.1
    with pytest.raises(ValueError, match="this SGD is in a RelativeStep already"):
        RelativeStep(base, lr=RATE, sigma=0.2)


@pytest.mark.parametrize("make", [O.SGD, O.RMSprop, O.Adagrad, O.Rprop, O.Adadelta])
def test_an_expected_norm_needs_directions_of_one_size(make: Any) -> None:
    with pytest.raises(ValueError, match=f"norm='expected' does not fit {make.__name__}"):
        RelativeStep(make(params_of()), lr=RATE, norm="expected")


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
