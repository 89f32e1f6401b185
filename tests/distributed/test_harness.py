"""What the harness says of ranks that fail, are killed or hang, and that no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, run_ranks, started

WORKER = """
import os, random, signal, subprocess, sys, time
import numpy, torch
from tests.distributed.harness import received, report

mine = received().get(os.environ["RANK"], "")
child = subprocess.Popen(["sleep", "1000"])
print("here", os.getpid(), child.pid, flush=True)
if mine == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if mine == "hang":
    time.sleep(1000)
child.kill()
child.wait()
if mine == "raise":
    raise ValueError("a bug")
if mine == "exit":
    sys.exit(3)
if mine == "say":
    sys.exit("no way")
if mine == "change":
    os.environ["AMOS_CHANGED"] = torch.AMOS_CHANGED = "changed"
state = [os.environ.get("AMOS_CHANGED"), hasattr(torch, "AMOS_CHANGED"), os.getsid(0) == os.getpid()]
drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
report([__name__, sys.argv, sys.path[0], state, drawn, str({chr(i) for i in range(97, 123)})])
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "worker.py"


def gone(*pids: int, limit: float = 20) -> bool:
    """Whether these have ended within so many seconds."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + limit
    while any(map(runs, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("what", "said", "logged"),
    [
        ("raise", "rank 1 ended with 1", "ValueError: a bug"),
        ("exit", "rank 1 ended with 3", "here"),
        ("say", "rank 1 ended with 1", "no way"),
        ("kill", "rank 1 ended with -9", "here"),
        ("hang", "rank 0 was still running after 1 s", ""),
    ],
)
def test_a_rank_that_fails(what: str, said: str, logged: str, worker: Path) -> None:
    with pytest.raises(AssertionError) as error:
        run_ranks(worker, 2, {said[5]: what}, timeout=1 if what == "hang" else 60)
    first, _, logs = str(error.value).partition("\n")
    assert first == said
    assert logged in logs.partition("--- rank 1 ---")[2]
    assert "Traceback" not in logs or what == "raise"


def test_a_rank_is_like_a_new_process(worker: Path) -> None:
    """Nothing that another one has changed is there, nor its random numbers; neighbours have sets in another order."""
    run_ranks(worker, 2, {"0": "change", "1": "change"}, timeout=60)
    found = run_ranks(worker, 3, {}, timeout=60)
    for name, words, folder, state, *_ in found:
        assert (name, words, folder) == ("__main__", [str(worker)], str(worker.parent))
        assert state == [None, False, True]
    assert all(len(set(numbers)) == 3 for numbers in zip(*(drawn for *_, drawn, _ in found), strict=True))
    assert found[0][-1] != found[1][-1]


def pids(logs: list[Path]) -> list[int]:
    """Of ranks and their children, as soon as all have said them."""
    end = time.monotonic() + 60
    while not all(log.exists() and log.read_text().count("\n") for log in logs):
        assert time.monotonic() < end, [log.read_text() for log in logs]
        time.sleep(0.05)
    return [int(word) for log in logs for word in log.read_text().split()[1:3]]


def test_no_process_is_left(worker: Path, tmp_path: Path) -> None:
    with started([worker], 2, tmp_path, {"0": "hang", "1": "hang"}) as (processes, logs):
        running = pids(logs)
        assert [process.poll() for process in processes] == [None, None]
        processes[1].kill()
        assert processes[1].wait(20) == processes[1].returncode == -signal.SIGKILL
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].wait(0.1)
    assert gone(*running[:3])
    os.kill(running[3], signal.SIGKILL)  # the child of a rank that was killed alone
    assert processes[0].returncode == -signal.SIGKILL


OUTSIDE = """
import os, sys, time
from pathlib import Path
from tests.distributed.zygote import fork

folder = Path(sys.argv[2])
environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
environment |= {"RANK": "0", "AMOS_TEST_FOLDER": str(folder)}
rank = fork(sys.argv[1:2], environment, folder / "log", folder)
print(rank._zygote._process.pid, flush=True)
time.sleep(1000)
"""


def test_no_process_outlives_the_tests(worker: Path, tmp_path: Path) -> None:
    (tmp_path / "arguments.json").write_text('{"0": "hang"}')
    words: list[Any] = [sys.executable, "-c", OUTSIDE, worker, tmp_path]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as tests:
        try:
            running = pids([tmp_path / "log"])
            assert tests.stdout is not None
            running.append(int(tests.stdout.readline()))
        finally:
            tests.kill()
    assert gone(*running), running
