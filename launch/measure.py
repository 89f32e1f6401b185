"""What an optimizer's step costs on one rank: its time, and the memory that it adds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from amos_dist.memory.watching import MEANS, Watch

MEMORY_MEANS, StepMemory = MEANS, Watch


class StepTimes:
    """Seconds of each training step: of all of it, of engine.step() in it, and of the optimizer's own part of that."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.device = device
        self.training: list[float] = []
        self.whole: list[float] = []
        self.optimizer: list[float] = []
        self.begun = self.inside = self.stepping = 0.0
        # ZeRO steps once for each group or sub-group: the parts of one step are added up.
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _begin(self, *_: Any) -> None:
        self.begun = self.now()

    def _end(self, *_: Any) -> None:
        self.inside += self.now() - self.begun

    @contextmanager
    def iteration(self, keep: bool) -> Iterator[None]:
        """Around a training step; `keep` is False for those that are not typical."""
        self.inside = 0.0
        begun = self.now()
        yield
        if keep:
            self.training.append(self.now() - begun)
            self.whole.append(self.stepping)
            self.optimizer.append(self.inside)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around engine.step(), in an iteration."""
        begun = self.now()
        yield
        self.stepping = self.now() - begun
