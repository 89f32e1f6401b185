"""FSDP2 (torch.distributed.fsdp.fully_shard) from the same JSON that DeepSpeed reads; needs torch alone."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import amos_dist
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import engines
from ranks import AgreedError, agree
from schedules import scheduler_from

SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
READ = (*SIZES, "gradient_clipping", "bf16", "zero_optimization", "optimizer", "scheduler")
UNHEEDED = ("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer")  # change no number
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@dataclass
class Settings:
    """What FSDP2 takes from the JSON. batch, micro, accumulation: see engines.Engine; clip: a norm, 0 for none.

    gather_twice: whether parameters are given up after the forward pass, as ZeRO-3 does, and gathered for the backward.
    """

    batch: int
    micro: int
    accumulation: int
    clip: float
    bf16: bool
    gather_twice: bool


def read(config: dict[str, Any], ranks: int) -> Settings:
    """The settings in a DeepSpeed JSON, with DeepSpeed's defaults.

    Raises:
        ValueError: there is something in it that FSDP2 would do otherwise, or sizes that contradict each other.
    """
    zero = config.get("zero_optimization", {})
    offloads = {f"zero_optimization.{key}": zero[key] for key in ("offload_optimizer", "offload_param") if key in zero}
    for key, value in {**config, **offloads}.items():
        off = isinstance(value, dict) and (value.get("enabled") is False or value.get("device") == "none")
        if key not in (*READ, *UNHEEDED) and not off:
            raise ValueError(f'--engine fsdp2 does not know "{key}" in the JSON. Remove it, or use --engine deepspeed.')
    batch, micro, accumulation = _sizes(config, ranks)
    if not micro or batch != micro * accumulation * ranks:
        raise ValueError(
            f'"train_batch_size": {batch} in the JSON is not {micro} sequences x {accumulation} accumulation steps x '
            f"{ranks} ranks. Change one of them, or the number of ranks."
        )
    clip = config.get("gradient_clipping", 1.0)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip >= 0:
        raise ValueError(f'"gradient_clipping": {clip!r} in the JSON is no norm. Give a number; 0 clips nothing.')
    bf16 = config.get("bf16", {}).get("enabled", False)
    if not isinstance(bf16, bool):
        raise ValueError(f'"bf16": {{"enabled": {bf16!r}}} in the JSON is neither true nor false. Choose one.')
    return Settings(batch, micro, accumulation, float(clip), bf16, zero.get("stage") == 3)


def _sizes(config: dict[str, Any], ranks: int) -> tuple[int, int, int]:
    """Batch, micro-batch and accumulation steps; those that the JSON leaves out follow from the others."""
    for key in SIZES:
        if key in config and not (isinstance(config[key], int) and config[key] >= 1):
            raise ValueError(f'"{key}": {config[key]!r} in the JSON is no count. Give a whole number from 1.')
    batch, micro, accumulation = (int(config.get(key, 0)) for key in SIZES)
    if not batch and not micro:
        raise ValueError('the JSON has no batch size. Add "train_batch_size", in sequences of all ranks together.')
    accumulation = accumulation or (max(1, batch // (micro * ranks)) if micro else 1)
    micro = micro or batch // (accumulation * ranks)
    return batch or micro * accumulation * ranks, micro, accumulation


def optimizer_from(model: torch.nn.Module, block: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that the block `{"type": …, "params": …}` describes, for all parameters of a sharded model.

    Raises:
        ValueError: there is no such optimizer, or it does not take these params.
    """
    name, params = str(block["type"]), dict(block.get("params", {}))
    try:
        if name.lower() == "amos":
            rules = params.pop("rules", None)
            return amos_dist.Amos(amos_dist.param_groups(model, **params), rules=rules, **params)
        if name.lower() in ("adam", "adamw"):  # DeepSpeed's "Adam" is AdamW too, unless it is told otherwise
            params.pop("torch_adam", None)
            decoupled = params.pop("adam_w_mode", True) or name.lower() == "adamw"
            name = "AdamW" if decoupled else "Adam"
        kind = getattr(torch.optim, name, None)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            raise ValueError("torch.optim has no such class")
        return kind(model.parameters(), **params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the optimizer {name} cannot be made: {error}. Change it in the JSON.") from error


class Engine(engines.Engine):
    @staticmethod
    def join() -> None:
        if "RANK" not in os.environ:
            sys.exit("--engine fsdp2 does not know its ranks from MPI. Start it with torchrun.")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def __init__(self, model: torch.nn.Module, config: dict[str, Any]) -> None:
        given = agree(lambda: read(config, dist.get_world_size()))
        self.batch, self.micro, self.accumulation, self.clip = given.batch, given.micro, given.accumulation, given.clip
        self.settings = {"engine": "fsdp2", "bf16": given.bf16}
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        policy = MIXED if given.bf16 else MixedPrecisionPolicy()
        for block in model.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=given.gather_twice)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.model = model
        self.optimizer = agree(lambda: optimizer_from(model, config["optimizer"]))
        self.schedule = agree(lambda: scheduler_from(self.optimizer, config.get("scheduler", {})))

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def save(self, folder: Path) -> None:
        state = self.state()
        remedy = "Make room there, or give another --out; checkpoints before it are whole."
        _told(f"write {folder}", remedy, lambda: dcp.save(state, checkpoint_id=folder))

    def load(self, folder: Path) -> None:
        state = self.state()
        remedy = "Remove it to resume from the one before."
        _told(f"read {folder}", remedy, lambda: dcp.load(state, checkpoint_id=folder))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def _told(what: str, remedy: str, work: Callable[[], Any]) -> None:
    """Raises:
    AgreedError: some rank could not do `work`; torch has told all of them.
    """
    try:
        work()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise AgreedError(f"rank {rank} could not {what} ({cause!r}). {remedy}") from error
