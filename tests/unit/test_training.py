"""What surrounds a step in a training loop: closures, schedulers, AMP, hooks, autograd, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amos_dist import Amos, fallback, ops
from amos_dist.reference import amos_step

from ..conftest import TOLERANCES, relative_error
from .compare import follow, gradients, parameters, randn

F32 = TOLERANCES[torch.float32].param


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 1))


def loss_of(model: nn.Module, t: int = 0) -> Tensor:
    x = randn(100 + t, 16, 6)
    return (model(x).squeeze(1) - x.sum(1)).square().mean()


def train(model: nn.Module, optimizer: Amos, steps: int, start: int = 0) -> list[float]:
    losses = []
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(model: nn.Module, expected: list[Tensor]) -> None:
    for param, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param, value)


@pytest.mark.parametrize("moments", ["factored", "row", "full"])
def test_it_learns(moments: str) -> None:
    model = small_model()
    losses = train(model, Amos(model.parameters(), lr=0.05, beta=0.95, moments=moments), 200)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_named_parameters_and_plain_ones_agree() -> None:
    plain, named = small_model(), small_model()
    train(plain, Amos(plain.parameters(), lr=0.05), 3)
    optimizer = Amos(named.named_parameters(), lr=0.05)
    train(named, optimizer, 3)
    assert_equal(named, values(plain))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named.named_parameters()]


def test_closure() -> None:
    model, expected = small_model(), small_model()
    optimizer = Amos(model.parameters(), lr=0.05)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    train(expected, Amos(expected.parameters(), lr=0.05), 1)
    assert calls == 1 and loss.item() == loss_of(small_model()).item()
    assert_equal(model, values(expected))


def test_step_without_gradients_does_nothing() -> None:
    model = small_model()
    optimizer = Amos(model.parameters(), lr=0.05)
    before = values(model)
    assert optimizer.step() is None
    assert_equal(model, before)
    assert not optimizer.state


def test_zero_grad() -> None:
    model = small_model()
    optimizer = Amos(model.parameters(), lr=0.05)
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    before = values(model)
    optimizer.step()
    assert_equal(model, before)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# ---- schedules ---------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Any] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=7, cycle_momentum=True),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2, cycle_momentum=True),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers(name: str, tensor_lr: bool) -> None:
    """The reference sees the lr (and the momentum, which one cycle moves) that the scheduler has set for the step."""
    params = parameters(torch.float32, [(5, 7), (37,)])
    optimizer = Amos(params, torch.tensor(0.1) if tensor_lr else 0.1, sigma=0.3, momentum=0.9)
    scheduler = SCHEDULES[name](optimizer)
    seen = []

    def grads(t: int) -> list[Tensor]:
        if t > 1:
            scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group["momentum"]))
        return gradients(params)(t)

    follow(optimizer, params, grads, steps=6)
    assert len({lr for lr, _ in seen}) > 2
    if "cycl" in name:
        assert len({momentum for _, momentum in seen}) > 2


def test_momentum_that_starts_late() -> None:
    params = parameters(torch.float32, [(5, 7), (37,)])
    optimizer = Amos(params, 0.1, sigma=0.3)

    def grads(t: int) -> list[Tensor]:
        optimizer.param_groups[0]["momentum"] = 0.9 if t >= 3 else 0.0
        return gradients(params)(t)

    follow(optimizer, params, grads, steps=5)


# ---- AMP ---------------------------------------------------------------------------------------------------


def test_grad_scaler() -> None:
    """Skips a step with an overflow, and otherwise gives the numbers without it (the scale is a power of two)."""
    plain, scaled = small_model(), small_model()
    train(plain, Amos(plain.parameters(), lr=0.05), 2)
    optimizer = Amos(scaled.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in (0, None, 1):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, t or 0)).backward()
        if t is None:
            next(scaled.parameters()).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert int(optimizer.state[next(scaled.parameters())]["step"]) == 2
    for param, expected in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert relative_error(param, expected) <= F32


def test_autocast() -> None:
    model = small_model()
    optimizer = Amos(model.parameters(), lr=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    before = values(model)
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["native", "fallback"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_autograd_notices_a_step(layout: str, fused: bool) -> None:
    """The kernels write behind torch's back: a backward that needs the old value must be an error, not wrong."""
    start = randn(1, 4, 5).t() if layout == "transposed" else randn(1, 5, 4)
    weight = start.detach().requires_grad_()
    x = randn(2, 3, 4).requires_grad_()
    y = x @ weight.t()
    weight.grad = torch.ones_like(weight)
    version = weight._version
    Amos([weight], lr=0.1, fused=fused).step()
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_step_leaves_no_graph_and_no_trace_on_gradients() -> None:
    weight = randn(1, 5, 4).requires_grad_()
    weight.grad = randn(2, 5, 4)
    before = weight.grad.clone()
    optimizer = Amos([weight], lr=0.1, clip_value=0.1, maximize=True)
    optimizer.step()
    assert weight.is_leaf and weight.requires_grad and weight.grad_fn is None
    assert torch.equal(weight.grad, before)
    assert not any(value.requires_grad for value in optimizer.state[weight].values())


