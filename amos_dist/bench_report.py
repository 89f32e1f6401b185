"""What a benchmark came to: a table, the numbers behind it, and a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .bench import Result, Row
from .ops import build_info


def facts(device: torch.device) -> dict[str, Any]:
    """What was measured on, and with what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": None,
        "build": build_info(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "gpu_l2": properties.L2_cache_size}
    return found


def ratios(result: Result, row: Row) -> dict[str, float | None]:
    """Of one row: share of the yardstick's bandwidth, and how many times the first peer and the yardstick it takes."""
    yardstick, peer = result.yardstick, result.first_peer
    part = row.parameters / result.parameters  # Muon leaves out what is no matrix
    found: dict[str, float | None] = {}
    if peer is not None:
        ours, theirs = row.state_bytes, peer.state_bytes
        found[f"state x {peer.name}"] = ours / part / theirs if ours is not None and theirs else None
    found["share of bandwidth"] = row.bandwidth / yardstick.bandwidth
    found[f"x {yardstick.name.split()[-1]}"] = row.seconds / (part * yardstick.seconds)
    if peer is not None:
        found[f"x {peer.name}"] = row.seconds / row.parameters / (peer.seconds / peer.parameters)
    return found


def title(result: Result, machine: dict[str, Any]) -> str:
    where = machine["gpu"] or f"{machine['cpu']}, {machine['build']['cpu_instruction_set'] or 'pure torch'}"
    threads = "" if machine["gpu"] else f", {result.threads} thread{'s'[: result.threads > 1]}"
    size = f"{result.parameters / 1e6:.1f} M parameters in {len(result.shapes)} tensors"
    return f"{result.source}: {size}; {where}{threads}, torch {machine['torch']}; median of {result.repeat}"


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.4f}" if ratio < 0.1 else f"{ratio:.2f}"


def table(result: Result) -> str:
    """Markdown, with the ratios last."""
    on_gpu = not result.device.startswith("cpu")
    columns: dict[str, Callable[[Row], str]] = {
        "ms": lambda row: f"{row.seconds * 1e3:.3f}" if row.seconds < 0.1 else f"{row.seconds * 1e3:.1f}",
    }
    if on_gpu or result.threads > 1:
        columns["host ms" if on_gpu else "clock ms"] = lambda row: f"{row.host_seconds * 1e3:.3f}"
    columns |= {
        "bytes/param": lambda row: str(row.traffic),
        "GB/s": lambda row: f"{row.bandwidth / 1e9:.1f}",
        "state MB": lambda row: "" if row.state_bytes is None else f"{row.state_bytes / 1e6:.2f}",
    }
    cells = [["", *columns, *ratios(result, result.yardstick)]]
    for row in (result.yardstick, *result.rows):
        measured = [show(row) for show in columns.values()]
        cells.append([row.name, *measured, *map(_shown, ratios(result, row).values())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for label, *values in cells:
        lines.append("| " + " | ".join([label.ljust(widths[0]), *map(str.rjust, values, widths[1:])]) + " |")
    lines.insert(1, "|-" + "-" * widths[0] + "-|" + "".join("-" * (width + 1) + ":|" for width in widths[1:]))
    return "\n".join(lines)


def notes(result: Result) -> str:
    """What the columns mean, and who is not in the table."""
    if result.device.startswith("cpu"):
        time = "ms: processor time of all threads in one step."
        if result.threads > 1:
            time += " Threads that wait count, unless OMP_WAIT_POLICY=PASSIVE; clock ms: by the clock."
    else:
        time = "ms: on the GPU, one step; host ms: until the call has returned."
        time += f" {result.copies} sets of parameters take turns." if result.copies > 1 else ""
    lines = [time, "bytes/param: the least that a step can move; GB/s: these in that time."]
    lines.append("checked: with on_nonfinite='skip', the default. Under ZeRO all are unchecked: DeepSpeed has looked.")
    lines.append("looked at: a step that amos_dist.Monitor measures, one of `every`.")
    lines += [f"left out: {name}: {reason}" for name, reason in result.left_out.items()]
    return "\n".join(lines)


def as_json(result: Result, machine: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, for programs."""

    def row_json(row: Row) -> dict[str, Any]:
        derived = {"seconds": row.seconds, "host_seconds": row.host_seconds, "bytes_per_second": row.bandwidth}
        return {**asdict(row), **derived, "ratios": ratios(result, row)}

    return {
        "machine": machine,
        "device": result.device,
        "threads": result.threads,
        "source": result.source,
        "shapes": result.shapes,
        "parameters": result.parameters,
        "repeat": result.repeat,
        "copies": result.copies,
        "first_peer": result.first_peer.name if result.first_peer else None,
        "yardstick": row_json(result.yardstick),
        "rows": [row_json(row) for row in result.rows],
        "left_out": result.left_out,
    }


def write_json(result: Result, machine: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(result, machine), indent=1) + "\n")


def plot(result: Result, machine: dict[str, Any], path: Path) -> None:
    """Bars: how long each takes beside the first peer (or the yardstick), and the share of bandwidth it reaches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [result.yardstick, *result.rows]
    held = [ratios(result, row) for row in rows]
    beside = list(held[0])[-1]

    def named(row: Row) -> bool:
        return row.name.startswith("Amos") or row is result.first_peer

    colours = ["tab:blue" if row.name.startswith("Amos") else "tab:gray" for row in rows]
    size = (11, 1.6 + 0.34 * len(rows))
    figure, (times, shares) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=[2, 1], layout="constrained")
    # An optimizer that takes a hundred times as long would leave nothing to see of the others: its bar is cut off.
    longest = 4 * max((ratio[beside] or 0.0 for ratio, row in zip(held, rows, strict=True) if named(row)), default=1)
    for axes, key, limit in ((times, beside, longest), (shares, "share of bandwidth", 2.0)):
        values = [ratio[key] or 0.0 for ratio in held]
        bars = axes.barh([row.name for row in rows], [min(value, limit) for value in values], color=colours)
        labels = [f"{value:.2f}" + (" →" if value > limit else "") for value in values]
        axes.bar_label(bars, labels, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--", zorder=0)
        axes.margins(x=0.2)
        axes.grid(axis="x", alpha=0.3)
    times.invert_yaxis()
    times.set(xlabel=f"time of one step, {beside}", title="Time (less is better)")
    shares.set(xlabel=f"share of the {result.yardstick.name}'s", title="Bandwidth (more is better)")
    figure.suptitle(title(result, machine), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
