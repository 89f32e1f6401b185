"""The keywords of Amos: their defaults, the checks on their values, and rules that set them by a parameter's name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from .reference import MOMENTS

DEFAULTS: dict[str, Any] = {
    "sigma": "auto",
    "beta": 0.999,
    "momentum": 0.0,
    "moments": "factored",
    "row_dims": 1,
    "clip_value": None,
    "extra_l2": 0.0,
    "c_coef": 0.25,
    "d_coef": 0.25,
    "eps": 2**-125,
    "decay_init": 0.0,
    "momentum_dtype": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "master_weights": False,
    "stochastic_rounding": False,
    "seed": 0,
    "on_nonfinite": "skip",
}
KEYWORDS = ("lr", *DEFAULTS)
PER_PARAMETER = tuple(key for key in KEYWORDS if key not in ("foreach", "fused", "capturable", "on_nonfinite"))

# What else may be in a group without a doubt: torch's own and its schedulers' keys.
GROUP_KEYS = (
    *KEYWORDS,
    *("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"),
    *("amos_group", "measured_sigma"),
)

LARGEST = torch.finfo(torch.float32).max  # the kernels hold every number in float32, too

# Keywords of other optimizers that would change the result: ignoring one would be a different training run.
_FOREIGN = {
    "weight_decay": "Amos's weight decay follows from sigma; use extra_l2 for more",
    "betas": "Amos has one beta",
    "amsgrad": "Amos has no such variant",
    "nesterov": "Amos has no such variant",
    "dampening": "Amos has no such variant",
    "differentiable": "Amos's step cannot be differentiated",
    "rules": "rules are for the whole optimizer",
}


def _where(name: str | None) -> str:
    return f" of parameter {name!r}" if name else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, torch.Tensor)) and not isinstance(value, bool)


def _check_number(key: str, value: Any, where: str, low: float, high: float, low_open: bool = False) -> None:
    if not _is_number(value) or (isinstance(value, torch.Tensor) and value.numel() != 1):
        raise TypeError(f"{key}={value!r}{where} is not a number. Give a float.")
    if not isinstance(value, torch.Tensor) and abs(value) > LARGEST:  # float() of such an int is an error of its own
        value = math.inf if value > 0 else -math.inf
    number = float(value)
    if not (low < number if low_open else low <= number) or not number < high:
        bounds = f"{'>' if low_open else '>='} {low:g} and " + ("finite" if high == math.inf else f"< {high:g}")
        raise ValueError(f"{key}={number:g}{where} is out of range. It must be {bounds}.")


def check(values: Mapping[str, Any], name: str | None = None) -> None:
    """Checks the values of the keywords that are in `values`.

    Raises:
        TypeError, ValueError: the first sentence names the keyword (and the parameter), the second says what it can be.
    """
    where = _where(name)
    for key, value in values.items():
        if key == "lr":
            _check_number(key, value, where, 0, math.inf)
        elif key == "sigma":
            if isinstance(value, str):
                if value not in ("auto", "paper"):
                    raise ValueError(f"sigma={value!r}{where} is unknown. Use a number, 'auto' or 'paper'.")
            else:
                _check_number(key, value, where, 0, math.inf, low_open=True)
        elif key in ("beta", "momentum"):
            _check_number(key, value, where, 0, 1)
        elif key in ("extra_l2", "c_coef", "d_coef", "decay_init"):
            _check_number(key, value, where, 0, math.inf)
        elif key == "eps" or (key == "clip_value" and value is not None):
            _check_number(key, value, where, 0, math.inf, low_open=True)
        elif key == "moments" and value not in MOMENTS:
            raise ValueError(f"moments={value!r}{where} is unknown. Use one of {', '.join(map(repr, MOMENTS))}.")
        elif key == "on_nonfinite" and value not in ("skip", "raise", "ignore"):
            raise ValueError(f"on_nonfinite={value!r}{where} is unknown. Use 'skip', 'raise' or 'ignore'.")
        elif key == "row_dims" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"row_dims={value!r}{where} is no count of dimensions. Use 1, or 2 for stacked experts.")
        elif key == "momentum_dtype":
            momentum_dtype(value, where)
        elif key == "seed" and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
            raise ValueError(f"seed={value!r}{where} is no seed. Use a whole number from 0 to 2**31 - 1.")
        elif key in ("maximize", "capturable", "master_weights", "stochastic_rounding") and not isinstance(value, bool):
            raise TypeError(f"{key}={value!r}{where} is not a bool. Use true or false.")
        elif key in ("foreach", "fused") and not (value is None or isinstance(value, bool)):
            raise TypeError(f"{key}={value!r}{where} is not a bool. Use true, false or null.")
    if values.get("fused") and values.get("foreach"):
        raise ValueError("fused=True and foreach=True exclude each other. Leave both away for the fastest.")


def momentum_dtype(value: Any, where: str = "") -> torch.dtype | None:
    """The dtype that `momentum_dtype` names: a torch dtype, its name (for JSON), or None for the compute dtype."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype not in (None, torch.float32, torch.bfloat16, torch.int8) or (value is not None and dtype is None):
        raise ValueError(
            f"momentum_dtype={value!r}{where} is not supported. Use 'float32', 'bfloat16', 'int8' or null."
        )
    return dtype


