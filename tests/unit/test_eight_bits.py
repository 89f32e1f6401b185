"""Momentum in 8 bits: its rounding, its kernels, its checkpoints, and what cutting a parameter changes."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from amos_dist import Amos, checkpoint, runs
from amos_dist.convert.zero import _narrowed
from amos_dist.member import Member
from amos_dist.plan import Plan
from amos_dist.reference import RUN, nearest_int8, stochastic_int8, widened_int8
from amos_dist.sharding import Layout, Piece

from ..conftest import TOLERANCES
from .compare import KINDS, follow, gradients, parameters, randn
from .tables import make_case

native = torch.ops.amos_dist
F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
KEYWORDS: dict[str, Any] = {"lr": 0.05, "sigma": 0.3, "beta": 0.9, "momentum": 0.9, "momentum_dtype": torch.int8}

# ---- rounding ------------------------------------------------------------------------------------------------------


def rounded(values: Tensor, seed: int = 1, t: int = 1) -> Tensor:
    return widened_int8(*stochastic_int8(values, torch.arange(len(values)), seed, t))


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    values = randn(1, 5000)
    unit = widened_int8(torch.ones(5000, dtype=I8), stochastic_int8(values, torch.arange(5000), 1, 1)[1])
    found = torch.stack([rounded(values, seed=3, t=t) for t in range(1, 401)])
    assert ((found - values).abs() <= unit * 1.01).all()
    away = ((found.mean(0) - values) / unit)[values.abs() < 126 * unit]
    assert away.abs().max() < 0.5 * 400**-0.5 * 4.5 and away.mean().abs() < 0.5 * (400 * 5000) ** -0.5 * 4.5


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1000])
def test_what_was_rounded_can_be_rounded_again(size: int) -> None:
    """To the bit, whatever the sizes: what is loaded is what was saved."""
    for seed in range(20):
        values = (
            randn(seed, size) * torch.logspace(-20, 20, size)[torch.randperm(size)] if seed % 2 else randn(seed, size)
        )
        levels, scale = stochastic_int8(values, torch.arange(size), seed, 7)
        again = nearest_int8(widened_int8(levels, scale))
        assert torch.equal(again[0], levels) and torch.equal(again[1], scale)
        assert [int(part.abs().max()) for part in levels.split(RUN) if part.numel()] == [127] * len(scale)


def test_special_values() -> None:
    values = torch.zeros(6 * RUN)
    values[RUN + 3] = float("nan")
    values[2 * RUN + 3] = -float("inf")
    values[3 * RUN : 4 * RUN] = 2.0**-101  # too small to be a difference
    values[4 * RUN : 5 * RUN] = 2.0**-140  # subnormal
    values[5 * RUN] = torch.finfo(F32).max
    for levels, scale in (stochastic_int8(values, torch.arange(len(values)), 5, 3), nearest_int8(values)):
        wide = widened_int8(levels, scale).view(6, RUN)
        assert wide[1].isnan().all() and wide[2].isnan().all()
        assert not wide[[0, 3, 4]].any()
        assert wide[5, 0] == pytest.approx(torch.finfo(F32).max, rel=1e-4) and not wide[5, 1:].any()


def test_the_largest_stay_in_bounds() -> None:
    """They lie a little beyond 127 units, and chance would take some of them to 128."""
    values = randn(1, 200 * RUN).sign()
    levels, _ = stochastic_int8(values, torch.arange(len(values)), 5, 3)
    assert torch.equal(levels.float(), 127 * values)


def test_scales_have_sixteen_bits() -> None:
    for scale in (stochastic_int8(randn(1, 9000), torch.arange(9000), 5, 3)[1], nearest_int8(randn(2, 9000))[1]):
        assert not (scale.view(torch.int32) & 0xFF).any()


@pytest.mark.parametrize("fused", [True, False])
def test_small_steps_reach_the_momentum(fused: bool) -> None:
    """Steps of 1 % beside one that is 100 times as large: to nearest, they would never leave zero."""
    param = torch.zeros(1, RUN, requires_grad=True)
    optimizer = Amos([param], 1e-4, sigma=1.0, momentum=0.9, momentum_dtype=I8, moments="row", fused=fused)
    param.grad = torch.full((1, RUN), 0.01)
    param.grad[0, 0] = 1
    for _ in range(200):
        optimizer.step()
    momentum = optimizer.state_dict()["state"][0]["momentum"][0]
    assert float(momentum[1:].mean() / momentum[0]) == pytest.approx(0.01, rel=0.1)
    moved = param.detach()[0]
    assert float(moved[1:].mean() / moved[0]) == pytest.approx(0.01, rel=0.05)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "master"), [(F32, False), (BF16, False), (BF16, True), (F16, False), (F16, True)])
def test_follows_the_reference(dtype: torch.dtype, kind: str, master: bool, fused: bool) -> None:
    """0-d to 5-d, odd sizes, runs over many rows and rows of many runs."""
    params = parameters(dtype)
    optimizer = Amos(params, moments=kind, master_weights=master, fused=fused, **KEYWORDS)
    follow(optimizer, params, tolerance=TOLERANCES[dtype])
    for param in params:
        assert optimizer.state[param]["momentum"].dtype == I8


@pytest.mark.parametrize("scale", [1e-36, 1e-28, 1e15, 0.0])
@pytest.mark.parametrize("fused", [True, False])
def test_tiny_and_huge_values(fused: bool, scale: float) -> None:
    """The step is lr sigma times about 1, so sigma says how large momentum is."""
    params = parameters(F32, [(3, 300), (40,)])
    with torch.no_grad():
        for param in params:
            param.mul_(scale)
    optimizer = Amos(params, **(KEYWORDS | {"sigma": max(scale, 1e-36)}), fused=fused)
    follow(optimizer, params, (lambda t: [torch.zeros_like(p) for p in params]) if scale == 0 else None)


def test_float64_stays() -> None:
    params = parameters(torch.float64)
    optimizer = Amos(params, **KEYWORDS)
    follow(optimizer, params)
    assert {state["momentum"].dtype for state in optimizer.state.values()} == {torch.float64}


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_skipped_changes_nothing(fused: bool) -> None:
    param, optimizer = stepped(fused=fused)
    before = copy.deepcopy(dict(optimizer.state[param]))
    param.grad = torch.full_like(param, float("nan"))
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[param].items())


def test_a_gradient_that_is_not_finite_shows() -> None:
    """With on_nonfinite="ignore" a NaN reaches the momentum of its run, as it does in other dtypes."""
    param, optimizer = stepped(on_nonfinite="ignore", moments="full")
    grad = torch.ones_like(param)
    grad.view(-1)[300] = float("nan")
    param.grad = grad
    optimizer.step()
    wide = optimizer.state_dict()["state"][0]["momentum"].view(-1)
    assert wide[256:512].isnan().all() and wide[:256].isfinite().all() and wide[512:].isfinite().all()


def test_door() -> None:
    """One vector of scales for each tensor, long enough; none without momentum in 8 bits."""
    case = make_case(2, ("factored",), momentum_dtype=I8, cut=False)
    *arguments, _, scale = case.arguments("step_")
    for bad, message in (
        (None, "scale: expected 2 tensors, got 0"),
        (scale[:1], "scale: expected 2 tensors, got 1"),
        ([scale[0], scale[1][:-1]], r"scale\[1\] 'b': expected at least"),
        ([scale[0], scale[1].double()], r"scale\[1\] 'b': expected contiguous float32"),
    ):
        before = case.clone()
        with pytest.raises(RuntimeError, match=message):
            native.step_(*arguments, None, bad)
        assert all(map(torch.equal, case.changed(), before.changed()))
    case = make_case(2, ("factored",), momentum_dtype=F32, cut=False)
    with pytest.raises(RuntimeError, match="scale: expected 0 tensors, got 2"):
        native.step_(*case.arguments("step_"), None, scale)


# ---- memory and checkpoints ------------------------------------------------------------------------------------------


def stepped(steps: int = 3, shape: tuple[int, ...] = (5, 300), **given: Any) -> tuple[Tensor, Amos]:
    param = randn(1, *shape).requires_grad_()
    optimizer = Amos([param], **(KEYWORDS | given))
    more(optimizer, param, range(steps))
    return param, optimizer


def more(optimizer: Amos, param: Tensor, steps: Iterable[int]) -> None:
    for t in steps:
        param.grad = randn(100 + t, *param.shape)
        optimizer.step()


def test_a_byte_and_a_scale() -> None:
    param, optimizer = stepped(shape=(64, 512), moments="row")
    state = optimizer.state[param]
    assert state["momentum"].nbytes == param.numel() and state["momentum_scale"].nbytes == 4 * param.numel() // 256
    total = state["momentum"].nbytes + state["momentum_scale"].nbytes
    assert total == pytest.approx(param.nbytes / 4, rel=0.016)


@pytest.mark.parametrize("shape", [(5, 300), (), (700,), (0, 3)])
def test_resumes_bit_for_bit(shape: tuple[int, ...]) -> None:
    """Through a file, in which momentum is float32."""
    param, optimizer = stepped(shape=shape)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert {key: saved["state"][0][key].dtype for key in saved["state"][0]}["momentum"] == F32
    assert "momentum_scale" not in saved["state"][0]
    again = param.detach().clone().requires_grad_()
    resumed = Amos([again], **KEYWORDS)
    resumed.load_state_dict(saved)
    kept = resumed.state_dict()["state"][0]["momentum"]  # before a step has made 8 bits of it
    assert torch.equal(kept, saved["state"][0]["momentum"])
    for each, its in ((optimizer, param), (resumed, again)):
        more(each, its, range(3, 6))
    assert torch.equal(param, again)
    for key, value in optimizer.state[param].items():
        assert torch.equal(value, resumed.state[again][key]), key


def test_the_same_seed_gives_the_same_bits() -> None:
    runs_of_one = [stepped()[0] for _ in range(2)]
    assert torch.equal(*runs_of_one)
    assert not torch.equal(runs_of_one[0], stepped(seed=5)[0])


def test_to_other_dtypes_and_back() -> None:
    """A checkpoint of float32 or bfloat16 momentum is taken, and the other way round; so is a setting that changes."""
    param, optimizer = stepped()
    wide = optimizer.state_dict()["state"][0]["momentum"].clone()
    for dtype in (F32, I8, BF16, I8):
        optimizer.param_groups[0]["momentum_dtype"] = dtype
        optimizer._plan([param])  # what a step begins with
        state = optimizer.state[param]
        assert state["momentum"].dtype == dtype and ("momentum_scale" in state) == (dtype == I8)
        bound = {F32: 0.0, BF16: 2**-8, I8: 2**-7}[dtype] * float(wide.abs().max())
        assert float((optimizer.state_dict()["state"][0]["momentum"].float() - wide).abs().max()) <= bound
    more(optimizer, param, range(3, 5))
    assert torch.isfinite(param).all()


def test_universal_checkpoints_stay_in_float32() -> None:
    """A plane of zeros would fit into any dtype."""
    assert _narrowed(torch.zeros(3), I8).dtype == F32


def test_full_state_and_copies() -> None:
    param, optimizer = stepped()
    wide = optimizer.state_dict()["state"][0]["momentum"]
    assert torch.equal(checkpoint.full_state(optimizer)["param[0]"]["momentum"], wide)
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    for each, its in ((optimizer, param), (twin, other)):
        more(each, its, range(3, 5))
    assert torch.equal(param, other)


def test_scales_that_do_not_fit_are_refused() -> None:
    param, optimizer = stepped()
    optimizer.state[param]["momentum_scale"] = torch.zeros(3)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"'momentum_scale' of 'param\[0\]' has 3 entries, expected 6. Load what"):
        more(optimizer, param, [3])
    assert torch.equal(param, before)


# ---- cut -------------------------------------------------------------------------------------------------------------


def test_rows_cut_between_runs_are_the_whole() -> None:
    """Ranks whose rows begin at a multiple of 256 elements have the whole's very bits."""
    values, pieces = randn(1, 8, 128).view(-1), [Piece(0, 8, 128, 0, 512), Piece(0, 8, 128, 512, 512)]
    levels, scale = runs.narrowed(values, [Piece(0, 8, 128, 0, 1024)])
    parts = [runs.narrowed(values[piece.start : piece.start + piece.length], [piece]) for piece in pieces]
    assert torch.equal(torch.cat([part[0] for part in parts]), levels)
    assert torch.equal(torch.cat([part[1] for part in parts]), scale)


