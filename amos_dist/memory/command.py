"""python -m amos_dist memory MODEL: what training it holds on a rank, with Amos and with others."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import settings
from ..models import PRESETS, Parameter, parameters_of
from ..reference import MOMENTS
from ..scaling import DTYPES, MOST_RANKS
from . import report, trial
from .estimates import OPTIMIZERS, Setting, estimate
from .fits import largest

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
UNITS = {
    unit + ending: size**power for ending, size in (("B", 1000), ("iB", 1024)) for power, unit in enumerate("KMGT", 1)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(PRESETS)}, a Hugging Face config.json, or module:factory")
    add("--zero", default="0", metavar="STAGE,...", help="0: plain torch or DDP; DeepSpeed's 1, 2, 3 (%(default)s)")
    add("--ranks", type=int, default=1, metavar="N", help="of the data-parallel group (%(default)s)")
    add("--rank", type=int, metavar="R", help="which one (that with the most state)")
    add("--dtype", default="bf16", help="of parameters and gradients: bf16, fp16, fp32 (%(default)s)")
    add("--no-master", action="store_true", help="stage 0: no float32 copy of bf16 and fp16 parameters")
    add("--optimizer", default=",".join(OPTIMIZERS), metavar="NAME,...", help="(%(default)s)")
    add("--moments", default="factored", help=f"Amos's: {', '.join(MOMENTS)} (%(default)s)")
    add("--device-memory", metavar="SIZE", help="such as 80GB: what fits, and the largest model that does")
    default = Setting()
    add(
        "--reduce-bucket-size",
        type=int,
        default=default.reduce_bucket_size,
        metavar="N",
        help="DeepSpeed's (%(default)s)",
    )
    add("--sub-group-size", type=int, default=default.sub_group_size, metavar="N", help="DeepSpeed's (%(default)s)")
    add("--measure", action="store_true", help="take real steps on this machine, and print computed beside measured")
    add(
        "--snapshot",
        type=Path,
        metavar="FILE",
        help="with --measure on GPUs: torch's memory snapshot of the last steps",
    )
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plot", type=Path, metavar="FILE", help="draw stacked bars there (needs matplotlib)")


def bytes_of(text: str) -> int:
    """Of a size such as 80GB (decimal) or 80GiB.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text)
    if not found or not float(found[1]):
        raise ValueError(f"--device-memory {text}: that is no size. Write it like 80GB or 24GiB.")
    return int(float(found[1]) * UNITS[found[2]])


def _listed(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {text}: {name!r} is not known. Give {', '.join(known)}.")
    return names


def _setting(arguments: argparse.Namespace) -> Setting:
    dtype = SHORT.get(arguments.dtype, arguments.dtype)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {arguments.dtype}: no such dtype. Give {', '.join(SHORT)}.")
    if not 1 <= arguments.ranks <= MOST_RANKS:
        raise ValueError(f"--ranks {arguments.ranks}: that is no number of ranks. Give 1 to {MOST_RANKS}.")
    if arguments.rank is not None and not 0 <= arguments.rank < arguments.ranks:
        raise ValueError(
            f"--rank {arguments.rank}: not among {arguments.ranks} ranks. Give 0 to {arguments.ranks - 1}."
        )
    for option, count in (
        ("--reduce-bucket-size", arguments.reduce_bucket_size),
        ("--sub-group-size", arguments.sub_group_size),
    ):
        if count < 1:
            raise ValueError(f"{option} {count}: it must be above 0. Give a count of elements.")
    settings.check({"moments": arguments.moments})
    return Setting(
        ranks=arguments.ranks,
        dtype=DTYPES[dtype],
        master=not arguments.no_master,
        moments=arguments.moments,
        reduce_bucket_size=arguments.reduce_bucket_size,
        sub_group_size=arguments.sub_group_size,
    )


def command(arguments: argparse.Namespace) -> str:
    """What is asked for, in words; files are written.

    Raises:
        ValueError: an argument is out of range, there is no such model, or a measurement failed.
    """
    setting = _setting(arguments)
    stages = [int(stage) for stage in _listed("--zero", arguments.zero, ("0", "1", "2", "3"))]
    optimizers = _listed("--optimizer", arguments.optimizer, OPTIMIZERS)
    if arguments.snapshot and not (arguments.measure and trial.device_for(setting.ranks).type == "cuda"):
        raise ValueError(
            "--snapshot needs --measure and a GPU for each rank: only CUDA's allocator has one. Leave it away."
        )
    memory = bytes_of(arguments.device_memory) if arguments.device_memory else None
    parameters = parameters_of(arguments.model)
    texts, everything, all_grown, all_measured = [report.title(arguments.model, parameters)], [], [], []
    for zero in stages:
        here = replace(setting, zero=zero)
        found = [estimate(parameters, name, here, rank=arguments.rank) for name in optimizers]
        grown = [largest(parameters, name, here, memory) if memory else None for name in optimizers]
        texts += [f"{report.where(found[0])}:", report.table(found, memory, grown), report.states(found)]
        texts.append(report.notes(found, memory))
        measured = _measured(parameters, here, optimizers, arguments.snapshot) if arguments.measure else {}
        texts += [text for name, ranks in measured.items() for text in _beside(parameters, name, here, ranks)]
        texts += [
            f"{name}: not measured: {why}."
            for name in optimizers
            if arguments.measure and (why := trial.refusal(name, zero))
        ]
        everything += found
        all_grown += grown
        all_measured += [measured.get(each.optimizer, []) for each in found]
    if arguments.json:
        report.write_json(arguments.model, everything, all_grown, all_measured, arguments.json)
    if arguments.plot:
        report.plot(arguments.model, everything, memory, arguments.plot)
    return "\n\n".join(texts)


def _measured(
    parameters: list[Parameter], setting: Setting, optimizers: list[str], snapshot: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """For each optimizer that can be measured what each rank held."""
    here = [estimate(parameters, name, setting) for name in optimizers if not trial.refusal(name, setting.zero)]
    if not here:
        return {}
    ranks = trial.measure(parameters, here, snapshot)
    return {each.optimizer: [rank[i] for rank in ranks] for i, each in enumerate(here)}


def _beside(parameters: list[Parameter], name: str, setting: Setting, ranks: list[dict[str, Any]]) -> Iterator[str]:
    """Computed beside measured, of each rank; the workspace of the device that was measured on."""
    here = replace(setting, device=trial.device_for(setting.ranks).type)
    for rank, held in enumerate(ranks):
        yield report.beside(estimate(parameters, name, here, rank=rank), held)
