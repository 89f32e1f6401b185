"""What ranks do together: know who they are, agree that something worked, and average numbers."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from amos_dist import hosts, preflight

T = TypeVar("T")

STARTED_BY = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")  # DeepSpeed finds its ranks from MPI's


class AgreedError(ValueError):
    """An error that every rank raises at the same place, so that ending needs no kill and nobody waits."""


def environment(local_rank: int) -> None:
    """Say in the environment who this rank is, where no launcher has: then it is the only one."""
    if "RANK" not in os.environ and not any(name in os.environ for name in STARTED_BY):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "LOCAL_RANK" not in os.environ and local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(local_rank)


def look_at_hosts(timeout: float, hostfile: Path | None) -> None:
    """Ends every rank where one differs or does not answer; every rank says why, and which, and on which host.

    Args:
        hostfile: the launcher's, at least on the host that it was started on.
    """
    rank, ranks = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        report = preflight.check(timeout, hosts.of_ranks(hostfile, ranks) if hostfile and hostfile.exists() else ())
    except (RuntimeError, ValueError) as error:
        sys.stderr.write(f"rank {rank}: {error}\n")
        sys.exit(1)
    if rank == "0":
        print(f"preflight: {report.summary}", flush=True)


def agree(work: Callable[[], T] | None) -> T:
    """Do `work` (None: nothing to do on this rank) and go on only if it worked on every rank.

    Otherwise every rank raises the first error: a rank that failed alone would leave the others waiting.
    """
    result, problem = None, None
    try:
        result = work() if work else None
    except (ValueError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise AgreedError(found)
    return result  # type: ignore[return-value]


def of_first(work: Callable[[], T]) -> T:
    """What `work` returns on the first rank, on every rank. Where it fails, every rank raises its error."""
    box: list[T | None] = [None]

    def fill() -> None:
        box[0] = work()

    agree(fill if dist.get_rank() == 0 else None)
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def mean(value: torch.Tensor | float, device: torch.device) -> float:
    """The mean of a number over all ranks."""
    total = torch.as_tensor(value, dtype=torch.float64).to(device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def largest(value: float, device: torch.device) -> float:
    """The largest of a number over all ranks."""
    most = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()
