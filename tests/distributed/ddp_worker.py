"""Trains a small model under DDP for each case, alone or with ZeroRedundancyOptimizer, and the same in one process.

A case: {"name", "do": a function below, "zero": whether ranks share the optimizer, "params": Amos's keywords, "steps",
"groups": the sigma for param_groups, or nothing}.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import amos_dist
from tests.distributed.harness import relative, serve
from tests.distributed.model import Model, batch

warnings.filterwarnings("ignore")
SIZE = 12  # sequences of all ranks together


def make_model() -> Model:
    torch.manual_seed(1)
    return Model()


class Trainer:
    """A model, wrapped or in one process, and its optimizer."""

    def __init__(self, case: dict[str, Any], alone: bool = False) -> None:
        self.module = make_model()
        self.ranks = 1 if alone else dist.get_world_size()
        # Replicas that differ, until DDP gives all of them the first rank's numbers.
        if not alone and dist.get_rank():
            with torch.no_grad():
                for param in self.module.parameters():
                    param.mul_(3.0)
        self.model = self.module if alone else DistributedDataParallel(self.module, find_unused_parameters=True)
        groups: Any = [param for param in self.module.parameters() if param.requires_grad]
        if sigma := case.get("groups"):
            groups = amos_dist.param_groups(self.module, sigma=sigma)
            if case["zero"]:  # it takes tensors only
                groups = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
        if alone or not case["zero"]:
            self.optimizer: Any = amos_dist.Amos(groups, **case["params"])
        else:
            self.optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=amos_dist.Amos, **case["params"])

    def train(self, first: int, last: int) -> None:
        rank = dist.get_rank() if self.ranks > 1 else 0
        for number in range(first, last):
            self.model(batch(number, SIZE).chunk(self.ranks)[rank]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: param.detach().clone() for name, param in self.module.named_parameters()}

    def difference(self, other: Trainer) -> dict[str, Any]:
        expected = other.parameters()
        found = {name: relative(value, expected[name]) for name, value in self.parameters().items()}
        where = max(found, key=lambda name: found[name])
        return {"worst": found[where], "where": where}


def train(case: dict[str, Any]) -> dict[str, Any]:
    shared, alone = Trainer(case), Trainer(case, alone=True)
    start = make_model()
    shared.train(0, case["steps"])
    alone.train(0, case["steps"])
    local = shared.optimizer.optim if case["zero"] else shared.optimizer
    return {
        **shared.difference(alone),
        "moved": float((shared.module.inner.weight - start.inner.weight).abs().max()),
        "held": [name for name, param in shared.module.named_parameters() if param in local.state],
        "trained": [name for name, param in alone.module.named_parameters() if param in alone.optimizer.state],
    }


def consolidated(case: dict[str, Any]) -> dict[str, Any]:
    """The first rank's whole state is one process's; a job that starts from it does what the first one does."""
    first, alone = Trainer(case), Trainer(case, alone=True)
    first.train(0, 10)
    alone.train(0, 10)
    first.optimizer.consolidate_state_dict(to=0)
    # A copy: on the first rank the state would be that of both jobs.
    sent: list[Any] = [copy.deepcopy(first.optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0)
    state, expected = sent[0], alone.optimizer.state_dict()
    found: dict[str, float] = {}
    for number, values in expected["state"].items():
        for key, value in values.items():
            got = state["state"].get(number, {}).get(key)
            same = got is not None and got.shape == value.shape
            found[f"{number} {key}"] = relative(got, value) if same else float("inf")
    second = Trainer(case)
    second.module.load_state_dict(first.module.state_dict())
    second.optimizer.load_state_dict(state)
    first.train(10, 20)
    second.train(10, 20)
    alone.train(10, 20)
    where = max(found, key=lambda name: found[name])
    return {
        "state": {"worst": found[where], "where": where},
        "keys": sorted(set(state["state"]) ^ set(expected["state"])),
        "again": second.difference(first),
        **first.difference(alone),
    }


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """What Amos says when it has got the sigmas that another rank has measured for other parameters."""
    first, second = Trainer(case), Trainer(case)
    first.train(0, 2)
    first.optimizer.consolidate_state_dict(to=0)
    sent: list[Any] = [copy.deepcopy(first.optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0)
    second.optimizer.load_state_dict(sent[0])
    second.model(batch(2, SIZE)).backward()
    try:
        second.optimizer.optim.step()
    except Exception as error:
        return {"text": repr(error)}
    return {"text": ""}


def flattened(case: dict[str, Any]) -> dict[str, Any]:
    """What Amos says of a model that FSDP1 has flattened, with and without its original parameters."""
    text = []
    for original in (True, False):
        model = FullyShardedDataParallel(nn.Linear(8, 8), use_orig_params=original, device_id=torch.device("cpu"))
        try:
            amos_dist.Amos(model.named_parameters(), **case["params"])
        except RuntimeError as error:
            text.append(str(error))
    return {"text": text}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    serve({each.__name__: each for each in (train, consolidated, measured, flattened)})
