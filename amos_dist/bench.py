"""python -m amos_dist bench: what one optimizer step costs, beside torch's own, in one process and in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .optimizer import Amos


def gpt2_shapes(layers: int = 12, width: int = 768, words: int = 50257, positions: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's parameters; the defaults are GPT-2 small, 124 million in all."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    shapes: list[tuple[int, ...]] = [(words, width), (positions, width)]
    for _ in range(layers):
        shapes += [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return shapes + norm


MODELS = {"gpt2": gpt2_shapes(), "tiny": gpt2_shapes(2, 128, 256, 128)}

OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "Amos row": lambda params: Amos(params, lr=1e-3, sigma=0.05, moments="row"),
    "Amos factored": lambda params: Amos(params, lr=1e-3, sigma=0.05),
    "Amos column": lambda params: Amos(params, lr=1e-3, sigma=0.05, moments="column"),
    "Amos scalar": lambda params: Amos(params, lr=1e-3, sigma=0.05, moments="scalar"),
    "Amos row, momentum": lambda params: Amos(params, lr=1e-3, sigma=0.05, moments="row", momentum=0.9),
    "Amos factored, momentum": lambda params: Amos(params, lr=1e-3, sigma=0.05, momentum=0.9),
    "Amos factored, bf16 momentum": lambda params: Amos(
        params, lr=1e-3, sigma=0.05, momentum=0.9, momentum_dtype=torch.bfloat16
    ),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of storage that the optimizer's state holds in this process; shared storage counts once."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    """CPU: processor time of all threads (other programs do not count). CUDA: time on the device."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    before = time.process_time()
    step()
    return time.process_time() - before


def measure(
    shapes: list[tuple[int, ...]], repeat: int, device: torch.device, names: list[str] | None = None
) -> dict[str, dict[str, float]]:
    """For each optimizer: median seconds and state bytes; the optimizers take turns, so that drift hits all alike."""
    params: list[torch.Tensor] = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    numel = sum(param.numel() for param in params)
    x, y = torch.zeros(numel, device=device), torch.ones(numel, device=device)
    optimizers = {name: OPTIMIZERS[name](params) for name in names or OPTIMIZERS}
    steps: dict[str, Callable[[], Any]] = {"in-place axpy": lambda: x.add_(y, alpha=1e-3)}
    steps |= {name: optimizer.step for name, optimizer in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeat + 1):
        for name, step in steps.items():
            seconds = _seconds(step, device)
            if turn:  # the first turn makes state and plans
                times[name].append(seconds)
    result = {name: {"seconds": statistics.median(values)} for name, values in times.items()}
    for name, optimizer in optimizers.items():
        result[name]["state_bytes"] = state_bytes(optimizer)
    return result


def main(model: str, repeat: int, device_name: str | None) -> None:
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = MODELS[model]
    result = measure(shapes, repeat, device)
    axpy, adam = result["in-place axpy"]["seconds"], result["AdamW fused"]
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    threads = torch.get_num_threads()
    print(f"{model}: {numel / 1e6:.1f} M float32 parameters on {device}, {threads} threads, median of {repeat}")
    print(f"{'':30s}{'ms':>9s}{'x axpy':>9s}{'x AdamW':>9s}{'state MB':>10s}{'x AdamW':>9s}")
    for name, row in result.items():
        state = ""
        if "state_bytes" in row:
            state = f"{row['state_bytes'] / 1e6:10.2f}{row['state_bytes'] / adam['state_bytes']:9.4f}"
        seconds = row["seconds"]
        print(f"{name:30s}{seconds * 1e3:9.1f}{seconds / axpy:9.2f}{seconds / adam['seconds']:9.2f}{state}")
