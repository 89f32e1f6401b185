"""What `python -m amos_dist memory` computes for each rank, against what real ranks under DeepSpeed and DDP hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amos_dist.memory import report
from amos_dist.memory.estimates import AMOS, Setting, estimate
from amos_dist.models import gpt2
from tests.distributed.harness import run_cases

WORKER = Path(__file__).with_name("memory_worker.py")
LITTLE = {"prefetch_bucket_size": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
SIZES = {"layers": 2, "width": 128, "words": 4000, "positions": 64}
EXACT = ("parameters", "gradients", "master", "state")


def cases() -> Iterator[dict[str, Any]]:
    def case(zero: int, optimizer: str, dtype: str = "bfloat16", **setting: Any) -> dict[str, Any]:
        setting = {"reduce_bucket_size": 60_000, **setting}
        name = f"{zero} {optimizer} {dtype} {' '.join(f'{k}={v}' for k, v in setting.items())}"
        return {"name": name, "zero": zero, "optimizer": optimizer, "dtype": dtype, "setting": setting, "sizes": SIZES}

    for zero in (0, 1, 2, 3):
        yield case(zero, "amos")
        yield case(zero, "adamw", "float32")
    yield case(2, "amos-momentum-bf16", "float32", overlap_comm=True)
    yield case(3, "amos-momentum-int8")
    yield case(3, "adafactor", sub_group_size=100_000, param_persistence_threshold=200)
    # What a pass holds: buckets for all and for next to nothing, gathered far ahead and not at all.
    for bucket in (1_000, 5_000_000):
        yield case(1, "adamw", reduce_bucket_size=bucket)
        yield case(1, "adamw", reduce_bucket_size=bucket, overlap_comm=True)
        yield case(2, "adamw", reduce_bucket_size=bucket)
        yield case(3, "adamw", reduce_bucket_size=bucket, param_persistence_threshold=20_000, **LITTLE)
        yield case(3, "adamw", reduce_bucket_size=bucket, max_live_parameters=300_000, prefetch_bucket_size=10**6)


CASES = list(cases())


@pytest.mark.timeout(550)
@pytest.mark.parametrize("wanted", CASES, ids=lambda case: case["name"])
def test_ranks_hold_what_was_computed(wanted: dict[str, Any]) -> None:
    """To the byte what stays; within 2 % (or 20 KB of tables) what comes and goes."""
    named, dtype = list(gpt2(**SIZES)), getattr(torch, wanted["dtype"])
    setting = Setting(wanted["zero"], 2, dtype, device="cpu", **wanted["setting"])
    for rank, ranks in enumerate(run_cases(WORKER, 2, CASES, timeout=500)):
        found = ranks[wanted["name"]]
        computed = estimate(named, wanted["optimizer"], setting, rank=rank)
        pairs = report.pairs(computed, found)
        for row in EXACT:
            assert pairs[row][0] == pairs[row][1], row
        assert {key: size for key, size in computed.state.items() if size} == found["state"]
        assert pairs["all-reduce buffer"][1] == pytest.approx(computed.workspace, rel=0.02)
        assert pairs["held between steps"][1] == pytest.approx(computed.held, rel=0.02, abs=20_000)
        assert pairs["step adds"][1] == pytest.approx(computed.step, rel=0.02, abs=20_000)
        above = pairs["most in a pass"][1] - pairs["held between steps"][1]
        assert above == pytest.approx(computed.backward - computed.held, rel=0.01, abs=20_000)
        if wanted["zero"] == 0 and wanted["optimizer"] in AMOS:
            assert pairs["step adds"][1] < 10**6
