"""What was trained under ZeRO goes on under FSDP2, and the other way round, on 2 real ranks, as if nothing had been.

All cases are saved in one run of convert_worker.py, converted here, and loaded in another: starting takes longest.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from amos_dist import Amos
from amos_dist.convert import convert
from tests.distributed.harness import ROOT, run_ranks
from tests.distributed.model import batch
from tests.unit.test_convert import load, same

WORKER = Path(__file__).with_name("convert_worker.py")
LIMIT = pytest.mark.timeout(300)
TOLERANCE = 1e-6  # fp32: max-norm, relative, after 10 more steps
PARAMS = {"lr": 0.02, "beta": 0.95}
KEYS = ("app.model", "app.optim")  # where the FSDP2 script has them
RULES = [{"match": "embed", "moments": "row", "momentum": 0.9}, {"match": "conv", "row_dims": 2, "sigma": 0.2}]
CASES: list[dict[str, Any]] = [
    {"name": "zero 1", "stage": 1, "params": {**PARAMS, "momentum": 0.9}, "groups": True},
    {"name": "zero 2", "stage": 2, "params": {**PARAMS, "moments": "row", "rules": RULES}},
    {"name": "zero 3", "stage": 3, "params": {**PARAMS, "moments": "column", "momentum": 0.9}, "groups": True,
     "zero": {"sub_group_size": 50}},
    {"name": "zero 2, scalar", "stage": 2, "params": {**PARAMS, "moments": "scalar"}, "flatten": True},
    {"name": "zero 2, bf16", "stage": 2, "params": {**PARAMS, "momentum": 0.9, "momentum_dtype": "bfloat16"},
     "dtype": "bf16"},
    {"name": "zero 3, bf16", "stage": 3, "params": PARAMS, "dtype": "bf16"},
    {"name": "fsdp", "params": {**PARAMS, "momentum": 0.9}, "groups": True},
    {"name": "fsdp, row", "params": {**PARAMS, "moments": "row", "rules": RULES}, "flatten": True},
    {"name": "fsdp, column", "params": {**PARAMS, "moments": "column", "sigma": 0.3}},
    {"name": "fsdp, scalar", "params": {**PARAMS, "moments": "scalar", "momentum": 0.9}},
]  # fmt: skip
LOADED = dict(zip((case["name"] for case in CASES), (3, 1, 2, 2, 3, 2, 2, 2, 3, 1), strict=True))  # at which stage
FROM_ZERO = [case for case in CASES if case["name"].startswith("zero")]
FROM_FSDP = [case for case in CASES if case["name"].startswith("fsdp")]
WHOLE = [case for case in CASES if "dtype" not in case]  # float32


def folder(root: Path, case: dict[str, Any]) -> Path:
    return root / case["name"].replace(" ", "_").replace(",", "")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains and saves all cases, and converts what they have saved: "dcp" and "zero" by way of a plain file."""
    root = tmp_path_factory.mktemp("saved")
    runs = [{**case, "do": f"{case['name'][:4]} save", "folder": str(folder(root, case))} for case in CASES]
    for run in runs:
        Path(run["folder"]).mkdir()
    run_ranks(WORKER, 2, runs, timeout=100)
    for case in CASES:
        here, flatten = folder(root, case), case.get("flatten", False)
        convert(here / "saved", here / "plain.pt", "plain")
        convert(here / "plain.pt", here / "zero", "zero")
        convert(
            here / ("saved" if case in FROM_ZERO else "plain.pt"), here / "dcp", "dcp", write_as=KEYS, flatten=flatten
        )
    return root


@pytest.fixture(scope="module")
def loaded(saved: Path) -> dict[str, Any]:
    """By the case and what has loaded it."""
    runs = [{**case, "do": "fsdp load", "from": "dcp"} for case in WHOLE]
    runs += [{**case, "do": "zero load", "from": "zero", "stage": LOADED[case["name"]]} for case in CASES]
    results = run_ranks(WORKER, 2, [{**run, "folder": str(folder(saved, run))} for run in runs], timeout=100)
    return {f"{run['name']}: {run['do']}": [rank[i] for rank in results] for i, run in enumerate(runs)}


