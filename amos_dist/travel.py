"""What travels between ranks in a step: numbers of the workspace, in an order that is the same on every rank.

The order follows from the parameters, their placements and their moments alone, never from which of them have a
gradient: ranks may differ in that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sharding import Cut, Holders, Layout, Reduction, Shared, Shares, Tile, joined
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
    """`size` numbers that are zero when a step begins, and are added up over `groups`; over none: they stay here.

    holders: only these ranks of the one group have a part.
    """

    name: Name
    size: int
    groups: tuple[Any, ...]
    holders: range = range(0)


FEW = 8  # a row that more ranks hold is added up by all


def _has_few(cut: Cut) -> bool:
    """Whether each row is sent to those that hold it: not so those of a vector, which all ranks may have parts of."""
    return cut.most_holders_of_a_row <= FEW


def _of_partition(layout: Layout, kinds: dict[int, str]) -> Iterator[Entry]:
    """Of the parameters that are cut: rows are on few ranks, columns on all that hold the parameter."""
    pieces = {piece.key: piece for piece in layout.pieces}
    for cut in layout.cuts:
        kind, piece = kinds[cut.key], pieces.get(cut.key)
        if kind == "factored" and (cut.everybody or piece is not None):
            few = range(0) if cut.everybody else cut.holders
            yield from (Entry((name, cut.key, 0), 1, layout.groups, few) for name in (OLD, SQUARES))
            yield Entry((NO_ROW, cut.key, 0), 1, ())
        if has_rows(kind) and not _has_few(cut):
            for row in (row for row in range(cut.rows) if len(cut.holders_of_row(row)) > 1):
                yield Entry((ROWS, cut.key, row), 1, layout.groups)
        elif piece is not None and has_rows(kind):
            for row in (block.row for block in piece.blocks() if block.cols < cut.cols):
                yield Entry((ROWS, cut.key, row), 1, layout.groups, cut.holders_of_row(row))


def _of_tile(layout: Layout, tile: Tile, kind: str) -> Iterator[Entry]:
    key, rows_cut = tile.key, has_rows(kind) and layout.row_groups
    if not rows_cut and not (has_columns(kind) and layout.column_groups):
        return
    # Zero also where there is no gradient here, but on another rank. A tile without rows or without columns has one
    # place for the kernels nevertheless: see plan._Bucket._add_tile.
    if has_rows(kind):
        yield Entry((ROWS, key, 0), max(1, tile.touched_rows), layout.row_groups)
    if has_columns(kind):
        yield Entry((COLUMNS, key, 0), max(1, tile.touched_cols), layout.column_groups)
    if kind == "factored" and rows_cut:
        yield Entry((OLD, key, 0), 1, layout.row_groups)
        yield Entry((SQUARES, key, 0), 1, layout.groups)


class Travel:
    """The first part of plane 0: all entries of a wave, in sections that are added up over the same groups.

    Behind them the columns of flat partitions, of which each rank keeps a share, and these shares.

    Attributes:
        size: of both together. places: where each entry begins.
        ranges: what each process group adds up, in the order in which all ranks do.
        shared: the layouts of the flat partitions, and their cut parameters of whose columns every rank keeps a share.

    Args:
        flagged: the layouts of the tensors of which ranks may differ in whether there is a gradient.
        everyone: the process groups that learn of a gradient that is not finite here; none: it is not asked here.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        kinds: dict[int, str],
        space: Space,
        flagged: Sequence[Layout] = (),
        everyone: tuple[Any, ...] = (),
    ) -> None:
        self._kinds, self._space = kinds, space
        self._partitions = [layout for layout in layouts if layout.is_partition and layout.cuts]
        self.places: dict[Name, int] = {}
        self._entries: list[Entry] = []
        sections: dict[tuple[tuple[Any, ...], bool], list[Entry]] = {}
        for entry in self._all(layouts, flagged, everyone):
            self._entries.append(entry)
            section = () if entry.holders else entry.groups, entry.name[0] == INFINITE
            sections.setdefault(section, []).append(entry)
        found: dict[Any, list[tuple[int, int]]] = {group: [] for groups, _ in sections for group in groups}
        # In the order of first use: a group has it on all of its ranks, whatever else travels on one of them.
        for section in sorted(sections, key=lambda section: not section[0]):
            begin = space.used
            for entry in sections[section]:
                self.places[entry.name] = space.take(entry.size)
            for group in section[0]:
                found[group].append((begin, space.used))
        self.ranges = {group: joined(some) for group, some in found.items()}
        self.shared = [(layout, self._take_columns(layout)) for layout in self._partitions]
        self.size = space.used
        self._flag_places = [place for name, place in self.places.items() if name[0] == FLAG]
        self._flags: Tensor | None = None

    def _all(self, layouts: Sequence[Layout], flagged: Sequence[Layout], everyone: tuple[Any, ...]) -> Iterator[Entry]:
        for layout in flagged:
            if layout.tile is not None and layout.groups:
                yield Entry((FLAG, layout.tile.key, 0), 1, layout.groups)
        for layout in layouts:
            if layout.tile is not None:
                yield from _of_tile(layout, layout.tile, self._kinds[layout.tile.key])
            else:
                yield from _of_partition(layout, self._kinds)
        if everyone:
            yield Entry((INFINITE, 0, 0), 1, everyone)

    def _take_columns(self, layout: Layout) -> list[Cut]:
        """Places for the columns of which there is a part here; those that every rank has a share of."""
        here = {piece.key for piece in layout.pieces}
        cuts = [cut for cut in layout.cuts if has_columns(self._kinds[cut.key])]
        some = [cut for cut in cuts if cut.everybody or cut.key in here]
        for cut in some:
            self.places[COLUMNS, cut.key, 0] = self._space.take(len(cut.sharers) * cut.share)
        for cut in some:  # one after another: they are received at once
            self.places[SHARE, cut.key, 0] = self._space.take(cut.share)
        return [cut for cut in some if cut.everybody]

    def facts(self, group: Any) -> list[str]:
        """What must be the same on all ranks of a process group: what it adds up."""
        added = [(e.name[0], e.name[2], e.size) for e in self._entries if group in e.groups and not e.holders]
        found = []
        if added:
            found = [f"{sum(size for _, _, size in added)} numbers to be added up over ranks ({_digest(added)})"]
        for layout in self._partitions:
            if group in layout.groups:
                cuts = _digest([(cut, self._kinds[cut.key]) for cut in layout.cuts])
                found.append(f"{len(layout.cuts)} parameters on several ranks ({cuts})")
        return found

    @property
    def infinite(self) -> int | None:
        """The place where ranks count who has a gradient that is not finite; None: in another wave, or nowhere."""
        return self.places.get((INFINITE, 0, 0))

    def flag(self, key: int) -> int | None:
        """The place where ranks count who has a gradient for a parameter; None: it is not cut, and each decides."""
        return self.places.get((FLAG, key, 0))

    def begin(self, work: Tensor, absent: list[int]) -> None:
        """Zeros, and this rank's flags; absent: those of parameters without a gradient."""
        work[0, : self.size] = 0
        if self._flag_places:
            if self._flags is None:  # kept: a CUDA graph cannot take it from the CPU
                self._flags = torch.tensor(self._flag_places, dtype=torch.int64, device=work.device)
            work[0].index_fill_(0, self._flags, 1)
            if absent:
                work[0, absent] = 0

    def tell(self, work: Tensor, infinite: Tensor | None) -> None:
        """infinite: above 0: a gradient of this rank's is not finite."""
        if infinite is not None and self.infinite is not None:
            work[0, self.infinite] = infinite

    def reduce(self, work: Tensor) -> Reduction:
        return Reduction(work[0], self.ranges)

    @property
    def buffer_size(self) -> int:
        """How many numbers `exchanges` wants beside the workspace."""
        return sum(self._buffer_of(layout, cuts) for layout, cuts in self.shared)

    def _buffer_of(self, layout: Layout, cuts: Sequence[Cut]) -> int:
        return layout.ranks * self._planes(cuts) * sum(cut.share for cut in cuts)

    def exchanges(self, work: Tensor, buffer: Tensor) -> list[Shares | Holders]:
        """Of flat partitions: with all ranks that keep a share of columns, and with those that hold a part of a row.

        Gathered are P of `factored`, A and B of `column`.
        """
        result: list[Shares | Holders] = []
        buffers = buffer.split([self._buffer_of(layout, cuts) for layout, cuts in self.shared])
        for (layout, cuts), memory in zip(self.shared, buffers, strict=True):
            group = layout.groups[0]
            if cuts:
                wholes = [(self.places[COLUMNS, cut.key, 0], cut.share) for cut in cuts]
                mine = self.places[SHARE, cuts[0].key, 0]
                result.append(Shares(group, layout.ranks, work, self._planes(cuts), wholes, mine, memory))
            few = [cut for cut in layout.cuts if not cut.everybody and has_columns(self._kinds[cut.key])]
            if few or any(has_rows(self._kinds[cut.key]) and _has_few(cut) for cut in layout.cuts):
                keys = {cut.key for cut in layout.cuts}
                numbers = [(self.places[e.name], e.holders) for e in self._entries if e.holders and e.name[1] in keys]
                columns = [
                    Shared(cut, self.places[COLUMNS, cut.key, 0], self.places[SHARE, cut.key, 0])
                    for cut in few
                    if (COLUMNS, cut.key, 0) in self.places
                ]
                result.append(Holders(group, layout.rank, layout.ranks, work, self._planes(few), numbers, columns))
        return result

    def _planes(self, cuts: Sequence[Cut]) -> int:
        return max((2 if self._kinds[cut.key] == "column" else 1 for cut in cuts), default=0)


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


