"""The order of what travels, and one all-reduce for each process group, whatever that order is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from amos_dist import travel
from amos_dist.sharding import Cut, Layout, Tile, reduce
from amos_dist.sharding.reduce import Reduction, joined
from amos_dist.travel import COLUMNS, SHARE, Space, Travel
from amos_dist.wave import UNDER_WAY, settle, waves_of

A, B, C, D = 2, 3, 5, 7  # process groups: adding up over one multiplies by its number
SECTIONS = {
    "FSDP": [(A,)],
    "FSDP and TP": [(A, B), (A,), (B,)],
    "found last": [(A,), (B,), (A, B)],
    "a chain": [(A,), (B, C), (B,), (A, B), (C,)],
    "all of three": [some for n in (1, 2, 3) for some in itertools.combinations((A, B, C), n)],
    "a ring": [(A, B), (C, D), (B, C), (A, D)],
}


class FakePending:
    """Takes the place of reduce.Pending: what is sent is read at the start and written at the end."""

    calls = 0

    def __init__(self, tensor: torch.Tensor, group: int) -> None:
        FakePending.calls += 1
        self.tensor, self.result = tensor, tensor * group

    def wait(self) -> None:
        self.tensor.copy_(self.result)


@pytest.mark.parametrize("name", SECTIONS)
def test_each_number_is_added_up_once_over_each_of_its_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "Pending", FakePending)
    order = SECTIONS[name]
    groups = list(dict.fromkeys(group for some in SECTIONS[name] for group in some))
    ranges = {g: joined([(3 * i, 3 * i + 3) for i, some in enumerate(order) if g in some]) for g in groups}
    vector = torch.ones(3 * len(order) + 2)
    FakePending.calls = 0
    Reduction(vector, ranges).wait()
    expected = [float(torch.tensor(some).prod()) for some in order for _ in range(3)]
    assert vector.tolist() == [*expected, 1.0, 1.0]
    assert FakePending.calls == len(groups)


def tiles(*kinds: str) -> tuple[list[Layout], dict[int, str]]:
    """8 x 6 parameters, of which this rank has 4 x 3; rows are cut over A, columns over B."""
    layouts = [
        Layout([Tile(key, 8, 6, 4, 3)], (A, B), row_groups=(B,), column_groups=(A,)) for key in range(len(kinds))
    ]
    return layouts, dict(enumerate(kinds))


@pytest.mark.parametrize(
    ("kind", "over_a", "over_b"), [("row", 1, 1 + 4), ("column", 1 + 3, 1), ("factored", 1 + 3 + 1, 1 + 4 + 1 + 1)]
)
def test_what_travels_for_a_tile(kind: str, over_a: int, over_b: int) -> None:
    layouts, kinds = tiles(kind, kind)
    found = Travel(layouts, kinds, Space(), flagged=layouts)
    for group, count in ((A, over_a), (B, over_b)):
        assert found.facts(group)[0].startswith(f"{2 * count} numbers to be added up over ranks")
        assert sum(end - begin for begin, end in found.ranges[group]) == 2 * count


def test_a_step_begins_with_zeros_and_flags() -> None:
    layouts, kinds = tiles("factored", "row")
    found = Travel(layouts, kinds, Space(), flagged=layouts)
    work = torch.full((3, found.size), 7.0)
    first, second = found.flag(0), found.flag(1)
    assert first is not None and second is not None
    found.begin(work, [second])
    expected = torch.zeros(found.size)
    expected[first] = 1
    assert torch.equal(work[0], expected)
    assert bool((work[1:] == 7).all())


def test_shared_columns_begin_with_zeros() -> None:
    layout = Layout([], ("ranks",), ("ranks",), [Cut(0, 3, 5, (8,), everybody=2)])
    found = Travel([layout], {0: "factored"}, Space())
    work = torch.full((3, found.size), 7.0)
    found.begin(work, [])
    assert not work[0].any()
    whole, mine = found.places[COLUMNS, 0, 0], found.places[SHARE, 0, 0]
    assert (mine - whole, found.size - mine) == (6, 3)  # for two ranks three columns each
    assert found.facts("ranks")[0].startswith("2 numbers to be added up over ranks")  # for the mean


def test_a_tile_is_one_block_or_none() -> None:
    assert [tuple(block) for block in Tile(0, 8, 6, 4, 3, 15).blocks()] == [(0, 0, 0, 4, 3)]
    assert Tile(0, 8, 6, 0, 3).blocks() == Tile(0, 8, 6, 4, 0).blocks() == []


def test_ranks_that_cut_parameters_in_another_way_differ() -> None:
    def facts(*cuts: Cut) -> list[str]:
        return Travel([Layout([], ("ranks",), ("ranks",), list(cuts))], {0: "row"}, Space()).facts("ranks")

    assert facts(Cut(0, 3, 5, (8,))) == facts(Cut(0, 3, 5, (8,)))
    assert facts(Cut(0, 3, 5, (8,))) != facts(Cut(0, 3, 5, (9,)))


@pytest.mark.parametrize(
    "sizes", [[], [5], [0, 0], [1] * 100, [90, 1, 1, 1, 90, 1], [0, 7, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3]]
)
@pytest.mark.parametrize("least", [1, 4, 1000])
def test_few_waves_cover_all(sizes: list[int], least: int) -> None:
    ranges = travel.split(sizes, least)
    assert [i for begin, end in ranges for i in range(begin, end)] == list(range(len(sizes)))
    assert len(ranges) <= travel.MOST_WAVES
    assert all(sum(sizes[begin:end]) >= min(least, sum(sizes)) for begin, end in ranges)
    assert len(ranges) > 1 or sum(sizes) < 2 * least or len(sizes) < 2


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("behind", [0, 1, 5])
def test_a_group_finds_the_same_whatever_else_travels_on_its_ranks(
    before: int, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of A have experts of their own, over B or over C, before and behind the parameters that all cut."""
    monkeypatch.setattr(travel, "LEAST_NUMBERS", 6)
    monkeypatch.setattr(travel, "LEAST_FOR_A_RANK", 0)

    def told(groups: tuple[int, ...], before: int, behind: int) -> list[tuple[list[str], list[Any]]]:
        """By wave: the facts, and what A's vector is made of, in order."""
        dense = tiles(*["row"] * 6)[0]
        for number, layout in enumerate(dense):
            layout.groups = layout.row_groups = (A,) if number % 2 else (A, D)
        own = [Layout([Tile(10 + i, 500, 3, 250, 3)], groups, row_groups=groups) for i in range(before + behind)]
        layouts = [*own[:before], *dense, *own[before:]]
        kinds = {layout.pieces[0].key: "row" for layout in layouts}
        everyone = tuple(dict.fromkeys(group for layout in layouts for group in layout.groups))
        parts = waves_of(layouts, kinds, everyone)
        assert sorted(key for part in parts for key in part.keys) == sorted(kinds)
        found = []
        for places, ranges, facts in ((p.travel.places, p.travel.ranges.get(A, []), p.travel.facts(A)) for p in parts):
            inside = {at: name for name, at in places.items() if any(begin <= at < end for begin, end in ranges)}
            found.append((facts, [inside[at] for at in sorted(inside)]))
        while not found[-1][0]:
            found.pop()
        return found

    assert told((B,), before, behind) == told((C,), 0, 2) == told((A, B), 0, 0)
    assert len(told((B,), before, behind)) > 1 and all(facts for facts, _ in told((B,), before, behind))


