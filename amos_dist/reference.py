"""One step of Amos for one whole tensor, in plain torch: slow, complete, and what everything else is tested against.

Imports nothing of this package. Sources: Tian & Parikh 2022 (arXiv 2210.11693), algorithm 1; the factored second moment
is this project's (docs/algorithm.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("factored", "row", "column", "scalar", "full")
RUN = 256  # elements that share the scale of an int8 momentum; csrc/block.h: kRun


def matrix_view(shape: torch.Size | tuple[int, ...], row_dims: int) -> tuple[int, int]:
    """(R, C) of a tensor read as a matrix: R = the product of the first `row_dims` sizes, C = that of the rest."""
    return math.prod(shape[:row_dims]), math.prod(shape[row_dims:])


def effective_moments(shape: torch.Size | tuple[int, ...], moments: str, row_dims: int = 1) -> str:
    """The kind of second moment that a tensor really gets: 0-d and 1-d tensors are "scalar" unless "full" is asked for.

    Raises:
        ValueError: `moments` is unknown, or `row_dims` leaves no row or no column dimension of a tensor of two or more.
    """
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments!r} is unknown. Use one of {', '.join(map(repr, MOMENTS))}.")
    if moments in ("scalar", "full"):
        return moments
    if len(shape) < 2:
        return "scalar"
    if not 1 <= row_dims < len(shape):
        raise ValueError(
            f"row_dims={row_dims} leaves no row or no column of a tensor of shape {tuple(shape)}. "
            f"Use 1 to {len(shape) - 1}."
        )
    return moments


def _root(x: float | Tensor) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def coefficients(
    G: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    lr: float | Tensor,
    sigma: float | Tensor,
    bias: float | Tensor,
    extra_l2: float | Tensor,
    c_coef: float | Tensor,
    d_coef: float | Tensor,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an entry of the state does to its elements: Delta = scale * sqrt(inv_v) * g + B * theta.

    Args:
        G: mean square of the gradient. v: second moment, already moved on. b: decay, still old. All of one shape.
        bias: 1 - beta^t.

    Returns:
        scale, B, inv_v (1 / v_hat) and the next b.
    """
    inv_v = bias / v.clamp(min=eps)
    c = 1 / (1 + c_coef * _root(lr) * b).sqrt()
    d = 1 / (1 + d_coef * _root(lr * sigma) * b)
    gamma = c * lr**2 * (inv_v * G)
    return d * (lr * sigma), d * (gamma / 2 + extra_l2), inv_v, b + gamma * (1 + b)


def column_profile(column_moment: Tensor) -> Tensor:
    """w = C / mean(C), the factored second moment's profile over the columns; ones where no column has any."""
    average = column_moment.mean()
    return torch.where(average == 0, torch.ones_like(column_moment), column_moment / average)


