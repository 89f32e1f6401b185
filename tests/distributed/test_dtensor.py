"""FSDP2, HSDP and tensor parallel on 1 to 4 real ranks, against one process.

Each number of ranks is one run of dtensor_worker.py over all its cases, since starting the ranks takes longest.
"""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_cases

WORKER = Path(__file__).with_name("dtensor_worker.py")
AUTO = {"lr": 0.02, "beta": 0.95}
PARAMS = {**AUTO, "sigma": 0.3}
KINDS = ("row", "column", "factored", "scalar", "full")
TOLERANCE = 1e-6  # fp32: max-norm, relative, after 20 steps
LOW = 2e-2  # bf16 parameters or gradients
EIGHT = {
    "params": {**PARAMS, "momentum": 0.9, "momentum_dtype": "int8"},
    "tolerance": 1e-2,
}  # what is cut has other runs


def case(way: str, name: str, **more: Any) -> dict[str, Any]:
    return {"name": f"{way}: {name}", "way": way, "steps": 20, "params": {**PARAMS, "momentum": 0.9}, **more}


def kinds(*ways: str) -> list[dict[str, Any]]:
    return [case(way, kind, params={**PARAMS, "moments": kind}) for way in ways for kind in KINDS]


def options(way: str) -> list[dict[str, Any]]:
    master = {**PARAMS, "master_weights": True}
    cases = [
        case(way, "momentum, accumulate, clip", accumulate=2, clip=None if "tp" in way else 0.3),
        case(way, "auto, decay_init", params={**AUTO, "decay_init": 40.0}, groups=True),
        case(way, "paper", params=AUTO, paper=True),
        case(way, "plain torch", params={**PARAMS, "fused": False}),
        case(way, "bf16", dtype="bf16", tolerance=LOW, steps=5),
        case(way, "bf16 with masters", dtype="bf16", params=master, tolerance=LOW, steps=5),
    ]
    if way != "tp":
        cases.append(case(way, "offload", offload=True, steps=5))
        cases.append(case(way, "mixed precision", mixed=True, tolerance=LOW, steps=5))
        cases.append(case(way, "compiled", compile=True, steps=5))
    started = {**PARAMS, "decay_init": 40.0}
    return [*cases, case(way, "meta device", meta=True, steps=5, params=started)] if way in ("fsdp", "hsdp") else cases


# Each parameter travels alone, or a few do together.
WAVES = {2: [case("fsdp", "in many waves", waves=99)], 4: [case("fsdp tp", "in few waves", waves=3)]}
TRAINING = {
    1: [case("fsdp", "factored")],
    2: [
        *kinds("fsdp", "tp"),
        *options("fsdp"),
        case("sp", "momentum", length=8),
        *(case(way, "8-bit momentum", **EIGHT) for way in ("fsdp", "tp")),
        *WAVES[2],
    ],
    3: [*kinds("fsdp")[2:], case("fsdp", "auto", params=AUTO, groups=True)],
    4: [
        *kinds("hsdp", "fsdp tp"),
        case("fsdp", "factored"),
        *options("fsdp tp")[:3],
        *options("hsdp")[-1:],
        case("fsdp sp", "momentum", length=8),
        *WAVES[4],
    ],
}
REFUSED = {2: [case("fsdp", "damaged", do="refuse")], 4: [case("hsdp", "damaged", do="refuse")]}
OTHER_SETTINGS = {
    "another beta": ({"params": {**PARAMS, "beta": 0.9}}, "beta=0.95 in parameter group 0", "beta=0.9 in parameter"),
    "another decay_init": (
        {"params": {**PARAMS, "decay_init": 2.5}},
        "decay_init=0.0 in parameter group 0",
        "decay_init=2.5 in parameter",
    ),
    "another version": ({"version": "0.0.9"}, "amos_dist 0.1.0", "amos_dist 0.0.9"),
    "another rule": (
        {"params": {**PARAMS, "rules": [{"match": "experts", "row_dims": 2, "sigma": 0.2}]}},
        "no such thing",
        "sigma=0.2 for 'experts'",
    ),
}
DIFFER = [case("fsdp", name, do="differ", other=other, params=PARAMS) for name, (other, _, _) in OTHER_SETTINGS.items()]
DRY = [case(way, "untrained", do="dry", params={**PARAMS, "extra_l2": 0.1}) for way in ("fsdp", "tp", "none")]

