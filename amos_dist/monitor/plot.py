"""A picture of what a monitor wrote as CSV."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from .report import TOTAL, UNITS

Curves = dict[str, dict[str, dict[int, float]]]


def read(path: Path) -> Curves:
    """The value of each step, by quantity and parameter. Of steps that a restarted job took twice, the last.

    Raises:
        ValueError: the file is not what monitor.CSV writes.
    """
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != ["step", "name", "value"]:
            raise ValueError(f"{path} has the columns {rows.fieldnames}. Give a file that amos_dist.monitor.CSV wrote.")
        for row in rows:
            quantity, _, parameter = row["name"].partition("/")
            curves[quantity][parameter][int(row["step"])] = float(row["value"])
    return curves


def plot(path: Path, picture: Path) -> None:
    """A panel for each norm and rate, and for b: a thin line for each parameter, a thick one for the total."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = read(path)
    panels = [*UNITS.items(), ("b_p50", "median of b")]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharex=True)
    for panel, (quantity, meaning) in zip(axes.flat, panels, strict=True):
        found = dict(curves[quantity])
        total = found.pop(TOTAL, {})
        for number, (_, points) in enumerate(sorted(found.items())):
            steps, values = zip(*sorted(points.items()), strict=True)
            panel.plot(
                steps,
                values,
                linewidth=0.7,
                alpha=0.6,
                color=matplotlib.colormaps["viridis"](number / max(1, len(found) - 1)),
            )
        if total:
            steps, values = zip(*sorted(total.items()), strict=True)
            panel.plot(steps, values, color="black", linewidth=2, label="total")
            panel.legend(loc="best")
        panel.set(title=f"{quantity}:  {meaning}", yscale="log")
        panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set(xlabel="step")
    skipped = max(curves["skipped_steps"][TOTAL].values(), default=0)
    figure.suptitle(f"{len(curves['update_norm']) - 1} parameters, {skipped:.0f} skipped steps")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
