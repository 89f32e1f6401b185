"""What a process runs with, and the comparison of processes: which of them differ, and in what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .ops import build_info

# What must be alike, and what may differ but is worth knowing: the key in `facts`, and what people call it.
REQUIRED = {
    "version": "amos_dist",
    "sources": "amos_dist's code",
    "extension": "amos_dist's extension",
    "python": "Python",
    "torch": "torch",
    "cuda": "CUDA",
    "nccl": "NCCL",
    "deepspeed": "DeepSpeed",
}
NOTABLE = {
    "torch_built": "build's torch",
    "cpu_instruction_set": "instruction set",
    "cuda_archs": "CUDA build",
    "gpu": "GPU",
    "driver": "NVIDIA driver",
}
ALL_FACTS = {**REQUIRED, **NOTABLE}

INSTALL = (
    "Install the same on all hosts, in the Python that is started there (`python -m amos_dist info` says what it has)."
)
SET_CLOCKS = "Set the clocks, for example with chrony: logs and the times of files mislead."
MAY_BE_MEANT = "This may be meant: training goes on."
LOOK_AT_GPU = "Look at `nvidia-smi` there."
MISSING = "missing"
SKEW, LIMIT = 5.0, 60.0  # seconds between clocks that are worth a warning, and that are an error
NAMED = 4  # hosts in a sentence


def facts() -> dict[str, Any]:
    """What this process runs with: `build_info`, host, clock, and what it found here."""
    return {
        **build_info(),
        "host": socket.gethostname(),
        "sources": _sources(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None,
        "deepspeed": _deepspeed(),
        "gpu": _gpu(),
        "driver": _driver(),
        "clock": time.time(),  # last: others compare it with the moment at which they hear of it
    }


def _sources() -> str:
    """A hash of this package's Python files: two checkouts may have the same version number."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _deepspeed() -> str | None:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    """The one of this rank."""
    if not torch.cuda.is_available():
        return None
    local = number_in("LOCAL_RANK", 0)
    try:
        found = torch.cuda.get_device_properties(local if 0 <= local < torch.cuda.device_count() else 0)
    except RuntimeError:  # it is there, but does not work
        return None
    return f"{found.name} sm_{found.major}{found.minor}"


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module\D*?\s(?:for \S+\s+)?(\d+[\d.]*)", text)
    return found and found[1]


def number_in(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise ValueError(f"{variable}={text} in the environment is no number. Start the ranks with a launcher.")
    return int(text)


@dataclass(frozen=True)
class Row:
    """Ranks of a host that run with the same; of a host that was asked without any training, no ranks.

    Attributes:
        facts: of ALL_FACTS. ahead: seconds that its clock is ahead of the others'.
    """

    host: str
    ranks: tuple[int, ...]
    facts: dict[str, Any]
    ahead: float = 0.0


class Difference(NamedTuple):
    """Between rows: a clause that names both values and who has them, and a sentence that says what to do."""

    clause: str
    remedy: str
    fatal: bool


@dataclass(frozen=True)
class Report:
    """Attributes:
    rows: by their first rank. differences: between them.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "differences", tuple(_differences(self.rows)))

    @property
    def error(self) -> str:
        """What keeps these from training together, in sentences; nothing where nothing does."""
        fatal = [difference for difference in self.differences if difference.fatal]
        remedies = dict.fromkeys(difference.remedy for difference in fatal)
        return "; ".join(difference.clause for difference in fatal) + ". " + " ".join(remedies) if fatal else ""

    @property
    def warnings(self) -> list[str]:
        """What may be meant, in sentences."""
        return [f"{each.clause}. {each.remedy}" for each in self.differences if not each.fatal]

    @property
    def summary(self) -> str:
        """One line: who is alike, and in what."""
        count, hosts = sum(len(row.ranks) for row in self.rows), len({row.host for row in self.rows})
        who = f"{count} {'rank' if count == 1 else 'ranks'} on " if count else ""
        differing = {difference.clause.partition(" is ")[0] for difference in self.differences}
        values = [
            f"{name} {_shown(self.rows[0].facts[key])}"
            for key, name in REQUIRED.items()
            if key not in ("sources", "extension") and self.rows[0].facts.get(key) and name not in differing
        ]
        return f"{who}{hosts} {'host' if hosts == 1 else 'hosts'} with {', '.join(values)}"

    def __str__(self) -> str:
        """A table, one line for each row."""
        columns = [["host", *(row.host for row in self.rows)]]
        if any(row.ranks for row in self.rows):
            columns.insert(0, ["ranks", *(spans(row.ranks) for row in self.rows)])
        for key, name in ALL_FACTS.items():
            if any(row.facts.get(key) for row in self.rows):
                columns.append([name, *(_shown(row.facts.get(key)) for row in self.rows)])
        columns.append(["clock", *(f"{row.ahead:+.1f} s" for row in self.rows)])
        widths = [max(map(len, column)) for column in columns]
        lines = (
            [text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in zip(*columns, strict=True)
        )
        return "\n".join("  ".join(line).rstrip() for line in lines)


def spans(ranks: Iterable[int]) -> str:
    """Of ranks in order, like 0-3, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def called(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or MISSING
    return {None: MISSING, False: MISSING, True: "built"}.get(value, str(value))


def _who(rows: Iterable[Row]) -> str:
    """Like "node1 (ranks 0-3), node2 (rank 4)"."""
    ranks: dict[str, list[int]] = {}
    for row in rows:
        ranks.setdefault(row.host, []).extend(row.ranks)
    names = [f"{host} ({called(sorted(some))})" if some else host for host, some in ranks.items()]
    return ", ".join(names if len(names) <= NAMED else [*names[: NAMED - 1], f"{len(names) - NAMED + 1} more hosts"])


def _differences(rows: Sequence[Row]) -> Iterable[Difference]:
    for key, name in ALL_FACTS.items():
        having: dict[str, list[Row]] = {}
        for row in rows:
            having.setdefault(_shown(row.facts.get(key)), []).append(row)
        if key == "version":
            versions = having
        if len(having) < 2 or (key == "sources" and len(versions) > 1):  # which is no news then
            continue
        clause = f"{name} is " + " and ".join(f"{value} on {_who(some)}" for value, some in having.items())
        if key == "gpu" and MISSING in having:
            yield Difference(clause, LOOK_AT_GPU, True)
        else:
            yield Difference(clause, INSTALL if key in REQUIRED else MAY_BE_MEANT, key in REQUIRED)
    for row in rows:
        if abs(row.ahead) > SKEW:
            apart = f"{abs(row.ahead):.0f} s {'ahead of' if row.ahead > 0 else 'behind'}"
            yield Difference(f"the clock of {_who([row])} is {apart} the others", SET_CLOCKS, abs(row.ahead) > LIMIT)


def rows_of(found: Sequence[dict[str, Any]], clocks: Sequence[float]) -> list[Row]:
    """found: the facts of each rank. clocks: read at the same time."""
    middle = statistics.median_low(clocks)
    alike: dict[str, list[int]] = {}
    for rank, each in enumerate(found):
        key = [each["host"], *(_shown(each.get(name)) for name in ALL_FACTS)]
        alike.setdefault(json.dumps(key), []).append(rank)
    result = []
    for ranks in alike.values():
        first = found[ranks[0]]
        ahead = max((clocks[rank] - middle for rank in ranks), key=abs)
        result.append(Row(first["host"], tuple(ranks), {key: first.get(key) for key in ALL_FACTS}, ahead))
    return result
