"""The inputs, the problems, and what several files of this folder compare with."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amos_dist import Amos
from amos_dist.ops import why_not
from tests.unit.compare import randn

LR = 0.01
# All that Amos takes but `foreach` and `fused`, which the checks add, and `rules`, which need names
# (tests/unit/test_settings.py).
KWARGS: dict[str, dict[str, Any]] = {
    "default": {},
    "non-default lr": {"lr": 0.1},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.9},
    "bfloat16 momentum": {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    "row": {"moments": "row"},
    "column": {"moments": "column", "momentum": 0.5, "maximize": True},
    "scalar": {"moments": "scalar"},
    "full": {"moments": "full", "eps": 1e-12, "decay_init": 2.0},
    "beta, sigma, coefficients": {"beta": 0.9, "sigma": 0.3, "c_coef": 0.5, "d_coef": 0.1},
    "extra_l2, clip_value": {"extra_l2": 0.01, "clip_value": 0.5},
    "row_dims": {"row_dims": 1, "moments": "factored"},
    "master weights": {"master_weights": True, "momentum": 0.9},
    "stochastic rounding": {"stochastic_rounding": True, "seed": 3},
    "unchecked": {"on_nonfinite": "ignore", "moments": "row"},
    "capturable": {"capturable": True, "momentum": 0.9},
    "tensor lr": {"lr": torch.tensor(LR)},
    "tensor lr, capturable": {"lr": torch.tensor(LR), "capturable": True, "maximize": True},
}
IMPLS = {
    "forloop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
named_or_not = pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])


def registered(desc: str, **more: Any) -> dict[str, Any]:
    """The keywords of one input, made anew: a schedule writes into an lr that is a tensor."""
    return {"lr": LR, **copy.deepcopy(KWARGS[desc]), **more}


def need_kernels(*devices: str) -> None:
    for device in devices:
        if reason := why_not(device):
            pytest.skip(reason)


class Problem:
    """(W x + b)^2, with W and b to be found."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        weight, bias = randn(1, 10, 5, 2, dtype=dtype).to(device), randn(2, 10, 2, dtype=dtype).to(device)
        if contiguous:
            weight, bias = weight[..., 0].contiguous(), bias[..., 0].contiguous()
        else:
            weight, bias = weight[..., 0], bias[..., 0]
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.x = randn(3, 5, dtype=dtype).to(device)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def listed(self, named: bool) -> list[Any]:
        return [("weight", self.weight), ("bias", self.bias)] if named else self.params

    def backward(self) -> Tensor:
        """Fresh gradients. Returns the loss."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.x) + self.bias.to(self.x.device)).square().sum()
        loss.backward()
        return loss.detach()

    def steps(self, optimizer: Amos, count: int) -> None:
        for _ in range(count):
            self.backward()
            optimizer.step()

    def clone(self) -> Problem:
        return copy.deepcopy(self)


def trained(given: dict[str, Any], count: int = 3, device: str = "cpu", named: bool = False) -> tuple[Problem, Amos]:
    problem = Problem(device)
    optimizer = Amos(problem.listed(named), **given)
    problem.steps(optimizer, count)
    return problem, optimizer


def same(a: Any, b: Any) -> bool:
    """The same values of the same types, dtypes and devices, to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def same_run(one: tuple[Problem, Amos], other: tuple[Problem, Amos]) -> bool:
    states = [[optimizer.state[param] for param in problem.params] for problem, optimizer in (one, other)]
    return same(states[0], states[1]) and all(map(torch.equal, one[0].params, other[0].params))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Net:
    """Two layers, a parameter of no dimensions that has a gradient once, and one of no elements."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        shapes = [(3, 2), (3,), (1, 3), (1,), (), (0, 3)]
        self.params = [
            (randn(i, *shape, dtype=dtype) / 2).to(device).requires_grad_() for i, shape in enumerate(shapes)
        ]
        self.params[4].grad = torch.full_like(self.params[4], 0.25)

    def gradients(self, optimizer: Amos, i: int) -> None:
        if i:
            optimizer.zero_grad()
        if i in (3, 5):  # the second layer is frozen for two steps
            for param in self.params[2:4]:
                param.requires_grad_(i == 5)
        if i != 2:  # a step without any gradient
            # No matmul: those of half precision are slow to start.
            outputs = [(param.double().sin() + param.square()).mean() for param in self.params[:4]]
            torch.stack(outputs).sum().backward()


def take_over(optimizer: Amos, params: Sequence[Tensor], other: Amos, others: Sequence[Tensor]) -> None:
    """Gives `others` what `params` and their states hold, so that roundings do not add up from step to step."""
    with torch.no_grad():
        for param, copied in zip(params, others, strict=True):
            copied.copy_(param)
            for key, value in optimizer.state[param].items():
                other.state[copied][key].copy_(value)
