"""The numbers of `python -m amos_dist plan`, for every rank, against what real ranks under DeepSpeed hold and send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amos_dist.models import Parameter
from amos_dist.scaling.forecast import Model, Setting, forecast, forecast_of_rank
from tests.distributed.harness import run_cases
from tests.distributed.model import Model as Trained

WORKER = Path(__file__).with_name("scaling_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95, "sigma": 0.3}
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
        yield case("bf16 momentum", stage, "bf16", "row", params={"momentum": 0.9, "momentum_dtype": "bfloat16"})
        yield case("two groups", stage, groups=True)
        yield case("AdamW", stage, type="AdamW", params={"torch_adam": True})
    for size in (20, 50):
        yield case(f"sub-groups of {size}", 3, groups=size == 50, zero={"sub_group_size": size})


CASES = list(cases())
ADAM = [wanted for wanted in CASES if "type" in wanted]
for wanted in ADAM:
    wanted["params"] = {"lr": 0.02, "torch_adam": True}
AMOS = [wanted for wanted in CASES if "type" not in wanted]


def found(ranks: int, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    return [rank[wanted["name"]] for rank in run_cases(WORKER, ranks, CASES, timeout=500)]


def planned(ranks: int, wanted: dict[str, Any]) -> tuple[Model, Setting]:
    params = wanted["params"]
    named = [Parameter(n, tuple(p.shape)) for n, p in Trained().named_parameters() if p.requires_grad]
    groups = [[p for p in named if len(p.shape) >= 2], [p for p in named if len(p.shape) < 2]]
    momentum = getattr(torch, params.get("momentum_dtype", "float32")) if "momentum" in params else None
    size = wanted.get("zero", {}).get("sub_group_size", 10**9)
    setting = Setting(wanted["stage"], ranks, momentum, DTYPES[wanted["dtype"]], size)
    return Model(groups if wanted.get("groups") else [named], params.get("moments", "factored")), setting


def parametrized(some: list[dict[str, Any]]) -> pytest.MarkDecorator:
    ids = [(ranks, wanted) for ranks in (2, 3, 4) for wanted in some]
    return pytest.mark.parametrize(
        ("ranks", "wanted"), [pytest.param(*each, id=f"{each[0]}, {each[1]['name']}") for each in ids]
    )


@pytest.mark.timeout(550)
@parametrized(AMOS)
def test_every_rank_holds_and_sends_what_was_planned(ranks: int, wanted: dict[str, Any]) -> None:
    model, setting = planned(ranks, wanted)
    flats, whole = model.partitions(setting), forecast(model, setting)
    total, largest = 0, 0
    for rank, got in enumerate(found(ranks, wanted)):
        plan = forecast_of_rank(model, setting, rank)
        assert got["state"] == {key: size for key, size in plan.state.items() if size}
        assert got["elements"] == [flat.numel for flat in flats]
        assert got["pieces"] == [[[p.key, p.start, p.length, p.offset] for p in flat.pieces(rank)] for flat in flats]
        cuts = [
            [
                [key, s.rows, s.cols, list(s.borders)]
                for key, s in zip(flat.keys, flat.spreads, strict=True)
                if s.borders
            ]
            for flat in flats
        ]
        assert got["cuts"] == cuts
        assert got["cut_rows"] == got["sent_rows"] == whole.cut_rows
        # Each step: one call for each partition, at most one all-reduce in each.
        each = [4 * sum(flat.numbers()) for flat in flats]
        assert got["calls"] == 2 * [[size] if size else [] for size in each]
        assert [size for size in each if size] == whole.all_reduces
        assert got["workspace"] == plan.workspace
        total += sum(got["state"].values())
        largest = max(largest, sum(got["state"].values()))
    assert whole.state_of_all == total
    assert whole.most.state_bytes == largest
    assert whole.cut_rows + whole.columns == sum(whole.all_reduces) // 4


@pytest.mark.timeout(550)
@parametrized(ADAM)
def test_adam(ranks: int, wanted: dict[str, Any]) -> None:
    whole = forecast(*planned(ranks, wanted))
    for got in found(ranks, wanted):
        assert sum(got["state"].values()) == whole.adam
        assert not any(got["calls"])
