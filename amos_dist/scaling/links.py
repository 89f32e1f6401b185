"""How long a collective takes on a link: a model, nothing measured.

alpha-beta: a message of S bytes takes alpha + S / bandwidth. An all-reduce over n ranks then takes, by

    a ring:  2 (n - 1) alpha + 2 (n - 1) / n * S / bandwidth
    a tree:  2 ceil(log2 n) alpha + 2 S / bandwidth

and a reduce-scatter or an all-gather half of the ring. Sources: R. Thakur, R. Rabenseifner, W. Gropp, Optimization of
Collective Communication Operations in MPICH, 2005 (the model and the ring); P. Sanders, J. Speck, J. L. Traeff,
Two-tree Algorithms for Full Bandwidth Broadcast, Reduction and Scan, 2009 (the tree, in a pipeline: NCCL's other one).
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

# NVLink 4: 18 links of 25 GB/s each way. InfiniBand NDR: 400 Gb/s. Latencies: what NCCL's own tuning table takes for a
# step of its protocol "Simple" (src/graph/tuning.cc, hwLat).
DEFAULT = "nvlink:8=450GB/s@4us,ib=400Gb/s@14us"


class Link(NamedTuple):
    """What joins ranks.

    Attributes:
        bandwidth: of a rank in one direction, bytes a second. latency: of a message, seconds.
        most: how many ranks it can join at most; 0: any number.
    """

    name: str
    bandwidth: float
    latency: float
    most: int = 0

    def joins(self, ranks: int) -> bool:
        return not self.most or ranks <= self.most


_LINK = re.compile(
    r"(?P<name>[^\s:=,@]+)(:(?P<most>\d{1,9}))?=(?P<size>\d+\.?\d*)(?P<unit>[KMGT])(?P<bits>[bB])/s(@(?P<latency>\d+\.?\d*)us)?"
)


def links_of(text: str) -> list[Link]:
    """The links of a list such as "nvlink:8=450GB/s@4us,ib=400Gb/s@14us": name, most ranks, bandwidth, latency.

    Raises:
        ValueError: it is none.
    """
    found = []
    for part in text.split(","):
        match = _LINK.fullmatch(part.strip())
        if match is None or not float(match["size"]):
            raise ValueError(f"--bandwidth {part.strip() or text}: this is no link. Write them like {DEFAULT}.")
        rate = float(match["size"]) * 1000 ** (" KMGT".index(match["unit"])) / (8 if match["bits"] == "b" else 1)
        found.append(Link(match["name"], rate, float(match["latency"] or 0) * 1e-6, int(match["most"] or 0)))
    return found


def all_reduce(size: int, ranks: int, link: Link) -> float:
    """Seconds: by a ring or by a tree, whichever is quicker."""
    if ranks < 2 or not size:
        return 0.0
    ring = 2 * (ranks - 1) * link.latency + sent_by_all_reduce(size, ranks) / link.bandwidth
    tree = 2 * math.ceil(math.log2(ranks)) * link.latency + 2 * size / link.bandwidth
    return min(ring, tree)


def half_ring(size: int, ranks: int, link: Link) -> float:
    """Seconds of a reduce-scatter or an all-gather, in one message: many buckets have as many latencies."""
    return (ranks - 1) * link.latency + sent_by_half_ring(size, ranks) / link.bandwidth if ranks > 1 else 0.0


def to_few(size: int, link: Link) -> float:
    """Seconds of what goes to a few other ranks, all at once: size is what this one sends."""
    return link.latency + size / link.bandwidth


def sent_by_all_reduce(size: int, ranks: int) -> float:
    """Bytes that each rank sends, on a ring."""
    return 2 * sent_by_half_ring(size, ranks)


def sent_by_half_ring(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a reduce-scatter or an all-gather."""
    return (ranks - 1) / ranks * size
