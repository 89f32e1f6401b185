"""One long training run on real ranks, and what must hold all the time: memory, replicas, the decay.

    python tests/fuzz/long_run.py --steps 20000 --ranks 2

A small model of random shapes, a new random batch of another length at every step, a tenth of its labels noise:
factored, row and column moments, momentum, bfloat16 parameters with a float32 master, a parameter that is used only now
and then. FSDP2 cuts most of it over the ranks; every rank has one layer whole. Tells how it goes in lines of JSON, the
last one of the whole run; exit code 1 where a check fails:

* what is allocated (by malloc and by Python), live objects and bytes of state do not grow from a tenth of the steps to
  the last. Resident memory also has the gaps of the allocator, which are nobody's leak: it may grow 64 times as much;
* what ranks hold as replicas is the same to the last bit;
* the loss, all parameters and all state are finite; the decay is never negative and never falls.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from tqdm import tqdm

import amos_dist

WORDS = 23


class Model(nn.Module):
    """Sizes are drawn from the seed: odd ones, so that ranks hold different numbers of rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        width, inner = draw.randrange(5, 20), draw.randrange(17, 40)
        self.embed = nn.Embedding(WORDS, width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)
        self.low = nn.Linear(width, width).bfloat16()
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.extra = nn.Linear(width, width)  # comes and goes
        self.copied = nn.Linear(width, width)  # every rank has all of it
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, x: Tensor, y: Tensor, with_extra: bool) -> Tensor:
        h = self.embed(x)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        h = h + self.low(h.bfloat16()).float()
        h = h + torch.tanh(self.conv(h.transpose(1, 2)).transpose(1, 2))
        h = h + torch.tanh(self.copied(h))
        if with_extra:
            h = h + torch.tanh(self.extra(h))
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


RULES = [
    {"match": "embed", "moments": "row", "momentum": 0.9},
    {"match": "conv", "moments": "column", "momentum": 0.9, "momentum_dtype": "bfloat16"},
    {"match": "low", "master_weights": True, "momentum": 0.9},
    {"match": "up|copied", "momentum": 0.9},
]


def sharded(model: Model, ranks: int) -> Model:
    mesh = init_device_mesh("cpu", (ranks,))
    for part in (model.low, model.extra):  # another dtype; another time
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=set(model.copied.parameters()))


# ---- what is looked at -----------------------------------------------------------------------------------------------


def local(value: Tensor) -> Tensor:
    return getattr(value, "_local_tensor", value).detach()


def named_tensors(model: nn.Module, optimizer: amos_dist.Amos) -> dict[str, Tensor]:
    found = {}
    for name, param in model.named_parameters():
        found[name] = param
        found |= {f"{name} {key}": value for key, value in optimizer.state.get(param, {}).items()}
    return found


def replicated(tensors: dict[str, Tensor], ranks: int) -> dict[str, str]:
    """The hash of what every rank has all of: by its name."""
    found = {}
    for name, tensor in tensors.items():
        mesh = getattr(tensor, "device_mesh", None)
        cut = mesh is not None and any(
            mesh.size(dim) > 1 and placement != Replicate() for dim, placement in enumerate(tensor.placements)
        )
        if not cut and local(tensor).numel():
            numbers = local(tensor).contiguous().reshape(-1).view(torch.uint8).numpy()
            found[name] = hashlib.sha256(numbers.tobytes()).hexdigest()
    return found


