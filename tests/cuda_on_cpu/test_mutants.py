"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (CUDA threads are its threads),
and bugs planted in them: each must be caught, or the tests here could not be trusted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_on_cpu import HERE, MOMENTS, SANITIZERS, SOURCE, Problem, Replay, Types, compile_for_cpu, replay, write_call
from numpy_reference import Hyper

# Name: (file, text that occurs there once, what its part between « and » becomes: an expression or a statement).
# All are compiled into one program, which a variable of the environment tells which of them to commit.
MUTANTS = {
    # device.cuh
    "a lane's sum is lost": ("device.cuh", "distance = «lanes / 2»; distance > 0", "lanes / 4"),
    "half of the lanes in the mask": ("device.cuh", "x += «__shfl_xor_sync(kAllLanes, x, distance)»",
        "__shfl_xor_sync(0x0000ffffu, x, distance)"),
    "no barrier between warps' sums and their sum": ("device.cuh", "«__syncthreads();»\n  const int warps", ";"),
    "a warp's barrier where the CTA's is needed": ("device.cuh", "«__syncthreads();»\n  const int warps",
        "__syncwarp();"),
    "barrier that one thread reaches": ("device.cuh", "«__syncthreads();»\n  const int warps",
        "if (threadIdx.x == 0) __syncthreads();"),
    "vectors begin at the wrong element": ("device.cuh", "«past ? V - past : 0»", "past"),
    "body longer than the segment": ("device.cuh", "«(n - head) / V * V»", "(n - head + V - 1) / V * V"),
    "upper half of an element's number ignored": ("device.cuh", "static_cast<uint32_t>(«index >> 32»)", "0"),
    # table.cuh
    "search stops one block early": ("table.cuh", "«args.first_unit[probe] <= unit»", "args.first_unit[probe] < unit"),
    "search runs past the table": ("table.cuh", "«probe < high» && args.first_unit", "true"),
    "a block's last unit is the next one's first": ("table.cuh",
        "end_ = «low + 1 < args.n ? args.first_unit[low + 1] : args.units»", "args.units"),
    "constants of another parameter": ("table.cuh", "make_consts<T>(rows[«i»])", "0"),
    # sums.cuh
    "columns of a narrow tile not joined": ("sums.cuh", "(int distance = «lanes»; distance < kWarp", "2 * lanes"),
    "rows beyond the matrix": ("sums.cuh", "mine.load_row(g, «(step + k) * stride < rows», x[k])", "true"),
    "columns beyond the tile": ("sums.cuh", "if («i * V + j < mine») s[j]", "true"),
    "no barrier before a tile's columns are joined": ("sums.cuh", "«__syncthreads();»\n    T* out", ";"),
    "next tile overwrites the columns": ("sums.cuh", "«__syncthreads();»  // the next tile", ";"),
    "sums of finished rows take no turns": ("sums.cuh", "«cta_sum(sum, part[turn ^= 1])» : warp_sum(sum, lanes)",
        "cta_sum(sum, part[0])"),
    "sums of finished columns take no turns": ("sums.cuh", "column_part[«turn ^= 1»]", "0"),
    "step adds to old column sums": ("sums.cuh", "«args.assign_columns ? 0.0 : double(*out)»", "double(*out)"),
    "columns beyond the matrix": ("sums.cuh", "if («mine < 0 || mine >= cols») continue", "mine < 0"),
    "partial sums of columns over those of rows": ("sums.cuh",
        "T* out = e.partial + «row_partials(e.moments, e.rows, e.cols)» + down", "0"),
    # slots.cuh
    "profile not limited": ("slots.cuh", "«profile_limit(v, k)»", "T(INFINITY)"),
    "the mean is that of 256 columns": ("slots.cuh", "e.moment_sums[«unit - row_units»] = sum", "0"),
    "every lane writes the state": ("slots.cuh", "if («writes»)", "true"),
    # update.cuh
    "gradient's alignment not asked for": ("update.cuh", "return «aligned<V>(g + i)» &&", "true"),
    "momentum's alignment not asked for": ("update.cuh",
        "«(!momentum || (bf16 ? aligned<V>(narrow_momentum() + i) : aligned<V>(wide_momentum() + i)))»", "true"),
    "low_param's alignment not asked for": ("update.cuh", "«(!kLow || !low || aligned<V>(low + i))»", "true"),
    "columns' alignment not asked for": ("update.cuh", "if («aligned<V>(p + i)») {", "true"),
    "low_param has no ends": ("update.cuh", "if («low») store(low + i, x)", "V > 1 ? low : nullptr"),
    "random numbers count from 0 in each vector": ("update.cuh", "narrow_stochastically(x[j], «first + i + j», k)",
        "first + j"),
    "random numbers repeat in each row": ("update.cuh", "first = e.first + «row * e.row_count» + column", "0"),
    "gradient not clipped in the update": ("update.cuh", "«clipped(gs[j], k.clip)»", "gs[j]"),
    "momentum updated but not used": ("update.cuh", "step = «m[j] = next_momentum(m[j], step, k)»",
        "(m[j] = next_momentum(m[j], step, k), step)"),
    "ends of a segment skipped": ("update.cuh", "first = lane; «first < n - body»; first +=", "first < head"),
    "vectors run past the body": ("update.cuh", "if («i + a * stride < end») e[a].update", "true"),
    "Delta's square is its own": ("update.cuh", "squares[0] += «step * step»", "step"),
    "the new parameter's norm": ("update.cuh", "squares[1] += «x[j] * x[j]»", "(x[j] - step) * (x[j] - step)"),
    "a thread forgets its norms": ("update.cuh", "«norms.add(squares[0], squares[1]);»", ";"),
    "norms of one lane": ("update.cuh", "all_steps = «warp_sum(double(step))»", "double(step)"),
    "norms of one warp": ("update.cuh", "all_theta = «cta_sum(double(theta), part[1])»", "double(theta)"),
    "both norms in one place of shared memory": ("update.cuh", "cta_sum(double(step), part[«0»])", "1"),
    "norms of the first block only": ("update.cuh", "block < «e->norm_blocks»", "1"),
    "norms assigned": ("update.cuh", "«e->norms[i] += sum;»", "e->norms[i] = sum;"),
    "norms of a row's unit in the first one's place": ("rows.cuh", "norms.leave(e, «row», norm_part)", "0"),
    "norms not where the unit is": ("rows.cuh", "norms.leave(e, «u - cursor.begin», norm_part)", "u"),
    "the first unit twice": ("update.cuh", "u = args.units - 1 - «i»", "(i ? i - 1 : 0)"),
    # rows.cuh
    "an element at a row's end not summed": ("rows.cuh", "if («edge >= 0») edge_g = ", "edge > 0"),
    "a lane's last vector lost": ("rows.cuh", "mine = «(head + body - first + stride - V) / stride»",
        "(head + body - first) / stride"),
    "sums of rows take no turns": ("rows.cuh", "part[asked ? 0 : «turn ^= 1»]", "0"),
    "state of rows beyond the matrix": ("rows.cuh", "state.b, «there && lane == 0»)", "lane == 0"),
    "more than the shared memory holds": ("rows.cuh", "fit = «vectors < capacity ? vectors : capacity»", "vectors"),
    "wrong place in shared memory": ("rows.cuh", "at < fit ? held[«at»]", "i"),
    "a thread's rows beyond the matrix": ("rows.cuh", "if («row >= e.rows») continue;\n      T sum", "false"),
    # runs.cuh
    "a run stays in its row": ("runs.cuh", "      «++row;»\n", ";"),
    "columns of narrow rows run on": ("runs.cuh", "      column = «at % width»;", "at"),
    "B of the columns is A": ("runs.cuh", "return {columns[0], columns[«plane»]};", "0"),
    "not all lanes' largest": ("runs.cuh", "distance = «kWarp / 2»; distance", "kWarp / 4"),
    "the largest keeps its sign": ("runs.cuh", "size = «bits_of(step) & 0x7fffffffu»", "bits_of(step)"),
    "the bound of a level": ("runs.cuh", "level > 255.0f ? «255.0f» : level", "254.0f"),
    "the scale of another run": ("runs.cuh", "old_scale = e.scale[«unit»]", "unit ? unit - 1 : 0"),
    "a new scale in another run's place": ("runs.cuh", "e.scale[«unit»] = scale.scale", "0"),
    "the old scale for new levels": ("runs.cuh", "level_of(m[j], «scale.inverse», random)", "1 / old_scale"),
    "momentum's random numbers begin anew in each run": ("runs.cuh", "index = «e.first + begin + at»", "e.first + at"),
    "a parameter's random numbers begin anew in each run": ("runs.cuh",
        "arrays.first = «e.first + begin + p.row * (e.row_count - e.cols)»", "e.first"),
    "rows of one element have no coefficients": ("runs.cuh",
        "alone = «args.one_pass && e.moments == Moments::row && e.cols == 1»", "false"),
    "a run longer than what is left": ("runs.cuh",
        "n = «left < kRun ? static_cast<int>(left) : static_cast<int>(kRun)»", "static_cast<int>(kRun)"),
    "a run's norms in another's place": ("runs.cuh", "norms.leave(e, «unit»)", "0"),
    # kernels.cu
    "too few places for norms of runs": ("kernels.cu", "if (b.scale) return «ceil_div(b.rows * b.cols, kRun)»", "1"),
    "rows with 8-bit momentum in one pass": ("kernels.cu", "if («!by_runs_») step_rows", "true"),
    "blocks share scratch memory": ("kernels.cu", "«place.add(b);»\n      if (new", ";"),
    "A and B of few long rows over their partial sums": ("kernels.cu", "e.partial + «place.own_values(b)»", "0"),
    "columns of a parameter's other blocks lost": ("kernels.cu", "«++entries_[leader].followers;»", ";"),
    "a row does not fit its CTA": ("kernels.cu", "while («threads * kHeld<T>» < cols)", "2 * threads * kHeld<T>"),
    "a narrow row does not fit its lanes": ("kernels.cu", "std::min(«kHeld<T>», kLaneCols)", "kLaneCols"),
    "uploads over each other": ("kernels.cu", "reinterpret_cast<uint4*>(«table_ + at»)", "table_"),
    "too few places for norms": ("kernels.cu", "norm_parts += «2 * most_units(b)»", "most_units(b)"),
    "an upload loses its end": ("kernels.cu", "«size / sizeof(uint4)»", "size / sizeof(uint4) - 1"),
    "units of another launch": ("kernels.cu", "«pass.first_unit * sizeof(int64_t)»", "0"),
}  # fmt: skip

