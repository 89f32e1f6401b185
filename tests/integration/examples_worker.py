"""Runs an example as `python EXAMPLE …` would, on each rank, and reports what it has left behind."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import amos_dist
from tests.distributed.harness import received, report


def facts(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Of a training that has ended: what has become a DTensor, and over how many ranks."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, DTensor)]
    params = [param for param in model.parameters() if isinstance(param, DTensor)]
    return {
        "amos": isinstance(optimizer, amos_dist.Amos),
        "ranks": sorted({tensor.device_mesh.size() for tensor in [*params, *states]}),
        "sharded parameters": len(params),
        "sharded states": len(states),
    }


def accelerate(example: str) -> dict[str, Any]:
    """With FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` asks for it.

    Accelerate takes FSDP only where it has found GPUs, so it is told that it has (as in accelerate_worker.py).
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    left = runpy.run_path(example, run_name="__main__")
    return {**facts(left["model"], left["optimizer"].optimizer), "losses": left["losses"]}


def lightning(example: str) -> dict[str, Any]:
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # as torchrun sets it: Lightning starts no ranks of its own
    left = runpy.run_path(example, run_name="__main__")
    (optimizer,) = left["trainer"].optimizers
    return {**facts(left["model"], optimizer), "losses": left["model"].losses}


def huggingface(example: str) -> dict[str, Any]:
    left = runpy.run_path(example, run_name="__main__")
    engine, log = left["trainer"].model_wrapped, left["trainer"].state.log_history
    optimizer = engine.basic_optimizer
    return {
        "class": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "ranks": engine.dp_world_size,
        "stage": engine.zero_optimization_stage(),
        "losses": [float(entry["loss"]) for entry in log if "loss" in entry],
    }


if __name__ == "__main__":
    wanted = received()
    sys.argv = [wanted["example"], *wanted["arguments"]]
    run = {"accelerate": accelerate, "lightning": lightning, "huggingface": huggingface}[wanted["by"]]
    report(run(wanted["example"]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)