def resident() -> int:
    """Bytes of this process that are in memory: what is used, and the gaps between it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def allocated() -> int:
    """Bytes that were asked of malloc, by torch, gloo and us, and not given back: of all arenas, without gaps."""
    read = ctypes.CDLL(None).mallinfo2
    read.restype = MallocInfo
    info = read()
    return int(info.uordblks + info.hblkhd)


class Watch:
    """Everything that is looked at again and again, and the faults that were found."""

    def __init__(self, model: nn.Module, optimizer: amos_dist.Amos, ranks: int) -> None:
        self.model, self.optimizer, self.ranks = model, optimizer, ranks
        self.decay: dict[str, Tensor] = {}
        self.faults: list[str] = []
        self.compared = 0

    def look(self, step: int, loss: float) -> None:
        tensors = named_tensors(self.model, self.optimizer)
        mine = replicated(tensors, self.ranks)
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        self.compared = len(mine)
        drifted = [name for name in mine if len({theirs.get(name) for theirs in everyone}) > 1]
        self.faults += [f"step {step}: the replicas of {name} differ" for name in drifted]
        if not loss < float("inf"):
            self.faults.append(f"step {step}: the loss is {loss}")
        for name, tensor in tensors.items():
            value = local(tensor)
            if not value.isfinite().all():
                self.faults.append(f"step {step}: {name} is not finite")
            if name.endswith(" decay"):
                before = self.decay.get(name, torch.zeros_like(value))
                if not (value >= before).all():
                    self.faults.append(f"step {step}: {name} has fallen, or is negative")
                self.decay[name] = value.clone()

    def sizes(self) -> dict[str, int]:
        gc.collect()
        state = [local(v) for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return {
            "resident": resident(),
            "malloc": allocated(),
            "python": sys.getallocatedblocks(),
            "objects": len(gc.get_objects()),
            "state": sum(v.nbytes for v in state),
        }


def time_is_over(end: float) -> bool:
    """Whether the first rank's clock says so."""
    over = torch.tensor(time.monotonic() > end)
    dist.broadcast(over, 0)
    return bool(over)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(rank: int, port: int, options: argparse.Namespace, results: Any) -> None:
    """One rank."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=options.ranks)
    torch.manual_seed(options.seed)
    model = sharded(Model(options.seed), options.ranks)
    # A NaN shall be seen, not skipped.
    optimizer = amos_dist.Amos(model.named_parameters(), lr=0.02, beta=0.99, rules=RULES, on_nonfinite="ignore")
    watch = Watch(model, optimizer, options.ranks)
    batches, both = torch.Generator().manual_seed(1000 + rank), random.Random(options.seed)
    first, last, early, began = float("nan"), float("nan"), watch.sizes(), time.monotonic()
    for step in tqdm(range(1, options.steps + 1), disable=True if rank else None, smoothing=0.01):
        x = torch.randint(0, WORDS, (4, both.randint(3, 12)), generator=batches)
        noise = torch.rand(x.shape, generator=batches) < 0.1  # so that gradients never end
        y = torch.where(noise, torch.randint(0, WORDS, x.shape, generator=batches), (7 * x + 3).remainder(WORDS))
        loss = model(x, y, with_extra=both.random() < 0.3)
        loss.backward()
        for copied in model.copied.parameters():  # as DDP does it
            dist.all_reduce(copied.grad)
            copied.grad /= options.ranks
        if step == options.poison:
            next(p for p in model.parameters() if p.grad is not None).grad.mul_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()
        if step % options.every == 0 or step in (1, options.steps):
            last = loss.item()
            first = last if step == 1 else first
            watch.look(step, last)
        if step == (options.warm or max(1, options.steps // 10)):
            early = watch.sizes()
        if rank == 0 and step % options.tell == 0:
            print(json.dumps({"step": step, "loss": loss.item(), **watch.sizes()}), flush=True)
        if options.minutes and step % options.every == 0 and time_is_over(began + 60 * options.minutes):
            break
    late = watch.sizes()
    grown = {key: late[key] - early[key] for key in late}
    mebibytes = options.grow * 2**20
    most = {"resident": 64 * mebibytes, "malloc": mebibytes, "python": 3000, "objects": 300, "state": 0}
    if any(grown[key] > most[key] for key in most):
        watch.faults.append(f"grown since a tenth of the steps: {grown}")
    everyone: list[Any] = [None] * options.ranks
    dist.all_gather_object(everyone, watch.faults)
    faults = [f"rank {r}: {fault}" for r, some in enumerate(everyone) for fault in some]
    if rank == 0:
        largest = max(float(value.max()) for value in watch.decay.values() if value.numel())
        results.put(
            {
                "steps": step,
                "seconds": round(time.monotonic() - began, 1),
                "loss": [round(first, 4), round(last, 4)],
                "early": early,
                "late": late,
                "replicas": watch.compared,
                "decay": round(largest, 4),
                "faults": faults[:20],
            }
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Starts the ranks, and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=int, default=500, help="steps from one look at all tensors to the next")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grow", type=float, default=1.0, help="MiB that may be allocated")
    parser.add_argument("--tell", type=int, default=1000, help="steps from one line about memory to the next")
    parser.add_argument("--warm", type=int, default=0, help="the step of the first measure of memory; 0: a tenth")
    parser.add_argument("--minutes", type=float, default=0, help="end at the first look after so many; 0: never")
    parser.add_argument("--poison", type=int, default=0, help="the step with a gradient of NaN: the run must fail")
    options = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(train, (port, options, results), nprocs=options.ranks)
    found = results.get()
    print(json.dumps(found))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
