"""What is really held: what torch's allocators gave within a block, and what an engine or an optimizer has now."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile
from torch.utils._python_dispatch import TorchDispatchMode

from .. import optimizer as own
from ..sharding import dtensor

# ---- allocators ------------------------------------------------------------------------------------------------------

MEANS = {
    "cuda": "the CUDA allocator's peak less what it held before",
    "cpu": "what it takes from torch's CPU allocator, by torch's profiler, without what communication takes for itself",
}
BLOCK = "amos_dist.memory.watch"  # a mark in the profile
COLLECTIVES = "c10d"  # the namespace of torch's operators of collectives
LET_GO = 0.02  # seconds; gloo's thread needs microseconds, and its turn on a machine that is busy


class Watch:
    """Bytes that torch's allocator gives within blocks.

    Attributes:
        peak: the most that the last block held above what was held before it. left: what it left behind.
    """

    peak = left = 0

    @contextmanager
    def watch(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            yield
            torch.cuda.synchronize(device)
            self.peak = torch.cuda.max_memory_allocated(device) - before
            self.left = torch.cuda.memory_allocated(device) - before
            return
        watched = torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _Settled(), watched as profiler, record_function(BLOCK):
            yield
        self.peak = self.left = 0
        for size in _allocations(profiler):
            self.left += size
            self.peak = max(self.peak, self.left)


class _Settled(TorchDispatchMode):
    """Collectives one after another, and their thread has let go of what it was given: it would free unseen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == COLLECTIVES:
            work = found[-1] if isinstance(found, (tuple, list)) else found
            if hasattr(work, "wait"):
                work.wait()
            time.sleep(LET_GO)
        return found


def _allocations(profiler: torch_profile) -> list[int]:
    """Bytes that the CPU allocator gave (+) and got back (-), one after another.

    Not what a collective takes within itself, on this thread or on its own: gloo copies what it gathers and scatters,
    NCCL does not.
    """
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    found, thread = list[tuple[int, int, int, bool, int]](), None
    waiting = [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while waiting:
        event, is_within = waiting.pop()
        if event.name == BLOCK:
            thread = event.start_tid
        if event.typed[0] == _EventType.Allocation:
            fields = event.typed[1]
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size, is_within, event.start_tid))
        waiting += [(each, is_within or event.name.startswith(f"{COLLECTIVES}::")) for each in event.children]
    sizes, theirs = list[int](), set[int]()
    for _, address, size, is_within, taker in sorted(found):
        if size > 0 and (is_within or taker != thread):
            theirs.add(address)
        elif size < 0 and address in theirs:
            theirs.discard(address)
        else:
            sizes.append(size)
    return sizes


def resident() -> int:
    """Bytes of this process that are in memory (Linux); 0 where nothing tells."""
    facts = Path("/proc/self/statm")
    return int(facts.read_text().split()[1]) * resource.getpagesize() if facts.exists() else 0


# ---- what is held now ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Bytes that this process holds for training, each storage once.

    Attributes:
        parameters, gradients, master: as `Estimate` has them. state: by key.
        workspace: of what Amos adds up over ranks, and other sums that stay from step to step.
    """

    parameters: int
    gradients: int
    master: int
    state: dict[str, int]
    workspace: int

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())


@dataclass
class _Storages:
    """Storages that are counted already."""

    seen: set[int] = field(default_factory=set)

    def take(self, found: Any) -> int:
        """Bytes of those in `found` that are not."""
        total = 0
        for tensor in _tensors(found):
            storage = dtensor.local_of(tensor).untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _tensors(each)


def profile(engine_or_optimizer: Any) -> Profile:
    """What a DeepSpeed engine, or an optimizer in plain torch, DDP or FSDP2, holds on this rank now.

    Gradients are those that are there: call it between backward() and step() to see them.

    Raises:
        TypeError: it is neither.
    """
    zero, optimizer, params = _parts(engine_or_optimizer)
    once = _Storages()
    held = [getattr(param, "ds_tensor", None) for param in params]
    flat = [getattr(zero, "lp_param_buffer", None), getattr(zero, "bit16_groups_flat", None)]
    parameters = once.take([[param.data for param in params], held, flat])
    stepped = [param for group in optimizer.param_groups for param in group["params"]]
    masters = [
        getattr(zero, name, None) for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    ]
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    master = once.take([stepped, masters, [state.get("master") for state in states]])
    averaged = [getattr(zero, name, None) for name in ("averaged_gradients", "grad_partitions_flat_buffer")]
    gradients = once.take([[param.grad for param in [*params, *stepped]], averaged])
    state: dict[str, int] = {}
    for found in states:
        for key, value in found.items():
            if isinstance(value, Tensor) and key != "master":  # views of one buffer: each by its own numbers
                state[key] = state.get(key, 0) + dtensor.local_of(value).nbytes
    once.take(states)
    workspace = once.take(list(_planned(optimizer))) if isinstance(optimizer, own.Amos) else 0
    return Profile(parameters, gradients, master, state, workspace)


def _parts(given: Any) -> tuple[Any, torch.optim.Optimizer, list[Any]]:
    """DeepSpeed's own optimizer or None, the one that it calls, and the model's parameters."""
    if isinstance(given, torch.optim.Optimizer):
        return None, given, [param for group in given.param_groups for param in group["params"]]
    module, optimizer = getattr(given, "module", None), getattr(given, "basic_optimizer", None)
    if not isinstance(module, torch.nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"memory.profile was given a {type(given).__name__}, of which it knows nothing. "
            "Give a DeepSpeed engine or a torch optimizer."
        )
    return given.optimizer, optimizer, list(module.parameters())


def _planned(optimizer: own.Amos) -> Iterator[Tensor]:
    """Numbers that its plans have made: float32 or float64 as sums are; not the small tables beside them on the CPU."""
    waiting: list[Any] = [optimizer._plans]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.dtype == torch.float32:
                yield each
        elif isinstance(each, (dict, list, tuple)):
            waiting += each.values() if isinstance(each, dict) else each
        elif type(each).__module__.startswith(own.__name__.partition(".")[0]):
            waiting += [value for key, value in vars(each).items()] if hasattr(each, "__dict__") else []
