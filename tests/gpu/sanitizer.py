"""compute-sanitizer over a small case: `python -m tests.gpu.sanitizer` is that case, `check` runs the tools on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from amos_dist import Amos

from . import common

TOOLS = ("memcheck", "racecheck")
LIMIT = 100  # seconds for each tool


def small_case(device: torch.device) -> None:
    """Two steps of every kind. Everything is made on the CPU: the tools then see few kernels but ours."""
    for moments in common.KINDS:
        pairs: list[tuple[torch.dtype, dict[str, Any]]] = [(torch.float32, {"momentum": 0.9}), (torch.bfloat16, {})]
        for dtype, options in pairs:
            values, grads, more = common.draws(common.QUICK_SHAPES, dtype, 2)
            params = [torch.nn.Parameter(value.to(device)) for value in values]
            optimizer = Amos(params, moments=moments, fused=True, **common.HYPER, **options)
            for given in (grads, more):
                for param, grad in zip(params, given, strict=True):
                    param.grad = grad.to(device)
                optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def find_tool() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def check(device: torch.device, quick: bool) -> common.Section:
    section = common.Section("compute-sanitizer")
    tool = find_tool()
    if device.type != "cuda" or tool is None:
        section.skipped = "needs a GPU" if device.type != "cuda" else "compute-sanitizer is not installed"
        return section
    # Without torch's cache every tensor is an allocation of its own, and one byte beyond it is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS[:1] if quick else TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.sanitizer"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
        except subprocess.TimeoutExpired:
            section.lines.append(f"* {name}: not done after {LIMIT} s, stopped")
            continue
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
        summary = next((line for line in told if "SUMMARY" in line), "")
        if not summary or re.search(r"not supported|LibraryNotLoaded", done.stdout, re.IGNORECASE):
            why = next((line for line in told if "rror" in line or "not supported" in line), done.stderr[-300:])
            section.lines.append(f"* {name}: could not run here: {why.lstrip('= ')}")
            section.data[name] = "could not run"
            continue
        section.data[name] = summary.lstrip("= ")
        section.lines.append(f"* {name}: {section.data[name]}")
        if done.returncode != 0:
            section.failures.append(f"{name}: {section.data[name]}, exit code {done.returncode}")
            print("\n".join(told[:60]), flush=True)
    return section


if __name__ == "__main__":
    small_case(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
