"""The small state lies in one buffer: users, checkpoints and errors must not notice."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import time
import weakref
from typing import Any

import pytest
import torch

from amos_dist import Amos, kernel_calls

from .compare import gradients, parameters, randn

KEYWORDS: dict[str, Any] = {"lr": 0.05, "sigma": 0.3, "beta": 0.9}


def trained(params: list[torch.Tensor], steps: int = 1, **keywords: Any) -> Amos:
    optimizer = Amos(params, **{**KEYWORDS, **keywords})
    for t in range(1, steps + 1):
        for param, grad in zip(params, gradients(params)(t), strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer


def test_saving_one_state_saves_one_state() -> None:
    params = [randn(i, 64, 64).requires_grad_() for i in range(100)]
    optimizer = trained(params)
    for state in optimizer.state_dict()["state"].values():
        file = io.BytesIO()
        torch.save(state, file)
        assert file.tell() < 10_000  # 768 bytes of numbers; all parameters' are 76,800
    assert len(pickle.dumps(optimizer.state_dict())) < 400_000
    assert len(pickle.dumps(optimizer)) < 400_000 + 100 * 64 * 64 * 4


def test_a_state_dict_does_not_move_with_the_optimizer() -> None:
    params = parameters(torch.float32)
    optimizer = trained(params)
    kept = optimizer.state_dict()
    before = copy.deepcopy(kept)
    optimizer.step()
    assert all(torch.equal(v, before["state"][n][k]) for n, s in kept["state"].items() for k, v in s.items())


def test_an_error_while_binding_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory at the first step of a float64 and a float32 parameter, then there is memory again."""
    params = [randn(0, 5, 7).requires_grad_(), randn(1, 5, 7, dtype=torch.float64).requires_grad_()]
    optimizer, expected = Amos(params, **KEYWORDS), [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    bind, calls = kernel_calls.Launch.bind, []

    def once(each: Any, states: Any) -> None:
        calls.append(each)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        bind(each, states)

    monkeypatch.setattr(kernel_calls.Launch, "bind", once)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert all(map(torch.equal, params, expected))
    optimizer.step()
    assert all(int(optimizer.state[param]["step"]) == 1 for param in params)


def test_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        params = parameters(torch.float32)
        optimizer = trained(params)
        gone = weakref.ref(optimizer), weakref.ref(optimizer.state[params[3]]["decay"])
        del optimizer
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_freezing_in_turn_keeps_one_plan() -> None:
    params = parameters(torch.float32)
    optimizer = trained(params)
    plans = {id(p) for some in optimizer._plans.values() for p in some.values()}
    for t in range(4):
        for param in params[:3]:
            param.requires_grad_(t % 2 == 0)
            param.grad = None
        optimizer.step()
    assert {id(p) for some in optimizer._plans.values() for p in some.values()} == plans


def test_state_that_does_not_belong_is_refused() -> None:
    params = parameters(torch.float32)
    optimizer = trained(params, moments="row")
    optimizer.state[params[3]]["moment"] = torch.ones(5, 1)
    with pytest.raises(RuntimeError, match=r"the state of 'param\[3\]' has 'moment', which its `moments` do not have"):
        optimizer.step()


def test_a_step_that_is_a_number() -> None:
    params = parameters(torch.float32)
    optimizer = trained(params)
    for param in params:
        optimizer.state[param]["step"] = 7
    optimizer.step()
    assert all(int(optimizer.state[param]["step"]) == 8 for param in params)


def test_replaced_state_counts() -> None:
    """New tensors, new dicts and moved data are taken over, whichever it is."""
    params = parameters(torch.float32)
    optimizer, other = trained(params), trained([param.detach().clone().requires_grad_() for param in params])
    for state in optimizer.state.values():
        state["decay"] = torch.zeros_like(state["decay"])
    optimizer.step()
    for param in params:
        optimizer.state[param] = {key: value.clone() * 0 for key, value in optimizer.state[param].items()}
    follow_from = [param.detach().clone().requires_grad_() for param in params]
    for param, twin in zip(params, follow_from, strict=True):
        twin.grad = param.grad
    fresh = Amos(follow_from, **KEYWORDS)
    optimizer.step()
    fresh.step()
    assert all(map(torch.equal, params, follow_from))
    assert other.state


def test_masters_follow_weights_that_are_loaded() -> None:
    params = parameters(torch.bfloat16)
    optimizer = trained(params, master_weights=True)
    with torch.no_grad():
        params[3].fill_(5.0)
        params[4][0, :10] = 3.0
    masters = [optimizer.state[param]["master"].clone() for param in params]
    optimizer.param_groups[0]["lr"] = 1e-6
    optimizer.step()
    assert torch.all((params[3] - 5).abs() < 0.01) and torch.all((params[4][0, :10] - 3).abs() < 0.01)
    kept = optimizer.state[params[4]]["master"][0, 10:]
    assert torch.allclose(kept, masters[4][0, 10:], atol=1e-5) and not torch.equal(kept, kept.bfloat16().float())


def test_plain_torch_grows_with_the_number_of_tensors() -> None:
    def seconds(tensors: int) -> float:
        params = [torch.ones(4, requires_grad=True) for _ in range(tensors)]
        optimizer = trained(params, fused=False)
        before = time.process_time()
        optimizer.step()
        return time.process_time() - before

    seconds(10)
    assert seconds(800) < 40 * seconds(100)  # 8 times; quadratic would be 64 times and more


def test_empty_first_parameter_and_momentum() -> None:
    alone, beside = (randn(1, 3, 4).requires_grad_() for _ in range(2))
    for params in ([alone], [torch.empty(0, 4).requires_grad_(), beside]):
        optimizer = Amos(params, momentum=0.9, **KEYWORDS)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
    assert torch.equal(alone, beside)
