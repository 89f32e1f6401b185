"""Builds amos_dist with its CUDA kernels, checks them on this machine's GPU and times them. One command, one report:

    python tests/gpu/run_gpu.py [--report docs/gpu.md] [--skip-build]

Needs torch with CUDA, nvcc and a C++ compiler; no network. Ends with 1 if a check failed; the report says which.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3  # of each check

# Shapes on both sides of the kernels' borders: rows for a thread, a warp and a CTA; one and several tiles and chunks.
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (768,), (1, 1), (3, 7), (5, 255), (33, 768), (130, 300), (2, 5000), (1, 40000), (700, 1),
    (64, 3, 7, 7), (1000, 1030), (768, 3072), (5001, 96),
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    {"clip_value": 0.5, "extra_l2": 0.01, "maximize": True},
]
HYPER: dict[str, Any] = {"lr": 0.1, "sigma": 0.5, "beta": 0.9}
# Largest error, relative to the largest value: float32 against float64; low precision may differ by one rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def build() -> None:
    """Compiles the extension beside the Python sources, for this machine's GPU unless AMOS_ARCHS says otherwise."""
    major, minor = torch.cuda.get_device_capability()
    environment = {"AMOS_ARCHS": f"{major}{minor}", **os.environ, "AMOS_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


# ---- checks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Parameters of all shapes in one optimizer; `offset`: elements by which each is moved off its alignment."""

    moments: str
    dtype: torch.dtype
    options: dict[str, Any]
    offset: int = 0

    def __str__(self) -> str:
        options = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.moments} {str(self.dtype)[6:]} {options} offset={self.offset}".replace("torch.", "")


def cases() -> Iterator[Case]:
    for moments in ("row", "column", "factored", "scalar", "full"):
        for dtype in TOLERANCE:
            for options in OPTIONS:
                if dtype != torch.float64 or "momentum_dtype" not in options:
                    yield Case(moments, dtype, options)
            yield Case(moments, dtype, OPTIONS[1], offset=3)


