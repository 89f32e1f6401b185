"""What a plan came to: tables, the numbers behind them, and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..state import SCALE
from .forecast import Forecast, RankForecast, as_json
from .links import Link, all_reduce, half_ring, to_few


def sized(size: float) -> str:
    """Bytes, in powers of a thousand."""
    unit = next((i for i in range(4, 0, -1) if size >= 1000**i), 0)
    return f"{size / 1000**unit:.3g} {' KMGT'[unit]}B".replace("  ", " ") if unit else f"{size:.0f} B"


def timed(seconds: float) -> str:
    """Seconds, in the unit that fits."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    return f"{seconds * factor:.3g} {unit}" if seconds else "0"


def title(model: str, found: Sequence[Forecast]) -> str:
    one = found[0]
    size = f"{one.parameters / 1e9:.4g} B" if one.parameters >= 1e9 else f"{one.parameters / 1e6:.4g} M"
    return f"{model}: {size} parameters in {one.tensors} tensors"


def tables(found: Sequence[Forecast], links: Sequence[Link]) -> str:
    """Markdown: what ranks hold, and what they send."""
    held: dict[str, Callable[[Forecast], str]] = {
        "rows": lambda one: sized(one.most.state["row_moment"]),
        "columns": lambda one: sized(one.most.state["column_moment"]),
        "decay": lambda one: sized(one.most.state["decay"]),
        "momentum": lambda one: sized(one.most.state["momentum"] + one.most.state.get(SCALE, 0)),
        "state": lambda one: sized(one.most.state_bytes),
        "Adam's": lambda one: sized(one.adam),
        "x Adam's": lambda one: f"{one.most.state_bytes / one.adam:.2g}",
        "workspace": lambda one: sized(one.most.workspace),
    }
    sent: dict[str, Callable[[Forecast], str]] = {
        "collectives": lambda one: str(sum(map(len, one.most.collectives))),
        "all-reduced": lambda one: sized(sum(one.most.sizes("all_reduce"))),
        "exchanged": lambda one: sized(sum(one.most.sizes("scatter", "gather"))),
        "to holders": lambda one: sized(sum(one.most.sizes("holders"))),
        "cut rows": lambda one: str(one.cut_rows),
        "sent": lambda one: sized(one.sent),
        "by everybody": lambda one: sized(one.sent_by_everybody),
        "gradients": lambda one: sized(one.sent_of_gradients),
        "sent / gradients": lambda one: f"{one.sent / one.sent_of_gradients:.2g}" if one.sent_of_gradients else "",
    }
    for link in links:
        sent |= {f"{link.name}": _time(link, seconds), f"{link.name}, gradients": _time(link, gradient_seconds)}
    return f"{_table(found, held)}\n\n{_table(found, sent)}"


def seconds_by_kind(one: Forecast, link: Link) -> dict[str, float]:
    """Of a step's collectives, one after the other."""
    ranks, sizes = one.setting.ranks, one.most.sizes
    return {
        "all_reduces": sum(all_reduce(size, ranks, link) for size in sizes("all_reduce")),
        "exchanges": sum(half_ring(size, ranks, link) for size in sizes("scatter", "gather")),
        "holders": sum(to_few(size, link) for size in sizes("holders")),
    }


def seconds(one: Forecast, link: Link) -> float:
    """Of all of them."""
    return sum(seconds_by_kind(one, link).values())


def gradient_seconds(one: Forecast, link: Link) -> float:
    """Of the reduce-scatter of the gradients, in one message."""
    return half_ring(one.gradients, one.setting.ranks, link)


def _time(link: Link, of: Callable[[Forecast, Link], float]) -> Callable[[Forecast], str]:
    return lambda one: timed(of(one, link)) if link.joins(one.setting.ranks) else ""


