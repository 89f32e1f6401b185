"""ZeRO's partitions, cut anywhere, over ranks that are threads: the class with all it does, against the reference.

A partition is a rank's part of a parameter group's elements, one parameter behind the other. DeepSpeed cuts into equal
parts; here ranks may have any part, or none. What torch.distributed does is done by `Group`.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from amos_dist import Amos, checkpoint, optimizer
from amos_dist.sharding import Layout, Piece, holders, reduce
from amos_dist.sharding.layout import Cut

from ..conftest import relative_error
from .cases import keywords, shape, values
from .oracle import Oracle, draw_gradients, slack_of_few
from .outcome import snapshot, undeclared
from .profiles import examples, randoms


class Group:
    """A process group of threads. One that waits for another in vain is an error and no hang."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.brought = size, threading.Barrier(size, timeout=10), [None] * size
        self.own = threading.local()

    def exchange(self, mine: Any) -> list[Any]:
        """What all ranks bring, in the order of the ranks."""
        self.brought[self.own.rank] = mine
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank returns, or the error that it ends with."""
        results: list[Any] = [None] * self.size

        def as_rank(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=as_rank, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


class Distributed:
    """Stands for torch.distributed."""

    def get_rank(self, group: Group | None = None) -> int:
        return CURRENT[0].own.rank

    def get_world_size(self, group: Group) -> int:
        return group.size

    def get_global_rank(self, group: Group, rank: int) -> int:
        return rank

    def all_gather_object(self, found: list[Any], mine: Any, group: Group) -> None:
        found[:] = group.exchange(mine)

    def gather_object(self, mine: Any, found: list[Any] | None, dst: int, group: Group) -> None:
        everything = group.exchange(mine)
        if found is not None:
            found[:] = everything


class Sum:
    """Stands for reduce.Pending."""

    def __init__(self, tensor: Tensor, group: Group, collective: Any = None, *given: Tensor) -> None:
        if collective is not None:
            assert collective.func is holders._all_to_all
            sizes = collective.keywords
            sent = group.exchange((given[0].clone(), sizes["input_split_sizes"]))
            parts = [each.split(some)[group.own.rank] for each, some in sent]
            assert [part.numel() for part in parts] == sizes["output_split_sizes"]
            tensor.copy_(torch.cat(parts))
            return
        parts = group.exchange(tensor.clone())
        assert len({part.shape for part in parts}) == 1
        tensor.copy_(torch.stack(parts).sum(0))

    def wait(self) -> None:
        pass


CURRENT: list[Group] = []
LAYOUTS: dict[int, Layout] = {}  # by the id of the partition


@pytest.fixture(autouse=True)
def threads_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = optimizer.layout_of
    monkeypatch.setattr(reduce, "dist", Distributed())
    monkeypatch.setattr(checkpoint, "dist", Distributed())
    monkeypatch.setattr(reduce, "Pending", Sum)
    monkeypatch.setattr(optimizer, "layout_of", lambda tensor, *more: LAYOUTS.get(id(tensor)) or real(tensor, *more))


def borders(draw: Random, sizes: list[int], ranks: int) -> list[int]:
    """Where each rank's part of the elements begins, and where the last one's ends."""
    total = sum(sizes)
    way = draw.randrange(4)
    if way == 0:  # equal parts, as DeepSpeed's
        part = -(-total // ranks)
        return [min(total, rank * part) for rank in range(ranks)] + [total]
    if way == 1:  # between parameters
        places = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    elif way == 2:  # one rank has most
        places = list(range(min(total, 9) + 1))
    else:
        places = list(range(total + 1))
    # Only the first ranks or the last ones may have nothing.
    inside = sorted(draw.sample(places, min(len(places), ranks - 1)))
    empty = ranks - 1 - len(inside)
    first = draw.randint(0, empty)
    return [0] * (1 + first) + inside + [total] * (1 + empty - first)


class Partition:
    """A rank's part of a group: the parameters have given their numbers to one flat tensor."""

    def __init__(self, amos: Amos, number: int, group: Group, rank: int, cuts: list[int], padding: int) -> None:
        self.cut = slice(cuts[rank], cuts[rank + 1])
        self.layout = Layout([], (group,), (group,), rank=rank, ranks=group.size)
        begin = 0
        for original in (o for o in amos._originals if o.group == number):
            first, last = max(begin, self.cut.start), min(begin + original.numel, self.cut.stop)
            size = original.rows, original.cols
            inside, share = tuple(b - begin for b in cuts[1:-1] if begin < b < begin + original.numel), None
            if inside:
                owner = sum(border <= begin for border in cuts[1:-1])
                self.layout.cuts.append(Cut(original.key, *size, inside, owner))
                share = self.layout.cuts[-1].share_of(rank)
            if first < last:
                start, offset = first - begin, first - self.cut.start
                self.layout.pieces.append(Piece(original.key, *size, start, last - first, offset, share))
            begin += original.numel
        params = amos.param_groups[number]["params"]
        self.flat = self.part([p.detach() for p in params], padding)
        LAYOUTS[id(self.flat)] = self.layout
        amos.param_groups[number]["params"] = [self.flat]
        self.flat.requires_grad_()

    def part(self, tensors: list[Tensor], padding: int) -> Tensor:
        """This rank's of what all have, and NaN behind it, which nobody may touch or read."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])[self.cut]
        return torch.cat([flat, flat.new_full((padding,), float("nan"))])


@examples(150)
@given(randoms())
def test_partitions(draw: Random) -> None:
    ranks = draw.randint(1, 5)
    dtype = draw.choice((torch.float32, torch.float64))
    group = Group(ranks)
    CURRENT[:] = [group]
    LAYOUTS.clear()
    groups: list[dict[str, Any]] = []
    for number in range(draw.randint(1, 2)):
        shapes = [shape(draw, dims=(0, 4), largest=700) for _ in range(draw.randint(1, 4))]
        given_keywords = keywords(draw, shapes)
        given_keywords.pop("capturable", None)
        given_keywords["lr"] = given_keywords["lr"] or 0.02  # with 0, whole parameters take no first step
        params = [values(draw.randrange(10**6), size, dtype) / 2 for size in shapes]
        named = [(f"g{number}.p{i}", p.requires_grad_()) for i, p in enumerate(params)]
        groups.append({"params": named, **given_keywords})
    alone = Amos(groups, lr=0.1)
    oracle = Oracle(alone)
    cuts = [borders(draw, [p.numel() for _, p in each["params"]], ranks) for each in groups]
    paddings = [draw.randint(1, 3) for _ in range(ranks)]
    steps = draw.randint(1, 3)
    grads: list[list[list[Tensor]]] = []
    for _ in range(steps):
        # A partition has gradients of all its parameters: zeros where the model has none.
        draw_gradients(
            alone,
            lambda p: values(draw.randrange(10**6), tuple(p.shape), dtype, draw.choice(("plain", "rows", "zeros"))),
        )
        oracle.step(alone)
        grads.append([[p.grad for p in each["params"]] for each in alone.param_groups])
    resumes, damaged = draw.randrange(3), draw.randrange(ranks) if draw.randrange(3) == 0 else None
    recut = [borders(draw, [p.numel() for _, p in each["params"]], ranks) for each in groups]

    def build(rank: int, cuts: list[list[int]]) -> tuple[Amos, list[Partition]]:
        copies = [
            {**each, "params": [(name, p.detach().clone().requires_grad_()) for name, p in each["params"]]}
            for each in groups
        ]
        amos = Amos(copies, lr=0.1)
        return amos, [Partition(amos, i, group, rank, cuts[i], paddings[rank]) for i in range(len(groups))]

    def work(rank: int) -> Any:
        amos, partitions = build(rank, cuts)
        if damaged is not None:  # as a damaged file leaves it
            refused(amos, partitions, rank)
        for t, some in enumerate(grads):
            if resumes == 2 and t == 1:
                amos, partitions = universal(rank, amos, partitions)
            elif resumes and t == 1:
                saved, before = amos.state_dict(), partitions
                amos, partitions = build(rank, cuts)
                for new, old in zip(partitions, before, strict=True):
                    new.flat.data.copy_(old.flat.data)
                amos.load_state_dict(saved)
            for partition, whole in zip(partitions, some, strict=True):
                partition.flat.grad = partition.part(whole, paddings[rank])
            amos.step()
        for each, built in zip(amos.param_groups, groups, strict=True):
            assert each["param_names"] == [name for name, _ in built["params"]]
        padding = [partition.flat.detach()[-paddings[rank] :] for partition in partitions]
        assert all(bool(each.isnan().all()) for each in padding), "padding was written to"
        flats = [partition.flat.detach()[: -paddings[rank]] for partition in partitions]
        return flats, amos.state_dict()["param_groups"][0].get(checkpoint.ENTRY)

    def universal(rank: int, amos: Amos, before: list[Partition]) -> tuple[Amos, list[Partition]]:
        """As DeepSpeed does it: cuts planes anew, and writes what the first rank saved into the groups."""
        saved, padding = amos.state_dict(), paddings[rank]
        mine = [
            (old.flat.detach()[:-padding], saved["state"][i]["exp_avg"][:-padding], saved["state"][i]["step"])
            for i, old in enumerate(before)
        ]
        everything, first = group.exchange(mine), copy.deepcopy(group.exchange(saved)[0]["param_groups"])
        for each in (*first, *first[0][checkpoint.SETTINGS]):  # as of another program
            each["param_names"] = each["param_names"][::-1]
        amos, partitions = build(rank, recut)
        for i, new in enumerate(partitions):
            flat, momentum = (torch.cat([part[i][k] for part in everything]) for k in (0, 1))
            new.flat.data.copy_(new.part([flat], padding))
            amos.state[new.flat] = {"step": everything[0][i][2], "exp_avg": new.part([momentum], padding)}
            amos.param_groups[i].update({k: v for k, v in first[i].items() if k != "params"})
        return amos, partitions

    def refused(amos: Amos, partitions: list[Partition], rank: int) -> None:
        for partition, whole in zip(partitions, grads[0], strict=True):
            partition.flat.grad = partition.part(whole, paddings[rank])
        if rank == damaged:
            amos.state[partitions[0].flat] = {"step": torch.ones(()), "decay": torch.zeros(1, 9973)}
        before = snapshot(amos)
        with pytest.raises(RuntimeError) as raised:
            amos.step()
        assert not undeclared(raised.value), str(raised.value)
        after = snapshot(amos)
        assert after == before
        amos.state.clear()

    results = group.run(work)
    exact = 1e-11 if dtype == torch.float64 and resumes != 2 else 2e-5  # what travels is float32
    for i in range(len(groups)):
        flat = torch.cat([result[0][i] for result in results])
        parts = flat.split([p.numel() for p in alone.param_groups[i]["params"]])
        first = sum(len(each["params"]) for each in groups[:i])
        for j, part in enumerate(parts):
            expected = oracle.params[first + j]
            tolerance = exact * slack_of_few(expected.numel())
            assert relative_error(part.view(expected.shape), expected) <= tolerance, f"g{i}.p{j}"
    entries = results[0][1] or {}
    for number, (name, _) in enumerate(itertools.chain(*(each["params"] for each in groups))):
        expected_state = oracle.states[number]
        if not oracle.params[number].numel() or not expected_state:
            continue
        entry = entries[name]
        for key in {"row_moment", "column_moment", "moment", "decay"} & set(expected_state):
            assert relative_error(entry[key], expected_state[key]) <= 2e-5, f"{name} {key}"
