"""Builds the CUDA sources for the CPU, and hands them matrices, whole or cut into pieces as ranks hold them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy_reference import RUN, Array, Hyper, State, levels, round_stochastically, run_scales, step

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "csrc" / "cuda" / "kernels.cu"

# -fno-strict-aliasing: the kernels load vectors from arrays of other types, as CUDA allows.
FLAGS = [
    "-std=c++17",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}",
]

MOMENTS = ("row", "column", "factored")
DTYPES = ("f64", "f32", "bf16", "f16", "i8")
STORAGE = {"f64": np.float64, "f32": np.float32, "bf16": np.uint16, "f16": np.float16, "i8": np.int8}
ROUNDING = {"f64": 0.0, "f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}  # relative error of storing a number
PAIRS = [("f64", "f64")]
PAIRS += [("f32", grad) for grad in ("f32", "bf16", "f16")]
PAIRS += [("bf16", "bf16"), ("f16", "f16")]


def compile_for_cpu(output: Path, *sources: Path, flags: Sequence[str] = ()) -> Path:
    """Runs g++ on C++ and CUDA sources."""
    files = [argument for source in sources for argument in ("-x", "c++", str(source))]
    command = ["g++", *FLAGS, *flags, *files, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ failed: {' '.join(command)}\n{done.stderr[-4000:]}")
    return output


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables that the emulation reads at each launch."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- numbers ---------------------------------------------------------------------------------------------------------


def encode(x: Array, dtype: str) -> Array:
    """Rounds to a dtype; bf16 becomes its bits."""
    if dtype != "bf16":
        return x.astype(STORAGE[dtype])
    x32 = np.asarray(x, np.float32)
    bits = x32.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x32), np.uint16(0x7FC0), rounded)


def decode(x: Array, dtype: str) -> Array:
    """The float64 values of what `encode` gave."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if dtype == "bf16" else x.astype(np.float64)


class Tensor:
    """Memory with a guard on both sides, beginning `offset` elements behind a 64-byte border."""

    GUARD = 0xA5

    def __init__(self, values: Array, dtype: str, offset: int = 0) -> None:
        encoded = encode(np.asarray(values, np.float64).ravel(), dtype)
        size = encoded.itemsize
        raw = np.full(encoded.nbytes + 256 + size * offset, self.GUARD, np.uint8)
        begin = 64 + -raw.ctypes.data % 64 + size * offset
        self.raw, self.begin, self.end, self.dtype = raw, begin, begin + encoded.nbytes, dtype
        self.bytes = raw[begin : self.end]
        self.bytes[:] = encoded.view(np.uint8)
        self.pointer = raw.ctypes.data + begin

    @property
    def values(self) -> Array:
        """A copy, in float64."""
        return decode(self.bytes.view(STORAGE[self.dtype]), self.dtype)

    def set(self, values: Array) -> None:
        """Overwrites all values."""
        self.bytes[:] = encode(values, self.dtype).view(np.uint8)

    def check_guard(self) -> None:
        """Fails if something was written outside."""
        assert (self.raw[: self.begin] == self.GUARD).all(), "written before the beginning"
        assert (self.raw[self.end :] == self.GUARD).all(), "written behind the end"


# ---- structs of block.h ----------------------------------------------------------------------------------------------


class CHyper(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_double) for field in dataclasses.fields(Hyper)]


class CBlock(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "grad", "momentum", "scale", "low_param")),
        *((name, ctypes.c_void_p) for name in ("row_moment", "column_moment", "decay", "norms")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_count", "column_count", "row_work", "column_work")),
        *((name, ctypes.c_int64) for name in ("column_start", "columns", "first", "hyper")),
        ("moments", ctypes.c_int32),
    ]


class CHypers(ctypes.Structure):
    _fields_ = [("rows", ctypes.POINTER(CHyper)), ("count", ctypes.c_int64), ("on_device", ctypes.c_bool)]


class CTypes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("param", "grad", "momentum")]


class CWork(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("plane", ctypes.c_int64)]


