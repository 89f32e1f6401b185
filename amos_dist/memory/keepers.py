"""What each optimizer keeps of the tensors that it steps, and what its step needs for a moment beside that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import optimizer as own
from ..models import Parameter, Shape, without_memory

STEP = 4  # bytes of a 0-d float32 tensor: torch's `step`
MEASURED = "measured in its steps"  # tests/unit/test_memory.py compares with torch's own
DOCUMENTED = "by its documentation"


@dataclass(frozen=True)
class Keeper:
    """An optimizer other than Amos.

    Attributes:
        state: bytes by key that it keeps of a tensor of such shape and dtype. once: of all tensors together.
        temporary: the most bytes that stepping such a tensor needs beside that; tensors are stepped one by one.
        make: torch's own, of tensors; None: torch has none.
        matrices: only these are its own. The rest has AdamW.
    """

    name: str
    source: str
    state: Callable[[Shape, torch.dtype], dict[str, int]]
    temporary: Callable[[Shape, torch.dtype], int] = lambda shape, dtype: 0
    make: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    once: dict[str, int] = field(default_factory=dict)
    matrices: bool = False

    def takes(self, shape: Shape) -> bool:
        return not self.matrices or len(shape) == 2


def _like(*keys: str) -> Callable[[Shape, torch.dtype], dict[str, int]]:
    """Buffers of the tensor's own shape and dtype; `step` is a number."""

    def state(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
        return {key: STEP if key == "step" else math.prod(shape) * dtype.itemsize for key in keys}

    return state


def _adafactor(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns over the last two dimensions; of a vector, such as a ZeRO partition, one number an element."""
    if len(shape) < 2:
        return {"step": STEP, "variance": math.prod(shape) * dtype.itemsize}
    numel = math.prod(shape) * dtype.itemsize
    return {"step": STEP, "row_var": numel // shape[-1], "col_var": numel // shape[-2]}


def _adafactor_temporary(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize * (2 if len(shape) < 2 else 1)


def _muon_temporary(shape: Shape, dtype: torch.dtype) -> int:
    """The update, two bfloat16 matrices of its size and two of the smaller side squared.

    Not of a flat partition: DeepSpeed's Muon takes the matrices while gradients come in, which is not counted.
    """
    if len(shape) != 2:
        return 0
    return math.prod(shape) * (dtype.itemsize + 4) + 4 * min(shape) ** 2


SMALLEST, BLOCK = 4096, 256  # bitsandbytes: below so many elements float32; one scale for so many


def _adam8bit(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    numel = math.prod(shape)
    if numel < SMALLEST:
        return {"state1": 4 * numel, "state2": 4 * numel}
    return {"state1": numel, "state2": numel, "absmax": 2 * 4 * -(-numel // BLOCK)}


KEEPERS = {
    "adamw": Keeper(
        "AdamW, fused",
        MEASURED,
        _like("exp_avg", "exp_avg_sq", "step"),
        make=lambda tensors: torch.optim.AdamW(tensors, lr=1e-3, fused=True),
    ),
    "adafactor": Keeper(
        "Adafactor",
        MEASURED,
        _adafactor,
        _adafactor_temporary,
        lambda tensors: torch.optim.Adafactor(tensors, lr=1e-3, foreach=False),
    ),
    "adam8bit": Keeper("8-bit Adam", DOCUMENTED, _adam8bit, once={"qmap": 2 * 256 * 4}),
    "lion": Keeper("Lion", DOCUMENTED, _like("exp_avg")),
    "muon": Keeper(
        "Muon, AdamW on the rest",
        MEASURED,
        _like("momentum_buffer"),
        _muon_temporary,
        lambda tensors: torch.optim.Muon(tensors, lr=1e-3),
        matrices=True,
    ),
    "sgd": Keeper(
        "SGD, momentum, fused",
        MEASURED,
        _like("momentum_buffer"),
        make=lambda tensors: torch.optim.SGD(tensors, lr=1e-3, momentum=0.9, fused=True),
    ),
}


def add(sizes: dict[str, int], more: dict[str, int]) -> None:
    for key, size in more.items():
        sizes[key] = sizes.get(key, 0) + size


def state_of(keeper: Keeper, tensors: Sequence[tuple[Shape, bool]], dtype: torch.dtype) -> dict[str, int]:
    """Bytes by key of all tensors: their shapes, and whether the optimizer takes them itself."""
    sizes = dict(keeper.once)
    for shape, taken in tensors:
        add(sizes, (keeper if taken else KEEPERS["adamw"]).state(shape, dtype))
    return sizes


def temporary_of(keeper: Keeper, tensors: Sequence[tuple[Shape, bool]], dtype: torch.dtype) -> int:
    return max((keeper.temporary(shape, dtype) for shape, taken in tensors if taken), default=0)


def amos_state(
    parameters: Sequence[Parameter],
    dtype: torch.dtype,
    moments: str,
    momentum: torch.dtype | None,
    master: bool,
    device: str,
) -> tuple[dict[str, int], int]:
    """Bytes by key, and of the workspace, of Amos on whole parameters: it makes them, of tensors without memory.

    Args:
        device: where the parameters will be: on a CPU the workspace is smaller.
    """
    with without_memory(device) as place:
        named = [(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=place))) for name, shape in parameters]
        keywords: dict[str, Any] = {"momentum": 0.9, "momentum_dtype": momentum} if momentum else {}
        made = own.Amos(named, lr=1.0, sigma=1.0, moments=moments, master_weights=master, fused=False, **keywords)
        sizes: dict[str, int] = {}
        plan = made._plan([param for _, param in named])
        for state in made.state.values():
            add(sizes, {key: value.nbytes for key, value in state.items()})
        workspace = sum(work.nbytes for bucket in plan.buckets for work in bucket.works)
    return sizes, workspace
