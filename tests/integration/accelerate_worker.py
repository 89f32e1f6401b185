"""Trains a small model with Accelerate's FSDP2 for each case, and the same in one process, and reports the difference.

A case: {"name", "do": a function below, "make": how Amos is made, "params": its keywords, "steps", …}.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import amos_dist
from tests.distributed.dtensor_model import EXPERTS, batch, make_model
from tests.distributed.harness import complaint, relative, serve

warnings.filterwarnings("ignore")


class Outer(nn.Module):
    """Accelerate 1.15 fails on parameters of the root module itself, where its cpu_ram_efficient_loading is on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def accelerator() -> Accelerator:
    """On the CPU, with FSDP2.

    Accelerate takes its FSDP plugin only where it has found GPUs (AcceleratorState.__init__ compares `distributed_type`
    with a list), so it is told that it has. Nothing else: all of its FSDP2 then runs as it is, over gloo.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=80, cpu_ram_efficient_loading=False
    )
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def optimizer_of(model: nn.Module, case: dict[str, Any]) -> amos_dist.Amos:
    params = {"rules": EXPERTS if case["make"] != "plain" else None, **case["params"]}
    if case["make"] == "plain":
        return amos_dist.Amos(model.parameters(), **params)
    if case["make"] == "named":
        return amos_dist.Amos(model.named_parameters(), **params)
    return amos_dist.Amos(amos_dist.param_groups(model, sigma=case["make"]), **params)


class Trainer:
    """A model and its optimizer, as Accelerate gives them back, or in one process."""

    def __init__(self, case: dict[str, Any], to: Accelerator | None) -> None:
        self.to, self.clip = to, case.get("clip")
        model = Outer()
        when = case.get("when", "before")
        if to is None:
            self.model, self.optimizer = model, optimizer_of(model, case)
            return
        to.free_memory()
        to.state.fsdp_plugin.cpu_ram_efficient_loading = case.get("lean", False)
        if when == "before":
            self.model, self.optimizer = to.prepare(model, optimizer_of(model, case))
        elif when == "between":  # the user shards the model
            fully_shard(model.net.up)
            fully_shard(model)
            self.model, self.optimizer = to.prepare(model, optimizer_of(model, case))
        else:  # Accelerate does not shard a model without an optimizer
            self.model, _ = to.prepare(model, torch.optim.SGD(model.parameters()))
            self.optimizer = to.prepare_optimizer(optimizer_of(self.model, case))

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            if self.to is None:
                self.model(batch(number)).backward()
                if self.clip:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            else:
                mine = batch(number).chunk(self.to.num_processes)[self.to.process_index]
                self.to.backward(self.model(mine))
                if self.clip:
                    self.to.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, param in self.model.named_parameters():
            found[name] = (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        return found


def difference(got: Trainer, expected: Trainer) -> dict[str, Any]:
    values = got.parameters()
    found = {name: relative(values[name], value) for name, value in expected.parameters().items()}
    where = max(found, key=lambda name: found[name])
    return {"worst": found[where], "where": where}


def train(case: dict[str, Any], to: Accelerator) -> dict[str, Any]:
    sharded, alone = Trainer(case, to), Trainer(case, None)
    start = alone.parameters()
    sharded.train(0, case["steps"])
    alone.train(0, case["steps"])
    states = sharded.optimizer.state
    return {
        **difference(sharded, alone),
        "moved": float((alone.parameters()["net.up.weight"] - start["net.up.weight"]).abs().max()),
        "sharded": [
            isinstance(sharded.model, FSDPModule),
            all(isinstance(param, DTensor) for param in sharded.model.parameters()),
            {id(param) for param in sharded.model.parameters()} == {id(param) for param in states},
        ],
    }


def resume(case: dict[str, Any], to: Accelerator) -> dict[str, Any]:
    """A job that starts from save_state's folder does what the one does that has saved it."""
    first = Trainer(case, to)
    first.train(0, 5)
    to.save_state(case["folder"])
    first.train(5, 10)
    second = Trainer(case, to)
    to.load_state(case["folder"])
    second.train(5, 10)
    return difference(second, first)


def late(case: dict[str, Any], to: Accelerator) -> dict[str, Any]:
    """What Amos says when the model is sharded after it has stepped."""
    to.free_memory()
    model = Outer()
    optimizer: Any = optimizer_of(model, case)
    model(batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model, optimizer = to.prepare(model, optimizer)
    to.backward(model(batch(1)))
    return {"text": complaint(optimizer.step)}


def empty(case: dict[str, Any], to: Accelerator) -> dict[str, Any]:
    """What Amos says when only the first rank had the weights, as from_pretrained leaves it, and sigma is measured."""
    to.free_memory()
    to.state.fsdp_plugin.cpu_ram_efficient_loading = True
    model = Outer()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(to.is_main_process)
    model, optimizer = to.prepare(model, optimizer_of(model, case))
    to.backward(model(batch(0)))
    return {"text": complaint(optimizer.step)}


if __name__ == "__main__":
    with_fsdp2 = accelerator()
    assert with_fsdp2.is_fsdp2
    serve({each.__name__: functools.partial(each, to=with_fsdp2) for each in (train, resume, late, empty)})
