"""Amos's entry for torch's database of optimizers under test, torch.testing._internal.common_optimizers.

Two things differ from the entries of torch's own optimizers: every input has an `lr`, because Amos has no default for
it; and an lr of two numbers is a TypeError here, like all else that is no number.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from amos_dist import Amos
from amos_dist.ops import why_not

from .common import KWARGS, LR, registered

pytest.importorskip("expecttest", reason="torch's database of optimizers under test imports expecttest")

# The import forbids the whole process to set the flags of torch.backends; that must not reach other tests.
_frozen = torch.backends.flags_frozen()
from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

# Through the function's globals: the module that holds the flag is not the one that is found as torch.backends.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = not _frozen


def inputs(device: str | torch.device, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    return [OptimizerInput(params=None, kwargs=registered(desc), desc=desc) for desc in KWARGS]  # type: ignore[arg-type]


def error_inputs(device: str | torch.device, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """torch's own for every optimizer, then ours."""
    found: list[ErrorOptimizerInput] = get_error_inputs_for_all_optims(device, dtype)
    for each in found:
        each.optimizer_error_input.kwargs.setdefault("lr", LR)
        if each.optimizer_error_input.desc == "Tensor lr must be 1-element":
            each.error_type, each.error_regex = TypeError, re.escape("is not a number. Give a float.")

    construction, step = OptimizerErrorEnum.CONSTRUCTION_ERROR, OptimizerErrorEnum.STEP_ERROR

    def refused(
        desc: str, error: type[Exception], regex: str, params: Any = None, on: Any = construction, **kwargs: Any
    ) -> None:
        given = OptimizerInput(params=params, kwargs={"lr": LR, **kwargs}, desc=desc)
        found.append(ErrorOptimizerInput(given, error_on=on, error_type=error, error_regex=regex))

    def param(dtype: torch.dtype = dtype) -> nn.Parameter:
        return nn.Parameter(torch.ones(2, 3, device=device, dtype=dtype))

    sparse = param()
    sparse.grad = torch.ones(2, 3, device=device, dtype=dtype).to_sparse()
    refused("negative lr", ValueError, r"lr=-0\.1 is out of range", lr=-0.1)
    refused("NaN lr", ValueError, "lr=nan is out of range", lr=float("nan"))
    refused("NaN tensor lr", ValueError, "lr=nan is out of range", lr=torch.tensor(float("nan")))
    refused("sigma of zero", ValueError, "sigma=0 is out of range", sigma=0.0)
    refused("beta of one", ValueError, "beta=1 is out of range", beta=1.0)
    refused("negative momentum", ValueError, r"momentum=-0\.5 is out of range", momentum=-0.5)
    refused("no eps", ValueError, "eps=0 is out of range", eps=0.0)
    refused("unknown moments", ValueError, "moments='rows' is unknown", moments="rows")
    refused("rows only", ValueError, "row_dims=2 leaves no row or no column", params=[param()], row_dims=2)
    refused("two implementations", ValueError, "exclude each other", fused=True, foreach=True)
    refused("weight_decay", TypeError, "'weight_decay', which Amos does not have", weight_decay=0.1)
    refused("differentiable", TypeError, "step cannot be differentiated", differentiable=True)
    refused("differentiable group", TypeError, "step cannot be", params=[{"params": [param()], "differentiable": True}])
    refused("complex parameter", TypeError, "is complex64.*as pairs", params=[param(torch.complex64)])
    refused("integer parameter", TypeError, "is int64", params=[torch.ones(2, dtype=torch.int64, device=device)])
    refused("sparse gradient at step", RuntimeError, "gradient of .* is sparse", params=[sparse], on=step)
    return found


# Of each torch scheduler in its simplest form; each list runs together.
SCHEDULERS = (
    [lambda opt: lrs.StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: lrs.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
    [lambda opt: lrs.ConstantLR(opt, factor=0.4, total_iters=4), lambda opt: lrs.ExponentialLR(opt, gamma=0.99)],
    [lambda opt: lrs.PolynomialLR(opt, power=0.9, total_iters=50)],
    [lambda opt: lrs.StepLR(opt, gamma=0.99, step_size=10), lambda opt: lrs.ReduceLROnPlateau(opt)],
)

AMOS = OptimizerInfo(
    Amos,  # type: ignore[arg-type]
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=SCHEDULERS,
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=(
        *("foreach", "fused", "maximize", "capturable"),
        *("master_weights", "stochastic_rounding", "seed", "on_nonfinite"),
    ),
    supports_sparse=False,
    has_capturable_arg=True,
    supports_complex=False,
    supports_fused_on=tuple(device for device in ("cpu", "cuda") if not why_not(device)),
)