# ---- problems --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Types:
    """The dtypes of a call; momentum None: no momentum; low: with a low_param in the gradient's dtype."""

    param: str = "f32"
    grad: str = "f32"
    momentum: str | None = None
    low: bool = False

    @property
    def compute(self) -> str:
        return "f64" if self.param == "f64" else "f32"

    def struct(self) -> CTypes:
        return CTypes(*(DTYPES.index(dtype or self.compute) for dtype in (self.param, self.grad, self.momentum)))


class Problem:
    """A matrix, its gradient and its state before a step, exactly representable in their dtypes."""

    first = 0  # number of the first element, for random numbers
    cut = False  # each row is a block
    watched = False  # norms are asked for

    def __init__(
        self, moments: str, rows: int, cols: int, types: Types = Types(), hyper: Hyper | None = None, seed: int = 0
    ) -> None:
        random = np.random.default_rng([seed, rows, cols, MOMENTS.index(moments)])
        self.moments, self.rows, self.cols, self.types, self.hyper = moments, rows, cols, types, hyper or Hyper()
        self.theta = self.rounded(random.standard_normal((rows, cols)), types.param)
        self.grad = self.rounded(random.standard_normal((rows, cols)), types.grad)
        # No two rows and no two columns alike, or mixing them up would not show.
        self.grad = self.rounded(
            self.grad * random.uniform(0.5, 2, (rows, 1)) * random.uniform(0.5, 2, cols), types.grad
        )
        entries = cols if moments == "column" else rows
        momentum = None
        if types.momentum == "i8":
            momentum = (random.integers(-31, 32, rows * cols) * self.scales()).reshape(rows, cols)
        elif types.momentum:
            momentum = self.rounded(random.standard_normal((rows, cols)), types.momentum)
        moment = {size: self.rounded(random.uniform(0.1, 2, size), types.compute) for size in (rows, cols)}
        self.state = State(moment[rows], moment[cols], self.rounded(random.random(entries), types.compute), momentum)

    @staticmethod
    def rounded(x: Array, dtype: str) -> Array:
        return decode(encode(x, dtype), dtype)

    def scales(self) -> Array:
        """Of 8-bit momentum, for each element: such that any run of it has a scale."""
        return 2.0 ** (np.arange(self.rows * self.cols) // RUN % 3) / 64

    @cached_property
    def expected(self) -> tuple[Array, State]:
        with np.errstate(all="ignore"):
            delta, state = step(self.theta, self.grad, self.state, self.moments, self.hyper)
            return self.theta - delta, state

    def norms(self, start: int, stop: int) -> Array:
        """The sums of squares of Delta and of the old parameter, over some elements."""
        with np.errstate(all="ignore"):
            delta, _ = step(self.theta, self.grad, self.state, self.moments, self.hyper)
            return np.array([np.square(x.ravel()[start:stop]).sum() for x in (delta, self.theta)])


POINTERS = ("param", "grad", "momentum", "low_param", "row_moment", "column_moment", "decay", "norms", "scale")
ADDED_TO = (3.0, 50.0)  # what the norms are before a call


class Piece:
    """Elements [start, stop) of a problem in memory of their own, and the blocks that they are for the kernels."""

    def __init__(self, problem: Problem, start: int = 0, stop: int | None = None, offsets: Sequence[int] = (0,) * 4):
        p, types = problem, problem.types
        stop = p.rows * p.cols if stop is None else stop
        self.problem, self.start, self.stop = problem, start, stop
        self.param = Tensor(p.theta.ravel()[start:stop], types.param, offsets[0])
        self.grad = Tensor(p.grad.ravel()[start:stop], types.grad, offsets[1])
        self.low_param = Tensor(np.full(stop - start, np.nan), types.grad, offsets[3]) if types.low else None
        # [first row, first column, elements]: the end of a row, whole rows, the beginning of a row
        self.ranges: list[tuple[int, int, int]] = []
        at = start
        while at < stop:
            row, column = divmod(at, p.cols)
            size = (stop - at) // p.cols * p.cols if column == 0 and not p.cut else 0
            size = size or min(p.cols - column, stop - at)
            self.ranges.append((row, column, size))
            at += size
        self.momentum = self.scale = None
        if types.momentum and p.state.momentum is not None:
            momentum = p.state.momentum.ravel()[start:stop]
            if types.momentum == "i8":
                scales = [p.scales()[start:stop][places].min() for places in self.runs()]
                self.scale = Tensor(np.array(scales), "f32")
                momentum = momentum / np.repeat(scales, [places.stop - places.start for places in self.runs()])
            self.momentum = Tensor(momentum, types.momentum, offsets[2])
        self.first_row = self.ranges[0][0] if self.ranges else 0
        self.last_row = self.ranges[-1][0] + -(-self.ranges[-1][2] // p.cols) if self.ranges else 0
        rows = slice(self.first_row, self.last_row)
        self.row_moment = Tensor(p.state.row_moment[rows], types.compute)
        self.column_moment = Tensor(p.state.column_moment, types.compute)
        self.decay = Tensor(p.state.decay if p.moments == "column" else p.state.decay[rows], types.compute)
        self.norms = Tensor(np.array(ADDED_TO), "f64") if p.watched else None

    def runs(self) -> list[slice]:
        """The elements that have a scale together."""
        at, found = 0, []
        for _, _, size in self.ranges:
            found += [slice(at + first, at + min(size, first + RUN)) for first in range(0, size, RUN)]
            at += size
        return found

    def tensors(self) -> list[Tensor]:
        """What a step may change."""
        state = {
            "row": [self.row_moment],
            "column": [self.column_moment],
            "factored": [self.row_moment, self.column_moment],
        }
        others = [tensor for tensor in (self.momentum, self.scale, self.low_param, self.norms) if tensor]
        return [self.param, *others, *state[self.problem.moments], self.decay]

    def arrays(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in a block."""
        tensors = {name: getattr(self, name) for name in POINTERS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def rows(self) -> int:
        return self.last_row - self.first_row

    def blocks(self, row_work: int, column_work: int, hyper: int) -> Iterator[CBlock]:
        p, types = self.problem, self.problem.types
        compute, run = STORAGE[types.compute]().itemsize, 0
        for index, (row, column, size) in enumerate(self.ranges):
            at = row * p.cols + column - self.start
            by_row = compute * (row - self.first_row)
            there = {
                name: tensor.pointer + at * STORAGE[tensor.dtype]().itemsize
                for name, tensor in self.arrays().items()
                if name in POINTERS[:4]
            }
            scale = self.scale.pointer + 4 * run if self.scale else None
            run += -(-size // RUN)
            yield CBlock(
                **there,
                scale=scale,
                row_moment=None if p.moments == "column" else self.row_moment.pointer + by_row,
                column_moment=None if p.moments == "row" else self.column_moment.pointer,
                decay=self.decay.pointer + (0 if p.moments == "column" else by_row),
                norms=self.norms.pointer if self.norms else None,
                rows=-(-size // p.cols),
                cols=min(size, p.cols),
                row_count=p.cols,
                column_count=p.rows,
                row_work=row_work + row - self.first_row,
                column_work=column_work,
                column_start=column,
                columns=p.cols if index == 0 else 0,
                first=p.first + row * p.cols + column,
                hyper=hyper,
                moments=MOMENTS.index(p.moments),
            )


class Call:
    """Pieces that go to the kernels together: their blocks, workspace and scratch memory. All of one set of types."""

    def __init__(self, library: ctypes.CDLL, pieces: Sequence[Piece], align: int = 1, on_device: bool = False) -> None:
        self.library, self.pieces = library, pieces
        self.types = pieces[0].problem.types
        self.layout: list[tuple[int, int]] = []  # row_work and column_work of each piece
        plane, blocks = 3, []
        for index, piece in enumerate(pieces):
            row_work = -(-plane // align) * align
            column_work = -(-(row_work + piece.rows()) // align) * align
            plane = column_work + piece.problem.cols
            self.layout.append((row_work, column_work))
            blocks += piece.blocks(row_work, column_work, index)
        self.plane, self.n = -(-plane // align) * align, len(blocks)
        self.blocks = (CBlock * len(blocks))(*blocks)
        self.work = Tensor(np.full(3 * self.plane, np.nan), self.types.compute)
        self.hyper_rows = hyper_rows([piece.problem for piece in pieces])
        self.hypers = CHypers(self.hyper_rows, len(self.hyper_rows), on_device)
        self.scratch = self.new_scratch()

    def new_scratch(self) -> Tensor:
        """Just as much as the kernels ask for."""
        size = self.library.amos_scratch_bytes(
            self.blocks, self.n, ctypes.byref(self.types.struct()), ctypes.byref(self.hypers)
        )
        assert size % 4 == 0
        return Tensor(np.full(size // 4, np.nan), "f32")

    def phase(self, name: str) -> None:
        self.scratch = self.new_scratch()  # nothing lasts there from one phase to the next
        code = self.library.amos_phase(
            ("sums", "slots", "update", "step").index(name),
            self.blocks,
            self.n,
            ctypes.byref(self.types.struct()),
            ctypes.byref(self.hypers),
            ctypes.byref(CWork(self.work.pointer, self.plane)),
            ctypes.c_void_p(self.scratch.pointer),
        )
        assert code == 0, self.library.amos_error_string(code)
        self.scratch.check_guard()

    def zero_columns(self) -> None:
        values = self.work.values
        for piece, (_, column_work) in zip(self.pieces, self.layout, strict=True):
            values[column_work : column_work + piece.problem.cols] = 0
        self.work.set(values)

    def run(self, way: str) -> None:
        """`way`: "step", or "phases" for the three others."""
        if way == "step":
            self.phase("step")
        else:
            self.zero_columns()
            for name in ("sums", "slots", "update"):
                self.phase(name)
        for tensor in [self.work, *(tensor for piece in self.pieces for tensor in piece.tensors())]:
            tensor.check_guard()


def hyper_rows(problems: Sequence[Problem]) -> ctypes.Array[CHyper]:
    """A row for each problem."""
    return (CHyper * len(problems))(*(CHyper(*dataclasses.astuple(problem.hyper)) for problem in problems))


def reduce_pieces(calls: Sequence[Call]) -> None:
    """The all-reduce between `sums` and `slots`: call k holds the k-th piece of one problem."""
    problem = calls[0].pieces[0].problem
    work = [call.work.values for call in calls]
    rows, columns = np.zeros(problem.rows), np.zeros(problem.cols)
    for call, values in zip(calls, work, strict=True):
        piece, (row_work, column_work) = call.pieces[0], call.layout[0]
        rows[piece.first_row : piece.last_row] += values[row_work : row_work + piece.rows()]
        columns += values[column_work : column_work + problem.cols]
    for call, values in zip(calls, work, strict=True):
        piece, (row_work, column_work) = call.pieces[0], call.layout[0]
        values[row_work : row_work + piece.rows()] = rows[piece.first_row : piece.last_row]
        values[column_work : column_work + problem.cols] = columns
        call.work.set(values)


def run_pieces(library: ctypes.CDLL, problem: Problem, borders: Iterable[int]) -> list[Piece]:
    """A step of one problem cut at `borders` (flat indices), each piece on a rank of its own."""
    at = [0, *borders, problem.rows * problem.cols]
    calls = [Call(library, [Piece(problem, start, stop)]) for start, stop in pairwise(at) if stop > start]
    for call in calls:
        call.zero_columns()
        call.phase("sums")
    reduce_pieces(calls)
    for call in calls:
        call.phase("slots")
        call.phase("update")
    return [call.pieces[0] for call in calls]


def allowed_error(expected: Array, dtype: str, compute: str) -> Array:
    """The rounding of the compute type (by the largest value), then of the storage type (by each value)."""
    largest = np.abs(expected).max(initial=0)
    return (1e-12 if compute == "f64" else 2e-6) * largest + ROUNDING[dtype] * np.abs(expected)


def assert_close(actual: Array, expected: Array, dtype: str, what: str, compute: str = "f32") -> None:
    """Within the allowed error."""
    assert (np.isnan(actual) == np.isnan(expected)).all(), f"{what}: NaNs differ"
    expected, actual = np.nan_to_num(expected), np.nan_to_num(actual)
    worst = np.abs(actual - expected) - allowed_error(expected, dtype, compute)
    if worst.size and not (worst <= 0).all():
        at = int(worst.argmax())
        raise AssertionError(f"{what}[{at}] is {actual.flat[at]!r}, expected {expected.flat[at]!r}")


def assert_rounded_stochastically(actual: Array, expected: Array, index: Array, hyper: Hyper, what: str) -> None:
    """The very bits, but where the error of the compute type decides."""
    error = allowed_error(np.nan_to_num(expected), "f32", "f32")
    ends = [decode(round_stochastically(expected + sign * error, index, hyper), "bf16") for sign in (-1, 1)]
    low, high = np.minimum(*ends), np.maximum(*ends)
    good = (low <= actual) & (actual <= high) | np.isnan(expected) & np.isnan(actual)
    assert good.all(), f"{what}: {np.flatnonzero(~good)[:5]} are rounded to {actual[~good][:5]}, not {low[~good][:5]}"
    certain = (low == high) | np.isnan(expected)
    assert certain.mean() > 0.9 or len(actual) < 50, f"{what}: this tests little"


def check_eight_bits(piece: Piece, what: str) -> None:
    """The scale of each run, and the very levels, but where the error of the compute type decides."""
    p = piece.problem
    momentum = p.expected[1].momentum.ravel()[piece.start : piece.stop]
    found, scales, certain = piece.momentum.values, piece.scale.values, 0
    for number, places in enumerate(piece.runs()):
        x, scale = momentum[places], scales[number : number + 1]
        np.testing.assert_allclose(scale, run_scales(x), rtol=4e-5, err_msg=f"{what}: scale {number}")
        if not scale > 0:
            continue
        assert (scale.astype(np.float32).view(np.uint32) & 0xFF == 0).all(), f"{what}: scale {number} has too many bits"
        assert np.abs(found[places]).max() == 127, f"{what}: run {number} has no largest"
        index = np.arange(places.start, places.stop).astype(np.uint64) + np.uint64(p.first + piece.start)
        error = allowed_error(momentum, "f32", "f32")[places]
        low, high = (levels(x + sign * error, scale, index, p.hyper) for sign in (-1, 1))
        good = (low <= found[places]) & (found[places] <= high)
        assert good.all(), f"{what}: {found[places][~good][:5]} in run {number}, expected {low[~good][:5]}"
        certain += (low == high).sum()
    assert certain >= 0.9 * len(momentum) or not (scales > 0).all(), f"{what}: this tests little"


def check(piece: Piece) -> None:
    """Compares what the kernels left with the reference."""
    p, compute = piece.problem, piece.problem.types.compute
    theta, state = p.expected
    rows = slice(piece.first_row, piece.last_row)
    name = f"{p.moments} {p.rows}x{p.cols} {p.types}"
    theta = theta.ravel()[piece.start : piece.stop]
    if p.types.param == "bf16" and p.hyper.seed >= 0:
        index = np.arange(piece.start, piece.stop).astype(np.uint64) + np.uint64(p.first)
        assert_rounded_stochastically(piece.param.values, theta, index, p.hyper, f"{name}: param")
    else:
        assert_close(piece.param.values, theta, p.types.param, f"{name}: param", compute)
    if piece.low_param:
        nearest = encode(piece.param.values, p.types.grad).view(np.uint8)
        assert (piece.low_param.bytes == nearest).all(), f"{name}: low_param"
    if piece.scale:
        check_eight_bits(piece, f"{name}: momentum")
    elif piece.momentum and state.momentum is not None:
        expected = state.momentum.ravel()[piece.start : piece.stop]
        assert_close(piece.momentum.values, expected, piece.momentum.dtype, f"{name}: momentum", compute)
    if p.moments != "column":
        assert_close(piece.row_moment.values, state.row_moment[rows], compute, f"{name}: row_moment", compute)
    if p.moments != "row":
        assert_close(piece.column_moment.values, state.column_moment, compute, f"{name}: column_moment", compute)
    if piece.norms:
        expected = p.norms(piece.start, piece.stop)
        norms = piece.norms.values - ADDED_TO
        assert_close(norms[:1], expected[:1], compute, f"{name}: norm of Delta", compute)
        assert_close(norms[1:], expected[1:], compute, f"{name}: norm of the parameter", compute)
    decay = state.decay if p.moments == "column" else state.decay[rows]
    assert_close(piece.decay.values, decay, compute, f"{name}: decay", compute)


# ---- replay: the same calls in a program of their own, which sanitizers can watch ------------------------------------

SANITIZERS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}


@dataclasses.dataclass
class Replay:
    """One call of the driver: problems of one set of types, and elements that param, grad, momentum and low_param are
    moved by."""

    problems: Sequence[Problem]
    way: str
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    on_device: bool = False


def write_call(call: Replay) -> bytes:
    """A call in the format that driver.cpp reads."""
    problems, way = call.problems, call.way
    types = problems[0].types
    plane, blocks, arrays = 1, b"", b""
    count = 0
    for index, problem in enumerate(problems):
        piece = Piece(problem)
        number = {}
        for name, tensor in piece.arrays().items():
            count += 1
            number[name] = count
            offset = call.offsets[POINTERS.index(name)] if name in POINTERS[:4] else 0
            skip = offset * STORAGE[tensor.dtype]().itemsize
            arrays += np.array([tensor.bytes.size, skip], np.int64).tobytes() + tensor.bytes.tobytes()
        for block in piece.blocks(plane, plane + piece.rows(), index):
            for name, tensor in piece.arrays().items():
                pointer = getattr(block, name)
                setattr(block, name, pointer and (number[name] << 32) + pointer - tensor.pointer)
            blocks += bytes(block)
        plane += piece.rows() + piece.problem.cols
    n = len(blocks) // ctypes.sizeof(CBlock)
    sizes = np.array([n, count, plane, len(problems), call.on_device], np.int64).tobytes()
    header = bytes(types.struct()) + np.int32(way == "phases").tobytes() + sizes
    # Zeros, as `sums` wants them for columns; `step` must do without.
    work = np.full(3 * plane, 0.0 if way == "phases" else np.nan, STORAGE[types.compute]).tobytes()
    hypers = bytes(hyper_rows(problems))
    return header + blocks + hypers + arrays + np.array([len(work), 0], np.int64).tobytes() + work


def read_calls(data: bytes, calls: Sequence[Replay]) -> None:
    """Compares what the driver wrote for these calls with the reference."""
    at = 0
    for call in calls:
        for problem in call.problems:
            piece = Piece(problem)
            for tensor in piece.arrays().values():
                tensor.bytes[:] = np.frombuffer(data, np.uint8, tensor.bytes.size, at)
                at += tensor.bytes.size
            check(piece)
    assert at == len(data)


def replay(driver: Path, given: Path, left: Path, calls: Sequence[Replay], order: str, mutant: int) -> bytes:
    """Runs the driver and checks its results; raises what went wrong: AssertionError or RuntimeError."""
    options = {
        "MUTANT": str(mutant),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "SHIM_ORDER": order,
        "SHIM_SMS": "1",
        "SHIM_SHARED": str(6 * 1024),
    }
    try:
        done = subprocess.run(
            [str(driver), str(given), str(left)],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **options},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("the driver did not end") from error
    if done.returncode:
        raise RuntimeError(f"the driver ended with {done.returncode}: {done.stderr[:3000]}")
    data = left.read_bytes()
    read_calls(data, calls)
    return data
