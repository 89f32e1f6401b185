"""Keywords, rules and bad input: each error has its type, names what is wrong, and leaves everything as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos, settings
from amos_dist.reference import amos_step

from ..conftest import TOLERANCES, relative_error
from .compare import follow, gradients, parameters, randn

NAN, INF = float("nan"), float("inf")


def named(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    params = parameters(dtype, shapes)
    return [(f"layer.{i}.{'weight' if p.dim() > 1 else 'bias'}", p) for i, p in enumerate(params)]


# ---- values ------------------------------------------------------------------------------------------------

BAD_VALUES: list[tuple[str, Any, type[Exception]]] = [
    *[("lr", v, ValueError) for v in (-0.1, NAN, INF)],
    *[("sigma", v, ValueError) for v in (0.0, -1.0, NAN, INF, "Auto", "")],
    *[("beta", v, ValueError) for v in (-0.1, 1.0, 1.5, NAN)],
    *[("momentum", v, ValueError) for v in (-0.1, 1.0, NAN)],
    *[("clip_value", v, ValueError) for v in (0.0, -1.0, NAN)],
    *[(key, v, ValueError) for key in ("extra_l2", "c_coef", "d_coef", "decay_init") for v in (-1e-3, NAN, INF)],
    *[("eps", v, ValueError) for v in (0.0, -1.0, NAN)],
    *[("moments", v, ValueError) for v in ("diagonal", None, 1)],
    *[("row_dims", v, ValueError) for v in (0, -1, 1.5, True, "1")],
    *[("momentum_dtype", v, ValueError) for v in ("float8", torch.float16, torch.int32, 7, "nn")],
    *[(key, v, TypeError) for key in ("lr", "beta", "extra_l2", "eps") for v in ("0.1", None, [0.1], True)],
    *[("decay_init", v, TypeError) for v in ("0.1", None)],
    ("sigma", None, TypeError),
    ("lr", torch.tensor([0.1, 0.2]), TypeError),
    ("maximize", 1, TypeError),
    ("fused", "yes", TypeError),
    ("foreach", 1, TypeError),
    ("capturable", 1, TypeError),
    ("master_weights", "yes", TypeError),
    ("stochastic_rounding", 0.5, TypeError),
    ("seed", -1, ValueError),
    ("seed", 2**31, ValueError),
    ("seed", 1.5, ValueError),
]
ids = [f"{key}={value}" for key, value, _ in BAD_VALUES]


@pytest.mark.parametrize(("key", "value", "kind"), BAD_VALUES, ids=ids)
def test_bad_value(key: str, value: Any, kind: type[Exception]) -> None:
    given = {"lr": 0.1, key: value}
    with pytest.raises(kind, match=rf"^{key}=.*\. [A-Z]") as raised:
        Amos(named((3, 4)), **given)
    assert raised.type is kind


@pytest.mark.parametrize(("key", "value", "kind"), BAD_VALUES, ids=ids)
def test_bad_value_in_a_group(key: str, value: Any, kind: type[Exception]) -> None:
    (_, param), (_, other) = named((3, 4), (4, 5))
    optimizer = Amos([param], lr=0.1)
    with pytest.raises(kind, match=f"^{key}="):
        optimizer.add_param_group({"params": [other], key: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(kind, match=f"^{key}="):
        Amos([{"params": [param], key: value}], lr=0.1)


def test_every_default_is_good_and_known() -> None:
    settings.check({"lr": 0.1, **settings.DEFAULTS})
    (group,) = Amos(named((3, 4)), lr=0.1).param_groups
    assert {key: group[key] for key in settings.DEFAULTS} == settings.DEFAULTS


@pytest.mark.parametrize("value", [0.1, torch.tensor(0.1), torch.tensor([0.1]), 1])
def test_numbers_may_be_tensors(value: Any) -> None:
    settings.check({"lr": value, "sigma": value})


def test_foreach_and_fused() -> None:
    with pytest.raises(ValueError, match="fused=True and foreach=True exclude each other"):
        Amos(named((3, 4)), lr=0.1, fused=True, foreach=True)


def test_row_dims_that_do_not_fit_name_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"parameter 'layer\.0\.weight': row_dims=2 leaves no row or no column"):
        Amos(named((3, 4)), lr=0.1, row_dims=2)


# ---- keywords ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("momentun", "Did you mean 'momentum'"),
        ("sigmas", "Did you mean 'sigma'"),
        ("learning_rate", "The keywords are lr"),
        ("weight_decay", "extra_l2"),
        ("betas", "one beta"),
        ("amsgrad", "no such variant"),
    ],
)
def test_unknown_keyword(keyword: str, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"Amos got .*{keyword!r}.*{hint}"):
        Amos(named((3, 4)), lr=0.1, **{keyword: 0.1})


@pytest.mark.parametrize("keyword", ["momentun", "clip_val", "row_dim", "moment", "weight_decay", "betas"])
def test_typo_in_a_group(keyword: str) -> None:
    with pytest.raises(TypeError, match=f"a parameter group got .*{keyword!r}"):
        Amos([{"params": [randn(1, 3, 4)], keyword: 0.1}], lr=0.1)


def test_foreign_keys_in_a_group_pass() -> None:
    """torch, schedulers and frameworks write their own keys there."""
    optimizer = Amos([{"params": [randn(1, 3, 4)], "initial_lr": 0.1, "tag": "experts"}], lr=0.1)
    assert optimizer.param_groups[0]["tag"] == "experts"


# ---- rules -------------------------------------------------------------------------------------------------


def by_rules(rules: Any, **given: Any) -> tuple[Amos, list[Tensor]]:
    pairs = named((5, 7), (37,), (4, 6), (3,))
    return Amos(pairs, **{"lr": 0.1, "sigma": 0.3, **given}, rules=rules), [p for _, p in pairs]


def test_first_match_wins() -> None:
    rules = [{"match": r"layer\.2", "moments": "row"}, {"match": "weight", "moments": "column"}]
    optimizer, params = by_rules(rules)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    kinds = [sorted(set(optimizer.state[p]) - {"step", "decay"}) for p in params]
    assert kinds == [["column_moment"], ["moment"], ["row_moment"], ["moment"]]


RULE_VALUES = {
    "sigma": 0.9,
    "beta": 0.5,
    "momentum": 0.8,
    "clip_value": 0.02,
    "extra_l2": 0.1,
    "c_coef": 2.0,
    "d_coef": 2.0,
    "decay_init": 40.0,
    "maximize": True,
    "moments": "row",
    "lr": 0.03,
}


@pytest.mark.parametrize("key", RULE_VALUES)
def test_every_keyword_in_a_rule(key: str) -> None:
    """Those that match move as the reference does with the rule's value, the others as with the group's."""
    rules = [{"match": r"layer\.[01]", key: RULE_VALUES[key]}]
    optimizer, params = by_rules(rules)
    both = gradients(params)
    matched = copy.deepcopy(optimizer)
    copies = matched.param_groups[0]["params"]
    follow(matched, copies, lambda t: [*both(t)[:2], None, None], **{key: RULE_VALUES[key]})
    follow(optimizer, params, lambda t: [None, None, *both(t)[2:]])


def test_momentum_dtype_in_a_rule() -> None:
    optimizer, params = by_rules([{"match": "weight", "momentum_dtype": "bfloat16"}], momentum=0.9)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    low, full = torch.bfloat16, torch.float32
    assert [optimizer.state[p]["momentum"].dtype for p in params] == [low, full, low, full]


def test_lr_in_a_rule_follows_the_schedule() -> None:
    optimizer, params = by_rules([{"match": ".", "lr": 0.02}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    copies: list[tuple[Tensor, dict[str, Any]]] = [(p.detach().clone(), {}) for p in params]
    for t in range(1, 4):
        for param, grad, (expected, state) in zip(params, gradients(params)(t), copies, strict=True):
            param.grad = grad
            amos_step(expected, grad, state, lr=0.02 / t, sigma=0.3)
        optimizer.step()
        scheduler.step()
        for param, (expected, _) in zip(params, copies, strict=True):
            assert relative_error(param, expected) <= TOLERANCES[torch.float32].param


BAD_RULES: dict[str, tuple[Any, type[Exception], str]] = {
    "not a list": ({"match": "x"}, TypeError, "rules is not a list"),
    "a string": ("weight", TypeError, "rules is not a list"),
    "no match": ([{"sigma": 1.0}], TypeError, r'rules\[0\] has no "match"'),
    "match no string": ([{"match": 3}], TypeError, r'rules\[0\] has no "match"'),
    "bad regex": (
        [{"match": "(weight", "sigma": 1.0}],
        ValueError,
        r"rules\[0\]: '\(weight' is not a regular expression",
    ),
    "matches nothing": (
        [{"match": "head", "sigma": 1.0}],
        ValueError,
        r"rule 'head' matches no parameter.*layer\.0\.weight",
    ),
    "useless": (
        [{"match": "weight"}, {"match": r"2\.weight"}],
        ValueError,
        r"rule '2\\\\\.weight' matches no parameter",
    ),
    "unknown key": ([{"match": "weight", "sigmma": 1.0}], TypeError, r"rules\[0\] got .*'sigmma'.*'sigma'"),
    "weight_decay": ([{"match": "weight", "weight_decay": 1.0}], TypeError, r"rules\[0\] got .*'weight_decay'"),
    "fused": ([{"match": "weight", "fused": True}], TypeError, r"rules\[0\] got .*'fused'"),
    "bad value": ([{"match": "weight", "sigma": -1.0}], ValueError, r"sigma=-1 .*weight.* is out of range"),
    "NaN": ([{"match": "weight", "lr": NAN}], ValueError, r"lr=nan .*weight.* is out of range"),
    "row_dims": ([{"match": "weight", "row_dims": 2}], ValueError, r"'layer\.0\.weight': row_dims=2"),
    "paper": (
        [{"match": "weight", "sigma": "paper"}],
        ValueError,
        r"sigma='paper' needs the module .*'layer\.0\.weight'",
    ),
}


@pytest.mark.parametrize("what", BAD_RULES)
def test_bad_rules(what: str) -> None:
    rules, kind, message = BAD_RULES[what]
    with pytest.raises(kind, match=message):
        by_rules(rules)


def test_names_without_names() -> None:
    """Unnamed parameters are param[0], param[1], … over all groups, for rules and for messages."""
    params = parameters(torch.float32, [(5, 7), (4, 6)])
    groups = [{"params": [p]} for p in params]
    optimizer = Amos(groups, lr=0.1, sigma=0.3, rules=[{"match": r"^param\[1\]$", "maximize": True}])
    follow(optimizer, params[:1], steps=1)
    params[0].grad = None
    follow(optimizer, params[1:], steps=1, maximize=True)


# ---- parameters and gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"'odd' is .*(int|bool|complex).*float64, float32"):
        Amos([("layer.weight", randn(1, 3, 4)), ("odd", torch.ones(3, 4).to(dtype))], lr=0.1, sigma=0.3)


def test_float8_parameters() -> None:
    with pytest.raises(TypeError, match="'odd' is float8"):
        Amos([("odd", torch.ones(3, 4).to(torch.float8_e4m3fn))], lr=0.1, sigma=0.3)


def test_meta_parameters_need_a_sigma() -> None:
    with pytest.raises(RuntimeError, match="'odd', which is on the meta device"):
        Amos([("odd", torch.empty(3, 4, device="meta"))], lr=0.1)


def sparse(param: Tensor) -> None:
    param.grad = torch.zeros(param.shape).to_sparse()


def complex_gradient(param: Tensor) -> None:
    param.grad_dtype = None
    param.grad = torch.ones(param.shape, dtype=torch.complex64)


def set_lr(value: float) -> Callable[[Amos], None]:
    return lambda optimizer: optimizer.param_groups[-1].update(lr=value)


STEP_ERRORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "sparse": (sparse, None, RuntimeError, r"gradient of 'layer\.1\.weight' is sparse"),
    "complex": (complex_gradient, None, RuntimeError, r"gradient of 'layer\.1\.weight' is complex"),
    "NaN lr": (None, set_lr(NAN), ValueError, r"lr=nan"),
    "inf lr": (None, set_lr(INF), ValueError, r"lr=inf"),
    "negative lr": (None, set_lr(-0.1), ValueError, r"lr=-0\.1"),
}


def assert_step_is_refused(spoil: Any, change: Any, kind: type[Exception], message: str, after: int) -> None:
    """The last of two parameters is spoilt; the first must not move either. after: good steps before."""
    pairs = named((3, 4), (4, 5))
    params = [p for _, p in pairs]
    optimizer = Amos([{"params": [pair]} for pair in pairs], lr=0.1, sigma=0.3, momentum=0.9)
    for t in range(1, after + 1):
        params[0].grad, params[1].grad = gradients(params)(t)
        optimizer.step()
    params[0].grad, params[1].grad = gradients(params)(after + 1)
    if spoil:
        spoil(params[1])
    if change:
        change(optimizer)
    before = copy.deepcopy([(p.detach(), dict(optimizer.state.get(p, {}))) for p in params])
    with pytest.raises(kind, match=message):
        optimizer.step()
    for param, (value, state) in zip(params, before, strict=True):
        assert torch.equal(param, value)
        for key, now in optimizer.state.get(param, {}).items():
            # (before the first step, state of zeros may have been made)
            assert torch.equal(now, state.get(key, torch.zeros_like(now))), key


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("what", STEP_ERRORS)
def test_step_is_refused(what: str, after: int) -> None:
    assert_step_is_refused(*STEP_ERRORS[what], after=after)


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 1.5), ("beta", NAN), ("momentum", NAN), ("sigma", -1.0), ("decay_init", NAN)]
)
def test_a_schedule_that_spoils_other_numbers(key: str, value: float) -> None:
    change = lambda optimizer: optimizer.param_groups[-1].update({key: value})  # noqa: E731
    assert_step_is_refused(None, change, ValueError, rf"{key}=", after=1)


def test_nothing_moves_where_a_launch_fails() -> None:
    """momentum_dtype=float64 is taken for float32 parameters, and then refused by the kernel."""
    pairs = [*named((3, 4), dtype=torch.float64), ("low", randn(1, 3, 4).requires_grad_())]
    before = [p.detach().clone() for _, p in pairs]
    try:
        optimizer = Amos(pairs, lr=0.1, momentum=0.9, momentum_dtype="float64")
        for _, param in pairs:
            param.grad = torch.ones_like(param)
        optimizer.step()
    except (ValueError, TypeError, RuntimeError) as error:
        assert re.search("momentum_dtype", str(error))
        assert all(torch.equal(p, b) for (_, p), b in zip(pairs, before, strict=True))


def test_a_replaced_parameter_is_refused() -> None:
    optimizer = Amos(named((3, 4)), lr=0.1)
    param = randn(1, 7).requires_grad_()
    param.grad = torch.ones_like(param)
    optimizer.param_groups[0]["params"][0] = param
    with pytest.raises(RuntimeError, match=r"tensor at place 0 .*shape \(7,\).* is not one of the group's parameters"):
        optimizer.step()