# Small, but with borders of tiles, chunks, lanes, vectors, CTAs and uploads on both sides.
SHAPES = [(1, 1), (3, 7), (2, 255), (70, 36), (2, 2100), (40, 1), (1100, 5)]
HYPER = Hyper(clip=1.5, seed=3.0)


def zero_column(problem: Problem) -> Problem:
    problem.grad[:, 1] = problem.state.column_moment[1] = 0
    return problem


def cut(problem: Problem) -> Problem:
    problem.cut = True
    return problem


def late(problem: Problem) -> Problem:
    problem.first = 2**33 + 2**32 - 50
    return problem


def problems(types: Types) -> list[Problem]:
    return [Problem(moments, *shape, types, HYPER) for moments in MOMENTS for shape in SHAPES]


def watched(some: list[Problem]) -> list[Problem]:
    for problem in some:
        problem.watched = True
    return some


LOW = Types("f32", "bf16", "f32", low=True)
EIGHT, EIGHT_BF16 = Types("f32", "bf16", "i8", low=True), Types("bf16", "bf16", "i8")
CALLS = [
    Replay(problems(LOW), "step", (0, 0, 1, 0)),
    Replay(watched(problems(LOW)), "phases", (1, 2, 1, 1)),
    Replay(watched(problems(LOW)), "step", (1, 1, 1, 2)),
    Replay(problems(LOW), "step", (1, 1, 1, 1)),
    Replay([late(problem) for problem in problems(Types("bf16", "bf16"))], "phases", (1, 1, 0, 0)),
    Replay(watched(problems(EIGHT)), "step", (1, 1, 1, 2)),
    Replay([late(problem) for problem in problems(EIGHT_BF16)], "phases", (1, 1, 0, 0)),
    Replay(watched([Problem("row", *shape, Types("f64", "f64")) for shape in [(3, 100), (66, 4101)]]), "step"),
    Replay([zero_column(Problem("factored", 3, 40)), cut(Problem("factored", 3, 600)), Problem("row", 1, 33000)],
           "phases"),
    Replay([Problem("factored", 10, 17000), Problem("row", 2, 33000)], "step"),
    Replay(watched([cut(Problem("factored", 3, 600)), Problem("row", 40, 2100)]), "phases"),
    Replay(watched([Problem("row", 3, 2100), Problem("row", 2, 2200)]), "step"),
    Replay([Problem("row", 1, 1 + i % 40, hyper=Hyper(lr=0.1 + i / 100), seed=i) for i in range(200)], "step",
           on_device=True),
]  # fmt: skip
# ThreadSanitizer is slow; it needs every barrier, not every border. In reverse order, those who wait for thread 0 read
# right after it has written, before ThreadSanitizer forgets who wrote.
RACES = [
    Replay([Problem(m, *s) for m in MOMENTS for s in [(70, 36), (130, 20), (9, 1100), (300, 1)]], "step"),
    Replay(watched([Problem("factored", 4, 17000), Problem("row", 70, 2100)]), "step"),
    Replay([Problem("factored", 9, 200, EIGHT)], "step"),
    Replay([Problem("row", rows, 4100, Types("f64", "f64")) for rows in (20, 64)], "step"),
]
HUNTERS = [
    *(("plain", order, CALLS) for order in ("fwd", "rev", "7")),
    ("asan", "fwd", CALLS),
    ("tsan", "rev", RACES),
]


