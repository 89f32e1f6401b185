"""How ZeRO spreads parameters over ranks, by arithmetic: what sharding/zero.py finds in DeepSpeed's partitions.

Where the borders lie in one parameter is an arithmetic progression, so that counting what they cut takes no walk along
them, and what one rank holds takes no look at the others. Order and padding are DeepSpeed's, seen with 0.19.8.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runs import run_count
from ..sharding import Cut, Layout, Original, Piece
from ..state import has_columns, has_rows

STATE = ("row_moment", "column_moment", "decay")  # as state.state_sizes has them


class Spread(NamedTuple):
    """An R x C parameter over ranks: `owner` has its first `first` elements, each rank after it the next `share`.

    The last one has what is left. `kind`: the moments that the parameter really has. `everybody`: as Cut has it.
    """

    rows: int
    cols: int
    kind: str
    owner: int
    first: int
    share: int
    everybody: int = 0

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def borders(self) -> range:
        """The elements at which a piece but the first begins."""
        return range(self.first, self.numel, self.share)

    @property
    def holders(self) -> range:
        """The ranks that have elements of it."""
        return range(self.owner, self.owner + 1 + len(self.borders))

    def held(self, rank: int) -> tuple[int, int]:
        """The first element of a rank, and how many it has."""
        if rank not in self.holders:
            return 0, 0
        end = self.first + (rank - self.owner) * self.share
        start = max(0, end - self.share) if rank > self.owner else 0
        return start, min(end, self.numel) - start

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Of each holder the element that it begins with, and the one behind its last."""
        ends = (self.first + self.share * torch.arange(len(self.holders))).clamp_(max=self.numel)
        return torch.cat([ends.new_zeros(1), ends[:-1]]), ends

    @property
    def borders_inside_rows(self) -> int:
        """How many borders cut a row: first + i share is no multiple of C."""
        common = math.gcd(self.share, self.cols)
        count = len(self.borders)
        if self.first % common:
            return count
        period = self.cols // common  # of the i whose border lies between two rows
        begin = -self.first // common * pow(self.share // common, -1, period) % period
        return count - len(range(begin, count, period))

    @property
    def cut_rows(self) -> int:
        """How many rows lie on more than one rank."""
        if self.share < self.cols:  # no row is without a border
            return self.rows if self.borders else 0
        return self.borders_inside_rows  # each is in a row of its own

    @property
    def cut_columns(self) -> int:
        """How many columns lie on more than one rank: all of them, or none."""
        return self.cols if has_columns(self.kind) and self.borders else 0

    def cut(self, key: int) -> Cut | None:
        """What sharding.zero finds; None: one rank has it."""
        return Cut(key, self.rows, self.cols, self.borders, self.owner, self.everybody) if self.borders else None


@dataclass(frozen=True)
class Flat:
    """A flat partition: on each rank one tensor, which one call of step() steps.

    Attributes:
        keys: the numbers of its parameters. spreads: of each.
        numel: elements of each rank, padding included.
        padded_each: padding ends every parameter (stage 3), not the partition.
    """

    keys: range
    spreads: list[Spread]
    numel: int
    padded_each: bool

    def pieces(self, rank: int) -> list[Piece]:
        """What one rank holds.

        A rank with a share of the columns has elements too: from r ceil(C / n) < C follows r ceil(R C / n) < R C.
        """
        result, offset = [], 0
        for key, spread in zip(self.keys, self.spreads, strict=True):
            start, length = spread.held(rank)
            if length:
                cut = spread.cut(key)
                share = cut.share_of(rank) if cut else None
                result.append(Piece(key, spread.rows, spread.cols, start, length, offset, share))
            offset += spread.share if self.padded_each else length
        return result

    def layout(self, rank: int, ranks: int) -> Layout:
        """What sharding.zero finds on one rank. Its process group is a word."""
        cuts = [cut for key, each in zip(self.keys, self.spreads, strict=True) if (cut := each.cut(key))]
        return Layout(list(self.pieces(rank)), ("ranks",), ("ranks",), cuts, rank, ranks)


