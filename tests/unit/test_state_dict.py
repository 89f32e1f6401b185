"""Saving and loading: a resumed run is bitwise the one that went on; what does not fit is refused, changing nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos

from .compare import KINDS, gradients, parameters

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (37,), (5, 7), (3, 4, 5)]


def steps(optimizer: Amos, params: Sequence[Tensor], times: Sequence[int]) -> None:
    for t in times:
        for param, grad in zip(params, gradients(params)(t), strict=True):
            param.grad = grad
        optimizer.step()


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clones(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def everything(optimizer: Amos) -> Any:
    """A copy of parameters, state and groups, that `same` can compare."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return copy.deepcopy(([p.detach() for p in tensors], [dict(optimizer.state.get(p, {})) for p in tensors], groups))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# ---- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "momentum_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("moments", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_is_bitwise(dtype: torch.dtype, moments: str, momentum: dict[str, Any]) -> None:
    given = {"lr": 0.05, "beta": 0.9, "moments": moments, "rules": [{"match": r"param\[2\]", "lr": 0.1}], **momentum}
    params = parameters(dtype, SHAPES)
    optimizer = Amos(params, **given)
    steps(optimizer, params, [1, 2])
    saved = through_a_file({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    steps(optimizer, params, [3, 4])

    resumed_params = clones(saved["params"])
    resumed = Amos(resumed_params, **given)
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, resumed_params, [3, 4])
    assert same(everything(resumed), everything(optimizer))
    assert {v.dtype for p in resumed_params for k, v in resumed.state[p].items() if k == "decay"} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


def test_resume_over_a_running_optimizer() -> None:
    """Loading into an optimizer that has stepped on: its plans and its state must not linger."""
    params = parameters(torch.float32, SHAPES)
    optimizer = Amos(params, lr=0.05, momentum=0.9)
    steps(optimizer, params, [1, 2])
    saved = through_a_file(optimizer.state_dict())
    start = clones(params)
    steps(optimizer, params, [3, 4])
    expected = everything(optimizer)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(params, start, strict=True):
            param.copy_(value)
    steps(optimizer, params, [3, 4])
    assert same(everything(optimizer), expected)


def test_loaded_state_is_a_copy() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = Amos(params, lr=0.05, momentum=0.9)
    steps(optimizer, params, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    steps(optimizer, params, [3])
    assert same(saved["state"], before["state"])


def test_auto_sigma_is_not_measured_again() -> None:
    """sigma is the scale at the start of the training, not at that of the resumed part."""
    params = parameters(torch.float32, [(5, 7)])
    optimizer = Amos(params, lr=0.05)
    steps(optimizer, params, [1, 2])
    (sigma,) = optimizer.param_groups[0]["measured_sigma"]
    resumed_params = [(10 * p).detach().requires_grad_() for p in params]
    resumed = Amos(resumed_params, lr=0.05)
    assert resumed.param_groups[0]["measured_sigma"] != [sigma]
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["measured_sigma"] == [sigma]


def test_before_the_first_step() -> None:
    params = parameters(torch.float32, SHAPES)
    saved = through_a_file(Amos(params, lr=0.05).state_dict())
    others = clones(params)
    loaded, fresh = Amos(others, lr=0.3), Amos(params, lr=0.05)
    loaded.load_state_dict(saved)
    steps(loaded, others, [1, 2])
    steps(fresh, params, [1, 2])
    assert same(everything(loaded), everything(fresh))


def test_parameter_without_elements() -> None:
    params = [torch.zeros(0, 4, requires_grad=True), *parameters(torch.float32, [(5, 7)])]
    optimizer = Amos(params, lr=0.05)
    steps(optimizer, params, [1])
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    steps(optimizer, params, [2])


def test_frozen_and_unused_parameters() -> None:
    params = parameters(torch.float32, [(5, 7), (3, 4), (4, 6)])
    params[1].requires_grad_(False)
    optimizer = Amos(params, lr=0.05)
    for t in (1, 2):
        params[0].grad = gradients(params)(t)[0]
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    others = clones(params)
    others[1].requires_grad_(False)
    resumed = Amos(others, lr=0.05)
    resumed.load_state_dict(saved)
    for some, o in ((params, optimizer), (others, resumed)):
        some[0].grad, some[2].grad = gradients(params)(3)[0], gradients(params)(3)[2]
        o.step()
    assert same(everything(resumed), everything(optimizer))


def test_groups_keep_their_settings() -> None:
    params = parameters(torch.float32, [(5, 7), (3, 4)])
    groups = [{"params": params[:1], "lr": 0.01}, {"params": params[1:], "moments": "row", "momentum": 0.5}]
    optimizer = Amos(groups, lr=0.05)
    steps(optimizer, params, [1])
    optimizer.param_groups[0]["lr"] = 0.007  # as a schedule does
    other = Amos([{"params": clones(params[:1])}, {"params": clones(params[1:]), "moments": "row"}], lr=0.5)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.007, 0.05]
    assert [group["momentum"] for group in other.param_groups] == [0.0, 0.5]


@pytest.mark.parametrize("moments", KINDS)
def test_decay_init_is_of_new_state_only(moments: str) -> None:
    """A checkpoint has its own b, also of a parameter that has had no gradient; so has a state that is there."""
    params = parameters(torch.float32, [(5, 7), (37,), (4, 3)])
    optimizer = Amos(params, lr=0.05, moments=moments, decay_init=0.5)
    steps(optimizer, params[:2], [1])
    assert all(bool((optimizer.state[p]["decay"] >= 0.5).all()) for p in params)
    assert bool((optimizer.state[params[2]]["decay"] == 0.5).all())
    optimizer.param_groups[0]["decay_init"] = 7.0
    copies = clones(params)
    resumed = Amos(copies, lr=0.05, moments=moments, decay_init=40.0)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    steps(optimizer, params, [2, 3])
    steps(resumed, copies, [2, 3])
    assert same(everything(resumed), everything(optimizer))
    assert max(float(optimizer.state[p]["decay"].max()) for p in params) < 1


def test_before_the_first_step_the_start_of_b_is_in_the_group() -> None:
    saved = Amos(parameters(torch.float32, [(5, 7)]), lr=0.05, decay_init=2.0).state_dict()
    params = parameters(torch.float32, [(5, 7)])
    other = Amos(params, lr=0.05)
    other.load_state_dict(saved)
    params[0].grad = torch.zeros(5, 7)
    other.step()
    assert other.state[params[0]]["decay"].tolist() == [[2.0]] * 5


def test_a_hook_may_change_what_is_loaded() -> None:
    params = parameters(torch.float32, [(5, 7)])
    optimizer = Amos(params, lr=0.05)
    steps(optimizer, params, [1])

    def hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["decay"].fill_(0.5)
        return changed

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.state[params[0]]["decay"] == 0.5).all()


# ---- what does not fit -------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        state_dict = copy.deepcopy(saved_by())
        change(state_dict)
        return state_dict

    return make


def saved_by(shapes: Sequence[tuple[int, ...]] = ((5, 7), (37,)), groups: int = 1, **given: Any) -> dict[str, Any]:
    params = parameters(given.pop("dtype", torch.float32), shapes)
    per = len(params) // groups
    given = {"lr": 0.05, "momentum": 0.9, **given}
    optimizer = Amos([{"params": params[i * per : (i + 1) * per]} for i in range(groups)], **given)
    steps(optimizer, params, [1])
    return through_a_file(optimizer.state_dict())


def adamw(after: int, shapes: Sequence[tuple[int, ...]] = ((5, 7), (37,))) -> dict[str, Any]:
    params = parameters(torch.float32, shapes)
    optimizer = torch.optim.AdamW(params)
    for _ in range(after):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer.state_dict()


MISFITS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "AdamW's": (lambda: adamw(1), r"the state of 'layer\.weight' is not of Amos: it has .*'exp_avg'.*load the model"),
    "other shape": (lambda: saved_by([(5, 8), (37,)]), r"'column_moment' of 'layer\.weight' has shape \(1, 8\)"),
    "transposed": (lambda: saved_by([(7, 5), (37,)]), r"'row_moment' of 'layer\.weight' has shape \(7, 1\)"),
    "other vector": (lambda: saved_by([(5, 7), (36,)]), r"'momentum' of 'layer\.bias' has shape \(36,\)"),
    "row": (lambda: saved_by(moments="row"), r"'column_moment' of 'layer\.weight' has shape None.*`moments`"),
    "column": (lambda: saved_by(moments="column"), r"'row_moment' of 'layer\.weight' has shape None"),
    "scalar": (lambda: saved_by(moments="scalar"), r"'row_moment' of 'layer\.weight' has shape None"),
    "full": (lambda: saved_by(moments="full"), r"of 'layer\.weight' has shape"),
    "more groups": (lambda: saved_by(groups=2), r"has 2 parameter groups, the optimizer has 1"),
    "more parameters": (lambda: saved_by([(5, 7), (37,), (3,)]), r"has 3 parameters, the optimizer's has 2"),
    "no groups": (lambda: {"state": {}}, r"has no 'param_groups'"),
    "no state": (lambda: {"param_groups": []}, r"has no 'state'"),
    "negative start of b": (
        edited(lambda s: s["param_groups"][0].update(decay_init=-1)),
        r"decay_init=-1 is out of range",
    ),
    "without step": (edited(lambda s: s["state"][0].pop("step")), r"state of 'layer\.weight' is not of Amos"),
    "without decay": (edited(lambda s: s["state"][1].pop("decay")), r"state 'decay' of 'layer\.bias' has shape None"),
    "truncated": (
        edited(lambda s: s["state"][0].update(decay=torch.zeros(4, 1))),
        r"'decay' of 'layer\.weight' has shape \(4, 1\), expected \(5, 1\)",
    ),
}
OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "fresh AdamW's": (lambda: adamw(0), "Amos"),
    "state of no tensor": (edited(lambda s: s["state"][0].update(decay="x")), "decay"),
}


