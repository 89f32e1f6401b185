"""python -m amos_dist plan: what Amos holds and sends on 8 to 4,096 ranks, and beyond; computed, on any machine."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from .. import settings
from ..models import PRESETS, parameters_of
from ..reference import MOMENTS
from . import report
from .forecast import Model, Setting, forecast, forecast_of_rank
from .links import DEFAULT, links_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_RANKS = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(PRESETS)}, a Hugging Face config.json, or module:factory")
    add("--ranks", default="8,64,512,4096", metavar="N,...", help="of the data-parallel group (%(default)s)")
    add("--zero", default="2,3", metavar="STAGE,...", help="DeepSpeed's stages, of 1, 2, 3 (%(default)s)")
    add("--moments", default="factored,row", metavar="KIND,...", help=f"of {', '.join(MOMENTS)} (%(default)s)")
    add("--momentum", type=float, default=0.0, help="above 0: with its buffer (%(default)s)")
    add("--momentum-dtype", default="float32", help="float32, bfloat16 or int8 (%(default)s)")
    add("--dtype", default="bfloat16", help=f"of parameters and gradients: {', '.join(DTYPES)} (%(default)s)")
    add("--sub-group-size", type=int, default=10**9, metavar="N", help="DeepSpeed's, of stage 3 (%(default)s)")
    add("--bandwidth", default=DEFAULT, metavar="NAME[:RANKS]=RATE[@LATENCY],...", help="of a rank (%(default)s)")
    add("--rank", type=int, help="tell also what this rank has")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plot", type=Path, metavar="FILE", help="draw state and traffic there (needs matplotlib)")


def command(arguments: argparse.Namespace) -> str:
    """What is asked for, in words; files are written.

    Raises:
        ValueError: an argument is out of range, or there is no such model.
    """
    ranks = _numbers("--ranks", arguments.ranks, MOST_RANKS)
    stages = _numbers("--zero", arguments.zero, 3)
    kinds = list(dict.fromkeys(kind.strip() for kind in arguments.moments.split(",")))
    for kind in kinds:
        settings.check({"moments": kind})
    settings.check({"momentum": arguments.momentum})
    momentum = settings.momentum_dtype(arguments.momentum_dtype) if arguments.momentum else None
    if arguments.dtype not in DTYPES:
        raise ValueError(f"--dtype {arguments.dtype}: no such dtype. Give {', '.join(DTYPES)}.")
    if arguments.sub_group_size < 0:
        raise ValueError(
            f"--sub-group-size {arguments.sub_group_size}: it cannot be negative. Give a count of elements."
        )
    if arguments.rank is not None and not 0 <= arguments.rank < min(ranks):
        raise ValueError(f"--rank {arguments.rank}: not among {min(ranks)} ranks. Give 0 to {min(ranks) - 1}.")
    links = links_of(arguments.bandwidth)
    parameters = parameters_of(arguments.model)
    models = [Model([parameters], kind) for kind in kinds]
    rest = momentum, DTYPES[arguments.dtype], arguments.sub_group_size
    found, of_one = [], []
    for zero, model, count in itertools.product(stages, models, ranks):
        setting = Setting(zero, count, *rest)
        found.append(forecast(model, setting))
        if arguments.rank is not None:
            of_one.append(forecast_of_rank(model, setting, arguments.rank))
    if arguments.json:
        report.write_json(arguments.model, found, of_one, links, arguments.json)
    if arguments.plot:
        report.plot(arguments.model, found, arguments.plot)
    details = [report.of_rank(one, each) for one, each in zip(of_one, found, strict=False)]
    return "\n\n".join([report.title(arguments.model, found), report.tables(found, links), report.NOTES, *details])


def _numbers(option: str, text: str, most: int) -> list[int]:
    """The whole numbers of a list such as "8,64"."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= most:
            raise ValueError(f"{option} {text}: {part!r} is no number from 1 to {most}. Write them like 1,2.")
    return sorted(set(map(int, parts)))
