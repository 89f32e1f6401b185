"""The CUDA kernels, run on the CPU, against float64 numpy."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import (
    ADDED_TO,
    HERE,
    MOMENTS,
    PAIRS,
    SOURCE,
    Call,
    CBlock,
    Piece,
    Problem,
    Types,
    assert_close,
    check,
    compile_for_cpu,
    environment,
    run_pieces,
)
from numpy_reference import Hyper

# Both sides of every border: lanes for a row or a column, thread, warp and CTA rows, tiles and chunks, one and several
# parts, and parts of one row that a warp or a CTA adds up.
MATRICES = [(1, 1), (3, 7), (5, 255), (33, 768), (130, 300), (2, 5000), (1, 40000), (700, 1), (70, 1030)]
MATRICES += [(9, 16), (20, 17), (2100, 3), (300, 40), (2, 2049), (3, 4097), (2, 8200), (1, 16384)]
CUTS = [
    (3, 7, (4,)),
    (3, 7, (2, 5)),
    (5, 255, (100, 400, 900)),
    (130, 300, (4567,)),
    (4, 600, (250, 700, 701)),
    (70, 3, (50, 100)),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path: Path = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    flags = ["-O1", "-fPIC", "-shared", '-DAMOS_CUDA_ARCHS="none;cpu"']
    loaded = ctypes.CDLL(str(compile_for_cpu(path, SOURCE, HERE / "capi.cpp", flags=flags)))
    for name in ("scratch_bytes", "block_bytes", "launches"):
        getattr(loaded, f"amos_{name}").restype = ctypes.c_int64
    loaded.amos_error_string.restype = loaded.amos_architectures.restype = ctypes.c_char_p
    assert loaded.amos_block_bytes() == ctypes.sizeof(CBlock)
    return loaded


@pytest.fixture(params=[False, True], ids=["", "norms"])
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without and with the norms that a monitor asks for."""
    monkeypatch.setattr(Problem, "watched", request.param)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("way", ["step", "phases"])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("momentum", ["f32", "i8"])
def test_matrices(library: ctypes.CDLL, momentum: str, way: str, moments: str) -> None:
    pieces = [Piece(Problem(moments, *shape, Types(momentum=momentum))) for shape in MATRICES]
    Call(library, pieces).run(way)
    for piece in pieces:
        check(piece)


TYPES = [Types(param, grad, momentum) for param, grad in PAIRS for momentum in (None, "bf16")]
TYPES += [Types("f64", "f64", "f64"), Types("f32", "f32", "f32"), Types("bf16", "bf16", "f32")]
TYPES += [Types("f32", grad, "f32", low=True) for grad in ("bf16", "f16")]
TYPES += [Types("f32", "bf16", None, low=True)]
TYPES += [Types(param, grad, "i8") for param, grad in PAIRS if param != "f64"] + [Types("f32", "bf16", "i8", low=True)]


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(map(str, dataclasses.astuple(types))))
def test_dtypes(library: ctypes.CDLL, types: Types) -> None:
    """Among them the new parameter in the gradient's dtype, low_param."""
    shapes = [(7, 96), (5, 61), (40, 1), (2, 2056)]
    for way in ("step", "phases"):
        pieces = [Piece(Problem(moments, rows, cols, types)) for moments in MOMENTS for rows, cols in shapes]
        Call(library, pieces, align=8).run(way)
        for piece in pieces:
            check(piece)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("way", ["step", "phases"])
def test_stochastic_rounding(library: ctypes.CDLL, way: str, offset: int) -> None:
    """The very bits of the reference, beyond element 2**32 too; parameters without a seed among them."""
    pieces = []
    for moments in MOMENTS:
        for number, (rows, cols) in enumerate([(40, 1), (9, 40), (3, 1061), (2, 2048)]):
            hyper = Hyper(seed=[0.0, 12345.0, -1.0, 2.0**32 - 1][number], t=[1.0, 1000.0][number % 2])
            problem = Problem(moments, rows, cols, Types("bf16", "bf16", "f32"), hyper)
            problem.first = 2**32 - 30 if number == 1 else 3 * 2**33 * number
            problem.grad[0, 0] = np.nan if number == 3 else 0
            pieces.append(Piece(problem, offsets=(offset, offset, 4, 0)))
    Call(library, pieces).run(way)
    for piece in pieces:
        check(piece)
        if np.isnan(piece.problem.grad).any():
            assert piece.param.bytes.view(np.uint16)[0] == 0x7FC0


def test_stochastic_rounding_only_of_bfloat16(library: ctypes.CDLL) -> None:
    for types in (Types("f32", "bf16", low=True), Types("f16", "f16")):
        piece = Piece(Problem("row", 5, 100, types, Hyper(seed=7.0)))
        Call(library, [piece]).run("step")
        check(piece)