def is_refused(state_dict: dict[str, Any], message: str) -> None:
    weight, bias = parameters(torch.float32, [(5, 7), (37,)])
    optimizer = Amos([("layer.weight", weight), ("layer.bias", bias)], lr=0.3, momentum=0.9)
    for _ in range(2):  # without state, and with
        before = everything(optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)
        assert same(everything(optimizer), before)
        steps(optimizer, [weight, bias], [1])


@pytest.mark.parametrize("what", MISFITS)
def test_misfit_is_refused(what: str) -> None:
    make, message = MISFITS[what]
    is_refused(make(), message)


@pytest.mark.parametrize("what", OTHERS)
def test_misfit_of_other_kinds(what: str) -> None:
    make, message = OTHERS[what]
    is_refused(make(), message)


def test_sigma_by_rule_then_auto() -> None:
    """The checkpoint has no measured sigma for this parameter: measure it, or say so when loading."""
    params = parameters(torch.float32, [(5, 7)])
    optimizer = Amos(params, lr=0.05, rules=[{"match": ".", "sigma": 0.3}])
    steps(optimizer, params, [1])
    other = Amos(params, lr=0.05)
    try:
        other.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        assert "sigma" in str(error)
    else:
        steps(other, params, [2])


def test_other_kind_of_dtype_of_parameters_loads() -> None:
    """The state is float32 for all but float64: a float32 run may go on in bfloat16."""
    for dtype in (torch.bfloat16, torch.float16):
        state_dict = saved_by()
        params = parameters(dtype, [(5, 7), (37,)])
        optimizer = Amos(params, lr=0.05, momentum=0.9)
        optimizer.load_state_dict(state_dict)
        for i, param in enumerate(params):
            assert same({**optimizer.state[param]}, state_dict["state"][i])
        steps(optimizer, params, [2])
