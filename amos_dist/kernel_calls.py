"""Tensors that share one set of dtypes: their state in one buffer, and the kernel calls of one step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .columns import CutColumns
from .member import Member
from .sharding import dtensor
from .state import FLOAT_STATE, SCALE, WHOLE_STATE, State, compute_dtype
from .tables import Blocks, Constants, Numbers, lines
from .travel import Travel

if TYPE_CHECKING:
    from .monitor.probe import Probe

ConstantsOf = Callable[[int, dict[str, Any]], Constants]


class Leg:
    """What a launch has of the parameters that travel in one wave."""

    def __init__(self, travel: Travel, device: torch.device, dtype: torch.dtype) -> None:
        self.shared = Blocks()  # of parameters that are cut
        self.hollow = Blocks()  # of tiles without elements, for the state that they share with other ranks
        self.cut_columns = CutColumns(travel, device, dtype)
        # Columns of which each rank keeps a share, as blocks without elements.
        self.share, self.shared_columns = Blocks(), CutColumns(travel, device, dtype)

    def freeze(self) -> None:
        # Those of which a mean over all columns travels.
        self.means = [columns for columns in (self.cut_columns, self.shared_columns) if columns]
        for columns in self.means:
            columns.freeze()


class Launch:
    """Tensors that share one set of dtypes: one call of a kernel serves all."""

    def __init__(self, first: Member) -> None:
        self.device, self.dtype, self.compute = first.tensor.device, first.tensor.dtype, compute_dtype(first.tensor)
        # Where `step` and the hyper-parameters are.
        self.counts_on = self.device if first.capturable else torch.device("cpu")
        self.master = first.master
        self.with_momentum = first.momentum_dtype is not None
        self.with_scales = first.momentum_dtype == torch.int8
        self.ops = ops.backend(self.device, first.fused)
        self.members: list[Member] = []
        self.local = Blocks()  # of parameters that are whole here
        self.checked = first.checked
        # Summed up before anything changes: to be stepped from these sums; what takes one pass, only to be looked at.
        self.twice, self.looked_at = Blocks(), Blocks()
        self.legs: dict[Travel, Leg] = {}
        self.flags: list[int | None] = []  # where ranks count who has a gradient for each tensor
        self.rows: list[tuple[int, int]] = []  # of the hyper-parameters: the parameter's key, the number of its tensor
        self.stale = True  # a hyper-parameter other than lr has changed
        self.places: list[dict[str, int]] = []  # where each tensor's state begins in the buffer
        self.size = 0  # of that buffer
        self.state = self.steps = torch.empty(0)
        self._bound: list[Any] = []  # all that was in the states when they were last looked at, and what of it is ours
        self._own: list[Tensor] = []
        self._watched: list[tuple[State, str]] = []  # whose data may be moved: one of each state, all of a partition's
        self._addresses: list[int] = []
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._versions: list[Any] = []  # of the parameters when they were last written here, where there are masters
        self.probe: Probe | None = None  # of a monitor, in the steps that it looks at

    def leg(self, travel: Travel) -> Leg:
        """What it has of a wave; made where there is none yet."""
        if travel not in self.legs:
            self.legs[travel] = Leg(travel, self.device, self.compute)
        return self.legs[travel]

    def freeze(self, first: Travel | None) -> None:
        """All members are there: makes what every step uses. first: of the wave in which flags travel."""
        self.tensors = [member.tensor for member in self.members]
        self.names = lines([member.name for member in self.members])
        self.sharded = any(map(dtensor.is_dtensor, self.tensors))
        tiles = [member.layout.tile for member in self.members]
        self.flags = [None if tile is None or first is None else first.flag(tile.key) for tile in tiles]
        groups = [member.group for member in self.members]
        self.numbers = Numbers([number for _, number in self.rows], groups, self.counts_on)
        for leg in self.legs.values():
            leg.freeze()

    def fill_numbers(self, constants_of: ConstantsOf) -> None:
        """Reads the hyper-parameters of the groups; all before any is changed, because one may be wrong."""
        self.numbers.fill([constants_of(key, self.members[number].group) for key, number in self.rows])
        for leg in self.legs.values():
            for columns in leg.means:
                columns.read_beta(self.numbers)
        self.stale = False

    def bind(self, states: dict[Tensor, State]) -> None:
        """All state in one buffer and all steps in another, of which the tensors' states become views.

        The kernels then take two tensors instead of four for each parameter, and one addition counts all steps.
        """
        self.states = [states[tensor] for tensor in self.tensors]
        self.state = torch.zeros(self.size, dtype=self.compute, device=self.device)
        self.steps = torch.zeros(len(self.states), dtype=torch.float32, device=self.counts_on)
        new: list[tuple[State, str, Tensor]] = []
        for number, (state, places) in enumerate(zip(self.states, self.places, strict=True)):
            held = {key: dtensor.local_of(state[key]) for key in FLOAT_STATE if key in state}
            parts = {key: self.state[places[key] : places[key] + each.numel()] for key, each in held.items()}
            new += [(state, key, part.view(held[key].shape).copy_(held[key])) for key, part in parts.items()]
            new.append((state, "step", self.steps[number].copy_(state["step"])))
        for state, key, part in new:  # all is there: nothing can fail any more
            state[key] = dtensor.held_in(part, state[key])
        self._bound = [value for state in self.states for value in state.values()]
        self._own = self._own_values()
        self._watched = [
            (state, key)
            for member, state in zip(self.members, self.states, strict=True)
            for key in (
                (*FLOAT_STATE, "step") if member.layout.is_partition else ("decay" if "decay" in state else "step",)
            )
            if key in state
        ]
        self._addresses = self._find_addresses()
        self._versions = [None] * len(self.tensors)

    def _find_versions(self) -> list[Any]:
        """Other code writes to a DTensor, or to what this rank holds of it, or puts another tensor there."""
        held = self.locals_of(self.tensors)
        return [(t._version, id(each), each._version) for t, each in zip(self.tensors, held, strict=True)]

    def note_versions(self) -> None:
        if self.master:
            self._versions = self._find_versions()

    def follow_weights(self) -> None:
        """Masters of parameters that somebody else has written to (a checkpoint, an average) since the last step."""
        for i, version in enumerate(self._find_versions()):
            if self._versions[i] != version:
                tensor, master = self.locals_of([self.tensors[i], self.states[i]["master"]])
                master.copy_(torch.where(master.to(tensor.dtype) == tensor, master, tensor.float()))

    def locals_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """What this rank holds of each."""
        return list(map(dtensor.local_of, tensors)) if self.sharded else tensors

    def _find_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.locals_of([state[key] for state, key in self._watched])]

    def holds(self) -> bool:
        """Whether the states are still these views: loading, hooks and users replace them, offloading moves them."""
        found = [value for state in self.states for value in state.values()]
        if len(found) != len(self._bound) or not all(map(operator.is_, found, self._bound)):
            own = self._own_values()
            if len(own) != len(self._own) or not all(map(operator.is_, own, self._own)):
                return False
            self._bound = found  # somebody keeps things of their own there
        return self._addresses == self._find_addresses()

    def _own_values(self) -> list[Tensor]:
        keys = ("step", *FLOAT_STATE, *WHOLE_STATE, SCALE)
        return [state[key] for state in self.states for key in keys if key in state]

    def count(self, present: list[bool] | None) -> None:
        if present is None:
            self.steps += 1
        else:
            which = tuple(present)
            if which not in self._masks:  # kept: a CUDA graph cannot take it from the CPU, and needs it for ever
                self._masks[which] = torch.tensor(present, device=self.steps.device)
            self.steps += self._masks[which]


class Call:
    """One launch in one step: its tensors, state and numbers, ready for the kernels.

    Small models spend more time here than in the kernels: no work for each tensor that a list comprehension cannot do.
    """

    def __init__(self, launch: Launch, local_work: Tensor, kept_work: Tensor) -> None:
        self.launch, self.local_work, self.kept_work = launch, local_work, kept_work
        self.present: list[bool] | None = None
        self.grads = self._gradients()
        self.tensors = self.dense = launch.locals_of(launch.tensors)
        if not all(map(Tensor.is_contiguous, self.tensors)):
            self.dense = [tensor.detach().contiguous() for tensor in self.tensors]
        self.params, self.low, self.momentum = self.dense, [], []
        if launch.master:
            launch.follow_weights()
            self.params, self.low = launch.locals_of([state["master"] for state in launch.states]), self.dense
        if launch.with_momentum:
            self.momentum = launch.locals_of([state["momentum"] for state in launch.states])
        self.scales = [state[SCALE] for state in launch.states] if launch.with_scales else None
        self.hyper = launch.numbers.at(launch.steps)
        self.norms = launch.probe.begin(launch) if launch.probe else None

    def _gradients(self) -> list[Tensor]:
        """Contiguous, of one dtype: the parameter's, or for float32 parameters a lower one that all gradients have."""
        launch = self.launch
        tensors = launch.tensors
        found = dtensor.local_gradients(tensors) if launch.sharded else [tensor.grad for tensor in tensors]
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

    @property
    def _last(self) -> tuple[Any, ...]:
        """The last arguments of what updates."""
        return self.hyper, self.launch.names, self.norms, self.scales

    def absent(self) -> list[int]:
        """The places of the flags of parameters that have no gradient on this rank."""
        flags = zip(self.launch.flags, self.present or (), strict=False)
        return [flag for flag, there in flags if flag is not None and not there]

    def look(self) -> None:
        """Sums of what is whole here."""
        launch = self.launch
        for blocks in (launch.twice, launch.looked_at):
            self._sums(blocks, self.kept_work)

    def sums(self, travel: Travel, work: Tensor) -> None:
        if leg := self.launch.legs.get(travel):
            self._sums(leg.shared, work)

    def _sums(self, blocks: Blocks, work: Tensor) -> None:
        if blocks:
            launch = self.launch
            launch.ops.sums_(self.grads, work, blocks.table(self.present), self.hyper, launch.names)

    def send(self, travel: Travel, work: Tensor) -> None:
        if leg := self.launch.legs.get(travel):
            for columns in leg.means:
                columns.send(work, self.launch.state)

    def step(self) -> None:
        """Of what needs nothing of other ranks."""
        self._step(self.present)

    def _step(self, present: list[bool] | None) -> None:
        launch, changed = self.launch, (self.params, self.grads, self.momentum, self.low)
        if launch.local:
            blocks = launch.local.table(present)
            launch.ops.step_(*changed, launch.state, self.local_work, blocks, *self._last)
        if launch.twice:
            blocks = launch.twice.table(present)
            launch.ops.slots_(launch.state, self.kept_work, blocks, self.hyper, launch.names)
            launch.ops.update_(*changed, self.kept_work, blocks, *self._last)

    def join(self, work: Tensor) -> None:
        """Parameters that only other ranks have a gradient for are stepped with zeros: all ranks stay together.

        A rank that has all gradients need not look, nor wait for its device. work: of the wave in which flags travel.
        """
        absent = self.absent()
        if self.present is None or not absent:
            return
        somewhere = dict(zip(absent, (work[0, absent] > 0).tolist(), strict=True))
        pairs = zip(self.launch.flags, self.present, strict=True)
        late = [not there and flag is not None and somewhere[flag] for flag, there in pairs]
        if any(late):
            zeros = zip(self.params, self.grads, late, strict=True)
            self.grads = [torch.zeros_like(p, dtype=grad.dtype) if now else grad for p, grad, now in zeros]
            self._step(late)
            self.present = [there or now for there, now in zip(self.present, late, strict=True)]

    def slots_of_share(self, travel: Travel, work: Tensor) -> None:
        """Of the columns whose state this rank keeps for all."""
        if leg := self.launch.legs.get(travel):
            self._slots(leg.share, work)
            if leg.shared_columns:
                leg.shared_columns.mend(work, self.launch.state)

    def slots_and_update(self, travel: Travel, work: Tensor) -> None:
        leg = self.launch.legs.get(travel)
        if leg is None:
            return
        self._slots(leg.hollow, work)
        self._slots(leg.shared, work)
        if leg.shared:
            if leg.cut_columns:
                leg.cut_columns.mend(work, self.launch.state)
            launch, blocks = self.launch, leg.shared.table(self.present)
            changed = (self.params, self.grads, self.momentum, self.low)
            launch.ops.update_(*changed, work, blocks, *self._last)

    def _slots(self, blocks: Blocks, work: Tensor) -> None:
        if blocks:
            launch = self.launch
            launch.ops.slots_(launch.state, work, blocks.table(self.present), self.hyper, launch.names)

    def count(self) -> None:
        """Steps taken; parameters that were not contiguous; versions for autograd."""
        launch, present = self.launch, self.present or [True] * len(self.tensors)
        if launch.probe:
            launch.probe.end(launch, self.present)
        if self.dense is not self.tensors:
            for tensor, dense, there in zip(self.tensors, self.dense, present, strict=True):
                if there and not tensor.is_contiguous():
                    tensor.detach().copy_(dense)
        launch.count(self.present)
        for changed in (launch.tensors, self.tensors) if launch.sharded else (launch.tensors,):
            moved = [tensor for tensor, there in zip(changed, present, strict=True) if there]
            torch.autograd.graph.increment_version(moved)
        launch.note_versions()
