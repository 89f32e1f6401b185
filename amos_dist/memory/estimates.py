"""What training holds on one rank, computed from shapes: of Amos by amos_dist.scaling, of others by keepers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..models import Parameter, parameters_of, total
from ..scaling.forecast import Model, forecast, forecast_of_rank
from ..scaling.forecast import Setting as Plan
from ..scaling.layout import Flat, Spread
from .keepers import KEEPERS, amos_state, state_of, temporary_of
from .passes import Gathered, Reduced

FLOAT = torch.float32.itemsize
DOUBLE = torch.float64.itemsize  # DeepSpeed takes the norm of each gradient in float64
AMOS: dict[str, torch.dtype | None] = {  # by the dtype of its momentum
    "amos": None,
    "amos-momentum": torch.float32,
    "amos-momentum-bf16": torch.bfloat16,
    "amos-momentum-int8": torch.int8,
}
OPTIMIZERS = (*AMOS, *KEEPERS)


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        zero: 0: plain torch, DDP on more than one rank. 1 to 3: DeepSpeed's stages.
        dtype: of parameters and gradients.
        master: zero 0: parameters below float32 are stepped in a float32 copy. DeepSpeed always does that.
        moments: Amos's. device: "cuda" or "cpu": on a CPU Amos's workspace is smaller.
        reduce_bucket_size: DeepSpeed's, in elements; so are the other sizes below it.
        overlap_comm: DeepSpeed's. None: its default, only at stage 3.
    """

    zero: int = 0
    ranks: int = 1
    dtype: torch.dtype = torch.bfloat16
    master: bool = True
    moments: str = "factored"
    device: str = "cuda"
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 10**9
    max_reuse_distance: int = 10**9
    sub_group_size: int = 10**9

    @property
    def has_masters(self) -> bool:
        """Whether what is stepped is a float32 copy of the parameters, in plain torch."""
        return self.master and self.dtype.itemsize < FLOAT


@dataclass(frozen=True)
class Estimate:
    """Bytes that one rank holds. Not counted: activations, what a framework and its communication hold themselves.

    Attributes:
        elements: of the whole model. rank: whose this is: the one that holds the most, where no other is asked for.
        parameters: that the model computes with. gradients: of them, when backward() has ended.
        master: float32 copies that are stepped. state: of the optimizer, by key.
        workspace: of what Amos adds up over ranks (the all-reduce's buffer), and other sums that stay.
        buckets: the most that a pass adds to these gradients: where gradients wait and travel, and what is gathered.
        staying: how much of the buckets is there all the time. keeps_gradients: so are gradients.
        step: the most that a step adds to what is held when backward() has ended.
    """

    optimizer: str
    setting: Setting
    elements: int
    rank: int
    parameters: int
    gradients: int
    master: int
    state: dict[str, int]
    workspace: int
    buckets: int
    staying: int
    keeps_gradients: bool
    step: int

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())

    @property
    def base(self) -> int:
        """Always."""
        return self.parameters + self.master + self.state_bytes + self.workspace

    @property
    def held(self) -> int:
        """Between a step and the next pass."""
        return self.base + self.staying + (self.gradients if self.keeps_gradients else 0)

    @property
    def backward(self) -> int:
        """At the most in a pass."""
        return self.base + self.gradients + self.buckets

    @property
    def peak(self) -> int:
        """At the most, in a pass or in a step."""
        return max(self.backward, self.base + self.gradients + self.staying + self.step)