def _table(found: Sequence[Forecast], columns: dict[str, Callable[[Forecast], str]]) -> str:
    cells = [["ranks", "ZeRO", "moments", *columns]]
    for one in found:
        setting = one.setting
        first = [str(setting.ranks), str(setting.zero), one.moments]
        cells.append([*first, *(show(one) for show in columns.values())])
    # What nothing here has, such as momentum, has no column.
    columns_of = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"0 B"}]
    widths = [max(map(len, column)) for column in columns_of]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in zip(*columns_of, strict=True)]
    lines.insert(1, "|" + "".join("-" * (width + 1) + ":|" for width in widths))
    return "\n".join(lines)


NOTES = """\
state: of the rank that holds the most, beside the float32 partition itself, which Adam needs as well.
workspace: sums of what is cut, and buffers, which stay from step to step.
collectives: of one optimizer step. all-reduced: what is added up over all ranks. exchanged: columns of which each rank
keeps a share: what reduce-scatters add up and all-gathers bring back. to holders: what that rank sends to those that
hold a part of the same rows or parameters. cut rows: rows that lie on more than one rank.
sent: in all of these, on rings. by everybody: if all ranks added up what few of them hold.
gradients: sent by each rank in their reduce-scatter. Times: on paper, by bandwidth and latency; not measured."""


def of_rank(one: RankForecast, whole: Forecast) -> str:
    """What one rank has, in words."""
    setting = whole.setting
    keys = ", ".join(f"{key} {sized(size)}" for key, size in one.state.items() if size)
    lines = [
        f"rank {one.rank} of {setting.ranks}, ZeRO-{setting.zero}, {whole.moments}: {one.elements:,} elements, "
        f"in {one.pieces} pieces of parameters",
        f"  state      {one.state_bytes:,} bytes: {keys}",
        f"  workspace  {one.workspace:,} bytes, of what is added up over ranks",
        f"  rows       {one.shared_rows} of which other ranks have a part too",
    ]
    if one.begins and one.ends:
        lines.append(f"  from       {one.begins[0]}, element {one.begins[1]:,}")
        lines.append(f"  to         {one.ends[0]}, element {one.ends[1]:,}")
    return "\n".join(lines)


def write_json(
    model: str, found: Sequence[Forecast], of_one: Sequence[RankForecast], links: Sequence[Link], path: Path
) -> None:
    """All numbers: bytes and seconds. of_one: of the rank that was asked for, in the same order; or none."""
    rows = []
    for i, one in enumerate(found):
        times = {
            link.name: seconds_by_kind(one, link) | {"gradients": gradient_seconds(one, link)}
            for link in links
            if link.joins(one.setting.ranks)
        }
        rows.append(as_json(one) | {"seconds": times} | ({"rank": as_json(of_one[i])} if of_one else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"model": model, "links": [link._asdict() for link in links], "plans": rows}, indent=1) + "\n"
    )


def plot(model: str, found: Sequence[Forecast], path: Path) -> None:
    """State of a rank, and bytes that it sends, by the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(one.moments for one in found))
    figure, (states, traffic) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    for zero in sorted({one.setting.zero for one in found}):
        style = {1: ":", 2: "--", 3: "-"}[zero]
        for i, kind in enumerate(kinds):  # wide to narrow: equal lines are all seen
            mine = [one for one in found if (one.setting.zero, one.moments) == (zero, kind)]
            ranks = [one.setting.ranks for one in mine]
            options = {"color": f"C{i}", "linestyle": style, "marker": ".", "linewidth": 1.5 * (len(kinds) - i)}
            states.plot(ranks, [one.most.state_bytes for one in mine], label=f"Amos {kind}, ZeRO-{zero}", **options)
            traffic.plot(ranks, [one.sent for one in mine], **options)
        states.plot(ranks, [one.adam for one in mine], color="black", linestyle=style, label=f"Adam, ZeRO-{zero}")
    traffic.plot(ranks, [one.sent_of_gradients for one in mine], color="gray", label="gradients, reduce-scatter")
    for axes, what in ((states, "optimizer state, bytes of a rank"), (traffic, "sent in a step, bytes of a rank")):
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=what)
        axes.set_xticks(ranks, labels=list(map(str, ranks)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{title(model, found)}; on paper", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
