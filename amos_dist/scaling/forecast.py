"""What a step holds and sends on so many ranks: from shapes alone, without tensors or a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..member import Member
from ..models import Parameter, without_memory
from ..originals import describe
from ..plan import Plan
from ..runs import scale_count
from ..settings import DEFAULTS
from ..sharding import Layout, Original
from ..state import SCALE, has_rows, state_sizes
from .layout import Flat, entries_of_all, partitions, runs_of_all
from .links import sent_by_all_reduce, sent_by_half_ring

NUMBER = 4  # bytes of a float32: sums, moments, decay, `step`; ZeRO's partitions are float32 whatever the model is


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        zero: the stage, 1 to 3. momentum: the dtype of its buffer; None: no momentum.
        dtype: of the parameters, and so of the gradients that ranks add up.
        sub_group_size: DeepSpeed's, of stage 3.
    """

    zero: int
    ranks: int
    momentum: torch.dtype | None = None
    dtype: torch.dtype = torch.bfloat16
    sub_group_size: int = 10**9


@dataclass(frozen=True)
class RankForecast:
    """What one rank has.

    Attributes:
        elements: of its partitions, padding included. pieces: the parts of parameters that they hold.
        state: bytes by key.
        workspace: bytes that stay from step to step: of the waves that are under way at once, of what travels in them
            and of the sums of the same parameters' other rows, with the buffers that columns travel in.
        sums: bytes that stay beside these, for the sums of what is whole on the rank.
        collectives: of each step() of a partition: kinds as Wave.moves has them, and bytes.
        shared_rows: rows of which other ranks have a part too.
        begins, ends: the first and the last element that it has: the parameter's name and the place in it.
    """

    rank: int
    elements: int
    pieces: int
    state: dict[str, int]
    workspace: int
    sums: int
    collectives: list[list[tuple[str, int]]]
    shared_rows: int
    begins: tuple[str, int] | None
    ends: tuple[str, int] | None

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())

    def sizes(self, *kinds: str) -> list[int]:
        """The bytes of the collectives of these kinds, in order."""
        return [size for some in self.collectives for kind, size in some if kind in kinds]

    def sent(self, ranks: int) -> float:
        """Bytes that it sends in all, on rings where all ranks take part."""
        return (
            sent_by_all_reduce(sum(self.sizes("all_reduce")), ranks)
            + sent_by_half_ring(sum(self.sizes("scatter", "gather")), ranks)
            + sum(self.sizes("holders"))
        )


@dataclass(frozen=True)
class Forecast:
    """What `setting` comes to, in bytes where nothing else is said.

    Attributes:
        most: the rank that holds the most state. state_of_all: of all ranks together.
        adam: state of a rank with Adam: two float32 numbers for each element of its partition.
        cut_rows, cut_columns: those that lie on more than one rank.
        sent: by the rank that holds the most state, in a step. sent_by_everybody: if all ranks added up all cut rows
            and, at stages 1 and 2, all cut columns, whoever holds a part of them.
        gradients: that a reduce-scatter adds up. sent_of_gradients: by each rank.
    """

    setting: Setting
    moments: str
    parameters: int
    tensors: int
    most: RankForecast
    state_of_all: int
    adam: int
    cut_rows: int
    cut_columns: int
    sent: float
    sent_by_everybody: float
    gradients: int
    sent_of_gradients: float


class Model:
    """The parameters of a model as an optimizer with such moments sees them.

    Args:
        groups: its parameter groups. moments: of all parameters.
    """

    def __init__(self, groups: Sequence[Sequence[Parameter]], moments: str) -> None:
        group = {**DEFAULTS, "lr": 1.0, "moments": moments}
        self.moments = moments
        self.groups: list[list[Original]] = []
        self.kinds: dict[int, str] = {}
        for number, parameters in enumerate(groups):
            self.groups.append([])
            for place, (name, shape) in enumerate(parameters):
                param, key = torch.empty(shape, device="meta"), len(self.kinds)
                _, self.kinds[key], row_dims = describe(param, name, group, {}, None)
                self.groups[-1].append(Original(key, name, number, place, param, shape, row_dims, True))
        self.originals = [original for some in self.groups for original in some]

    def partitions(self, setting: Setting) -> list[Flat]:
        return partitions(self.groups, self.kinds, setting.zero, setting.ranks, setting.sub_group_size)


