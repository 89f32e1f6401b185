"""Which part of which parameter a tensor holds.

A parameter is read as an R x C matrix. A *piece* is a contiguous range of its row-major elements; a *block* is what the
kernels take: a rectangle without gaps. A piece is at most three blocks: the end of a row, whole rows, the start of one.
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
    """

    key: int
    rows: int
    cols: int
    start: int
    length: int
    offset: int = 0

    @property
    def first_row(self) -> int:
        return self.start // self.cols

    @property
    def touched_rows(self) -> int:
        """Rows of which the piece has at least one element."""
        return -(-(self.start + self.length) // self.cols) - self.first_row if self.length else 0

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


def cut_rows(rows: int, cols: int, borders: list[int]) -> list[int]:
    """The rows of a parameter that a border runs through. borders: the elements at which a piece begins."""
    return sorted({border // cols for border in borders if 0 < border < rows * cols and border % cols})
