"""Checks and times amos_dist on this machine's GPU and writes Markdown and JSON; called by report.sh, which builds.

Every section runs in a process of its own: one that fails, hangs or breaks the GPU's context does not lose the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from amos_dist.bench_report import facts

from . import against_reference, features, sanitizer, timings
from .common import Section, error_text

Run = Callable[[torch.device, bool], Section]

TIMES = {f"time-{source}": functools.partial(timings.measure, source) for source in ("gpt2", "llama", "tiny")}
CHECKS: dict[str, Run] = {
    "reference": against_reference.check,
    "capturable": features.capturable,
    "rounding": features.rounding,
    "master": features.master,
    "sanitizer": sanitizer.check,
}
SECTIONS: dict[str, Run] = {**TIMES, **CHECKS}  # in the order of the report; times first, on a machine not yet heated
LIMITS = {"reference": 150, "sanitizer": 210}  # seconds
LIMIT = 90
TOTAL = 400  # with the build below 8 minutes


def run_here(name: str, device: torch.device, quick: bool) -> Section:
    """The section in this process; an exception is its failure."""
    before = time.perf_counter()
    try:
        section = SECTIONS[name](device, quick)
    except Exception as error:
        traceback.print_exc()
        section = Section(name, [f"Failed: {error_text(error)}"], [error_text(error)])
    section.seconds = time.perf_counter() - before
    return section


def run_apart(name: str, device: str, quick: bool, limit: float) -> Section:
    """The section in a process of its own."""
    if limit < 5:
        return Section(name, ["No time was left."], [f"no time was left of {TOTAL} s"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "section.json"
        command = [sys.executable, "-m", __spec__.name, "--section", name, "--device", device, "--json", str(file)]
        try:
            code = subprocess.run([*command, *["--quick"] * quick], timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return Section(name, [f"Stopped after {limit:.0f} s."], [f"not done after {limit:.0f} s"])
        if not file.exists():
            return Section(name, [f"The process ended with {code}."], [f"the process ended with {code}"])
        return Section(**json.loads(file.read_text()))


def markdown(machine: dict[str, Any], sections: list[Section]) -> str:
    failures = sum(len(section.failures) for section in sections)
    where = machine["gpu"] or machine["cpu"]
    archs = ", ".join(machine["build"]["cuda_archs"]) or f"no GPU: {machine['build']['cuda_reason']}"
    lines = [
        "# On a GPU" if machine["gpu"] else "# The GPU report's checks, on a CPU",
        "",
        f"Written by `tests/gpu/report.sh` on {machine['date']}: one {where}, torch {machine['torch']}, "
        f"CUDA {machine['cuda']}, kernels built for {archs}. {failures or 'No'} failures.",
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [f"Skipped: {section.skipped}.", ""] if section.skipped else [*section.lines, ""]
        lines += [f"* **FAILED**: {failure}" for failure in section.failures]
        lines += [""] * bool(section.failures)
    return "\n".join(lines).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report.sh", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the checks that need no GPU")
    add("--only", default="", metavar="NAME,...", help=f"of {', '.join(SECTIONS)}")
    add("--quick", action="store_true", help="smaller shapes, fewer measurements")
    add("--report", type=Path, help="Markdown to write (out/gpu/report.md)")
    add("--json", type=Path, help="numbers to write (out/gpu/report.json)")
    add("--root", type=Path, default=Path(), help=argparse.SUPPRESS)  # that of the sources, where out/ is made
    add("--section", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in filter(None, given.only.split(",")):
        if name not in SECTIONS:
            parser.error(f"--only {name}: there is no such section. Known are {', '.join(SECTIONS)}.")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here. Use --device cpu for the checks that need none.")
    return given


def main() -> int:
    given = arguments()
    device = torch.device(given.device)
    if given.section:
        write(given.json, json.dumps(asdict(run_here(given.section, device, given.quick))))
        return 0
    begun = time.perf_counter()
    names = given.only.split(",") if given.only else list(SECTIONS if device.type == "cuda" else CHECKS)
    report = given.report or given.root / "out" / "gpu" / "report.md"
    numbers = given.json or given.root / "out" / "gpu" / "report.json"
    machine = facts(device)
    done: dict[str, Section] = {}
    for name in names:
        print(f"---- {name}", flush=True)
        left = TOTAL - (time.perf_counter() - begun)
        section = done[name] = run_apart(name, given.device, given.quick, min(left, LIMITS.get(name, LIMIT)))
        print("\n".join(section.lines) or f"skipped: {section.skipped}", flush=True)
        # After each: what is there is kept, whatever happens to the rest.
        write(report, markdown(machine, list(done.values())))
        found = {name: asdict(section) for name, section in done.items()}
        write(numbers, json.dumps({"machine": machine, "sections": found}, indent=1) + "\n")
    failures = [f"{name}: {failure}" for name, section in done.items() for failure in section.failures]
    print(f"\n{len(done)} sections, {len(failures)} failures, {time.perf_counter() - begun:.0f} s.")
    print(f"Report: {report}\nNumbers: {numbers}")
    for failure in failures:
        print("FAILED:", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