def check_keys(keys: Iterable[str], where: str, known: Sequence[str] = KEYWORDS, strict: bool = True) -> None:
    """Refuses unknown keywords. Not strict: keys that look like nothing of ours pass (torch lets groups carry any).

    Raises:
        TypeError: names the key and what was probably meant.
    """
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        if key in _FOREIGN:
            raise TypeError(f"{where} got the keyword {key!r}, which Amos does not have: {_FOREIGN[key]}. Remove it.")
        if strict or near:
            hint = f"Did you mean {near[0]!r}?" if near else f"The keywords are {', '.join(known)}."
            raise TypeError(f"{where} got an unknown keyword {key!r}. {hint}")


class Rules:
    """`[{"match": regex on the full name, …any keyword…}]`: the first rule that matches a name sets its keywords.

    Raises:
        TypeError, ValueError: a rule without "match", with a regex that does not compile, or an unknown or bad keyword.
    """

    def __init__(self, rules: Sequence[Mapping[str, Any]] | None) -> None:
        if rules is not None and (isinstance(rules, (str, Mapping)) or not isinstance(rules, Sequence)):
            raise TypeError('rules is not a list. Give a list such as [{"match": "\\\\.bias$", "sigma": 0.5}].')
        self.patterns: list[re.Pattern[str]] = []
        self.values: list[dict[str, Any]] = []
        for i, rule in enumerate(rules or ()):
            where = f"rules[{i}]"
            if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
                raise TypeError(f'{where} has no "match". Give a regex on the parameter\'s full name.')
            try:
                self.patterns.append(re.compile(rule["match"]))
            except re.error as error:
                raise ValueError(f"{where}: {rule['match']!r} is not a regular expression: {error}. Mend it.") from None
            values = {key: value for key, value in rule.items() if key != "match"}
            check_keys(values, where, PER_PARAMETER)
            check(values, f"matching {rule['match']}")
            self.values.append(values)
        self.used = [False] * len(self.patterns)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def for_name(self, name: str) -> dict[str, Any]:
        """The keywords of the first rule that matches (re.search), or none."""
        for i, pattern in enumerate(self.patterns):
            if pattern.search(name):
                self.used[i] = True
                return self.values[i]
        return {}

    def refuse_useless(self, names: Sequence[str]) -> None:
        """Raises:
        ValueError: a rule was first for no parameter.
        """
        for pattern, used in zip(self.patterns, self.used, strict=True):
            if not used:
                shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
                raise ValueError(
                    f"the rule {pattern.pattern!r} matches no parameter (or an earlier rule takes all of them). "
                    f"The names are {shown}; mend or remove the rule."
                )
