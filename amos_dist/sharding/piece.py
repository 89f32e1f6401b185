"""Which part of which parameter a tensor holds.

A parameter is read as an R x C matrix. A *piece* is a contiguous range of its row-major elements (ZeRO), a *tile* is
some of its rows, and of these some columns (DTensor); a *block* is what the kernels take: a rectangle without gaps. A
piece is at most three blocks: the end of a row, whole rows, the start of one. A tile is one.
This module knows shapes and no formula, no framework and no process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Block(NamedTuple):
    """rows x cols elements from `offset` of the piece on; the first is at (row, column) of the parameter's matrix."""

    offset: int
    row: int
    column: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a parameter that is an R x C matrix (row-major).

    Attributes:
        key: which parameter, in the optimizer's own numbering.
        rows, cols: R and C of the whole parameter.
        start, length: the range of elements.
        offset: where in the tensor that holds it the piece begins, in elements.
        share: the columns whose state this rank keeps for all ranks; None: each rank keeps that of all columns.
    """

    key: int
    rows: int
    cols: int
    start: int
    length: int
    offset: int = 0
    share: range | None = None

    @property
    def first_row(self) -> int:
        return self.start // self.cols

    @property
    def touched_rows(self) -> int:
        """Rows of which the piece has at least one element."""
        return -(-(self.start + self.length) // self.cols) - self.first_row if self.length else 0

    @property
    def touched_cols(self) -> int:
        """Columns that the piece has state for: its share, or all of them, since most pieces span whole rows."""
        if self.share is not None:
            return len(self.share)
        return self.cols if self.length else 0

    @property
    def first_col(self) -> int:
        """The first column that the piece has state for."""
        return 0 if self.share is None else self.share.start

    @property
    def owned_rows(self) -> range:
        """Rows that begin in the piece: over all pieces of a parameter, each row once."""
        return range(-(-self.start // self.cols), -(-(self.start + self.length) // self.cols))

    @property
    def is_first(self) -> bool:
        """Whether the parameter begins in the piece: the case for one of its pieces."""
        return self.start == 0 and self.length > 0

    @property
    def owns_columns(self) -> bool:
        """Whether the columns that the piece has state for are its own: over all pieces, each column once."""
        return self.is_first or self.share is not None

    def blocks(self) -> list[Block]:
        """The rectangles that the piece is made of, in order."""
        if not self.length:
            return []
        C, end = self.cols, self.start + self.length
        row, column = divmod(self.start, C)
        result, at = [], self.start
        if column:  # the end of a row
            cols = min(C - column, self.length)
            result.append(Block(0, row, column, 1, cols))
            at += cols
        if whole := (end - at) // C:
            result.append(Block(at - self.start, at // C, 0, whole, C))
            at += whole * C
        if at < end:  # the start of a row
            result.append(Block(at - self.start, at // C, 0, 1, end - at))
        return result


@dataclass(frozen=True)
class Tile:
    """touched_rows x touched_cols elements without a gap, of a parameter that is an R x C matrix.

    Attributes:
        key: which parameter, in the optimizer's own numbering.
        rows, cols: R and C of the whole parameter.
        touched_rows, touched_cols: how many of its rows and columns are here, where it has state for these. One of
            them alone may be 0: a rank without elements keeps the state that it shares with others.
        start: the number of the first element among the parameter's, row-major.
    """

    key: int
    rows: int
    cols: int
    touched_rows: int
    touched_cols: int
    start: int = 0

    # State begins at the tile's own first row and column; the tensor holds nothing else.
    first_row = 0
    offset = 0
    share = None

    def blocks(self) -> list[Block]:
        """The rectangle itself, or none where it is empty."""
        if not self.touched_rows * self.touched_cols:
            return []
        return [Block(0, 0, 0, self.touched_rows, self.touched_cols)]
