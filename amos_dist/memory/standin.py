"""A module with a model's parameters, whose forward pass only adds them up: training without activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models import Parameter


class _Part(nn.Module):
    """The parameters that a module of the model has itself; the number that it returns depends on each."""

    def forward(self, total: Tensor) -> Tensor:
        for param in self.parameters(recurse=False):
            total = total + param.sum()
        return total


class StandIn(_Part):
    """Parameters of the same names and shapes, in modules of the same names: stage 3 gathers module by module."""

    def __init__(self, parameters: Sequence[Parameter], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for name, shape in parameters:
            at: nn.Module = self
            *modules, last = name.split(".")
            for part in modules:
                if not hasattr(at, part):
                    at.add_module(part, _Part())
                at = getattr(at, part)
            at.register_parameter(last, nn.Parameter(torch.full(shape, 0.01, dtype=dtype, device=device)))

    def forward(self, total: Tensor) -> Tensor:
        for part in self.modules():
            if part is not self and any(True for _ in part.parameters(recurse=False)):
                total = part(total)
        return total + sum(param.sum() for param in self.parameters(recurse=False))
