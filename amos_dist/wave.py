"""Parameters whose sums travel together: while one wave is under way, others are summed up and updated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernel_calls import Call
from .sharding import Layout
from .travel import Space, Travel, waves

# One is summed up, the sums of another travel, the results of a third come back or are put into the parameters.
UNDER_WAY = 3


class Wave:
    """A part of what travels in a step, with a workspace.

    Attributes:
        keys: its parameters. space: places in its workspace. work: that workspace, once `settle` has made it.
    """

    def __init__(
        self, layouts: Sequence[Layout], kinds: dict[int, str], flagged: Sequence[Layout], everyone: tuple[Any, ...]
    ) -> None:
        self.keys = {each.key for layout in layouts for each in (*layout.pieces, *layout.cuts)}
        self.space = Space()
        self.travel = Travel(layouts, kinds, self.space, flagged, everyone)
        self.work = torch.empty(0)
        self._pending: list[Any] = []

    @property
    def size(self) -> int:
        """How many numbers it keeps: three planes, and what its columns are sent from."""
        return 3 * self.space.size + self.travel.buffer_size

    def take(self, memory: Tensor) -> None:
        """memory: `size` numbers."""
        work, buffer = memory.split([3 * self.space.size, self.travel.buffer_size])
        self.work = work.view(3, self.space.size)
        self.exchanges = self.travel.exchanges(self.work, buffer)

    @property
    def moves(self) -> list[tuple[str, int]]:
        """Its collectives, and how many numbers are in each: of `holders` those that this rank sends."""
        added = [("all_reduce", sum(end - begin for begin, end in some)) for some in self.travel.ranges.values()]
        return added + [move for each in self.exchanges for move in each.moves]

    def sums(self, calls: Sequence[Call]) -> None:
        """Of this rank's gradients."""
        self.travel.begin(self.work, [place for call in calls for place in call.absent()])
        for call in calls:
            call.sums(self.travel, self.work)

    def depart(self, calls: Sequence[Call], infinite: Tensor | None = None) -> None:
        """The sums, to all ranks that want them. infinite: see Travel.tell."""
        self.travel.tell(self.work, infinite)
        for call in calls:
            call.send(self.travel, self.work)
        self._pending = [self.travel.reduce(self.work), *(each.add_up() for each in self.exchanges)]

    def arrive(self) -> None:
        for each in self._pending:
            each.wait()
        self._pending = []

    def share(self, calls: Sequence[Call]) -> None:
        """The columns that this rank keeps for others, worked out and on their way to them."""
        for call in calls:
            call.slots_of_share(self.travel, self.work)
        self._pending = [pending for each in self.exchanges if (pending := each.gather()) is not None]

    def finish(self, calls: Sequence[Call]) -> None:
        """The parameters, moved."""
        self.arrive()
        for call in calls:
            call.slots_and_update(self.travel, self.work)


def waves_of(layouts: Sequence[Layout], kinds: dict[int, str], everyone: tuple[Any, ...]) -> list[Wave]:
    """The waves of a set of tensors. The first has all flags, and departs last where it tells what is not finite."""
    parts = waves(layouts, kinds)
    return [Wave(some, kinds, () if i else layouts, () if i else everyone) for i, some in enumerate(parts)]


def settle(waves: Sequence[Wave], dtype: torch.dtype, device: torch.device, at_once: bool) -> list[Tensor]:
    """Gives each wave its workspace.

    Args:
        at_once: each has one of its own; else those have that are under way together.

    Returns:
        The memory: zeros.
    """
    count = len(waves) if at_once else min(len(waves), UNDER_WAY)
    memory = [torch.zeros(max(wave.size for wave in waves[i::count]), dtype=dtype, device=device) for i in range(count)]
    for i, wave in enumerate(waves):
        wave.take(memory[i % count][: wave.size])
    return memory