def estimate(
    model: str | Sequence[Parameter], optimizer: str = "amos", setting: Setting | None = None, **changes: Any
) -> Estimate:
    """What one rank holds.

    Args:
        model: as `python -m amos_dist memory` takes it, or names and shapes. optimizer: of `OPTIMIZERS`.
        setting: default: plain torch on one rank, bfloat16 with masters. changes: attributes of it, and `rank`.

    Raises:
        ValueError: there is no such model or optimizer, or a number is out of range.
    """
    rank = changes.pop("rank", None)
    setting = replace(setting or Setting(), **changes)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"no optimizer {optimizer!r} is known here. Give {', '.join(OPTIMIZERS)}.")
    if setting.zero not in (0, 1, 2, 3) or setting.ranks < 1:
        raise ValueError(
            f"zero={setting.zero} on {setting.ranks} ranks cannot be. Give a stage from 0 to 3, and 1 rank or more."
        )
    if rank is not None and not 0 <= rank < setting.ranks:
        raise ValueError(f"rank={rank} is not among {setting.ranks} ranks. Give 0 to {setting.ranks - 1}.")
    parameters = [each for each in (parameters_of(model) if isinstance(model, str) else model) if total([each])]
    if not parameters:
        raise ValueError("no parameter of the model has an element. Give a model that can be trained.")
    return (_partitioned if setting.zero else _whole)(parameters, optimizer, setting, rank)


def _whole(parameters: list[Parameter], optimizer: str, setting: Setting, rank: int | None) -> Estimate:
    """Every rank has everything."""
    elements, dtype = total(parameters), setting.dtype
    gradients = elements * dtype.itemsize
    master, step, workspace = FLOAT * elements * setting.has_masters, 0, 0
    if optimizer in AMOS:
        given = parameters, dtype, setting.moments, AMOS[optimizer], setting.has_masters, setting.device
        state, workspace = amos_state(*given)
        state.pop("master", None)
    else:
        keeper, stepped = KEEPERS[optimizer], torch.float32 if setting.has_masters else dtype
        tensors = [(shape, keeper.takes(shape)) for _, shape in parameters]
        state = state_of(keeper, tensors, stepped)
        # Gradients for the copy; Amos reads those that are there.
        step = temporary_of(keeper, tensors, stepped) + master
    buckets = gradients if setting.ranks > 1 else 0  # DDP's
    sizes = Sizes(gradients, gradients, master, buckets, buckets, False, step)
    return Estimate(optimizer, setting, elements, rank or 0, **sizes._asdict(), state=state, workspace=workspace)


def _partitioned(parameters: list[Parameter], optimizer: str, setting: Setting, rank: int | None) -> Estimate:
    """DeepSpeed, seen with 0.19.8."""
    keeper = KEEPERS.get(optimizer)
    groups = [list(range(len(parameters)))]
    if keeper is not None:
        own = [keeper.takes(each.shape) for each in parameters]
        groups = [[place for place, is_own in enumerate(own) if is_own == wanted] for wanted in (True, False)]
    model = Model(
        [[parameters[place] for place in group] for group in groups], setting.moments if keeper is None else "row"
    )
    plan = Plan(setting.zero, setting.ranks, AMOS.get(optimizer), setting.dtype, setting.sub_group_size)
    flats = model.partitions(plan)
    spreads = dict(zip(itertools.chain(*groups), itertools.chain(*(flat.spreads for flat in flats)), strict=True))
    # As passes.py has them: what the whole model has itself comes last.
    forward = sorted(spreads, key=lambda place: ("." not in parameters[place].name, place))
    if rank is None:
        most = {forecast(model, plan).most.rank} if keeper is None else {0}
        ranks = most if setting.zero == 3 else most | _busiest(flats, setting.ranks)
    else:
        ranks = {rank}
    found = []
    for one in sorted(ranks):
        workspace = temporary = 0
        if keeper is None:
            planned = forecast_of_rank(model, plan, one, setting.device)
            state, workspace = dict(planned.state), planned.workspace + planned.sums
        else:
            tensors = [((flat.numel,), flat.keys.start < len(groups[0])) for flat in flats]
            state = state_of(keeper, tensors, torch.float32)
            temporary = temporary_of(keeper, tensors, torch.float32)
        if setting.zero == 3:
            has = _stage3(parameters, flats, setting, one, temporary)
        else:
            has = _stage12([spreads[place] for place in forward], flats, setting, one, temporary)
        found.append(
            Estimate(optimizer, setting, total(parameters), one, **has._asdict(), state=state, workspace=workspace)
        )
    return max(found, key=lambda each: each.peak)


