"""What a tensor in the optimizer's groups is made of: pieces of parameters, and who holds the others."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .piece import Piece, Tile


@dataclass(frozen=True)
class Cut:
    """A parameter of which several ranks hold pieces, in their order; of its columns' state each keeps a share.

    Attributes:
        borders: the elements at which a piece but the first begins, ascending; a range where all are as long.
        first: the rank that holds the first element.
        everybody: how many ranks the group has, where all of them keep a share; 0: those that hold an element do.
    """

    key: int
    rows: int
    cols: int
    borders: Sequence[int]
    first: int = 0
    everybody: int = 0

    @property
    def holders(self) -> range:
        """The ranks that hold elements."""
        return range(self.first, self.first + len(self.borders) + 1)

    def holders_of_row(self, row: int) -> range:
        """The ranks that hold elements of a row."""
        begin, last = row * self.cols, (row + 1) * self.cols - 1
        return range(self.first + bisect_right(self.borders, begin), self.first + bisect_right(self.borders, last) + 1)

    @property
    def most_holders_of_a_row(self) -> int:
        """No row has more."""
        borders = self.borders
        some = borders[:2] if isinstance(borders, range) else borders  # of a range all are as far apart
        apart = min((b - a for a, b in itertools.pairwise(some)), default=self.cols)
        return 1 + min(len(borders), -(-self.cols // apart))

    @property
    def sharers(self) -> range:
        """The ranks that keep a share of its columns' state each."""
        return range(self.everybody) if self.everybody else self.holders

    @property
    def share(self) -> int:
        """The number of columns in a share, but for the last ones, which may have fewer."""
        return -(-self.cols // len(self.sharers))

    def share_of(self, rank: int) -> range:
        """The columns whose state this rank keeps."""
        begin = (rank - self.sharers.start) * self.share
        return range(min(self.cols, begin), min(self.cols, begin + self.share))


@dataclass
class Layout:
    """Attributes:
    pieces: the parts of parameters that the tensor holds, in order of their offset; of a DTensor one tile.
    groups: the process groups over which the cut parameters are spread; none: this process holds them whole.
    cuts: of a flat partition, which has one group: the same list, in the same order, on every rank, whatever it holds.
    ranks: in the largest of the groups. rank: of a flat partition: which of its group's this one is.
    fellows: those whose ranks agree before the first step: `groups`, and where they are replicas of each other.
    row_groups, column_groups: of a tile: those of `groups` over which the sums of its rows, of its columns are added.
    fault: why the layout cannot be trusted, "" if it can. Every rank learns of it before the first step.
    clone: the tensor is a framework's copy of a whole parameter, which is stepped once with zeros at start.
    """

    pieces: list[Piece | Tile]
    groups: tuple[Any, ...] = ()
    fellows: tuple[Any, ...] = ()
    cuts: list[Cut] = field(default_factory=list)
    rank: int = 0
    ranks: int = 1
    row_groups: tuple[Any, ...] = ()
    column_groups: tuple[Any, ...] = ()
    fault: str = ""
    clone: bool = False

    @property
    def is_partition(self) -> bool:
        """Whether the tensor is one rank's part of several parameters, laid out flat: ZeRO's stages 1 to 3."""
        return bool(self.fellows) and self.tile is None

    @property
    def tile(self) -> Tile | None:
        """What a DTensor holds; None for any other tensor."""
        return self.pieces[0] if self.pieces and isinstance(self.pieces[0], Tile) else None


@dataclass(eq=False)
class Original:
    """A parameter as the user gave it, before any framework flattened it.

    Attributes:
        key: its number, in the order of the groups.
        group: the number of its parameter group. place: its number there.
        trainable: whether it required a gradient then: what frameworks copy or flatten is decided at that time.
        row_dims: of its matrix view for the kind of moments that it has: none for "scalar", all for "full".
        measured: the scale that sigma="auto" has found, or that was loaded.
        loaded: whether a checkpoint was.
        rows, cols: that matrix: "scalar" is 1 x numel, "full" is numel x 1.
    """

    key: int
    name: str
    group: int
    place: int
    param: torch.Tensor
    shape: tuple[int, ...]
    row_dims: int
    trainable: bool
    measured: float | None = None
    loaded: bool = False

    @property
    def rows(self) -> int:
        return math.prod(self.shape[: self.row_dims])

    @property
    def cols(self) -> int:
        return math.prod(self.shape[self.row_dims :])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def whole(self, offset: int = 0) -> Piece:
        return Piece(self.key, self.rows, self.cols, 0, self.numel, offset)
