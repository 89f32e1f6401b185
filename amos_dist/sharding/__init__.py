"""Which part of which parameter a tensor is, and the all-reduce. Knows shapes and collectives, and no formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from . import dtensor, whole, zero
from .holders import Holders, Shared
from .layout import Cut, Layout, Original
from .piece import Block, Piece, Tile
from .reduce import Pending, Reduction, disagreement, joined
from .shares import Shares
from .whole import followers

__all__ = [
    "FINDERS",
    "Block",
    "Cut",
    "Holders",
    "Layout",
    "Original",
    "Pending",
    "Piece",
    "Reduction",
    "Shared",
    "Shares",
    "Tile",
    "disagreement",
    "followers",
    "joined",
    "layout_of",
    "refuse_unknown",
]

# Other frameworks' (docs/sharding.md), asked first: called with a tensor of a parameter group and the parameters with
# which that group was made, each returns None where the tensor is none of its own.
FINDERS: list[Callable[[torch.Tensor, list[Original]], Layout | None]] = []


def refuse_unknown(param: torch.Tensor, name: str) -> None:
    """Raises:
    RuntimeError: `param` is sharded in a way that is not known here.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise RuntimeError(
            f"parameter {name!r} is flattened by FSDP1, so that rows and columns are lost. "
            "Use FSDP2: torch.distributed.fsdp.fully_shard."
        )
    if dtensor.is_dtensor(param):
        dtensor.refuse_unplaced(param, name)


def layout_of(
    tensor: torch.Tensor, index: int, count: int, originals: list[Original], everywhere: list[Original]
) -> Layout:
    """What `tensor`, the index-th of the `count` tensors of a parameter group, holds.

    Args:
        originals: the parameters with which that group was made. everywhere: those of all groups.

    Raises:
        RuntimeError: the tensor is neither one of them nor a partition of them.
    """
    layout = (
        _found_elsewhere(tensor, originals)
        or whole.find(tensor, originals)
        or zero.find(tensor, originals, everywhere, alone=count == 1)
        or whole.find_clone(tensor, index, originals)
    )
    if layout is None:
        raise RuntimeError(
            f"the tensor at place {index} of a parameter group, of shape {tuple(tensor.shape)}, is not one of the "
            "group's parameters nor a partition of them that amos_dist knows. "
            "Use plain torch, DDP, FSDP2 or DeepSpeed ZeRO 0 to 3, and do not replace `params` of a group by hand."
        )
    return layout


def _found_elsewhere(tensor: torch.Tensor, originals: list[Original]) -> Layout | None:
    """By one of FINDERS."""
    layout = next(filter(None, (find(tensor, originals) for find in FINDERS)), None)
    if layout is not None and layout.is_partition and not layout.fault:
        group = layout.fellows[0]
        if wrong := layout.contradiction(dist.get_rank(group), dist.get_world_size(group)):
            layout.fault = f"a function in sharding.FINDERS contradicts itself: {wrong}. See docs/sharding.md."
    return layout
