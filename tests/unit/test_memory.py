"""python -m amos_dist memory: computed bytes against what is really held, its rules, errors and what it prints."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amos_dist import Amos, memory
from amos_dist.__main__ import main
from amos_dist.memory import fits, rank, report, trial
from amos_dist.memory.command import bytes_of
from amos_dist.memory.estimates import AMOS, OPTIMIZERS, Setting, estimate
from amos_dist.memory.keepers import KEEPERS, state_of, temporary_of
from amos_dist.memory.standin import StandIn
from amos_dist.memory.watching import Watch, profile
from amos_dist.models import Parameter, bert, gpt2, llama, parameters_of, t5, total, vit

CPU = torch.device("cpu")
SHAPES = [(512, 768), (96,), (5, 7, 3), (33, 128), ()]
NAMED = [Parameter(f"p{i}", shape) for i, shape in enumerate(SHAPES)]
MEGABYTE = 10**6


def held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            sizes[key] = sizes.get(key, 0) + value.nbytes
    return sizes


def filled(named: list[Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for _, shape in named]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


# ---- what optimizers keep --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, keeper in KEEPERS.items() if keeper.make])
def test_peers_hold_what_was_computed(name: str, dtype: torch.dtype) -> None:
    """To the byte, after real steps. What a step takes for a moment: beside it each thread of BLAS takes something."""
    keeper = KEEPERS[name]
    params = [param for param in filled(NAMED, dtype) if keeper.takes(tuple(param.shape))]
    optimizer = keeper.make(params) if keeper.make else None
    assert optimizer is not None
    optimizer.step()
    watch = Watch()
    with watch.watch(CPU):
        optimizer.step()
    tensors = [(tuple(param.shape), True) for param in params]
    assert held(optimizer) == state_of(keeper, tensors, dtype)
    expected = temporary_of(keeper, tensors, dtype)
    assert expected <= watch.peak <= expected + (64 if expected == 0 else 150_000 * torch.get_num_threads())


def test_rules_of_those_that_are_not_in_torch() -> None:
    """By hand: 2 bytes an element and 2 float32 for each 256; below 4,096 elements 8 bytes. Lion: one momentum."""
    eight = KEEPERS["adam8bit"]
    assert sum(eight.state((4096,), torch.float32).values()) == 2 * 4096 + 2 * 4 * 16
    assert sum(eight.state((64, 65), torch.float32).values()) == 2 * 4160 + 2 * 4 * 17
    assert sum(eight.state((4095,), torch.bfloat16).values()) == 8 * 4095
    assert sum(eight.once.values()) == 2 * 256 * 4
    assert KEEPERS["lion"].state((3, 5), torch.float32) == {"exp_avg": 60}
    muon = estimate(NAMED, "muon", Setting(dtype=torch.float32))
    matrices = 512 * 768 + 33 * 128
    assert muon.state["momentum_buffer"] == 4 * matrices
    assert muon.state["exp_avg"] == 4 * (total(NAMED) - matrices)


@pytest.mark.parametrize("optimizer", AMOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["factored", "row", "column"])
def test_amos_holds_what_was_computed(optimizer: str, dtype: torch.dtype, moments: str) -> None:
    """To the byte, state and workspace, with and without masters."""
    momentum = {"momentum": 0.9, "momentum_dtype": AMOS[optimizer]} if AMOS[optimizer] else {}
    for master in (False, True):
        params = filled(NAMED, dtype)
        made = Amos(params, lr=0.01, sigma=0.5, moments=moments, master_weights=master, **momentum)
        made.step()
        setting = Setting(dtype=dtype, master=master, moments=moments, device="cpu")
        computed, found = estimate(NAMED, optimizer, setting), profile(made)
        assert {key: size for key, size in held(made).items() if key != "master"} == computed.state == found.state
        assert (found.parameters, found.gradients) == (computed.parameters, computed.gradients)
        assert found.master == computed.master == (4 * total(NAMED) if master and dtype.itemsize < 4 else 0)
        assert found.workspace == computed.workspace > 0


def test_bars() -> None:
    """GPT-2 small, by real states: 0.3 %, 50.2 %, 25.2 % and 12.9 % of AdamW's; a step adds less than 1 MB."""
    named = parameters_of("gpt2")
    adam = estimate(named, "adamw", Setting(dtype=torch.float32)).state_bytes
    assert adam == 2 * 4 * total(named) + 4 * len(named)
    params = filled(named, torch.float32)
    for dtype, most in ((None, 0.003), (torch.float32, 0.502), (torch.bfloat16, 0.252), (torch.int8, 0.129)):
        momentum = {"momentum": 0.9, "momentum_dtype": dtype} if dtype else {}
        made, watch = Amos(params, lr=1e-3, sigma=0.05, **momentum), Watch()
        made.step()
        with watch.watch(CPU):
            made.step()
        assert profile(made).state_bytes <= most * adam
        assert 0 <= watch.peak < MEGABYTE
        del made


