"""DDP, alone and with ZeroRedundancyOptimizer, on 2 and 3 real ranks, against one process; what FSDP1 flattens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

WORKER = Path(__file__).with_name("ddp_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95}
TOLERANCE = 1e-6  # fp32: max-norm, relative, after 20 steps


def case(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "zero": True, "steps": 20, "params": PARAMS, **more}


KINDS: dict[str, dict[str, Any]] = {
    "factored, momentum": {"params": {**PARAMS, "sigma": 0.3, "momentum": 0.9}},
    "row": {"params": {**PARAMS, "sigma": 0.3, "moments": "row"}},
    "auto": {},
    "auto by groups": {"groups": "auto"},
    "paper": {"groups": "paper"},
}
TRAINING = [
    case(f"{'redundancy' if zero else 'ddp'}: {name}", zero=zero, **more)
    for zero in (False, True)
    for name, more in KINDS.items()
]
OTHER = [
    case("consolidated", do="consolidated", **KINDS["factored, momentum"]),
    case("measured", do="measured"),
    case("flattened", do="flattened"),
]


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """By rank, then by the name of the case. One run for each number of ranks, since starting them takes longest."""
    return [{each["name"]: each for each in rank} for rank in run_ranks(WORKER, request.param, [*TRAINING, *OTHER])]


@pytest.mark.parametrize("wanted", TRAINING, ids=lambda each: each["name"])
def test_equals_one_process(results: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    found = [rank[wanted["name"]] for rank in results]
    for got in found:
        assert got["moved"] > 0.01  # it did train
        assert got["worst"] <= TOLERANCE, got["where"]
    held = [name for got in found for name in got["held"]]
    if wanted["zero"]:  # each parameter's state is on one rank
        assert sorted(held) == sorted(found[0]["trained"])
        assert all(got["held"] for got in found)
    else:
        assert sorted(held) == sorted(found[0]["trained"] * len(results))


def test_consolidated_state_is_that_of_one_process(results: list[dict[str, Any]]) -> None:
    for rank in results:
        got = rank["consolidated"]
        assert got["keys"] == []
        assert got["state"]["worst"] <= 2 * TOLERANCE, got["state"]["where"]
        assert got["worst"] <= TOLERANCE, got["where"]
        assert got["again"]["worst"] == 0.0, got["again"]["where"]


def test_sigmas_of_another_rank_are_refused(results: list[dict[str, Any]]) -> None:
    """ZeroRedundancyOptimizer loads the first rank's groups everywhere, with what that rank has measured."""
    first, *others = (rank["measured"]["text"] for rank in results)
    assert first == ""
    for text in others:
        assert "ZeroRedundancyOptimizer" in text and "amos_dist.param_groups" in text


def test_fsdp1_is_refused_and_fully_shard_named(results: list[dict[str, Any]]) -> None:
    for rank in results:
        original, flat = rank["flattened"]["text"]
        assert "parameter '_fsdp_wrapped_module.weight' is flattened by FSDP1" in original
        assert "torch.distributed.fsdp.fully_shard" in original
        assert "torch.distributed.fsdp.fully_shard" in flat
