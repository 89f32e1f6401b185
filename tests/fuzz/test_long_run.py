"""A short run of long_run.py: all its checks pass, until a gradient is poisoned."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.harness import launch

SCRIPT = Path(__file__).with_name("long_run.py")


def test_a_short_run_and_a_poisoned_end() -> None:
    # A young process still grows: only state and drift are tight here.
    options = ("--steps", 100, "--every", 20, "--tell", 20, "--grow", 64, "--ranks", 2, "--poison", 90)
    done = launch(SCRIPT, *options, ranks=1, folder=SCRIPT.parents[2], limit=280)
    assert done.returncode == 1, done.stdout[-3000:]
    *told, found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found["steps"] == 100 and found["faults"]
    # At step 80 all was well.
    assert all("step 100" in fault for fault in found["faults"]), found["faults"]
    assert any("is not finite" in fault for fault in found["faults"])
    assert [each["step"] for each in told] == [20, 40, 60, 80, 100]
    assert told[3]["loss"] < found["loss"][0] and len({each["state"] for each in told}) == 1
    assert found["replicas"] > 20 and found["early"]["state"] == found["late"]["state"]