def planted(part: str, bugs: list[tuple[int, str]]) -> str:
    """A part of the source with bugs that the variable MUTANT wakes."""
    if not bugs:
        return part
    (number, new), *others = bugs
    if part.endswith(";"):
        return f"if (planted({number})) {{ {new} }} else {{ {planted(part, others)} }}"
    return f"(planted({number}) ? ({new}) : ({planted(part, others)}))"


def plant(folder: Path) -> Path:
    """A copy of the sources with all bugs asleep. Few CTAs, so that each of them has several units to do."""
    (folder / "cuda").mkdir(parents=True)
    for header in ("amos_math.h", "block.h"):
        (folder / header).write_text((SOURCE.parents[1] / header).read_text())
    for file in (*SOURCE.parent.glob("*.cuh"), SOURCE):
        text = file.read_text()
        bugs: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for number, (where, old, new) in enumerate(MUTANTS.values(), 1):
            if where == file.name:
                before, part, after = re.split("[«»]", old)
                assert text.count(before + part + after) == 1, f"{where} does not have once: {before}{part}{after}"
                begin = text.index(before + part + after) + len(before)
                bugs.setdefault((begin, begin + len(part)), []).append((number, new))
        for begin, end in sorted(bugs, reverse=True):
            text = text[:begin] + planted(text[begin:end], bugs[begin, end]) + text[end:]
        text = text.replace("kThreadsPerSm = 2048", "kThreadsPerSm = 512")
        (folder / "cuda" / file.name).write_text(text.replace("#pragma once\n", '#pragma once\n#include "planted.h"\n'))
    (folder / "cuda" / "planted.h").write_text(
        """#pragma once
        #include <cstdlib>
        inline const int planted_number = std::atoi(std::getenv("MUTANT"));
        inline bool planted(int number) { return number == planted_number; }
        """
    )
    return folder / "cuda" / SOURCE.name


