"""What RelativeStep measures of a set of tensors, and how these move: one all-reduce for each process group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .originals import measured_of
from .sharding import Layout, Original, Reduction, Tile, dtensor, joined
from .state import compute_dtype

LARGEST = 2**24  # entries of whole tensors that the base steps at a time
LEFT_OUT = 2  # in LAMB: 0-d and 1-d


@dataclass(eq=False)
class Member:
    """A tensor of the optimizer's groups. originals: of its pieces. fault: why it cannot be stepped."""

    tensor: Tensor
    group: dict[str, Any]
    layout: Layout
    originals: list[Original]
    everywhere: dict[int, Original] = field(repr=False)
    fault: str = ""

    def is_spectral(self, original: Original) -> bool:
        return self.group["decay"] == "spectral" and len(original.shape) >= 2

    def width(self, original: Original) -> int:
        """How many numbers of a parameter are added up: |u|^2, |theta|^2, and |Wv|^2, W^T W v."""
        if self.is_spectral(original):
            return 3 + original.cols
        return 2 if self.group["norm"] == "measured" or self.group["sigma"] == "lamb" else 0

    def lamb(self, original: Original) -> int:
        """0: not LAMB's norm. 1: it is. LEFT_OUT: it would be."""
        return 0 if self.group["sigma"] != "lamb" else 1 if len(original.shape) >= 2 else LEFT_OUT


@dataclass(eq=False)
class _Part:
    """The part of a parameter that a tensor holds; place: of its sums."""

    member: Member
    number: int  # of the member
    original: Original
    range: slice | None  # of a flat partition
    place: int

    def of(self, local: Tensor) -> Tensor:
        return local if self.range is None else local.view(-1)[self.range]

    @property
    def theta(self) -> Tensor:
        return self.of(dtensor.local_of(self.member.tensor).detach())

    @property
    def spectral(self) -> bool:
        return self.member.is_spectral(self.original)


