"""The one all-reduce, and the agreement before the first."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def disagreement(group: Any, fault: str, size: int) -> str:
    """What keeps the ranks of `group` from stepping together; "" if nothing. Every rank of it must call this.

    Args:
        fault: what is wrong on this rank, if anything. size: how many numbers it would reduce.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (dist.get_rank(), fault, size), group=group)
    if fault:
        return fault
    for rank, other, _ in found:
        if other:
            return f"rank {rank} cannot take this step: {other}"
    for rank, _, other in found:
        if other != size:
            return (
                f"rank {rank} would reduce {other} numbers, this rank {size}: they train different models or settings. "
                "Start all ranks with the same script, configuration and version."
            )
    return ""


class Pending:
    """A sum over a process group that is under way; `wait` puts it into the tensor it came from."""

    def __init__(self, tensor: torch.Tensor, group: Any) -> None:
        self.tensor = tensor
        self.sent = tensor
        if tensor.device.type == "cpu" and "gloo" not in dist.get_backend(group) and torch.cuda.is_available():
            # Offloaded state under NCCL, which cannot read CPU memory.
            self.sent = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        self.work = dist.all_reduce(self.sent, group=group, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        if self.sent is not self.tensor:
            self.tensor.copy_(self.sent)
