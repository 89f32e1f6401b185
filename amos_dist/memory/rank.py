"""One rank of `--measure`, run as a module: it trains with each optimizer, and writes what it held.

The model is a stand-in with the same parameters: activations would be measured too, and are not computed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from ..models import Parameter
from ..optimizer import Amos
from .estimates import AMOS, Setting
from .keepers import KEEPERS
from .standin import StandIn
from .watching import Profile, Watch, profile, resident

STEPS = 3  # the last one is measured: state, plans and DeepSpeed's record of the modules are there by then


class _Plain:
    """Plain torch or DDP; with a float32 copy that is stepped, where Amos does not keep one itself."""

    def __init__(self, model: nn.Module, optimizer: str, setting: Setting) -> None:
        self.model, self.buckets = model, dict[int, int]()  # by address
        if dist.is_initialized():
            self.model = nn.parallel.DistributedDataParallel(model)
            # A lambda, as DDP takes no annotations that are text.
            self.model.register_comm_hook(None, lambda state, bucket: self._count(bucket))
        self.params = list(model.parameters())
        self.masters: list[Tensor] = []
        if optimizer in AMOS:
            keywords = _amos_keywords(optimizer, setting)
            self.optimizers: list[torch.optim.Optimizer] = [
                Amos(model.named_parameters(), master_weights=setting.has_masters, **keywords)
            ]
            return
        if setting.has_masters:
            self.masters = [param.detach().float() for param in self.params]
        stepped = self.masters or self.params
        keeper = KEEPERS[optimizer]
        parts = [(keeper, [p for p in stepped if keeper.takes(tuple(p.shape))])]
        parts.append((KEEPERS["adamw"], [p for p in stepped if not keeper.takes(tuple(p.shape))]))
        self.optimizers = [one.make(some) for one, some in parts if some and one.make]

    def _count(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own all-reduce; its buckets are no tensors of Python but here."""
        storage = bucket.buffer().untyped_storage()
        self.buckets[storage.data_ptr()] = storage.nbytes()
        everyone = dist.group.WORLD
        assert everyone is not None
        return default_hooks.allreduce_hook(everyone, bucket)

    def run(self, total: Tensor) -> Any:
        self.buckets.clear()
        return self.model(total)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        for param, master in zip(self.params, self.masters, strict=False):
            assert param.grad is not None
            master.grad = param.grad.float()
        for optimizer in self.optimizers:
            optimizer.step()
        for param, master in zip(self.params, self.masters, strict=False):
            param.data.copy_(master)
            master.grad = None

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None

    def profile(self) -> Profile:
        found = [profile(optimizer) for optimizer in self.optimizers]
        state: dict[str, int] = {}
        for each in found:
            for key, size in each.state.items():
                state[key] = state.get(key, 0) + size
        stepped = sum(each.parameters for each in found)
        master = sum(each.master for each in found)
        workspace = sum(each.workspace for each in found)
        if self.masters:
            stepped, master = sum(param.nbytes for param in self.params), stepped
        gradients = sum(param.grad.nbytes for param in self.params if param.grad is not None)
        return Profile(stepped, gradients, master, state, workspace)


class _Engine:
    """DeepSpeed."""

    buckets: dict[int, int] | None = None

    def __init__(self, model: nn.Module, optimizer: str, setting: Setting) -> None:
        import deepspeed

        zero = {
            "stage": setting.zero,
            "reduce_bucket_size": setting.reduce_bucket_size,
            "stage3_prefetch_bucket_size": setting.prefetch_bucket_size,
            "stage3_param_persistence_threshold": setting.param_persistence_threshold,
            "stage3_max_live_parameters": setting.max_live_parameters,
            "stage3_max_reuse_distance": setting.max_reuse_distance,
            "sub_group_size": setting.sub_group_size,
        }
        if setting.overlap_comm is not None:
            zero["overlap_comm"] = setting.overlap_comm
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        if setting.dtype != torch.float32:
            config["bf16" if setting.dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
        given = {}
        if optimizer in AMOS:
            dtype = AMOS[optimizer]
            momentum = {} if dtype is None else {"momentum_dtype": str(dtype).removeprefix("torch.")}
            config["optimizer"] = {"type": "Amos", "params": _amos_keywords(optimizer, setting) | momentum}
        else:
            make = KEEPERS[optimizer].make
            assert make is not None
            given["optimizer"] = make(list(model.parameters()))
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, **given)[0]

    def run(self, total: Tensor) -> Any:
        return self.engine(total)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        pass  # its step does

    def profile(self) -> Profile:
        return profile(self.engine)


