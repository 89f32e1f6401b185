"""Accelerate's FSDP2 plugin on 2 real ranks: it shards a model whose optimizer is made, and swaps its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

pytest.importorskip("accelerate")

WORKER = Path(__file__).with_name("accelerate_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95, "momentum": 0.9}
TOLERANCE = 1e-6  # fp32: max-norm, relative, after 20 steps


def case(name: str, make: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "make": make, "params": PARAMS, "steps": 20, **more}


TRAINING = [
    *(case(f"{make}, before", make) for make in ("plain", "named", "auto", "paper")),
    *(case(f"{make}, {when}", make, when=when) for when in ("between", "after") for make in ("named", "paper")),
    case("row, clip", "named", clip=0.3, params={"lr": 0.02, "sigma": 0.3, "moments": "row"}),
    case("plain torch", "named", params={**PARAMS, "fused": False}),
    case("lean", "paper", lean=True),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, then by the name of the case. One run, since starting the ranks takes longest."""
    folder = str(tmp_path_factory.mktemp("state"))
    other = [
        case("resume", "auto", do="resume", folder=folder),
        case("late", "named", do="late"),
        case("empty", "auto", do="empty"),
    ]
    return [{each["name"]: each for each in rank} for rank in run_ranks(WORKER, 2, [*TRAINING, *other])]


@pytest.mark.parametrize("wanted", TRAINING, ids=lambda each: each["name"])
def test_equals_one_process(results: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for rank in results:
        got = rank[wanted["name"]]
        assert got["sharded"] == [True, True, True]
        assert got["moved"] > 0.01  # it did train
        assert got["worst"] <= TOLERANCE, got["where"]


def test_resume_from_save_state(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["resume"]["worst"] == 0.0, rank["resume"]["where"]


def test_sigma_of_weights_that_only_the_first_rank_has_is_refused(results: list[dict[str, Any]]) -> None:
    """On every rank: with cpu_ram_efficient_loading the others have empty weights until the model is prepared."""
    for rank in results:
        assert "sigma" in rank["empty"]["text"]


def test_sharding_after_a_step_is_refused(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert "was sharded after the optimizer had stepped" in rank["late"]["text"]
