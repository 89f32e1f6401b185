"""DeepSpeed with ZeRO, as its JSON says."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import amos_dist  # noqa: F401  "type": "Amos" in the JSON
import deepspeed
import torch
from amos_dist import manifest
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import engines
from ranks import agree


class Engine(engines.Engine):
    @staticmethod
    def join() -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings about defaults would drown the bar
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo will do: compile nothing at start
        deepspeed.init_distributed(verbose=False)  # finds its ranks from MPI's too
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))

    def __init__(self, model: torch.nn.Module, config: dict[str, Any]) -> None:
        config = {"steps_per_print": 1 << 30, **config}  # the bar shows progress
        self.engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
        self.device, self.optimizer = self.engine.device, self.engine.basic_optimizer
        self.batch, self.micro = self.engine.train_batch_size(), self.engine.train_micro_batch_size_per_gpu()
        self.accumulation = self.engine.gradient_accumulation_steps()
        self.settings = {"engine": "deepspeed", "ZeRO stage": self.engine.zero_optimization_stage()}

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.engine(tokens)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # only counts

    def step(self) -> None:
        self.engine.step()

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def save(self, folder: Path) -> None:
        agree(lambda: manifest.write(self.engine, folder))

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder.parent), tag=folder.name)

    def close(self) -> None:
        self.engine.destroy()
