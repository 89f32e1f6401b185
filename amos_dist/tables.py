"""The two tables that the kernels read beside the tensors.

One row for each block (its fields: csrc/ops.cpp, read_block), one for each parameter's numbers (csrc/block.h, Hyper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CODES = {"row": 0, "scalar": 0, "full": 0, "column": 1, "factored": 2}  # csrc/block.h: enum Moments
BLOCK_FIELDS = 17
HYPER_FIELDS, LR, BETA, T = 12, 0, 2, 3


class Constants(NamedTuple):
    """One parameter's numbers, but for lr and t, which move from step to step. factor: of its group's lr."""

    factor: float
    numbers: list[float]


def seed_of_parameter(seed: int, key: int) -> int:
    """Each parameter has its own random numbers: 32 bits from the user's seed and the parameter's number."""
    return (seed * 0x9E3779B1 + key * 0x85EBCA77) % 2**32


def lines(names: Sequence[str]) -> Tensor:
    """uint8, UTF-8: the names of the tensors as the kernels take them, for their messages."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8, device="cpu")


class Blocks:
    """Rows of the table of blocks; the first field of each is the number of its tensor."""

    def __init__(self) -> None:
        self.fields: list[list[int]] = []
        self._table: Tensor | None = None
        self._chosen: tuple[list[bool], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.fields)

    def table(self, present: list[bool] | None) -> Tensor:
        """int64 [n, 17], of the tensors that are `present` (None: all of them)."""
        if self._table is None:
            self._table = torch.tensor(self.fields, dtype=torch.int64, device="cpu").view(-1, BLOCK_FIELDS)
        if present is None:
            return self._table
        if self._chosen is None or self._chosen[0] != present:
            kept = [i for i, fields in enumerate(self.fields) if present[fields[0]]]
            self._chosen = present, self._table[kept]
        return self._chosen[1]


class Numbers:
    """Rows of the table of hyper-parameters, one for each parameter.

    Args:
        members: the number of the tensor that each row belongs to.
        groups: the parameter group of each tensor.
        device: where the table is: the CPU, or, so that a CUDA graph can change it, that of the tensors.
    """

    def __init__(self, members: list[int], groups: list[dict[str, Any]], device: torch.device) -> None:
        # Filled in place: a CUDA graph knows where it is.
        self.table = torch.zeros(len(members), HYPER_FIELDS, dtype=torch.float64, device=device)
        self._members = torch.tensor(members, dtype=torch.int64, device=device)
        self._factors = torch.zeros(len(members), dtype=torch.float64, device=device)
        self._groups: list[tuple[dict[str, Any], Tensor]] = []  # a group, its rows
        for group in {id(group): group for group in groups}.values():
            mine = [i for i, member in enumerate(members) if groups[member] is group]
            self._groups.append((group, torch.tensor(mine, dtype=torch.int64, device=device)))
        self._lr: list[float | None] = []

    def fill(self, constants: list[Constants]) -> None:
        """constants: one for each row."""
        rows = torch.tensor([each.numbers for each in constants], dtype=torch.float64, device="cpu")
        self.table.copy_(rows.view(-1, HYPER_FIELDS))
        self._factors.copy_(torch.tensor([each.factor for each in constants], dtype=torch.float64, device="cpu"))
        self._lr = [None] * len(self._groups)

    def at(self, steps: Tensor) -> Tensor:
        """float64 [n, 12]: the table of the next step. steps: how many each tensor has taken."""
        self.table[:, T] = steps[self._members] + 1
        for i, (group, rows) in enumerate(self._groups):
            lr = group["lr"]
            if self.table.device.type == "cpu":
                if float(lr) == self._lr[i]:
                    continue
                lr = self._lr[i] = float(lr)
            elif not isinstance(lr, Tensor) or lr.device != self.table.device:
                lr = float(lr)
            # On a device always, because a CUDA graph may be recording, and without a look, which would wait for it.
            self.table[rows, LR] = self._factors[rows] * lr
        return self.table
