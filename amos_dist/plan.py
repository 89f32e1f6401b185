"""The way of one step: gradients -> sums (kernel) -> one all-reduce per process group -> slots -> update (kernel).

A Plan is made once for a set of tensors. It knows where the state and the sums of each block are; running it is a few
calls of kernels. What lies whole in this process takes one kernel call; only what is cut at a rank's border travels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .sharding import Layout, Pending, cut_rows, disagreement
from .state import FLOAT_STATE, State, compute_dtype, has_columns, has_rows, state_sizes
from .tables import CODES, Blocks, Constants, Numbers

ConstantsOf = Callable[[int, dict[str, Any]], Constants]


@dataclass(eq=False)
class Member:
    """A tensor of the optimizer's groups, in a Plan."""

    tensor: Tensor
    group: dict[str, Any]
    layout: Layout
    name: str
    momentum_dtype: torch.dtype | None  # None: without momentum
    fused: bool | None
    capturable: bool
    master: bool  # the state holds the parameter in float32; the tensor itself only takes the rounded numbers
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


class _Launch:
    """Tensors that share one set of dtypes: one call of a kernel serves all."""

    def __init__(self, first: Member) -> None:
        self.device, self.dtype, self.compute = first.tensor.device, first.tensor.dtype, compute_dtype(first.tensor)
        # Where `step` and the hyper-parameters are.
        self.counts_on = self.device if first.capturable else torch.device("cpu")
        self.master = first.master
        self.with_momentum = first.momentum_dtype is not None
        self.ops = ops.backend(self.device, first.fused)
        self.members: list[Member] = []
        self.local, self.shared = Blocks(), Blocks()  # of parameters that are whole here; of those that are cut
        self.rows: list[tuple[int, int]] = []  # of the hyper-parameters: the parameter's key, the number of its tensor
        self.stale = True  # a hyper-parameter other than lr has changed
        self.places: list[dict[str, int]] = []  # where each tensor's state begins in the buffer
        self.size = 0  # of that buffer
        self.state = self.steps = torch.empty(0)
        self._bound: list[Tensor] = []
        self._watched: list[tuple[State, str]] = []  # one of each state: who moves its data moves all of it
        self._addresses: list[int] = []
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._versions: list[int] = []  # of the parameters when they were last written here, where there are masters

    def freeze(self) -> None:
        """All members are there: makes what every step uses."""
        self.tensors = [member.tensor for member in self.members]
        self.names = "\n".join(member.name for member in self.members)
        groups = [member.group for member in self.members]
        self.numbers = Numbers([number for _, number in self.rows], groups, self.counts_on)

    def fill_numbers(self, constants_of: ConstantsOf) -> None:
        """Reads the hyper-parameters of the groups; all before any is changed, because one may be wrong."""
        self.numbers.fill([constants_of(key, self.members[number].group) for key, number in self.rows])
        self.stale = False

    def bind(self, states: dict[Tensor, State]) -> None:
        """All state in one buffer and all steps in another, of which the tensors' states become views.

        The kernels then take two tensors instead of four for each parameter, and one addition counts all steps.
        """
        self.states = [states[tensor] for tensor in self.tensors]
        self.state = torch.zeros(self.size, dtype=self.compute, device=self.device)
        self.steps = torch.zeros(len(self.states), device=self.counts_on)
        new: list[State] = []
        for number, (state, places) in enumerate(zip(self.states, self.places, strict=True)):
            parts = {
                key: self.state[places[key] : places[key] + state[key].numel()] for key in FLOAT_STATE if key in state
            }
            parts["step"] = self.steps[number]
            new.append({key: part.view(state[key].shape).copy_(state[key]) for key, part in parts.items()})
        for state, views in zip(self.states, new, strict=True):  # all is there: nothing can fail any more
            state.update(views)
        self._bound = [value for state in self.states for value in state.values()]
        self._watched = [(state, "decay" if "decay" in state else "step") for state in self.states]
        self._addresses = [state[key].data_ptr() for state, key in self._watched]
        self.note_versions()

    def note_versions(self) -> None:
        if self.master:
            self._versions = [tensor._version for tensor in self.tensors]

    def follow_weights(self) -> None:
        """Masters of parameters that somebody else has written to (a checkpoint, an average) since the last step."""
        for tensor, state, version in zip(self.tensors, self.states, self._versions, strict=True):
            if tensor._version != version:
                master = state["master"]
                master.copy_(torch.where(master.to(tensor.dtype) == tensor, master, tensor.float()))

    def holds(self) -> bool:
        """Whether the states are still these views: loading, hooks and users replace them, offloading moves them."""
        found = [value for state in self.states for value in state.values()]
        if len(found) != len(self._bound) or not all(map(operator.is_, found, self._bound)):
            return False
        return self._addresses == [state[key].data_ptr() for state, key in self._watched]

    def count(self, present: list[bool] | None) -> None:
        if present is None:
            self.steps += 1
        else:
            which = tuple(present)
            if which not in self._masks:  # kept: a CUDA graph cannot take it from the CPU, and needs it for ever
                self._masks[which] = torch.tensor(present, device=self.steps.device)
            self.steps += self._masks[which]


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
            kind = (member.tensor.dtype, member.momentum_dtype, member.fused, member.capturable, member.master)
            if kind not in self.launches:
                self.launches[kind] = _Launch(member)
            self._add(self.launches[kind], member)
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
        totals = state_sizes(member.layout.pieces, self.kinds)
        row_state = launch.size
        column_state = row_state + totals["row_moment"]
        decay_state = column_state + totals["column_moment"]
        launch.size = decay_state + totals["decay"]
        launch.places.append(
            {"row_moment": row_state, "moment": row_state, "column_moment": column_state, "decay": decay_state}
        )
        for piece in member.layout.pieces:
            kind = self.kinds[piece.key]
            launch.rows.append((piece.key, number))
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
                (launch.shared if shared else launch.local).fields.append(
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
                        len(launch.rows) - 1,
                        piece.start + block.offset,
                    ]
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
    """

    def __init__(self, members: list[Member], kinds: dict[int, str]) -> None:
        self.members = members
        self.agreed = self.bound = False
        together: dict[tuple[torch.device, torch.dtype], list[Member]] = {}
        for member in members:
            together.setdefault((member.tensor.device, compute_dtype(member.tensor)), []).append(member)
        self.buckets = [_Bucket(device, dtype, some, kinds) for (device, dtype), some in together.items()]

        self.launches = [launch for bucket in self.buckets for launch in bucket.launches.values()]
        self._seen: list[State] = []

    def fits(self, states: dict[Tensor, State]) -> bool:
        """Whether the optimizer's states are still those of the last step."""
        if not self.bound:
            return False
        now = list(states.values())
        if len(now) != len(self._seen) or not all(map(operator.is_, now, self._seen)):  # quicker than looking each up
            for launch in self.launches:
                if not all(states.get(t) is s for t, s in zip(launch.tensors, launch.states, strict=True)):
                    return False
            self._seen = now
        return all(launch.holds() for launch in self.launches)

    def settings_changed(self) -> None:
        """Somebody changed a hyper-parameter, other than lr, in a group."""
        for launch in self.launches:
            launch.stale = True

    def run(self, states: dict[Tensor, State], constants_of: ConstantsOf) -> None:
        """Moves every tensor that has a gradient by one step, and its state with it.

        Args:
            constants_of: (key, group) -> the parameter's hyper-parameters.

        Raises:
            RuntimeError: on every rank, where any rank cannot take this step; nothing has changed then.
        """
        if not self.agreed:
            self._agree()
        for launch in self.launches:
            if launch.stale:
                launch.fill_numbers(constants_of)
        if not self.bound:
            for launch in self.launches:
                launch.bind(states)
            self._seen, self.bound = list(states.values()), True
        calls = [_Call(bucket, launch) for bucket in self.buckets for launch in bucket.launches.values()]
        for bucket in self.buckets:
            if bucket.travelling:
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
    """One launch in one step: its tensors, state and numbers, ready for the kernels.

    Small models spend more time here than in the kernels: no work for each tensor that a list comprehension cannot do.
    """

    def __init__(self, bucket: _Bucket, launch: _Launch) -> None:
        self.bucket, self.launch = bucket, launch
        states = launch.states
        self.present: list[bool] | None = None
        self.grads = self._gradients()
        tensors = launch.tensors
        self.dense = tensors
        if not all(map(Tensor.is_contiguous, tensors)):
            self.dense = [tensor.detach().contiguous() for tensor in tensors]
        self.params, self.low = self.dense, []
        if launch.master:
            launch.follow_weights()
            self.params, self.low = [state["master"] for state in states], self.dense
        self.momentum = [state["momentum"] for state in states] if launch.with_momentum else []
        self.hyper = launch.numbers.at(launch.steps)

    def _gradients(self) -> list[Tensor]:
        """Contiguous, of one dtype: the parameter's, or for float32 parameters a lower one that all gradients have."""
        launch = self.launch
        found = [tensor.grad for tensor in launch.tensors]
        grads = [grad for grad in found if grad is not None]
        if len(grads) < len(found):
            self.present = [grad is not None for grad in found]
        dtypes = {grad.dtype for grad in grads}
        dtype = launch.dtype
        if dtype == torch.float32 and len(dtypes) == 1:
            dtype = next(iter(dtypes & {torch.bfloat16, torch.float16}), dtype)
        if dtypes != {dtype} or not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.to(dtype).contiguous() for grad in grads]
        if self.present is None:
            return grads
        some, empty = iter(grads), torch.empty(0, dtype=dtype, device=launch.device)
        return [next(some) if there else empty for there in self.present]

    def sums(self) -> None:
        if self.launch.shared:
            work, blocks = self.bucket.shared_work, self.launch.shared.table(self.present)
            self.launch.ops.sums_(self.grads, work, blocks, self.hyper, self.launch.names)

    def step(self) -> None:
        if self.launch.local:
            changed = (self.params, self.grads, self.momentum, self.low)
            work, blocks = self.bucket.local_work, self.launch.local.table(self.present)
            self.launch.ops.step_(*changed, self.launch.state, work, blocks, self.hyper, self.launch.names)

    def slots_and_update(self) -> None:
        if self.launch.shared:
            changed = (self.params, self.grads, self.momentum, self.low)
            work, blocks = self.bucket.shared_work, self.launch.shared.table(self.present)
            self.launch.ops.slots_(self.launch.state, work, blocks, self.hyper, self.launch.names)
            self.launch.ops.update_(*changed, work, blocks, self.hyper, self.launch.names)

    def count(self) -> None:
        """Steps taken; parameters that were not contiguous; versions for autograd."""
        launch, changed = self.launch, self.launch.tensors
        if self.dense is not changed:
            for tensor, dense in zip(changed, self.dense, strict=True):
                if tensor.grad is not None and not tensor.is_contiguous():
                    tensor.detach().copy_(dense)
        launch.count(self.present)
        if self.present is not None:
            changed = [tensor for tensor, there in zip(changed, self.present, strict=True) if there]
        torch.autograd.graph.increment_version(changed)
        launch.note_versions()