def cases(table: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", table, ids=lambda case: case["name"])


def alone(case: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The state after the same training in one process."""
    from tests.distributed.zero_worker import grouped, make_model

    model = make_model(torch.float32)
    optimizer = Amos(grouped(model, case.get("groups", False)), **case["params"])
    for step in range(5):
        model(batch(step, 24)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p.requires_grad}


@LIMIT
@cases(CASES)
def test_weights_are_those_of_the_ranks(saved: Path, case: dict[str, Any]) -> None:
    model, before = (
        load(folder(saved, case) / "plain.pt")["model"],
        torch.load(folder(saved, case) / "expected.pt")["before"],
    )
    assert set(model) == {*before, "seen"} and model["seen"].dtype == torch.int64
    for name, expected in before.items():
        low = "dtype" in case and name != "frozen.weight"
        assert model[name].dtype == (torch.bfloat16 if "dtype" in case and not low else torch.float32)
        got = model[name].bfloat16().float() if low else model[name].float()  # of float32 masters
        assert torch.equal(got, expected), name


@LIMIT
@cases(WHOLE)
def test_state_is_that_of_one_process(saved: Path, case: dict[str, Any]) -> None:
    state, expected = load(folder(saved, case) / "plain.pt")["optimizer"]["state"], alone(case)
    assert set(state) == set(expected)
    for name, values in expected.items():
        more = {"momentum"} if case in FROM_ZERO and "rules" in case["params"] else set()  # a partition's is for all
        assert set(state[name]) - more == set(values) - more and set(values) <= set(state[name]), name
        for key, value in values.items():
            got = state[name][key]
            if key == "step" and case in FROM_ZERO:
                assert got == 5  # ZeRO counts a partition's steps, also for what has no gradient
                continue
            assert (got.shape, got.dtype) == (value.shape, value.dtype), (name, key)
            assert float((got - value).abs().max()) <= 2e-6 * float(value.abs().max().clamp(min=1e-3)), (name, key)


@LIMIT
@cases(CASES)
def test_round_trips_are_exact(saved: Path, case: dict[str, Any]) -> None:
    here = folder(saved, case)
    plain = load(here / "plain.pt")
    for kind in ("dcp", "zero"):
        convert(here / kind, here / f"{kind}.pt", "plain")
        again = load(here / f"{kind}.pt")
        assert again["epoch"] == plain["epoch"] == 3
        same(again["model"], plain["model"])
        same(again["optimizer"], plain["optimizer"])


@LIMIT
@cases(WHOLE)
def test_fsdp_goes_on(loaded: dict[str, Any], case: dict[str, Any]) -> None:
    for got in loaded[f"{case['name']}: fsdp load"]:
        assert got["different"] == []
        assert got["moved"] > 0.01
        assert got["worst"] <= TOLERANCE, got["where"]


@LIMIT
@cases(CASES)
def test_zero_goes_on(loaded: dict[str, Any], case: dict[str, Any]) -> None:
    for got in loaded[f"{case['name']}: zero load"]:
        assert got["different"] == []
        assert got["moved"] > 0.01
        assert got["worst"] <= TOLERANCE, got["where"]


@LIMIT
def test_command_and_what_is_missing(saved: Path) -> None:
    source = folder(saved, CASES[1]) / "saved"
    with tempfile.TemporaryDirectory() as other:
        target = Path(other, "plain.pt")
        command = [sys.executable, "-m", "amos_dist", "convert", source, target, "--to", "plain", "--tag", "five"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        same(load(target)["optimizer"], load(folder(saved, CASES[1]) / "plain.pt")["optimizer"])
        damaged = Path(other, "damaged")
        shutil.copytree(source, damaged)
        next(damaged.glob("five/*rank_1_*optim_states.pt")).unlink()
        with pytest.raises(ValueError, match=r"damaged/five cannot be read: DeepSpeed says .*\. Give a checkpoint"):
            convert(damaged, target, "plain", force=True)
        with pytest.raises(ValueError, match=r"--tag six: .* has no such checkpoint. It has five: give"):
            convert(source, target, "plain", tag="six", force=True)
        same(load(target)["optimizer"], load(folder(saved, CASES[1]) / "plain.pt")["optimizer"])
