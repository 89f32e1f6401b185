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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forget_memory(port: str) -> None:
    """Removes what DeepSpeed's reductions on CPU leave in shared memory: 69 MB for each rank."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def started(
    command: Sequence[str | int | Path], ranks: int, folder: Path, arguments: Any, **environment: str
) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
    """Runs a script on every rank: the processes, and the file with the output of each. All end with the context.

    Args:
        command: the script and its words. folder: where it finds `arguments`, and reports. environment: more of it.
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
        **environment,
    }
    logs = [folder / f"log{rank}" for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield processes, logs
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
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
    *command: str | int | Path, ranks: int, folder: Path | None = None, limit: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs a script on `ranks` ranks, in `folder`: under DeepSpeed's launcher, or plainly for one; all processes end.

    A rank that is still running after `limit` seconds is an AssertionError with the output.
    """
    words, port = [sys.executable], str(free_port())
    if ranks > 1:
        options = ["--quiet", "--num_gpus", str(ranks), "--master_port", port]
        words += ["-m", "deepspeed.launcher.runner", *options]
    words += map(str, command)
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
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
