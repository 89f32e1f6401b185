"""The update: it goes the right way, however it is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from amos_dist import Amos, fallback
from tests.unit.compare import assert_same, randn

from .common import (
    DEVICES,
    DTYPES,
    IMPLS,
    KWARGS,
    LR,
    Net,
    Problem,
    every_dtype,
    need_kernels,
    needs_cuda,
    registered,
    same,
    same_run,
    take_over,
    trained,
)
from .registration import AMOS


def goes_right(problem: Problem, optimizer: Amos, schedulers: Sequence[Callable[[Any], Any]] = ()) -> None:
    running = [scheduler(optimizer) for scheduler in schedulers]
    first = float(problem.backward())
    for _ in range(20):
        loss = optimizer.step(problem.backward)
        for scheduler in running:
            scheduler.step(*([loss] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
    last = float(problem.backward())
    assert last > first if optimizer.param_groups[0]["maximize"] else last < first


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_the_right_way(given: dict[str, Any], device: str, contiguous: bool) -> None:
    problem = Problem(device, contiguous=contiguous)
    goes_right(problem, Amos(problem.params, **given))


@pytest.mark.parametrize("schedulers", AMOS.scheduler_inputs, ids=range(len(AMOS.scheduler_inputs)))
def test_goes_the_right_way_on_a_schedule(
    chosen: dict[str, Any], device: str, schedulers: Sequence[Callable[[Any], Any]]
) -> None:
    problem = Problem(device)
    goes_right(problem, Amos(problem.params, **chosen), schedulers)


@pytest.mark.parametrize("schedulers", AMOS.scheduler_inputs, ids=range(len(AMOS.scheduler_inputs)))
def test_groups_go_the_right_way_on_a_schedule(device: str, schedulers: Sequence[Callable[[Any], Any]]) -> None:
    problem = Problem(device)
    groups: list[dict[str, Any]] = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.02}]
    optimizer = Amos(groups, lr=LR)
    goes_right(problem, optimizer, schedulers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.gpu
def test_goes_the_right_way_on_two_devices() -> None:
    for desc in KWARGS:
        problem = Problem("cuda:0")
        problem.bias = nn.Parameter(problem.bias.detach().to("cuda:1"))
        goes_right(problem, Amos(problem.params, **registered(desc)))


def step_alike(kwargs: dict[str, Any], impl: str, device: str, dtype: torch.dtype) -> None:
    runs = []
    for how in ("forloop", impl):
        net = Net(device, dtype)
        runs.append((net, Amos(net.params, **{**copy.deepcopy(kwargs), **IMPLS[how]})))
    (net, optimizer), (other_net, other) = runs
    for i in range(7):
        before = [param.detach().clone() for param in net.params]
        for each, its in runs:
            each.gradients(its, i)
            its.step()
        if i == 2:
            assert same(net.params, before)
        for param, copied in zip(net.params, other_net.params, strict=True):
            state, expected = other.state[copied], optimizer.state[param]
            assert state["step"].dtype == expected["step"].dtype == torch.float32
            if impl == "foreach":  # the same code: the same bits
                assert same(state, expected) and torch.equal(param, copied)
            else:
                assert_same(copied, state, param, expected, where=f"{tuple(param.shape)}, step {i}")
        take_over(optimizer, net.params, other, other_net.params)


def test_foreach_is_the_forloop(chosen: dict[str, Any], device: str) -> None:
    step_alike(chosen, "foreach", device, torch.float64)


@every_dtype
def test_fused_matches_the_forloop(chosen: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    need_kernels(device)
    step_alike(chosen, "fused", device, dtype)


def test_the_default_is_fused(chosen: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `foreach` and fused=False are not: what plain torch does is seen to be called there, and only there."""
    need_kernels(device)
    calls: list[None] = []
    for op in ("step_", "update_"):  # whatever is stepped goes through one of them
        monkeypatch.setattr(fallback, op, lambda *_: calls.append(None))
    for how, expected in ({}, False), ({"fused": True}, False), ({"fused": False}, True), ({"foreach": True}, True):
        calls.clear()
        trained({**chosen, **how}, 1, device)
        assert bool(calls) == expected, how


@pytest.mark.parametrize("impl", AMOS.supported_impls)
def test_mixed_dtypes_and_devices(impl: str, chosen: dict[str, Any]) -> None:
    if impl == "fused":
        need_kernels(*DEVICES)
    runs = []
    for how in ("forloop", impl):
        params = [randn(i, 2, 3, dtype=dtype).to(on) for i, dtype in enumerate(DTYPES) for on in DEVICES]
        optimizer = Amos(params, **{**copy.deepcopy(chosen), **IMPLS[how]})
        for i, param in enumerate(params):
            param.grad = randn(100 + i, 2, 3, dtype=param.dtype).to(param.device)
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    for _ in range(3):
        for _, each in runs:
            each.step()
        for param, copied in zip(params, others, strict=True):
            assert_same(copied, other.state[copied], param, optimizer.state[param])
        take_over(optimizer, params, other, others)


@needs_cuda
@pytest.mark.gpu
@every_dtype
def test_fused_on_the_cpu_matches_cuda(dtype: torch.dtype) -> None:
    need_kernels("cpu", "cuda")
    for desc in KWARGS:
        net, other_net = Net("cpu", dtype), Net("cuda", dtype)
        optimizer = Amos(net.params, fused=True, **registered(desc))
        other = Amos(other_net.params, fused=True, **registered(desc))
        for i in range(7):
            net.gradients(optimizer, i)
            for param, copied in zip(net.params, other_net.params, strict=True):  # a matmul's sums differ by device
                copied.grad = None if param.grad is None else param.grad.to("cuda")
            optimizer.step()
            other.step()
            for param, copied in zip(net.params, other_net.params, strict=True):
                found, expected = other.state[copied], optimizer.state[param]
                assert_same(copied.detach().cpu(), found, param, expected, where=f"{desc}, {tuple(param.shape)}")
            take_over(optimizer, net.params, other, other_net.params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_default_dtype_does_not_reach_the_state(impl: str, dtype: torch.dtype, device: str) -> None:
    """A step counted in bfloat16 would stay at 256 for ever."""
    if impl == "fused":
        need_kernels(device)
    given = registered("momentum", **IMPLS[impl])
    expected = trained(given, 3, device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = trained(given, 3, device)
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for state in found[1].state.values() for value in state.values()} == {torch.float32}
    assert same_run(found, expected)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_default_device_does_not_matter(impl: str, capturable: bool, device: str) -> None:
    """torch.set_default_device: the parameters say where the work is. Meta, because nothing can be read from it."""
    if impl == "fused":
        need_kernels(device)
    given = {"lr": LR, "momentum": 0.9, "capturable": capturable, **IMPLS[impl]}
    problem, optimizer = trained(given, 0, device)
    for _ in range(3):
        problem.backward()
        with torch.device("meta"):
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
    assert same_run((problem, optimizer), trained(given, 3, device))
