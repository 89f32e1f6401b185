"""Parameter groups from a model, and the numbers for sigma="auto"."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..settings import KEYWORDS, check, check_keys
from ..sharding.measure import sums_of_squares
from ..sharding.zero import original_shape
from .advice import Advice, advise, root


class Choice(NamedTuple):
    """Attributes:
    values: the keywords that a parameter gets from its place in the model.
    reason: of its sigma; empty where that is "auto", and only measuring will tell.
    notes: of its layout, and what it is tied to.
    """

    param: Tensor
    values: dict[str, Any]
    reason: str
    notes: tuple[str, ...]


class Scale(NamedTuple):
    """A number for sigma="auto", and where it is from."""

    sigma: float
    reason: str


def choose(model: nn.Module, sigma: str | float = "auto", **keywords: Any) -> dict[str, Choice]:
    """What `param_groups` decides, and why, for each parameter that is trained, by its full name.

    The arguments and errors are those of `param_groups`.
    """
    check_keys(keywords, "param_groups", KEYWORDS)
    check({"sigma": sigma, **keywords})
    advice = advise(model)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    fan_ins = {name: fan_in for name in trained if (fan_in := advice[name].fan_in) and not trained[name].is_meta}
    totals = sums_of_squares([trained[name] for name in fan_ins]) if sigma == "auto" else [1.0] * len(fan_ins)
    zeros = {name for name, total in zip(fan_ins, totals, strict=True) if not total}
    chosen = {}
    for name, param in trained.items():
        values = settings_from(advice[name], sigma, keywords)
        reason = {"paper": advice[name].reason, "auto": ""}.get(str(sigma), "given")
        if name in zeros:  # their module knows the fan-in
            values["sigma"], reason = _of_zeros(fan_ins[name])
        chosen[name] = Choice(param, values, reason, advice[name].notes)
    return chosen


def param_groups(model: nn.Module, sigma: str | float = "auto", **keywords: Any) -> list[dict[str, Any]]:
    """Parameter groups for `Amos(param_groups(model, sigma="paper"), lr)`, with names.

    Parameters with equal settings share a group. Frozen parameters are left out. The model may be sharded afterwards,
    with fully_shard or parallelize_module, but before the optimizer is built. `python -m amos_dist rules` prints what
    each parameter gets, and why.

    Args:
        sigma: "auto" (scale at initialization), "paper" (by module; "auto" for what the paper has no rule for), or a
            number for all.
        keywords: any keyword of Amos, for every group; `moments` and `row_dims` given here win over the model's.

    Raises:
        TypeError, ValueError: an unknown keyword or a bad value; a lazy module without shapes.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, choice in choose(model, sigma, **keywords).items():
        _note_place(model, name, choice.param)
        values = choice.values
        group = groups.setdefault(tuple(values.items()), {"params": [], **keywords, **values})
        group["params"].append((name, choice.param))
    return list(groups.values())


# Where param_groups found a parameter: sharding a model afterwards puts another tensor there.
_PLACES = WeakTensorKeyDictionary()


def _note_place(model: nn.Module, name: str, param: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    _PLACES[param] = (weakref.ref(model.get_submodule(path)), leaf)


def current(param: Tensor) -> Tensor:
    """The parameter that is where `param_groups` found this one: fully_shard and parallelize_module replace them."""
    module, leaf = _PLACES.get(param, (None, ""))
    found = getattr(module(), leaf, None) if module is not None else None
    return found if isinstance(found, nn.Parameter) and found.shape == param.shape else param


def settings_from(advice: Advice, sigma: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that `advice` adds to those given: sigma, and row_dims and moments where the user did not say."""
    values: dict[str, Any] = {"sigma": advice.sigma if sigma == "paper" else sigma}
    if "row_dims" not in keywords and advice.row_dims != 1:
        values["row_dims"] = advice.row_dims
    # One value for each output unit: of a transposed weight that is one for each column.
    if keywords.get("moments") == "row" and advice.moments:
        values["moments"] = advice.moments
    return values


def scales(params: list[Tensor], row_dims: list[int], group_names: list[str]) -> list[float]:
    """The numbers of `measure`."""
    return [scale.sigma for scale in measure(params, row_dims, group_names)]


def measure(params: list[Tensor], row_dims: list[int], group_names: list[str]) -> list[Scale]:
    """sigma="auto": for each parameter the root mean square of its entries now; 0.5 for 0-d and 1-d.

    A parameter of zeros gets the square root of 1/fan_in. Those that are cut over ranks are added up over them, all in
    one all-reduce for each process group: every rank must call this with the same parameters.

    Raises:
        RuntimeError: a parameter has no values yet (meta device).
        ValueError: a parameter holds NaN or infinite values.
    """
    shapes = [original_shape(param) for param in params]
    measured = [i for i, shape in enumerate(shapes) if len(shape) >= 2 and 0 not in shape]
    for i in measured:
        if params[i].is_meta:
            raise RuntimeError(
                f"sigma='auto' needs the values of parameter {group_names[i]!r}, which is on the meta device. "
                "Materialize the model first, or give sigma as a number or, where its module has a rule, 'paper'."
            )
    result = [Scale(0.5, "no matrix: 0.5")] * len(params)
    for i, total in zip(measured, sums_of_squares([params[i] for i in measured]), strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"parameter {group_names[i]!r} holds NaN or infinite values. Mend it, or give sigma as a number."
            )
        scale = Scale(math.sqrt(total / math.prod(shapes[i])), AT_START)
        result[i] = scale if scale.sigma else _of_zeros(math.prod(shapes[i][row_dims[i] :]))
    return result


AT_START = "root mean square of the entries at start"


def _of_zeros(fan_in: int) -> Scale:
    sigma, formula = root(1, fan_in)
    return Scale(sigma, f"starts at zero: {formula}")
