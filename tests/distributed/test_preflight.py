"""preflight.check on real ranks: what each of them is told, and that nobody waits for the silent."""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import amos_dist
from tests.distributed.harness import free_port, run_ranks, started

WORKER = Path(__file__).with_name("preflight_worker.py")
RANKS = 3
pytestmark = pytest.mark.timeout(600)

NODES = {"0": {"host": "node1"}, "1": {"host": "node1"}, "2": {"host": "node2"}}
OTHER = {**NODES, "2": {"host": "node2", "version": "0.2.0", "sources": "0"}}
CASES: list[dict[str, Any]] = [
    {"name": "alike, no group"},
    {"name": "version, no group", "facts": OTHER},
    {"name": "alike", "group": True},
    {"name": "version", "facts": OTHER},
    {"name": "sources", "facts": {**NODES, "1": {"host": "node1", "sources": "1" * 12}}},
    {"name": "GPU", "facts": {**NODES, "2": {"host": "node2", "gpu": "H200"}, "0": {"host": "node1", "gpu": "H200"}}},
    {"name": "driver", "facts": {**NODES, "2": {"host": "node2", "driver": "570.1"}}},
    {"name": "clock", "facts": NODES, "clock": {"2": -30}},
    {"name": "far clock", "facts": NODES, "clock": {"0": 3600}},
]


@functools.cache
def ran() -> list[Any]:
    return run_ranks(WORKER, RANKS, {"cases": CASES})


def told(name: str) -> dict[str, Any]:
    """By `check`, to every rank; only warnings are for rank 0 alone."""
    first, *others = [each[name] for each in ran()]
    for other in others:
        assert other["warnings"] == []
        assert {**other, "warnings": 0, "seconds": 0} == {**first, "warnings": 0, "seconds": 0}
    return first


@pytest.mark.parametrize("name", ["alike", "alike, no group"])
def test_alike(name: str) -> None:
    result = told(name)
    assert result["error"] == "" and result["warnings"] == []
    assert result["summary"].startswith(f"3 ranks on 1 host with amos_dist {amos_dist.__version__}, Python 3.")
    assert f"torch {torch.__version__}" in result["summary"]
    head, *rows = result["table"].splitlines()
    assert len(rows) == 1 and rows[0].startswith("0-2 ") and head.split()[:3] == ["ranks", "host", "amos_dist"]


@pytest.mark.parametrize("name", ["version", "version, no group"])
def test_another_version_on_one_host(name: str) -> None:
    error = told(name)["error"]
    values = f"{amos_dist.__version__} on node1 (ranks 0-1) and 0.2.0 on node2 (rank 2)"
    assert error.startswith(f"amos_dist is {values}. Install the same on all hosts"), error
    assert "code" not in error


def test_the_same_version_of_other_sources() -> None:
    error = told("sources")["error"]
    assert re.match(r"amos_dist's code is \w{12} on node1 \(rank 0\), node2 \(rank 2\) and 1{12} on node1 ", error)


def test_a_host_without_its_gpu() -> None:
    assert told("GPU")["error"].startswith(
        "GPU is H200 on node1 (rank 0), node2 (rank 2) and missing on node1 (rank 1)"
    )


def test_what_may_differ_is_a_warning_on_rank_0() -> None:
    result = told("driver")
    (warning,) = result["warnings"]
    assert warning.startswith("NVIDIA driver is ") and "570.1 on node2 (rank 2)" in warning
    assert result["error"] == "" and len(result["table"].splitlines()) == 3


def test_clocks() -> None:
    (warning,) = told("clock")["warnings"]
    assert re.match(r"the clock of node2 \(rank 2\) is (29|3\d) s behind the others. Set ", warning), warning
    error = told("far clock")["error"]
    assert re.match(r"the clock of node1 \(ranks? 0(-1)?\) is (359\d|360\d) s ahead of the others. Set ", error), error


# ---- ranks that do not answer ----------------------------------------------------------------------------------------


def with_one_silent(folder: Path, silent: int, how: str, timeout: float, **more: Any) -> list[dict[str, Any]]:
    """What the others are told, or all of them where it is only late; within a minute."""
    arguments = {"silent": silent, "how": how, "timeout": timeout, "facts": NODES, **more}
    wanted = [rank for rank in range(RANKS) if rank != silent or how == "late"]
    files = [folder / f"result{rank}.json" for rank in wanted]
    with started([WORKER], RANKS, folder, arguments, **more.get("environment", {})) as (processes, logs):
        if how == "absent":
            processes[silent].kill()
        end = time.monotonic() + 200
        while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < end:
            time.sleep(0.1)
        assert all(file.exists() for file in files), [log.read_text()[-2000:] for log in logs]
        time.sleep(0.2)
        results = [json.loads(file.read_text()) for file in files]
    assert all(each["seconds"] < 60 for each in results)
    return results


