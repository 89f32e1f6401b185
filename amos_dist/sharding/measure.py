"""Sums of squares of whole parameters, of which this rank may hold a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dtensor, zero
from .reduce import Pending


def sums_of_squares(params: list[Tensor]) -> list[float]:
    """For each parameter the sum of the squares of its entries, in float64, on every rank the same.

    One all-reduce for each process group over which parameters are cut: every rank of these must call this with the
    same parameters.
    """
    sums: list[Tensor] = []
    waiting: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        total, groups = _held(param)
        sums.append(total)
        for group in groups:
            waiting.setdefault(group, []).append(i)
    for group, some in waiting.items():
        stacked = torch.stack([sums[i] for i in some])
        Pending(stacked, group).wait()
        for i, total in zip(some, stacked, strict=True):
            sums[i] = total
    return [float(total) for total in sums]


def _held(param: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """The sum over what this rank holds, and the process groups over which the others are to be added."""
    if (part := zero.partition_sum_of_squares(param)) is not None:
        return part[0], (part[1],)
    groups = dtensor.groups_over(param, range(param.dim())) if dtensor.is_dtensor(param) else ()
    return torch.linalg.vector_norm(dtensor.local_of(param).detach(), dtype=torch.float64).square(), groups
