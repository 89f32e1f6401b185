"""What trains a model over ranks: one face for DeepSpeed and for FSDP2. Neither is loaded before it is asked for."""

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULES = {"deepspeed": "engine_deepspeed", "fsdp2": "engine_fsdp2"}


class Engine(ABC):
    """A model on this rank's device, with the optimizer and the schedule of a DeepSpeed JSON. Every rank calls all.

    Attributes:
        optimizer: what updates parameters here, without what the framework puts around it.
        batch, micro: sequences in a step of all ranks, and in one forward pass of a rank.
        accumulation: forward passes of a rank in a step; batch = micro x accumulation x ranks.
        settings: what a resumed job must share with the one that saved, beside what the job itself knows.
    """

    device: torch.device
    optimizer: torch.optim.Optimizer
    batch: int
    micro: int
    accumulation: int
    settings: dict[str, Any]

    @staticmethod
    @abstractmethod
    def join() -> None:
        """Meets the other ranks, which the environment names (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, …)."""

    @abstractmethod
    def __init__(self, model: torch.nn.Module, config: dict[str, Any]) -> None:
        """Takes the model, which has the same parameters on every rank, and parts it as `config` says."""

    @abstractmethod
    def __call__(self, tokens: Tensor) -> Tensor:
        """The loss of one micro-batch, which is on this rank's device."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of `loss` / `accumulation`. last: a step follows."""

    @abstractmethod
    def step(self) -> None:
        """Clips, updates the parameters, forgets the gradients and moves the schedule on."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Training, or evaluation."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes parameters, state and schedule as files into `folder`, which need not exist."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote on as many ranks."""

    def close(self) -> None:  # noqa: B027  not every engine has something
        """Lets go of what the next engine in this process needs."""

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])


def engine_of(name: str) -> type[Engine]:
    """The class with a name of MODULES."""
    return importlib.import_module(MODULES[name]).Engine
