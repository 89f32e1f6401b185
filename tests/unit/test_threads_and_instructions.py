"""The same bits, whatever the number of threads and the instruction set, and in every run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from amos_dist import build_info

from .hashes import measure

ROOT = Path(__file__).parents[2]
ORDER = ["baseline", "avx2", "avx512"]


def hashes(isa: str) -> dict[str, Any]:
    # Threads that wait must not spin: there may be more of them than cores.
    environment = {**os.environ, "AMOS_ISA": isa, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.hashes"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def by_isa() -> dict[str, dict[str, Any]]:
    """The set that this process has, and, each in a process of its own, the narrower ones."""
    here, threads = build_info()["cpu_instruction_set"], torch.get_num_threads()
    try:
        own = measure()
    finally:
        torch.set_num_threads(threads)
    narrower = ORDER[: ORDER.index(here)]
    with ThreadPoolExecutor(2) as pool:  # side by side, since each waits a while for torch
        return {**dict(zip(narrower, pool.map(hashes, narrower), strict=True)), here: own}


def test_threads(by_isa: dict[str, dict[str, Any]]) -> None:
    for isa, result in by_isa.items():
        for variant, values in result["hashes"].items():
            assert len(set(values)) == 1, f"{isa}, {variant}: 1, 2 and 3 threads gave {values}"


def test_instruction_sets(by_isa: dict[str, dict[str, Any]]) -> None:
    if len(by_isa) == 1:
        pytest.skip("this CPU has one instruction set only")
    for isa, result in by_isa.items():
        assert result["isa"] == isa
        assert result["hashes"] == by_isa["baseline"]["hashes"], f"{isa} differs from baseline"
