"""Su's closed-form decays as learning-rate schedulers, for any optimizer. Source: J. Su, kexue.fm/archives/9344.

DeepSpeed's JSON can name them: `"scheduler": {"type": "InverseSquareDecay", "params": {"half_life": 10000}}`.
"""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class _Decay(LRScheduler):
    """lr_t = lr_0 f(t): linear warm-up over `warmup` steps, then a factor that halves after `half_life` more steps."""

    def __init__(self, optimizer: Optimizer, half_life: float, warmup: int = 0, last_epoch: int = -1) -> None:
        for name, value in (("half_life", half_life), ("warmup", warmup)):
            if not value >= 0 or value == math.inf or (name == "half_life" and value == 0):
                raise ValueError(f"{name}={value} is out of range. Give a finite number of steps.")
        self.half_life, self.warmup = half_life, warmup
        while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # DeepSpeed hands over its ZeRO wrapper
        super().__init__(optimizer, last_epoch)

    def factor(self, t: float) -> float:
        """f(t), t in steps after the warm-up."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:  # type: ignore[override]
        t = self.last_epoch
        scale = (t + 1) / (self.warmup + 1) if t < self.warmup else self.factor(t - self.warmup)
        return [float(base) * scale for base in self.base_lrs]


class InverseSquareDecay(_Decay):
    """f(t) = 1 / (1 + (sqrt(2) - 1) t / T)^2 with T = half_life: what Amos's own decay tends to."""

    def factor(self, t: float) -> float:
        return 1 / (1 + (math.sqrt(2) - 1) * t / self.half_life) ** 2


class InverseTimeDecay(_Decay):
    """f(t) = 1 / (1 + t / T) with T = half_life."""

    def factor(self, t: float) -> float:
        return 1 / (1 + t / self.half_life)


for _scheduler in (InverseSquareDecay, InverseTimeDecay):  # DeepSpeed looks schedulers up there
    setattr(torch.optim.lr_scheduler, _scheduler.__name__, _scheduler)
