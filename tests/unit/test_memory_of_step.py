"""A step allocates nothing that grows with the parameters: it passes in a process that may take no more memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import resource, sys
import torch
from amos_dist import Amos
torch.set_num_threads(2)
optimizers = []
for dtype, keywords in [
    (torch.float32, dict(moments="factored")),
    (torch.float32, dict(moments="scalar", momentum=0.9)),
    (torch.bfloat16, dict(moments="column", stochastic_rounding=True)),
    (torch.bfloat16, dict(moments="row", master_weights=True)),
]:
    params = [torch.full(shape, 0.5, dtype=dtype, requires_grad=True) for shape in [(2048, 2048), (1, 2**21), (2**21,)]]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizers.append(Amos(params, lr=0.01, sigma=0.5, **eval(sys.argv[1]), **keywords))
    for _ in range(2):
        optimizers[-1].step()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**19, resource.RLIM_INFINITY))
for optimizer in optimizers:
    optimizer.step()
print("stepped")
"""


def step_within_limits(keywords: str) -> subprocess.CompletedProcess[str]:
    """Steps 16 and 32 MB of parameters with half a MiB more than what the process has."""
    # What was freed goes back at once: a second allocation of it would be one more.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", SCRIPT, keywords]
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_no_more_memory() -> None:
    done = step_within_limits("{}")
    assert done.stdout == "stepped\n", done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_the_limit_holds() -> None:
    """So that the test above tests something: the plain-torch step needs temporaries and does not pass."""
    done = step_within_limits("dict(fused=False)")
    assert done.returncode != 0 and "memory" in done.stderr


LEAKS = """
import resource, torch
from amos_dist import Amos
names = ["transformer.h." + "long" * 1000 + str(i) for i in range(3)]
shapes = [(4, 6), (5,), (3, 2)]
params = [(name, torch.ones(shape, requires_grad=True)) for name, shape in zip(names, shapes)]
optimizer = Amos(params, lr=1e-3, sigma=0.5)
for _, param in params:
    param.grad = torch.ones_like(param)
size = []
for _ in range(2):
    for _ in range(1500):
        optimizer.step()
    size.append(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())
print(size[1] - size[0])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_nothing_is_left_of_a_step() -> None:
    """A string for the operators would be: torch's stable ABI leaks 12 kB of names in each of 4,500 calls."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEAKS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert int(done.stdout) < 2**20
