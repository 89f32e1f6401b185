"""Momentum in 8 bits: where its runs lie, and how it gets from float32 and back, for checkpoints and other dtypes.

The elements of each block (sharding/piece.py) are read as runs of 256, the last one shorter, and each run has a scale.
So a parameter that is cut has other runs than the whole, but where each rank's rows begin at a multiple of 256.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .reference import RUN, nearest_int8, widened_int8
from .sharding import Piece, Tile, dtensor
from .state import SCALE, State

AT_ONCE = RUN * 2**14  # elements


def run_count(numel: Any) -> Any:
    """How many runs so many elements of one block have: an int, or a tensor of them."""
    return -(-numel // RUN)


def scale_count(pieces: Iterable[Piece | Tile]) -> int:
    """How many scales a tensor needs that is made of `pieces`."""
    return sum(run_count(block.rows * block.cols) for piece in pieces for block in piece.blocks())


def _places(pieces: Iterable[Piece | Tile]) -> Iterator[tuple[slice, slice]]:
    """Where the elements of each block are in the tensor, and their scales; some at a time, for what is worked out."""
    run = 0
    for piece in pieces:
        for block in piece.blocks():
            begin, size = piece.offset + block.offset, block.rows * block.cols
            for first in range(0, size, AT_ONCE):
                some, at = min(size - first, AT_ONCE), run + first // RUN
                yield slice(begin + first, begin + first + some), slice(at, at + run_count(some))
            run += run_count(size)


def widened(momentum: Tensor, scale: Tensor, pieces: Iterable[Piece | Tile]) -> Tensor:
    """The very numbers in float32, of the shape of `momentum`: what is here, not a DTensor. Padding is zero."""
    flat, scales = momentum.reshape(-1), scale.view(-1)
    wide = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
    for elements, runs in _places(pieces):
        wide[elements] = widened_int8(flat[elements], scales[runs])
    return wide.view(momentum.shape)


def narrowed(momentum: Tensor, pieces: list[Piece | Tile]) -> tuple[Tensor, Tensor]:
    """The nearest int8, of the shape of `momentum`, and the scales. What `widened` gave for these pieces comes back."""
    flat = momentum.reshape(-1)
    narrow = torch.zeros(flat.shape, dtype=torch.int8, device=flat.device)
    scale = torch.zeros(scale_count(pieces), dtype=torch.float32, device=flat.device)
    for elements, runs in _places(pieces):
        narrow[elements], scale[runs] = nearest_int8(flat[elements].float())
    return narrow.view(momentum.shape), scale


def in_float32(state: State, tensor: Tensor, pieces: Iterable[Piece | Tile]) -> State:
    """The state of a tensor as checkpoints have it: momentum of the tensor's shape, of a DTensor a DTensor."""
    if not is_narrow(state):
        return state
    held = widened(dtensor.local_of(state["momentum"]), state[SCALE], pieces).view(dtensor.local_of(tensor).shape)
    if dtensor.is_dtensor(tensor):
        held = dtensor.like(tensor, held, range(tensor.dim()))
    return {key: value for key, value in state.items() if key != SCALE} | {"momentum": held}


def is_narrow(state: State) -> bool:
    """Whether a tensor's state has its momentum in 8 bits."""
    return SCALE in state
