"""DeepSpeed ZeRO 0 to 3 on 1 to 4 real ranks, against one process without DeepSpeed.

Each number of ranks is one run of zero_worker.py over all its cases, since starting the ranks takes longest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_cases, run_ranks
from tests.distributed.model import Model

WORKER = Path(__file__).with_name("zero_worker.py")
PARAMS = {"lr": 0.02, "beta": 0.95, "sigma": 0.3, "momentum": 0.9}
KINDS = ("row", "column", "factored", "scalar", "full")
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 3e-3}  # fp32: max-norm, relative, after 20 steps


def case(name: str, stage: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    return {
        "name": f"stage {stage} {dtype} {name}",
        "stage": stage,
        "dtype": dtype,
        "steps": 20,
        "params": PARAMS,
        **more,
    }


def kinds(stages: tuple[int, ...] = (0, 1, 2, 3)) -> Iterator[dict[str, Any]]:
    for stage in stages:
        for kind in KINDS:
            yield case(kind, stage, params={**PARAMS, "moments": kind, "momentum": 0.0})


def options(stages: tuple[int, ...] = (0, 1, 2, 3)) -> Iterator[dict[str, Any]]:
    rules = [
        {"match": "head", "moments": "row", "sigma": 0.2, "lr": 0.01},
        {"match": "bias$", "momentum": 0.5},
    ]
    for stage in stages:
        yield case("momentum", stage, "bf16")
        yield case("momentum", stage, "fp16")
        yield case("accumulate, clip", stage, config={"gradient_clipping": 0.3})
        yield case("groups", stage, groups=True)
        yield case("warm-up", stage, warmup=5)
        yield case("auto, rules", stage, params={"lr": 0.02, "beta": 0.95, "rules": rules})
        low = {
            **PARAMS,
            "momentum_dtype": "bfloat16",
        }  # rounding turns differences of 1e-7 into some of 2^-9 now and then
        yield case("bf16 momentum", stage, params=low, tolerance=2e-3)
        # Partitions have other runs than whole parameters.
        yield case("8-bit momentum", stage, params={**PARAMS, "momentum_dtype": "int8"}, tolerance=1e-2)
    for stage in (stage for stage in stages if stage in (1, 2)):
        yield case("round robin", stage, zero={"round_robin_gradients": True})
        yield case("offload", stage, zero={"offload_optimizer": {"device": "cpu"}})
    if 1 in stages:
        yield case("fp32 accumulation", 1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}})
        yield case("any case", 1, type="aMOS")
    if 2 in stages:
        yield case("thawed after initialize", 2, thaw=True)
    for stage in (stage for stage in stages if stage in (0, 2, 3)):
        decay = {"type": "InverseSquareDecay", "params": {"half_life": 8, "warmup": 3}}
        yield case("scheduler of ours", stage, scheduler=decay)
    if 3 in stages:
        yield case("sub-groups of 20", 3, zero={"sub_group_size": 20})
        yield case("sub-groups of 50, groups", 3, groups=True, zero={"sub_group_size": 50})
        yield case("offload", 3, zero={"offload_optimizer": {"device": "cpu"}})
        both = {"sub_group_size": 100, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        yield case("offload both", 3, zero=both)
        yield case("zero.Init", 3, init=True)
        yield case("zero.Init, auto", 3, init=True, params={"lr": 0.02, "beta": 0.95})


MIXED = {"lr": 0.02, "beta": 0.95, "sigma": 0.3, "rules": [{"match": "inner", "moments": "column"}]}
# With many each parameter with columns travels alone: there are more than are under way at once.
WAVES = [case(f"in {name} waves", 3, params=MIXED, waves=most) for name, most in (("many", 99), ("few", 2))]
START = {**PARAMS, "decay_init": 40.0, "rules": [{"match": "head|bias", "decay_init": 2.0}]}
STARTED = [case("decay_init", stage, params=START) for stage in (1, 3)]
TRAINING = {
    1: [*kinds((1,)), *options((3,))],
    2: [*kinds(), *options(), *WAVES, *STARTED],
    3: [*kinds((2, 3)), *options((1,)), WAVES[0]],
    4: [*kinds((1, 3)), WAVES[1], case("groups", 2, groups=True), case("zero.Init", 3, init=True)],
}
RESUMES = [
    case(name, stage, dtype, do="resume", groups=groups)
    for stage in (0, 1, 2, 3)
    for name, dtype, groups in (("resume", "fp32", False), ("resume", "bf16", False), ("resume groups", "fp32", True))
]
# A checkpoint's b is the one that counts.
RESUMES += [case("resume decay_init", stage, do="resume", params=START, again=PARAMS) for stage in (1, 3)]
FAULTS = [case(f"{what} fault", stage, do="fault", fault=what) for stage in (2, 3) for what in ("partition", "state")]
NONFINITE = [
    *(case("nonfinite", stage, dtype, do="nonfinite") for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")),
    case("nonfinite raises", 0, do="nonfinite", params={**PARAMS, "on_nonfinite": "raise"}),
]
SECONDS = [case("second engine", stage, "bf16", do="second") for stage in (0, 1)]


def results(ranks: int) -> list[dict[str, Any]]:
    trained = [{**each, "size": 24, "micro": 12 // ranks} for each in TRAINING[ranks]]  # 2 passes a step
    cases = trained + (RESUMES + FAULTS + NONFINITE + SECONDS if ranks == 2 else [])
    return run_cases(WORKER, ranks, cases, timeout=420)


@pytest.mark.timeout(450)
@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [pytest.param(r, c, id=f"{r} ranks, {c['name']}") for r, cases in TRAINING.items() for c in cases],
)
def test_equals_one_process(ranks: int, wanted: dict[str, Any]) -> None:
    for got in (rank[wanted["name"]] for rank in results(ranks)):
        assert got["optimizer"] == "Amos"
        assert got["moved"] > 0.01  # it did train
        assert got["worst"] <= wanted.get("tolerance", TOLERANCE[wanted["dtype"]]), got["where"]
        assert got["steps"] == [20]  # DeepSpeed's trial step is not among them
        kinds = [[kind for kind, _ in calls] for calls in got["calls"]]
        most = {99: 5, 2: 2}[wanted["waves"]] if "waves" in wanted else 1
        assert all(calls.count(kind) <= most + (kind == "all_to_all") for calls in kinds for kind in calls)
        assert any(calls.count("scatter") == most for calls in kinds) or "waves" not in wanted


def whole_matrix(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """R and C, written anew: what the package computes must agree."""
    numel = 1
    for size in shape:
        numel *= size
    if kind == "full":
        return numel, 1
    if kind == "scalar" or len(shape) < 2:
        return 1, numel
    return shape[0], numel // shape[0]


@pytest.mark.timeout(450)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), (2, 3), (3, 2), (3, 3), (4, 1), (4, 3)])
def test_only_cut_rows_and_columns_travel(ranks: int, stage: int, kind: str) -> None:
    """Bytes of the collectives and numbers of state, counted element by element.

    Who holds a part of a row sends it to the others that do. Of a parameter's columns each keeps an equal share: at
    stage 3 every rank, at stages 1 and 2 who holds elements of it.
    """
    shapes = [tuple(p.shape) for p in Model().parameters() if p.requires_grad]
    total = sum(whole_matrix(s, "scalar")[1] for s in shapes)
    flat = -(-total // (2 * ranks)) * 2  # of each rank: DeepSpeed pads to 2 x ranks
    planes = 2 if kind == "column" else 1
    added, shared, state, place = 0, 0, [0] * ranks, 0
    out, back = [0] * ranks, [0] * ranks  # what each rank sends to some
    any_row = any_column = False
    for shape in shapes:
        rows, cols = whole_matrix(shape, kind)
        share = -(-rows * cols // ranks) if stage == 3 else flat
        begin = 0 if stage == 3 else place
        owners_of_row = [{(begin + r * cols + c) // share for c in range(cols)} for r in range(rows)]
        owners = sorted(set().union(*owners_of_row))
        own_kind = "scalar" if len(shape) < 2 and kind != "full" else kind
        if own_kind != "column":
            any_row |= len(owners) > 1
            for some in owners_of_row:
                for rank in some:
                    out[rank] += len(some) - 1
        columns = [cols if rank in owners else 0 for rank in range(ranks)]  # whose state each rank has
        if own_kind in ("column", "factored") and len(owners) > 1:
            keepers = range(ranks) if stage == 3 else owners
            each = -(-cols // len(keepers))
            columns = [0] * ranks
            for i, rank in enumerate(keepers):
                columns[rank] = max(0, min(each, cols - i * each))
            means = 2 if own_kind == "factored" else 0  # the mean of all columns
            if stage == 3:
                shared += ranks * each
                added += means
            else:
                any_column = True
                for rank in owners:
                    out[rank] += cols - columns[rank] + means * (len(owners) - 1)
                    back[rank] += planes * columns[rank] * (len(owners) - 1)
        for rank in range(ranks):
            mine = sum(rank in some for some in owners_of_row)
            state[rank] += {"column": 2 * columns[rank], "factored": 2 * mine + columns[rank]}.get(own_kind, 2 * mine)
        place += rows * cols
    name = case(kind, stage)["name"]
    for rank, got in enumerate(results(ranks)):
        expected = [["all_reduce", 4 * added]] if added else []
        expected += [["scatter", 4 * shared]] if shared else []
        expected += [["all_to_all", 4 * out[rank]]] if any_row or any_column else []
        expected += [["gather", 4 * shared * planes]] if shared else []
        expected += [["all_to_all", 4 * back[rank]]] if any_column else []
        assert got[name]["state_numel"] == state[rank]
        assert got[name]["calls"] == [expected] * 20


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", RESUMES, ids=lambda c: c["name"])
def test_resumes_bit_for_bit(wanted: dict[str, Any]) -> None:
    for rank in results(2):
        assert rank[wanted["name"]]["different"] == []


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", FAULTS, ids=lambda c: c["name"])
def test_what_is_wrong_on_one_rank_is_an_error_on_every_rank(wanted: dict[str, Any]) -> None:
    first, second = (rank[wanted["name"]] for rank in results(2))
    assert first["text"] == f"rank 1 cannot take this step: {second['text']}"
    wrong = "does not hold what parameter '" if wanted["fault"] == "partition" else "the state 'row_moment' of"
    assert wrong in second["text"]
    assert first["unchanged"]
    assert second["unchanged"]


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", NONFINITE, ids=lambda c: c["name"])
def test_a_step_with_nan_on_one_rank_is_none(wanted: dict[str, Any]) -> None:
    """DeepSpeed skips it itself, but for stage 0 in float32, which is Amos's own."""
    raises = "raises" in wanted["name"]
    for got in (rank[wanted["name"]] for rank in results(2)):
        # After an error the gradients are still there: so is the error.
        assert got["changed"] == [True, False, not raises, not raises]
        assert got["steps"] == [1 if raises else 3]
        assert got["skipped"] == (wanted["stage"] == 0 and wanted["dtype"] == "fp32" and not raises)
        told = [text for text in got["texts"] if text]
        assert bool(told) == raises
        assert all(" is not finite" in text and "the gradient of '" in text for text in told)


