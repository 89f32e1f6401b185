"""A short run of long_run.py passes its checks, and one that is poisoned fails them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.harness import launch

SCRIPT = Path(__file__).with_name("long_run.py")


def test_a_short_run() -> None:
    # A young process still grows: only state and drift are tight here.
    options = ("--steps", 100, "--every", 20, "--grow", 64, "--ranks", 2)
    done = launch(SCRIPT, *options, ranks=1, folder=SCRIPT.parents[2], limit=280)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 100 and not found["faults"]
    assert found["loss"][1] < found["loss"][0] and found["decay"] > 0
    assert found["replicas"] > 20 and found["early"]["state"] == found["late"]["state"]


def test_a_poisoned_run_fails() -> None:
    options = ("--steps", 20, "--every", 5, "--grow", 64, "--ranks", 2, "--poison", 12)
    done = launch(SCRIPT, *options, ranks=1, folder=SCRIPT.parents[2], limit=280)
    assert done.returncode == 1
    assert "is not finite" in done.stdout
