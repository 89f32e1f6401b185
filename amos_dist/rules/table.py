"""python -m amos_dist rules MODEL: what each parameter gets, and why, as a table.

What it says comes from the functions that decide for the optimizer: `groups.choose`, `groups.measure` and
`originals.describe`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .. import settings
from ..originals import describe
from ..sharding.zero import original_shape
from ..state import whole_shapes
from .building import PRESETS, build
from .groups import AT_START, Choice, Scale, choose, measure


@dataclass(frozen=True)
class Row:
    """A parameter, or several that have the same.

    Attributes:
        sigma: None: measured when the optimizer is built.
        state: numbers in its row_moment, column_moment, moment and decay; momentum and master weights come on top.
        count: how many parameters; state is of one of them.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    moments: str
    sigma: float | None
    state: int
    reason: str
    count: int = 1


def table(model: nn.Module, sigma: str | float = "paper", **keywords: Any) -> list[Row]:
    """What `Amos(param_groups(model, sigma, **keywords), lr)` makes of each parameter.

    Raises:
        TypeError, ValueError: see `param_groups`.
    """
    choices = choose(model, sigma, **keywords)
    measurable = {n: c for n, c in choices.items() if c.values["sigma"] == "auto" and _is_measurable(c)}
    row_dims = [{**settings.DEFAULTS, **keywords, **c.values}["row_dims"] for c in measurable.values()]
    found = measure([c.param for c in measurable.values()], row_dims, list(measurable))
    measured = dict(zip(measurable, found, strict=True))
    return [_row(name, choice, measured.get(name), keywords) for name, choice in choices.items()]


def _is_measurable(choice: Choice) -> bool:
    return not choice.param.is_meta or choice.param.dim() < 2


def _row(name: str, choice: Choice, measured: Scale | None, keywords: dict[str, Any]) -> Row:
    group = {"lr": 1.0, **settings.DEFAULTS, **keywords, **choice.values}
    described = describe(choice.param, name, group, {}, None)
    shape = original_shape(choice.param)
    sigma, reason = group["sigma"], choice.reason
    if sigma == "auto":
        sigma, why = measured or (None, AT_START)
        reason = "; ".join(filter(None, (reason, why)))
    state = whole_shapes(described.kind, shape, described.row_dims).values()
    return Row(
        name,
        shape,
        math.prod(shape[: described.row_dims]),
        math.prod(shape[described.row_dims :]),
        described.kind,
        sigma,
        sum(map(math.prod, state)),
        "; ".join((reason, *choice.notes)),
    )


def frozen(model: nn.Module) -> list[str]:
    """The names of the parameters that are not trained: no group has them."""
    return [name for name, param in model.named_parameters() if not param.requires_grad]


def folded(rows: list[Row]) -> list[Row]:
    """Rows that are the same but for a number in their names, as one: `h.0-11.attn.c_attn.weight`."""
    split = [(re.split(r"(?<![^.])(\d+)(?![^.])", row.name), row) for row in rows]  # numbers between dots: odd places
    for place in range(1, max((len(parts) for parts, _ in split), default=0), 2):
        same: dict[Any, tuple[list[str], list[tuple[list[str], Row]]]] = {}
        for i, (parts, row) in enumerate(split):
            key: Any = (*parts[:place], None, *parts[place + 1 :], replace(row, name="")) if len(parts) > place else i
            same.setdefault(key, (parts, []))[1].append((parts, row))
        split = []
        for parts, together in same.values():
            row = replace(together[0][1], count=sum(each.count for _, each in together))
            if len(together) > 1:
                numbers = _ranges([int(each[place]) for each, _ in together])
                parts = [*parts[:place], numbers, *parts[place + 1 :]]
            split.append((parts, row))
    return [replace(row, name="".join(parts)) for parts, row in split]


def _ranges(numbers: list[int]) -> str:
    """0-3,5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ",".join(texts if len(texts) <= 4 else [*texts[:2], "…", texts[-1]])


def shown(rows: list[Row], left_out: list[str]) -> str:
    """For people: one line for each row of `folded`, and the totals."""
    lines = [("parameter", "shape", "R × C", "moments", "σ", "state", "why")]
    for row in folded(rows):
        name = f"{row.name} ({row.count})" if row.count > 1 else row.name
        shape = "×".join(map(str, row.shape)) or "0-d"
        sigma = "measured" if row.sigma is None else f"{row.sigma:.4g}"
        view = f"{row.rows} × {row.columns}"
        lines.append((name, shape, view, row.moments, sigma, str(row.state), row.reason))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    numbers, state = sum(math.prod(row.shape) for row in rows), sum(row.state for row in rows)
    share = f", {state / numbers:.2%} of them" if numbers else ""
    text.append(f"\nparameters: {len(rows)}, with {numbers:,} numbers; state without momentum: {state:,}{share}")
    if left_out:
        text.append(f"frozen and left out: {len(left_out)}")
    return "\n".join(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_of_model = f"{', '.join(PRESETS)}; a config.json of Hugging Face; or module:factory, which makes an nn.Module"
    parser.add_argument("model", metavar="MODEL", help=help_of_model)
    parser.add_argument("--sigma", choices=("paper", "auto"), default="paper", help="(%(default)s)")
    parser.add_argument("--moments", default=settings.DEFAULTS["moments"], help="as the keyword of Amos (%(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs: every parameter by itself")


def command(arguments: argparse.Namespace) -> str:
    """What is to be printed.

    Raises:
        ValueError: two sentences, what is wrong with MODEL, and what to do.
    """
    settings.check({"moments": arguments.moments})
    model = build(arguments.model, with_values=arguments.sigma == "auto")
    rows, left_out = table(model, arguments.sigma, moments=arguments.moments), frozen(model)
    if not arguments.json:
        return shown(rows, left_out)
    parameters = [{key: value for key, value in asdict(row).items() if key != "count"} for row in rows]
    return json.dumps(
        {"model": arguments.model, "sigma": arguments.sigma, "parameters": parameters, "frozen": left_out}
    )
