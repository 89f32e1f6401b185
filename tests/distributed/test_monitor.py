"""The monitor of a model that is cut over ranks says what that of the whole model says; and all ranks have one."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_cases

WORKER = Path(__file__).with_name("monitor_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95, "sigma": 0.3, "momentum": 0.9}
RULES = [
    {"match": "bias", "moments": "full"},
    {"match": "up|conv", "moments": "column"},
    {"match": "two", "moments": "row"},
]


def cases(folder: str) -> list[dict[str, Any]]:
    common = {"dtype": "fp32", "steps": 5, "params": PARAMS}
    found: list[dict[str, Any]] = []
    for stage in (1, 2, 3):
        found.append({**common, "name": f"zero {stage}", "way": "zero", "stage": stage, "groups": stage == 2})
    found[-1]["config"] = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    found += [{**common, "name": way, "way": way, "params": {**PARAMS, "rules": RULES}} for way in ("fsdp", "tp")]
    found.append({**common, "name": "rank 1 has none", "do": "differ", "every": [2, 0]})
    found.append({**common, "name": "other steps", "do": "differ", "every": [2, 3]})
    return [*found, {**common, "name": "late", "do": "late"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_cases(WORKER, 2, cases(str(folder)))


@pytest.mark.parametrize("name", ["zero 1", "zero 2", "zero 3", "fsdp", "tp"])
def test_cut_equals_whole(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        cut, whole = rank[name]["cut"], rank[name]["whole"]
        assert cut.pop("step") == whole.pop("step") == 4
        assert set(cut) == set(whole) and len(cut) > 10
        for parameter, values in whole.items():
            assert set(cut[parameter]) == set(values), parameter
            for key, value in values.items():
                assert math.isclose(cut[parameter][key], value, rel_tol=2e-4, abs_tol=1e-12), (parameter, key)


@pytest.mark.parametrize(("name", "mine", "theirs"), [
    ("rank 1 has none", "a monitor that looks every 2 steps", "no monitor"),
    ("other steps", "a monitor that looks every 2 steps", "a monitor that looks every 3 steps"),
])  # fmt: skip
def test_every_rank_hears_of_a_difference(ranks: list[dict[str, Any]], name: str, mine: str, theirs: str) -> None:
    assert f"rank 1 has {theirs} where this rank has {mine}" in ranks[0][name]["text"]
    assert f"rank 0 has {mine} where this rank has {theirs}" in ranks[1][name]["text"]


def test_too_late(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "agreed to step without a monitor every 50 steps" in rank["late"]["text"]


def test_deepspeed_writes_it(ranks: list[dict[str, Any]], folder: Path) -> None:
    rows = list(csv.reader((folder / "job" / "update_norm_total.csv").open()))
    assert [row[0] for row in rows] == ["step", "2", "4"]
    assert float(rows[2][1]) == ranks[0]["zero 3"]["cut"]["total"]["update_norm"]
