"""From the numbers that a step left to what people read: a value for each quantity and parameter, and in total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .probe import COLUMN_V, COUNT, DECAY, ENTRIES, EXPECTED, RATE, SAMPLES, STEP, THETA, B, V

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
TOTAL = "total"
UNITS = {  # and meaning, for pictures
    "update_norm": "‖Δ‖",
    "update_ratio": "‖Δ‖ / ‖θ‖",
    "scale_ratio": "‖θ‖ / (√k σ)",
    "effective_lr": "d ξ σ",
    "weight_decay": "d (γ/2 + extra_l2)",
}


@dataclass(frozen=True)
class Report:
    """Attributes:
    step: t of the step, counted from 1. skipped_steps: left out so far because a gradient was not finite.
    values: by parameter, or "total", and quantity.
    """

    step: int
    skipped_steps: int
    values: dict[str, dict[str, float]]

    def flat(self) -> dict[str, float]:
        """What writers get: `quantity/parameter`, and `quantity/total`."""
        named = {f"{key}/{name}": value for name, some in self.values.items() for key, value in some.items()}
        return {**named, f"skipped_steps/{TOTAL}": float(self.skipped_steps)}

    def __str__(self) -> str:
        """A table, the total last."""
        keys = list(self.values[TOTAL])
        rows = [[f"step {self.step}", *keys]]
        for name, some in self.values.items():
            rows.append([name, *(f"{some[key]:.3g}" if key in some else "" for key in keys)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join([*lines, f"skipped steps: {self.skipped_steps}"])


def quantiles(samples: Tensor, counts: Tensor) -> Tensor:
    """Of the first `counts` numbers of each row, the ones nearest to QUANTILES in rank; a NaN is above all others.

    Args:
        samples: [n, SAMPLES]. counts: int64 [n]; 0 gives NaN.
    """
    behind = torch.arange(samples.shape[1]) >= counts[:, None]
    ordered = samples.masked_fill(behind, torch.nan).sort(dim=1).values
    ranks = torch.stack([((counts - 1).clamp(min=0) * q).round().long() for q in QUANTILES.values()], dim=1)
    return ordered.gather(1, ranks)


def report(
    step: int, skipped: int, numbers: Tensor, names: Sequence[str], entries: Sequence[tuple[int, int]]
) -> Report:
    """What the numbers of all parameters that were stepped come to.

    Args:
        numbers: float64 [parameters, WIDTH], added up over ranks; of those that nobody stepped COUNT is 0.
        names, entries: of all parameters; how many entries v and b, and the column moments have.
    """
    some = numbers[:, COUNT].nonzero()[:, 0]
    found = numbers[some]
    counts = torch.tensor([entries[i] for i in some.tolist()], dtype=torch.int64).view(-1, 2).clamp(max=SAMPLES)
    columns = {"v": (V, counts[:, 0]), "b": (B, counts[:, 0]), "column_v": (COLUMN_V, counts[:, 1])}
    everything = _norms(found)
    weights = found[:, COUNT]
    total = {key: float(value) for key, value in _norms(found.sum(0)).items()}
    # The means of the parameters, each as much as it has elements.
    for key in ("effective_lr", "weight_decay"):
        total[key] = float((everything[key] * weights).sum() / weights.sum())
    for key, (place, held) in columns.items():
        by_name = dict(zip(QUANTILES, quantiles(found[:, place], held).unbind(1), strict=True))
        everything |= {f"{key}_{name}": value for name, value in by_name.items()}
        there = torch.arange(SAMPLES) < held[:, None]
        pool = found[:, place][there]
        if len(pool):
            of_all = quantiles(pool[None], torch.tensor([len(pool)]))[0].tolist()
            total |= {f"{key}_{name}": value for name, value in zip(QUANTILES, of_all, strict=True)}
    rows = torch.stack(list(everything.values()), dim=1).tolist()
    has_columns = counts[:, 1].bool().tolist()
    values = {}
    for i, row, factored in zip(some.tolist(), rows, has_columns, strict=True):
        pairs = zip(everything, row, strict=True)
        values[names[i]] = {key: value for key, value in pairs if factored or not key.startswith("column_v")}
    return Report(step, skipped, {**values, TOTAL: total})


def _norms(sums: Tensor) -> dict[str, Tensor]:
    """From the sums of a parameter, or of several."""
    step, theta, expected = (sums[..., i].sqrt() for i in (STEP, THETA, EXPECTED))
    return {
        "update_norm": step,
        "update_ratio": step / theta,  # inf of parameters of zeros
        "scale_ratio": theta / expected,
        "effective_lr": sums[..., RATE] / sums[..., ENTRIES],
        "weight_decay": sums[..., DECAY] / sums[..., ENTRIES],
    }
