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
