"""The way of one step: gradients -> sums (kernel) -> what travels -> slots -> update (kernel).

A Plan is made once for a set of tensors. It knows where the state and the sums of each block are; running it is a few
calls of kernels. What lies whole in this process takes one kernel call; only what is cut at a rank's border travels,
in a few waves: one travels while others are worked on.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from . import amp, roll_call
from .kernel_calls import Call, ConstantsOf, Launch
from .member import Member
from .runs import run_count
from .sharding import Block, Holders, Piece, Tile, disagreement
from .state import State, compute_dtype, has_columns, has_rows, state_sizes
from .tables import CODES, Blocks
from .travel import COLUMNS, NO_ROW, OLD, ROWS, SHARE, Space
from .wave import Wave, settle, waves_of


class _Bucket:
    """Tensors on one device with one compute dtype: they share a workspace."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        members: list[Member],
        kinds: dict[int, str],
        everyone: tuple[Any, ...],
        at_once: bool,
    ) -> None:
        self.device, self.dtype, self.kinds = device, dtype, kinds
        self.launches: dict[Any, Launch] = {}
        self._local, self._kept = Space(), Space()
        self.waves = waves_of([member.layout for member in members], kinds, everyone)
        self._wave_of = {key: wave for wave in self.waves for key in wave.keys}
        for member in members:
            modes = (member.fused, member.capturable, member.master, member.checked)
            kind = (member.tensor.dtype, member.momentum_dtype, *modes)
            if kind not in self.launches:
                self.launches[kind] = Launch(member)
            self._add(self.launches[kind], member)
        for launch in self.launches.values():
            launch.freeze(self.waves[0].travel if self.waves else None)
        self.local_work = self._local.tensor(dtype, device)
        self.kept_work = self._kept.tensor(dtype, device)  # sums of what is whole here, until all are known
        self._memory = settle(self.waves, dtype, device, at_once)

    @property
    def works(self) -> list[Tensor]:
        """All that is kept from step to step beside the state."""
        return [self.local_work, self.kept_work, *self.staying]

    @property
    def staying(self) -> list[Tensor]:
        """Of these, what travels."""
        few = [each for wave in self.waves for each in wave.exchanges if isinstance(each, Holders)]
        return [*self._memory, *(tensor for each in few for tensor in (each.sent, each.received))]

    def _add(self, launch: Launch, member: Member) -> None:
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
        run = 0
        for piece in member.layout.pieces:
            launch.rows.append((piece.key, number))
            state = row_state, column_state, decay_state
            for i, block in enumerate(piece.blocks()):
                finished = piece.touched_cols if i == 0 and piece.share is None else 0
                self._add_block(launch, number, piece, block, state, finished, run)
                run += run_count(block.rows * block.cols)
            if isinstance(piece, Tile):
                self._add_tile(launch, number, piece, state)
            elif piece.share is not None and has_columns(self.kinds[piece.key]):
                self._add_share(launch, number, piece, state)
            sizes = state_sizes([piece], self.kinds)
            row_state += sizes["row_moment"]
            column_state += sizes["column_moment"]
            decay_state += sizes["decay"]

    def _add_block(
        self,
        launch: Launch,
        number: int,
        piece: Piece | Tile,
        block: Block,
        state: tuple[int, int, int],
        columns: int,
        run: int,
    ) -> None:
        kind = self.kinds[piece.key]
        columns = columns if has_columns(kind) else 0
        if (wave := self._wave_of.get(piece.key)) is not None:
            cut_row = wave.travel.places.get((ROWS, piece.key, block.row))
            cut_columns = wave.travel.places.get((COLUMNS, piece.key, 0))
            if cut_row is not None or cut_columns is not None:
                row_work = wave.space.take(block.rows) if has_rows(kind) and cut_row is None else cut_row or 0
                shared, work = launch.leg(wave.travel).shared, (row_work, cut_columns or 0, columns)
                self._write(shared, launch, number, piece, block, state, work, run)
                return
        if launch.checked and (kind in ("factored", "column") or block.rows == 1):
            rows = self._kept.take(block.rows if has_rows(kind) else 0)
            work = rows, self._kept.take(columns), columns
            self._write(launch.twice, launch, number, piece, block, state, work, run)
            return
        if launch.checked:  # `row`, `full`: all squares as those of one row
            look = Block(block.offset, piece.first_row, 0, 1, block.rows * block.cols)
            self._write(launch.looked_at, launch, number, piece, look, state, (self._kept.take(1), 0, 0))
        if self.device.type == "cpu":
            self._local.used = 0  # one block after another: they use the same places
        # `row` moments stay on chip, but for a row that is too long for one thread
        rows = block.rows if kind == "factored" or block.rows == 1 or self.device.type != "cpu" else 0
        work = self._local.take(rows if has_rows(kind) else 0), self._local.take(columns), columns
        self._write(launch.local, launch, number, piece, block, state, work, run)

    def _add_tile(self, launch: Launch, number: int, tile: Tile, state: tuple[int, int, int]) -> None:
        """What only tiles have: a mean of more columns than are here; state of rows or columns without elements."""
        wave = self._wave_of.get(tile.key)
        if wave is None:
            return
        kind, places, leg = self.kinds[tile.key], wave.travel.places, launch.leg(wave.travel)
        if (OLD, tile.key, 0) in places:
            leg.cut_columns.add(tile, state[1], len(launch.rows) - 1)
        stateful = (has_rows(kind) and tile.touched_rows) or (has_columns(kind) and tile.touched_cols)
        if tile.blocks() or not stateful:
            return
        # The kernels pass by blocks without elements: they are told of one, which `slots` does not look at.
        if kind == "factored" and not tile.touched_rows:
            state = self._without_row(launch, state)
        block = Block(0, 0, 0, max(1, tile.touched_rows), max(1, tile.touched_cols))
        work = places.get((ROWS, tile.key, 0), 0), places.get((COLUMNS, tile.key, 0), 0), tile.touched_cols
        self._write(leg.hollow, launch, number, tile, block, state, work)

    def _add_share(self, launch: Launch, number: int, piece: Piece, state: tuple[int, int, int]) -> None:
        """The columns whose state this rank keeps for all."""
        travel, count, is_factored = (
            self._wave_of[piece.key].travel,
            piece.touched_cols,
            self.kinds[piece.key] == "factored",
        )
        places, leg = travel.places, launch.leg(travel)
        if is_factored:
            leg.shared_columns.add(piece, state[1], len(launch.rows) - 1)
        if count:
            state = self._without_row(launch, state) if is_factored else state
            work = places.get((NO_ROW, piece.key, 0), 0), places[SHARE, piece.key, 0], count
            self._write(leg.share, launch, number, piece, Block(0, piece.first_row, 0, 1, count), state, work)

    @staticmethod
    def _without_row(launch: Launch, state: tuple[int, int, int]) -> tuple[int, int, int]:
        """The same with a row that is always zero, for kernels that want one."""
        launch.size += 1
        return launch.size - 1, state[1], launch.size - 1

    def _write(
        self,
        blocks: Blocks,
        launch: Launch,
        number: int,
        piece: Piece | Tile,
        block: Block,
        state: tuple[int, int, int],
        work: tuple[int, int, int],
        run: int = 0,
    ) -> None:
        """A row of the table. state: of rows, columns, decay; work: of rows, columns, and how many columns.

        Args:
            run: the number of the first of the block's runs in the tensor: see runs.py.
        """
        kind = self.kinds[piece.key]
        below = block.row - piece.first_row if has_rows(kind) else 0
        blocks.fields.append(
            [
                number,
                piece.offset + block.offset,
                block.rows,
                block.cols,
                CODES[kind],
                piece.cols,
                piece.rows,
                state[0] + below,
                state[1],
                state[2] + below,
                work[0],
                work[1],
                block.column,
                work[2] if has_columns(kind) else 0,
                len(launch.rows) - 1,
                piece.start + block.offset,
                run,
            ]
        )


