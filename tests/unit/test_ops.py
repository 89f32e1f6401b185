"""torch.ops.amos_dist: well-formed for torch, equal to plain torch for any table, and checked at the door."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amos_dist import fallback
from amos_dist.ops import OPS

from ..conftest import TOLERANCES, relative_error
from .compare import KINDS
from .tables import Case, make_case

native = torch.ops.amos_dist
F32, F64, BF16, F16, I8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8
TYPES = [  # parameter, gradient, momentum
    (F64, F64, None), (F64, F64, F64), (F32, F32, None), (F32, F32, F32), (F32, F32, BF16), (F32, BF16, F32),
    (F32, F16, None), (BF16, BF16, F32), (BF16, BF16, BF16), (F16, F16, None), (F16, F16, F32),
    (F32, F32, I8), (F32, BF16, I8), (BF16, BF16, I8), (F16, F16, I8),
]  # fmt: skip


@pytest.mark.parametrize("momentum", [None, F32, I8])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, momentum: torch.dtype | None) -> None:
    case = make_case(1, ("factored", "row", "column"), momentum_dtype=momentum, cut=False)
    torch.library.opcheck(getattr(native, op).default, case.arguments(op))


# ---- native equals plain torch -----------------------------------------------------------------------------


def assert_alike(a: Case, b: Case, types: tuple[Any, ...]) -> None:
    for x, y in zip(a.changed(), b.changed(), strict=True):
        if x.dtype == I8:  # where the last bit of float32 decides
            assert int((x.short() - y.short()).abs().max()) <= 1 and float((x != y).float().mean()) < 0.01
            continue
        low = x.dtype in (BF16, F16)
        bound = TOLERANCES[x.dtype].param if low else TOLERANCES[types[0]].state
        assert relative_error(x, y) <= (2e-5 if BF16 in types and not low else bound)


@pytest.mark.parametrize("types", TYPES, ids=lambda ts: "-".join(str(t).removeprefix("torch.") for t in ts))
@pytest.mark.parametrize("seed", range(6))
def test_phases_of_cut_pieces(seed: int, types: tuple[Any, ...]) -> None:
    """Pieces with the end of a row, whole rows and the start of a row; both backends after every phase."""
    case = make_case(seed, ("factored", "row", "column"), *types)
    twin = case.clone()
    for op in ("sums_", "slots_", "update_"):
        getattr(native, op)(*case.arguments(op))
        getattr(fallback, op)(*twin.arguments(op))
        if op == "sums_":  # what travels between ranks
            torch.testing.assert_close(case.work, twin.work, rtol=1e-12 if types[0] == F64 else 2e-6, atol=0)
        assert_alike(case, twin, types)


@pytest.mark.parametrize("types", TYPES, ids=lambda ts: "-".join(str(t).removeprefix("torch.") for t in ts))
@pytest.mark.parametrize("seed", range(4))
def test_step_of_whole_parameters(seed: int, types: tuple[Any, ...]) -> None:
    """step_ equals plain torch, and equals its own three phases to the bit."""
    case = make_case(seed, ("factored", "row", "column"), *types, cut=False)
    twin, phases = case.clone(), case.clone()
    native.step_(*case.arguments("step_"))
    fallback.step_(*twin.arguments("step_"))
    assert_alike(case, twin, types)
    for op in ("sums_", "slots_", "update_"):
        getattr(native, op)(*phases.arguments(op))
    assert all(map(torch.equal, case.changed(), phases.changed()))


def test_sums_of_long_rows() -> None:
    """Rows beyond a chunk of the kernels, whole and as a single long one, against float64."""
    for rows, cols in [(1, 100_003), (3, 9001), (5000, 3)]:
        case = make_case(3, ("row",), cut=False)
        grad = torch.linspace(-1, 1, rows * cols)
        work = torch.zeros(3, rows)
        fields = [0, 0, rows, cols, 0, cols, rows, *[0] * 10]
        hyper = case.hyper[:1].clone()
        hyper[0, 5] = float("inf")
        native.sums_([grad], work, torch.tensor([fields]), hyper, case.names)
        assert relative_error(work[0], grad.view(rows, cols).double().square().sum(1)) <= 1e-6


def test_kinds_have_codes() -> None:
    from amos_dist.tables import CODES

    assert set(CODES) == set(KINDS)


# ---- at the door -------------------------------------------------------------------------------------------


def edit(case: Case, **changes: Callable[[Any], Any]) -> Case:
    for key, change in changes.items():
        setattr(case, key, change(getattr(case, key)))
    return case


def second(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda tensors: [tensors[0], change(tensors[1])]


def field(index: int, value: int) -> Callable[[Any], Any]:
    def change(blocks: torch.Tensor) -> torch.Tensor:
        blocks = blocks.clone()
        blocks[-1, index] = value
        return blocks

    return change


def gaps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], 1)[:, 0]


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "param dtype": (
        {"param": second(lambda x: x.double())},
        r"param\[1\] 'b': expected contiguous float32, got float64",
    ),
    "param int": (
        {"param": lambda ts: [t.int() for t in ts]},
        r"param\[0\] 'a': expected float64, float32, .*got another",
    ),
    "param double": (
        {"param": lambda ts: [t.double() for t in ts]},
        r"param\[0\] 'a': expected .*float32, got float64",
    ),
    "param strides": ({"param": second(gaps)}, r"param\[1\] 'b': expected contiguous float32, got non-contiguous"),
    "param small": (
        {"param": second(lambda x: x[:-1])},
        r"param\[1\] 'b': expected at least \d+ elements from number \d+ on, got \d+",
    ),
    "param list": ({"param": lambda ts: ts[:1]}, r"param: expected 2 tensors, got 1"),
    "grad dtype": (
        {"grad": second(lambda x: x.bfloat16())},
        r"grad\[1\] 'b': expected contiguous float32, got bfloat16",
    ),
    "grad double": ({"grad": lambda ts: [t.double() for t in ts]}, r"grad\[0\] 'a': expected the parameter's dtype"),
    "grad strides": ({"grad": second(gaps)}, r"grad\[1\] 'b': expected contiguous"),
    "grad small": ({"grad": second(lambda x: x[:3])}, r"grad\[1\] 'b': expected at least"),
    "momentum dtype": ({"momentum": lambda ts: [t.half() for t in ts]}, r"momentum\[0\] 'a': expected float32 or"),
    "momentum list": ({"momentum": lambda ts: ts[:1]}, r"momentum: expected 2 tensors, got 1"),
    "momentum small": ({"momentum": second(lambda x: x[:3])}, r"momentum\[1\] 'b': expected at least"),
    "state dtype": ({"state": lambda x: x.double()}, r"state: expected a contiguous vector of float32"),
    "state small": ({"state": lambda x: x[:-1]}, r"blocks\[\d+\]: expected \d+ elements of state from number \d+ on"),
    "state before": ({"blocks": field(9, -1)}, r"blocks\[\d+\]: expected \d+ elements of state from number -1 on"),
    "low of float32": ({"low_param": lambda _: [torch.zeros(9)] * 2}, r"low_param\[0\] 'a': expected float32 param.*"),
    "work shape": ({"work": lambda w: w[:2]}, r"work: expected a contiguous tensor of shape \[3, n\]"),
    "work small": ({"work": lambda w: w[:, :3].contiguous()}, r"blocks.*beyond the workspace of 3 elements"),
    "work dtype": ({"work": lambda w: w.bfloat16()}, r"work: expected float32 or float64, got bfloat16"),
    "blocks dtype": (
        {"blocks": lambda b: b.int()},
        r"blocks: expected a contiguous int64 CPU tensor of shape \[n, 17\]",
    ),
    "blocks shape": ({"blocks": lambda b: b[:, :16].contiguous()}, r"blocks: expected a contiguous int64"),
    "hyper dtype": ({"hyper": lambda h: h.float()}, r"hyper: expected a contiguous float64 tensor"),
    "hyper fields": ({"hyper": lambda h: h[:, 1:]}, r"hyper: expected a contiguous float64 tensor of shape \[n, 12\]"),
    "hyper rows": ({"hyper": lambda h: h[1:]}, r"blocks\[\d+\]: a field is out of range"),
    "first element": ({"blocks": field(15, -1)}, r"blocks\[\d+\]: a field is out of range"),
    "no such tensor": ({"blocks": field(0, 2)}, r"blocks\[\d+\]: a field is out of range"),
    "before its start": ({"blocks": field(1, -1)}, r"param\[1\] 'b': expected at least"),
    "negative rows": ({"blocks": field(2, -1)}, r"blocks\[\d+\]: a field is out of range"),
    "no such moments": ({"blocks": field(4, 3)}, r"blocks\[\d+\]: a field is out of range"),
    "no columns": ({"blocks": field(5, 0)}, r"blocks\[\d+\]: a field is out of range"),
    "row place": ({"blocks": field(10, 10**6)}, r"blocks\[\d+\]: reaches beyond the workspace"),
    "part of a parameter": ({"blocks": field(13, 0)}, r"step_ takes parameters of one block"),
}


@pytest.mark.parametrize("what", BAD)
def test_door(what: str) -> None:
    changes, message = BAD[what]
    case = edit(make_case(2, ("factored",), momentum_dtype=F32, cut=False), **changes)
    before = case.clone()
    with pytest.raises(RuntimeError, match=message):
        native.step_(*case.arguments("step_"))
    assert all(map(torch.equal, case.changed(), before.changed()))


@pytest.mark.parametrize("what", ["grad small", "grad strides", "blocks dtype", "hyper rows", "work small"])
def test_door_of_sums(what: str) -> None:
    changes, message = BAD[what]
    case = edit(make_case(2, ("factored",)), **changes)
    with pytest.raises(RuntimeError, match=message):
        native.sums_(*case.arguments("sums_"))
    assert not case.work.any()


@pytest.mark.parametrize("op", OPS)
def test_nothing_to_do(op: str) -> None:
    case = make_case(2, ("factored",), cut=False)
    case.blocks, case.hyper = case.blocks[:0], case.hyper[:0]
    before = case.clone()
    getattr(native, op)(*case.arguments(op))
    assert all(map(torch.equal, case.changed(), before.changed()))


EMPTY_LIST = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import amos_dist
grad, work, hyper = torch.ones(1), torch.zeros(3, 1), torch.full((1, 12), 0.5, dtype=torch.float64)
blocks = torch.tensor([[0, 0, 1, 1, 0, 1, 1, *[0] * 10]])
try:
    torch.ops.amos_dist.update_([], [grad], [], [], work, blocks, hyper, torch.tensor([97], dtype=torch.uint8))
except RuntimeError as error:
    print(error)
"""


def test_empty_list_of_parameters() -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", EMPTY_LIST, root], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "param: expected 1 tensors, got 0" in done.stdout