def _mixed(x: Any, salt: int) -> Any:
    """A hash of 32-bit numbers: an int, or an int64 tensor. lowbias32 of C. Wellons, with a salt in its middle."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF) ^ salt
    x = (x ^ (x >> 15)) * 0xD35A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


def _random(index: Tensor, seed: int, t: int) -> Tensor:
    """32 random bits for each element; the arguments are those of `stochastic_bfloat16`."""
    key = _mixed(seed, t)
    return _mixed((index & 0xFFFFFFFF) ^ ((key + (index >> 32) * 0x9E3779B1) & 0xFFFFFFFF), _mixed(key, 0x9E3779B9))


def stochastic_bfloat16(values: Tensor, index: Tensor, seed: int, t: int) -> Tensor:
    """Rounds to one of the two nearest bfloat16s, up with a probability of the part that is cut off.

    Args:
        values: float32. index: int64, of the same shape: each element's number in its parameter, row-major.
        seed: of the parameter, below 2**32. t: the step. The same three give the same numbers everywhere.
    """
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    rounded = (bits + (_random(index, seed, t) >> 16)) >> 16 & 0xFFFF
    result = ((rounded ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), torch.full_like(result, math.nan), result)


def stochastic_int8(values: Tensor, index: Tensor, seed: int, t: int) -> tuple[Tensor, Tensor]:
    """Rounds each run of 256 numbers to whole multiples of a scale, up or down by chance; all others are as above.

    To nearest would not do: a momentum mu m + (1 - mu) s that is kept so never leaves 0 for a step s of less than half
    a multiple over 1 - mu, which is 4 % of the largest in its run at mu = 0.9.

    Args:
        values: float32, a vector: the elements of one block.

    Returns:
        int8, of the same shape; and a scale for each run, of 16 bits, so that its product with an int8 is exact. The
        largest of a run is 127 or -127; one below 2**-100 counts as 0, and a run that is not finite becomes NaN.
    """
    runs = torch.nn.functional.pad(values, (0, -len(values) % RUN)).view(-1, RUN)
    bits = runs.view(torch.int32) & 0x7FFFFFFF
    largest = bits.amax(1) if len(bits) else bits.new_zeros(0)
    tiny, infinite = largest < 27 << 23, largest >= 0x7F800000
    # Of 16 bits, and a little less than a 127th, so that the largest is not rounded below 127.
    scale = ((largest.view(torch.float32) * (1 / 127)).view(torch.int32) - 16 & -256).view(torch.float32)
    inverse = torch.where(tiny | infinite, 0, 1 / scale)
    scale = torch.where(infinite, math.nan, torch.where(tiny, 0, scale))
    chance = ((_random(index, seed, t) & 0xFFFF) + 2**23).to(torch.float32) * 2**-16  # 128 to 129
    level = values * inverse.repeat_interleave(RUN)[: len(values)] + chance
    level = torch.where(level >= 1, level, 1).clamp(max=255)  # a NaN is 1
    return (level.to(torch.int32) - 128).to(torch.int8), scale


def nearest_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same to nearest, for numbers that are loaded. Those that `widened_int8` gave are kept as they were."""
    runs = torch.nn.functional.pad(values, (0, -len(values) % RUN)).view(-1, RUN)
    largest = runs.abs().amax(1) if len(runs) else runs.new_zeros(0)
    scale = ((largest / 127).view(torch.int32) + 128 & -256).view(torch.float32)
    scale = torch.where(largest.isfinite(), torch.where(largest < 2**-100, 0, scale), math.nan)
    level = (runs / scale.unsqueeze(1)).nan_to_num(0, 0, 0).round().clamp(-127, 127)
    return level.to(torch.int8).view(-1)[: len(values)], scale


def widened_int8(values: Tensor, scale: Tensor) -> Tensor:
    """What `stochastic_int8` and `nearest_int8` gave, in float32: exactly, for 8 and 16 bits make 23."""
    return values * scale.repeat_interleave(RUN)[: len(values)]


def _measured(param: Tensor, row_dims: int, sigma: str) -> float:
    """sigma="auto": the root mean square of the entries; 0.5 for 0-d and 1-d, sqrt(1 / fan_in) for zeros."""
    if sigma != "auto":
        raise ValueError(f"sigma={sigma!r} is not known here. Give a number or 'auto'.")
    if param.dim() < 2:
        return 0.5
    scale = param.detach().double().square().mean().sqrt().item()
    return scale or math.prod(param.shape[row_dims:]) ** -0.5


