"""What DeepSpeed holds within a forward and backward pass, walked through as it goes: read and measured with 0.19.8.

All sizes are in elements. Modules run in the order of their parameters, and what the whole model has itself comes last;
backwards it is the opposite order.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence

from ..models import Parameter, total
from ..scaling.layout import Spread


class _Walk:
    """What is held now, and the most that ever was."""

    held = most = 0

    def hold(self, elements: int) -> None:
        self.held += elements
        self.most = max(self.most, self.held)


# ---- stages 1 and 2 --------------------------------------------------------------------------------------------------


class Reduced(_Walk):
    """Gradients on one rank, those that stay included; without the buckets themselves.

    A gradient is moved into the bucket if it is not larger. When the next one has no room there, the bucket is
    all-reduced in a copy. Of parameters of which the rank has a part it then keeps the whole gradient, in a buffer that
    is made for all of them at once.

    Args:
        rank: of which, and `kept` the elements of its buffer. bucket_size: reduce_bucket_size.
        keeps_large: stage 1 leaves what is larger than the bucket where it is.
    """

    def __init__(self, rank: int, kept: int, bucket_size: int, keeps_large: bool) -> None:
        self.rank, self.kept, self.bucket_size, self.keeps_large = rank, kept, bucket_size, keeps_large
        self.bucket: list[Spread] = []
        self.filled = 0
        self.is_keeping = False

    def run(self, arrivals: Iterable[Spread], at_once: int = 0) -> int:
        """The most, by where their parameters lie. at_once: elements that are all there before the first one goes."""
        self.hold(at_once)
        for spread in arrivals:
            self.hold(0 if at_once else spread.numel)
            if self.filled + spread.numel > self.bucket_size:
                self._flush()
            self.bucket.append(spread)
            self.filled += spread.numel
            if spread.numel <= self.bucket_size:
                self.hold(-spread.numel)
        self._flush()
        return self.most

    def _flush(self) -> None:
        copy = _copied(self.bucket, self.bucket_size)
        self.hold(copy)
        self.hold(-copy)
        is_mine = any(self.rank in spread.holders for spread in self.bucket)
        if is_mine and not self.is_keeping:
            self.is_keeping = True
            self.hold(self.kept)
        if self.filled > self.bucket_size and (is_mine or not self.keeps_large):
            self.hold(-self.filled)
        self.bucket, self.filled = [], 0


def _copied(bucket: Sequence[Spread], bucket_size: int) -> int:
    """Elements of the largest copy: slices for one rank each, joined, where there is more than one."""
    if len({spread.owner for spread in bucket}) <= 1 and all(len(spread.holders) == 1 for spread in bucket):
        return 0
    if (filled := sum(spread.numel for spread in bucket)) <= bucket_size:
        return filled
    most, slices = 0, list[int]()  # of one large gradient, as many as just exceed the bucket's size
    for rank in bucket[0].holders:
        slices.append(bucket[0].held(rank)[1])
        if sum(slices) > bucket_size or rank == bucket[0].holders[-1]:
            most, slices = max(most, sum(slices) if len(slices) > 1 else 0), []
    return most


# ---- stage 3 ---------------------------------------------------------------------------------------------------------


class _Gather:
    """An all-gather: of one parameter in place; of several into a buffer, which is there until all were asked for."""

    def __init__(self, keys: list[int]) -> None:
        self.keys, self.waiting = keys, len(keys)
        self.is_done = False


class Gathered(_Walk):
    """Stage 3 on one rank: parameters that are gathered, and gradients that leave; without the bucket itself.

    Args:
        parameters: those of a module share their names up to the last dot.
        threshold: param_persistence_threshold. prefetch: prefetch_bucket_size. max_live: max_live_parameters.
        max_reuse: max_reuse_distance. bucket_size: reduce_bucket_size.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        ranks: int,
        *,
        threshold: int,
        prefetch: int,
        max_live: int,
        max_reuse: int,
        bucket_size: int,
    ) -> None:
        self.sizes = [total([each]) for each in parameters]
        self.is_alone = ranks == 1  # then parameters are their partitions: nothing is gathered
        self.padded = [-(-size // ranks) * ranks for size in self.sizes]
        self.persistent = {key for key, size in enumerate(self.sizes) if size <= threshold}
        self.prefetch, self.max_live, self.max_reuse, self.bucket_size = prefetch, max_live, max_reuse, bucket_size
        names = [each.name.rpartition(".")[0] for each in parameters]
        self.modules = [list(keys) for _, keys in itertools.groupby(range(len(names)), lambda key: names[key])]
        if not self.modules or names[0]:
            self.modules.insert(0, [])  # the whole model is a module too
        self.here = dict.fromkeys(self.persistent, 0)  # elements that each one took
        self.live = 0  # as DeepSpeed counts: without those
        self.gathers: dict[int, _Gather] = {}  # by parameter that nobody has asked for yet
        self.fetched_for = dict.fromkeys(range(len(names)), -1)  # the last visit that each was fetched for
        self.queue: deque[tuple[int, int]] = deque()
        self.bucket: list[int] = []
        self.filled = 0

    def run(self) -> int:
        """The most."""
        whole, *others = self.modules
        visits = [whole, *others, whole, *reversed(others)]
        self.queue.extend((key, visit) for visit, keys in enumerate(visits) for key in keys)
        of_whole = sum(self.sizes[key] for key in whole)
        behind = sum(self.sizes) - of_whole
        for visit, keys in enumerate(visits[: len(self.modules)]):
            self._fetch(keys, visit)
            if visit:
                behind -= sum(self.sizes[key] for key in keys)
                # The way to its second use goes twice through all modules behind it, and through the whole model.
                self._release(keys, visit, comes_again=2 * behind + of_whole < self.max_reuse)
        self._release(whole, len(others), comes_again=self.max_reuse > 0)
        for visit, keys in enumerate(visits[len(self.modules) :], len(self.modules)):
            self._fetch(keys, visit)
            for key in reversed(keys):
                self._reduce(key)
            # The input of the whole model and of its first module has no gradient, which would tell that they are done.
            if len(self.modules) < visit < len(visits) - 1:
                self._release(keys, visit, comes_again=False)
        self._flush()
        return self.most

    def _gather(self, keys: list[int]) -> None:
        if keys:
            self.live += sum(self.sizes[key] for key in keys)
            self.gathers.update(dict.fromkeys(keys, _Gather(keys)))
            self.hold(0 if self.is_alone else sum(self.padded[key] for key in keys))

    def _fetch(self, keys: list[int], visit: int) -> None:
        """What a module needs; then more of what comes next, whatever is on its way already."""
        self._gather([key for key in keys if key not in self.here and key not in self.gathers])
        for key in keys:
            if key in self.gathers:
                self._wait(self.gathers.pop(key))
        missing = sum(self.fetched_for[key] < visit for key in keys)
        for _ in range(missing):  # the next in the queue
            key, self.fetched_for[key] = self.queue.popleft()
        room, coming, elements = min(self.max_live - self.live, self.prefetch), dict[int, None](), 0
        while self.queue and elements < room:
            key, wanted = self.queue.popleft()
            self.fetched_for[key] = max(self.fetched_for[key], wanted)
            if key not in self.here and key not in self.gathers and key not in coming:
                coming[key] = None
                elements += self.sizes[key]
        self._gather(list(coming))

    def _wait(self, gather: _Gather) -> None:
        if self.is_alone:
            self.here.update(dict.fromkeys(gather.keys, 0))
            return
        is_copied = len(gather.keys) > 1
        if not gather.is_done:
            gather.is_done = True
            self.here.update({key: (self.sizes if is_copied else self.padded)[key] for key in gather.keys})
            self.hold(sum(self.sizes[key] for key in gather.keys) if is_copied else 0)
        gather.waiting -= 1
        if not gather.waiting and is_copied:
            self.hold(-sum(self.padded[key] for key in gather.keys))

    def _release(self, keys: list[int], visit: int, comes_again: bool) -> None:
        for key in keys:
            if key not in self.persistent and not comes_again and self.fetched_for[key] <= visit + 1:
                self.live -= self.sizes[key]
                self.hold(-self.here.pop(key))

    def _reduce(self, key: int) -> None:
        """A gradient comes, and goes into the bucket, after what was in there has left if there is no room."""
        size = self.sizes[key]
        self.hold(size)
        if self.bucket and self.filled + size > self.bucket_size:
            self._flush()
        self.bucket.append(key)
        self.filled += size
        if size <= self.bucket_size:
            self.hold(-size)

    def _flush(self) -> None:
        """Reduced in a copy that is ordered by rank, but for one gradient alone that needs no padding."""
        padded = sum(self.padded[key] for key in self.bucket)
        copy = padded if len(self.bucket) > 1 or padded != self.filled else 0
        self.hold(copy)
        self.hold(-copy)
        if self.filled > self.bucket_size:
            self.hold(-self.filled)
        self.bucket, self.filled = [], 0
