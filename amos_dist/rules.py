"""sigma, moments and row_dims of each parameter, from the modules of a model or from the numbers in a parameter.

Sources: Tian & Parikh 2022, section 3 and appendix (the table of eta, here sigma="paper"); J. Su,
kexue.fm/archives/9344 (sigma = the scale at initialization, here sigma="auto").
"""

from __future__ import annotations

import math
import re
import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .settings import KEYWORDS, check, check_keys
from .sharding.measure import sums_of_squares
from .sharding.zero import original_shape


class Advice(NamedTuple):
    """What a parameter's place in the model says about it.

    Attributes:
        sigma: the paper's.
        row_dims, moments: how it is to be read; moments: None where it has no say.
        fan_in: inputs of an output unit; None for what is no kernel.
    """

    sigma: float
    row_dims: int
    moments: str | None
    reason: str
    fan_in: int | None = None


_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.Mish, nn.Hardswish)
_PASS = (nn.Dropout, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.Flatten)
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
# The second matrix of an MLP in the models that people use, where the activation is a function and no module.
_MLP_OUTPUT = re.compile(
    r"(mlp|ffn|feed_?forward|ff|densereludense)\.(c_proj|fc2|down_proj|w2|wo|out|output|proj|lin2|linear2|out_proj|dense_4h_to_h)$"
    r"|(^|\.)(fc2|down_proj|linear2|dense_4h_to_h)$|layer\.\d+\.output\.dense$",
    re.IGNORECASE,
)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RELATIVE = re.compile(r"relative|rel_pos|rpe", re.IGNORECASE)


def advise(model: nn.Module) -> dict[str, Advice]:
    """The paper's sigma, row_dims and moments for each parameter of `model`, by its full name (tied ones once)."""
    after = _after_activation(model)
    advice, seen = {}, set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            full = f"{prefix}.{name}" if prefix else name
            advice[full] = _advise(full, prefix, module, name, original_shape(param), id(module) in after)
    return advice


def _after_activation(model: nn.Module) -> set[int]:
    """Modules that read an activation: the module registered before them is one, pooling and dropout aside."""
    found = set()
    for parent in model.modules():
        before: nn.Module | None = None
        for child in parent.children():
            if isinstance(before, _ACTIVATIONS):
                found.add(id(child))
            if not isinstance(child, _PASS):
                before = child
    return found


def _advise(full: str, prefix: str, module: nn.Module, name: str, shape: tuple[int, ...], after: bool) -> Advice:
    kind = type(module).__name__.removeprefix("FSDP")  # fully_shard makes a class of its own
    leaf = prefix.rsplit(".", 1)[-1]
    if "bias" in name:
        return Advice(0.5, 1, None, "bias")
    if len(shape) < 2:
        if _NORM.search(kind) or _NORM.search(leaf):
            return Advice(1.0, 1, None, "scale of a normalization")
        return Advice(0.5, 1, None, "1-d")
    if _RELATIVE.search(full):
        return Advice(0.5, 1, None, "relative positions")
    if isinstance(module, nn.Embedding) or "embed" in kind.lower():
        return Advice(math.sqrt(2 / shape[-1]), 1, None, "embedding: sqrt(2 / width)")

    def kernel(gain: int, fan_in: int, reason: str, row_dims: int = 1, moments: str | None = None) -> Advice:
        return Advice(math.sqrt(gain / fan_in), row_dims, moments, f"{reason}: sqrt({gain} / fan_in)", fan_in)

    fan_in = math.prod(shape[1:])
    if isinstance(module, _TRANSPOSED):  # the output is dim 1
        return kernel(2 if after else 1, shape[0] * math.prod(shape[2:]), "transposed convolution", row_dims=2)
    if isinstance(module, _CONV):
        if after:
            return kernel(2, fan_in, "convolution after ReLU")
        return (
            kernel(8, fan_in, "convolution on pixels") if module.in_channels <= 4 else kernel(2, fan_in, "convolution")
        )
    if len(shape) == 3:  # (E, out, in)
        return kernel(1, shape[-1], "stacked kernels", row_dims=2)
    moments = None
    if kind == "Conv1D":  # Hugging Face's: the weight is (in, out)
        fan_in, moments = shape[0], "column"
    if after or _MLP_OUTPUT.search(prefix):
        return kernel(2, fan_in, "kernel after ReLU or GELU", moments=moments)
    return kernel(1, fan_in, "kernel", moments=moments)


def param_groups(model: nn.Module, sigma: str | float = "auto", **keywords: Any) -> list[dict[str, Any]]:
    """Parameter groups for `Amos(param_groups(model, sigma="paper"), lr)`, with names.

    Parameters with equal settings share a group. Frozen parameters are left out. The model may be sharded afterwards,
    with fully_shard or parallelize_module, but before the optimizer is built.

    Args:
        sigma: "auto" (scale at initialization), "paper" (by module), or a number for all.
        keywords: any keyword of Amos, for every group; `moments` and `row_dims` given here win over the model's.

    Raises:
        TypeError, ValueError: an unknown keyword or a bad value.
    """
    check_keys(keywords, "param_groups", KEYWORDS)
    check({"sigma": sigma, **keywords})
    advice = advise(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    fan_ins = {name: fan_in for name in trained if (fan_in := advice[name].fan_in) and not trained[name].is_meta}
    totals = sums_of_squares([trained[name] for name in fan_ins]) if sigma == "auto" else [1.0] * len(fan_ins)
    zeros = {name for name, total in zip(fan_ins, totals, strict=True) if not total}
    for name, param in trained.items():
        _note_place(model, name, param)
        values = settings_from(advice[name], sigma, keywords)
        if name in zeros:
            values["sigma"] = math.sqrt(1 / fan_ins[name])  # zeros have no scale; their module knows the fan-in
        group = groups.setdefault(tuple(values.items()), {"params": [], **keywords, **values})
        group["params"].append((name, param))
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
    """sigma="auto": for each parameter the root mean square of its entries now; 0.5 for 0-d and 1-d.

    A parameter of zeros gets sqrt(1 / fan_in). Those that are cut over ranks are added up over them, all in one
    all-reduce for each process group: every rank must call this with the same parameters.

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
                "Materialize the model first, or give sigma as a number or 'paper'."
            )
    result = [0.5] * len(params)
    for i, total in zip(measured, sums_of_squares([params[i] for i in measured]), strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"parameter {group_names[i]!r} holds NaN or infinite values. Mend it, or give sigma as a number."
            )
        fan_in = math.prod(shapes[i][row_dims[i] :])
        result[i] = math.sqrt(total / math.prod(shapes[i])) or math.sqrt(1 / max(1, fan_in))
    return result
