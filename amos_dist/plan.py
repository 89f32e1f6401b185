"""The way of one step: gradients -> sums (kernel) -> one all-reduce per process group -> slots -> update (kernel).

A Plan is made once for a set of tensors. It knows where the state and the sums of each block are; running it is a few
calls of kernels. What lies whole in this process takes one kernel call; only what is cut at a rank's border travels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ops
from .sharding import Layout, Pending, cut_rows, disagreement
from .state import State, compute_dtype, has_columns, has_rows, state_sizes

CODES = {"row": 0, "scalar": 0, "full": 0, "column": 1, "factored": 2}  # csrc/block.h: enum Moments
BLOCK_FIELDS = 14  # csrc/ops.cpp
HYPER_FIELDS = 11  # csrc/block.h: struct Hyper

Numbers = Callable[[int, dict[str, Any], int], list[float]]


@dataclass(eq=False)
class Member:
    """A tensor of the optimizer's groups, in a Plan."""

    tensor: Tensor
    group: dict[str, Any]
    layout: Layout
    name: str
    momentum_dtype: torch.dtype | None  # None: without momentum
    fused: bool | None
    fault: str = ""  # why it cannot be stepped; every rank of its process group learns of it before anything changes


class _Space:
    """Places in the three planes of a workspace; see csrc/block.h."""

    def __init__(self) -> None:
        self.used = self.size = 0

    def take(self, count: int) -> int:
        self.used += count
        self.size = max(self.size, self.used)
        return self.used - count

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(3, self.size, dtype=dtype, device=device)


@dataclass(eq=False)
class _Blocks:
    """Rows of the table that csrc/ops.cpp reads, and the parameter and the tensor of each."""

    fields: list[list[int]] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    table: Tensor = field(default_factory=lambda: torch.empty(0, BLOCK_FIELDS, dtype=torch.int64))

    def add(self, key: int, fields: list[int]) -> None:
        self.keys.append(key)
        self.fields.append(fields)

    def freeze(self) -> None:
        self.table = torch.tensor(self.fields, dtype=torch.int64).view(-1, BLOCK_FIELDS)


@dataclass(eq=False)
class _Launch:
    """Tensors that share one set of dtypes: one call of a kernel serves all."""

    members: list[Member] = field(default_factory=list)
    local: _Blocks = field(default_factory=_Blocks)  # of parameters that are whole here
    shared: _Blocks = field(default_factory=_Blocks)  # of parameters that are cut
    names: str = ""  # one line for each tensor, for messages

    def freeze(self) -> None:
        """All members are there: makes what every step uses."""
        self.local.freeze()
        self.shared.freeze()
        self.names = "\n".join(member.name for member in self.members)


