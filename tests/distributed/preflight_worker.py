"""Real ranks compare themselves, some of them changed; each reports what it was told.

"cases": one after another, {"facts": {rank: what it claims}, "clock": {rank: seconds ahead}, "group": whether a process
group is made before}. "silent": the rank that "never" calls, "late", or "dies" when it has said what it has.
"pretrain": launch/pretrain.py instead.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from amos_dist import preflight, versions
from tests.distributed.harness import ROOT, received, report

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
facts, clock, sign = versions.facts, time.time, preflight._Meeting._sign


def disguise(case: dict[str, Any]) -> None:
    claims, ahead = case.get("facts", {}).get(str(RANK), {}), case.get("clock", {}).get(str(RANK), 0.0)
    versions.facts = lambda: {**facts(), **claims}
    preflight.time = types.SimpleNamespace(time=lambda: clock() + ahead, monotonic=time.monotonic, sleep=time.sleep)  # type: ignore[assignment]


def told(case: dict[str, Any]) -> dict[str, Any]:
    """What `check` says to this rank, and in how many seconds."""
    result: dict[str, Any] = {"error": ""}
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            seen = preflight.check(
                case.get("timeouts", {}).get(str(RANK), case.get("timeout", 60)), case.get("hosts", ())
            )
            result |= {"table": str(seen), "summary": seen.summary}
        except RuntimeError as error:
            result["error"] = str(error)
    result |= {"warnings": [str(each.message) for each in caught if each.category is UserWarning]}
    return {**result, "seconds": time.monotonic() - begun}


def sign_and_die(self: Any, word: str, *more: Any, **keywords: Any) -> bool:
    if word == "clock":
        os._exit(9)
    return sign(self, word, *more, **keywords)


def with_one_silent(case: dict[str, Any]) -> None:
    disguise(case)
    if case.get("group", True):
        dist.init_process_group("gloo")
    if case["silent"] == RANK:
        if case["how"] == "never":
            time.sleep(1000)
        if case["how"] == "dies":
            preflight._Meeting._sign = sign_and_die  # type: ignore[method-assign]
        if case["how"] == "late":
            time.sleep(case["timeout"] + 3)
    report(told(case))
    folder, others = Path(os.environ["AMOS_TEST_FOLDER"]), RANKS - (case["how"] != "late")
    while RANK == 0 and len(list(folder.glob("result*.json"))) < others:  # the store ends with it
        time.sleep(0.1)
    os._exit(0)


def pretrain(case: dict[str, Any]) -> None:
    disguise(case)
    script = ROOT / "launch" / "pretrain.py"
    sys.argv, sys.path[0] = [str(script), *case["words"]], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    case = received()
    if "pretrain" in case:
        return pretrain(case["pretrain"])
    if "silent" in case:
        return with_one_silent(case)
    results = {}
    for each in case["cases"]:
        if each.get("group") and not dist.is_initialized():
            dist.init_process_group("gloo")
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == RANKS
        disguise(each)
        results[each["name"]] = told(each)
    report(json.loads(json.dumps(results)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
