"""What every rank needs and each makes a share of: sums go to the rank that makes something of them, results to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import reduce
from .reduce import Adding

# torch 2.13 has new names for these.
_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Shares:
    """Vectors in a workspace, of which each rank of a group has a share: one reduce-scatter and one all-gather for all.

    Together they move as many bytes as an all-reduce of the vectors.

    Args:
        work: [planes, n]. Sums are in plane 0; results are gathered in as many planes as `planes` says.
        ranks: of the group.
        wholes: where each vector begins and how long a share is: it takes a share for each rank, zeros at the end.
        mine: where this rank's shares begin, one after another.
        buffer: `planes` numbers for each one of the vectors.
    """

    def __init__(
        self,
        group: Any,
        ranks: int,
        work: Tensor,
        planes: int,
        wholes: Sequence[tuple[int, int]],
        mine: int,
        buffer: Tensor,
    ) -> None:
        total = sum(share for _, share in wholes)
        self._group = group
        self._mine = work[:planes, mine : mine + total]
        self._wholes = [
            [work[plane, begin : begin + ranks * share].view(ranks, share) for begin, share in wholes]
            for plane in range(planes)
        ]
        self._buffer = buffer
        self._sent = self._buffer[: ranks * total].view(ranks, total)
        received, widths = self._buffer.view(ranks, planes, total), [share for _, share in wholes]
        self._received = [list(received[:, plane].split(widths, dim=1)) for plane in range(planes)]

    @property
    def moves(self) -> list[tuple[str, int]]:
        """Its collectives, in order, and how many numbers are in each."""
        return [("scatter", self._sent.numel()), ("gather", self._buffer.numel())]

    def add_up(self) -> reduce.Pending:
        """Sums over all ranks of this rank's shares."""
        torch.cat(self._wholes[0], dim=1, out=self._sent)
        return reduce.Pending(self._mine[0], self._group, _scatter, self._sent.view(-1))

    def gather(self) -> Adding:
        """What all ranks have made of their shares."""
        mine = self._mine.contiguous().view(-1)
        return Adding(reduce.Pending(self._buffer, self._group, _gather, mine), self._take)

    def _take(self) -> None:
        for wholes, received in zip(self._wholes, self._received, strict=True):
            torch._foreach_copy_(wholes, received)