def amos_step(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    sigma: float | str = "auto",
    beta: float = 0.999,
    momentum: float = 0.0,
    moments: str = "factored",
    row_dims: int = 1,
    clip_value: float | None = None,
    extra_l2: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
    eps: float = 2**-125,
    momentum_dtype: torch.dtype | None = None,
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
    capturable: bool = False,
    master_weights: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> Tensor:
    """Changes `param` and `state` in place by one step, and returns `param`.

    Args:
        param: 0-d and up; float64 is computed in float64, all else in float32.
        grad: of the same shape.
        state: empty before the first step; then `step` (int), `decay`, `momentum`, and `row_moment` and `column_moment`
            ("factored"), or `row_moment`, `column_moment`, `moment` ("scalar", "full"): keepdim shapes, compute dtype.
        lr: the paper's xi at this step.
        sigma: the paper's eta, the scale where entries settle; "auto": measured at the first step, kept in `state`.
        clip_value: element-wise, before anything else.
        extra_l2: inside the d factor.
        foreach: this, `fused` and `capturable` say how class Amos computes; nothing here.
        master_weights: keeps a bfloat16 or float16 parameter in float32 too, as `state["master"]`.
        momentum_dtype: torch.int8 has `momentum_scale` beside it, of float32: see `stochastic_int8`.
        stochastic_rounding: of a bfloat16 parameter without a master.
        seed: the parameter's own, below 2**32.
    """
    if isinstance(sigma, str):
        sigma = float(state.setdefault("sigma", _measured(param, row_dims, sigma)))
    kind = effective_moments(param.shape, moments, row_dims)
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    index = torch.arange(param.numel(), device=param.device)
    with_master = master_weights and param.dtype in (torch.bfloat16, torch.float16)
    if with_master:
        state.setdefault("master", param.detach().float())
    theta = state["master"] if with_master else param.detach().to(compute)
    g = grad.detach().to(compute)
    dims = tuple(range(param.dim()))
    row_axes, column_axes = dims[row_dims:], dims[:row_dims]  # what a row's, and a column's, mean is taken over
    averaged = {"row": row_axes, "factored": row_axes, "column": column_axes, "scalar": dims, "full": ()}[kind]

    def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.mean(dim=axes, keepdim=True) if axes else x.clone()

    def moved(key: str, value: Tensor) -> Tensor:  # v <- beta v + (1 - beta) G
        old = state.get(key, torch.zeros_like(value))
        state[key] = beta * old + (1 - beta) * value
        return state[key]

    if clip_value is not None:
        g = g.clamp(-clip_value, clip_value)
    step = state["step"] = int(state.get("step", 0)) + 1
    bias = 1 - beta**step

    G = mean(g * g, averaged)
    own = {"row": "row_moment", "factored": "row_moment", "column": "column_moment"}.get(kind, "moment")
    v = moved(own, G)
    scale, B, inv_v, decay = coefficients(
        G,
        v,
        state.get("decay", torch.zeros_like(G)),
        lr=lr,
        sigma=sigma,
        bias=bias,
        extra_l2=extra_l2,
        c_coef=c_coef,
        d_coef=d_coef,
        eps=eps,
    )
    state["decay"] = decay
    if kind == "factored":  # v_ij = R_i w_j, w = C / mean(C); all else stays that of the row
        w = column_profile(moved("column_moment", mean(g * g, column_axes)))
        inv_v = bias / (v * w).clamp(min=eps)

    signed = -g if maximize else g
    delta = scale * inv_v.sqrt() * signed + B * theta
    if momentum:
        stored = compute if compute == torch.float64 else momentum_dtype or compute
        m = state.get("momentum", torch.zeros_like(theta, dtype=stored))
        if stored == torch.int8 and "momentum_scale" in state:
            m = widened_int8(m.view(-1), state["momentum_scale"]).view(m.shape)
        delta = momentum * m.to(compute) + (1 - momentum) * delta
        if stored == torch.int8:
            rounded, state["momentum_scale"] = stochastic_int8(delta.reshape(-1), index, seed, step)
            state["momentum"] = rounded.view(delta.shape)
        else:
            state["momentum"] = delta.to(stored)
    theta = theta - delta
    if with_master:
        state["master"] = theta
    elif stochastic_rounding and param.dtype == torch.bfloat16:
        theta = stochastic_bfloat16(theta, index.view(theta.shape), seed, step)
    param.detach().copy_(theta)
    return param