@pytest.mark.timeout(450)
@pytest.mark.parametrize("wanted", SECONDS, ids=lambda c: c["name"])
def test_a_second_engine_on_the_same_model(wanted: dict[str, Any]) -> None:
    for rank in results(2):
        assert rank[wanted["name"]]["steps"] == [3]


REFUSED = {
    "unknown keyword": ({"params": {**PARAMS, "etaa": 1}}, "TypeError", "'etaa'"),
    "weight_decay": ({"params": {**PARAMS, "weight_decay": 0.1}}, "TypeError", "'weight_decay'"),
    "sigma": ({"params": {**PARAMS, "sigma": 0}}, "ValueError", "sigma=0"),
    "NaN": ({"params": {**PARAMS, "lr": float("nan")}}, "ValueError", "lr=nan"),
    "rule": ({"params": {**PARAMS, "rules": [{"match": "nowhere"}]}}, "ValueError", "'nowhere'"),
    "ratio": (
        {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
        "RuntimeError",
        "ratio=0.3",
    ),
    "nvme": (
        {"stage": 3, "zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp/none"}}},
        "RuntimeError",
        'device=nvme. In DeepSpeed\'s JSON, use "cpu": DeepSpeed swaps',
    ),
    "raise": ({"params": {**PARAMS, "on_nonfinite": "raise"}}, "RuntimeError", "on_nonfinite='raise'"),
    "elastic": ({"stage": 1, "zero": {"elastic_checkpoint": True}}, "RuntimeError", "elastic_checkpoint"),
    "master weights": (
        {"stage": 1, "dtype": "bf16", "config": {"bf16": {"bf16_master_weights_and_grads": True}}},
        "RuntimeError",
        "bf16_master_weights_and_grads",
    ),
    "ZenFlow": (
        {
            "zero": {
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {
                    "topk_ratio": 0.1,
                    "select_strategy": "auto",
                    "select_interval": "auto",
                    "update_interval": 4,
                },
            }
        },
        "RuntimeError",
        "zenflow",
    ),
    "SuperOffload": (
        {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "RuntimeError",
        "super_offload",
    ),
}


@functools.cache
def refusals() -> list[dict[str, Any]]:
    cases = [
        {"stage": 2, "dtype": "fp32", "params": PARAMS, **more, "name": name, "do": "refuse"}
        for name, (more, _, _) in REFUSED.items()
    ]
    return [{each["name"]: each for each in rank} for rank in run_ranks(WORKER, 2, cases, timeout=120)]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name: str) -> None:
    _, error, text = REFUSED[name]
    for rank in refusals():
        assert rank[name]["error"] == error
        assert text in rank[name]["text"]
        assert rank[name]["text"].count(". ") + rank[name]["text"].endswith(("?", ".")) >= 2  # two sentences