MORE = [
    *(case(way, "again", do="again") for way in ("fsdp", "tp")),
    *(case(way, "again, 8-bit momentum", do="again", **EIGHT) for way in ("fsdp", "tp")),
    case("fsdp", "lonely", do="lonely"),
    case("fsdp", "stale", do="stale"),
    case("fsdp", "follow", do="follow", dtype="bf16", params={**PARAMS, "master_weights": True}),
    case("fsdp", "early", do="early", params=AUTO),
    case("fsdp", "experts", do="experts", params=AUTO),
]

UNEQUAL = [
    case("fsdp", f"unequal, {'last' if last else 'first'}", do="unequal", last=last, params=AUTO) for last in (0, 1)
]

SCALED = {
    2: [case("fsdp", "scaled", do="scaled", steps=4)],
    4: [case("fsdp tp", name, do="scaled", steps=4, unscale=name != "scaled") for name in ("scaled", "unscaled")],
}
POLICIES = [{"on_nonfinite": policy, "moments": kind} for policy in ("skip", "raise") for kind in ("row", "factored")]
UNSCALED = {
    ranks: [
        case(way, " ".join(policy.values()), do="scaled", steps=4, scaler=False, params=PARAMS | policy)
        for policy in POLICIES
    ]
    for ranks, way in ((2, "fsdp"), (4, "fsdp tp"))
}
for some in UNSCALED.values():
    some.append({**some[1], "name": f"{some[1]['name']} in waves", "waves": 99})

# [shape, mesh, the dimension that each dimension of the mesh cuts, kind, row_dims]
TENSORS: dict[int, list[list[Any]]] = {
    2: [[shape, 0, cut, kind, 1] for cut in ([0], [1], [None]) for shape in ([5, 7], [1, 3]) for kind in KINDS],
    3: [[shape, 0, cut, kind, 1] for cut in ([0], [1]) for shape in ([5, 7], [2, 2]) for kind in KINDS[:3]],
    4: [
        *([[5, 3], 0, cut, kind, 1] for cut in ([0, 1], [0, 0], [None, 1]) for kind in KINDS),
        *([[1, 5], 0, cut, "factored", 1] for cut in ([0, 1], [1, 0], [1, 1])),
        *([[6, 3], 1, [cut], "factored", 1] for cut in (0, 1)),
        [[3, 4, 5], 0, [1, 2], "factored", 2],
        [[3, 4, 5], 0, [0, 1], "column", 1],
    ],
}
OTHER = [[[6], 0, [0], "scalar", 1], [[5], 0, [0], "full", 1], [[], 0, [None], "scalar", 1], [[3, 0], 0, [0], "row", 1]]
STACKED = [[[3, 4, 5], 0, [dim], "factored", 2] for dim in range(3)]
ROUNDED = [[[7, 5], 0, [0], kind, 1] for kind in KINDS] + [[[9, 4], 0, [1], kind, 1] for kind in KINDS[:3]]
for ranks in (2, 3):
    TENSORS[ranks] += OTHER + STACKED
MESHES = {2: [[2]], 3: [[3]], 4: [[2, 2], [4]]}


def synthetic(ranks: int) -> list[dict[str, Any]]:
    base = {"do": "synthetic", "steps": 6, "meshes": MESHES[ranks], "params": {**PARAMS, "momentum": 0.9, "beta": 0.9}}
    cases = [{**base, "name": "missing", "missing": True, "tensors": TENSORS[ranks]}]
    cases.append({**cases[0], "name": "missing, in waves", "waves": 99})
    if ranks == 2:
        rounded = {**PARAMS, "stochastic_rounding": True, "seed": 3}
        cases.append({**base, "name": "partial", "partial": True, "tensors": TENSORS[2]})
        cases.append({**base, "name": "stochastic", "dtype": "bf16", "params": rounded, "tensors": ROUNDED})
    return cases


