"""What the sections of the report share: their form, and parameters that lie where they should."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ("row", "column", "factored", "scalar", "full")
HYPER: dict[str, Any] = {"lr": 0.125, "sigma": 0.5, "beta": 0.9}
# On both sides of the kernels' borders: rows for a thread, a warp and a CTA; one and several tiles and chunks.
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (7,), (768,), (1, 1), (3, 7), (5, 255), (33, 768), (130, 300), (2, 5000), (1, 40000), (700, 1),
    (64, 3, 7, 7), (1000, 1030), (768, 3072), (5001, 96),
]  # fmt: skip
QUICK_SHAPES: list[tuple[int, ...]] = [(), (7,), (1, 1), (5, 255), (2, 5000), (70, 1), (6, 3, 7, 7), (130, 300)]


@dataclass
class Section:
    """What one section found. `skipped`: why nothing was done."""

    title: str
    lines: list[str] = field(default_factory=list)  # Markdown
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    data: dict[str, Any] = field(default_factory=dict)  # for the JSON
    seconds: float = 0.0


def shapes(quick: bool) -> list[tuple[int, ...]]:
    return QUICK_SHAPES if quick else SHAPES


@functools.cache
def _draws(sizes: tuple[tuple[int, ...], ...], dtype: torch.dtype, steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(size, generator=generator).to(dtype) for size in sizes] for _ in range(1 + steps)]


def draws(sizes: list[tuple[int, ...]], dtype: torch.dtype, steps: int) -> list[list[Tensor]]:
    """The parameters, then the gradients of every step, on the CPU. They are drawn once: copy what is changed."""
    return _draws(tuple(sizes), dtype, steps)


def placed(value: Tensor, device: torch.device, offset: int = 0) -> Tensor:
    """A copy on the device, `offset` elements off the alignment that an allocation has."""
    flat = torch.zeros(value.numel() + offset, dtype=value.dtype, device=device)
    view = flat[offset:].view(value.shape)
    view.copy_(value)
    return view


def parameters(values: list[Tensor], device: torch.device, offset: int = 0) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(placed(value, device, offset)) for value in values]


def give(params: list[torch.nn.Parameter], grads: list[Tensor], offset: int = 0) -> None:
    """Sets the gradients, as copies on the parameters' device."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = placed(grad, param.device, offset)


def error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
