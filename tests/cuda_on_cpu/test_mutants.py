"""Bugs planted in the kernels: each must be caught, or the other tests here could not be trusted."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_on_cpu import HERE, MOMENTS, SANITIZERS, SOURCE, Problem, Replay, Types, compile_for_cpu, replay
from numpy_reference import Hyper

# Name: (file, text that occurs there once, what it becomes).
MUTANTS = {
    "a lane's sum is lost": ("device.cuh", "lanes = kWarp / 2", "lanes = kWarp / 4"),
    "half of the lanes in the mask": ("device.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu"),
    "no barrier between warps' sums and their sum": ("device.cuh", "  __syncthreads();\n  T sum = 0;", "  T sum = 0;"),
    "shared array one too short": ("device.cuh", "T part[kWarps];", "T part[kWarps - 1];"),
    "vectors begin at the wrong element": ("device.cuh", "past ? V - past : 0", "past"),
    "body longer than the segment": ("device.cuh", "(n - head) / V * V", "(n - head + V - 1) / V * V"),
    "search stops one block early": ("device.cuh", ".first_unit <= unit", ".first_unit < unit"),
    "columns' partial sums over those of the rows": (
        "device.cuh",
        "return row_partials(moments, rows, cols) + (moments",
        "return (moments",
    ),
    "gradient's alignment not asked for": ("kernels.cuh", " || !aligned<V>(g + s.head)", ""),
    "momentum's alignment not asked for": ("kernels.cuh", " || !(m + s.head).template fits<V>()", ""),
    "columns' alignment not asked for": ("kernels.cuh", "if (aligned<V>(p)) {", "if (true) {"),
    "ends of a segment skipped": ("kernels.cuh", "edge < n - s.body; edge", "edge < s.head; edge"),
    "vectors run past the body": (
        "kernels.cuh",
        "s.head + s.body; i += lanes * V) update",
        "n; i += lanes * V) update",
    ),
    "gradient not clipped in the update": ("kernels.cuh", "clipped(g[j], k.clip), B[j]", "g[j], B[j]"),
    "momentum updated but not used": ("kernels.cuh", "step = m[j] = next_momentum", "m[j] = next_momentum"),
    "rows beyond the matrix": (
        "kernels.cuh",
        "const int64_t rows = end < e.rows ? end : e.rows;",
        "const int64_t rows = end;",
    ),
    "columns beyond the tile": ("kernels.cuh", "if (column + j < width) x", "x"),
    "no barrier before a tile's columns are joined": (
        "kernels.cuh",
        "    __syncthreads();\n    T* out = batch.scratch",
        "    T* out = batch.scratch",
    ),
    "next tile overwrites the columns": (
        "kernels.cuh",
        "    __syncthreads();  // the next tile overwrites `columns`\n",
        "",
    ),
    "next unit overwrites the sums": ("kernels.cuh", "    __syncthreads();  // the next unit overwrites `sums`\n", ""),
    "columns beyond the matrix": ("kernels.cuh", "if (warp_id() == 0 && column < e.cols) {", "if (warp_id() == 0) {"),
    "step adds to old column sums": ("kernels.cuh", "batch.assign_columns ? 0.0 : double(total)", "double(total)"),
    "profile not limited": ("kernels.cuh", "= profile_limit(v, e.k)", "= T(INFINITY)"),
    "mean read before it is there": ("kernels.cuh", "  __syncthreads();  // the next parameter's cta_sum", "  //"),
    "coefficients read before they are there": (
        "kernels.cuh",
        "    __syncthreads();  // the next row's cta_sum has another",
        "    //",
    ),
    "a warp's barrier where the CTA's is needed": (
        "kernels.cuh",
        "    __syncthreads();  // the next row's cta_sum has another",
        "    __syncwarp();  //",
    ),
    "barrier that one thread reaches": (
        "kernels.cuh",
        "if (lane == 0) shared = c;\n    __syncthreads();",
        "if (lane == 0) shared = c, __syncthreads();",
    ),
    "every lane writes the state": (
        "kernels.cuh",
        "  if (lane == 0) {\n    const T G = sum / e.row_count;",
        "  {\n    const T G = sum / e.row_count;",
    ),
    "units of the last batch counted again": (
        "kernels.cu",
        "    batch.units = 0;\n  }\n\n  // Launches",
        "  }\n\n  // Launches",
    ),
    "blocks share scratch memory": ("kernels.cu", "      partial += partials(b.moments, b.rows, b.cols);\n", ""),
    "rows of several parts not finished": (
        "kernels.cu",
        "row_parts(b.moments, b.cols) > 1 && ",
        "row_parts(b.moments, b.cols) > 9 && ",
    ),
}

# Reduced to what a mutant can be seen by: borders of tiles, chunks, vectors and batches.
SHAPES = [(1, 1), (3, 7), (2, 255), (70, 36), (2, 1100), (40, 1), (1100, 5)]
HYPER = Hyper(clip=1.5)


def zero_column(problem: Problem) -> Problem:
    problem.grad[:, 1] = problem.state.column_moment[1] = 0
    return problem


CALLS = [
    *(
        Replay([Problem(moments, *shape, types, HYPER) for moments in MOMENTS for shape in SHAPES], way, offsets)
        for types in (Types(momentum="f32"), Types("f32", "bf16", "bf16"))
        for way, offsets in (("step", (0, 0, 1)), ("phases", (1, 2, 1)))
    ),
    Replay([zero_column(Problem("factored", 3, 40)), Problem("row", 1, 33000), Problem("row", 2, 4097)], "phases"),
    Replay([Problem("factored", 1, 1 + i % 40, seed=i) for i in range(200)], "step"),
]
# ThreadSanitizer is slow; it needs every barrier, not every border. In reverse order, those who wait for thread 0 read
# right after it has written, before ThreadSanitizer forgets who wrote.
HUNTERS = [
    *(("plain", order, CALLS) for order in ("fwd", "rev", "7")),
    ("asan", "fwd", CALLS),
    ("tsan", "rev", [Replay([Problem(m, *s) for m in MOMENTS for s in [(70, 36), (2, 1100)]], "step")]),
]
UNUSED_TYPES = ("(Dtype::f64, ", "(Dtype::bf16, ", "(Dtype::f16, ", "Dtype::f16)) ")


def plant(folder: Path, name: str) -> Path:
    """A copy of the sources with one bug, for the types of CALLS alone, which halves the time to compile."""
    (folder / "cuda").mkdir(parents=True)
    for header in ("amos_math.h", "block.h"):
        (folder / header).write_text((SOURCE.parents[1] / header).read_text())
    for file in ("device.cuh", "kernels.cuh", "kernels.cu"):
        text = (SOURCE.parent / file).read_text()
        if name in MUTANTS and MUTANTS[name][0] == file:
            _, old, new = MUTANTS[name]
            assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        lines = text.split("\n")
        text = "\n".join(
            line for line in lines if not (line.startswith("  if (is(") and any(t in line for t in UNUSED_TYPES))
        )
        (folder / "cuda" / file).write_text(text)
    return folder / "cuda" / "kernels.cu"


def hunt(folder: Path, name: str) -> str | None:
    """What caught the mutant first, cheapest hunter first; None if it lives."""
    source = plant(folder, name)
    results: dict[str, bytes] = {}
    for sanitizer, order, calls in HUNTERS:
        driver = folder / sanitizer
        if not driver.exists():
            compile_for_cpu(driver, source, HERE / "driver.cpp", flags=["-w", *SANITIZERS[sanitizer]])
        try:
            result = replay(driver, folder, calls, order)
        except (AssertionError, RuntimeError) as caught:
            return f"{sanitizer} {order}: {caught}"
        if result != results.setdefault(sanitizer, result):
            return f"{sanitizer} {order}: other bits than in the first order"
    return None


@pytest.fixture(scope="module")
def hunts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[str | None]]:
    folder = tmp_path_factory.mktemp("mutants")
    pool = ThreadPoolExecutor(os.cpu_count())
    names = ["none", *MUTANTS]
    return {name: pool.submit(hunt, folder / str(i), name) for i, name in enumerate(names)}


def test_original_lives(hunts: dict[str, Future[str | None]]) -> None:
    """Without a bug all hunters are content."""
    assert hunts["none"].result() is None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(hunts: dict[str, Future[str | None]], name: str) -> None:
    caught = hunts[name].result()
    assert caught is not None
    print(caught.splitlines()[0][:200])
