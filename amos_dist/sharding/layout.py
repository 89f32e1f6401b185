"""What a tensor in the optimizer's groups is made of: pieces of parameters, and who holds the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .piece import Piece


@dataclass(frozen=True)
class Cut:
    """A parameter of which several ranks hold pieces. borders: the elements at which a piece but the first begins."""

    key: int
    rows: int
    cols: int
    borders: tuple[int, ...]


@dataclass
class Layout:
    """Attributes:
    pieces: the parts of parameters that the tensor holds, in order of their offset.
    group: the process group over which the cut parameters are spread; None: this process holds them whole.
    cuts: the same list, in the same order, on every rank of `group`, whatever that rank holds.
    fault: why the layout cannot be trusted, "" if it can. Every rank learns of it before the first step.
    clone: the tensor is a framework's copy of a whole parameter, which is stepped once with zeros at start.
    """

    pieces: list[Piece]
    group: Any = None
    cuts: list[Cut] = field(default_factory=list)
    fault: str = ""
    clone: bool = False


@dataclass(eq=False)
class Original:
    """A parameter as the user gave it, before any framework flattened it.

    Attributes:
        key: its number, in the order of the groups.
        group: the number of its parameter group. place: its number there.
        trainable: whether it required a gradient then: what frameworks copy or flatten is decided at that time.
        rows, cols: its matrix view for the kind of moments that it has; "scalar" is 1 x numel, "full" is numel x 1.
    """

    key: int
    name: str
    group: int
    place: int
    param: torch.Tensor
    shape: tuple[int, ...]
    rows: int
    cols: int
    trainable: bool

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def whole(self, offset: int = 0) -> Piece:
        return Piece(self.key, self.rows, self.cols, 0, self.numel, offset)