class _Bucket:
    """Tensors on one device with one compute dtype: they share a workspace, and so an all-reduce."""

    def __init__(self, device: torch.device, dtype: torch.dtype, members: list[Member], kinds: dict[int, str]) -> None:
        self.device, self.dtype, self.kinds = device, dtype, kinds
        self.launches: dict[Any, _Launch] = {}
        self.ranges: dict[Any, tuple[int, int]] = {}  # process group -> its part of plane 0
        self._row_places: dict[tuple[int, int], int] = {}
        self._column_places: dict[int, int] = {}
        self._shared, self._local = _Space(), _Space()
        for group in dict.fromkeys(member.layout.group for member in members):
            if group is not None:
                self._place_travelling(group, [m.layout for m in members if m.layout.group is group])
        self.travelling = self._shared.used
        for member in members:
            kind = (member.tensor.dtype, member.momentum_dtype, member.fused)
            launch = self.launches.setdefault(kind, _Launch())
            self._add(launch, member)
        for launch in self.launches.values():
            launch.freeze()
        self.shared_work = self._shared.tensor(dtype, device)
        self.local_work = self._local.tensor(dtype, device)

    def _place_travelling(self, group: Any, layouts: list[Layout]) -> None:
        """Places for what is cut between ranks: the same on every rank, whatever it holds or has gradients for."""
        begin = self._shared.used
        for cut in (cut for layout in layouts for cut in layout.cuts):
            kind = self.kinds[cut.key]
            if has_rows(kind):
                for row in cut_rows(cut.rows, cut.cols, list(cut.borders)):
                    self._row_places[cut.key, row] = self._shared.take(1)
            if has_columns(kind):
                self._column_places[cut.key] = self._shared.take(cut.cols)
        self.ranges[group] = (begin, self._shared.used)

    def _add(self, launch: _Launch, member: Member) -> None:
        number = len(launch.members)
        launch.members.append(member)
        row_state = column_state = decay_state = 0
        for piece in member.layout.pieces:
            kind = self.kinds[piece.key]
            for i, block in enumerate(piece.blocks()):
                columns = piece.cols if has_columns(kind) and i == 0 else 0
                cut_row = self._row_places.get((piece.key, block.row))
                cut_columns = self._column_places.get(piece.key)
                shared = cut_row is not None or cut_columns is not None
                if shared:
                    row_work = self._shared.take(block.rows) if has_rows(kind) and cut_row is None else cut_row or 0
                    column_work = cut_columns or 0
                else:
                    if self.device.type == "cpu":
                        self._local.used = 0  # one block after another: they use the same places
                    # `row` moments stay on chip, but for a row that is too long for one thread
                    rows = block.rows if kind == "factored" or block.rows == 1 or self.device.type != "cpu" else 0
                    row_work = self._local.take(rows if has_rows(kind) else 0)
                    column_work = self._local.take(columns)
                below = block.row - piece.first_row if has_rows(kind) else 0
                (launch.shared if shared else launch.local).add(
                    piece.key,
                    [
                        number,
                        piece.offset + block.offset,
                        block.rows,
                        block.cols,
                        CODES[kind],
                        piece.cols,
                        piece.rows,
                        row_state + below,
                        column_state,
                        decay_state + below,
                        row_work,
                        column_work,
                        block.column,
                        columns,
                    ],
                )
            sizes = state_sizes([piece], self.kinds)
            row_state += sizes["row_moment"]
            column_state += sizes["column_moment"]
            decay_state += sizes["decay"]


class Plan:
    """One step for a fixed set of tensors.

    Args:
        members: the tensors, in the same order on every rank.
        kinds: the moments of each parameter, by key.
        numbers: (key, group, t) -> the hyper-parameters in the order of csrc/block.h's Hyper.
    """

    def __init__(self, members: list[Member], kinds: dict[int, str], numbers: Numbers) -> None:
        self.members, self.numbers = members, numbers
        self.agreed = False
        together: dict[tuple[torch.device, torch.dtype], list[Member]] = {}
        for member in members:
            together.setdefault((member.tensor.device, compute_dtype(member.tensor)), []).append(member)
        self.buckets = [_Bucket(device, dtype, some, kinds) for (device, dtype), some in together.items()]

    def run(self, states: dict[Tensor, State]) -> None:
        """Moves every tensor that has a gradient by one step, and its state with it.

        Raises:
            RuntimeError: on every rank, where any rank cannot take this step; nothing has changed then.
        """
        if not self.agreed:
            self._agree()
        calls = [_Call(bucket, launch, self, states) for bucket in self.buckets for launch in bucket.launches.values()]
        for bucket in self.buckets:
            bucket.shared_work[0, : bucket.travelling] = 0
        for call in calls:
            call.sums()
        pending = [
            Pending(bucket.shared_work[0, begin:end], group)
            for bucket in self.buckets
            for group, (begin, end) in bucket.ranges.items()
            if end > begin
        ]
        for call in calls:  # while the sums travel
            call.step()
        for each in pending:
            each.wait()
        for call in calls:
            call.slots_and_update()
            call.count()

    def _agree(self) -> None:
        """Once: all ranks of a process group can take this step, and reduce the same numbers."""
        for group in dict.fromkeys(member.layout.group for member in self.members):
            faults = [member.fault for member in self.members if member.layout.group is group and member.fault]
            fault = faults[0] if faults else ""
            if group is not None:
                ranges = [bucket.ranges.get(group, (0, 0)) for bucket in self.buckets]
                fault = disagreement(group, fault, sum(end - begin for begin, end in ranges))
            if fault:
                raise RuntimeError(fault)
        self.agreed = True