def errors(results: list[dict[str, Any]]) -> str:
    """The one that all ranks have raised."""
    (error,) = {each["error"] for each in results}
    return str(error)


def test_a_rank_that_never_calls_is_named(tmp_path: Path) -> None:
    error = errors(with_one_silent(tmp_path, 2, "never", 8, environment={"LOCAL_WORLD_SIZE": "2"}))
    unknown = "rank 2 (not heard from since the start) does not answer within 8 s, so that training cannot start. Look "
    assert error.startswith(unknown), error


def test_rank_0_may_be_the_silent_one_and_its_neighbour_knows_its_host(tmp_path: Path) -> None:
    """All are on one host, as far as the launcher says: rank 1 says on which. It is told by rank 2, which gives up."""
    error = errors(with_one_silent(tmp_path, 0, "never", 8, timeouts={"1": 100}))
    assert error.startswith("rank 0 on node1 does not answer within 8 s"), error


def test_the_launcher_knows_the_host(tmp_path: Path) -> None:
    error = errors(with_one_silent(tmp_path, 2, "never", 8, hosts=["node1", "node1", "worker-9"]))
    assert error.startswith("rank 2 on worker-9 does not answer"), error


def test_a_rank_that_comes_too_late_is_told_the_same(tmp_path: Path) -> None:
    assert errors(with_one_silent(tmp_path, 2, "late", 8)).startswith("rank 2 on node1 does not answer within 8 s")


def test_a_rank_that_dies_in_between_has_said_where_it_was(tmp_path: Path) -> None:
    assert errors(with_one_silent(tmp_path, 2, "dies", 20)).startswith("rank 2 on node2 does not answer")


def test_before_a_process_group_nobody_waits_for_half_an_hour(tmp_path: Path) -> None:
    error = errors(with_one_silent(tmp_path, 1, "absent", 30, group=False))
    assert error.startswith("rank 1 on node1 does not answer within 30 s"), error


def test_without_rank_0_there_is_nowhere_to_meet(tmp_path: Path) -> None:
    for rank, each in enumerate(with_one_silent(tmp_path, 0, "absent", 10, group=False), start=1):
        where = r"127.0.0.1, port \d+, where rank 0 is to be met, cannot be reached from "
        assert re.match(rf"{where}\S+ \(rank {rank}\) within 10 s \(.*refused\). Look ", each["error"]), each["error"]


def test_under_torchrun_rank_0_is_a_rank_like_others(tmp_path: Path) -> None:
    """It keeps the store: nothing has to listen where rank 0 runs."""
    arguments = {"silent": 0, "how": "late", "timeout": 10, "group": False}
    port = free_port()
    words = ["-m", "torch.distributed.run", "--nproc_per_node", RANKS, "--master_port", port, WORKER]
    with started(words, 1, tmp_path, arguments) as ((process,), (log,)):
        assert process.wait(240) == 0, log.read_text()
    results = [json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in range(RANKS)]
    assert re.match(r"rank 0 on \S+ does not answer within 10 s", errors(results))


# ---- launch/pretrain.py ----------------------------------------------------------------------------------------------


def pretrain(folder: Path, facts: dict[str, Any], engine: str) -> list[tuple[int, str]]:
    """The exit status of each rank, and what it said."""
    for part in ("train", "validation"):
        np.save(folder / f"{part}.npy", np.arange(20000, dtype=np.uint16).astype(np.uint8))
    words = ["--data", str(folder), "--out", str(folder / "out"), "--engine", engine]
    words += ["--size", "tiny", "--eval-windows", "32", "--steps", "2"]
    with started([WORKER], 2, folder, {"pretrain": {"facts": facts, "words": words}}) as (processes, logs):
        return [(process.wait(240), log.read_text()) for process, log in zip(processes, logs, strict=True)]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_pretraining_looks_first(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    for rank, (status, text) in enumerate(pretrain(tmp_path, {}, engine)):
        assert status == 0, text
        assert text.count("preflight: 2 ranks on 1 host with amos_dist ") == (rank == 0), text
    assert (tmp_path / "out" / "results.json").exists()


def test_pretraining_refuses_another_version(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    facts = {"0": {"host": "node1"}, "1": {"host": "node2", "torch": "2.9.9"}}
    for rank, (status, text) in enumerate(pretrain(tmp_path, facts, "deepspeed")):
        last = text.strip().splitlines()[-1]
        said = f"rank {rank}: torch is {torch.__version__} on node1 (rank 0) and 2.9.9 on node2 (rank 1). Install "
        assert status == 1 and last.startswith(said) and "Traceback" not in text, text
