"""What a step holds and sends on so many ranks: from shapes alone, without tensors or a process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Parameter
from ..originals import describe
from ..settings import DEFAULTS
from ..sharding import Original
from ..state import has_rows, state_sizes
from .layout import Flat, entries_of_all, partitions
from .links import sent_by_all_reduce, sent_by_half_ring

NUMBER = 4  # bytes of a float32: sums, moments, decay, `step`; ZeRO's partitions are float32 whatever the model is
PLANES = 3  # of a workspace: travel.Space


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
        workspace: bytes that stay from step to step: of what travels, with the buffer that columns in shares travel
            in, and of the sums of the same parameters' other rows.
        shared_rows: rows of which other ranks have a part too.
        begins, ends: the first and the last element that it has: the parameter's name and the place in it.
    """

    rank: int
    elements: int
    pieces: int
    state: dict[str, int]
    workspace: int
    shared_rows: int
    begins: tuple[str, int] | None
    ends: tuple[str, int] | None

    @property
    def state_bytes(self) -> int:
        return sum(self.state.values())


@dataclass(frozen=True)
class Forecast:
    """What `setting` comes to, in bytes where nothing else is said.

    Attributes:
        most: the rank that holds the most state. state_of_all: of all ranks together.
        adam: state of a rank with Adam: two float32 numbers for each element of its partition.
        all_reduces: what each of a step's all-reduces adds up, in order: DeepSpeed calls step() for each partition.
        exchanges: of the columns of which each rank keeps a share, in the same order: what a reduce-scatter adds up,
            and what an all-gather brings back.
        cut_rows, cut_columns: those that lie on more than one rank.
        sent: by each rank in all of these, on rings. sent_by_holders: on average, if only the ranks that hold a part
            of a row or of a parameter added it up.
        gradients: that a reduce-scatter adds up. sent_of_gradients: by each rank.
    """

    setting: Setting
    moments: str
    parameters: int
    tensors: int
    most: RankForecast
    state_of_all: int
    adam: int
    all_reduces: list[int]
    exchanges: list[tuple[int, int]]
    cut_rows: int
    cut_columns: int
    sent: float
    sent_by_holders: float
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
    sums = [flat.sums for flat in flats]
    all_reduces = [NUMBER * each.added_up for each in sums if each.added_up]
    exchanges = [(NUMBER * flat.sums.exchanged, NUMBER * flat.gathered) for flat in flats if flat.gathered]
    sent = sent_by_all_reduce(sum(all_reduces), setting.ranks)
    entries = entries_of_all(flats, setting.ranks)
    each = torch.stack(list(entries.values())).sum(0)
    alike = sum(_alike(flats, setting.momentum).values())
    parameters = sum(original.numel for original in model.originals)
    gradients = parameters * setting.dtype.itemsize
    return Forecast(
        setting,
        model.moments,
        parameters,
        len(model.originals),
        forecast_of_rank(model, setting, int(each.argmax())),
        NUMBER * int(each.sum()) + setting.ranks * alike,
        sum(2 * NUMBER * flat.numel + NUMBER for flat in flats),
        all_reduces,
        exchanges,
        sum(each.rows for each in sums),
        sum(spread.cut_columns for flat in flats for spread in flat.spreads),
        sent + sent_by_half_ring(sum(map(sum, exchanges)), setting.ranks),
        NUMBER * sum(map(_between_holders, flats)) / setting.ranks,
        gradients,
        sent_by_half_ring(gradients, setting.ranks),
    )


def forecast_of_rank(model: Model, setting: Setting, rank: int) -> RankForecast:
    """What one rank has; without a look at the others."""
    flats = model.partitions(setting)
    pieces = [piece for flat in flats for piece in flat.pieces(rank)]
    entries = state_sizes(list(pieces), model.kinds)
    shared_rows = 0
    for piece in pieces:
        partial = sum(block.cols < piece.cols for block in piece.blocks())
        shared_rows += partial if has_rows(model.kinds[piece.key]) else 0
    names = [original.name for original in model.originals]
    first, last = (pieces[0], pieces[-1]) if pieces else (None, None)
    return RankForecast(
        rank,
        sum(flat.numel for flat in flats),
        len(pieces),
        {key: NUMBER * count for key, count in entries.items()} | _alike(flats, setting.momentum),
        NUMBER * sum(_workspace(flat, rank) for flat in flats),
        shared_rows,
        (names[first.key], first.start) if first else None,
        (names[last.key], last.start + last.length - 1) if last else None,
    )


def _alike(flats: Sequence[Flat], momentum: torch.dtype | None) -> dict[str, int]:
    """Bytes that every rank has, whatever its partition holds."""
    size = momentum.itemsize if momentum else 0
    return {"momentum": size * sum(flat.numel for flat in flats), "step": NUMBER * len(flats)}


def _workspace(flat: Flat, rank: int) -> int:
    """How many numbers: places in planes (plan._Bucket, travel.Travel), what a step begins with, and a buffer."""
    sums = flat.sums
    without_row = sum(spread.sums.means > 0 for spread in flat.spreads)  # travel.NO_ROW
    mine = sum(spread.shares.share for spread in flat.spreads if spread.shares and spread.cut_columns)  # travel.SHARE
    whole_rows = 0  # of parameters whose columns are cut
    for piece in flat.pieces(rank):
        spread = flat.spreads[piece.key - flat.keys.start]
        if spread.cut_columns and has_rows(spread.kind):
            whole_rows += sum(block.rows for block in piece.blocks() if block.cols == piece.cols)
    begin = sums.added_up + without_row
    return PLANES * (begin + sums.exchanged + mine + whole_rows) + begin + flat.gathered


def _between_holders(flat: Flat) -> int:
    """How many numbers go from a holder of a row, or of a parameter's columns, to the next one of it, and back."""
    total = 0
    for spread in flat.spreads:
        total += 2 * spread.borders_inside_rows if has_rows(spread.kind) else 0
        if spread.cut_columns:
            back = spread.planes if spread.shares else 1
            total += ((1 + back) * spread.cols + 2 * spread.sums.means) * len(spread.borders)
    return total


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
