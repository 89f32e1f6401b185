"""Which part of which parameter a tensor is, and the all-reduce. Knows shapes and collectives, and no formula."""

from __future__ import annotations

import torch

from . import dtensor, elsewhere, whole, zero
from .elsewhere import FINDERS
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
        elsewhere.find(tensor, originals)
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