MOST_WAVES = 8
# In a wave: less takes no longer than the latencies of its messages (docs/scaling.md). From one rank to the next goes a
# part for each rank.
LEAST_NUMBERS, LEAST_FOR_A_RANK = 1 << 21, 1 << 12


def waves(layouts: Sequence[Layout], kinds: dict[int, str]) -> list[list[Layout]]:
    """What travels together: few waves, so that one is under way while others are worked on.

    Each process group finds the same in the same wave on all of its ranks, whatever else travels on one of them: what
    goes over the same groups is split by itself, and a wave has one part of each.
    """
    alike: dict[tuple[Any, ...], list[tuple[int, int, int]]] = {}
    for number, layout in enumerate(layouts):
        for key, size in _sizes(layout, kinds):
            alike.setdefault(layout.groups, []).append((number, key, size))
    parts: list[list[list[tuple[int, int, int]]]] = []
    for items in alike.values():
        least = max(LEAST_NUMBERS, LEAST_FOR_A_RANK * max(layouts[number].ranks for number, _, _ in items))
        parts.append([items[begin:end] for begin, end in split([size for _, _, size in items], least)])
    result = []
    for some in itertools.zip_longest(*parts, fillvalue=[]):
        keys: dict[int, set[int]] = {}
        for number, key, _ in itertools.chain(*some):
            keys.setdefault(number, set()).add(key)
        result.append([_only(layouts[number], some) for number, some in keys.items()])
    return result


