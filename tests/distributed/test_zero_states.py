"""The optimizer's state under DeepSpeed ZeRO on 2 real ranks: looked at, changed, moved, and of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_cases

WORKER = Path(__file__).with_name("zero_states_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95, "sigma": 0.3, "momentum": 0.9}
ACCUMULATING = {"dtype": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}


def case(do: str, stage: int, *words: str, **more: Any) -> dict[str, Any]:
    name = " ".join([do, f"stage {stage}", *words])
    return {"name": name, "do": do, "stage": stage, "dtype": "fp32", "params": PARAMS, **more}


MODELS = [
    *(case("model", stage, to, to=to) for stage in (0, 2, 3) for to in ("gained", "lost")),
    *(case("model", stage, "moved", to="moved") for stage in (1, 3)),
    *(case("model", 1, to, "fp32 accumulation", to=to, **ACCUMULATING) for to in ("gained", "moved")),
    *(case("model", stage, "renamed", to="renamed") for stage in (1, 3)),
    case("model", 3, "gained", "universal", to="gained", universal=True),  # at 1 and 2 only on ranks that hold it
    case("model", 1, "lost", "universal", to="lost", universal=True),
]
SENTENCES = {
    "gained": "the checkpoint has no state for parameter 'extra.weight'. Load it into the model",
    "lost": "the checkpoint has state for parameter 'unused.bias', which the optimizer does not have. Load it into",
    "moved": "parameter 'norm.bias' of shape (5,) is where the checkpoint has 'norm.weight' of shape (5,). Load",
}
LOW = {**PARAMS, "momentum_dtype": "bfloat16"}
LOOKS = [
    case("look", 1),
    case("look", 1, "fp32 accumulation", **ACCUMULATING),
    case("look", 2, "bf16", dtype="bf16", params=LOW),
    case("look", 3),
    case("look", 3, "bf16", dtype="bf16", params=LOW),
]
STATES = ["all replaced", "momentum replaced", "all moved", "float state moved", "rows moved", "columns moved"]
STATES += ["steps moved", "momentum moved", "partitions moved"]
OFFLOADS = ["offload_states", "offload_states, pinned"]
OFFLOADS += [f"offload_states of {what}" for what in ("optim_states", "hp_params", "lp_params")]
GRADIENTS = ["offload_states of gradients"]
CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
MOVES = [
    case("move", 1, how=OFFLOADS + GRADIENTS, dtype="bf16"),
    case("move", 2, how=STATES + OFFLOADS + GRADIENTS),
    case("move", 2, "offloaded", how=["offload_states"], zero=CPU),
    case("move", 3, how=STATES + OFFLOADS[:1] + GRADIENTS),
    case("move", 3, "offloaded", how=GRADIENTS, zero=CPU, dtype="bf16"),
]
SETS = [case("set", 1, dtype="bf16"), case("set", 2), case("set", 3)]
FOREIGN = case("set", 2, "foreign", foreign=True)
CASES = [*MODELS, *LOOKS, *MOVES, *SETS, FOREIGN]
SHAPES = {"step": [], "row_moment": [13, 1], "column_moment": [1, 6], "decay": [13, 1], "momentum": [13, 6]}


def results() -> list[dict[str, Any]]:
    return run_cases(WORKER, 2, CASES, timeout=420)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", MODELS, ids=lambda c: c["name"])
def test_another_model(wanted: dict[str, Any]) -> None:
    """Loaded on the same number of ranks, where DeepSpeed goes by the places in its partitions."""
    for rank in results():
        got = rank[wanted["name"]]
        if wanted.get("universal"):  # DeepSpeed looks each parameter up by name
            named = "FileNotFoundError" in got["text"] and "extra.weight" in got["text"]
            assert named if wanted["to"] == "gained" else not got["text"]
        elif wanted["to"] == "renamed":
            assert got == {**got, "text": "", "same": True}
        elif wanted["stage"] == 0:
            assert "parameters, the optimizer's has" in got["text"]
        elif wanted["stage"] == 2:  # DeepSpeed is first, and blames an option
            assert "The ZeRO checkpoint parameter-alignment layout does not match" in got["text"]
        else:
            assert SENTENCES[wanted["to"]] in got["text"]


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", LOOKS, ids=lambda c: c["name"])
def test_state_by_name(wanted: dict[str, Any]) -> None:
    first, second = (rank[wanted["name"]] for rank in results())
    assert first["shapes"] == SHAPES
    assert first["moved"] > 0
    for got in (first, second):
        assert got["momentum"] == got["optimizer"] == []
        # An error on every rank: never numbers that mean something else, never a wait for ever.
        assert all(got["others"])
        assert wanted["stage"] == 3 or got["others"] == ["ValueError"] * 8
        assert got["set"]
        assert got["weights"]
        assert got["gradient"][0] == [13, 6]
        assert got["gradient"] == first["gradient"]
        assert got["gradient"][1] > 0
        assert got["change"] > 0.5


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", MOVES, ids=lambda c: c["name"])
def test_state_that_is_moved(wanted: dict[str, Any]) -> None:
    for rank in results():
        for how, (refused, wrong) in rank[wanted["name"]]["moves"].items():
            assert wrong == [], how
            # DeepSpeed moves these at stage 3 for its own FusedAdam only.
            assert refused == ("AssertionError" if wanted["stage"] == 3 and how in OFFLOADS else ""), how


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", SETS, ids=lambda c: c["name"])
def test_weights_set_before_the_first_step(wanted: dict[str, Any]) -> None:
    first, second = (rank[wanted["name"]] for rank in results())
    for got in (first, second):
        assert got["text"] == ""
        assert got["changes"] == first["changes"]
        assert got["told"] == 1  # not of each parameter
        assert got["changes"]["inner.weight"] > 0
        assert max(got["changes"].values()) < 0.1


@pytest.mark.timeout(450)
def test_a_partition_of_another_layout_is_refused() -> None:
    assert [rank[FOREIGN["name"]] for rank in results()] == [{"name": FOREIGN["name"], "text": "RuntimeError"}] * 2