def test_pieces_are_rounded_like_the_whole(library: ctypes.CDLL) -> None:
    problem = Problem("row", 9, 70, Types("bf16", "bf16"), Hyper(seed=99.0))
    for piece in run_pieces(library, problem, (100, 333)):
        check(piece)


@pytest.mark.parametrize("way", ["step", "phases"])
def test_hypers_on_the_device(library: ctypes.CDLL, way: str) -> None:
    """The same bits, and those of the numbers that are there when the kernels run."""
    results = []
    for on_device in (False, True):
        pieces = []
        for i, moments in enumerate(MOMENTS * 30):
            problem = Problem(moments, 3, 20, Types("bf16", "bf16", "f32"), Hyper(lr=0.1 + i / 100, seed=float(i)), i)
            pieces.append(Piece(problem))
        Call(library, pieces, on_device=on_device).run(way)
        for piece in pieces:
            check(piece)
        results.append([tensor.bytes.tobytes() for piece in pieces for tensor in piece.tensors()])
    assert results[0] == results[1]


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("shared", [5 * 1024, 64 * 1024])
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (1, 1, 1, 0), (0, 1, 0, 0)])
def test_long_rows(library: ctypes.CDLL, shared: int, offsets: tuple[int, ...]) -> None:
    """Rows beyond registers: in shared memory, or as much of them as fits, with arrays that fit each other and not."""
    with environment(SHIM_SHARED=str(shared)):
        piece = Piece(Problem("row", 64, 4101, Types("f64", "f64", "f64")), offsets=offsets)
        Call(library, [piece]).run("step")
        check(piece)


@pytest.mark.usefixtures("watched")
def test_long_rows_of_half_the_width(library: ctypes.CDLL) -> None:
    for types in (Types("f32", "bf16", "bf16", low=True), Types("bf16", "bf16")):
        piece = Piece(Problem("row", 64, 16500, types, Hyper(seed=5.0)))
        Call(library, [piece]).run("step")
        check(piece)


@pytest.mark.parametrize(
    "hyper",
    [
        Hyper(clip=0.3),
        Hyper(extra_l2=0.0),
        Hyper(extra_l2=0.5),
        Hyper(grad_sign=-1.0),
        Hyper(eps=0.5),
        Hyper(c_coef=2.0, d_coef=0.0),
        Hyper(c_coef=0.0, d_coef=3.0),
        Hyper(momentum=0.0),
        Hyper(lr=0.01, sigma=2.0, beta=0.999, t=1.0, clip=0.1, grad_sign=-1.0),
    ],
)
def test_options(library: ctypes.CDLL, hyper: Hyper) -> None:
    pieces = [Piece(Problem(moments, 6, 40, Types(momentum="f32"), hyper)) for moments in MOMENTS]
    for way in ("step", "phases"):
        pieces = [Piece(piece.problem) for piece in pieces]
        Call(library, pieces).run(way)
        for piece in pieces:
            check(piece)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize(
    "offsets", [(1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 0, 3), (0, 1, 0, 0), (4, 12, 4, 8), (1, 5, 1, 2), (9, 5, 13, 1)]
)
@pytest.mark.parametrize(
    "types",
    [
        Types("f32", "f32", "f32"),
        Types("f32", "bf16", "bf16", low=True),
        Types("bf16", "bf16", "f32"),
        Types("f32", "bf16", "i8", low=True),
    ],
)
def test_unaligned(library: ctypes.CDLL, types: Types, offsets: tuple[int, ...], align: int) -> None:
    """Vectors must begin where all arrays allow them: the emulation stops at a misaligned access."""
    for way in ("step", "phases"):
        pieces = [Piece(Problem(moments, 3, cols, types), offsets=offsets) for moments in MOMENTS for cols in (64, 61)]
        pieces += [Piece(Problem("row", 5, cols, types), offsets=offsets) for cols in (9, 1031)]
        Call(library, pieces, align).run(way)
        for piece in pieces:
            check(piece)


# Launches that do not depend on the number of tensors.
LAUNCHES = {"step": 8, "sums": 3, "slots": 2, "update": 1}


@pytest.mark.parametrize("on_device", [False, True])
def test_many_tensors(library: ctypes.CDLL, on_device: bool) -> None:
    """The table takes several uploads; the rest is launched once. Every kind, and hyper-parameters for each."""
    random = np.random.default_rng(1)
    kinds = [("factored", (8, 40)), ("row", (4, 1)), ("row", (3, 30)), ("column", (4, 4)), ("row", (1, 1100))]
    counts = {}
    for n in (5, 2000):
        pieces = []
        for i in range(n):
            moments, most = kinds[i % 5]
            shape = most if i < 5 or i % 200 == 0 else (int(random.integers(1, most[0] + 1)), min(most[1], i % 19 + 1))
            problem = Problem(moments, *shape, hyper=Hyper(lr=0.1 + 0.0001 * i, extra_l2=0.0), seed=i)
            pieces.append(Piece(problem))
        with environment(SHIM_SMS="2"):
            call = Call(library, pieces, on_device=on_device)
            before = library.amos_launches()
            call.phase("step")
            counts[n] = library.amos_launches() - before
        for piece in pieces:
            check(piece)
    most_bytes = 2000 * (200 + 8 * LAUNCHES["step"] + (0 if on_device else 64))
    assert counts[5] == LAUNCHES["step"] + 1 + on_device
    assert LAUNCHES["step"] + 10 < counts[2000] <= LAUNCHES["step"] + most_bytes // 32000 + 2 + on_device


