"""Before training: do all ranks have the same versions, and does each of them answer?

    preflight.check()  # on every rank, before or after init_process_group

Best before: init_process_group waits half an hour for a host that is down, and does not name it. The ranks meet in a
store, never in a collective, which would hang where one of them is missing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import roll_call, versions
from .versions import ALL_FACTS, NAMED, Report, Row, called, number_in, rows_of

CLOCKS, HEARD = 10.0, 1.5  # seconds for what follows when all are there: the clocks, and the last to have read the end

_number = 0
_kept: Any = None  # the store that was made here: rank 0 hosts it for all, and init_process_group goes on with it


def check(timeout: float = 45.0, hosts: Sequence[str] = ()) -> Report:
    """Compares all ranks. Every rank must call this, and each has the same report, or raises the same error.

    Without a process group, the environment says where to meet: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without
    these, this process is the only one.

    Args:
        timeout: seconds that a rank waits for the others. hosts: of each rank, as the launcher knows them
            (hosts.of_ranks): a rank that never answers cannot say where it should have been.

    Raises:
        RuntimeError: ranks differ in what must be alike, or do not answer; names them and their hosts.
        ValueError: the environment names a rank, but not where to meet; or `timeout` is none.
    """
    if not 0 < timeout < 1e6:
        raise ValueError(f"timeout={timeout}: nobody can wait so long. Give the seconds to wait for the slowest rank.")
    rank, ranks = _place()
    mine = versions.facts()
    report = _Meeting(rank, ranks, timeout, hosts).report(mine) if ranks > 1 else Report(tuple(rows_of([mine], [0.0])))
    if report.error:
        raise RuntimeError(report.error)
    for warning in report.warnings if rank == 0 else ():
        warnings.warn(warning, stacklevel=2)
    return report


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return number_in("RANK", 0), number_in("WORLD_SIZE", 1)


class _Meeting:
    """One comparison, in a thread of its own: a call to a store whose host is gone can take for ever.

    All that ranks need to agree on is one text in the store, the verdict, and whoever is first to write it has written
    it for all: the last rank to come, which compares, or the first to have waited long enough, which names the absent.
    """

    def __init__(self, rank: int, ranks: int, timeout: float, hosts: Sequence[str]) -> None:
        global _number
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.hosts = hosts if len(hosts) == ranks else ()
        # torchrun may keep the store when it starts all ranks again
        self.place = f"amos_dist/preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_number}"
        _number += 1
        self.store: Any = None
        self.verdict: dict[str, Any] | None = None
        self.failure: Exception | None = None

    def report(self, mine: dict[str, Any]) -> Report:
        thread = threading.Thread(target=self._hold, args=[mine], daemon=True, name="preflight")
        thread.start()
        thread.join(self.timeout + CLOCKS + 2 * HEARD)
        if not isinstance(self.failure, (RuntimeError, OSError, type(None))):  # none of the store or the network
            raise self.failure
        if self.verdict is None:
            raise RuntimeError(self._unreachable()) from self.failure
        if "absent" in self.verdict:
            raise RuntimeError(self.verdict["absent"])
        kinds = self.verdict["kinds"]
        return Report(tuple(Row(h, tuple(ranks), kinds[kind], a) for h, ranks, kind, a in self.verdict["rows"]))

    def _unreachable(self) -> str:
        if self.store is not None:
            return roll_call.sentence(None, "training cannot start", "")
        why = f" ({str(self.failure).partition(chr(10))[0]})" if self.failure else ""  # torch adds a page
        address = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')},"
        return (
            f"{address} where rank 0 is to be met, cannot be reached from {socket.gethostname()} (rank {self.rank}) "
            f"within {self.timeout:g} s{why}. Look whether that host is up and rank 0 runs there, "
            "and at MASTER_ADDR, MASTER_PORT and the firewall; then start all ranks again."
        )

    def _hold(self, mine: dict[str, Any]) -> None:
        end = time.monotonic() + self.timeout
        try:
            self.store = _store(self.rank, self.timeout)
            self._meet({**mine, "local_rank": number_in("LOCAL_RANK", 0)}, end)
        except Exception as error:
            self.failure = error

    def _meet(self, mine: dict[str, Any], end: float) -> None:
        wanted = {"host", "local_rank", *ALL_FACTS}
        if self.hosts and mine["local_rank"] == 0:  # who launches may be the only one to know
            self.store.set(f"{self.place}/hosts", json.dumps(list(self.hosts)))
        self._sign("facts", json.dumps({key: value for key, value in mine.items() if key in wanted}))
        if not self._wait("facts", max(HEARD, end - time.monotonic())) and (silent := self._silent("facts")):
            self._decide(self._absence(silent))
            self.store.set(f"{self.place}/facts/all", "")  # who still waits finds the verdict
        if not self.store.check([f"{self.place}/verdict"]):
            last = self._sign("clock", repr(time.time()))  # all have just been let go
            if last or not self._wait("verdict", CLOCKS, ""):
                silent = self._silent("clock")
                self._decide(self._absence(silent) if silent else self._comparison())
        self.verdict = json.loads(self.store.get(f"{self.place}/verdict"))
        try:  # launchers end all ranks soon after one has ended, and the store ends with rank 0
            self._sign("heard", "", of=self.verdict["present"])
            self._wait("heard", HEARD)
        except RuntimeError:
            pass

    def _sign(self, word: str, text: str, of: int | None = None) -> bool:
        """Whether this rank was the last of so many to do so; lets all others go on then."""
        self.store.set(self._key(word, self.rank), text)
        last: bool = self.store.add(f"{self.place}/{word}", 1) >= (of or self.ranks)
        if last:
            self.store.set(f"{self.place}/{word}/all", "")
        return last

    def _key(self, word: str, rank: int) -> str:
        return f"{self.place}/{word}/{rank}"

    def _wait(self, word: str, seconds: float, what: str = "/all") -> bool:
        try:
            self.store.wait([f"{self.place}/{word}{what}"], timedelta(seconds=seconds))
        except dist.DistStoreError:  # of time; one of the network passes
            return False
        return True

    def _silent(self, word: str) -> list[int]:
        return roll_call.unsigned(self.store, lambda rank: self._key(word, rank), range(self.ranks))

    def _decide(self, verdict: dict[str, Any]) -> None:
        self.store.compare_set(f"{self.place}/verdict", "", json.dumps(verdict))

    def _comparison(self) -> dict[str, Any]:
        """Short, since every rank will read it: what many ranks have is there once."""
        values = self.store.multi_get([self._key(word, r) for word in ("facts", "clock") for r in range(self.ranks)])
        rows = rows_of([json.loads(text) for text in values[: self.ranks]], [float(x) for x in values[self.ranks :]])
        kinds = list({json.dumps(row.facts): row.facts for row in rows}.values())
        short = [(row.host, row.ranks, kinds.index(row.facts), row.ahead) for row in rows]
        return {"rows": short, "kinds": kinds, "present": self.ranks}

    def _absence(self, silent: list[int]) -> dict[str, Any]:
        by_host: dict[str, list[int]] = {}
        for rank in silent:
            by_host.setdefault(self._host(rank, silent), []).append(rank)
        who = [
            f"{called(some)} {f'on {host}' if host else '(not heard from since the start)'}"
            for host, some in by_host.items()
        ]
        if len(who) > NAMED:
            who[NAMED - 1 :] = [f"ranks on {len(who) - NAMED + 1} more hosts"]
        plural = len(silent) > 1
        text = (
            f"{' and '.join(who)} {'do' if plural else 'does'} not answer within {self.timeout:g} s, so that training "
            f"cannot start. Look at {'their logs' if plural else 'its log'}, and whether the host is up and reaches "
            "the others (`python -m amos_dist info --hostfile FILE` asks all); then start all ranks again."
        )
        return {"absent": text, "present": self.ranks - len(silent)}

    def _host(self, rank: int, silent: list[int]) -> str:
        """Where a silent rank runs, as it said itself, the launcher says, or a rank of the same host; or nothing."""
        if self.store.check([self._key("facts", rank)]):
            return str(json.loads(self.store.get(self._key("facts", rank)))["host"])
        if self.store.check([f"{self.place}/hosts"]):
            return str(json.loads(self.store.get(f"{self.place}/hosts"))[rank])
        each = number_in("LOCAL_WORLD_SIZE", number_in("LOCAL_SIZE", 1))  # as torchrun and DeepSpeed call it
        first = rank - rank % max(each, 1)
        for other in range(first, min(first + each, self.ranks)):
            if other not in silent:
                there = json.loads(self.store.get(self._key("facts", other)))
                return str(there["host"]) if there["local_rank"] == other - first else ""
        return ""


def _store(rank: int, timeout: float) -> Any:
    """The one of the process group; without one, or where it has none, one where rank 0 or torchrun is to be met."""
    global _kept
    if dist.is_initialized() and dist.get_backend() != "mpi":
        return distributed_c10d._get_default_store()
    if _kept is None:
        address, port = os.environ.get("MASTER_ADDR", ""), number_in("MASTER_PORT", 0)
        if not address or not port:
            raise ValueError(
                "MASTER_ADDR and MASTER_PORT, where the ranks are to meet, are not in the environment. "
                "Start the ranks with a launcher, or call preflight.check() after init_process_group."
            )
        hosting = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not hosting:
            _await(address, port, timeout)
        _kept = dist.TCPStore(
            address,
            port,
            is_master=hosting,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    return _kept


def _await(address: str, port: int, timeout: float) -> None:
    """Until somebody listens there. TCPStore would wait as well, but print a page for each attempt, and not say why.

    Raises:
        OSError: nobody does.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