def forecast(model: Model, setting: Setting) -> Forecast:
    """What `setting` comes to on all ranks."""
    flats = model.partitions(setting)
    entries = entries_of_all(flats, setting.ranks)
    each = torch.stack(list(entries.values())).sum(0)
    if setting.momentum == torch.int8:
        each += runs_of_all(flats, setting.ranks)
    alike = sum(_alike(flats, setting.momentum).values())
    parameters = sum(original.numel for original in model.originals)
    gradients = parameters * setting.dtype.itemsize
    spreads = [spread for flat in flats for spread in flat.spreads]
    most = forecast_of_rank(model, setting, int(each.argmax()))
    cut_rows = sum(spread.cut_rows for spread in spreads if has_rows(spread.kind))
    cut_columns = sum(spread.cut_columns for spread in spreads)
    added = NUMBER * (cut_rows + (cut_columns if setting.zero < 3 else 0))
    return Forecast(
        setting,
        model.moments,
        parameters,
        len(model.originals),
        most,
        NUMBER * int(each.sum()) + setting.ranks * alike,
        sum(2 * NUMBER * flat.numel + NUMBER for flat in flats),
        cut_rows,
        cut_columns,
        most.sent(setting.ranks),
        most.sent(setting.ranks) - sum(most.sizes("holders")) + sent_by_all_reduce(added, setting.ranks),
        gradients,
        sent_by_half_ring(gradients, setting.ranks),
    )


def forecast_of_rank(model: Model, setting: Setting, rank: int, device: str = "cuda") -> RankForecast:
    """What one rank has; without a look at the others.

    Args:
        device: where its partitions will be: on a "cpu" `sums` are fewer.
    """
    flats = model.partitions(setting)
    layouts = [flat.layout(rank, setting.ranks) for flat in flats]
    pieces = [piece for flat in flats for piece in flat.pieces(rank)]
    entries = state_sizes(list(pieces), model.kinds)
    shared_rows = 0
    for piece in pieces:
        partial = sum(block.cols < piece.cols for block in piece.blocks())
        shared_rows += partial if has_rows(model.kinds[piece.key]) else 0
    plans = [_plan(flat.numel, layout, model.kinds, device) for flat, layout in zip(flats, layouts, strict=True)]
    waves = [[wave for bucket in plan.buckets for wave in bucket.waves] for plan in plans]
    names = [original.name for original in model.originals]
    scales = {SCALE: NUMBER * scale_count(pieces)} if setting.momentum == torch.int8 else {}
    first, last = (pieces[0], pieces[-1]) if pieces else (None, None)
    return RankForecast(
        rank,
        sum(flat.numel for flat in flats),
        len(pieces),
        {key: NUMBER * count for key, count in entries.items()} | scales | _alike(flats, setting.momentum),
        sum(tensor.nbytes for plan in plans for bucket in plan.buckets for tensor in bucket.staying),
        sum(work.nbytes for plan in plans for bucket in plan.buckets for work in (bucket.local_work, bucket.kept_work)),
        [[(kind, NUMBER * count) for wave in some for kind, count in wave.moves] for some in waves],
        shared_rows,
        (names[first.key], first.start) if first else None,
        (names[last.key], last.start + last.length - 1) if last else None,
    )


def _plan(numel: int, layout: Layout, kinds: dict[int, str], device: str) -> Plan:
    """The plan of a real step, of a partition without memory."""
    with without_memory(device) as place:
        tensor = torch.empty(numel, device=place)
        member = Member(tensor, {}, layout, "partition", None, fused=False, capturable=False, master=False)
        return Plan([member], kinds, agreed=True)


def _alike(flats: Sequence[Flat], momentum: torch.dtype | None) -> dict[str, int]:
    """Bytes that every rank has, whatever its partition holds."""
    size = momentum.itemsize if momentum else 0
    return {"momentum": size * sum(flat.numel for flat in flats), "step": NUMBER * len(flats)}


def as_json(found: Forecast | RankForecast) -> dict[str, Any]:
    """For programs."""
    plain = {**vars(found)}
    if isinstance(found, RankForecast):
        return plain | {"state_bytes": found.state_bytes}
    setting = {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in vars(plain.pop("setting")).items()
    }
    return setting | plain | {"most": as_json(found.most)}