LOADS = {1: ("fsdp", "none"), 2: ("tp",), 3: ("fsdp",), 4: ("hsdp", "fsdp tp")}
SAVED: dict[str, dict[str, Any]] = {
    "factored": {},
    "column, flattened": {"params": {**PARAMS, "moments": "column"}, "flatten": True},
    "bf16": {"dtype": "bf16", "tolerance": LOW},
    "bf16 with masters, flattened": {
        "params": {**PARAMS, "master_weights": True},
        "dtype": "bf16",
        "flatten": True,
        "tolerance": LOW,
    },
    "8-bit momentum": EIGHT,
}


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def checkpoints(ranks: int, do: str) -> list[dict[str, Any]]:
    return [
        case(way, f"{do} {name}", do=do, folder=f"{folder().name}/{name}", **more)
        for way in (("fsdp",) if do == "save" else LOADS[ranks])
        for name, more in SAVED.items()
    ]


def results(ranks: int) -> list[dict[str, Any]]:
    cases = [
        *TRAINING[ranks],
        *REFUSED.get(ranks, ()),
        *SCALED.get(ranks, ()),
        *UNSCALED.get(ranks, ()),
        *(synthetic(ranks) if ranks > 1 else ()),
    ]
    if ranks == 3:
        cases += UNEQUAL
    if ranks == 2:
        cases += [*checkpoints(2, "save"), *DIFFER, *DRY, *MORE]
    else:
        results(2)  # has saved
    cases += checkpoints(ranks, "load")
    return run_cases(WORKER, ranks, cases, timeout=200)


def cases_of(table: dict[int, list[dict[str, Any]]]) -> list[Any]:
    return [pytest.param(r, c, id=f"{r} ranks, {c['name']}") for r, cases in table.items() for c in cases]


@pytest.mark.timeout(450)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of(TRAINING))
def test_equals_one_process(ranks: int, wanted: dict[str, Any]) -> None:
    tolerance = wanted.get("tolerance", TOLERANCE)
    for got in (rank[wanted["name"]] for rank in results(ranks)):
        assert got["moved"] > 0.01  # it did train
        assert got["worst"] <= tolerance, got["where"]
        eight_bits = "int8" in wanted["params"].values()
        assert got["state"]["worst"] <= (0.1 if eight_bits else 2 * tolerance), got["state"]["where"]
        assert got["odd"] == got["keys"] == []  # the same state, of the same shapes
        assert got["steps"] == [0, wanted["steps"]]  # one parameter is never used
        assert got["dtypes"] == ["torch.float32", *["torch.int8"][:eight_bits]]
        assert len(got["calls"]) == wanted["steps"]
        assert "waves" not in wanted or min(map(len, got["calls"])) > 2


def groups_of(name: str, dims: int, way: str) -> dict[str, tuple[int, ...]]:
    """The dimensions of a parameter that each process group cuts: the plan of dtensor_model.shard, written anew."""
    cut = {}
    if way in ("fsdp", "hsdp", "fsdp tp"):
        cut["dp"] = (0,)
    if "tp" in way and name in ("embed.weight", "up.weight", "up.bias", "head.weight", "head.bias"):
        cut["tp"] = (0,)
    if "tp" in way and name == "down.weight":
        cut["tp"] = (1,)
    return cut


