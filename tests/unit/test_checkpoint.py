"""Cutting whole state for partitions, and putting it together again, on one process; and folders that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amos_dist import checkpoint
from amos_dist.sharding import Piece
from amos_dist.state import whole_shapes

SHAPES = [(7, 5), (1, 4), (6, 1), (3, 2, 5)]
KINDS = ("row", "column", "factored", "scalar", "full")


def entry(shape: tuple[int, ...], kind: str) -> dict[str, Tensor]:
    row_dims = {"scalar": 0, "full": len(shape)}.get(kind, 1)
    shapes = whole_shapes(kind, shape, row_dims)
    return {"step": torch.tensor(3.0), **{key: torch.randn(size) for key, size in shapes.items()}}


def pieces(key: int, shape: tuple[int, ...], kind: str, borders: list[int]) -> list[Piece]:
    numel = torch.Size(shape).numel()
    rows = {"scalar": 1, "full": numel}.get(kind, shape[0])
    ends = [*borders, numel]
    return [Piece(key, rows, numel // rows, a, b - a) for a, b in zip([0, *borders], ends, strict=True) if a < b]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_cut_is_whole_again(shape: tuple[int, ...], kind: str) -> None:
    """For each pair of borders: every number is sent once, from where it belongs to where it was."""
    numel, whole = torch.Size(shape).numel(), entry(shape, kind)
    for first in range(numel + 1):
        for second in range(first, numel + 1):
            sent: dict[str, Tensor] = {key: torch.full_like(value, torch.nan) for key, value in whole.items()}
            for piece in pieces(0, shape, kind, [first, second]):
                part = checkpoint.cut([piece], {0: whole}, {0: kind})
                for share, numbers in checkpoint.shares([piece], part, {0: kind}):
                    place = sent[share.name].view(-1)[share.first : share.first + share.size]
                    assert place.isnan().all()  # nobody has sent it yet
                    place.copy_(numbers)
            for key, value in whole.items():
                assert torch.equal(sent[key], value), (key, first, second)


def test_a_partition_of_several_parameters() -> None:
    """Their state lies one behind the other; the steps become one."""
    one, two = entry((4, 3), "factored"), entry((5, 2), "row")
    one["step"], two["step"] = torch.tensor(2.0), torch.tensor(9.0)
    some = [Piece(0, 4, 3, 7, 5), Piece(1, 5, 2, 0, 3, 5)]
    state = checkpoint.cut(some, {0: one, 1: two}, {0: "factored", 1: "row"})
    assert state["step"] == 9
    assert torch.equal(state["row_moment"], torch.cat([one["row_moment"][2:, 0], two["row_moment"][:2, 0]])[None])
    assert torch.equal(state["column_moment"], one["column_moment"])
    assert torch.equal(state["decay"], torch.cat([one["decay"][2:, 0], two["decay"][:2, 0]])[None])
