"""What one optimizer step costs, beside other optimizers, in one process and in turn (python -m amos_dist bench)."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bench_cases import AMOS, Shape, Variant
from .sharding import dtensor

T = TypeVar("T")

# ---- what comes out --------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Measured, of one step. The yardstick has no state."""

    name: str
    parameters: int
    traffic: int
    state_bytes: int | None = None
    samples: list[float] = field(default_factory=list)  # seconds of the device; of the processor on a CPU
    host_samples: list[float] = field(default_factory=list)  # seconds by the clock until step() has returned

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    @property
    def host_seconds(self) -> float:
        return statistics.median(self.host_samples)

    @property
    def bandwidth(self) -> float:
        """Bytes a second, of those that must be moved."""
        return self.traffic * self.parameters / self.seconds


@dataclass
class Result:
    """A whole run. The yardstick moves as many elements as the parameters have."""

    source: str  # of the shapes
    shapes: list[Shape]
    device: str
    threads: int  # of the CPU kernels
    repeat: int
    copies: int  # of the parameters, which take turns
    yardstick: Row
    rows: list[Row]
    first_peer: Row | None
    left_out: dict[str, str]  # why

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of storage that the optimizer's state holds in this process, of DTensors its part; shared ones once."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    storages = (dtensor.local_of(tensor).untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# ---- measuring -------------------------------------------------------------------------------------------------------

# Copies of the parameters, each with an optimizer of every kind, and the tensors in all of them. Where these bounds are
# met before a GPU's cache is full, the step's time is that of its launches, not of its bytes.
MAX_COPIES, MAX_TENSORS = 16, 16_000
LONG_ENOUGH = 0.02  # seconds that one measurement lasts, where a step is shorter than that


@dataclass
class Contestant:
    """Steps over copies of the parameters, which take turns so that no step finds its data in a cache."""

    row: Row
    steps: list[Callable[[], Any]]
    share: float = 1.0  # of one step that is counted: the yardstick may move more than the parameters
    loops: int = 1

    def __post_init__(self) -> None:
        self.turns = itertools.cycle(self.steps)

    def prepare(self, device: torch.device) -> None:
        """The first steps make state and plans; the next say how many make a measurement."""
        for step in self.steps:
            step()
        self.loops = len(self.steps)
        seconds = max(self.time(device))
        self.loops = min(max(10, len(self.steps)), max(1, round(LONG_ENOUGH / max(seconds, 1e-9))))

    def time(self, device: torch.device) -> tuple[float, float]:
        """Seconds of a step on the device, and on the host until step() has returned.

        On a CPU the device's are the processor time of all threads: other programs do not count, but threads that wait
        for others do.
        """
        events = None
        if device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            events[0].record()
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(self.loops):
            next(self.turns)()
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        if events:
            events[1].record()
            torch.cuda.synchronize(device)
            return events[0].elapsed_time(events[1]) / 1e3 / self.loops, clock / self.loops
        return processor / self.loops, clock / self.loops

    def sample(self, device: torch.device) -> None:
        seconds, host = self.time(device)
        self.row.samples.append(seconds * self.share)
        self.row.host_samples.append(host)


def _cache_bytes(device: torch.device) -> int:
    """What the measured bytes must exceed. A CPU's caches are left as they are: nothing is rewritten in between."""
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _yardstick(numel: int, device: torch.device) -> Contestant:
    """CUDA: a copy, the fastest that memory gets. CPU: x.add_(y), the least that an update in place can cost."""
    elements = max(numel, _cache_bytes(device) // 8)
    x, y = torch.zeros(elements, device=device), torch.ones(elements, device=device)
    if device.type == "cuda":
        return Contestant(Row("device copy", numel, 8), [lambda: x.copy_(y)], share=numel / elements)
    return Contestant(Row("in-place axpy", numel, 12), [lambda: x.add_(y, alpha=1e-3)])


def _copies(shapes: list[Shape], numel: int, device: torch.device) -> int:
    """So many that parameters and gradients of all do not fit into the cache."""
    wanted = math.ceil(_cache_bytes(device) / (8 * numel))
    return max(1, min(wanted, MAX_COPIES, MAX_TENSORS // len(shapes)))


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _refuse_too_much(numel: int, copies: int, variants: list[Variant], device: torch.device) -> None:
    dtypes = {variant.dtype for variant in variants}
    each = sum(2 * dtype.itemsize for dtype in dtypes) + sum(variant.memory for variant in variants)
    needed, free = numel * (copies * each + 8), free_bytes(device)
    if free is not None and needed > 0.95 * free:
        raise ValueError(
            f"this takes about {needed / 1e9:.1f} GB on {device}, which has {free / 1e9:.1f} GB free. "
            "Choose smaller --shapes (gpt2, tiny or a file), or fewer optimizers with --against."
        )


def _make_copies(shapes: list[Shape], dtype: torch.dtype, copies: int, device: torch.device) -> list[list[Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    result: list[list[Tensor]] = []
    for _ in range(copies):
        result.append([])
        for shape in shapes:
            drawn = torch.randn(shape, generator=generator, device=device)
            result[-1].append(torch.nn.Parameter((drawn * 0.02).to(dtype)))
            result[-1][-1].grad = (drawn * 1e-3).to(dtype)
    return result


def _contestant(variant: Variant, copies: list[list[Tensor]], device: torch.device) -> Contestant:
    taken = [[p for p in params if p.dim() == 2 or not variant.only_matrices] for params in copies]
    if not taken[0]:
        raise ValueError("there is no matrix among the shapes")
    optimizers = [variant.make(params) for params in taken]
    row = Row(variant.name, sum(param.numel() for param in taken[0]), variant.traffic)
    contestant = Contestant(row, [optimizer.step for optimizer in optimizers])
    contestant.prepare(device)
    row.state_bytes = state_bytes(optimizers[0])
    return contestant


def _bar(items: Iterable[T], what: str) -> Iterable[T]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, file=sys.stderr, leave=False)


def run(source: str, shapes: list[Shape], peers: list[Variant], device: torch.device, repeat: int) -> Result:
    """Measures `peers` and Amos. All take turns, so that drift hits all alike.

    Raises:
        ValueError: it does not fit into memory.
    """
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    variants = [*peers, *AMOS]
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    copies = _copies(shapes, numel, device)
    _refuse_too_much(numel, copies, variants, device)
    params = {dtype: _make_copies(shapes, dtype, copies, device) for dtype in {v.dtype for v in variants}}
    yardstick = _yardstick(numel, device)
    yardstick.prepare(device)
    contestants: dict[str, Contestant] = {}
    left_out: dict[str, str] = {}
    for variant in _bar(variants, "first steps"):
        try:
            contestants[variant.name] = _contestant(variant, params[variant.dtype], device)
        except Exception as error:  # without this one there is still a table
            kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
            left_out[variant.name] = f"{kind}: {next(iter(str(error).splitlines()), '')}"
    everyone = [yardstick, *contestants.values()]
    gc.collect()
    gc.disable()  # it would look through the states of all in the middle of somebody's step
    try:
        for contestant in _bar(everyone * repeat, "measuring"):
            contestant.sample(device)
    finally:
        gc.enable()
    first = next((contestants[peer.name].row for peer in peers if peer.name in contestants), None)
    rows = [contestant.row for contestant in contestants.values()]
    threads = torch.get_num_threads()
    return Result(source, shapes, str(device), threads, repeat, copies, yardstick.row, rows, first, left_out)
