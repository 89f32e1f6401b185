"""What is measured in a step that is looked at, for the tensors of one kernel call.

The kernels add up the squares of Delta and of the old parameter where they have both at hand. All else follows from a
few entries of the state, before and after: no pass over the parameters, and the same entries however they are sharded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference import coefficients
from ..sharding import Layout, Original, Piece, Tile, dtensor
from ..state import has_columns, has_rows, state_sizes

SAMPLES = 64  # entries of v, b and the column moments that are looked at; of fewer, all
# What a parameter's row of numbers has; all are sums, over this rank's part of it.
STEP, THETA, COUNT, EXPECTED, RATE, DECAY, ENTRIES, FIELDS = range(8)  # EXPECTED: of sigma^2, over the elements
V, B, COLUMN_V = (slice(FIELDS + i * SAMPLES, FIELDS + (i + 1) * SAMPLES) for i in range(3))
WIDTH = FIELDS + 3 * SAMPLES


class Axis(NamedTuple):
    """The entries of a state vector that this rank has, and accounts for alone.

    Attributes:
        shape: of all entries. offsets, held: the rectangle of them that is here. begin: where it begins in the buffer.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    held: tuple[int, ...]
    begin: int

    def places(self) -> Tensor:
        """int64 [SAMPLES]: where each sample is in the buffer of the state; -1: on another rank, or nowhere."""
        positions = sampled(math.prod(self.shape))
        place, left, stride = torch.full_like(positions, self.begin), positions, 1
        here = torch.ones_like(positions, dtype=torch.bool)
        for size, offset, held in reversed(list(zip(self.shape, self.offsets, self.held, strict=True))):
            at = left % size - offset
            left = left // size
            here &= (at >= 0) & (at < held)
            place += at * stride
            stride *= held
        result = torch.full((SAMPLES,), -1)
        result[: len(positions)] = torch.where(here, place, -1)
        return result


def sampled(count: int) -> Tensor:
    """Which of `count` entries are looked at: all, or SAMPLES of them at equal distances."""
    return torch.arange(count) if count <= SAMPLES else torch.arange(SAMPLES) * count // SAMPLES


def entries_of(original: Original, kind: str) -> tuple[int, int]:
    """How many entries v and b have, and how many further column moments there are."""
    main = original.rows if has_rows(kind) else original.cols
    return (main, original.cols if kind == "factored" else 0) if original.numel else (0, 0)


def _axis(by_rows: bool, tensor: Tensor, layout: Layout, piece: Piece | Tile, original: Original, begin: int) -> Axis:
    """The rows or the columns that this rank accounts for: of what several ranks have, one does."""
    if isinstance(piece, Tile):
        replicas = layout.row_groups if by_rows else layout.column_groups
        dims = slice(0, original.row_dims) if by_rows else slice(original.row_dims, None)
        held, offsets = dtensor.rectangle(tensor)
        # Nothing of an axis without dimensions is "held", and its one entry is here.
        mine = all(dist.get_rank(group) == 0 for group in replicas) and math.prod(held[dims]) > 0
        if not mine:
            return Axis((0,), (0,), (0,), begin)
        return Axis(original.shape[dims], offsets[dims], held[dims], begin)
    if by_rows:
        owned = piece.owned_rows
        return Axis((piece.rows,), (owned.start,), (len(owned),), begin + owned.start - piece.first_row)
    return Axis((piece.cols,), (piece.first_col,), (piece.touched_cols * piece.owns_columns,), begin)


class Probe:
    """Args:
    launch: the tensors of one kernel call. originals, kinds: the parameters and their moments, by key.
    """

    def __init__(self, launch: Any, originals: Sequence[Original], kinds: dict[int, str]) -> None:
        places: list[list[Tensor]] = []
        keys, owners, counts = [], [], []
        nowhere = torch.full((SAMPLES,), -1)
        for number, member in enumerate(launch.members):
            begin = dict(launch.places[number])
            for piece in member.layout.pieces:
                kind, original = kinds[piece.key], originals[piece.key]
                about = member.tensor, member.layout, piece, original
                by_rows = has_rows(kind)
                v = _axis(by_rows, *about, begin["row_moment" if by_rows else "column_moment"]).places()
                b = _axis(by_rows, *about, begin["decay"]).places()
                is_factored = by_rows and has_columns(kind)
                column_v = _axis(False, *about, begin["column_moment"]).places() if is_factored else nowhere
                places.append([v, b, column_v])
                keys.append(piece.key)
                owners.append(number)
                counts.append(sum(block.rows * block.cols for block in piece.blocks()))
                for key, size in state_sizes([piece], kinds).items():
                    begin[key] += size
        device = launch.device
        found = torch.stack([torch.stack(three) for three in places]) if places else torch.full((0, 3, SAMPLES), -1)
        self.keys = torch.tensor(keys, dtype=torch.int64, device=device)
        self.result = torch.empty(0)
        self.moved = False
        self._owners = owners
        self._counts = torch.tensor(counts, dtype=torch.float64, device=device)
        self._here, self._places = (found >= 0).to(device), found.clamp(min=0).to(device)
        self._before = torch.empty(0)

    def _state(self, launch: Any) -> Tensor:
        """float64 [parameters, 3, SAMPLES]: v, b, column moments; zero where they are not here."""
        if not launch.state.numel():
            return torch.zeros(self._places.shape, dtype=torch.float64, device=launch.device)
        return torch.where(self._here, launch.state[self._places].double(), 0.0)

    def begin(self, launch: Any) -> Tensor:
        """Before the step. Returns what the kernels add their norms to."""
        self._before, self.moved = self._state(launch), False
        self._norms = torch.zeros(len(self._owners), 2, dtype=torch.float64, device=launch.device)
        return self._norms

    def end(self, launch: Any, present: list[bool] | None) -> None:
        """After the step, of which the table of hyper-parameters is still there. present: who took it; None: all."""
        after, device = self._state(launch), launch.device
        numbers = launch.numbers.table.to(device).unsqueeze(2)
        lr, sigma, beta, t, _, _, extra_l2, c_coef, d_coef, eps, _, _ = numbers.unbind(1)
        # v = beta v' + (1 - beta) G; its rounding may make the smallest G negative.
        G = ((after[:, 0] - beta * self._before[:, 0]) / (1 - beta)).clamp(min=0)
        rate, decay, _, _ = coefficients(
            G,
            after[:, 0],
            self._before[:, 1],
            lr=lr,
            sigma=sigma,
            bias=1 - beta**t,
            extra_l2=extra_l2,
            c_coef=c_coef,
            d_coef=d_coef,
            eps=eps,
        )
        here = self._here[:, 0]
        sums = [torch.where(here, each, 0.0).sum(1) for each in (rate, decay)]
        columns = [self._norms, self._counts[:, None], (self._counts * sigma[:, 0].square())[:, None]]
        columns += [each[:, None] for each in (*sums, here.double().sum(1))]
        self.result = torch.cat([*columns, after.flatten(1)], dim=1)
        if present is not None:
            stepped = torch.tensor([present[number] for number in self._owners], dtype=torch.bool).to(device)
            self.result = torch.where(stepped[:, None], self.result, 0.0)
        self.moved = True

    def rows_by_groups(self, launch: Any) -> dict[tuple[Any, ...], list[int]]:
        """Which rows of the result are added up over which process groups."""
        result: dict[tuple[Any, ...], list[int]] = {}
        for row, number in enumerate(self._owners):
            result.setdefault(launch.members[number].layout.groups, []).append(row)
        return result
