"""RelativeStep on real ranks: under FSDP2, HSDP, tensor parallel and DeepSpeed ZeRO it does what one process does."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_cases, run_ranks

WORKER = Path(__file__).with_name("relative_step_worker.py")
TOLERANCE, LOW = 5e-6, 3e-2


def case(way: str, base: str, *words: str, **more: Any) -> dict[str, Any]:
    return {"name": " ".join([way, base, *words]), "way": way, "base": base, "steps": 8, **more}


SPECTRAL = {"decay": "spectral", "q": 0.02}
LAMB = {"sigma": "lamb"}
EXPECTED = {"norm": "expected", "sigma": 0.1}
FSDP = [
    *(case("fsdp", base) for base in ("SGD", "Nesterov", "Adam", "AdamW")),
    case("fsdp", "Nesterov", "lamb", params=LAMB),
    case("fsdp", "AdamW", "groups, spectral", params=SPECTRAL, groups=True),
    case("fsdp", "AdamW", "expected", params=EXPECTED),
]
TRAINING = {
    2: [
        *FSDP,
        case("fsdp", "Muon", do="muon", steps=1),
        case("fsdp", "SGD", "bf16", dtype="bf16", tolerance=LOW, steps=4),
        case("tp", "Nesterov"),
        case("tp", "AdamW", "groups", groups=True),
    ],
    3: [*FSDP[1:2], *FSDP[3:6]],
    4: [
        case("hsdp", "AdamW", "spectral", params=SPECTRAL),
        case("fsdp tp", "Nesterov"),
        case("fsdp tp", "AdamW", "lamb", params=LAMB),
    ],
}
GROUPS = {"fsdp": 1, "hsdp": 1, "tp": 1, "fsdp tp": 2}  # process groups that cut
REFUSED = [
    case("tp", "SGD", "spectral", do="refuse", params=SPECTRAL),
    case("fsdp", "Adafactor", do="refuse"),
    case("fsdp", "SGD", "another sigma", do="refuse", params={"sigma": 0.1}, others={"sigma": 0.2}),
]
SENTENCES = {
    "tp SGD spectral": "decay='spectral' needs whole rows, and those of ",
    "fsdp Adafactor": "parameter 'experts' is a DTensor, which torch's Adafactor cannot step. Use Adam",
    "fsdp SGD another sigma": "sigma=0.",
}
SAVED = {
    "AdamW, spectral": {"base": "AdamW", "params": SPECTRAL},
    "Nesterov, groups": {"base": "Nesterov", "groups": True},
}
LOADS = {1: "none", 3: "fsdp"}


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def checkpoints(do: str, way: str) -> list[dict[str, Any]]:
    return [
        {**case(way, more["base"], do, name), "do": do, "folder": f"{folder().name}/{name}", **more}
        for name, more in SAVED.items()
    ]


def results(ranks: int) -> list[dict[str, Any]]:
    cases = list(TRAINING.get(ranks, ()))
    if ranks == 2:
        cases += [*REFUSED, *checkpoints("save", "fsdp")]
    elif ranks in LOADS:
        results(2)  # has saved
        cases += checkpoints("load", LOADS[ranks])
    return run_cases(WORKER, ranks, cases, timeout=400)


def cases_of(table: dict[int, list[dict[str, Any]]]) -> list[Any]:
    return [pytest.param(r, c, id=f"{r} ranks, {c['name']}") for r, cases in table.items() for c in cases]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of(TRAINING))
def test_equals_one_process(ranks: int, wanted: dict[str, Any]) -> None:
    """With one all-reduce for each process group that cuts parameters, and none where nothing is measured."""
    for rank in results(ranks):
        got = rank[wanted["name"]]
        assert got["moved"] > 0.003, got["least"]
        assert got["worst"] <= wanted.get("tolerance", TOLERANCE), got["where"]
        calls = 0 if wanted.get("params") == EXPECTED else GROUPS[wanted["way"]]
        assert got["calls"] == [calls] * wanted["steps"]
        assert got["alone"] == [0] * wanted["steps"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wanted", REFUSED, ids=lambda c: c["name"])
def test_what_does_not_fit_is_an_error_on_every_rank(wanted: dict[str, Any]) -> None:
    for rank in results(2):
        got = rank[wanted["name"]]
        assert SENTENCES[wanted["name"]] in got["text"]
        assert got["unchanged"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SAVED)
def test_resume_to_the_bit(name: str) -> None:
    for rank in results(2):
        assert rank[f"fsdp {SAVED[name]['base']} save {name}"]["different"] == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", LOADS)
@pytest.mark.parametrize("name", SAVED)
def test_checkpoint_of_two_ranks(ranks: int, name: str) -> None:
    for rank in results(ranks):
        got = rank[f"{LOADS[ranks]} {SAVED[name]['base']} load {name}"]
        assert got["worst"] <= TOLERANCE, got["where"]


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


def engine(stage: int, base: str, *words: str, dtype: str = "fp32", do: str = "zero", **more: Any) -> dict[str, Any]:
    name = " ".join([do, f"stage {stage}", base, dtype, *words])
    return {"name": name, "do": do, "stage": stage, "base": base, "dtype": dtype, "steps": 5, **more}


def engines(stages: tuple[int, ...]) -> list[dict[str, Any]]:
    cases = [engine(stage, base) for stage in stages for base in ("Nesterov", "AdamW")]
    cases += [engine(stage, "Nesterov", dtype="bf16", tolerance=LOW) for stage in stages]
    cases += [engine(stage, "AdamW", "groups", groups=True) for stage in stages if stage]
    cases += [engine(stage, "SGD", "lamb", params=LAMB) for stage in stages if stage in (1, 3)]
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases += [engine(stage, "AdamW", "offload", zero=offload) for stage in stages if stage in (2, 3)]
    if 3 in stages:
        cases.append(engine(3, "AdamW", "sub-groups of 50", zero={"sub_group_size": 50}, sub_groups=True))
    if 0 in stages:
        cases += [
            engine(0, "Adafactor"),
            engine(0, "smooth AdamW", dtype="bf16", tolerance=LOW),
            engine(0, "SGD", "spectral", params=SPECTRAL),
        ]
    return cases


ENGINES = {2: engines((0, 1, 2, 3)), 3: engines((2, 3))}
RESUMES = [engine(stage, "AdamW", do="zero resume") for stage in (0, 2, 3)]
FAULTS = [
    *(engine(stage, "Adafactor", do="zero refuse") for stage in (1, 3)),
    *(engine(stage, "SGD", do="zero refuse", params=SPECTRAL) for stage in (2, 3)),
]
ADAMW = {"lr": 0.01, "torch_adam": True, "weight_decay": 0.7}
INTEGRAL = {"half_life": 4, "warmup": 2, "p": [[0, 1.0], [4, 3.0]]}


def scheduled(stage: int, *words: str, kind: str = "IntegralDecay", **params: Any) -> dict[str, Any]:
    chosen = {"type": kind, "params": {**INTEGRAL, **params} if kind == "IntegralDecay" else params}
    case = engine(stage, "JSON", *words, do="scheduler", scheduler=chosen)
    return {**case, "steps": 11, "type": "AdamW", "params": ADAMW}


SCHEDULED = [
    *(scheduled(stage, "coupled", sigma=0.05, q=2.0) for stage in (0, 2, 3)),
    scheduled(2, "alone"),
    scheduled(2, "inverse time", kind="InverseTimeDecay", half_life=4, warmup=2, sigma=0.05, q=2.0),
]


@functools.cache
def under_deepspeed(ranks: int) -> list[dict[str, Any]]:
    cases = ENGINES[ranks] + ([*RESUMES, *FAULTS, *SCHEDULED] if ranks == 2 else [])
    return [{each["name"]: each for each in rank} for rank in run_ranks(WORKER, ranks, cases, timeout=600)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "wanted"), cases_of(ENGINES))
def test_zero_equals_one_process(ranks: int, wanted: dict[str, Any]) -> None:
    """With one all-reduce at most in each call of step(): stages 1 and 2 call it for each group, 3 for sub-groups."""
    for rank in under_deepspeed(ranks):
        got = rank[wanted["name"]]
        assert got["moved"] > 0.003, got["least"]
        assert got["worst"] <= wanted.get("tolerance", TOLERANCE), got["where"]
        assert got["steps"] == ([wanted["steps"]] if wanted["base"] in ("AdamW", "smooth AdamW", "Adafactor") else [])
        if not wanted.get("sub_groups"):
            per_step = 2 if wanted.get("groups") else 1
            assert len(got["calls"]) == wanted["steps"] * per_step
        assert set(got["calls"]) <= ({0} if wanted["stage"] == 0 else {0, 1})
        assert wanted["stage"] == 0 or 1 in got["calls"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wanted", RESUMES, ids=lambda c: c["name"])
def test_zero_resumes_to_the_bit(wanted: dict[str, Any]) -> None:
    for rank in under_deepspeed(2):
        assert rank[wanted["name"]]["different"] == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wanted", FAULTS, ids=lambda c: c["name"])
def test_what_zero_cannot_do_is_an_error_on_every_rank(wanted: dict[str, Any]) -> None:
    spectral = "decay='spectral' needs whole rows"
    expected = "Adafactor would take ZeRO's flat partition" if wanted["base"] == "Adafactor" else spectral
    for rank in under_deepspeed(2):
        got = rank[wanted["name"]]
        assert expected in got["text"]
        assert got["unchanged"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("wanted", SCHEDULED, ids=lambda c: c["name"])
def test_schedulers_from_the_json(wanted: dict[str, Any]) -> None:
    """lr_t = lr_0 f(t), f = 1 / (1 + (sqrt(2) - 1) P(t) / P(T))^2, and weight_decay = lr_0 / (2 q sigma^2)."""

    def area(t: float) -> float:  # of p = 1 + t / 2 up to 4, and 3 from there on
        return t + t * t / 4 if t <= 4 else 8 + 3 * (t - 4)

    def factor(t: float) -> float:
        if "inverse time" in wanted["name"]:
            return 1 / (1 + t / 4)
        return 1 / (1 + (math.sqrt(2) - 1) * area(t) / 8) ** 2

    scales = [(t + 1) / 3 if t < 2 else factor(t - 2) for t in range(11)]
    assert scales[6] == pytest.approx(0.5)
    decay = 0.7 if "alone" in wanted["name"] else 0.01 / (2 * 2.0 * 0.05**2)
    for rank in under_deepspeed(2):
        got = rank[wanted["name"]]
        assert got["optimizer"] == "AdamW"
        assert [lr for lr, _ in got["seen"]] == pytest.approx([0.01 * scale for scale in scales], rel=1e-12)
        assert [wd for _, wd in got["seen"]] == pytest.approx([decay] * 11, rel=1e-12)
