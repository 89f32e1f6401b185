"""State dicts: saved, loaded, from older versions, from other dtypes, devices and implementations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from amos_dist import Amos, settings
from tests.conftest import TOLERANCES, relative_error
from tests.unit.compare import assert_same

from .common import (
    DEVICES,
    DTYPES,
    IMPLS,
    KWARGS,
    LR,
    Problem,
    every_dtype,
    named_or_not,
    need_kernels,
    needs_cuda,
    registered,
    same,
    same_run,
    take_over,
    through_a_file,
    trained,
)
from .registration import AMOS


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.parametrize("loader_named", [False, True], ids=["into unnamed", "into named"])
@named_or_not
def test_state_dict_is_determined(chosen: dict[str, Any], device: str, named: bool, loader_named: bool) -> None:
    """By the values: a resumed run has the bits of the one that went on, and so does its state dict."""
    problem, optimizer = trained(chosen, 5, device, named)
    resumed = problem.clone()
    other = Amos(resumed.listed(loader_named), **copy.deepcopy(chosen))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        problem.steps(optimizer, 1)
        resumed.steps(other, 1)
        assert same_run((problem, optimizer), (resumed, other))
    one, two = without_names(optimizer.state_dict()), without_names(other.state_dict())
    assert same(one, two)
    # The same parameters once more are known by the same numbers.
    other.param_groups.extend(other.param_groups)
    assert same(without_names(other.state_dict())["param_groups"], two["param_groups"] * 2)


@named_or_not
def test_saved_is_loaded(given: dict[str, Any], device: str, named: bool) -> None:
    """Through a file that holds no code."""
    _, optimizer = trained(given, 3, device, named)
    assert same(through_a_file(optimizer.state_dict()), optimizer.state_dict())


def test_loading_leaves_what_it_is_given_alone(given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 3, device)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    other_problem = problem.clone()
    other = Amos(other_problem.params, **copy.deepcopy(given))
    other.load_state_dict(saved)
    assert same(saved, before)
    other.param_groups[0]["lr"] = 0.5
    other_problem.steps(other, 2)
    assert same(saved, before)


def load_without(flags: Sequence[str], given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 3, device)
    older = optimizer.state_dict()
    for group in older["param_groups"]:
        for flag in flags:
            del group[flag]
    optimizer.load_state_dict(older)
    assert all(optimizer.param_groups[0][flag] == settings.DEFAULTS[flag] for flag in flags)
    before = [param.detach().clone() for param in problem.params]
    problem.steps(optimizer, 1)
    assert not any(map(torch.equal, problem.params, before))


def test_older_state_dicts_load(given: dict[str, Any], device: str) -> None:
    """Those of a version that did not have the flags yet; they say nothing of them, so they are off."""
    load_without(AMOS.not_og_supported_flags, given, device)


@pytest.mark.parametrize("flag", AMOS.not_og_supported_flags)
def test_state_dicts_without_one_flag_load(flag: str, device: str) -> None:
    load_without([flag], registered("default"), device)


@pytest.mark.parametrize("kind", [int, float])
def test_a_step_that_is_no_tensor_loads(kind: type, given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 3, device)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = kind(state["step"])
    resumed = problem.clone()
    other = Amos(resumed.params, **copy.deepcopy(given))
    other.load_state_dict(saved)
    assert all(same(state["step"], torch.tensor(3.0)) for state in other.state.values())
    for each, its in (problem, optimizer), (resumed, other):
        each.steps(its, 2)
    assert same_run((problem, optimizer), (resumed, other))


@pytest.mark.parametrize("loader", DTYPES, ids=str)
@every_dtype
def test_loaded_state_keeps_its_dtype(dtype: torch.dtype, loader: torch.dtype) -> None:
    """torch casts it to the parameter's; a second moment in float16 would be zero, and one in bfloat16 stand still."""
    problem = Problem(dtype=dtype)
    optimizer = Amos(problem.params, lr=LR, momentum=0.9, momentum_dtype="bfloat16")
    problem.steps(optimizer, 2)
    saved = optimizer.state_dict()
    found = Problem(dtype=loader)
    other = Amos(found.params, lr=LR, momentum=0.9, momentum_dtype="bfloat16")
    other.load_state_dict(saved)
    wide = torch.float64 if loader == torch.float64 else torch.float32
    for state, given in zip(other.state_dict()["state"].values(), saved["state"].values(), strict=True):
        assert state["step"].dtype == torch.float32
        assert same(state["momentum"], given["momentum"])
        for key in state.keys() - {"step", "momentum"}:
            assert same(state[key], given[key].to(wide)), key
    found.steps(other, 1)
    momentum = torch.float64 if loader == torch.float64 else torch.bfloat16
    assert {other.state[param]["momentum"].dtype for param in found.params} == {momentum}


