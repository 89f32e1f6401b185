"""What travels between ranks in a step: numbers of the workspace, in an order that is the same on every rank.

The order follows from the parameters, their placements and their moments alone, never from which of them have a
gradient: ranks may differ in that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sharding import Cut, Layout, Reduction, Shares, Tile, cut_rows, joined, neighbours
from .state import has_columns, has_rows


class Space:
    """Places in the three planes of a workspace; see csrc/block.h."""

    def __init__(self) -> None:
        self.used = self.size = 0

    def take(self, count: int) -> int:
        self.used += count
        self.size = max(self.size, self.used)
        return self.used - count

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(3, self.size, dtype=dtype, device=device)


# What an entry is, of a parameter and a row of it.
ROWS = "sums of squares of rows, from this one on"
COLUMNS = "sums of squares of all columns of which the tensor has elements"
SHARE = "sums of squares of the columns whose state this rank keeps for all"
NO_ROW = "zero: a row for the kernels where there are only columns"
FLAG = "on how many ranks the parameter has a gradient"
OLD = "the sum of all column moments"
SQUARES = "the sum of all squares"
INFINITE = "on how many ranks a gradient is not finite"
Name = tuple[str, int, int]


class Entry(NamedTuple):
    """`size` numbers that are zero when a step begins, and are added up over `groups`; over none: they stay here."""

    name: Name
    size: int
    groups: tuple[Any, ...]


def entries(layout: Layout, kinds: dict[int, str]) -> list[Entry]:
    """What a tensor needs of others: the same on all ranks of a group, but for what stays here."""
    if layout.tile is not None:
        return _of_tile(layout, layout.tile, kinds[layout.tile.key])
    result = []
    for cut in layout.cuts:
        kind = kinds[cut.key]
        if has_rows(kind):
            some = cut_rows(cut.rows, cut.cols, list(cut.borders))
            result += [Entry((ROWS, cut.key, row), 1, layout.groups) for row in some]
        if has_columns(kind) and not cut.sharers:
            result.append(Entry((COLUMNS, cut.key, 0), cut.cols, layout.groups))
        if kind == "factored" and cut.sharers:
            result += [Entry((name, cut.key, 0), 1, layout.groups) for name in (OLD, SQUARES)]
            result.append(Entry((NO_ROW, cut.key, 0), 1, ()))
    return result


def _of_tile(layout: Layout, tile: Tile, kind: str) -> list[Entry]:
    if not layout.groups:
        return []
    key, rows_cut = tile.key, has_rows(kind) and layout.row_groups
    result = [Entry((FLAG, key, 0), 1, layout.groups)]
    if not rows_cut and not (has_columns(kind) and layout.column_groups):
        return result
    # Zero also where there is no gradient here, but on another rank. A tile without rows or without columns has one
    # place for the kernels nevertheless: see _Bucket._add_tile.
    if has_rows(kind):
        result.append(Entry((ROWS, key, 0), max(1, tile.touched_rows), layout.row_groups))
    if has_columns(kind):
        result.append(Entry((COLUMNS, key, 0), max(1, tile.touched_cols), layout.column_groups))
    if kind == "factored" and rows_cut:
        result.append(Entry((OLD, key, 0), 1, layout.row_groups))
        result.append(Entry((SQUARES, key, 0), 1, layout.groups))
    return result


class Travel:
    """The first part of plane 0: all entries of a bucket, in sections that are added up over the same groups.

    Behind them the columns of which each rank of a group keeps a share, and these shares.

    Attributes:
        size: of both together. places: where each entry begins.
        ranges: what each process group adds up, in the order in which all ranks do.
        shared: by process group: the parameters of whose columns each rank keeps a share.

    Args:
        everyone: the process groups that learn of a gradient that is not finite here; none: it is not asked here.
    """

    def __init__(
        self, layouts: list[Layout], kinds: dict[int, str], space: Space, everyone: tuple[Any, ...] = ()
    ) -> None:
        sections: dict[tuple[Any, ...], list[Entry]] = {}
        for layout in layouts:
            for entry in entries(layout, kinds):
                sections.setdefault(entry.groups, []).append(entry)
        if everyone:
            sections.setdefault(everyone, []).append(Entry((INFINITE, 0, 0), 1, everyone))
        self.places: dict[Name, int] = {}
        found: dict[Any, list[tuple[int, int]]] = {group: [] for groups in sections for group in groups}
        for groups in [*neighbours([groups for groups in sections if groups]), ()]:
            begin = space.used
            for entry in sections.get(groups, ()):
                self.places[entry.name] = space.take(entry.size)
            for group in groups:
                found[group].append((begin, space.used))
        self.ranges = {group: joined(some) for group, some in found.items()}
        self._entries_end = space.used
        self.shared: dict[Any, list[Cut]] = {}
        for layout in layouts:
            for cut in layout.cuts:
                if cut.sharers and has_columns(kinds[cut.key]):
                    self.shared.setdefault(layout.groups[0], []).append(cut)
        for cuts in self.shared.values():
            for cut in cuts:
                self.places[COLUMNS, cut.key, 0] = space.take(cut.sharers * cut.share)
            for cut in cuts:  # one after another: they are received at once
                self.places[SHARE, cut.key, 0] = space.take(cut.share)
        self.size = space.used
        self._kinds = kinds
        self._start = torch.empty(0)

    def numbers_of(self, group: Any) -> int:
        """How many numbers that process group adds up."""
        added = sum(end - begin for begin, end in self.ranges.get(group, ()))
        return added + sum(cut.sharers * cut.share for cut in self.shared.get(group, ()))

    @property
    def infinite(self) -> int | None:
        """The place where ranks count who has a gradient that is not finite; None: in another bucket, or nowhere."""
        return self.places.get((INFINITE, 0, 0))

    def flag(self, key: int) -> int | None:
        """The place where ranks count who has a gradient for a parameter; None: it is not cut, and each decides."""
        return self.places.get((FLAG, key, 0))

    def begin(self, work: Tensor, absent: list[int]) -> None:
        """Zeros, and this rank's flags; absent: those of parameters without a gradient."""
        if not self.size:
            return
        if self._start.numel() != self._entries_end:
            self._start = work.new_zeros(self._entries_end)
            self._start[[place for name, place in self.places.items() if name[0] == FLAG]] = 1
        work[0, : self._entries_end] = self._start
        work[0, self._entries_end : self.size] = 0
        if absent:
            work[0, absent] = 0

    def tell(self, work: Tensor, infinite: Tensor | None) -> None:
        """infinite: above 0: a gradient of this rank's is not finite."""
        if infinite is not None and self.infinite is not None:
            work[0, self.infinite] = infinite

    def reduce(self, work: Tensor) -> Reduction:
        return Reduction(work[0], self.ranges)

    def shares(self, work: Tensor) -> list[Shares]:
        """The exchange of columns in each process group. Gathered are P of `factored`, A and B of `column`."""
        result = []
        for group, cuts in self.shared.items():
            planes = 2 if any(self._kinds[cut.key] == "column" for cut in cuts) else 1
            wholes = [(self.places[COLUMNS, cut.key, 0], cut.share) for cut in cuts]
            mine = self.places[SHARE, cuts[0].key, 0]
            result.append(Shares(group, cuts[0].sharers, work, planes, wholes, mine))
        return result