def test_watch_sees_what_is_taken_and_what_is_left() -> None:
    watch = Watch()
    with watch.watch(CPU):
        kept = torch.empty(1000)
        torch.empty(5000)
    assert (watch.peak, watch.left) == (24_000, 4_000) and kept.numel() == 1000
    with watch.watch(CPU):
        pass
    assert (watch.peak, watch.left) == (0, 0)


def test_profile_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match=r"given a Linear, of which it knows nothing\. Give"):
        profile(nn.Linear(2, 2))


# ---- one rank in plain torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "names"),
    [(torch.float32, ("amos", "adamw")), (torch.bfloat16, ("amos-momentum-bf16", "adafactor", "sgd"))],
)
def test_real_steps_hold_what_was_computed(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """All rows of `--measure`, within 2 %; of a model in which 2 % are 200 KB and more."""
    named = list(gpt2(2, 256, words=3000, positions=64))
    setting = Setting(dtype=dtype, device="cpu")
    for name in names:
        computed = estimate(named, name, setting)
        pairs = report.pairs(computed, rank.train(name, named, setting, CPU))
        assert pairs["step adds"][1] < MEGABYTE if name in AMOS else True
        for row, (one, other) in pairs.items():
            scratch = 150_000 if name == "adafactor" and row == "step adds" else 40_000  # of BLAS; of tables
            assert abs(one - other) <= max(0.02 * one, scratch), (name, row, one, other)
        for row in ("parameters", "gradients", "master", "state"):
            assert pairs[row][0] == pairs[row][1], (name, row)


def test_the_stand_in_has_every_gradient() -> None:
    named = [*list(llama(1, 8, 16, 4, 20)), Parameter("bare", (3,))]
    model = StandIn(named, torch.float32, CPU)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == dict(named)
    model(torch.zeros(())).backward()
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_data_parallel() -> None:
    """Everything on each rank; DDP's buckets are the gradients once more."""
    one, two = (estimate(NAMED, "adamw", Setting(ranks=ranks)) for ranks in (1, 2))
    assert two.buckets == two.staying == one.gradients and two.peak == one.peak + one.gradients


def test_stages_by_hand() -> None:
    """3 x 40 numbers and 11 more on 2 ranks: partitions of 66; rank 0 has a part of the first two."""
    named = [Parameter(f"{i}.weight", shape) for i, shape in enumerate([(5, 8), (40,), (4, 10), (11,)])]
    setting = Setting(2, 2, reduce_bucket_size=7, param_persistence_threshold=11)
    first, second = (estimate(named, "adamw", setting, rank=r) for r in (0, 1))
    assert first.parameters == 2 * 132 and first.master == 4 * 66 and first.state_bytes == 8 * 66 + 4
    assert (first.gradients, second.gradients) == (2 * 80, 2 * 91)
    assert first.step == max(6 * 66, 8 * 40)
    # Each gradient is larger than the bucket. When the second is reduced the first waits, and the rank begins to keep.
    assert first.buckets == 2 * (7 + 40 + 40)
    assert second.buckets == 2 * (7 + 40 + 40)  # the first: two on their way, beside the 91 that it keeps
    ahead = estimate(named, "adamw", setting, zero=1, rank=0)
    assert ahead.buckets == 2 * (7 + 131)  # it keeps from the first on, when all others wait
    # With room for all of them, what is reduced is a copy.
    roomy = replace(setting, reduce_bucket_size=131)
    assert estimate(named, "adamw", roomy, rank=0).buckets == 2 * (131 + 131 - 80)
    assert estimate(named, "adamw", roomy, overlap_comm=True, rank=0).buckets == 2 * (2 * 131 + 131 - 80)
    assert estimate(named, "adamw", roomy, ranks=1).buckets == 0 + 2 * 131  # one rank: nothing is copied
    assert estimate(named, "adamw", setting).rank == 1  # it holds the most
    full = estimate(named, "adamw", setting, dtype=torch.float32, rank=0)
    assert full.step == max(4 * 66, 8 * 40) and full.gradients == 2 * first.gradients
    third = estimate(named, "adamw", setting, zero=3)
    partition = 20 + 20 + 20 + 6
    assert third.parameters == 2 * (partition + 11) and third.gradients == 2 * partition
    assert third.held == third.parameters + 4 * partition + third.state_bytes + third.gradients + 2 * 7
    # All parameters are fetched at once into a buffer, from which they are copied.
    assert third.buckets == 2 * (7 + 120 + 120)
    # One by one, each in place. Of the last two gradients the first is reduced in a copy, since it needs padding.
    alone = {"zero": 3, "prefetch_bucket_size": 0}
    assert estimate(named, "adamw", setting, **alone).buckets == 2 * (7 + 120 + 11 + 12 + 40)
    # Released in between: one parameter, its gradient, and the one before.
    few = {**alone, "max_reuse_distance": 0}
    assert estimate(named, "adamw", setting, **few).buckets == 2 * (7 + 3 * 40)
    # The bucket is reduced in a copy, and the first module's parameter is still there.
    assert estimate(named, "adamw", roomy, **few).buckets == 2 * (131 + 40 + 132)
    assert third.step == 6 * partition - 2 * 11
    assert estimate(named, "adafactor", setting, rank=0).state["variance"] == 4 * 66  # a flat partition has no rows


def test_stage_3_by_hand() -> None:
    """What the whole model has itself stays until the last gradient; on one rank nothing is gathered."""
    named = [Parameter("own", (30,)), Parameter("a.weight", (40,)), Parameter("b.weight", (20,))]
    setting = Setting(3, 2, reduce_bucket_size=7, param_persistence_threshold=0, prefetch_bucket_size=0)
    few = replace(setting, max_reuse_distance=0)
    # Backwards its gradient comes first, then b's, then a's beside b's.
    assert estimate(named, "adamw", few).buckets == 2 * (7 + 30 + 40 + 20 + 40)
    alone = estimate(named, "adamw", setting, ranks=1)
    assert alone.parameters == 2 * 90 and alone.buckets == 2 * (7 + 20 + 40)  # two gradients
    assert estimate(named, "adamw", setting, ranks=1, param_persistence_threshold=100).parameters == 2 * 90


def test_parameters_without_elements() -> None:
    named = [Parameter("a.weight", (3, 4)), Parameter("a.none", (0,)), Parameter("b.weight", (5,))]
    for zero in (0, 1, 2, 3):
        with_none, without = (estimate(some, "amos", zero=zero, ranks=2) for some in (named, named[::2]))
        assert with_none == without
        with pytest.raises(ValueError, match="no parameter of the model has an element"):
            estimate(named[1:2], "adamw", zero=zero)


def test_what_amos_adds_up_is_what_scaling_says() -> None:
    from amos_dist.scaling.forecast import Model, forecast_of_rank
    from amos_dist.scaling.forecast import Setting as Plan

    named = list(gpt2(2, 64, words=500, positions=32))
    for zero in (1, 2, 3):
        for name in ("amos-momentum-bf16", "amos-momentum-int8"):
            planned = forecast_of_rank(Model([named], "factored"), Plan(zero, 3, AMOS[name]), 1)
            found = estimate(named, name, Setting(zero, 3), rank=1)
            assert found.workspace == planned.workspace + planned.sums and found.state == planned.state
            assert planned.workspace > 0 and (planned.sums > 0 or zero == 3)  # where every parameter is cut


def test_the_rank_that_holds_the_most() -> None:
    named = list(llama(2, 32, 48, 16, 300))
    for zero in (1, 2, 3):
        for name in ("amos", "adamw"):
            setting = Setting(zero, 5, reduce_bucket_size=100)
            peaks = [estimate(named, name, setting, rank=r).peak for r in range(5)]
            # At stages 1 and 2 the state of rows may weigh against gradients: a KB.
            assert max(peaks) - 1000 <= estimate(named, name, setting).peak <= max(peaks)


# ---- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "few", "many"),
    [
        (lambda n: gpt2(n, 8, 20, 10), 3, 7),
        (lambda n: llama(n, 8, 16, 4, 20), 4, 2),
        (lambda n: bert(n, 8, 20, 10), 2, 5),
        (lambda n: t5(n, 8, 8, 16, 2, 20), 3, 6),
        (lambda n: vit(n, 8, 16, 32, 5), 2, 4),
    ],
)
def test_with_layers(make: Any, few: int, many: int) -> None:
    """More layers of a model are those of its own family, also where two stacks grow."""
    assert fits.with_layers(list(make(few)), many) == list(make(many))
    assert fits.layers_of(list(make(few))) == few