def hunt(drivers: dict[str, Future[Path]], given: dict[str, Path], left: Path, mutant: int) -> str | None:
    """What caught the mutant first, cheapest hunter first; None if it lives."""
    results: dict[str, bytes] = {}
    for sanitizer, order, calls in HUNTERS:
        driver = drivers[sanitizer].result()
        try:
            result = replay(driver, given[sanitizer], left, calls, order, mutant)
        except (AssertionError, RuntimeError) as caught:
            return f"{sanitizer} {order}: {caught}"
        if result != results.setdefault(sanitizer, result):
            return f"{sanitizer} {order}: other bits than in the first order"
    return None


@pytest.fixture(scope="module")
def hunts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str | None]]]:
    folder = tmp_path_factory.mktemp("mutants")
    source = plant(folder)
    given = {}
    for sanitizer, _, calls in HUNTERS:
        if sanitizer not in given:
            given[sanitizer] = folder / f"{sanitizer}.in"
            given[sanitizer].write_bytes(b"".join(write_call(call) for call in calls))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drivers = {  # the one that takes longest to compile first
            name: pool.submit(
                compile_for_cpu, folder / name, source, HERE / "driver.cpp", flags=["-w", *SANITIZERS[name]]
            )
            for name in ("asan", "plain", "tsan")
        }
        yield {
            name: pool.submit(hunt, drivers, given, folder / f"{number}.out", number)
            for number, name in enumerate(["none", *MUTANTS])
        }


def test_original_lives(hunts: dict[str, Future[str | None]]) -> None:
    """Without a bug all hunters are content."""
    assert hunts["none"].result() is None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(hunts: dict[str, Future[str | None]], name: str) -> None:
    caught = hunts[name].result()
    assert caught is not None
    print(caught.splitlines()[0][:200])
