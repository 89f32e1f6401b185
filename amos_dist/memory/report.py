"""Estimates as tables, beside what was measured, as numbers for programs, and as stacked bars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import Parameter, total
from ..scaling.report import sized
from .estimates import Estimate
from .fits import RULE, Largest
from .keepers import DOCUMENTED, KEEPERS

CLOSE = 0.02  # how far measured may be from computed
SMALL = 2_000_000  # bytes: libraries take some for themselves
FIRST = ("momentum", "momentum_scale", "exp_avg", "momentum_buffer", "state1")  # first moments, as optimizers call them


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = map(str.ljust, cells[:1], widths[:1]), *map(str.rjust, cells[1:], widths[1:])
    return "| " + " | ".join([*first, *rest]) + " |"


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """The first line is the heading; columns that say nothing are left away."""
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) - {"", "0 B"}]
    widths = [max(map(len, column)) for column in columns]
    lines = [_row(line, widths) for line in zip(*columns, strict=True)]
    lines.insert(1, "|-" + "-" * widths[0] + "-|" + "".join("-" * (width + 1) + ":|" for width in widths[1:]))
    return "\n".join(lines)


def where(found: Estimate) -> str:
    """The setting in words."""
    setting = found.setting
    framework = f"ZeRO-{setting.zero}" if setting.zero else "DDP" if setting.ranks > 1 else "plain torch"
    dtype = str(setting.dtype).removeprefix("torch.")
    return f"{framework}, {setting.ranks} rank{'s'[: setting.ranks > 1]}, {dtype}"


def title(model: str, parameters: Sequence[Parameter]) -> str:
    size = total(parameters)
    return f"{model}: {size / 1e9:.4g} B parameters" if size >= 1e9 else f"{model}: {size / 1e6:.4g} M parameters"


def table(found: Sequence[Estimate], memory: int | None, grown: Sequence[Largest | None]) -> str:
    """Of one setting. The ratio is to AdamW's state, where that is among them."""
    adam = next((each.state_bytes for each in found if each.optimizer == "adamw"), 0)
    heading = ["optimizer", "parameters", "gradients", "master", "state", "x Adam's", "all-reduce buffer", "buckets"]
    cells = [[*heading, "step", "peak", *((f"fits {sized(memory)}", "largest that fits") if memory else ())]]
    for each, most in zip(found, grown, strict=True):
        ratio = f"{each.state_bytes / adam:.2g}" if adam else ""
        sizes = [each.parameters, each.gradients, each.master, each.state_bytes]
        cells.append([each.optimizer, *map(sized, sizes), ratio])
        cells[-1] += map(sized, (each.workspace, each.buckets, each.step, each.peak))
        if memory:
            cells[-1] += ["yes" if each.peak <= memory else "no", _grown(most)]
    return markdown(cells)


def _grown(most: Largest | None) -> str:
    if most is None:
        return ""
    if not most.elements:
        return "none"
    size = f"{most.elements / 1e9:.3g} B" if most.elements >= 1e9 else f"{most.elements / 1e6:.3g} M"
    return f"{size}, {most.layers} layers" if most.layers else size


def states(found: Sequence[Estimate]) -> str:
    """What each optimizer's state is made of."""
    lines = []
    for each in found:
        keys = ", ".join(f"{key} {sized(size)}" for key, size in each.state.items() if size)
        keeper = KEEPERS.get(each.optimizer)
        label = f"{each.optimizer} ({keeper.name}; {keeper.source})" if keeper else each.optimizer
        lines.append(f"{label}: {keys or 'nothing'}")
    return "\n".join(lines)


def notes(found: Sequence[Estimate], memory: int | None) -> str:
    """What the columns mean."""
    setting = found[0].setting
    lines = [
        f"Bytes of rank {found[0].rank}: the one that holds the most, where no other is asked for. "
        "Not counted: activations, the framework's and the communication's own memory.",
        "peak: parameters, master weights, state, all-reduce buffer and gradients, with the buckets in a pass, or with "
        "what the step adds: the larger.",
    ]
    if setting.zero:
        lines.append(
            "master: DeepSpeed's float32 partition. step: its copies of the gradients (float32), or their norm "
            "(float64), and the optimizer's temporaries. buckets: reduce_bucket_size, gradients on their way and in a "
            "copy to reduce" + (", parameters that are gathered, at most." if setting.zero == 3 else ", at most.")
        )
    else:
        lines.append(
            "master: the float32 copy that is stepped. step: its gradients, which Amos does not need, and the "
            "optimizer's temporaries." + (" buckets: DDP's." if setting.ranks > 1 else "")
        )
    if any(KEEPERS[each.optimizer].source == DOCUMENTED for each in found if each.optimizer in KEEPERS):
        lines.append("by its documentation: it is not in torch, and was not measured.")
    if memory:
        lines.append(f"largest that fits: {RULE}.")
    return "\n".join(lines)