def test_no_layers() -> None:
    named = [Parameter("0.weight", (3, 4)), Parameter("2.weight", (5, 3)), Parameter("head", (9,))]
    assert fits.layers_of(named) == 0 and fits.with_layers(named, 5) == named
    one = estimate(named, "sgd", Setting()).peak
    assert memory.largest(named, "sgd", Setting(), 10 * one) == (10 * total(named), 0)
    # A bucket does not grow with the model.
    setting = Setting(2, 1)
    bucket = setting.reduce_bucket_size * setting.dtype.itemsize
    assert memory.largest(named, "sgd", setting, 2 * bucket).elements > bucket / 40
    assert memory.largest(named, "sgd", setting, bucket // 2).elements == 0


@pytest.mark.parametrize("size", [0.2, 1, 3.7, 40])
def test_largest(size: float) -> None:
    """One layer more does not fit."""
    named, setting = list(llama(4, 16, 32, 8, 40)), Setting(2, 2, reduce_bucket_size=1000)
    limit = int(size * estimate(named, "amos", setting).peak)
    found = memory.largest(named, "amos", setting, limit)
    if not found.layers:
        assert found.elements == 0 and estimate(fits.with_layers(named, 1), "amos", setting).peak > limit
        return
    fit, above = (estimate(fits.with_layers(named, n), "amos", setting) for n in (found.layers, found.layers + 1))
    assert fit.peak <= limit < above.peak and fit.elements == found.elements


def test_the_largest_is_found_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line through the first two bends, where as much is gathered as may live; far larger ones are never built."""
    named = list(gpt2(2, 8, 20, 10))
    setting = Setting(3, 4, reduce_bucket_size=10, max_live_parameters=20_000, param_persistence_threshold=0)
    tried: list[int] = []

    def counted(parameters: list[Parameter], *arguments: Any) -> Any:
        tried.append(fits.layers_of(parameters))
        return estimate(parameters, *arguments)

    monkeypatch.setattr(fits, "estimate", counted)
    found = memory.largest(named, "adamw", setting, 1_000_000).layers
    peaks = [estimate(fits.with_layers(named, n), "adamw", setting).peak for n in (found, found + 1)]
    assert peaks[0] <= 1_000_000 < peaks[1]
    assert len(tried) < 12 and max(tried) < 2 * found


def test_sizes() -> None:
    sizes = [bytes_of(text) for text in ("80GB", "24 GiB", "0.5TB", "300MB", "2KiB")]
    assert sizes == [80 * 10**9, 24 * 2**30, 5 * 10**11, 3 * 10**8, 2048]


# ---- the command -----------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["amos_dist", "memory", *map(str, arguments)])
    return main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    numbers, picture = tmp_path / "new" / "numbers.json", tmp_path / "bars.png"
    given = [
        "bert-base",
        "--zero",
        "0,2",
        "--ranks",
        4,
        "--device-memory",
        "1.5GB",
        "--json",
        numbers,
        "--plot",
        picture,
    ]
    assert run(monkeypatch, *given, "--reduce-bucket-size", 10**6) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("bert-base: 109.5 M parameters\n\nDDP, 4 ranks, bfloat16:\n\n| optimizer")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    assert [line[0] for line in lines if line[0] in OPTIMIZERS] == 2 * list(OPTIMIZERS)
    adam = next(line for line in lines if line[0] == "adamw")
    assert adam[lines[0].index("x Adam's")] == "1" and adam[lines[0].index("fits 1.5 GB")] == "no"
    plans = json.loads(numbers.read_text())["estimates"]
    assert [(plan["setting"]["zero"], plan["optimizer"]) for plan in plans] == [
        (z, o) for z in (0, 2) for o in OPTIMIZERS
    ]
    one = plans[len(OPTIMIZERS)]
    setting = Setting(2, 4, reduce_bucket_size=10**6)
    assert one["peak"] == estimate("bert-base", "amos", setting).peak and one["setting"]["dtype"] == "bfloat16"
    assert one["largest"]["layers"] > 12
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for plan in plans:
        found = estimate("bert-base", plan["optimizer"], Setting(plan["setting"]["zero"], 4, reduce_bucket_size=10**6))
        assert sum(report.parts(found).values()) == found.peak and min(report.parts(found).values()) >= 0


def test_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way, with a model of the user's; resident memory as well."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.ModuleDict({'words': nn.Embedding(20000, 500), 'head': nn.Linear(500, 9)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--measure", "--optimizer", "amos,lion", "--dtype", "fp32", "--json", tmp_path / "n.json"]
    assert run(monkeypatch, "own:build", *options) == 0
    shown = capsys.readouterr().out
    assert "| rank 0, amos" in shown and "lion: not measured: torch has none." in shown and " !" not in shown
    amos, lion = json.loads((tmp_path / "n.json").read_text())["estimates"]
    (found,) = amos["measured"]
    assert found["parameters"] == amos["parameters"] == 4 * (20000 * 500 + 9 * 501)
    assert found["resident"] == pytest.approx(amos["held"], rel=0.05, abs=4 * MEGABYTE)
    assert "measured" not in lion


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zero", "4"], "--zero 4: '4' is not known. Give 0, 1, 2, 3."),
        (["--optimizer", "adam"], "--optimizer adam: 'adam' is not known. Give amos,"),
        (["--ranks", "0"], "--ranks 0: that is no number of ranks. Give 1 to"),
        (["--ranks", "4", "--rank", "4"], "--rank 4: not among 4 ranks. Give 0 to 3."),
        (["--dtype", "int8"], "--dtype int8: no such dtype. Give bf16,"),
        (["--device-memory", "80"], "--device-memory 80: that is no size. Write"),
        (["--device-memory", "0GB"], "--device-memory 0GB: that is no size. Write"),
        (["--moments", "rows"], "moments='rows' is unknown. Use"),
        (["--reduce-bucket-size", "0"], "--reduce-bucket-size 0: it must be above 0. Give"),
        (["--measure", "--snapshot", "s.pickle"], "--snapshot needs --measure and a GPU for each rank"),
        (["--plot", "bars.gif"], "--plot bars.gif: what kind of picture is that? Give"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "gpt2", *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and not shown.out


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [estimate("llama3-405b", "sgd", Setting())]
    with pytest.raises(ValueError, match=r"--measure needs [\d.]+ GB on cpu, which has [\d.]+ GB free\. Give"):
        trial.measure(parameters_of("llama3-405b"), found)
    with pytest.raises(ValueError, match=r"no optimizer 'adam' is known here\. Give"):
        estimate("gpt2", "adam")
    with pytest.raises(ValueError, match=r"zero=5 on 1 ranks cannot be\. Give"):
        estimate("gpt2", zero=5)
    monkeypatch.setattr(trial.sys, "executable", "false")
    with pytest.raises(ValueError, match=r"--measure ended with 1 on ZeRO-0, 1 ranks\. What"):
        trial.measure(NAMED, [estimate(NAMED, "sgd", Setting())])


def test_close() -> None:
    assert report.is_close(10**9, int(1.02 * 10**9)) and not report.is_close(10**9, int(1.021 * 10**9))
    assert report.is_close(0, MEGABYTE) and not report.is_close(0, 3 * MEGABYTE)
    assert math.isclose(report.CLOSE, 0.02)
