"""Su's closed-form decays as learning-rate schedulers, for any optimizer. Source: J. Su, kexue.fm/archives/9344.

DeepSpeed's JSON can name them: `"scheduler": {"type": "InverseSquareDecay", "params": {"half_life": 10000}}`.
"""

from __future__ import annotations

import bisect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .guidance import weight_decay_for
from .optimizer import Amos
from .relative_step import RelativeStep

HALF = math.sqrt(2) - 1  # 1 / (1 + HALF)^2 = 1/2
_L2 = ("Adagrad", "Adadelta", "Adamax", "ASGD", "RMSprop", "Rprop")  # what torch adds to the gradient is no decay
# Of any size; relative to the parameter; to its shape.
_NOT_ADAM_LIKE = (torch.optim.SGD, torch.optim.Adafactor, torch.optim.Muon)


class _Decay(LRScheduler):
    """lr_t = lr_0 f(t): linear warm-up over `warmup` steps, then a factor that halves after `half_life` more steps.

    Args:
        half_life: in steps after the warm-up.
        warmup: in steps.
        sigma: the scale of the entries, of groups that have no `sigma` of their own. It couples their weight decay:
            rho_t = lr_0^2 / (2 q sigma^2) f(t), of Adam-like directions, whose lr is alpha_0 sigma. That is what
            the optimizer takes off as lr * weight_decay (AdamW: weight_decay = lr_0 / (2 q sigma^2)). Of directions
            that are no Adam's (Muon, Adafactor, SGD) there is a warning. None: weight decay is left alone.
        q: the larger, the weaker the weight decay. Su: 1.
        independent: the optimizer takes off weight_decay itself, not times lr.

    Raises:
        ValueError: a number out of range; sigma for an optimizer whose weight decay it cannot couple.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        half_life: float,
        warmup: int = 0,
        last_epoch: int = -1,
        *,
        sigma: float | None = None,
        q: float = 1.0,
        independent: bool = False,
    ) -> None:
        for name, value in (("half_life", half_life), ("warmup", warmup)):
            if not value >= 0 or value == math.inf or (name == "half_life" and value == 0):
                raise ValueError(f"{name}={value} is out of range. Give a finite number of steps.")
        self.half_life, self.warmup = half_life, warmup
        self.sigma, self.q, self.independent = sigma, q, independent
        while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # DeepSpeed hands over its ZeRO wrapper
        if sigma is not None:
            for group in optimizer.param_groups:
                _refuse_uncoupled(optimizer, group)
                _check_sigma(group.get("sigma", sigma))
                weight_decay_for(1.0, group.get("sigma", sigma), q)
            _warn_of_other_directions(optimizer, 3 if type(self).__init__ is _Decay.__init__ else 4)
        super().__init__(optimizer, last_epoch)

    def factor(self, t: float) -> float:
        """f(t), t in steps after the warm-up."""
        raise NotImplementedError

    def _scale(self) -> float:
        """lr_t / lr_0 now."""
        t = self.last_epoch
        return (t + 1) / (self.warmup + 1) if t < self.warmup else self.factor(t - self.warmup)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        scale = self._scale()
        return [float(base) * scale for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if len(self.optimizer.param_groups) != len(self.base_lrs):
            raise ValueError(
                f"the optimizer has {len(self.optimizer.param_groups)} parameter groups, and had {len(self.base_lrs)} "
                f"when {type(self).__name__} was built. Add groups first, then build the scheduler."
            )
        super().step(epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if self.sigma is not None and float(base):
                constant = weight_decay_for(float(base), group.get("sigma", self.sigma), self.q)
                group["weight_decay"] = constant * float(base) * self._scale() if self.independent else constant


def _refuse_uncoupled(optimizer: Optimizer, group: dict[str, Any]) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, (Amos, RelativeStep)):
        raise ValueError(f"{kind} has a weight decay that follows from its own sigma. Leave the scheduler's sigma out.")
    if "weight_decay" not in group:
        raise ValueError(f"{kind} has no weight_decay that could be coupled. Use AdamW, or leave sigma out.")
    plain = isinstance(optimizer, torch.optim.SGD) and not group["momentum"]
    adds_to_gradient = kind in _L2 or (isinstance(optimizer, torch.optim.SGD) and not plain)
    decoupled = group.get("decoupled_weight_decay", True) and getattr(optimizer, "adam_w_mode", True)
    if adds_to_gradient or not decoupled:
        raise ValueError(
            f"{kind} adds its weight_decay to the gradient, where it is not a share of the parameter. "
            "Use AdamW (or decoupled_weight_decay=True), RelativeStep around any optimizer, or leave sigma out."
        )


def _check_sigma(sigma: Any) -> None:
    if not isinstance(sigma, SupportsFloat):  # a string has no __float__
        raise ValueError(
            f"sigma={sigma!r} of a parameter group is no number. Give the scheduler's sigma, and groups numbers or "
            'none: param_groups(model, sigma="paper") makes numbers.'
        )


def _warn_of_other_directions(optimizer: Optimizer, caller: int) -> None:
    """caller: how many frames above is the one who builds the scheduler."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, _NOT_ADAM_LIKE):
        warnings.warn(
            f"{kind}'s directions do not have entries of about 1, so that lr is not alpha_0 sigma, and the weight "
            "decay that sigma couples may be hundreds of times too strong. RelativeStep around it measures its "
            "directions: use that, or leave the scheduler's sigma out.",
            stacklevel=caller,
        )