@pytest.mark.timeout(450)
@pytest.mark.parametrize(
    ("ranks", "wanted"), cases_of({r: [c for c in TRAINING[r] if "moments" in c["params"]] for r in (2, 3, 4)})
)
def test_one_all_reduce_for_each_process_group(ranks: int, wanted: dict[str, Any]) -> None:
    """Numbers that travel: a flag for each cut parameter, and its sums where other ranks hold parts of them."""
    kind, way = wanted["params"]["moments"], wanted["way"]
    for rank, got in enumerate(results(ranks)):
        expected = {"dp": 0, "tp": 0}
        for name, shape in got[wanted["name"]]["shapes"].items():
            cut = groups_of(name, len(shape), way)
            row_dims = 2 if name == "experts" else 1
            own = "scalar" if len(shape) < 2 and kind != "full" else kind
            held = got[wanted["name"]]["held"][name]
            rows, cols = 1, 1
            for dim, size in enumerate(held):
                rows, cols = (rows * size, cols) if dim < row_dims else (rows, cols * size)
            split_rows = any(dim < row_dims for dims in cut.values() for dim in dims)
            split_cols = any(dim >= row_dims for dims in cut.values() for dim in dims)
            for group, dims in cut.items():
                on_rows = any(dim < row_dims for dim in dims)
                expected[group] += 1 + (own == "scalar")
                if own in ("column", "factored") and on_rows:
                    expected[group] += max(1, cols)
                if own in ("row", "factored") and not on_rows:
                    expected[group] += max(1, rows)
                if own == "factored" and split_cols:  # the mean of all columns: what was, what is added
                    expected[group] += 1 if on_rows else 2
            assert split_rows or split_cols or not cut
        calls = [count + 1 for count in expected.values() if count]  # GradScaler's infinities
        assert got[wanted["name"]]["calls"] == [calls] * wanted["steps"], rank


@pytest.mark.timeout(450)
@pytest.mark.parametrize(
    ("ranks", "name"), [(r, c["name"]) for r in MESHES for c in synthetic(r)], ids=lambda each: str(each)
)
def test_any_placements_and_missing_gradients(ranks: int, name: str) -> None:
    for rank in results(ranks):
        assert rank[name]["worst"] <= TOLERANCE, rank[name]["where"]
        # One for each process group; before these, one of all gradients that are still sums.
        groups, found = len(MESHES[ranks]) + (ranks == 4), {len(calls) for calls in rank[name]["calls"]}
        assert min(found) > 2 * groups if "waves" in name else found == {groups + (name == "partial")}


@pytest.mark.timeout(450)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of({r: checkpoints(r, "load") for r in LOADS}))
def test_checkpoint_of_two_ranks(ranks: int, wanted: dict[str, Any]) -> None:
    """The state arrives to the bit, and 10 more steps are those of the layout that has saved it."""
    for rank in results(ranks):
        got = rank[wanted["name"]]
        assert got["different"] == got["odd"] == got["keys"] == []
        assert got["dtypes"] == ["torch.float32"]  # also of bf16 parameters
        assert got["worst"] <= wanted.get("tolerance", TOLERANCE), got["where"]


@pytest.mark.timeout(450)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of(REFUSED))
def test_what_is_wrong_on_one_rank_is_an_error_on_every_rank(ranks: int, wanted: dict[str, Any]) -> None:
    got = [rank[wanted["name"]] for rank in results(ranks)]
    assert "the state 'decay' of 'up.weight'" in got[1]["text"]
    for number, each in enumerate(got):
        assert each["unchanged"]
        assert number == 1 or each["text"] == f"rank 1 cannot take this step: {got[1]['text']}"


@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_ranks_that_were_started_differently(name: str) -> None:
    """The first step names the difference, on every rank, and changes nothing."""
    _, first, last = OTHER_SETTINGS[name]
    for rank, got in enumerate(each[f"fsdp: {name}"] for each in results(2)):
        here, there = (first, last) if rank == 0 else (last, first)
        assert f"rank {1 - rank} has {there}" in got["text"]
        assert f"where this rank has {here}" in got["text"]
        assert got["unchanged"]


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", DRY, ids=lambda c: c["name"])
def test_asking_for_the_state_changes_nothing(wanted: dict[str, Any]) -> None:
    for rank in results(2):
        got = rank[wanted["name"]]
        assert got["unchanged"]
        assert (got["steps"], got["states"]) == ([0], 15)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", [case["name"] for case in MORE if case.get("do") == "again"])