def _amos_keywords(optimizer: str, setting: Setting) -> dict[str, Any]:
    momentum = AMOS[optimizer]
    keywords: dict[str, Any] = {"lr": 1e-3, "sigma": 0.05, "moments": setting.moments}
    return keywords | ({"momentum": 0.9, "momentum_dtype": momentum} if momentum else {})


def live(device: torch.device, more: dict[int, int] | None = None) -> int:
    """Bytes of all tensors that Python knows, each storage once: the profiler does not see what other threads free.

    Args:
        more: bytes of storages by address that only others may know, of tensors on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    found = dict(more or {})
    for each in gc.get_objects():
        with contextlib.suppress(Exception):  # among all objects are some that only look like tensors
            if issubclass(type(each), Tensor) and each.device.type == "cpu":
                storage = each.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def train(optimizer: str, parameters: list[Parameter], setting: Setting, device: torch.device) -> dict[str, Any]:
    """Bytes: as `Estimate` names them, but `backward` is the most in a pass and `step` what a step adds."""
    gc.collect()
    before, in_memory, watch = live(device), resident(), Watch()
    model = StandIn(parameters, setting.dtype, device)
    trained: _Plain | _Engine = (_Engine if setting.zero else _Plain)(model, optimizer, setting)
    total = torch.zeros((), dtype=setting.dtype, device=device)
    for _ in range(STEPS - 1):
        trained.backward(trained.run(total))
        with watch.watch(device):  # the profiler sees only of what it has seen taken that it is given back
            trained.step()
        trained.zero_grad()
    gc.collect()
    held = live(device, trained.buckets) - before
    with watch.watch(device):
        loss = trained.run(total)
    forward, begun = watch.peak, watch.left
    with watch.watch(device):
        trained.backward(loss)
        del loss
    found: dict[str, Any] = {"backward": held + max(forward, begun + watch.peak)}
    found["gradients"] = trained.profile().gradients
    with watch.watch(device):
        trained.step()
    found["step"] = watch.peak
    trained.zero_grad()
    gc.collect()
    now = trained.profile()
    found |= {"parameters": now.parameters, "master": now.master, "state": now.state, "workspace": now.workspace}
    found["held"] = live(device, trained.buckets) - before
    found["resident"] = resident() - in_memory
    if isinstance(trained, _Engine):
        trained.engine.destroy()
    return {"optimizer": optimizer, **found}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    shown = os.fdopen(os.dup(2), "w")  # for the bar; what else is said goes into a file
    log = os.open(Path(job["folder"], f"log{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    device = torch.device("cuda", local) if job["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    setting = Setting(**(job["setting"] | {"dtype": getattr(torch, job["setting"]["dtype"])}))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if setting.zero:
        import deepspeed

        deepspeed.init_distributed(backend, verbose=False)
    elif setting.ranks > 1:
        dist.init_process_group(backend)
    parameters = [Parameter(name, tuple(shape)) for name, shape in job["parameters"]]
    optimizers = job["optimizers"]
    if not setting.zero:  # what is loaded with the first step is not to count as resident
        train(optimizers[0], [Parameter("first", (2, 2))], setting, device)
    if rank == 0:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            optimizers = tqdm(optimizers, desc=f"measuring, ZeRO-{setting.zero}", file=shown, leave=False)
    is_recorded = bool(job["snapshot"]) and rank == 0
    if is_recorded:
        torch.cuda.memory._record_memory_history()
    found = [train(optimizer, parameters, setting, device) for optimizer in optimizers]
    if is_recorded:
        torch.cuda.memory._dump_snapshot(job["snapshot"])
    Path(job["folder"], f"rank{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
