"""What only few ranks of a group hold together: each sends to those that hold it too, and to nobody else.

One all-to-all, in which nearly all messages are empty: backends send none then, and every rank can call it alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import reduce
from .layout import Cut
from .reduce import Adding

_all_to_all = dist.all_to_all_single


class Shared(NamedTuple):
    """The columns of a parameter: where in the workspace all of them begin, and those of this rank's share."""

    cut: Cut
    whole: int
    share: int


class _Peer(NamedTuple):
    """Another rank: the places of numbers that it adds up too, and the columns that it keeps (ours), by plane."""

    numbers: list[int]
    theirs: list[slice]
    ours: list[slice]


class Holders:
    """Numbers of a workspace that are added up on all their holders, and columns on the rank that keeps them.

    Sums are made in the order of the ranks, so that all have the same bits.

    Args:
        group: the process group; this is its rank-th of `ranks`.
        work: [planes, n]. Sums are in plane 0; results are gathered in as many planes as `planes` says.
        numbers: places, and the ranks that hold a part of each: in the same order on all of these.
        columns: likewise; no rank sends any: planes is 0.
    """

    def __init__(
        self,
        group: Any,
        rank: int,
        ranks: int,
        work: Tensor,
        planes: int,
        numbers: Sequence[tuple[int, range]],
        columns: Sequence[Shared],
    ) -> None:
        self._group, self._rank, self._ranks = group, rank, ranks
        self._planes = [work[plane] for plane in range(max(1, planes))]
        self._gathers = planes > 0
        self._peers: dict[int, _Peer] = {}
        for place, holders in numbers:
            for peer in holders:
                self._peers.setdefault(peer, _Peer([], [], [])).numbers.append(place)
        for cut, whole, share in columns:
            own = len(cut.share_of(rank))
            for peer in cut.holders:
                kept = cut.share_of(peer)
                held = self._peers.setdefault(peer, _Peer([], [], []))
                held.theirs.append(slice(whole + kept.start, whole + kept.stop))
                held.ours.append(slice(share, share + own))
        self._peers = dict(sorted(self._peers.items()))
        self._index = {
            peer: torch.tensor(held.numbers, dtype=torch.int64, device=work.device)
            for peer, held in self._peers.items()
        }
        adding = self._sizes(lambda held: len(held.numbers) + _length(held.theirs))
        added = self._sizes(lambda held: len(held.numbers) + _length(held.ours))
        made = self._sizes(lambda held: planes * _length(held.ours))
        gathered = self._sizes(lambda held: planes * _length(held.theirs))
        self._to_add, self._to_gather = (adding, added), (made, gathered)
        # Both ways use the same memory.
        self.sent = work.new_empty(max(sum(adding), sum(made)))
        self.received = work.new_empty(max(sum(added), sum(gathered)))

    @property
    def moves(self) -> list[tuple[str, int]]:
        """Its collectives, in order, and how many numbers this rank sends in each."""
        return [("holders", sum(self._to_add[0])), ("holders", sum(self._to_gather[0]))][: 1 + self._gathers]

    def _sizes(self, size: Callable[[_Peer], int]) -> list[int]:
        """Of what goes to, or comes from, each rank of the group."""
        others = {peer: size(held) for peer, held in self._peers.items() if peer != self._rank}
        return [others.get(peer, 0) for peer in range(self._ranks)]

    def _exchange(self, sizes: tuple[list[int], list[int]], parts: Iterable[Tensor]) -> reduce.Pending:
        out, into = sizes
        sent, received = self.sent[: sum(out)], self.received[: sum(into)]
        parts = list(parts)
        if parts:
            torch.cat(parts, out=sent)
        swap = functools.partial(_all_to_all, output_split_sizes=into, input_split_sizes=out)
        return reduce.Pending(received, self._group, swap, sent)

    def _others(self) -> list[tuple[int, _Peer]]:
        return [(peer, held) for peer, held in self._peers.items() if peer != self._rank]

    def add_up(self) -> Adding:
        """Sums: of numbers on all ranks that hold them, of columns where they are kept."""
        sums = self._planes[0]
        parts = []
        for peer, held in self._others():
            parts += [sums[self._index[peer]], *(sums[columns] for columns in held.theirs)]
        return Adding(self._exchange(self._to_add, parts), self._add)

    def _add(self) -> None:
        sums, at = self._planes[0], 0
        own = self._peers.get(self._rank, _Peer([], [], []))
        own_numbers = sums[:0]
        if own.numbers:
            own_numbers = sums[self._index[self._rank]]
            sums.index_fill_(0, self._index[self._rank], 0)
        for peer, held in self._peers.items():
            if peer == self._rank:
                numbers, columns = own_numbers, [sums[some] for some in held.theirs]
            else:
                end = at + len(held.numbers)
                numbers, columns = self.received[at:end], []
                for some in held.ours:
                    columns.append(self.received[end : end + some.stop - some.start])
                    end += some.stop - some.start
                at = end
            if held.numbers:
                sums.index_add_(0, self._index[peer], numbers)
            if columns:
                torch._foreach_add_([sums[some] for some in held.ours], columns)

    def gather(self) -> Adding | None:
        """What the other holders have made of the columns that they keep; None: nobody has any."""
        if not self._gathers:
            return None
        parts = [plane[columns] for _, held in self._others() for plane in self._planes for columns in held.ours]
        return Adding(self._exchange(self._to_gather, parts), self._take)

    def _take(self) -> None:
        into, found, at = [], [], 0
        for peer, held in self._peers.items():
            for plane in self._planes:
                for theirs, ours in zip(held.theirs, held.ours, strict=True):
                    into.append(plane[theirs])
                    if peer == self._rank:
                        found.append(plane[ours])
                    else:
                        size = theirs.stop - theirs.start
                        found.append(self.received[at : at + size])
                        at += size
        if into:
            torch._foreach_copy_(into, found)


def _length(slices: Sequence[slice]) -> int:
    return sum(each.stop - each.start for each in slices)