def test_state_through_files_and_the_first_rank(name: str) -> None:
    for rank in results(2):
        got = rank[name]
        assert got["different"] == []
        assert "is not sharded as the parameter is. Load it with torch.distributed.checkpoint" in got["refused"]


@pytest.mark.timeout(450)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of(SCALED))
def test_all_ranks_skip_a_step_or_none_does(ranks: int, wanted: dict[str, Any]) -> None:
    """GradScaler's infinity on one rank: nothing moves in that step, and every rank has the same scale after it."""
    for rank in results(ranks):
        got = rank[wanted["name"]]
        assert got["moved"] == [True, False, True, True]
        assert got["scales"] == [1024.0, 512.0, 512.0, 512.0]
        assert got["steps"] == [0, 3]
        assert got["worst"] <= TOLERANCE, got["where"]
        assert {len(calls) for calls in got["calls"]} == {2 if ranks == 4 else 1}


@pytest.mark.timeout(450)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of(UNSCALED))
def test_without_a_scaler_too(ranks: int, wanted: dict[str, Any]) -> None:
    """Skipped or an error, as on_nonfinite says, on every rank; only the rank that has it can name the parameter."""
    raises = wanted["params"]["on_nonfinite"] == "raise"
    for number, rank in enumerate(results(ranks)):
        got = rank[wanted["name"]]
        assert got["moved"] == [True, False, True, True]
        assert got["steps"] == [0, 3]
        assert got["worst"] <= TOLERANCE, got["where"]
        assert got["skipped"] == (not raises)
        what = "the gradient of 'down.weight'" if number == 1 else "a gradient on another rank"
        assert [bool(error) for error in got["errors"]] == [False, raises, False, False]
        assert not raises or got["errors"][1].startswith(f"{what} is not finite")
        found, groups = {len(calls) for calls in got["calls"]}, 2 if ranks == 4 else 1
        assert min(found) > 2 * groups if "waves" in wanted else found == {groups}


@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", [case["name"] for case in UNEQUAL])
def test_some_ranks_cut_more_than_others(name: str) -> None:
    """In another order than what all cut: each sum is added to its like, and so are a monitor's numbers."""
    found = [rank[name] for rank in results(3)]
    for got in found:
        assert got["skipped"] == 0 and got["worst"] <= TOLERANCE, got
        assert all(math.isclose(found[0]["norms"][key], norm) for key, norm in got["norms"].items())
    assert [sorted(got["norms"]) for got in found] == [["dense", "expert", "other"]] * 2 + [["dense", "other"]]


@pytest.mark.timeout(450)
def test_what_is_left_of_a_skipped_step_does_not_count() -> None:
    for rank in results(2):
        got = rank["fsdp: stale"]
        assert got["skipped"] == 1
        assert "up.weight" in got["moved"] and "down.weight" not in got["moved"]


@pytest.mark.timeout(450)
def test_a_gradient_on_one_rank_only() -> None:
    """Nobody waits for ever, nothing else moves, and all ranks count the same."""
    for rank in results(2):
        got = rank["fsdp: lonely"]
        assert got["moved"] == got["stepped"] == ["up.weight"]
        assert [len(calls) for calls in got["calls"]] == [1, 1]


@pytest.mark.timeout(450)
def test_masters_follow_loaded_weights() -> None:
    for rank in results(2):
        got = rank["fsdp: follow"]
        assert got["moved"] > 1e-2
        assert got["masters"] == 15
        assert got["worst"] < 2**-8, got["where"]  # a master that rounds to the weight is kept


@pytest.mark.timeout(450)
def test_groups_made_before_sharding() -> None:
    for rank in results(2):
        assert rank["fsdp: early"]["wrong"] == []


@pytest.mark.timeout(450)
def test_ranks_may_have_parameters_of_their_own() -> None:
    """They are no disagreement about those that the ranks share."""
    for rank in results(2):
        got = rank["fsdp: experts"]
        assert (got["steps"], got["skipped"]) == ([2, 2], 1)
