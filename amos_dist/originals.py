"""What a parameter is, when the optimizer gets it: its own settings, its kind of moments and its matrix view."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import settings
from .ops import build_info
from .reference import effective_moments
from .rules import Advice, settings_from
from .sharding import Original, followers, refuse_unknown
from .sharding.zero import original_shape
from .state import State
from .tables import Constants, seed_of_parameter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Surroundings:
    """What a framework that is building the optimizer knows: names by id(parameter), and advice by name."""

    names: dict[int, str] = field(default_factory=dict)
    advice: dict[str, Advice] = field(default_factory=dict)


class Description(NamedTuple):
    """Attributes:
    overrides: the keywords that this parameter has other than its group; `lr_factor` stands for lr.
    kind: the moments that it really has. row_dims: those of its matrix view: none for "scalar", all for "full".
    """

    overrides: dict[str, Any]
    kind: str
    row_dims: int


def describe(
    param: Tensor, name: str, group: dict[str, Any], rule: Mapping[str, Any], advice: Advice | None
) -> Description:
    """Args:
        rule: the keywords of the rule that matches. advice: of the parameter's module, if it is known.

    Raises:
        TypeError, ValueError, RuntimeError: the parameter cannot be trained so; the sentence names it.
    """
    refuse_unknown(param, name)
    if param.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name!r} is {str(param.dtype).removeprefix('torch.')}. Amos trains float64, float32, "
            "bfloat16 and float16 parameters: convert it, or view complex numbers as pairs."
        )
    values = dict(rule)
    given = {**group, **values}
    if given["sigma"] == "paper":
        if advice is None:
            raise ValueError(
                f"sigma='paper' needs the module that parameter {name!r} belongs to. "
                "Make the groups with amos_dist.param_groups(model, sigma='paper')."
            )
        explicit = {k: v for k, v in given.items() if k in values or v != settings.DEFAULTS.get(k)}
        values |= settings_from(advice, "paper", explicit)
        given = {**group, **values}
    if "lr" in values:  # a rule's lr follows the group's schedule
        if not float(group["lr"]):
            raise ValueError(
                f"a rule sets lr={values['lr']} for {name!r}, but its group has lr=0: nothing to scale. "
                "Give the group its peak lr; a schedule moves both."
            )
        values["lr_factor"] = float(values.pop("lr")) / float(group["lr"])
    if param.dtype != torch.float64 and float(given["eps"]) < 2**-126:
        raise ValueError(
            f"eps={given['eps']:g} for {name!r} is below what float32, in which it is computed, can hold. "
            "Use 2**-126 or more."
        )
    shape = original_shape(param)
    try:
        kind = effective_moments(shape, given["moments"], given["row_dims"])
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from None
    return Description(values, kind, {"scalar": 0, "full": len(shape)}.get(kind, given["row_dims"]))


def follow(groups: list[dict[str, Any]], originals: list[Original], states: dict[Tensor, State]) -> None:
    """Accelerate shards a model whose optimizer is there already: DTensors take the places of the parameters.

    Raises:
        RuntimeError: there is state of the whole parameter, which would be lost.
    """
    for group in groups:
        mine = [original for original in originals if original.group == group["amos_group"]]
        for original, tensor in followers(group["params"], mine):
            if float(states.get(original.param, {}).get("step", 0)):
                raise RuntimeError(
                    f"parameter {original.name!r} was sharded after the optimizer had stepped or loaded its state, "
                    "which would be lost. Shard the model first (Accelerate: prepare), then load and train."
                )
            states.pop(original.param, None)
            original.param = tensor


def measured_of(original: Original, group: dict[str, Any]) -> float | None:
    """What sigma="auto" has found for a parameter, as its group has it; None: nothing."""
    measured = group["measured_sigma"]
    return measured[original.place] if original.place < len(measured) else None


def note_measured(groups: list[dict[str, Any]], originals: list[Original]) -> None:
    """The groups were loaded: their sigmas are those of the parameters."""
    by_number = {group["amos_group"]: group for group in groups}
    for original in originals:
        original.measured, original.loaded = measured_of(original, by_number[original.group]), True


def constants_of(
    original: Original, group: dict[str, Any], setting: Callable[[str], Any], lr_factor: float
) -> Constants:
    """The hyper-parameters of one parameter: what does not change from step to step.

    Args:
        setting: the value of a keyword for it. lr_factor: its learning rate over its group's.

    Raises:
        ValueError: sigma="auto" or "paper" was set too late.
        RuntimeError: the group has the sigmas of other parameters.
    """
    sigma, clip = setting("sigma"), setting("clip_value")
    if sigma == "auto":
        sigma = measured_of(original, group)
        if sigma != original.measured:
            raise RuntimeError(
                f"the sigma of {original.name!r} is another parameter's: ZeroRedundancyOptimizer loads those of "
                "the first rank everywhere. Give sigma as a number or 'paper' (amos_dist.param_groups)."
            )
    if sigma is None or isinstance(sigma, str):
        raise ValueError(
            f"sigma={setting('sigma')!r} of {original.name!r} was set after the optimizer was built, which has "
            "measured none. Give a number, or build a new optimizer."
        )
    seed = seed_of_parameter(setting("seed"), original.key)
    return Constants(
        lr_factor,
        [
            math.nan,  # lr
            float(sigma),
            float(setting("beta")),
            math.nan,  # t
            float(setting("momentum")),
            math.inf if clip is None else float(clip),
            float(setting("extra_l2")),
            float(setting("c_coef")),
            float(setting("d_coef")),
            float(setting("eps")),
            -1.0 if setting("maximize") else 1.0,
            float(seed if setting("stochastic_rounding") else -1 - seed),
        ],
    )


def facts_of(
    originals: list[Original],
    kinds: dict[int, str],
    overrides: dict[int, dict[str, Any]],
    groups: list[dict[str, Any]],
) -> list[str]:
    """What must be the same on all ranks that cut `originals`: versions, hyper-parameters, parameters; a line for each.

    Args:
        kinds, overrides: moments, and keywords that rules have set, by key.
    """
    info = build_info()
    facts = [f"amos_dist {info['version']}", f"torch {info['torch']}", f"extension={info['extension']}"]
    for group in groups:
        mine = [original for original in originals if original.group == group["amos_group"]]
        for key in settings.KEYWORDS if mine else ():
            value = float(group[key]) if isinstance(group[key], Tensor) else group[key]
            facts.append(f"{key}={value!r} in parameter group {group['amos_group']}")
        for original in mine:
            facts.append(f"parameter {original.name!r} of shape {original.shape} with {kinds[original.key]} moments")
            facts += [f"{key}={value!r} for {original.name!r}" for key, value in overrides[original.key].items()]
            if (scale := measured_of(original, group)) is not None:
                facts.append(f"sigma={scale!r} measured for {original.name!r}")
    return facts


def refuse_gradients(tensors: list[Tensor], names: dict[int, str]) -> None:
    """names: by id(tensor).

    Raises:
        RuntimeError: a gradient is sparse or complex.
    """
    for tensor in tensors:
        if (grad := tensor.grad) is None or (grad.layout is torch.strided and not grad.is_complex()):
            continue
        name = names.get(id(tensor), "a flat partition")
        if grad.is_complex():
            raise RuntimeError(
                f"the gradient of {name!r} is complex, which Amos does not support. "
                "View the parameter as pairs of real numbers."
            )
        raise RuntimeError(
            f"the gradient of {name!r} is sparse, which Amos does not support. Build the embedding with sparse=False."
        )
