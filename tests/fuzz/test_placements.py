"""Random placements on 2 and 3 real ranks (gloo), thousands of them under "long", each number of ranks in one run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks

from .profiles import LONG

WORKER = Path(__file__).with_name("placements_worker.py")
CASES = 3000 if LONG else 40


@pytest.mark.timeout(3000 if LONG else 300)
@pytest.mark.parametrize("ranks", [2, 3])
def test_placements(ranks: int) -> None:
    results = run_ranks(WORKER, ranks, {"seed": ranks, "cases": CASES}, timeout=2900 if LONG else 280)
    assert not (wrong := [each for result in results for each in result["wrong"]]), "\n".join(wrong)
    assert all(sum(result["done"].values()) == CASES and len(result["done"]) == 3 for result in results)
