"""Which ranks are gone when a collective fails: a backend's own error names an address at best.

Each rank on which a collective fails cuts its connections, so that those that wait for it fail as well, and signs in
the store by which the process group was made. Who has not signed after a while does not answer any more.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

QUIET = 8.0  # seconds without a new answer, after which the others are not waited for any more
LAST = 1.5  # the same after a SIGTERM, and for rank 0 at the end, since the store ends with it
LIMIT = 25.0  # seconds in all: a store whose host has lost power does not even refuse to answer
NOBODYS_TAG = 0x616D6F73
RESTART = "then restart all ranks from the last checkpoint."


_hosts: list[str] = []  # of each rank, once they have been told


class CollectiveError(RuntimeError):
    """A collective failed; the text names the ranks that are gone."""


def introduce() -> None:
    """Tells every rank the names of the others' hosts, which errors then give. Every rank must call this."""
    global _hosts
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    _hosts = hosts if len(set(hosts)) > 1 else []


def is_of_backend(error: BaseException) -> bool:
    """Whether a collective failed because of another rank or the network, and not because of what it was given."""
    if isinstance(error, dist.DistBackendError):
        return True
    text = str(error)  # gloo raises plain RuntimeErrors, with the place in its sources, or after `cut_connections`:
    gloo = "gloo/transport/" in text or text.startswith("Application timeout caused pair closure")
    return type(error) is RuntimeError and gloo and "enforce fail" not in text


@contextlib.contextmanager
def guard(consequence: str = "this run cannot go on") -> Iterator[None]:
    """Around code with collectives, or as a decorator: where one fails, the error names the ranks that are gone.

    Errors of anything but the communication backend pass as they are. Where all code with collectives is inside, every
    rank that lives can answer. It takes up to half a minute, and the process group is of no use afterwards.

    Args:
        consequence: what the error says after "so that".

    Raises:
        CollectiveError: a collective failed; says which ranks do not answer.
    """
    try:
        yield
    except Exception as error:
        if not is_of_backend(error) or not dist.is_initialized():
            raise
        raise CollectiveError(sentence(absent(), consequence, str(error))) from error


def sentence(gone: Sequence[int] | None, consequence: str, cause: str) -> str:
    """What the error says. gone: as of `absent`. cause: the backend's own words."""
    if gone == []:
        words = cause.partition("\n")[0]
        failed = f"all ranks live, but a connection between them has failed, so that {consequence} ({words})"
        return f"{failed}. Look at the network first, {RESTART}"
    several = gone is not None and len(gone) > 1
    first = f", {_hosts[0]}," if _hosts else ","
    who = f"rank 0, or the host that it ran on{first}" if gone is None else listed(gone, _hosts)
    verb, logs = ("do", "their logs") if several else ("does", "its log")
    return f"{who} {verb} not answer any more, so that {consequence}. Look at {logs} first, {RESTART}"


def listed(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """ "rank 1", "ranks 2 and 3 on node1". hosts: of all ranks."""
    some = [str(rank) for rank in ranks[:8]]
    who = f"ranks {', '.join(some[:-1])} and {some[-1]}" if len(some) > 1 else f"rank {some[0]}"
    if len(ranks) > 8:
        who = f"{len(ranks)} ranks ({', '.join(some)}, …)"
    names = list(dict.fromkeys(hosts[rank] for rank in ranks)) if hosts else []
    if len(names) > 8:
        names = [*names[:8], f"{len(names) - 8} more hosts"]
    return f"{who} on {', '.join(names)}" if names else who


def unsigned(store: Any, signature: Callable[[int], str], ranks: Sequence[int]) -> list[int]:
    """Which of `ranks` have not signed in the store. By halves, because they are thousands, and most have."""
    if store.check([signature(rank) for rank in ranks]):
        return []
    half = len(ranks) // 2
    if not half:
        return list(ranks)
    return unsigned(store, signature, ranks[:half]) + unsigned(store, signature, ranks[half:])


class _RollCall:
    """One roll call, in a thread of its own: a call to a store without a host can take for ever.

    Attributes:
        gone: who has not answered; None: the store, which rank 0 hosts, does not.
        hurry: set: nobody is waited for much longer.
    """

    def __init__(self, number: int) -> None:
        self.store: Any = distributed_c10d._get_default_store()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.place = f"amos_dist/roll_call/{number}"
        self.gone: list[int] | None = None
        self.hurry = threading.Event()

    def hold(self) -> None:
        try:
            self.store.set(self._signature(self.rank), "1")
            self._await("here", self.ranks, QUIET)
            self.gone = unsigned(self.store, self._signature, range(self.ranks))
            self._await("heard", self.ranks - len(self.gone), LAST if self.rank == 0 else 0.0)
        except RuntimeError:  # the store is gone
            pass

    def _signature(self, rank: int) -> str:
        return f"{self.place}/{rank}"

    def _await(self, word: str, count: int, quiet: float) -> None:
        """Until so many ranks have said the word, or nobody more in `quiet` seconds."""
        said, last = self.store.add(f"{self.place}/{word}", 1), time.monotonic()
        while said < count and time.monotonic() - last < (min(quiet, LAST) if self.hurry.is_set() else quiet):
            time.sleep(0.05)
            now = self.store.add(f"{self.place}/{word}", 0)
            if now > said:
                said, last = now, time.monotonic()


_number = 0
_begun: Any = None  # the process group of which a roll call was asked for
_held: tuple[Any, list[int] | None] | None = None  # the process group, and what came of its roll call


def absent() -> list[int] | None:
    """The ranks that do not answer; None: the store does not, and so rank 0 or its host is gone. Asked once.

    Every rank on which a collective fails must call this. A SIGTERM ends the waiting: launchers send it to all ranks
    soon after one has died.
    """
    global _number, _held, _begun
    group = _begun = dist.group.WORLD
    if _held is not None and _held[0] is group:
        return _held[1]
    call = _RollCall(_number)
    _number += 1
    thread = threading.Thread(target=call.hold, daemon=True, name="roll call")
    with _terminating(call.hurry):
        cut_connections()
        thread.start()
        thread.join(LIMIT)
    _held = group, call.gone
    return call.gone


def begun() -> bool:
    """Whether some thread of this process has asked who is absent."""
    return _begun is not None and _begun is dist.group.WORLD


@contextlib.contextmanager
def _terminating(hurry: threading.Event) -> Iterator[None]:
    """SIGTERM sets that event instead of ending this process, which is about to end by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: hurry.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cut_connections() -> None:
    """Closes gloo's connections, so that a rank that waits for this one, but not for the dead one, learns of it.

    gloo does so where an operation takes longer than it may. This one does, since nobody sends with its tag.
    """
    gloo = getattr(distributed_c10d, "ProcessGroupGloo", ())
    for group in list(distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # it has no backend for the CPU; or gloo says that it has closed them
            backend: Any = group._get_backend(torch.device("cpu"))
            if isinstance(backend, gloo):
                backend.recv_anysource([torch.empty(1)], NOBODYS_TAG).wait(timedelta(milliseconds=10))