def _busiest(flats: list[Flat], ranks: int) -> set[int]:
    """At stages 1 and 2: the ranks with the most gradients, with the most when others wait, with the longest part."""
    changes, before, longest, begin = [0] * (ranks + 1), dict[int, int](), (0, 0), 0
    for spread in itertools.chain.from_iterable(flat.spreads for flat in flats):
        changes[spread.holders.start] += spread.numel
        changes[spread.holders.stop] -= spread.numel
        for rank in {*spread.holders[:2], spread.holders[-1]}:  # between them all parts are alike
            longest = max(longest, (spread.held(rank)[1], -rank))
        for rank in spread.holders:
            before.setdefault(rank, begin)  # elements that stage 1 has reduced when this rank begins to keep
        begin += spread.numel
    touched = list(itertools.accumulate(changes[:-1]))
    early = [elements - before.get(rank, 0) for rank, elements in enumerate(touched)]
    return {touched.index(max(touched)), early.index(max(early)), -longest[1]}


class Sizes(NamedTuple):
    """As Estimate has them."""

    parameters: int
    gradients: int
    master: int
    buckets: int
    staying: int
    keeps_gradients: bool
    step: int


def _copies(dtype: torch.dtype) -> int:
    """Bytes for an element of the gradients that a step flattens, and makes float32."""
    return FLOAT if dtype.itemsize == FLOAT else dtype.itemsize + FLOAT


def _stage12(spreads: list[Spread], flats: list[Flat], setting: Setting, rank: int, temporary: int) -> Sizes:
    """Whole parameters in one buffer. A rank keeps the whole gradients of parameters of which it has a part."""
    size, mine = setting.dtype.itemsize, [piece for flat in flats for piece in flat.pieces(rank)]
    partition = sum(flat.numel for flat in flats)
    kept = sum(piece.rows * piece.cols for piece in mine)
    # Without overlap stage 1 begins when all gradients are there.
    at_once = sum(spread.numel for spread in spreads) if setting.zero == 1 and not setting.overlap_comm else 0
    passing = Reduced(rank, kept, setting.reduce_bucket_size, keeps_large=setting.zero == 1)
    most = passing.run([each for flat in flats for each in flat.spreads] if at_once else reversed(spreads), at_once)
    buckets = size * (setting.reduce_bucket_size * (2 if setting.overlap_comm else 1) + most - kept)
    copies = _copies(setting.dtype) * max(flat.numel for flat in flats)
    norm = DOUBLE * max((piece.length for piece in mine), default=0)
    step = max(copies, norm, FLOAT * partition + temporary - size * kept)
    return Sizes(size * partition * setting.ranks, size * kept, FLOAT * partition, buckets, 0, False, step)


def _stage3(parameters: list[Parameter], flats: list[Flat], setting: Setting, rank: int, temporary: int) -> Sizes:
    """Partitions, and whole parameters that are small. Its bucket and its gradients' partition are always there."""
    size, partition = setting.dtype.itemsize, sum(flat.numel for flat in flats)
    threshold = setting.param_persistence_threshold
    persistent = sum(one for each in parameters if (one := total([each])) <= threshold) if setting.ranks > 1 else 0
    bucket, gradients = size * setting.reduce_bucket_size, size * partition
    norm = DOUBLE * max((piece.length for flat in flats for piece in flat.pieces(rank)), default=0)
    # In float32 the gradient of one parameter alone is stepped as it is.
    joined = [flat.numel for flat in flats if len(flat.keys) > 1 or size < FLOAT]
    sub_group = max(joined, default=0)
    step = max(_copies(setting.dtype) * sub_group, norm, FLOAT * sub_group + temporary)
    step = max(0, step - size * persistent)  # which are gathered again at its end
    passing = Gathered(
        parameters,
        setting.ranks,
        threshold=threshold,
        prefetch=setting.prefetch_bucket_size,
        max_live=setting.max_live_parameters,
        max_reuse=setting.max_reuse_distance,
        bucket_size=setting.reduce_bucket_size,
    )
    buckets = bucket + size * passing.run()
    return Sizes(size * (partition + persistent), gradients, FLOAT * partition, buckets, bucket, True, step)
