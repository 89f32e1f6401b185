"""Hosts that fall silent: a cut cable, no power. Nobody closes their connections, so a collective waits for ever.

Each rank counts in the store by which the process group was made, and looks whether the next one counts. Where the next
one, or the store, is silent for too long, the rank says so in the store and closes its own connections, as all others
do that read it: their collectives fail, and a roll call (amos_dist.roll_call) names who is gone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import roll_call

PERIOD = 2.0  # seconds between two counts
PATIENCE = 25.0  # with the roll call, an error comes within a minute
GRACE = 4.0  # for the main thread to notice that its connections are closed
LEFT = 1 << 40  # a rank that leaves has counted so far
ANSWER = timedelta(seconds=5)

_watches = 0


@contextlib.contextmanager
def watch(patience: float = PATIENCE, consequence: str = "this run cannot go on") -> Iterator[None]:
    """While the context lasts, silent ranks are noticed. Every rank must enter it, around `roll_call.guard`.

    Code that leaves no other thread a turn for longer than `patience` counts as silent. A main thread that stays in
    something other than gloo's collectives cannot be fetched: it is ended with the same sentence, and status 1.

    Args:
        patience: seconds of silence. consequence: what the sentence says after "so that".
    """
    global _watches
    ranks = dist.get_world_size()
    roll_call.introduce()
    if ranks == 1:
        yield
        return
    _watches += 1
    watching = _Watch(f"amos_dist/heartbeat/{_watches}", dist.get_rank(), ranks, patience, consequence)
    try:
        yield
    except Exception:
        watching.alarm.set()
        raise
    finally:
        watching.end()


class _Watch:
    """One thread counts and may be stuck in the store for ever; the other looks at clocks only.

    Attributes:
        alarm: this rank cannot go on, or another one has said so. over: the context has ended.
    """

    def __init__(self, place: str, rank: int, ranks: int, patience: float, consequence: str) -> None:
        self.mine, self.next, self.lost = f"{place}/{rank}", f"{place}/{(rank + 1) % ranks}", f"{place}/lost"
        self.first = f"{place}/0"
        self.rank, self.patience, self.consequence = rank, patience, consequence
        first: Any = distributed_c10d._get_default_store()
        self.store = first.clone()  # other threads wait in the first one
        self.store.set_timeout(ANSWER)
        self.answered = self.moved = time.monotonic()
        self.alarm, self.over = threading.Event(), threading.Event()
        self.counting = threading.Thread(target=self._count, daemon=True, name="heartbeat")
        self.counting.start()
        threading.Thread(target=self._look, daemon=True, name="heartbeat watch").start()

    def end(self) -> None:
        self.over.set()
        # Python's end would abort a thread that is in the store's code.
        self.counting.join(PERIOD + ANSWER.total_seconds())
        if self.rank == 0 and not self.alarm.is_set():
            time.sleep(PERIOD + 1)  # its process may keep the store: the others must have read that it has left

    def _count(self) -> None:
        seen = -1
        while not self.over.is_set():
            with contextlib.suppress(RuntimeError):  # the store does not answer: the clock says for how long
                self.store.add(self.mine, 1)
                now = self.store.add(self.next, 0)
                if self.store.add(self.lost, int(self.alarm.is_set())):
                    self.alarm.set()
                self.answered = time.monotonic()
                if self.store.add(self.first, 0) >= LEFT:  # and maybe the store with it: nobody is watched any more
                    self.answered = self.moved = float("inf")
                    self.over.wait()
                elif now >= LEFT:
                    self.moved = float("inf")
                elif now != seen:
                    seen, self.moved = now, self.answered
            self.over.wait(PERIOD)
        with contextlib.suppress(RuntimeError):
            self.store.add(*((self.lost, 1) if self.alarm.is_set() else (self.mine, LEFT)))

    def _look(self) -> None:
        while time.monotonic() - min(self.answered, self.moved) < self.patience and not self.alarm.is_set():
            if self.over.wait(0.5):
                return
        self.alarm.set()
        roll_call.cut_connections()
        if self.over.wait(GRACE) or roll_call.begun():
            return
        gone = roll_call.absent()
        if not self.over.is_set():
            sys.stderr.write(f"rank {self.rank}: {roll_call.sentence(gone, self.consequence, 'no answer')}\n")
            sys.stderr.flush()
            os._exit(1)