def make_parameter(value: torch.Tensor, offset: int) -> torch.nn.Parameter:
    flat = torch.zeros(value.numel() + offset, dtype=value.dtype, device=value.device)
    view = flat[offset:].view(value.shape)
    view.copy_(value)
    return torch.nn.Parameter(view)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    error = (value - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    return error if math.isfinite(error) else math.inf


def draws(case: Case) -> Iterator[list[torch.Tensor]]:
    """The parameters, then the gradients of every step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(1 + STEPS):
        yield [torch.randn(shape, generator=generator).to(case.dtype) for shape in SHAPES]


def train(case: Case, device: torch.device) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    """Parameters and state after all steps, by the kernels."""
    values, *gradients = draws(case)
    params = [make_parameter(value.to(device), case.offset) for value in values]
    amos = importlib.import_module("amos_dist").Amos
    optimizer = amos(params, moments=case.moments, fused=True, **HYPER, **case.options)
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = make_parameter(grad.to(device), case.offset).detach()
        optimizer.step()
    return params, [optimizer.state[param] for param in params]


def error_over_tolerance(case: Case, params: list[torch.nn.Parameter], states: list[dict[str, Any]]) -> float:
    """The largest error of parameters and state, held against the reference on the CPU."""
    # float32 is held against float64. What is rounded after every step (parameters, momentum) needs the same rounding.
    rounded_momentum = "momentum_dtype" in case.options
    dtype = torch.float64 if case.dtype == torch.float32 and not rounded_momentum else case.dtype
    tolerance = max(TOLERANCE[case.dtype], 1e-4 if rounded_momentum else 0)
    state_tolerance = min(TOLERANCE[case.dtype], 2e-6)
    step = importlib.import_module("amos_dist").reference.amos_step
    values, *gradients = draws(case)
    worst = 0.0
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        expected, expected_state = values[i].to(dtype), {}  # type: torch.Tensor, dict[str, Any]
        for grads in gradients:
            step(expected, grads[i].to(dtype), expected_state, moments=case.moments, **HYPER, **case.options)
        worst = max(worst, relative_error(param, expected) / tolerance)
        for key in {"row_moment", "column_moment", "moment", "decay"} & expected_state.keys():
            error = relative_error(state[key].reshape(expected_state[key].shape), expected_state[key])
            worst = max(worst, error / state_tolerance)
    return worst


def check_all(device: torch.device) -> tuple[list[str], list[str]]:
    """Report lines, and the failures among them."""
    lines, failures = ["| case | error / tolerance |", "|---|---|"], []
    for case in cases():
        try:
            params, states = train(case, device)
            error = error_over_tolerance(case, params, states)
            same = all(torch.equal(x, y) for x, y in zip(params, train(case, device)[0], strict=True))
            ok, text = error <= 1 and same, f"{error:.3f}" + ("" if same else ", **two runs differ**")
        except Exception as failed:  # a report with one failure says more than none
            ok, text = False, f"**{type(failed).__name__}: {str(failed).splitlines()[0]}**"
        line = f"| {case} | {text}{'' if ok else ' FAILED'} |"
        lines.append(line)
        print(line, flush=True)
        if not ok:
            failures.append(line)
    return lines, failures


# ---- times -----------------------------------------------------------------------------------------------------------


def gpt2_small() -> list[tuple[int, ...]]:
    """124 million parameters in 148 tensors."""
    width = 768
    shapes: list[tuple[int, ...]] = [(50257, width), (1024, width), (width,), (width,)]
    for _ in range(12):
        shapes += [(width,)] * 6 + [(3 * width,), (4 * width,)]
        shapes += [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return shapes


@dataclass(frozen=True)
class Contender:
    """`touches`: how often the step must at least read or write param, grad, and compute-type or bf16 state."""

    name: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    params: int = 2
    grads: int = 1
    state: int = 0
    bf16_state: int = 0

    def bytes_each(self, dtype: torch.dtype) -> int:
        state = dtype.itemsize if self.name.startswith("AdamW") else 4  # AdamW's state has the parameter's dtype
        return (self.params + self.grads) * dtype.itemsize + self.state * state + self.bf16_state * 2


def contenders() -> list[Contender]:
    amos = importlib.import_module("amos_dist").Amos

    def amos_with(**keywords: Any) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: amos(params, lr=1e-3, sigma=0.05, fused=True, **keywords)

    bf16 = torch.bfloat16
    return [
        Contender("AdamW(fused=True)", lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True), state=4),
        Contender("Amos row", amos_with(moments="row")),
        Contender("Amos factored", amos_with(), grads=2),
        Contender("Amos column", amos_with(moments="column"), grads=2),
        Contender("Amos scalar", amos_with(moments="scalar"), grads=2),
        Contender("Amos row, momentum", amos_with(moments="row", momentum=0.9), state=2),
        Contender("Amos factored, momentum", amos_with(momentum=0.9), grads=2, state=2),
        Contender("Amos row, bf16 momentum", amos_with(moments="row", momentum=0.9, momentum_dtype=bf16), bf16_state=2),
        Contender("Amos factored, bf16 momentum", amos_with(momentum=0.9, momentum_dtype=bf16), grads=2, bf16_state=2),
    ]


def time_steps(step: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Seconds of a step on the device, and on the host until all its launches are queued."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before = time.perf_counter()
    start.record()
    for _ in range(steps):
        step()
    end.record()
    host = time.perf_counter() - before
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / steps, host / steps


def benchmark(dtype: torch.dtype, rounds: int = 9, steps: int = 10) -> list[str]:
    """A table; contenders take turns, so that a drift of the clock hits all of them alike."""
    device = torch.device("cuda")
    params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in gpt2_small()]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    numel = sum(param.numel() for param in params)
    x, y = torch.zeros(numel, device=device, dtype=dtype), torch.ones(numel, device=device, dtype=dtype)
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "in-place axpy": (lambda: x.add_(y, alpha=1e-3), 3 * dtype.itemsize)
    }
    for contender in contenders():
        runs[contender.name] = (contender.make(params).step, contender.bytes_each(dtype))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, (step, _) in runs.items():
            result = time_steps(step, steps)
            if turn:  # the first turn makes state and plans
                times[name].append(result)
    seconds = {name: statistics.median(device for device, _ in values) for name, values in times.items()}
    adamw, axpy = seconds["AdamW(fused=True)"], seconds["in-place axpy"]
    lines = [
        f"### {str(dtype)[6:]} parameters and gradients, {numel / 1e6:.0f} M in {len(params)} tensors",
        "",
        "| step | ms | host ms | x AdamW(fused) | x axpy | least bytes / parameter | GB/s of these |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (_, size) in runs.items():
        host = statistics.median(host for _, host in times[name])
        s = seconds[name]
        lines.append(
            f"| {name} | {s * 1e3:.3f} | {host * 1e3:.3f} | {s / adamw:.2f} | {s / axpy:.2f} | {size} "
            f"| {size * numel / s / 1e9:.0f} |"
        )
    return [*lines, ""]


# ---- report ----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, check and time amos_dist on this machine's GPU.")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "gpu.md", help="markdown file to write")
    parser.add_argument("--skip-build", action="store_true", help="the extension beside the sources is up to date")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here, so there is nothing to check; no report was written.")
        return 0
    if not arguments.skip_build:
        build()
    sys.path.insert(0, str(ROOT))  # the sources with what was just built beside them
    info = importlib.import_module("amos_dist").build_info()
    name, archs = torch.cuda.get_device_name(), ", ".join(info["cuda_archs"]) or f"no GPU: {info['cuda_reason']}"
    print(name, info, flush=True)
    checks, failures = check_all(torch.device("cuda"))
    summary = f"{len(checks) - 2} checks, {len(failures)} failed."
    report = [
        "# On a GPU",
        "",
        f"Written by `python tests/gpu/run_gpu.py` on one {name}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, kernels built for {archs}.",
        "",
        "## Time of a step",
        "",
        "GPT-2 small's shapes; median over rounds in which all take turns; bytes are the least that a step can move.",
        "",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        try:
            report += benchmark(dtype)
        except Exception as failed:  # keep what was measured
            failures.append(f"benchmark {dtype}: {failed}")
            report += [f"The benchmark failed: {type(failed).__name__}: {failed}", ""]
    report += ["## Against the reference", "", f"{summary} {STEPS} steps of {len(SHAPES)} tensors each, run twice.", ""]
    report += [*checks, ""]
    text = "\n".join(report)
    print(text)
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(text)
    print(f"{summary} Report: {arguments.report}")
    for failure in failures:
        print("FAILED:", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