class InverseSquareDecay(_Decay):
    """f(t) = 1 / (1 + (sqrt(2) - 1) t / T)^2 with T = half_life: what Amos's own decay tends to."""

    def factor(self, t: float) -> float:
        return 1 / (1 + HALF * t / self.half_life) ** 2


class InverseTimeDecay(_Decay):
    """f(t) = 1 / (1 + t / T) with T = half_life."""

    def factor(self, t: float) -> float:
        return 1 / (1 + t / self.half_life)


class IntegralDecay(_Decay):
    """f(t) = exp(-2 S_t), exp(-S_t) = 1 / (1 + a P(t)), P(t) the integral of p from 0 to t, a such that f(T) = 1/2.

    p_t is how fast the decay runs at step t; only its shape counts, since T = half_life sets its size. A constant p is
    InverseSquareDecay, and p_t = p_0 exp(-S_t) is InverseTimeDecay.

    Args:
        p: pairs [t, p] between which p is linear, and constant outside, as DeepSpeed's JSON can hold them; or a
            function of t (in steps after the warm-up), which is integrated step by step, and is not saved in
            state_dict(); or a number: a constant. Never negative.
        half_life: this, and what is not here, as of the other decays.

    Raises:
        ValueError: p is negative, or 0 up to the half-life.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        half_life: float,
        warmup: int = 0,
        last_epoch: int = -1,
        *,
        p: Callable[[float], float] | Sequence[Sequence[float]] | float = 1.0,
        sigma: float | None = None,
        q: float = 1.0,
        independent: bool = False,
    ) -> None:
        self.p = p
        self._integral = _integral_of(p)
        if half_life > 0 and math.isfinite(half_life) and not self._integral(half_life) > 0:
            raise ValueError(f"p is 0 up to half_life={half_life}, so that nothing halves. Give a p that is not.")
        super().__init__(optimizer, half_life, warmup, last_epoch, sigma=sigma, q=q, independent=independent)

    def factor(self, t: float) -> float:
        return 1 / (1 + HALF * self._integral(t) / self._integral(self.half_life)) ** 2

    def state_dict(self) -> dict[str, Any]:
        left_out = ("_integral", "p") if callable(self.p) else ("_integral",)
        return {key: value for key, value in super().state_dict().items() if key not in left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._integral = _integral_of(self.p)


def _integral_of(p: Callable[[float], float] | Sequence[Sequence[float]] | float) -> Callable[[float], float]:
    """The integral of p from 0 to t, as a function of t."""
    if callable(p):
        return _Steps(p)
    try:
        knots = [(0.0, float(p))] if isinstance(p, (int, float)) else [(float(t), float(value)) for t, value in p]
    except (TypeError, ValueError):
        knots = []
    times = [t for t, _ in knots]
    if not knots or not all(a < b for a, b in itertools.pairwise(times)) or not times[0] >= 0 or times[-1] == math.inf:
        raise ValueError(f"p={p!r} is no list of pairs [t, p] in the order of t, from 0 on. Give such a list.")
    for t, value in knots:
        _checked(value, t)
    if times[0] > 0:
        knots = [(0.0, knots[0][1]), *knots]
        times = [0.0, *times]
    areas = [(b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(knots)]
    sums = [0.0, *itertools.accumulate(areas)]

    def integral(t: float) -> float:
        i = bisect.bisect_right(times, t) - 1
        (begin, value), rest = knots[i], t - times[i]
        slope = (knots[i + 1][1] - value) / (times[i + 1] - begin) if i + 1 < len(knots) else 0.0
        return sums[i] + rest * (value + slope * rest / 2)

    return integral


class _Steps:
    """The integral of a function: Gauss's rule of three points in each step, summed up once."""

    def __init__(self, p: Callable[[float], float]) -> None:
        self.p, self.sums = p, [0.0]

    def __call__(self, t: float) -> float:
        whole = int(t)
        while len(self.sums) <= whole:
            step = len(self.sums) - 1
            self.sums.append(self.sums[-1] + self._area(step, step + 1))
        return self.sums[whole] + (self._area(whole, t) if t > whole else 0.0)

    def _area(self, begin: float, end: float) -> float:
        middle, half = (begin + end) / 2, (end - begin) / 2
        points = ((middle - math.sqrt(0.6) * half, 5), (middle, 8), (middle + math.sqrt(0.6) * half, 5))
        return half / 9 * sum(weight * _checked(self.p(t), t) for t, weight in points)


def _checked(value: float, t: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"p={value} at t={t} is out of range. Give a p that is finite and never negative.")
    return float(value)


for _scheduler in (InverseSquareDecay, InverseTimeDecay, IntegralDecay):  # DeepSpeed looks schedulers up there
    setattr(torch.optim.lr_scheduler, _scheduler.__name__, _scheduler)