def partitions(
    groups: Sequence[Sequence[Original]], kinds: dict[int, str], zero: int, ranks: int, most: int
) -> list[Flat]:
    """The flat partitions of all parameter groups, in the order in which they are stepped.

    Args:
        groups: trainable parameters with elements, their keys counting from 0 through all groups.
        kinds: moments by key. zero: the stage, 1 to 3.
        most: DeepSpeed's sub_group_size: stage 3 ends a sub-group where it has so many elements.
    """
    return [
        flat for group in groups if group for flat in (_stage3 if zero == 3 else _stage12)(group, kinds, ranks, most)
    ]


def _stage12(group: Sequence[Original], kinds: dict[int, str], ranks: int, most: int) -> Iterator[Flat]:
    """One behind the other, padded at the end to a multiple of 2 x ranks, cut into equal parts."""
    numel = 2 * -(-sum(original.numel for original in group) // (2 * ranks))
    spreads, begin = [], 0
    for each in group:
        owner = begin // numel
        spreads.append(Spread(each.rows, each.cols, kinds[each.key], owner, (owner + 1) * numel - begin, numel))
        begin += each.numel
    yield Flat(range(group[0].key, group[-1].key + 1), spreads, numel, padded_each=False)


def _stage3(group: Sequence[Original], kinds: dict[int, str], ranks: int, most: int) -> Iterator[Flat]:
    """Each parameter is padded and cut into equal parts; sub-groups of at least `most` elements on each rank.

    Of the columns of those that are cut each rank keeps a share.
    """
    shares = [-(-each.numel // ranks) for each in group]
    begin = held = 0
    for end, share in enumerate(shares, 1):
        held += share
        if end == len(group) or held >= most:
            some = zip(group[begin:end], shares[begin:end], strict=True)
            spreads = [Spread(each.rows, each.cols, kinds[each.key], 0, n, n, ranks) for each, n in some]
            yield Flat(range(group[begin].key, group[end - 1].key + 1), spreads, held, padded_each=True)
            begin, held = end, 0


def entries_of_all(flats: Sequence[Flat], ranks: int) -> dict[str, Tensor]:
    """For every rank how many numbers state.state_sizes finds for its pieces: int64 [ranks], by key.

    Takes as long as there are different spreads, and memory for the ranks: of a model's layers each shape counts once.
    """
    rows, columns, alone = (torch.zeros(ranks, dtype=torch.int64) for _ in range(3))
    same = Counter(itertools.chain.from_iterable(flat.spreads for flat in flats))
    for spread, times in same.items():
        holders = slice(spread.holders.start, spread.holders.stop)
        if has_rows(spread.kind):
            starts, ends = spread.ranges()
            rows[holders] += times * ((ends + spread.cols - 1) // spread.cols - starts // spread.cols)
        if has_columns(spread.kind):
            cut, mine = spread.cut(0), torch.zeros(ranks, dtype=torch.int64)
            if cut is None:
                mine[holders] = spread.cols
            else:
                sharers = slice(cut.sharers.start, cut.sharers.stop)
                mine[sharers] = (spread.cols - cut.share * torch.arange(len(cut.sharers))).clamp_(0, cut.share)
            columns += times * mine
            if not has_rows(spread.kind):
                alone += times * mine
    return dict(zip(STATE, (rows, columns, rows + alone), strict=True))


def runs_of_all(flats: Sequence[Flat], ranks: int) -> Tensor:
    """For every rank how many scales a momentum in 8 bits has: int64 [ranks]. As runs.scale_count of its pieces."""
    found = torch.zeros(ranks, dtype=torch.int64)
    for spread, times in Counter(itertools.chain.from_iterable(flat.spreads for flat in flats)).items():
        starts, ends = spread.ranges()
        of_first_row = torch.minimum(-starts % spread.cols, ends - starts)  # elements before whole rows
        rest = ends - starts - of_first_row
        of_last_row = rest % spread.cols
        runs = sum(run_count(size) for size in (of_first_row, rest - of_last_row, of_last_row))
        found[spread.holders.start : spread.holders.stop] += times * runs
    return found
