"""Starts real ranks (gloo) of a worker script, with a timeout, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tests.distributed.zygote import OF_A_RANK, Rank, fork

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forget_memory(port: str) -> None:
    """Removes what DeepSpeed's reductions on CPU leave in shared memory: 69 MB for each rank."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


Process = subprocess.Popen[bytes] | Rank


def begin(words: list[str], environment: dict[str, str], log: Path, folder: Path | None = None) -> Process:
    """Python with these words, in a session of its own, in `folder`; where it is a script, as a fork."""
    log.write_bytes(b"")
    if words[0].endswith(".py") and sys.platform == "linux":
        return fork(words, environment, log, folder or Path.cwd())
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: Process) -> None:
    """Kills what still runs, with all in its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def started(
    command: Sequence[str | int | Path],
    ranks: int,
    folder: Path,
    arguments: Any,
    cwd: Path | None = None,
    **environment: str,
) -> Iterator[tuple[list[Process], list[Path]]]:
    """Runs a script on every rank: the processes, and the file with the output of each. All end with the context.

    Args:
        command: the script and its words, or options of Python. folder: where it finds `arguments`, and reports.
        cwd: where it runs. environment: more of it.
    """
    (folder / "arguments.json").write_text(json.dumps(arguments))
    port = str(free_port())
    common = {
        **os.environ,
        "AMOS_TEST_FOLDER": str(folder),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "DS_ACCELERATOR": "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **environment,
    }
    logs = [folder / f"log{rank}" for rank in range(ranks)]
    processes: list[Process] = []
    try:
        for rank, log in enumerate(logs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(begin([str(word) for word in command], own, log, cwd))
        yield processes, logs
    finally:
        for process in processes:
            end(process)
        forget_memory(port)


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may be longer than `room` bytes, of whatever this process writes: nothing else may happen meanwhile."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def run_ranks(worker: str | Path, ranks: int, arguments: Any, timeout: float = 240) -> list[Any]:
    """Runs `worker` on `ranks` processes and returns what each wrote with `report`.

    The worker finds `arguments` with `received()`. Raises AssertionError with all output where a rank fails or hangs.
    """
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        with started([worker], ranks, Path(folder), arguments) as (processes, logs):
            for rank, process in enumerate(processes):
                try:
                    if process.wait(timeout) != 0:
                        failure = f"rank {rank} ended with {process.returncode}"
                        break
                except subprocess.TimeoutExpired:
                    failure = f"rank {rank} was still running after {timeout} s"
                    break
        if failure:
            tails = "\n".join(f"--- rank {i} ---\n{log.read_text()[-4000:]}" for i, log in enumerate(logs))
            raise AssertionError(f"{failure}\n{tails}")
        return [json.loads(Path(folder, f"result{rank}.json").read_text()) for rank in range(ranks)]


_RUNS: dict[tuple[Path, int], list[Any] | AssertionError] = {}


def run_cases(worker: Path, ranks: int, cases: list[dict[str, Any]], timeout: float = 240) -> list[dict[str, Any]]:
    """What each rank reported, by the name of the case. All cases of a worker on that many ranks are one run.

    Once, also where it fails: each test would wait for it again.
    """
    if (worker, ranks) not in _RUNS:
        try:
            _RUNS[worker, ranks] = run_ranks(worker, ranks, cases, timeout)
        except AssertionError as error:
            _RUNS[worker, ranks] = error
    found = _RUNS[worker, ranks]
    if isinstance(found, AssertionError):
        raise found
    return [{each["name"]: each for each in rank} for rank in found]


def launch(
    *command: str | int | Path, ranks: int, folder: Path | None = None, limit: float = 240, launcher: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a script on `ranks` ranks, in `folder`, and all processes end.

    With several ranks under DeepSpeed's launcher, or, where the test is not about that, each as a launcher starts it;
    one alone plainly. A rank that is still running after `limit` seconds is an AssertionError with the output.
    """
    if ranks > 1 and launcher:
        return _under_deepspeed(command, ranks, folder, limit)
    words = [str(word) for word in command]
    given = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    given |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    late = False
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        if ranks > 1:
            processes, logs = stack.enter_context(started(command, ranks, Path(place), None, folder))
        else:
            logs = [Path(place, "log")]
            processes = [begin(words, given, logs[0], folder)]
            stack.callback(end, processes[0])
        limit += time.monotonic()
        for process in processes:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
        status = next((process.returncode for process in processes if process.returncode), 0)
        output = "".join(log.read_text() for log in logs)
    assert not late, f"ranks were still running:\n{output[-3000:]}"
    return subprocess.CompletedProcess([sys.executable, *words], status, output, "")


def _under_deepspeed(
    command: Sequence[str | int | Path], ranks: int, folder: Path | None, limit: float
) -> subprocess.CompletedProcess[str]:
    port = str(free_port())
    options = ["--quiet", "--num_gpus", str(ranks), "--master_port", port]
    words = [sys.executable, "-m", "deepspeed.launcher.runner", *options, *map(str, command)]
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {limit} s:\n{output[-3000:]}") from None
    finally:
        forget_memory(port)
    return subprocess.CompletedProcess(words, process.returncode, output, "")


def received() -> Any:
    """In a worker: the arguments."""
    return json.loads(Path(os.environ["AMOS_TEST_FOLDER"], "arguments.json").read_text())


def serve(do: dict[str, Callable[[Any], dict[str, Any]]]) -> NoReturn:
    """In a worker that has joined its process group: does every case that it is given, reports, and ends.

    Args:
        do: by the case's "do", or "train" where it says nothing.
    """
    results = []
    for case in received():
        if os.environ["RANK"] == "0":
            print(case["name"], flush=True)
        results.append({"name": case["name"], **do[case.get("do", "train")](case)})
    report(results)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference beside the largest number."""
    if not expected.numel():
        return 0.0
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3))


def complaint(work: Callable[[], Any]) -> str:
    """What the RuntimeError says that `work` ends with; nothing where it ends well."""
    try:
        work()
    except RuntimeError as error:
        return str(error)
    return ""


def report(result: Any) -> None:
    """In a worker: what `run_ranks` returns for this rank."""
    Path(os.environ["AMOS_TEST_FOLDER"], f"result{os.environ['RANK']}.json").write_text(json.dumps(result))
