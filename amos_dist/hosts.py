"""The hosts of a DeepSpeed hostfile, and `python -m amos_dist info --hostfile`: what each of them would train with."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import versions

PASSED_ON = ("PYTHONPATH", "LD_LIBRARY_PATH")
CONNECT = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")  # never ask for a password


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--hostfile", type=Path, metavar="FILE", help="ask each host of a DeepSpeed hostfile, and compare")
    add("--ssh", default="ssh", metavar="COMMAND", help='how, like "ssh -F FILE" (%(default)s)')
    add("--timeout", type=float, default=50, metavar="SECONDS", help="for all hosts together (%(default)s)")


def read(path: Path) -> dict[str, int]:
    """The slots of each host, in order.

    Raises:
        ValueError: it cannot be read, or a line is not like "worker-1 slots=4"; names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Give a DeepSpeed hostfile.") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        found = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d+)(\s.*)?", text)  # ssh would take -x for an option
        if not found:
            raise ValueError(f'{path}, line {number}: {text!r} is no host. Write it like "worker-1 slots=4".')
        if found[1] in slots:
            raise ValueError(f"{path}, line {number}: {found[1]} is there twice. Write each host once, with all slots.")
        slots[found[1]] = int(found[2])
    if not slots:
        raise ValueError(f'{path}: names no host. Write lines like "worker-1 slots=4".')
    return slots


def of_ranks(path: Path, ranks: int) -> list[str]:
    """The host of each rank as DeepSpeed deals them out; nothing where it was told to leave some out.

    Raises:
        ValueError: as of `read`.
    """
    hosts = [host for host, slots in read(path).items() for _ in range(slots)]
    return hosts if len(hosts) == ranks else []


def command(arguments: argparse.Namespace) -> int:
    """Prints what each host has and what differs; 1 if that keeps them from training, or one does not answer."""
    hosts = list(read(arguments.hostfile))
    ssh = shlex.split(arguments.ssh)
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(lambda host: _ask(ssh, host, arguments.timeout), hosts))
    found = {host: answer for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, versions.Row)}
    silent = {host: answer for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, str)}
    middle = statistics.median_low(row.ahead for row in found.values()) if found else 0.0  # this clock may be wrong
    found = {host: replace(row, ahead=row.ahead - middle) for host, row in found.items()}
    report = versions.Report(tuple(found.values()))
    if arguments.json:
        rows = {host: {**row.facts, "ahead": row.ahead} for host, row in found.items()}
        told = {"error": report.error, "warnings": report.warnings}
        print(json.dumps({"hosts": rows, "silent": silent, **told}, indent=1))
        return int(bool(silent or report.error))
    if found:
        print(report, end="\n\n")
    for host, reason in silent.items():
        print(f"{host} does not answer: {reason}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    if report.error:
        print(report.error)
    if not silent and not report.error:
        print(f"{report.summary}: nothing keeps them from training together")
    return int(bool(silent or report.error))


def _ask(ssh: list[str], host: str, timeout: float) -> versions.Row | str:
    """What the host has, or why that is not known. The same interpreter, folder and paths as here."""
    paths = [f"{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ]
    there = shlex.join(["env", *paths, sys.executable, "-m", "amos_dist", "info", "--json"])
    words = [*ssh, *CONNECT, host, f"cd {shlex.quote(str(Path.cwd()))} && {there}"]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it starts ends with it
        )
    except OSError as error:
        return f"{words[0]} cannot be started ({error.strerror})"
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"no answer within {timeout:g} s"
    answered = time.time()
    if process.returncode:
        said = [line for line in (output + errors).splitlines() if line.strip()]
        return said[-1].strip() if said else f"{words[0]} ended with {process.returncode}"
    try:
        # a shell may print something before
        facts: dict[str, Any] = json.JSONDecoder().raw_decode(output, output.index("{\n"))[0]
        clock = float(facts.get("clock", answered))
    except (ValueError, TypeError):
        return f"what it says is no answer of `info --json`: {output[-80:]!r}"
    # The clock was read last. How long the answer was on its way is not known, but it is less than is worth a warning.
    return versions.Row(host, (), {key: facts.get(key) for key in versions.ALL_FACTS}, clock - answered)
