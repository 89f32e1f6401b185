"""What the monitor says of a model that is cut over ranks, and of the same model in one process.

A case: {"name", "do": a function below, "way": "zero" or a way of dtensor_model.shard, …as those of the workers}.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import amos_dist
from tests.distributed import dtensor_worker, zero_worker
from tests.distributed.harness import complaint, serve
from tests.distributed.model import batch

SIZE = 24


def values_of(monitor: amos_dist.Monitor) -> dict[str, Any]:
    last = monitor.last
    assert last is not None
    return {"step": last.step, **last.values}


def whole_of_zero(case: dict[str, Any]) -> dict[str, Any]:
    model = zero_worker.make_model(zero_worker.DTYPES["fp32"])
    optimizer = amos_dist.Amos(zero_worker.grouped(model, case.get("groups", False)), **case["params"])
    monitor = amos_dist.Monitor(optimizer, every=2)
    for step in range(case["steps"]):
        model.zero_grad()
        for part in batch(step, SIZE).chunk(12):
            (model(part) / 12).backward()
        for param in model.parameters():  # ZeRO has zeros where there is no gradient
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        optimizer.step()
    return values_of(monitor)


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Both reports; rank 0 also writes with DeepSpeed's own monitor, if the case turns it on."""
    if case["way"] != "zero":
        trainers = [dtensor_worker.Trainer(case, way) for way in (case["way"], "none")]
        monitors = [amos_dist.Monitor(trainer.optimizer, every=2) for trainer in trainers]
        for step in range(case["steps"]):
            for trainer in trainers:
                trainer.step(step)
        return dict(zip(("cut", "whole"), map(values_of, monitors), strict=True))
    engine = zero_worker.engine_for(case, SIZE)
    to = [amos_dist.monitor.DeepSpeed(engine)] if "config" in case else []
    monitor = amos_dist.Monitor(engine, every=2, to=to)
    zero_worker.train_steps(engine, case, range(case["steps"]))
    cut = values_of(monitor)
    monitor.close()
    zero_worker.train_steps(engine, case, range(case["steps"], case["steps"] + 2))  # the exchange goes on
    return {"cut": cut, "whole": whole_of_zero(case)}


def differ(case: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 has another monitor, or none: what every rank says in the first step."""
    trainer = dtensor_worker.Trainer(case, "fsdp")
    every = case["every"][dist.get_rank()]
    if every:
        amos_dist.Monitor(trainer.optimizer, every=every)
    return {"text": complaint(lambda: trainer.step(0))}


def late(case: dict[str, Any]) -> dict[str, Any]:
    """The ranks have stepped, and so agreed, before there is a monitor."""
    trainer = dtensor_worker.Trainer(case, "fsdp")
    trainer.step(0)
    return {"text": complaint(lambda: amos_dist.Monitor(trainer.optimizer))}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    serve({"train": compare, "differ": differ, "late": late})