Calls = dict[_Bucket, list[Call]]
Waves = list[tuple[Wave, list[Call]]]


class Plan:
    """One step for a fixed set of tensors.

    Args:
        members: the tensors, in the same order on every rank.
        kinds: the moments of each parameter, by key.
        agreed: the ranks have agreed on such a plan before: see `agree`.
    """

    def __init__(self, members: list[Member], kinds: dict[int, str], agreed: bool = False) -> None:
        self.members, self.agreed, self.bound = members, agreed, False
        together: dict[tuple[torch.device, torch.dtype], list[Member]] = {}
        for member in members:
            together.setdefault((member.tensor.device, compute_dtype(member.tensor)), []).append(member)
        layouts = [member.layout for member in members if member.layout.tile]
        everyone = tuple(dict.fromkeys(group for layout in layouts for group in layout.groups))
        self.checked = any(member.checked for member in members)
        self._at_once = self.checked or bool(everyone)  # all sums are known before anything changes
        self.buckets: list[_Bucket] = []
        telling = next((some for some in together.values() if any(member.layout.groups for member in some)), None)
        for (device, dtype), some in together.items():
            told = everyone if some is telling else ()
            self.buckets.append(_Bucket(device, dtype, some, kinds, told, self._at_once))
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

    def is_trial(self, states: dict[Tensor, State]) -> bool:
        """The first step of tensors that are whole, with gradients of zero, is none: it is there to make the state.

        DeepSpeed's stage 0 takes one in fp16 and bf16, torch.distributed.checkpoint.state_dict one with lr=0.
        """
        return all(
            not member.layout.groups
            and (member.layout.clone or not (member.capturable or float(member.group["lr"])))
            and not states[member.tensor]["step"]
            for member in self.members
        ) and not any(bool(m.tensor.grad.any()) for m in self.members if m.tensor.grad is not None)

    def settings_changed(self) -> None:
        """Somebody changed a hyper-parameter, other than lr, in a group."""
        for launch in self.launches:
            launch.stale = True

    @roll_call.guard("this step cannot be finished")
    def agree(self, facts_of: Callable[[Collection[int] | None], list[str]]) -> None:
        """Once: all ranks of the process groups can take this step, and reduce the same numbers.

        A fault goes from group to group, so that it is known also where no group is shared with the rank that has it.

        Args:
            facts_of: what must be the same on all ranks that cut the parameters of these keys; None: of all.

        Raises:
            RuntimeError: on every rank, where any rank cannot take this step, or ranks differ.
        """
        if self.agreed:
            return
        fault = next((member.fault for member in self.members if member.fault), "")
        for group in dict.fromkeys(group for member in self.members for group in member.layout.fellows):
            some = [member.layout for member in self.members if group in member.layout.fellows]
            # Which parameters a partition has parts of differs from rank to rank; other ranks may have other experts.
            partitions = any(layout.is_partition for layout in some)
            facts = facts_of(None if partitions else {layout.tile.key for layout in some if layout.tile})
            waves = [wave for bucket in self.buckets for wave in bucket.waves]
            told = filter(None, (wave.travel.facts(group) for wave in waves))
            facts += [f"{fact}, wave {i}" for i, some in enumerate(told) for fact in some]
            fault = disagreement(group, fault, facts)
        if fault:
            raise RuntimeError(fault)
        self.agreed = True

    @roll_call.guard("this step cannot be finished")
    def run(self, states: dict[Tensor, State], constants_of: ConstantsOf, found_inf: Tensor | None = None) -> bool:
        """Moves every tensor that has a gradient by one step, and its state with it.

        Args:
            constants_of: (key, group) -> the parameter's hyper-parameters.
            found_inf: above 0: GradScaler has found a gradient that is not finite. No rank steps if it is on any. None:
                no GradScaler has looked.

        Returns:
            Whether they have moved. No: on some rank a gradient is not finite, or its square is not in float32.
        """
        for launch in self.launches:
            if launch.stale:
                launch.fill_numbers(constants_of)
        if not self.bound:
            for launch in self.launches:
                launch.bind(states)
            self._seen, self.bound = list(states.values()), True
        calls = {
            bucket: [Call(launch, bucket.local_work, bucket.kept_work) for launch in bucket.launches.values()]
            for bucket in self.buckets
        }
        waves = [(wave, some) for bucket, some in calls.items() for wave in bucket.waves]
        every = list(itertools.chain(*calls.values()))
        if self._at_once:
            moved = self._all_known_first(calls, waves, every, found_inf)
        else:
            moved = self._in_turn(waves, every, found_inf)
        for call in every if moved else ():
            call.count()
        return moved

    def _all_known_first(self, calls: Calls, waves: Waves, every: list[Call], found_inf: Tensor | None) -> bool:
        """All sums travel, wave by wave, before anything changes."""
        finite: list[Tensor] = []
        look = self.checked and found_inf is None
        for bucket, some in calls.items():
            bucket.kept_work[0] = 0  # what is left of an earlier step must not count
            for call in some:
                call.look()
            finite += [bucket.kept_work[0].sum()] if look else []
        last = []
        for wave, some in waves:
            wave.sums(some)
            finite += [wave.work[0].sum()] if look else []
            if wave.travel.infinite is None:
                wave.depart(some)
            else:  # it tells others what is not finite
                last.append((wave, some))
        infinite = found_inf
        if look:  # no sum is negative: their sum tells, and needs no memory
            infinite = torch.stack([~each.isfinite().to(self.buckets[0].device) for each in finite]).any()
        for wave, some in last:
            wave.depart(some, infinite)
        if infinite is None:
            for call in every:  # while the sums travel
                call.step()
        for wave, _ in waves:
            wave.arrive()
        if infinite is not None:
            if self._is_infinite(infinite, tell=found_inf is not None):
                return False
            for call in every:
                call.step()
        for bucket, some in calls.items():
            for call in some if bucket.waves else ():
                call.join(bucket.waves[0].work)
        for wave, some in waves:
            wave.share(some)
            wave.finish(some)
        return True

    def _in_turn(self, waves: Waves, every: list[Call], found_inf: Tensor | None) -> bool:
        """While a wave's sums travel, the next one is summed up; while its columns come back, the one before moves."""
        if found_inf is not None and self._is_infinite(found_inf, tell=True):
            return False
        for i in range(len(waves) + 2):
            if i < len(waves):
                wave, some = waves[i]
                wave.sums(some)
                wave.depart(some)
            if i == 0:
                for call in every:  # what needs nothing of other ranks
                    call.step()
            if 0 < i <= len(waves):
                wave, some = waves[i - 1]
                wave.arrive()
                wave.share(some)
            if i > 1:
                wave, some = waves[i - 2]
                wave.finish(some)
        return True

    def _is_infinite(self, infinite: Tensor, tell: bool) -> bool:
        """Whether any rank has a gradient that is not finite. tell: GradScaler, where only another one has."""
        here = bool(infinite > 0)
        places = ((wave.work, wave.travel.infinite) for bucket in self.buckets for wave in bucket.waves)
        anywhere = here or any(place is not None and bool(work[0, place] > 0) for work, place in places)
        if tell and anywhere and not here:
            amp.tell_scaler()
        return anywhere