# ---- hooks, groups, copies ---------------------------------------------------------------------------------


def test_hooks() -> None:
    model = small_model()
    optimizer = Amos(model.parameters(), lr=0.05)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    train(model, optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_add_param_group() -> None:
    params = parameters(torch.float32, [(5, 7), (4, 6)])
    optimizer = Amos(params[:1], lr=0.1, sigma=0.3)
    follow(optimizer, params[:1], steps=2)
    optimizer.add_param_group({"params": params[1:], "lr": 0.02, "sigma": 0.7, "moments": "row"})
    copies, state = params[1].detach().clone(), {}
    params[0].grad, params[1].grad = randn(1, 5, 7), randn(2, 4, 6)
    optimizer.step()
    amos_step(copies, params[1].grad, state, lr=0.02, sigma=0.7, moments="row")
    assert relative_error(params[1], copies) <= F32
    assert int(optimizer.state[params[0]]["step"]) == 3 and int(optimizer.state[params[1]]["step"]) == 1


def test_a_refused_group_leaves_no_trace() -> None:
    params = parameters(torch.float32, [(5, 7), (4, 6)])
    optimizer = Amos(params[:1], lr=0.1, sigma=0.3)
    for bad in ({"sigma": -1.0}, {"momentun": 0.9}, {"sigma": "paper"}, {"row_dims": 2}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": params[1:], **bad})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="int64"):  # the second is bad: the first must be forgotten too
        optimizer.add_param_group({"params": [params[1], torch.ones(2, dtype=torch.int64)], "moments": "row"})
    optimizer.add_param_group({"params": params[1:]})
    follow(optimizer, params, steps=2)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike_and_apart(how: str, after: int) -> None:
    model = small_model()
    optimizer = Amos(model.named_parameters(), 0.05, momentum=0.9, rules=[{"match": "bias", "sigma": 0.1, "lr": 0.01}])
    train(model, optimizer, after)
    if how == "deepcopy":
        other_model, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other_model, other = torch.load(file, weights_only=False)
    before = values(model)
    train(other_model, other, 3, start=after)
    assert_equal(model, before)
    train(model, optimizer, 3, start=after)
    assert_equal(model, values(other_model))


def test_copy_of_an_optimizer_alone() -> None:
    """It then has copies of the parameters too, and their state."""
    weight = randn(1, 5, 4).requires_grad_()
    optimizer = Amos([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    (param,) = other.param_groups[0]["params"]
    assert param is not weight and int(other.state[param]["step"]) == 1


def test_repr_names_the_settings() -> None:
    assert "moments: row" in repr(Amos([randn(1, 5, 4).requires_grad_()], lr=0.1, moments="row"))


# ---- which backend -----------------------------------------------------------------------------------------


def test_backends() -> None:
    cpu = torch.device("cpu")
    assert ops.backend(cpu, None) is torch.ops.amos_dist
    assert ops.backend(cpu, True) is torch.ops.amos_dist
    assert ops.backend(cpu, False) is fallback


def which_backend(monkeypatch: pytest.MonkeyPatch, groups: list[dict[str, Any]], **given: Any) -> list[str]:
    """The backend that each launch of a step took."""
    taken: list[str] = []
    real = ops.backend

    def spy(device: torch.device, fused: bool | None) -> Any:
        chosen = real(device, fused)
        taken.append("fallback" if chosen is fallback else "native")
        return chosen

    monkeypatch.setattr(ops, "backend", spy)
    for group in groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    Amos(groups, lr=0.1, **given).step()
    return taken


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "native"), ({"fused": True}, "native"), ({"fused": False}, "fallback"), ({"foreach": True}, "fallback")],
    ids=str,
)
def test_fused_and_foreach_choose(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], expected: str) -> None:
    assert which_backend(monkeypatch, [{"params": [randn(1, 3, 4).requires_grad_()]}], **given) == [expected]


def test_fused_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"params": [randn(i, 3, 4).requires_grad_()], "fused": fused} for i, fused in enumerate([None, False])]
    assert sorted(which_backend(monkeypatch, groups)) == ["fallback", "native"]
