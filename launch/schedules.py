"""The schedules that `"scheduler"` in a DeepSpeed JSON names, without DeepSpeed: its warm-ups, and torch's own.

The rates are DeepSpeed's to the bit, with its habit of counting: the first step has the rate before the warm-up.
"""

import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupLR(LRScheduler):
    """From `warmup_min_lr` to `warmup_max_lr` (None: the group's lr) in `warmup_num_steps` steps, constant after."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float = 0.0,
        warmup_max_lr: float | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ) -> None:
        if not isinstance(warmup_num_steps, int) or warmup_num_steps < 1:
            raise ValueError(f"warmup_num_steps={warmup_num_steps!r} is no count. Give a whole number from 1.")
        if warmup_type not in ("log", "linear"):
            raise ValueError(f"warmup_type={warmup_type!r} is unknown. Use 'log' or 'linear'.")
        self.low, self.high = warmup_min_lr, warmup_max_lr
        self.warmup, self.linear = max(2, warmup_num_steps), warmup_type == "linear"
        super().__init__(optimizer)

    def share(self, t: int) -> float:
        """How much of the way from the lowest rate to the highest is gone at step t from 0."""
        if t >= self.warmup:
            return self.after(t)
        return t / self.warmup if self.linear else 1 / math.log(self.warmup) * math.log(t + 1)

    def after(self, t: int) -> float:
        """The same after the warm-up."""
        return 1.0

    def rate(self, base: float, t: int) -> float:
        """The learning rate at step t from 0 of a group whose own is `base`; t is -1 before the first."""
        high = base if self.high is None else self.high
        return self.low + (high - self.low) * (self.share(t) if t >= 0 else 0.0)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [self.rate(float(base), self.last_epoch - 1) for base in self.base_lrs]


class WarmupDecayLR(WarmupLR):
    """The same, and then in a line to `warmup_min_lr` after `total_num_steps` steps."""

    def __init__(
        self, optimizer: Optimizer, total_num_steps: int, *, warmup_max_lr: float = 0.001, **keywords: Any
    ) -> None:
        self.total = total_num_steps
        super().__init__(optimizer, warmup_max_lr=warmup_max_lr, **keywords)

    def after(self, t: int) -> float:
        return max(0.0, (self.total - t) / max(1.0, self.total - self.warmup))


class WarmupCosineLR(WarmupLR):
    """From `warmup_min_ratio` of the group's lr to all of it, then along a cosine to `cos_min_ratio` of it."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
    ) -> None:
        self.total, self.end = total_num_steps, cos_min_ratio
        super().__init__(optimizer, warmup_min_ratio, None, warmup_num_steps, warmup_type)

    def rate(self, base: float, t: int) -> float:
        if t < 0:
            return 0.0
        if t < self.warmup:
            return base * (self.low + self.share(t) * (1 - self.low))
        gone = min(1.0, (t - self.warmup + 1) / max(1, self.total - self.warmup))
        return base * max(0.0, self.end + (1 - self.end) * (1 + math.cos(math.pi * gone)) / 2)


OURS = {each.__name__: each for each in (WarmupLR, WarmupDecayLR, WarmupCosineLR)}


def scheduler_from(optimizer: Optimizer, block: dict[str, Any]) -> LRScheduler:
    """The scheduler that the block `{"type": …, "params": …}` describes; of an empty one, a constant rate.

    Raises:
        ValueError: there is no such scheduler, or it does not take these params.
    """
    name, params = str(block.get("type", "ConstantLR")), block.get("params", {"factor": 1.0} if not block else {})
    kind: Any = OURS.get(name) or getattr(torch.optim.lr_scheduler, name, None)
    if not isinstance(kind, type) or not issubclass(kind, LRScheduler):
        raise ValueError(f"there is no scheduler {name!r}. Name {', '.join(OURS)} or one of torch.optim.lr_scheduler.")
    try:
        return kind(optimizer, **params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the scheduler {name} cannot be made: {error}. Change it in the JSON.") from error
