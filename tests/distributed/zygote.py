"""Ranks without the seconds in which each imports torch: forks of a process, the zygote, that has done so.

Of torch alone, which every worker imports first: DeepSpeed, amos_dist and the worker itself are imported by each rank.
A zygote has no threads. It ends with the process that started it, and its ranks end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What workers import of torch, and what DeepSpeed and Amos bring in of it with the first step.
MODULES = (
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
)
# These may differ from rank to rank. All other variables are there before torch is imported, which reads some then.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_A_TEST = ("AMOS_TEST_FOLDER", "AMOS_FAULT", "PYTEST_CURRENT_TEST")


class Rank:
    """What `subprocess.Popen` has of a process, of a fork."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid, self._zygote = pid, zygote
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self._zygote.listen(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
            self._zygote.listen(left)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """The process that ranks are forked from, as seen from here."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._said = b""
        self._running: dict[int, Rank] = {}
        self._last: Rank | None = None  # that was forked
        atexit.register(self._end)

    def _end(self) -> None:
        self._control.close()
        self._process.wait()

    def fork(self, words: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path) -> Rank:
        """A process with a session of its own that runs a script, with its words."""
        request = {"words": words, "environment": dict(environment), "log": str(log), "folder": str(folder)}
        self._control.sendall(json.dumps(request).encode() + b"\n")
        before = self._last
        while self._last is before:
            self.listen(None)
            if self._process.poll() is not None:
                raise RuntimeError(f"the process that ranks are forked from has ended with {self._process.returncode}")
        assert self._last is not None
        return self._last

    def listen(self, seconds: float | None) -> None:
        """Takes what the zygote says: [pid] has started, or [pid, status] has ended."""
        if not select.select([self._control], [], [], seconds)[0]:
            return
        try:
            new = self._control.recv(1 << 16)
        except ConnectionResetError:
            new = b""
        if not new:  # it has been killed, and with it all ranks
            self._process.wait()
            new = b"".join(b"[%d, %d]\n" % (pid, -signal.SIGKILL) for pid in self._running)
        *lines, self._said = (self._said + new).split(b"\n")
        for pid, *status in map(json.loads, lines):
            if status:
                self._running.pop(pid).returncode = status[0]
            else:
                self._last = self._running[pid] = Rank(self, pid)


@functools.cache
def _zygote(environment: frozenset[tuple[str, str]], parity: int) -> Zygote:
    """parity: ranks that are neighbours have other hash seeds, and so sets in another order, as on other hosts."""
    return Zygote(dict(environment))


def fork(words: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path) -> Rank:
    """Like Popen([sys.executable, *words], env=environment, cwd=folder, start_new_session=True), its output in `log`.

    words: a script and its arguments.
    """
    common = {name: value for name, value in environment.items() if name not in (*OF_A_RANK, *OF_A_TEST)}
    ranks = int(environment.get("WORLD_SIZE", 1))
    both = [_zygote(frozenset(common.items()), parity) for parity in range(min(ranks, 2))]  # they start side by side
    return both[int(environment.get("RANK", 0)) % 2].fork(words, environment, log, folder)


# ---- in the zygote ---------------------------------------------------------------------------------------------------


def become(request: dict[str, Any]) -> None:
    """In the fork: a process like one that has just started."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the zygote
    with Path(request["log"]).open("ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    import numpy
    import torch

    numpy.random.seed()  # as Python's random has done itself
    torch.default_generator.seed()


def fork_here(request: dict[str, Any], control: socket.socket) -> int:
    """The number of the new process, which has its own session; 0 in itself."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid:
        os.close(done)
        os.read(ready, 1)  # nothing: until its end is closed
    else:
        control.close()
        become(request)
        os.close(done)
    os.close(ready)
    return pid


def serve() -> None:
    """Forks until the other side has ended. Returns in each fork."""
    control = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"torch has begun {threads - 1} threads with its import, which no fork would have"
    said, running = b"", set[int]()

    def say(*numbers: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # the other side has ended, which `recv` sees
            control.sendall(json.dumps(numbers).encode() + b"\n")

    while True:
        if select.select([control], [], [], 0.02 if running else None)[0]:
            new = control.recv(1 << 16)
            if not new:
                for pid in running:
                    os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            *requests, said = (said + new).split(b"\n")
            for request in map(json.loads, requests):
                pid = fork_here(request, control)
                if not pid:
                    return
                running.add(pid)
                say(pid)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.remove(ended[0])
            say(ended[0], os.waitstatus_to_exitcode(ended[1]))


if __name__ == "__main__":
    serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
