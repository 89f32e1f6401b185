"""What torch asks of its own optimizers (test/test_optim.py: TestOptimRenewed, TestOptim), asked of Amos.

torch's wheels do not have that file, so the checks are written anew; the schedules, the refusals and what is supported
come from torch's own database of optimizers, in which registration.py enters Amos, and the inputs are those it enters.
Checks run on the CPU and, where there is one, on a CUDA device. Where torch allows a tolerance between two runs of the
same code, equal bits are asked for here. The files that read the database are skipped where it cannot be imported.

Left out, and why:

* differentiable: refused by name (test_errors). Amos's step writes in place through kernels without a derivative.
* sparse gradients, rosenbrock on them: refused at the step (test_errors). The second moment is of whole rows.
* complex parameters, complex_2d: refused by name (test_errors). A complex entry has no single scale.
* weight_decay of groups: Amos has none and refuses the keyword; `extra_l2` stands in for it here.
* optimizers that need a closure to step (LBFGS), and a step that asks for sparse gradients: Amos is neither.
* large tensors (more than 64 GB), peak memory of foreach: tests/unit/test_memory_of_step.py measures the step's memory.
* fused with `grad_scale` and `found_inf`: Amos does not take them over from GradScaler, which then unscales and skips
  steps itself; that is checked.
* the default is foreach: Amos's is the native kernels; that is checked.
* CUDA graphs, and all else of capturable that only a GPU shows: tests/gpu/features.py.
* torch.compile of a step, and functional optimizers: torch tests them in other files.
* SWA and averaged models: they do not ask the optimizer for anything.
* what needs CUDA, or two devices, is skipped where they are not. Meta tensors show where loaded state goes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .common import DEVICES, IMPLS, KWARGS, need_kernels, registered

# On the CPU torch does not repeat its checks for `foreach`; here that is the forloop's code, which is shown once.
WAYS = [impl for impl in IMPLS if impl != "foreach" or torch.cuda.is_available()]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KWARGS)
def chosen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """An input, without saying how it is computed."""
    return registered(request.param)


@pytest.fixture(params=WAYS)
def given(request: pytest.FixtureRequest, chosen: dict[str, Any], device: str) -> dict[str, Any]:
    """An input, computed in each of the ways."""
    if request.param == "fused":
        need_kernels(device)
    return {**chosen, **IMPLS[request.param]}
