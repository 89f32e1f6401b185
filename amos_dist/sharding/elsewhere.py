"""Layouts that functions for other frameworks say (docs/sharding.md), looked at before anything depends on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist

from .layout import Cut, Layout, Original
from .piece import Tile

# Asked first: called with a tensor of a parameter group and the parameters with which that group was made, each returns
# None where the tensor is none of its own.
FINDERS: list[Callable[[torch.Tensor, list[Original]], Layout | None]] = []


def find(tensor: torch.Tensor, originals: list[Original]) -> Layout | None:
    """The layout that one of FINDERS says, with a fault where it contradicts itself; None: none knows the tensor."""
    layout = next(filter(None, (each(tensor, originals) for each in FINDERS)), None)
    if layout is not None and layout.tile is None and not layout.fault:
        group = next(iter((*layout.fellows, *layout.groups)), None)
        place = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        if wrong := contradiction(layout, tensor.numel(), originals, *place):
            groups = layout.fellows or layout.groups
            fault = f"a function in sharding.FINDERS contradicts itself: {wrong}. See docs/sharding.md."
            return Layout([], groups, groups, fault=fault)
    return layout


def contradiction(layout: Layout, numel: int, originals: list[Original], rank: int, ranks: int) -> str:
    """Why a flat partition of `numel` elements cannot be that of `rank` of `ranks`; "" if nothing speaks against it."""
    if layout.groups != layout.fellows or len(layout.groups) > 1:
        return "a flat partition has one process group, in `groups` and in `fellows`"
    if (layout.rank, layout.ranks) != (rank, ranks):
        return f"its layout is of rank {layout.rank} of {layout.ranks}, but this is rank {rank} of {ranks}"
    known = {original.key: original for original in originals}
    for each in (*layout.cuts, *layout.pieces):
        original = known.get(each.key)
        if original is None or (each.rows, each.cols) != (original.rows, original.cols):
            return (
                f"a {type(each).__name__} is of parameter {each.key} as {each.rows} x {each.cols}, which there is not"
            )
    cuts = {cut.key: cut for cut in layout.cuts}
    for cut in layout.cuts:
        if wrong := _wrong_cut(cut, known[cut.key].numel, ranks):
            return f"parameter {known[cut.key].name!r} {wrong}"
    held: set[int] = set()
    end = 0
    for piece in layout.pieces:
        name, of = known[piece.key].name, cuts.get(piece.key)
        if isinstance(piece, Tile):
            return f"its tile of {name!r} is not alone in the tensor"
        expected = _interval(of, rank, known[piece.key].numel)
        if (piece.start, piece.start + piece.length) != expected and (piece.length or expected[0] < expected[1]):
            return f"its piece of {name!r} is {piece.length} elements from {piece.start} on, expected {expected}"
        if piece.share != (share := of.share_of(rank) if of else None):
            return f"its piece of {name!r} has {piece.share} for its share of columns, expected {share}"
        if piece.key in held or piece.offset < end or piece.offset + piece.length > numel:
            return f"its piece of {name!r} at {piece.offset} overlaps another one, or ends behind the tensor's {numel}"
        end = piece.offset + piece.length
        held.add(piece.key)
    for cut in layout.cuts:
        if cut.key not in held and (rank in cut.holders or (cut.everybody and len(cut.share_of(rank)))):
            return f"it has no piece of {known[cut.key].name!r}, of which this rank holds elements or keeps columns"
    return ""


def _wrong_cut(cut: Cut, numel: int, ranks: int) -> str:
    edges = _edges(cut, numel)
    if len(edges) < 3 or any(a >= b for a, b in itertools.pairwise(edges)):
        return f"has borders {list(cut.borders)[:8]}, which do not ascend between 0 and {numel}"
    if cut.holders.start < 0 or cut.holders.stop > ranks or cut.everybody not in (0, ranks):
        return f"is cut between the ranks {list(cut.holders)[:8]} (everybody={cut.everybody}), of {ranks}"
    return ""


def _interval(cut: Cut | None, rank: int, numel: int) -> tuple[int, int]:
    """The elements that a rank holds."""
    if cut is None:
        return 0, numel
    if rank not in cut.holders:
        return 0, 0
    edges = _edges(cut, numel)
    return edges[rank - cut.first], edges[rank - cut.first + 1]


def _edges(cut: Cut, numel: int) -> list[int]:
    """Where each holder's elements begin, and the end."""
    return [0, *cut.borders, numel]