@pytest.mark.parametrize("there", ["meta", *DEVICES[1:]])
def test_loaded_state_goes_to_the_parameters_device(there: str, chosen: dict[str, Any]) -> None:
    problem, optimizer = trained({**chosen, "sigma": 0.3})
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    moved = [nn.Parameter(param.detach().to(there)) for param in problem.params]
    other = Amos(moved, **{**chosen, "sigma": 0.3})
    other.load_state_dict(saved)
    for state, given in zip(other.state_dict()["state"].values(), before["state"].values(), strict=True):
        assert same(state.pop("step"), given.pop("step"))
        assert {value.device.type for value in state.values()} == {there}
        assert state.keys() == given.keys()
        assert all((value.shape, value.dtype) == (given[key].shape, given[key].dtype) for key, value in state.items())


@needs_cuda
@pytest.mark.gpu
def test_cpu_state_goes_on_on_cuda_and_back() -> None:
    for desc in KWARGS:
        problem, optimizer = trained(registered(desc))
        on_cuda = Problem("cuda")
        with torch.no_grad():
            for param, copied in zip(problem.params, on_cuda.params, strict=True):
                copied.copy_(param)
        other = Amos(on_cuda.params, **registered(desc))
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        for _ in range(3):
            problem.steps(optimizer, 1)
            for param, copied in zip(problem.params, on_cuda.params, strict=True):
                assert param.grad is not None
                copied.grad = param.grad.to("cuda")
            other.step()
            for param, copied in zip(problem.params, on_cuda.params, strict=True):
                counts_on = "cuda" if registered(desc).get("capturable") else "cpu"
                assert other.state[copied]["step"].device.type == counts_on
                assert_same(copied, other.state[copied], param, optimizer.state[param], where=desc)
            take_over(optimizer, problem.params, other, on_cuda.params)
        back = problem.clone()
        returned = Amos(back.params, **registered(desc))
        returned.load_state_dict(through_a_file(other.state_dict()))
        problem.steps(optimizer, 1)
        back.steps(returned, 1)
        assert same_run((problem, optimizer), (back, returned)), desc


@pytest.mark.parametrize("impl", ["fused", "capturable"])
def test_state_of_the_cpu_loads_under_a_flag(impl: str, chosen: dict[str, Any], device: str) -> None:
    """A file whose groups ask for kernels or graphs, but whose tensors were put on the CPU."""
    if impl == "fused":
        need_kernels(device)
    problem, optimizer = trained(chosen)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][impl] = True
    found = Problem(device)
    with torch.no_grad():
        for param, copied in zip(problem.params, found.params, strict=True):
            copied.copy_(param)
    other = Amos(found.params, **{**chosen, impl: True})
    other.load_state_dict(saved)
    found.steps(other, 1)
    problem.steps(optimizer, 1)
    capturable = other.param_groups[0]["capturable"]
    for param, copied in zip(problem.params, found.params, strict=True):
        assert other.state[copied]["step"].device.type == (device if capturable else "cpu")
        assert other.state[copied]["step"] == 4
        assert relative_error(copied, param) <= TOLERANCES[torch.float32].param


def test_implementations_load_each_other(chosen: dict[str, Any], device: str) -> None:
    """What is loaded has the last word on how to compute, and the state does not depend on it."""
    problem, optimizer = trained({**chosen, **IMPLS["forloop"]}, 3, device)
    other_problem = problem.clone()
    other = Amos(other_problem.params, **{**copy.deepcopy(chosen), **IMPLS["foreach"]})
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["foreach"] is False and other.param_groups[0]["fused"] is False
    for each, its in (problem, optimizer), (other_problem, other):
        each.steps(its, 2)
    assert same_run((problem, optimizer), (other_problem, other))
