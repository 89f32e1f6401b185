"""The order of what travels, and one all-reduce for each process group, whatever that order is."""

from __future__ import annotations

import itertools

import pytest
import torch

from amos_dist.sharding import Cut, Layout, Tile, reduce
from amos_dist.sharding.reduce import Reduction, joined, neighbours
from amos_dist.travel import COLUMNS, SHARE, Space, Travel

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


def breaks(order: list[tuple[int, ...]]) -> int:
    """How many ranges the groups have together."""
    return sum(len(joined([(i, i + 1) for i, some in enumerate(order) if g in some])) for g in (A, B, C, D))


@pytest.mark.parametrize("name", SECTIONS)
def test_each_number_is_added_up_once_over_each_of_its_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "Pending", FakePending)
    order = neighbours(SECTIONS[name])
    assert sorted(order) == sorted(SECTIONS[name])
    groups = list(dict.fromkeys(group for some in SECTIONS[name] for group in some))
    ranges = {g: joined([(3 * i, 3 * i + 3) for i, some in enumerate(order) if g in some]) for g in groups}
    vector = torch.ones(3 * len(order) + 2)
    FakePending.calls = 0
    Reduction(vector, ranges).wait()
    expected = [float(torch.tensor(some).prod()) for some in order for _ in range(3)]
    assert vector.tolist() == [*expected, 1.0, 1.0]
    assert FakePending.calls == len(groups)


@pytest.mark.parametrize("name", ["FSDP", "FSDP and TP", "found last", "a chain"])
def test_groups_of_a_mesh_find_their_numbers_side_by_side(name: str) -> None:
    order = neighbours(SECTIONS[name])
    assert breaks(order) == len({group for some in order for group in some})


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
    travel = Travel(*tiles(kind, kind), Space())
    assert (travel.numbers_of(A), travel.numbers_of(B)) == (2 * over_a, 2 * over_b)
    assert all(len(ranges) == 1 for ranges in travel.ranges.values())


def test_a_step_begins_with_zeros_and_flags() -> None:
    travel = Travel(*tiles("factored", "row"), Space())
    work = torch.full((3, travel.size), 7.0)
    first, second = travel.flag(0), travel.flag(1)
    assert first is not None and second is not None
    travel.begin(work, [second])
    expected = torch.zeros(travel.size)
    expected[first] = 1
    assert torch.equal(work[0], expected)
    assert bool((work[1:] == 7).all())


def test_shared_columns_begin_with_zeros() -> None:
    layout = Layout([], ("ranks",), ("ranks",), [Cut(0, 3, 5, (8,), sharers=2)])
    travel = Travel([layout], {0: "factored"}, Space())
    work = torch.full((3, travel.size), 7.0)
    travel.begin(work, [])
    assert not work[0].any()
    whole, mine = travel.places[COLUMNS, 0, 0], travel.places[SHARE, 0, 0]
    assert (mine - whole, travel.size - mine) == (6, 3)  # for two ranks three columns each
    assert travel.numbers_of("ranks") == 3 + 6  # the cut row, two for the mean, the columns


def test_a_tile_is_one_block_or_none() -> None:
    assert [tuple(block) for block in Tile(0, 8, 6, 4, 3, 15).blocks()] == [(0, 0, 0, 4, 3)]
    assert Tile(0, 8, 6, 0, 3).blocks() == Tile(0, 8, 6, 4, 0).blocks() == []