def split(sizes: Sequence[int], least: int) -> list[tuple[int, int]]:
    """At most MOST_WAVES ranges of neighbours with about as many numbers each, and at least `least` where there are."""
    if not sizes:
        return []
    left = sum(sizes)
    enough = max(1, -(-left // max(1, min(MOST_WAVES, left // least))))
    ends, total = [], 0
    for i, size in enumerate(sizes, 1):
        total, left = total + size, left - size
        if total >= enough and left >= least:
            ends.append(i)
            total = 0
    return list(itertools.pairwise([0, *ends, len(sizes)]))


def _sizes(layout: Layout, kinds: dict[int, str]) -> Iterator[tuple[int, int]]:
    """By key how many numbers travel of a parameter, or at most: from its whole shape, which all ranks know."""
    if (tile := layout.tile) is not None:
        kind = kinds[tile.key]
        rows = tile.rows if has_rows(kind) and layout.row_groups else 0
        columns = tile.cols if has_columns(kind) and layout.column_groups else 0
        if layout.groups:
            yield tile.key, rows + columns
    for cut in layout.cuts:
        yield cut.key, len(cut.sharers) * cut.share if cut.everybody and has_columns(kinds[cut.key]) else 0


def _only(layout: Layout, keys: set[int]) -> Layout:
    """The same with some of its parameters."""
    return dataclasses.replace(
        layout,
        pieces=[piece for piece in layout.pieces if piece.key in keys],
        cuts=[cut for cut in layout.cuts if cut.key in keys],
    )
