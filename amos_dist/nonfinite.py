"""What becomes of a step in which a gradient is not finite; plan.py finds that out, on all ranks alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from .member import Member
from .sharding import dtensor
from .state import compute_dtype


def tell(members: Iterable[Member], groups: Iterable[dict[str, Any]], is_first: bool) -> None:
    """A step is left out; nothing has changed. is_first: it has not happened before.

    Raises:
        RuntimeError: a group says on_nonfinite="raise".
    """
    name = _culprit(members)
    what = f"the gradient of {name!r}" if name else "a gradient on another rank"
    what += " is not finite, or its squares are too large to be added up"
    if any(group["on_nonfinite"] == "raise" for group in groups):
        raise RuntimeError(
            f"{what}. Nothing has changed: lower the lr or clip the gradients, or leave such steps out with "
            "on_nonfinite='skip'."
        )
    if is_first:
        warnings.warn(
            f"{what}: no parameter was stepped, on any rank. `skipped_steps` of the optimizer counts such steps; "
            "on_nonfinite='raise' makes them an error.",
            stacklevel=5,
        )


def _culprit(members: Iterable[Member]) -> str:
    """The name of a parameter with such a gradient; nothing, where it is on another rank."""
    for member in members:
        if member.checked and member.tensor.grad is not None:
            grad = dtensor.local_of(member.tensor.grad)
            if not bool(torch.linalg.vector_norm(grad, dtype=compute_dtype(grad)).isfinite()):
                return member.name
    return ""