class _Call:
    """One launch in one step: its tensors, state and numbers, ready for the kernels."""

    def __init__(self, bucket: _Bucket, launch: _Launch, plan: Plan, states: dict[Tensor, State]) -> None:
        self.bucket, self.launch = bucket, launch
        self.ops = ops.backend(bucket.device, launch.members[0].fused)
        empty = torch.empty(0, dtype=bucket.dtype, device=bucket.device)
        self.states = [states[member.tensor] for member in launch.members]
        self.present = [member.tensor.grad is not None for member in launch.members]
        self.params = [member.tensor.detach() for member in launch.members]
        self.dense = [p if p.is_contiguous() else p.contiguous() for p in self.params]
        self.grads = self._gradients(empty)
        self.rows = [state.get("row_moment", state.get("moment", empty)) for state in self.states]
        self.columns = [state.get("column_moment", empty) for state in self.states]
        self.decay = [state.get("decay", empty) for state in self.states]
        with_momentum = launch.members[0].momentum_dtype is not None
        self.momentum = [state["momentum"] for state in self.states] if with_momentum else []
        self.steps = [int(state["step"]) + 1 for state in self.states]
        self.local = self._chosen(launch.local, plan.numbers)
        self.shared = self._chosen(launch.shared, plan.numbers)

    def _gradients(self, empty: Tensor) -> list[Tensor]:
        """Contiguous, of one dtype: the parameter's, or for float32 parameters a lower one that all gradients have."""
        grads = [member.tensor.grad for member in self.launch.members]
        dtype = self.launch.members[0].tensor.dtype
        if dtype == torch.float32 and len(found := {grad.dtype for grad in grads if grad is not None}) == 1:
            dtype = next(iter(found & {torch.bfloat16, torch.float16}), dtype)
        return [(empty if grad is None else grad).to(dtype).contiguous() for grad in grads]

    def _chosen(self, blocks: _Blocks, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """The rows of the table whose tensors have a gradient, and the numbers beside each."""
        table, chosen = blocks.table, range(len(blocks.keys))
        if not all(self.present):
            chosen = [i for i in chosen if self.present[blocks.fields[i][0]]]  # type: ignore[assignment]
            table = table[list(chosen)]
        known: dict[int, list[float]] = {}
        rows = []
        for i in chosen:
            key, number = blocks.keys[i], blocks.fields[i][0]
            if key not in known:
                known[key] = numbers(key, self.launch.members[number].group, self.steps[number])
            rows.append(known[key])
        return table, torch.tensor(rows, dtype=torch.float64).view(len(rows), HYPER_FIELDS)

    def sums(self) -> None:
        if len(self.shared[0]):
            self.ops.sums_(self.grads, self.bucket.shared_work, *self.shared, self.launch.names)

    def step(self) -> None:
        if len(self.local[0]):
            state = (self.rows, self.columns, self.decay)
            self.ops.step_(
                self.dense, self.grads, self.momentum, *state, self.bucket.local_work, *self.local, self.launch.names
            )

    def slots_and_update(self) -> None:
        if len(self.shared[0]):
            work = self.bucket.shared_work
            self.ops.slots_(self.rows, self.columns, self.decay, work, *self.shared, self.launch.names)
            self.ops.update_(self.dense, self.grads, self.momentum, work, *self.shared, self.launch.names)

    def count(self) -> None:
        """Steps taken; parameters that were not contiguous; versions for autograd."""
        changed = []
        for i, there in enumerate(self.present):
            if there:
                self.states[i]["step"] += 1
                if self.dense[i] is not self.params[i]:
                    self.params[i].copy_(self.dense[i])
                changed.append(self.launch.members[i].tensor)
        torch.autograd.graph.increment_version(changed)
