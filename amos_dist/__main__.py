"""python -m amos_dist info: what was built here or on other hosts, and what is missing. bench: what a step costs.

convert: a checkpoint of one framework as another's. verify: whether a sealed one is whole. rules: sigma by parameter.
plan: what a step holds and sends on thousands of ranks. memory: what training holds on one, beside other optimizers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path

import torch

from . import bench as measuring
from . import bench_cases as cases
from . import bench_report as report
from . import convert, hosts, manifest, memory, scaling, versions
from .ops import build_info
from .rules import table as rules_table


def info(as_json: bool) -> None:
    facts = build_info()
    if as_json:
        print(json.dumps(versions.facts(), indent=1))
        return
    archs = ", ".join(facts["cuda_archs"]) or f"none: {facts['cuda_reason']}"
    print(f"amos_dist {facts['version']}, Python {platform.python_version()}, torch {facts['torch']}")
    if not facts["extension"]:
        print(f"extension     missing: {facts['reason']}; the slower pure-torch step is used")
        print("              install it with: pip install --no-build-isolation .")
        return
    print(f"extension     built against torch {facts['torch_built']}")
    print(f"CPU kernels   {facts['cpu_instruction_set']} (built: {', '.join(facts['cpu_instruction_sets'])})")
    print(f"CUDA kernels  {archs}")


def device_named(name: str | None) -> torch.device:
    """The device that is asked for, or the GPU where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"--device {name}: there is nothing to measure with there. Use cpu, cuda or cuda:1.")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no GPU here. Use --device cpu.")
    return device


def refuse_files(arguments: argparse.Namespace) -> None:
    """Before anything long is done. Raises:
    ValueError: what --json and --plot ask for cannot be written.
    """
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed. pip install matplotlib, or leave it away.")
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None:
            refuse_unwritable(option, path)


def refuse_unwritable(option: str, path: Path) -> None:
    """Raises:
    ValueError: no file can be written there, or no plot of that kind.
    """
    if option == "--plot" and path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: what kind of picture is that? Give a .png, .svg or .pdf.")
    parent = next((folder for folder in path.parents if folder.exists()), Path())
    if path.is_dir() or not parent.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise ValueError(f"{option} {path}: no file can be written there. Give another path.")


def bench(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes what was asked for; 1 if an Amos variant could not run."""
    if arguments.repeat < 1:
        raise ValueError(f"--repeat {arguments.repeat}: at least one step must be measured. Give 1 or more.")
    if not 1 <= arguments.threads <= 1024:
        raise ValueError(f"--threads {arguments.threads}: that is no number of threads. Give 1 to 1024.")
    refuse_files(arguments)
    torch.set_num_threads(arguments.threads)
    device = device_named(arguments.device)
    peers = cases.peers_named(arguments.against)
    shapes = cases.shapes_of(arguments.shapes, device.type)
    result = measuring.run(arguments.shapes, shapes, peers, device, arguments.repeat)
    machine = report.facts(device)
    print(f"{report.title(result, machine)}\n\n{report.table(result)}\n\n{report.notes(result)}")
    if arguments.json:
        report.write_json(result, machine, arguments.json)
    if arguments.plot:
        report.plot(result, machine, arguments.plot)
    return int(any(variant.name in result.left_out for variant in cases.AMOS))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m amos_dist", description="The Amos optimizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("info", help="what was built, and if something is missing, why")
    shown.add_argument("--json", action="store_true", help="for programs")
    hosts.add_arguments(shown)
    timed = commands.add_parser("bench", help="CPU or GPU time of one step, beside other optimizers")
    add = timed.add_argument
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--shapes", default="gpt2", help=f"{', '.join(cases.SETS)}, or a file with one shape a line (%(default)s)")
    add("--against", default="adamw", metavar="NAME,...", help=f"of {', '.join(cases.PEERS)} (%(default)s)")
    add("--repeat", type=int, default=5, help="measurements of each, of which the median counts (%(default)s)")
    add("--threads", type=int, default=1, help="of the CPU kernels (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--plot", type=Path, metavar="FILE", help="draw the ratios there (needs matplotlib)")
    convert.add_arguments(commands.add_parser("convert", help="a ZeRO checkpoint as a DCP or a plain one, and back"))
    verified = commands.add_parser("verify", help="whether every file of a sealed checkpoint is what was saved")
    verified.add_argument(
        "folder", type=Path, metavar="FOLDER", help="with manifest.json, or with DeepSpeed's `latest`"
    )
    rules_table.add_arguments(commands.add_parser("rules", help="sigma and moments of a model's parameters, and why"))
    scaling.add_arguments(commands.add_parser("plan", help="what a step holds and sends on thousands of ranks"))
    memory.add_arguments(commands.add_parser("memory", help="what training holds on a rank, beside other optimizers"))
    arguments = parser.parse_args()
    if arguments.command == "info" and not arguments.hostfile:
        info(arguments.json)
        return 0
    try:
        if arguments.command == "info":
            return hosts.command(arguments)
        if arguments.command == "convert":
            for warning in convert.command(arguments):
                print(f"warning: {warning}", file=sys.stderr)
            return 0
        if arguments.command == "verify":
            print(manifest.verify(arguments.folder))
            return 0
        if arguments.command == "rules":
            print(rules_table.command(arguments))
            return 0
        if arguments.command == "plan":
            refuse_files(arguments)
            print(scaling.command(arguments))
            return 0
        if arguments.command == "memory":
            refuse_files(arguments)
            print(memory.command(arguments))
            return 0
        return bench(arguments)
    except ValueError as error:  # of the arguments: two sentences say what to change
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