# ---- beside what was measured ----------------------------------------------------------------------------------------


def pairs(computed: Estimate, measured: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """What was computed and what was measured of one rank, by name."""
    keys = sorted({*computed.state, *measured["state"]})
    return {
        "parameters": (computed.parameters, measured["parameters"]),
        "gradients": (computed.gradients, measured["gradients"]),
        "master": (computed.master, measured["master"]),
        **{f"state: {key}": (computed.state.get(key, 0), measured["state"].get(key, 0)) for key in keys},
        "state": (computed.state_bytes, sum(measured["state"].values())),
        "all-reduce buffer": (computed.workspace, measured["workspace"]),
        "held between steps": (computed.held, measured["held"]),
        "most in a pass": (computed.backward, measured["backward"]),
        "step adds": (computed.step, measured["step"]),
    }


def is_close(computed: int, measured: int) -> bool:
    """Within 2 %, or 2 MB."""
    return abs(measured - computed) <= max(CLOSE * computed, SMALL)


def beside(computed: Estimate, measured: dict[str, Any]) -> str:
    """A table of one rank, exact to the byte."""
    cells = [[f"rank {computed.rank}, {computed.optimizer}", "computed", "measured", "off"]]
    for name, (one, other) in pairs(computed, measured).items():
        if one or other:
            off = f"{(other - one) / one:+.2%}" if one else ""
            cells.append([name, f"{one:,}", f"{other:,}", off + ("" if is_close(one, other) else " !")])
    cells.append(["resident memory of the process", f"{computed.held:,}", f"{measured['resident']:,}", ""])
    return markdown(cells)


# ---- files -----------------------------------------------------------------------------------------------------------


def as_json(found: Estimate) -> dict[str, Any]:
    setting = {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in vars(found.setting).items()
    }
    derived = {name: getattr(found, name) for name in ("state_bytes", "held", "backward", "peak")}
    return {**vars(found), "setting": setting, **derived}


def write_json(
    model: str,
    found: Sequence[Estimate],
    grown: Sequence[Largest | None],
    measured: Sequence[Sequence[dict[str, Any]]],
    path: Path,
) -> None:
    """All numbers, in bytes. measured: for each estimate what each rank held, or nothing."""
    rows = [
        as_json(each) | ({"largest": most._asdict()} if most else {}) | ({"measured": list(ranks)} if ranks else {})
        for each, most, ranks in zip(found, grown, measured, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": model, "estimates": rows}, indent=1) + "\n")


def parts(found: Estimate) -> dict[str, int]:
    """What the peak is made of."""
    first = sum(size for key, size in found.state.items() if key in FIRST)
    sizes = {
        "parameters": found.parameters,
        "master weights": found.master,
        "momentum": first,
        "second moments": found.state_bytes - first,
        "all-reduce buffer": found.workspace,
        "gradients": found.gradients,
    }
    return sizes | {"buckets in a pass, or what the step adds": found.peak - sum(sizes.values())}


def plot(model: str, found: Sequence[Estimate], memory: int | None, path: Path) -> None:
    """Stacked bars of the peaks, one for each optimizer and stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{each.optimizer}" + (f", ZeRO-{each.setting.zero}" if each.setting.zero else "") for each in found]
    figure, axes = plt.subplots(figsize=(11, 1.8 + 0.34 * len(found)), layout="constrained")
    begin = [0.0] * len(found)
    colours = dict(zip(parts(found[0]), ("C0", "C9", "C3", "C1", "C2", "C7", "lightgray"), strict=True))
    for name, colour in colours.items():
        sizes = [parts(each)[name] / 1e9 for each in found]
        axes.barh(labels, sizes, left=begin, label=name, color=colour)
        begin = [a + b for a, b in zip(begin, sizes, strict=True)]
    for place, each in enumerate(found):
        axes.text(begin[place], place, f" {sized(each.peak)}", va="center", fontsize=8)
    if memory:
        axes.axvline(memory / 1e9, color="black", linestyle="--", linewidth=0.8)
        axes.text(memory / 1e9, -0.9, f" {sized(memory)}", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    dtype = str(found[0].setting.dtype).removeprefix("torch.")
    ranks = found[0].setting.ranks
    axes.set(xlabel=f"GB of a rank at its peak, {ranks} rank{'s'[: ranks > 1]}, {dtype}; without activations")
    axes.set_title(f"{model}; computed", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
