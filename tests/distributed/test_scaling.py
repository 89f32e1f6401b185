"""The numbers of `python -m amos_dist plan`, for every rank, against what real ranks under DeepSpeed hold and send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amos_dist.models import Parameter
from amos_dist.scaling.forecast import Model, Setting, forecast, forecast_of_rank
from amos_dist.sharding import Cut, Piece
from tests.distributed.harness import run_cases
from tests.distributed.model import Model as Trained

WORKER = Path(__file__).with_name("scaling_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95, "sigma": 0.3}
SAME = {"all_to_all": "holders"}  # as zero_worker.Counter names them, and Wave.moves
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def case(name: str, stage: int, dtype: str = "fp32", moments: str = "factored", **more: Any) -> dict[str, Any]:
    params = {**PARAMS, "moments": moments, **more.pop("params", {})}
    return {"name": f"stage {stage} {dtype} {name}", "stage": stage, "dtype": dtype, "params": params, **more}


def cases() -> Iterator[dict[str, Any]]:
    for stage in (1, 2, 3):
        for kind in ("factored", "column"):
            yield case(kind, stage, moments=kind)
    for kind in ("row", "full", "scalar"):
        yield case(kind, 2, moments=kind)
        yield case(kind, 3, moments=kind)
    for stage in (2, 3):
        yield case("momentum", stage, params={"momentum": 0.9})
        low = {"bf16": "bfloat16"} | ({"8-bit": "int8"} if stage == 3 else {})
        for name, dtype in low.items():
            yield case(f"{name} momentum", stage, "bf16", "row", params={"momentum": 0.9, "momentum_dtype": dtype})
        yield case("two groups", stage, groups=True)
        yield case("AdamW", stage, type="AdamW", params={"torch_adam": True})
    for size in (20, 50):
        yield case(f"sub-groups of {size}", 3, groups=size == 50, zero={"sub_group_size": size})


CASES = list(cases())
# All of them on 2 ranks; on more those whose arithmetic depends on how many there are.
FEWER = {
    3: ("stage 2 fp32 factored", "stage 3 fp32 factored", "stage 3 fp32 column", "stage 3 fp32 sub-groups of 20"),
    4: ("stage 1 fp32 factored", "stage 3 fp32 factored", "stage 3 fp32 row", "stage 3 fp32 two groups"),
}
ADAM = [wanted for wanted in CASES if "type" in wanted]
for wanted in ADAM:
    wanted["params"] = {"lr": 0.02, "torch_adam": True}
BY_RANKS = {2: CASES} | {n: [wanted for wanted in CASES if wanted["name"] in some] for n, some in FEWER.items()}


def found(ranks: int, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    return [rank[wanted["name"]] for rank in run_cases(WORKER, ranks, BY_RANKS[ranks], timeout=500)]


def planned(ranks: int, wanted: dict[str, Any]) -> tuple[Model, Setting]:
    params = wanted["params"]
    named = [Parameter(n, tuple(p.shape)) for n, p in Trained().named_parameters() if p.requires_grad]
    groups = [[p for p in named if len(p.shape) >= 2], [p for p in named if len(p.shape) < 2]]
    momentum = getattr(torch, params.get("momentum_dtype", "float32")) if "momentum" in params else None
    size = wanted.get("zero", {}).get("sub_group_size", 10**9)
    setting = Setting(wanted["stage"], ranks, momentum, DTYPES[wanted["dtype"]], size)
    return Model(groups if wanted.get("groups") else [named], params.get("moments", "factored")), setting


def parametrized(adam: bool) -> pytest.MarkDecorator:
    ids = [(ranks, wanted) for ranks, some in BY_RANKS.items() for wanted in some if (wanted in ADAM) == adam]
    return pytest.mark.parametrize(
        ("ranks", "wanted"), [pytest.param(*each, id=f"{each[0]}, {each[1]['name']}") for each in ids]
    )


def told_of(cut: Cut) -> list[Any]:
    return [cut.key, cut.rows, cut.cols, list(cut.borders), cut.first, cut.everybody]


def told(piece: Piece) -> list[Any]:
    share = None if piece.share is None else [piece.share.start, piece.share.stop]
    return [piece.key, piece.start, piece.length, piece.offset, share]


@pytest.mark.timeout(550)
@parametrized(adam=False)
def test_every_rank_holds_and_sends_what_was_planned(ranks: int, wanted: dict[str, Any]) -> None:
    model, setting = planned(ranks, wanted)
    flats, whole = model.partitions(setting), forecast(model, setting)
    total, largest = 0, 0
    for rank, got in enumerate(found(ranks, wanted)):
        plan = forecast_of_rank(model, setting, rank)
        assert got["state"] == {key: size for key, size in plan.state.items() if size}
        assert got["elements"] == [flat.numel for flat in flats]
        assert got["pieces"] == [[told(piece) for piece in flat.pieces(rank)] for flat in flats]
        cuts = [[told_of(cut) for cut in flat.layout(rank, ranks).cuts] for flat in flats]
        assert got["cuts"] == cuts
        assert got["cut_rows"] == whole.cut_rows
        assert got["sent_rows"] == plan.shared_rows
        # Each step: one call for each partition. Results come back after all sums.
        calls = [[(SAME.get(kind, kind), size) for kind, size in some] for some in got["calls"]]
        assert [sorted(some) for some in calls] == 2 * [sorted(some) for some in plan.collectives]
        assert got["workspace"] == plan.workspace
        total += sum(got["state"].values())
        largest = max(largest, sum(got["state"].values()))
    assert whole.state_of_all == total
    assert whole.most.state_bytes == largest


@pytest.mark.timeout(550)
@parametrized(adam=True)
def test_adam(ranks: int, wanted: dict[str, Any]) -> None:
    whole = forecast(*planned(ranks, wanted))
    for got in found(ranks, wanted):
        assert sum(got["state"].values()) == whole.adam
        assert not any(got["calls"])
