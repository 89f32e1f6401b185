"""Random tables of blocks for the four operators, and everything else that they take; see csrc/ops.cpp."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amos_dist.runs import run_count
from amos_dist.sharding import Piece
from amos_dist.state import has_columns, has_rows
from amos_dist.tables import CODES, lines

from .compare import randn


@dataclass
class Case:
    """Arguments for sums_, slots_, update_ and step_, for tensors that hold pieces of parameters."""

    param: list[Tensor]
    grad: list[Tensor]
    momentum: list[Tensor]
    low_param: list[Tensor]
    state: Tensor
    work: Tensor
    blocks: Tensor
    hyper: Tensor
    names: Tensor
    scale: list[Tensor]

    def arguments(self, op: str, norms: Tensor | None = None) -> tuple[Any, ...]:
        end = (self.work, self.blocks, self.hyper, self.names)
        last = (norms, self.scale) if self.scale else () if norms is None else (norms,)
        return {
            "sums_": (self.grad, *end),
            "slots_": (self.state, *end),
            "update_": (self.param, self.grad, self.momentum, self.low_param, *end, *last),
            "step_": (self.param, self.grad, self.momentum, self.low_param, self.state, *end, *last),
        }[op]

    def clone(self) -> Case:
        copied = {
            key: [t.clone() for t in value] if isinstance(value, list) else value for key, value in vars(self).items()
        }
        return Case(**{**copied, "work": self.work.clone(), "state": self.state.clone()})

    def changed(self) -> list[Tensor]:
        return [*self.param, *self.momentum, *self.scale, *self.low_param, self.state]


def hyper_of(draw: random.Random, momentum: float, stochastic: bool) -> list[float]:
    seed = float(draw.randrange(2**32))
    seed = seed if stochastic else -1 - seed
    t, beta = draw.randint(1, 30), draw.choice([0.9, 0.99])
    clip, sign = draw.choice([math.inf, 0.7]), draw.choice([1.0, -1.0])
    return [0.1, draw.uniform(0.1, 1), beta, t, momentum, clip, 0.01, 0.25, 0.5, 2.0**-125, sign, seed]


def make_case(
    seed: int,
    kinds: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    momentum_dtype: torch.dtype | None = None,
    cut: bool = True,
    largest: int = 50,
    low: bool = False,
    stochastic: bool = False,
) -> Case:
    """Two tensors, each with a few pieces of parameters.

    Args:
        cut: pieces begin and end inside rows, which sums_, slots_ and update_ take; step_ takes whole parameters.
    """
    draw = random.Random(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lists: dict[str, list[Tensor]] = {key: [] for key in ("param", "grad", "momentum", "low_param", "scale")}
    table, hyper, places, held = [], [], 0, 0
    for number in range(2):
        size = runs = 0
        for _ in range(draw.randint(1, 4)):
            kind = draw.choice(kinds)
            rows, cols = draw.randint(1, largest), draw.randint(1, largest)
            start = draw.randrange(rows * cols) if cut else 0
            piece = Piece(0, rows, cols, start, draw.randint(1, rows * cols - start) if cut else rows * cols, size)
            hyper.append(hyper_of(draw, 0.9 if momentum_dtype else 0.0, stochastic))
            row_state = held
            column_state = row_state + (piece.touched_rows if has_rows(kind) else 0)
            decay_state = column_state + (cols if has_columns(kind) else 0)
            held = decay_state + (piece.touched_rows if has_rows(kind) else cols)
            column_work = places
            places += cols if has_columns(kind) else 0
            for i, block in enumerate(piece.blocks()):
                row_work = places
                places += block.rows if has_rows(kind) else 0
                below = block.row - piece.first_row if has_rows(kind) else 0
                columns = cols if has_columns(kind) and i == 0 else 0
                table.append([
                    number, size + block.offset, block.rows, block.cols, CODES[kind], cols, rows,
                    row_state + below, column_state, decay_state + below, row_work, column_work, block.column, columns,
                    len(hyper) - 1, piece.start + block.offset, runs,
                ])  # fmt: skip
                runs += run_count(block.rows * block.cols)
            size += piece.length
        seeds = [10 * seed + 1000 * number + i for i in range(3)]
        lists["param"].append(randn(seeds[0], size, dtype=dtype))
        lists["grad"].append(randn(seeds[1], size, dtype=grad_dtype or dtype))
        if momentum_dtype == torch.int8:
            lists["momentum"].append((50 * randn(seeds[2], size)).clamp(-127, 127).to(torch.int8))
            lists["scale"].append(randn(seeds[2] + 1, runs).square() / 100)
        elif momentum_dtype:
            lists["momentum"].append(0.1 * randn(seeds[2], size, dtype=momentum_dtype))
        if low:
            lists["low_param"].append(torch.zeros(size, dtype=grad_dtype))
    return Case(
        **lists,
        state=randn(10 * seed + 5, held, dtype=wide).square(),
        work=torch.zeros(3, places, dtype=wide),
        blocks=torch.tensor(table, dtype=torch.int64),
        hyper=torch.tensor(hyper, dtype=torch.float64),
        names=lines(["a", "b"]),
    )
