"""sigma, moments and row_dims of each parameter, from the modules of a model or from the numbers in a parameter.

Sources: Tian & Parikh 2022, section 3 and appendix (the table of eta, here sigma="paper"); J. Su,
kexue.fm/archives/9344 (sigma = the scale at initialization, here sigma="auto").
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .settings import KEYWORDS, check, check_keys
from .sharding.zero import original_shape, partition_sum_of_squares


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
    kind = type(module).__name__
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

    Parameters with equal settings share a group. Frozen parameters are left out.

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
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        values = settings_from(advice[name], sigma, keywords)
        if sigma == "auto" and (fan_in := advice[name].fan_in) and not param.is_meta and not param.any():
            values["sigma"] = math.sqrt(1 / fan_in)  # zeros have no scale; their module knows the fan-in
        group = groups.setdefault(tuple(values.items()), {"params": [], **keywords, **values})
        group["params"].append((name, param))
    return list(groups.values())


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

    A parameter of zeros gets sqrt(1 / fan_in). Parameters that zero.Init has partitioned are added up over their ranks,
    all in one all-reduce for each process group: every rank must call this with the same parameters.

    Raises:
        RuntimeError: a parameter has no values yet (meta device).
        ValueError: a parameter holds NaN or infinite values.
    """
    sums: list[Tensor | None] = []
    waiting: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        shape = original_shape(param)
        if len(shape) < 2 or math.prod(shape) == 0:
            sums.append(None)
            continue
        if param.is_meta:
            raise RuntimeError(
                f"sigma='auto' needs the values of parameter {group_names[i]!r}, which is on the meta device. "
                "Materialize the model first, or give sigma as a number or 'paper'."
            )
        part = partition_sum_of_squares(param)
        if part is None:
            sums.append(torch.linalg.vector_norm(param.detach(), dtype=torch.float64).square())
        else:
            sums.append(part[0])
            waiting.setdefault(part[1], []).append(i)
    for group, members in waiting.items():
        stacked = torch.stack([total for i in members if (total := sums[i]) is not None])
        dist.all_reduce(stacked, group=group)
        for i, total in zip(members, stacked, strict=True):
            sums[i] = total
    values = zip(params, sums, row_dims, group_names, strict=True)
    return [_scale(param, total, dims, name) for param, total, dims, name in values]


def _scale(param: Tensor, total: Tensor | None, row_dims: int, name: str) -> float:
    if total is None:
        return 0.5
    if not math.isfinite(float(total)):
        raise ValueError(f"parameter {name!r} holds NaN or infinite values. Mend it, or give sigma as a number.")
    shape = original_shape(param)
    if (scale := math.sqrt(float(total) / math.prod(shape))) > 0:
        return scale
    return math.sqrt(1 / max(1, math.prod(shape[row_dims:])))
