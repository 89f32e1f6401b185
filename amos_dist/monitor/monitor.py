"""class Monitor: in which steps the optimizer is looked at, and what becomes of what is seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .. import roll_call
from ..kernel_calls import Launch
from ..optimizer import Amos
from ..plan import Plan
from ..sharding import Pending
from .probe import WIDTH, Probe, entries_of
from .report import Report, report
from .writers import Writer


class _Reading:
    """The numbers of one call of step(), on their way to the CPU."""

    def __init__(self, step: int, numbers: Tensor) -> None:
        self.step, self.event = step, None
        self.numbers = numbers
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(numbers.device))

    def is_here(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


class _Clock:
    """Which step of a plan comes next. Tensors that are cut decide: all ranks that have a part of one count alike.

    Attributes:
        is_cut: whether there are any. taken: steps, where the state that counts them is on a device; else None.
    """

    def __init__(self, plan: Plan) -> None:
        self.is_cut = any(member.layout.groups for member in plan.members)
        self.taken: int | None = None
        self._which: list[tuple[Launch, Tensor | None]] = []
        for launch in plan.launches:
            some = [i for i, member in enumerate(launch.members) if member.layout.groups or not self.is_cut]
            everything = len(some) == len(launch.members)
            if some:
                self._which.append((launch, None if everything else torch.tensor(some, device=launch.counts_on)))

    def next(self, plan: Plan, states: dict[Tensor, Any]) -> int:
        if self.taken is None:
            taken = 0
            for launch, which in self._which:
                # The states become views of `steps` in the first step.
                steps = launch.steps if plan.bound else torch.stack([states[t]["step"] for t in launch.tensors])
                taken = max(taken, int((steps if which is None else steps[which]).max()))
            if all(launch.counts_on.type == "cpu" for launch, _ in self._which):
                return taken + 1
            self.taken = taken  # asked once: from here on the monitor counts itself
        return self.taken + 1


class Monitor:
    """Looks at every n-th step of an Amos optimizer: norms, rates and quantiles, by parameter and in total.

    It measures inside the step, and changes nothing in it. Other steps cost nothing, and none waits for a device: what
    one step left is written when a later one begins, or when it is asked for. Steps are those that the state counts, so
    that a job that is resumed goes on in the same steps.

    Args:
        optimizer: an Amos, or what holds one: a DeepSpeed engine, Accelerate's optimizer.
        every: steps from one look to the next, the same on every rank; t = every, 2 every, ...
        to: writers; they are used on rank 0 alone. Every rank may have them.

    Raises:
        TypeError: there is no Amos optimizer. ValueError: `every` is no count.
        RuntimeError: the optimizer has a monitor; or it has stepped parameters that are cut over ranks, which have
            agreed that there is none.
    """

    def __init__(self, optimizer: Any, every: int = 50, to: Iterable[Writer] = ()) -> None:
        self.optimizer, self._engine = _amos_of(optimizer), optimizer
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} of the monitor is no count of steps. Give a whole number from 1.")
        self.every, self.closed = every, False
        self._writers = list(to)
        before = self.optimizer.monitor
        if before is not None and not before.closed:
            raise RuntimeError("the optimizer has a monitor already. Close that one, or give it all writers: to=[…].")
        plans = [plan for plans in self.optimizer._plans.values() for plan in plans.values()]
        if (before is None or before.every != every) and any(plan.agreed and _is_cut(plan) for plan in plans):
            raise RuntimeError(
                f"the ranks have agreed to step without a monitor every {every} steps. "
                "Make it before the first step, on every rank."
            )
        self._probes: WeakKeyDictionary[Launch, Probe] = WeakKeyDictionary()
        self._clocks: WeakKeyDictionary[Plan, _Clock] = WeakKeyDictionary()
        self._readings: list[_Reading] = []
        self._last: Report | None = None
        self._step = 0  # of the plan that runs, where it is looked at; else 0
        self.optimizer.monitor = self

    # ---- what people use -----------------------------------------------------------------------------------------

    @property
    def last(self) -> Report | None:
        """What was seen last, on every rank; None: nothing yet. On a GPU this waits for that step."""
        self._settle(everything=True)
        return self._last

    def close(self) -> None:
        """Writes what is left, and closes the writers. Steps are as if there had never been a monitor.

        But where ranks share parameters they go on adding up, in case others have not closed theirs.
        """
        if not self.closed:
            self._settle(everything=True)
            self.closed = True
            for writer in self._writers if _is_first_rank() else ():
                try:
                    writer.close()
                except Exception as error:  # no reason to leave the others open, or to end training
                    warnings.warn(f"the monitor's {type(writer).__name__} could not be closed: {error}.", stacklevel=2)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what the optimizer calls --------------------------------------------------------------------------------

    def fact(self) -> str:
        """What must be the same on all ranks."""
        return f"a monitor that looks every {self.every} steps"

    def begin(self, plan: Plan) -> None:
        """Before a step of these tensors."""
        self._step = 0
        for launch in plan.launches:
            launch.probe = None
        if _is_recording():
            # Recorded is not taken, and nothing may be asked of the device now: the next step that is taken asks again.
            self._clocks.pop(plan, None)
            return
        if plan not in self._clocks:
            self._clocks[plan] = _Clock(plan)
        clock = self._clocks[plan]
        step = clock.next(plan, self.optimizer.state)
        if self._readings and self._readings[0].step != step:
            self._settle(everything=False)
        if step % self.every == 0 and (clock.is_cut or not self.closed):
            self._step = step
            for launch in plan.launches:
                launch.probe = self._probe(launch)

    def end(self, plan: Plan, moved: bool) -> None:
        """After it. moved: it was not left out."""
        clock = self._clocks.get(plan)
        if clock is not None and clock.taken is not None:
            clock.taken += moved
        if self._step and moved:
            numbers = self._added_up(plan)
            if not self.closed:
                self._readings.append(_Reading(self._step, numbers))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _probe(self, launch: Launch) -> Probe:
        if launch not in self._probes:
            self._probes[launch] = Probe(launch, self.optimizer._originals, self.optimizer._kinds)
        return self._probes[launch]

    @roll_call.guard("this step cannot be finished")
    def _added_up(self, plan: Plan) -> Tensor:
        """The numbers of all parameters, by key: of those that are cut over ranks, of all ranks together.

        One collective for each process group. What is added up over several is in as many, one after another.
        """
        device, count = plan.launches[0].device, len(self.optimizer._originals)
        keys: dict[tuple[Any, ...], list[int]] = {}  # the same parameters, in the same order, on all ranks of a group
        for member in plan.members:
            layout = member.layout
            if layout.tile is not None and layout.groups:  # other ranks may have others beside them
                keys.setdefault(layout.groups, []).append(layout.tile.key)
            else:
                keys[layout.groups] = list(range(count))
        sections = {
            groups: torch.zeros(len(some), WIDTH, dtype=torch.float64, device=device) for groups, some in keys.items()
        }
        places = {groups: {key: place for place, key in enumerate(some)} for groups, some in keys.items()}
        for launch in plan.launches:
            probe = self._probe(launch)
            for groups, rows in probe.rows_by_groups(launch).items():
                here = [places[groups][key] for key in probe.keys[rows].tolist()]
                sections[groups][torch.tensor(here, device=device)] = probe.result[rows].to(device)
        for group in dict.fromkeys(group for groups in sections for group in groups):
            some = [groups for groups in sections if group in groups]
            sent = torch.cat([sections[groups] for groups in some])
            Pending(sent, group).wait()
            sections |= dict(zip(some, sent.split([len(keys[groups]) for groups in some]), strict=True))
        numbers = torch.zeros(count, WIDTH, dtype=torch.float64, device=device)
        for groups, section in sections.items():
            numbers.index_add_(0, torch.tensor(keys[groups], dtype=torch.int64, device=device), section)
        return numbers

    def _settle(self, everything: bool) -> None:
        """Writes what is here; everything: what is not, too."""
        while self._readings:
            step = self._readings[0].step
            some = [reading for reading in self._readings if reading.step == step]
            if not everything and not all(reading.is_here() for reading in some):
                return
            for reading in some:
                reading.wait()
            self._readings = [reading for reading in self._readings if reading.step != step]
            originals, kinds = self.optimizer._originals, self.optimizer._kinds
            numbers = torch.zeros(len(originals), WIDTH, dtype=torch.float64)
            for reading in some:
                numbers[: len(reading.numbers)] += reading.numbers
            skipped = self.optimizer.skipped_steps + self._skipped_by_engine()
            names = [original.name for original in originals]
            entries = [entries_of(original, kinds[original.key]) for original in originals]
            self._last = report(step, skipped, numbers, names, entries)
            self._write(self._last)

    def _skipped_by_engine(self) -> int:
        """DeepSpeed leaves out steps before the optimizer hears of them."""
        return 0 if self._engine is self.optimizer else int(getattr(self._engine, "skipped_steps", 0))

    def _write(self, found: Report) -> None:
        if not _is_first_rank():
            return
        values = found.flat()
        for writer in list(self._writers):
            try:
                writer.write(found.step, values)
            except Exception as error:  # a full disk, a server that is gone: no reason to end training
                self._writers.remove(writer)
                warnings.warn(
                    f"the monitor's {type(writer).__name__} could not write step {found.step}: {error}. "
                    "It is not used any more; training goes on.",
                    stacklevel=2,
                )


def _amos_of(holder: Any) -> Amos:
    """The Amos in an engine or in a wrapper of optimizers."""
    inner = holder
    while not isinstance(inner, Amos):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"there is no Amos optimizer in {type(holder).__name__}. Give amos_dist.Amos, or the DeepSpeed engine "
                'whose JSON says "type": "Amos".'
            )
    return inner


def _is_cut(plan: Plan) -> bool:
    return any(member.layout.groups for member in plan.members)


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
