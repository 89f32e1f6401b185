"""The mean over all columns of `factored` parameters of which a rank holds only some columns.

The profile of a column is its moment over the mean of all; the kernels take the mean of the columns that they see.
The new mean is known as soon as the sums are: mean' = beta mean + (1 - beta) (mean of all squares).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sharding import Tile
from .tables import BETA, Numbers
from .travel import COLUMNS, OLD, ROWS, SQUARES, Travel


class CutColumns:
    """What a launch has of such parameters: where their state, sums and profiles are, as indices for all at once."""

    def __init__(self, travel: Travel, device: torch.device, dtype: torch.dtype) -> None:
        self._travel, self._device, self._dtype = travel, device, dtype
        self._tiles: list[Tile] = []
        self._states: list[int] = []  # where each tile's column moments begin
        self._rows: list[int] = []  # of the hyper-parameters

    def add(self, tile: Tile, column_state: int, row: int) -> None:
        self._tiles.append(tile)
        self._states.append(column_state)
        self._rows.append(row)

    def __len__(self) -> int:
        return len(self._tiles)

    def freeze(self) -> None:
        """All tiles are there: makes the indices."""

        def index(places: list[int]) -> Tensor:
            return torch.tensor(places, dtype=torch.int64, device=self._device)

        def spread(begins: list[int]) -> Tensor:
            return index([begin + i for begin, count in zip(begins, counts, strict=True) for i in range(count)])

        counts = [tile.touched_cols for tile in self._tiles]
        places = self._travel.places
        self._old = index([places[OLD, tile.key, 0] for tile in self._tiles])
        self._squares = index([places[SQUARES, tile.key, 0] for tile in self._tiles])
        self._columns = spread([places[COLUMNS, tile.key, 0] for tile in self._tiles])
        self._moments = spread(self._states)
        self._owners = index([i for i, count in enumerate(counts) for _ in range(count)])
        self._betas = torch.zeros(2, len(self._tiles), dtype=self._dtype, device=self._device)  # beta and 1 - beta
        self._totals = torch.tensor([[tile.rows, tile.cols] for tile in self._tiles], device=self._device).t()

    def read_beta(self, numbers: Numbers) -> None:
        beta = numbers.table[self._rows, BETA]
        self._betas.copy_(torch.stack([beta, 1 - beta]))

    def send(self, work: Tensor, state: Tensor) -> None:
        """After the sums: what this rank adds to the means."""
        places = [self._travel.places[ROWS, tile.key, 0] for tile in self._tiles]
        rows = [work[0, begin : begin + tile.touched_rows] for begin, tile in zip(places, self._tiles, strict=True)]
        old = [state[begin : begin + t.touched_cols] for begin, t in zip(self._states, self._tiles, strict=True)]
        # Sums of numbers that are not negative, of all tensors in one call.
        work[0, self._squares] = torch.stack(torch._foreach_norm(rows, 1))
        work[0, self._old] = torch.stack(torch._foreach_norm(old, 1))

    def mend(self, work: Tensor, state: Tensor) -> None:
        """After the slots: the profiles, with the mean of all columns."""
        rows, cols = self._totals
        beta, one_minus_beta = self._betas
        mean = (beta * work[0, self._old] + one_minus_beta * work[0, self._squares] / rows) / cols
        mine = mean[self._owners]
        work[0, self._columns] = torch.where(mine == 0, 1, (state[self._moments] / mine).rsqrt())
