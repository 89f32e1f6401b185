"""Pieces and blocks cover what they should; and a Plan over simulated ranks gives what one process gives."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from amos_dist import travel
from amos_dist.member import Member
from amos_dist.plan import Plan
from amos_dist.reference import amos_step
from amos_dist.sharding import Layout, Original, Piece, holders, reduce, shares
from amos_dist.sharding.elsewhere import contradiction
from amos_dist.sharding.layout import Cut
from amos_dist.state import state_sizes
from amos_dist.tables import Constants

from ..conftest import relative_error
from .compare import KINDS, randn

hypothesis_settings.register_profile("quick", max_examples=200, deadline=None, derandomize=True, database=None)
hypothesis_settings.load_profile("quick")


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    rows, cols = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    start = draw(st.integers(0, rows * cols))
    length = draw(st.integers(0, rows * cols - start))
    return Piece(0, rows, cols, start, length, draw(st.integers(0, 5)))


@given(pieces())
def test_blocks_cover_exactly_the_piece(piece: Piece) -> None:
    """Every element once, in order, at the row and column that its number says."""
    blocks = piece.blocks()
    covered = [
        (block.offset + r * block.cols + c, block.row + r, block.column + c)
        for block in blocks
        for r in range(block.rows)
        for c in range(block.cols)
    ]
    elements = range(piece.start, piece.start + piece.length)
    assert covered == [(k - piece.start, k // piece.cols, k % piece.cols) for k in elements]
    assert len(blocks) <= 3
    # A block of several rows has whole ones: it has no gaps.
    assert all(block.rows == 1 or (block.column, block.cols) == (0, piece.cols) for block in blocks)


@given(pieces())
def test_touched_rows(piece: Piece) -> None:
    rows = {k // piece.cols for k in range(piece.start, piece.start + piece.length)}
    assert piece.touched_rows == len(rows)
    assert not rows or piece.first_row == min(rows)


@given(st.integers(1, 8), st.integers(1, 8), st.sets(st.integers(1, 63)), st.integers(0, 3))
def test_who_holds_a_row(rows: int, cols: int, some: set[int], first: int) -> None:
    """By brute force: the owner of each element."""
    borders = sorted(border for border in some if border < rows * cols)
    cut = Cut(0, rows, cols, borders, first)
    owners = [first + sum(border <= k for border in borders) for k in range(rows * cols)]
    assert list(cut.holders) == sorted(set(owners))
    for row in range(rows):
        assert list(cut.holders_of_row(row)) == sorted(set(owners[row * cols : (row + 1) * cols]))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
def test_each_column_has_one_keeper(cols: int, ranks: int, first: int) -> None:
    held = Cut(0, 12, cols, range(1, ranks), first)
    for cut in (held, Cut(0, 12, cols, range(1, ranks), everybody=ranks)):
        kept = [column for rank in cut.sharers for column in cut.share_of(rank)]
        assert kept == list(range(cols))
    assert held.sharers == range(first, first + ranks)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
def test_most_holders_of_a_row(rows: int, cols: int, begin: int, step: int) -> None:
    borders = range(min(begin, step), rows * cols, step)
    held = [Cut(0, rows, cols, some) for some in (borders, tuple(borders))]
    most = max(len(held[0].holders_of_row(row)) for row in range(rows))
    assert most <= held[0].most_holders_of_a_row == held[1].most_holders_of_a_row <= most + 1


def test_a_parameter_without_elements() -> None:
    piece = Piece(0, 0, 4, 0, 0)
    assert piece.blocks() == [] and piece.touched_rows == 0
    assert set(state_sizes([piece], {0: "factored"}).values()) == {0}


# ---- several ranks, as threads -----------------------------------------------------------------------------


class Ranks:
    """Stands for a process group: exchanges and adds up what each thread brings, and counts."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=20)
        self.brought: list[Any] = [None] * size
        self.calls = 0
        self.elements = 0
        self.local = threading.local()

    def bring(self, mine: Any) -> list[Any]:
        """What all ranks bring."""
        self.brought[self.local.rank] = mine
        self.barrier.wait()
        everything = list(self.brought)
        self.barrier.wait()
        return everything

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of each rank a row."""
        return torch.stack(self.bring(tensor.clone()))

    def add(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self.exchange(tensor).sum(0))
        if self.local.rank == 0:
            self.calls += 1
            self.elements += tensor.numel()


class FakePending:
    """Takes the place of reduce.Pending."""

    def __init__(self, tensor: torch.Tensor, group: Ranks, collective: Any = None, *given: torch.Tensor) -> None:
        if collective is None:
            group.add(tensor)
        elif collective is shares._scatter:
            tensor.copy_(group.exchange(given[0]).sum(0).chunk(group.size)[group.local.rank])
        elif isinstance(collective, functools.partial):
            assert collective.func is holders._all_to_all
            sizes = collective.keywords
            sent = group.bring((given[0].clone(), sizes["input_split_sizes"]))
            parts = [each.split(some)[group.local.rank] for each, some in sent]
            assert [part.numel() for part in parts] == sizes["output_split_sizes"]
            tensor.copy_(torch.cat(parts))
        else:
            assert collective is shares._gather
            tensor.copy_(group.exchange(given[0]).view(-1))

    def wait(self) -> None:
        pass


NUMBERS = [0.0, 0.3, 0.9, 0.0, 0.9, 1.5, 0.01, 0.25, 0.25, 2.0**-125, 1.0, -1.0]  # lr and t are the group's and step's
SETTINGS: dict[str, Any] = {"lr": 0.1, "sigma": 0.3, "beta": 0.9, "momentum": 0.9, "clip_value": 1.5, "extra_l2": 0.01}
SHAPES = [(5, 7), (1, 3), (11, 2), (4, 6), (2, 1), (13, 5)]
VIEWS = {"scalar": lambda n, rows, cols: (1, n), "full": lambda n, rows, cols: (n, 1)}


def constants(key: int, group: Any) -> Constants:
    return Constants(1.0, NUMBERS)


def shard(rank: int, ranks: Ranks, kinds: list[str], flat: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """This rank's part of all parameters laid one behind the other, as ZeRO-1 and -2 do it."""
    part = -(-flat.numel() // ranks.size)
    layout, begin = Layout([], (ranks,), (ranks,), rank=rank, ranks=ranks.size), 0
    for key, ((rows, cols), kind) in enumerate(zip(SHAPES, kinds, strict=True)):
        n = rows * cols
        R, C = VIEWS.get(kind, lambda n, rows, cols: (rows, cols))(n, rows, cols)
        borders, share = tuple(b - begin for b in range(part, flat.numel(), part) if begin < b < begin + n), None
        if borders:
            layout.cuts.append(Cut(key, R, C, borders, begin // part))
            share = layout.cuts[-1].share_of(rank)
        first, last = max(begin, rank * part), min(begin + n, (rank + 1) * part)
        if first < last:
            layout.pieces.append(Piece(key, R, C, first - begin, last - first, first - rank * part, share))
        begin += n
    return flat[rank * part : (rank + 1) * part].clone(), layout


def parts(rank: int, ranks: Ranks, kinds: list[str], flat: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    """This rank's part of each parameter, one behind the other, as ZeRO-3 does it, with its share of the columns."""
    layout, begin, held = Layout([], (ranks,), (ranks,), rank=rank, ranks=ranks.size), 0, [flat[:0]]
    for key, ((rows, cols), kind) in enumerate(zip(SHAPES, kinds, strict=True)):
        n = rows * cols
        R, C = VIEWS.get(kind, lambda n, rows, cols: (rows, cols))(n, rows, cols)
        part = -(-n // ranks.size)
        first, last = min(n, rank * part), min(n, (rank + 1) * part)
        cut = Cut(key, R, C, tuple(range(part, n, part)), everybody=ranks.size)
        layout.cuts.append(cut)
        layout.pieces.append(Piece(key, R, C, first, last - first, sum(map(len, held)), cut.share_of(rank)))
        held.append(flat[begin + first : begin + last])
        begin += n
    return torch.cat(held), layout


def joined(results: list[torch.Tensor], size: int, shard: Any) -> torch.Tensor:
    """All parameters, one behind the other."""
    numbers = torch.arange(sum(rows * cols for rows, cols in SHAPES))
    places = torch.cat([shard(rank, Ranks(size), ["row"] * len(SHAPES), numbers)[0] for rank in range(size)])
    return torch.cat(results)[places.argsort()]


@pytest.mark.parametrize("fused", [True, False], ids=["native", "fallback"])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
@pytest.mark.parametrize("shard", [shard, parts], ids=["zero 2", "zero 3"])
@pytest.mark.parametrize(
    ("size", "least", "few"),
    [(2, 1 << 18, 8), (3, 1, 8), (4, 15, 2), (4, 1 << 18, 1)],
    ids=["2", "3, waves", "4, few waves", "4, everybody"],
)
def test_simulated_ranks(
    size: int, least: int, few: int, shard: Any, kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """least: numbers in a wave: with 1 each parameter with columns travels in one of its own.

    few: rows that more ranks hold are added up by all.
    """
    monkeypatch.setattr(travel, "FEW", few)
    monkeypatch.setattr(reduce, "Pending", FakePending)
    monkeypatch.setattr(travel, "LEAST_NUMBERS", least)
    monkeypatch.setattr(travel, "LEAST_FOR_A_RANK", 0)
    kinds = [kind if kind != "mixed" else KINDS[i % len(KINDS)] for i in range(len(SHAPES))]
    params = [randn(i, *shape, dtype=torch.float64) for i, shape in enumerate(SHAPES)]
    grads = [[randn(100 * t + i, *shape, dtype=torch.float64) for i, shape in enumerate(SHAPES)] for t in range(3)]
    flat = torch.cat([p.flatten() for p in params])
    flat_grads = [torch.cat([g.flatten() for g in some]) for some in grads]
    states: list[dict[str, Any]] = [{} for _ in params]
    for some in grads:
        for param, grad, state, moments in zip(params, some, states, kinds, strict=True):
            amos_step(param, grad, state, moments=moments, **SETTINGS)

    ranks = Ranks(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        ranks.local.rank = rank
        try:
            tensor, layout = shard(rank, ranks, kinds, flat)
            named = dict(enumerate(kinds))
            state = {"step": torch.zeros(()), "momentum": torch.zeros_like(tensor)}
            for key, entries in state_sizes(layout.pieces, named).items():
                state[key] = torch.zeros(entries, dtype=torch.float64)
            member = Member(tensor, {"lr": 0.1}, layout, "flat", torch.float64, fused, capturable=False, master=False)
            one = Plan([member], named)
            for gradient in flat_grads:
                tensor.grad = shard(rank, ranks, kinds, gradient)[0]
                one.run({tensor: state}, constants)
            results[rank] = tensor
        except BaseException as error:
            ranks.barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert relative_error(joined(results, size, shard), torch.cat([p.flatten() for p in params])) <= 1e-12
    # Nothing is added up over all ranks but what many hold; of ZeRO-3 the means of `factored` too.
    ranks.local.rank = 0
    rows = sum(
        sum(len(cut.holders_of_row(row)) > 1 for row in range(cut.rows))
        for cut in shard(0, ranks, kinds, flat)[1].cuts
        if kinds[cut.key] != "column" and cut.most_holders_of_a_row > few
    )
    means = 2 * sum(each == "factored" for each in kinds) if shard is parts else 0
    assert ranks.elements == (rows + means) * len(flat_grads)
    assert (rows > 0) == (few < 8 and kind not in ("column", "full")) or few == 2
    assert least < 1000 or ranks.calls <= len(flat_grads)


def originals_of(shapes: list[tuple[int, int]]) -> list[Original]:
    """Of two dimensions, one of which is that of rows."""
    return [
        Original(key, f"p{key}", 0, key, torch.empty(shape, device="meta"), shape, 1, trainable=True)
        for key, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("shard", [shard, parts], ids=["zero 2", "zero 3"])
@pytest.mark.parametrize("size", [2, 3, 9])
def test_layouts_do_not_contradict_themselves(size: int, shard: Any) -> None:
    flat = torch.zeros(sum(rows * cols for rows, cols in SHAPES))
    for rank in range(size):
        _, layout = shard(rank, Ranks(size), ["row"] * len(SHAPES), flat)
        layout.cuts = [cut for cut in layout.cuts if cut.borders]
        cut_keys = {cut.key for cut in layout.cuts}
        layout.pieces = [replace(p, share=p.share if p.key in cut_keys else None) for p in layout.pieces]  # type: ignore[type-var]
        assert contradiction(layout, -(-flat.numel() // size) * size, originals_of(SHAPES), rank, size) == ""


@pytest.mark.parametrize(
    ("of_layout", "of_piece", "of_cut", "expected"),
    [
        ({}, {}, {}, ""),
        ({"rank": 0}, {}, {}, "of rank 0 of 3, but this is rank 1 of 3"),
        ({"ranks": 1}, {}, {}, "of rank 1 of 1, but this is rank 1 of 3"),
        ({"fellows": ()}, {}, {}, "one process group, in `groups` and in `fellows`"),
        ({"cuts": []}, {"share": None}, {}, "12 elements from 12 on, expected (0, 24)"),
        ({"pieces": []}, {}, {}, "no piece of 'p0', of which this rank holds elements or keeps columns"),
        ({}, {"key": 1}, {}, "a Piece is of parameter 1 as 4 x 6, which there is not"),
        ({}, {"rows": 6, "cols": 4}, {}, "a Piece is of parameter 0 as 6 x 4, which there is not"),
        ({}, {"start": 11}, {}, "12 elements from 11 on, expected (12, 24)"),
        ({}, {"length": 11}, {}, "11 elements from 12 on, expected (12, 24)"),
        ({}, {"offset": 3}, {}, "at 3 overlaps another one, or ends behind the tensor's 14"),
        ({}, {"share": None}, {}, "None for its share of columns, expected range(3, 6)"),
        ({}, {}, {"rows": 3}, "a Cut is of parameter 0 as 3 x 6, which there is not"),
        ({}, {}, {"everybody": 3}, "range(3, 6) for its share of columns, expected range(2, 4)"),
        ({}, {}, {"everybody": 2}, "is cut between the ranks [0, 1] (everybody=2), of 3"),
        ({}, {}, {"first": 2}, "is cut between the ranks [2, 3] (everybody=0), of 3"),
        ({}, {}, {"borders": (12, 12)}, "has borders [12, 12], which do not ascend between 0 and 24"),
    ],
)
def test_a_layout_that_contradicts_itself(
    of_layout: dict[str, Any], of_piece: dict[str, Any], of_cut: dict[str, Any], expected: str
) -> None:
    """What a function in sharding.FINDERS may get wrong, of 4 x 6 elements of which ranks 0 and 1 have 12 each."""
    piece = replace(Piece(0, 4, 6, 12, 12, 0, range(3, 6)), **of_piece)
    cut = replace(Cut(0, 4, 6, (12,)), **of_cut)
    layout = replace(Layout([piece], ("ranks",), ("ranks",), [cut], rank=1, ranks=3), **of_layout)
    found = contradiction(layout, 14, originals_of([(4, 6)]), 1, 3)
    assert found.endswith(expected) and bool(found) == bool(expected)


def test_a_piece_that_is_there_twice() -> None:
    whole = Piece(0, 4, 6, 0, 24, 0)
    twice = Layout([whole, replace(whole, offset=24)])
    assert "overlaps another one" in contradiction(twice, 48, originals_of([(4, 6)]), 0, 1)
