"""The mean over all columns of `factored` parameters of which a rank has the moments of only some columns.

The profile of a column is its moment over the mean of all; the kernels take the mean of the columns that they see.
The new mean is known as soon as the sums are: mean' = beta mean + (1 - beta) (mean of all squares).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import Piece, Tile
from .tables import BETA, Numbers
from .travel import COLUMNS, OLD, ROWS, SHARE, SQUARES, Travel


class _Part(NamedTuple):
    """Of one parameter: `columns` column moments from number `state` on; their sums and profiles are at `place`.

    This rank's squares add up to the sum of the `size` numbers at `squares`. numbers: the row of the hyper-parameters.
    """

    piece: Piece | Tile
    state: int
    columns: int
    place: int
    squares: int
    size: int
    numbers: int


class CutColumns:
    """What a launch has of such parameters: where their state, sums and profiles are, as indices for all at once."""

    def __init__(self, travel: Travel, device: torch.device, dtype: torch.dtype) -> None:
        self._travel, self._device, self._dtype = travel, device, dtype
        self._parts: list[_Part] = []

    def add(self, piece: Piece | Tile, column_state: int, numbers: int) -> None:
        rows, columns, share = (self._travel.places.get((what, piece.key, 0), 0) for what in (ROWS, COLUMNS, SHARE))
        if piece.share is None:  # a tile
            part = _Part(piece, column_state, piece.touched_cols, columns, rows, piece.touched_rows, numbers)
        else:
            part = _Part(piece, column_state, piece.touched_cols, share, columns, piece.cols, numbers)
        self._parts.append(part)

    def __len__(self) -> int:
        return len(self._parts)

    def freeze(self) -> None:
        """All parts are there: makes the indices."""

        def index(places: list[int]) -> Tensor:
            return torch.tensor(places, dtype=torch.int64, device=self._device)

        def spread(begins: list[int]) -> Tensor:
            return index(
                [begin + i for begin, part in zip(begins, self._parts, strict=True) for i in range(part.columns)]
            )

        places, keys = self._travel.places, [part.piece.key for part in self._parts]
        self._old = index([places[OLD, key, 0] for key in keys])
        self._squares = index([places[SQUARES, key, 0] for key in keys])
        self._columns = spread([part.place for part in self._parts])
        self._moments = spread([part.state for part in self._parts])
        self._owners = index([i for i, part in enumerate(self._parts) for _ in range(part.columns)])
        self._betas = torch.zeros(2, len(self._parts), dtype=self._dtype, device=self._device)  # beta and 1 - beta
        totals = [[part.piece.rows, part.piece.cols] for part in self._parts]
        self._totals = torch.tensor(totals, device=self._device).t()

    def read_beta(self, numbers: Numbers) -> None:
        beta = numbers.table[[part.numbers for part in self._parts], BETA]
        self._betas.copy_(torch.stack([beta, 1 - beta]))

    def send(self, work: Tensor, state: Tensor) -> None:
        """After the sums: what this rank adds to the means."""
        sums = [work[0, part.squares : part.squares + part.size] for part in self._parts]
        old = [state[part.state : part.state + part.columns] for part in self._parts]
        # Sums of numbers that are not negative, of all tensors in one call.
        work[0, self._squares] = torch.stack(torch._foreach_norm(sums, 1))
        work[0, self._old] = torch.stack(torch._foreach_norm(old, 1))

    def mend(self, work: Tensor, state: Tensor) -> None:
        """After the slots: the profiles, with the mean of all columns."""
        rows, cols = self._totals
        beta, one_minus_beta = self._betas
        mean = (beta * work[0, self._old] + one_minus_beta * work[0, self._squares] / rows) / cols
        mine = mean[self._owners]
        work[0, self._columns] = torch.where(mine == 0, 1, (state[self._moments] / mine).rsqrt())
