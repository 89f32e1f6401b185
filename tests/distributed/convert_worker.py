"""Trains a small model under ZeRO or FSDP2, saves, and goes on; and loads what was converted, and goes on from there.

A case: {"name", "do": a function below, "folder", "params": Amos's keywords, "groups": two parameter groups, "stage",
"dtype", "zero": more of zero_optimization}.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import amos_dist
from tests.distributed import zero_worker
from tests.distributed.harness import received, relative, report
from tests.distributed.model import batch
from tests.distributed.zero_worker import DTYPES, full_parameters, grouped

warnings.filterwarnings("ignore")
SIZE, SAVED, END = 24, 5, 15


def make_model(case: dict[str, Any], start: int = 1) -> nn.Module:
    """start: another one is of other numbers, but for the frozen weight: a universal load leaves that as it is."""
    model = zero_worker.make_model(DTYPES[case.get("dtype", "fp32")])
    model.register_buffer("seen", torch.tensor([start]))
    if start != 1:
        for param in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(param)
    return model


def mine(step: int) -> torch.Tensor:
    return batch(step, SIZE).chunk(dist.get_world_size())[dist.get_rank()]


class Zero:
    def __init__(self, case: dict[str, Any], start: int = 1, universal: bool = False) -> None:
        config = {"checkpoint": {"load_universal": universal}, **case.get("config", {})}
        given = {"dtype": "fp32", **case, "micro": SIZE // dist.get_world_size(), "config": config}
        self.model = make_model(case, start)
        self.engine = zero_worker.engine_for(given, SIZE, self.model)

    def train(self, steps: range) -> None:
        for step in steps:
            self.engine.backward(self.engine(mine(step)))
            self.engine.step()

    def parameters(self) -> dict[str, torch.Tensor]:
        return full_parameters(self.engine)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), "five", client_state={"epoch": 3})

    def load(self, folder: Path) -> None:
        _, client = self.engine.load_checkpoint(str(folder))
        assert client["epoch"] == 3 and self.engine.global_steps == SAVED


class Fsdp:
    def __init__(self, case: dict[str, Any], start: int = 1) -> None:
        self.case, self.model = case, make_model(case, start)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (self.model.inner, self.model):
            fully_shard(module, mesh=mesh)
        self.optimizer = amos_dist.Amos(grouped(self.model, case.get("groups", False)), **case["params"])

    def train(self, steps: range) -> None:
        for step in steps:
            self.model(mine(step)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: param.full_tensor().detach().clone() for name, param in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=self.case.get("flatten", False))
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {"app": {"model": get_model_state_dict(self.model), "optim": optimizer}, "epoch": 3}

    def save(self, folder: Path) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["app"]["model"])
        options = StateDictOptions(flatten_optimizer_state_dict=self.case.get("flatten", False))
        set_optimizer_state_dict(self.model, self.optimizer, state["app"]["optim"], options=options)
        assert state["epoch"] == 3


def other(case: dict[str, Any]) -> dict[str, Any]:
    """With keywords that the checkpoint must replace."""
    return {**case, "params": {**case["params"], "lr": 0.5, "beta": 0.5}}


def save(case: dict[str, Any], trainer: Zero | Fsdp) -> dict[str, Any]:
    folder = Path(case["folder"])
    trainer.train(range(SAVED))
    trainer.save(folder / "saved")
    before = trainer.parameters()
    trainer.train(range(SAVED, END))
    after = trainer.parameters()
    if dist.get_rank() == 0:
        torch.save({"before": before, "after": after}, folder / "expected.pt")
    return {}


def load(case: dict[str, Any], trainer: Zero | Fsdp) -> dict[str, Any]:
    folder = Path(case["folder"])
    expected = torch.load(folder / "expected.pt")
    trainer.load(folder / case["from"])
    got = trainer.parameters()
    different = [name for name, value in expected["before"].items() if not torch.equal(got[name], value)]
    trainer.train(range(SAVED, END))
    after = trainer.parameters()
    errors = {name: relative(after[name], value) for name, value in expected["after"].items()}
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else 1e9)
    moved = float((after["inner.weight"] - expected["before"]["inner.weight"]).abs().max())
    return {"different": different, "worst": errors[where], "where": where, "moved": moved}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    results = []
    for case in received():
        if dist.get_rank() == 0:
            print(case["name"], case["do"], flush=True)
        do = {
            "zero save": lambda c: save(c, Zero(c)),
            "fsdp save": lambda c: save(c, Fsdp(c)),
            "zero load": lambda c: load(c, Zero(other(c), 2, universal=True)),
            "fsdp load": lambda c: load(c, Fsdp(other(c), 2)),
        }
        results.append({"name": case["name"], **do[case["do"]](case)})
    report(results)
    dist.barrier()
    os._exit(0)
