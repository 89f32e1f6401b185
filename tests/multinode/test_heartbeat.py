"""A rank that lives on, but says nothing: the others end, and name it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.distributed.harness import started

WORKER = Path(__file__).with_name("heartbeat_worker.py")
NAMED = "does not answer any more, so that this run cannot go on."


def start(
    folder: Path, ranks: int, *, waits: bool, stops: bool = True, leaves: bool = False, limit: float = 120
) -> list[tuple[int, str]]:
    """The status and the output of the ranks that are not stopped."""
    case = {"waits": waits, "stops": stops, "leaves": leaves}
    with started([WORKER], ranks, folder, case) as (processes, logs):
        end = time.monotonic() + limit
        ended = [process.wait(max(0.0, end - time.monotonic())) for process in processes[: ranks - stops]]
    return [(status, log.read_text()) for status, log in zip(ended, logs, strict=False)]


@pytest.mark.parametrize("waits", [True, False], ids=["in a collective", "elsewhere"])
def test_a_rank_that_is_stopped_is_named(waits: bool, tmp_path: Path) -> None:
    for status, text in start(tmp_path, 3, waits=waits):
        assert status == 1, text
        assert f"rank 2 {NAMED}" in text.splitlines()[-1], text


def test_a_rank_that_is_late_is_waited_for(tmp_path: Path) -> None:
    """It works for longer than the patience, and answers all the time."""
    assert [status for status, _ in start(tmp_path, 2, waits=False, stops=False)] == [0, 0]


def test_a_rank_that_works_on_when_the_first_has_ended(tmp_path: Path) -> None:
    assert [status for status, _ in start(tmp_path, 2, waits=False, stops=False, leaves=True)] == [0, 0]
