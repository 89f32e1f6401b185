"""The one all-reduce of each process group, and the agreement before the first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

Range = tuple[int, int]


def disagreement(group: Any, fault: str, facts: Sequence[str] = (), doing: str = "take this step") -> str:
    """What keeps the ranks of `group` from stepping together; "" if nothing. Every rank of it must call this.

    Args:
        fault: what is wrong on this rank, if anything. facts: what must be the same on all ranks, in the same order.
        doing: what cannot be done otherwise, in words.
    """
    digest = hashlib.sha256("\n".join(facts).encode()).digest()  # thousands of ranks need not send each other it all
    found = _of_all_ranks((dist.get_rank(), fault, digest), group)
    if not fault:
        for rank, other, _ in found:
            if other:  # told by a rank, which may have been told itself
                fault = other if other.startswith("rank ") else f"rank {rank} cannot {doing}: {other}"
                break
    if len({digest for _, _, digest in found}) > 1:
        everything = _of_all_ranks((dist.get_rank(), list(facts)), group)
        fault = fault or _difference(everything, list(facts))
    return fault


def _of_all_ranks(mine: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


def _difference(found: list[tuple[int, list[str]]], facts: Sequence[str]) -> str:
    for rank, theirs in found:
        if theirs != facts:
            there = next((fact for fact in theirs if fact not in set(facts)), "no such thing")
            here = next((fact for fact in facts if fact not in set(theirs)), "no such thing")
            if there == here:
                there, here = "the same parameters and settings", "them in another order"
            return (
                f"rank {rank} has {there} where this rank has {here}. "
                "Start all ranks with the same script, configuration, version and weights."
            )
    return ""


def _within_reach(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """A copy on the GPU of offloaded state under NCCL, which cannot read CPU memory."""
    if tensor.device.type == "cpu" and "gloo" not in dist.get_backend(group) and torch.cuda.is_available():
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor


class Pending:
    """A collective that is under way; `wait` puts its result into `tensor`.

    Args:
        collective: of torch.distributed; by default what the ranks have in `tensor` is added up.
        given: what it takes beside the tensor for its result.
    """

    def __init__(self, tensor: torch.Tensor, group: Any, collective: Any = None, *given: torch.Tensor) -> None:
        self.tensor, self.reached = tensor, _within_reach(tensor, group)
        self.given = [_within_reach(each, group) for each in given]  # kept until it has been waited for
        work: Any = collective or dist.all_reduce
        self.work = work(self.reached, *self.given, group=group, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        if self.reached is not self.tensor:
            self.tensor.copy_(self.reached)


class Adding:
    """A collective that is under way, and what is left to do with its result."""

    def __init__(self, pending: Pending, then: Callable[[], None]) -> None:
        self._pending, self._then = pending, then

    def wait(self) -> None:
        self._pending.wait()
        self._then()


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same ranges, in order, where those that follow each other are one."""
    result: list[Range] = []
    for begin, end in sorted(ranges):
        if result and result[-1][1] == begin:
            result[-1] = (result[-1][0], end)
        elif begin < end:
            result.append((begin, end))
    return result


class Reduction:
    """One all-reduce for each process group, of its ranges of one vector; what several add up, one does after another.

    Args:
        ranges: by process group, `joined`, the groups in the same order on every rank. One range is reduced in place.
    """

    def __init__(self, vector: torch.Tensor, ranges: dict[Any, list[Range]]) -> None:
        self.vector, self.ranges = vector, ranges
        self._running: list[tuple[Pending, torch.Tensor, list[Range]]] = []
        self._later: list[Any] = []
        taken: list[Range] = []
        for group, some in ranges.items():
            if any(begin < last and first < end for begin, end in some for first, last in taken):
                self._later.append(group)
            elif some:
                self._start(group)
            taken += some

    def _start(self, group: Any) -> None:
        ranges = self.ranges[group]
        parts = [self.vector[begin:end] for begin, end in ranges]
        sent = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._running.append((Pending(sent, group), sent, ranges if len(parts) > 1 else []))

    def wait(self) -> None:
        """Every sum is in the vector then."""
        self._wait()
        for group in self._later:
            self._start(group)
            self._wait()

    def _wait(self) -> None:
        for pending, sent, ranges in self._running:
            pending.wait()
            if ranges:
                for (begin, end), part in zip(ranges, sent.split([e - b for b, e in ranges]), strict=True):
                    self.vector[begin:end] = part
        self._running.clear()