@pytest.mark.parametrize("at_once", [runs.AT_ONCE, RUN])
def test_pieces_of_a_partition(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin anew at the end of a row, at whole rows and at the beginning of a row; padding is zero."""
    monkeypatch.setattr(runs, "AT_ONCE", at_once)
    pieces = [Piece(0, 5, 300, 250, 900, 0), Piece(1, 1, 10, 0, 10, 900)]
    assert runs.scale_count(pieces) == 1 + 3 + 1 + 1  # 50, 600, 250, 10
    values = randn(1, 920)
    values[910:] = 0
    levels, scale = runs.narrowed(values, pieces)
    wide = runs.widened(levels, scale, pieces)
    unit = torch.cat([part.repeat(n) for part, n in zip(scale.split(1), (50, 256, 256, 88, 250, 10), strict=True)])
    assert ((wide[:910] - values[:910]).abs() <= unit / 2 * 1.01).all() and not wide[910:].any()
    assert [float(part.abs().max()) for part in levels.split((50, 256, 256, 88, 250, 10, 10))] == [127] * 6 + [0]


def test_kernels_are_told_where_the_runs_of_each_block_begin() -> None:
    pieces = [Piece(0, 5, 300, 600, 900, 0), Piece(1, 1, 10, 0, 10, 900), Piece(2, 2, 300, 0, 600, 910)]
    member = Member(torch.empty(1510), {}, Layout(pieces), "partition", I8, fused=False, capturable=False, master=False)
    (launch,) = Plan([member], {0: "row", 1: "row", 2: "factored"}, agreed=True).launches
    assert launch.local.table(None)[:, 16].tolist() == [0, 4, 5]
    assert runs.scale_count(pieces) == 8


@pytest.mark.parametrize("border", [700, 77, 900])
def test_a_cut_parameter_is_within_the_rounding_of_the_whole(border: int) -> None:
    """Each step rounds momentum by less than a scale, and of that the next one keeps mu: so it stays within
    1 / (1 - mu) scales of what is not rounded, cut or not, and a parameter within that of each step."""
    steps, mu, start = 12, 0.9, randn(1, 6, 300)
    outcomes = []
    for borders in ((0, 1800), (0, border, 1800)):
        theta, wide, largest = start.clone().view(-1), torch.zeros(1800), 0.0
        pieces = [Piece(0, 6, 300, a, b - a, a) for a, b in itertools.pairwise(borders)]
        levels = [torch.zeros(piece.length, dtype=I8) for piece in pieces]
        scales = [torch.zeros(runs.scale_count([piece])) for piece in pieces]
        for t in range(1, steps + 1):
            grad = randn(50 + t, 1800)
            for piece, q, s in zip(pieces, levels, scales, strict=True):
                part = slice(piece.start, piece.start + piece.length)
                table, run = [], 0
                for block in piece.blocks():
                    fields = [0, block.offset, block.rows, block.cols, 1, 300, 6, 0, 0, 0, 0, 0, block.column, 300]
                    table.append([*fields, 0, piece.start + block.offset, run])
                    run += runs.run_count(block.rows * block.cols)
                work = torch.cat([torch.full((1, 300), 0.01), torch.zeros(2, 300)])  # A and B of each column
                hyper = [0.1, 1, 0.9, t, mu, float("inf"), 0, 0, 0, 2.0**-125, 1, -8]
                names = torch.tensor([97], dtype=torch.uint8)
                native.update_(
                    [theta[part]], [grad[part].clone()], [q], [], work, torch.tensor(table),
                    torch.tensor([hyper], dtype=torch.float64), names, None, [s],
                )  # fmt: skip
                wide[part] = runs.widened(q, s, [Piece(0, 6, 300, piece.start, piece.length)])
                largest = max(largest, float(s.max()))
        outcomes.append((theta, wide, largest))
    (theta, wide, scale), (cut_theta, cut_wide, cut_scale) = outcomes
    bound = (scale + cut_scale) / (1 - mu)
    assert 0 < float((wide - cut_wide).abs().max()) <= bound
    assert 0 < float((theta - cut_theta).abs().max()) <= steps * bound
    assert float((theta - cut_theta).abs().max()) < 0.02 * float((theta - start.view(-1)).abs().max())


def test_setting() -> None:
    with pytest.raises(ValueError, match=r"momentum_dtype='int4' is not supported\. Use 'float32', 'bfloat16', 'int8'"):
        Amos([torch.ones(2, requires_grad=True)], 0.1, momentum_dtype="int4")


def test_gradients_are_of_all_sizes() -> None:
    """What the tests above train with has rows of very different sizes in a run."""
    grad = gradients(parameters(F32))(1)[6]
    assert grad is not None and float(grad[0].abs().max()) * 20 < float(grad[-1].abs().max())