def test_more_ranks_take_fewer_waves() -> None:
    """Of as many columns: what goes from rank to rank is not to be all latency."""
    columns, kinds = 1 << 23, dict.fromkeys(range(16), "factored")

    def count(ranks: int) -> int:
        cuts = [
            Cut(key, ranks, columns // 16, range(columns // 16, ranks * columns // 16, columns // 16), everybody=ranks)
            for key in kinds
        ]
        return len(travel.waves([Layout([], ("ranks",), ("ranks",), cuts, ranks=ranks)], kinds))

    assert [count(ranks) for ranks in (2, 512, 1024, 2048, 4096)] == [4, 4, 2, 1, 1]


def test_waves_have_every_parameter_once_and_flags_in_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(travel, "LEAST_FOR_A_RANK", 0)
    layouts, kinds = tiles("factored", "row", "column")
    parts = waves_of(layouts, kinds, everyone=(A,))
    assert [sorted(part.keys) for part in parts] == [[0], [1], [2]]
    assert [part.travel.flag(2) is not None for part in parts] == [True, False, False]
    assert [part.travel.infinite is not None for part in parts] == [True, False, False]


def test_waves_that_are_under_way_together_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(travel, "LEAST_FOR_A_RANK", 0)
    for at_once, different in ((True, 5), (False, UNDER_WAY)):
        parts = waves_of(*tiles(*["row"] * 5), everyone=())
        memory = settle(parts, torch.float32, torch.device("cpu"), at_once)
        assert len(memory) == len({part.work.data_ptr() for part in parts}) == different
        for i in range(5 - UNDER_WAY + 1):
            assert len({part.work.data_ptr() for part in parts[i : i + UNDER_WAY]}) == UNDER_WAY