class Bucket:
    """Tensors that the base steps in one call."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.size = 0
        places: dict[int, int] = {}
        ranges: dict[Any, list[tuple[int, int]]] = {}
        for member in members:  # first what is added up over ranks: the same on all of them
            tile = member.layout.tile
            cut = [tile.key] if tile else [each.key for each in member.layout.cuts]
            for key in cut if member.layout.groups else ():
                width = member.width(member.everywhere[key])
                places[key] = self.size
                for group in member.layout.groups:
                    ranges.setdefault(group, []).append((self.size, self.size + width))
                self.size += width
        self.ranges = {group: joined(some) for group, some in ranges.items()}
        self.parts: list[_Part] = []
        for number, member in enumerate(members):
            for piece, original in zip(member.layout.pieces, member.originals, strict=True):
                if original.key not in places:
                    places[original.key] = self.size
                    self.size += member.width(original)
                flat = isinstance(piece, Tile) or not member.layout.is_partition
                held = None if flat else slice(piece.offset, piece.offset + piece.length)  # type: ignore[union-attr]
                self.parts.append(_Part(member, number, original, held, places[original.key]))
        self.device = dtensor.local_of(members[0].tensor).device
        self._products: dict[int, Tensor] = {}  # W v, by the number of the part
        kinds = [(p.member.lamb(p.original), p.member.group["norm"] == "measured") for p in self.parts]
        self._lamb = torch.tensor([lamb for lamb, _ in kinds], device=self.device)
        self._measured = torch.tensor([measured for _, measured in kinds], device=self.device)
        roots = [math.sqrt(part.original.numel) for part in self.parts]
        self._roots = torch.tensor(roots, dtype=torch.float64, device=self.device)
        # The last place is for what is not measured.
        self._index = torch.tensor(
            [p.place if p.member.width(p.original) else self.size for p in self.parts], device=self.device
        )

    def _moving(self, directions: list[Tensor | None]) -> Iterator[tuple[int, _Part, Tensor]]:
        for i, part in enumerate(self.parts):
            if (direction := directions[part.number]) is not None:
                yield i, part, part.of(direction)

    def measure(self, directions: list[Tensor | None], vectors: dict[Tensor, Tensor]) -> Reduction:
        """Starts the sums over ranks. directions: of each member, or None. vectors: of the power iterations."""
        self.sums = torch.zeros(self.size + 2, dtype=torch.float64, device=self.device)
        places, squares = [], []
        for i, part, direction in self._moving(directions):
            if not part.member.width(part.original):
                continue
            theta, compute = part.theta, compute_dtype(part.theta)
            for place, numbers in ((part.place, direction), (part.place + 1, theta)):
                places.append(place)
                squares.append(torch.linalg.vector_norm(numbers, dtype=compute).to(self.device, torch.float64).square())
            if part.spectral:
                matrix = theta.to(compute).reshape(-1, part.original.cols)
                product = self._products[i] = matrix @ self._vector(part, vectors, compute)
                self.sums[part.place + 2] = torch.linalg.vector_norm(product, dtype=torch.float64).square()
                self.sums[part.place + 3 : part.place + 3 + part.original.cols] = product @ matrix
        if places:
            self.sums[torch.tensor(places, device=self.device)] = torch.stack(squares)
        return Reduction(self.sums, self.ranges)

    @staticmethod
    def _vector(part: _Part, vectors: dict[Tensor, Tensor], compute: torch.dtype) -> Tensor:
        """v of the power iteration; at first chance, the same on every rank."""
        tensor = part.member.tensor
        if tensor not in vectors:
            start = torch.randn(1, *part.original.shape[1:], generator=torch.Generator().manual_seed(0))
            vectors[tensor] = start.to(part.theta.device, compute)
        return vectors[tensor].view(-1)

    def apply(self, directions: list[Tensor | None], vectors: dict[Tensor, Tensor]) -> None:
        """Moves the parameters: the sums are complete."""
        scale = self._scales()
        for i, part, direction in self._moving(directions):
            theta, group = part.theta, part.member.group
            rho = group["peak_lr"] * float(group["lr"]) / (2 * group["q"])
            keep = 1.0 if group["decay"] == "none" or part.member.lamb(part.original) == LEFT_OUT else 1 - rho
            compute = compute_dtype(theta)
            step = direction.to(compute).mul_(scale[i].to(theta.device, compute))
            if part.spectral:
                self._spectral(i, part, step, rho, vectors)
                keep = 1.0
            if theta.dtype == compute:
                theta.mul_(keep).add_(step)
            else:
                theta.copy_(theta.to(compute).mul_(keep).add_(step))
        self._products.clear()

    def _spectral(self, i: int, part: _Part, step: Tensor, rho: float, vectors: dict[Tensor, Tensor]) -> None:
        """Takes rho sigma_1 u_1 v_1^T = rho u (W^T u)^T with u = W v / |W v| off, and moves v on to W^T u."""
        tensor, cols = part.member.tensor, part.original.cols
        square, image = self.sums[part.place + 2], self.sums[part.place + 3 : part.place + 3 + cols]
        product = self._products[i]
        share = torch.where(square > 0, rho / square, 0.0)
        step.view(-1, cols).addr_(product, (image * share).to(step.device, step.dtype), alpha=-1)
        length = torch.linalg.vector_norm(image)
        old = vectors[tensor].view(-1)
        new = torch.where(length > 0, image / length, old.to(image))
        vectors[tensor] = new.to(old).view(vectors[tensor].shape)

    def _scales(self) -> Tensor:
        """alpha_t / |u_t| of each part, float64."""
        rates = []
        for part in self.parts:
            group, sigma = part.member.group, part.member.group["sigma"]
            if sigma == "auto":
                sigma = measured_of(part.original, group)
            root = 1.0 if sigma == "lamb" else math.sqrt(part.original.numel) * float(sigma)
            rates.append(float(group["lr"]) * root)
        rate = torch.tensor(rates, dtype=torch.float64, device=self.device)
        of_direction, of_theta = self.sums[self._index].sqrt(), self.sums[self._index + 1].sqrt()
        plain = (self._lamb == LEFT_OUT) | ((self._lamb == 1) & (of_theta == 0))
        over = torch.where(plain, 1.0, torch.where(self._measured, of_direction, self._roots))
        times = torch.where((self._lamb == 1) & ~plain, of_theta, 1.0)
        return torch.where(over > 0, rate * times / over, 0.0)


def buckets(members: list[Member]) -> list[Bucket]:
    """All tensors that are cut over ranks in one, for one all-reduce; the others by few, for less memory."""
    cut = [member for member in members if member.layout.groups]
    chosen: list[list[Member]] = [cut] if cut else []
    room = 0
    for member in (member for member in members if not member.layout.groups):
        if member.tensor.numel() > room:
            chosen.append([])
            room = LARGEST
        chosen[-1].append(member)
        room -= member.tensor.numel()
    return [Bucket(some) for some in chosen]