def test_launches_of_the_phases(library: ctypes.CDLL) -> None:
    call = Call(library, [Piece(Problem(moments, 3, 5000)) for moments in MOMENTS])
    call.zero_columns()
    for phase in ("sums", "slots", "update"):
        before = library.amos_launches()
        call.phase(phase)
        assert library.amos_launches() - before == LAUNCHES[phase] + 1


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("rows", "cols", "borders"), CUTS)
def test_pieces_equal_the_whole(
    library: ctypes.CDLL, moments: str, rows: int, cols: int, borders: tuple[int, ...]
) -> None:
    """Ranges that begin and end inside rows: up to three blocks of one parameter share its columns."""
    problem = Problem(moments, rows, cols, Types(momentum="f32"))
    whole = Piece(problem)
    Call(library, [whole]).run("phases")
    pieces = run_pieces(library, problem, borders)
    for piece in pieces:
        check(piece)
    cut = np.concatenate([piece.param.values for piece in pieces])
    assert np.abs(cut - whole.param.values).max() <= 1e-6 * np.abs(whole.param.values).max()


@pytest.mark.parametrize("way", ["step", "phases"])
def test_norms_change_nothing(library: ctypes.CDLL, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of everything else are those of a step that nobody watches; and in every order of the blocks."""
    shapes = [*MATRICES, (64, 4101)]
    for types in (Types("f64", "f64", "f64"), Types("bf16", "bf16", "bf16")):
        results = []
        for watched, order in ((False, "fwd"), (True, "fwd"), (True, "rev")):
            monkeypatch.setattr(Problem, "watched", watched)
            pieces = [Piece(Problem(moments, *shape, types)) for moments in MOMENTS for shape in shapes]
            with environment(SHIM_ORDER=order, SHIM_SMS="2"):
                Call(library, pieces).run(way)
            results.append([[t.bytes.tobytes() for t in p.tensors() if t is not p.norms] for p in pieces])
            if watched:
                results[-1] += [p.norms.bytes.tobytes() for p in pieces if p.norms]
        assert results[1][: len(results[0])] == results[0]
        assert results[1] == results[2]


def test_norms_of_neighbours_go_to_one_place(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that follow each other, of whatever kind, may share a row of numbers."""
    monkeypatch.setattr(Problem, "watched", True)
    pieces = [Piece(Problem(moments, 3, 40)) for moments in MOMENTS]
    call = Call(library, pieces)
    for block in call.blocks:
        block.norms = pieces[0].norms.pointer
    call.run("step")
    expected = sum(piece.problem.norms(0, 120) for piece in pieces)
    assert_close(pieces[0].norms.values - ADDED_TO, expected, "f32", "norms")


def test_columns_are_added_to(library: ctypes.CDLL) -> None:
    """`sums` assigns rows and adds to columns: what other calls left there stays."""
    problem = Problem("factored", 9, 50)
    piece = Piece(problem)
    call = Call(library, [piece])
    row_work, column_work = call.layout[0]
    call.work.set(np.full(3 * call.plane, 1000.0))
    call.phase("sums")
    squares = problem.grad**2
    assert_close(call.work.values[row_work : row_work + 9], squares.sum(1), "f32", "rows")
    assert_close(call.work.values[column_work : column_work + 50], squares.sum(0) + 1000, "f32", "columns")
    others = np.delete(call.work.values, [*range(row_work, row_work + 9), *range(column_work, column_work + 50)])
    assert (others == 1000).all()


@pytest.mark.parametrize("way", ["step", "phases"])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("shape", [(5, 40), (1, 33000), (30, 1)])
def test_zero_gradient_changes_nothing(library: ctypes.CDLL, way: str, moments: str, shape: tuple[int, int]) -> None:
    """At t = 1 with a new state, where v, b and the sums are all zero."""
    problem = Problem(moments, *shape, hyper=Hyper(beta=0.999, t=1.0, extra_l2=0.0))
    problem.grad = np.zeros(shape)
    for entries in (problem.state.row_moment, problem.state.column_moment, problem.state.decay):
        entries[:] = 0
    piece = Piece(problem)
    Call(library, [piece]).run(way)
    assert (piece.param.values == problem.theta.ravel()).all()
    assert (piece.decay.values == 0).all()


@pytest.mark.parametrize("moments", MOMENTS)
def test_zero_rows_and_columns(library: ctypes.CDLL, moments: str) -> None:
    """Rows and columns that never saw a gradient, in a matrix that has."""
    problem = Problem(moments, 8, 70, hyper=Hyper(extra_l2=0.0))
    problem.grad[:, [0, 31, 69]] = 0
    problem.grad[[2, 7]] = 0
    problem.state.row_moment[[2, 7]] = 0
    problem.state.column_moment[[0, 31, 69]] = 0
    for way in ("step", "phases"):
        piece = Piece(problem)
        Call(library, [piece]).run(way)
        assert np.isfinite(piece.param.values).all()
        check(piece)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("moments", ["row", "column"])
def test_bad_gradient_stays_in_its_entry(library: ctypes.CDLL, moments: str, bad: float) -> None:
    """A NaN or an infinity reaches what shares a moment with it, and nothing else; it is not hidden by clipping."""
    hyper = Hyper(clip=0.5) if np.isnan(bad) else Hyper()
    problem = Problem(moments, 6, 50, hyper=hyper)
    problem.grad[3, 20] = bad
    for way in ("step", "phases"):
        piece = Piece(problem)
        Call(library, [piece]).run(way)
        theta = piece.param.values.reshape(6, 50)
        hit = np.zeros((6, 50), bool)
        hit[(3, slice(None)) if moments == "row" else (slice(None), 20)] = True
        assert np.isnan(theta[3, 20])
        assert np.isfinite(theta[~hit]).all()
        if np.isnan(bad):
            assert np.isnan(theta[hit]).all()
            check(piece)


def test_orders_and_grids_give_the_same_bits(library: ctypes.CDLL) -> None:
    """Threads and CTAs in any order, and any number of CTAs."""
    problems = [
        Problem(moments, *shape) for moments in MOMENTS for shape in [(130, 600), (1, 34000), (40, 1), (9, 1030)]
    ]
    results = []
    for order, sms in (("fwd", "1"), ("rev", "1"), ("7", "2")):
        with environment(SHIM_ORDER=order, SHIM_SMS=sms):
            for way in ("step", "phases"):
                pieces = [Piece(problem) for problem in problems]
                Call(library, pieces).run(way)
                cut = run_pieces(library, problems[8], (700, 40000))
                results.append((way, [t.bytes.tobytes() for piece in [*pieces, *cut] for t in piece.tensors()]))
    for way, result in results[2:]:
        assert result == dict(results[:2])[way]


@pytest.mark.usefixtures("watched")
def test_empty_blocks(library: ctypes.CDLL) -> None:
    """Blocks without elements, alone and among others, touch nothing, not even the columns."""
    full, empty = Piece(Problem("factored", 4, 30)), Piece(Problem("factored", 4, 30))
    call = Call(library, [empty, full])
    call.blocks[0].rows = 0
    call.run("step")
    check(full)
    assert (empty.column_moment.values == empty.problem.state.column_moment).all()
    call.n = 1
    for name in ("step", "sums", "slots", "update"):
        call.phase(name)
    call.n = 0
    for name in ("step", "sums", "slots", "update"):
        call.phase(name)


@pytest.mark.usefixtures("watched")
def test_blocks_without_momentum_among_others(library: ctypes.CDLL) -> None:
    types = Types(momentum="f32")
    pieces = [Piece(Problem(moments, 5, 37, types)) for moments in MOMENTS for _ in range(2)]
    for piece in pieces[::2]:
        piece.momentum = piece.problem.state.momentum = None
    Call(library, pieces).run("step")
    for piece in pieces:
        check(piece)


@pytest.mark.parametrize("shape", [(40, 1), (5, 300), (3, 2000), (2, 33000), (1, 16400)])
def test_step_keeps_rows_out_of_the_workspace(library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    """Rows of `row` have no place there in `step`, however long they are: few long ones use the scratch memory."""
    piece = Piece(Problem("row", *shape))
    call = Call(library, [piece])
    call.blocks[0].row_work = 2**40
    before = call.work.raw.copy()
    call.run("step")
    check(piece)
    assert (call.work.raw == before).all()


def test_errors(library: ctypes.CDLL) -> None:
    """Types that no kernel was built for are an error, and change nothing."""
    piece = Piece(Problem("row", 3, 4))
    call = Call(library, [piece])
    call.types = dataclasses.replace(call.types, param="f64", grad="bf16")
    with pytest.raises(AssertionError, match="invalid argument"):
        call.phase("step")
    assert (piece.param.values == piece.problem.theta.ravel()).all()
    assert library.amos_architectures() == b"none;cpu"
