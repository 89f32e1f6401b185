"""`python -m amos_dist bench` on one set of shapes, against every optimizer that is installed."""

from __future__ import annotations

import torch

from amos_dist import bench, bench_cases, bench_report

from . import common

AGAINST = "adamw,adamw-foreach,adafactor,muon,apex,deepspeed"


def measure(source: str, device: torch.device, quick: bool) -> common.Section:
    section = common.Section(f"Time of a step: {source}")
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait would count as work
    shapes = bench_cases.shapes_of(source, device.type)
    # On a CPU Muon takes minutes, and DeepSpeed's is compiled first: this only shows that the section works.
    peers = bench_cases.peers_named(AGAINST if device.type == "cuda" else "adamw")
    result = bench.run(source, shapes, peers, device, repeat=3 if quick else 25)
    machine = bench_report.facts(device)
    section.data = bench_report.as_json(result, machine)
    copied = f"{result.yardstick.name}: {result.yardstick.bandwidth / 1e9:.0f} GB/s"
    table, notes = bench_report.table(result), bench_report.notes(result).replace("\n", "  \n")
    section.lines = [f"{bench_report.title(result, machine)}; {copied}", "", table, "", notes]
    ours = {variant.name for variant in bench_cases.AMOS}
    section.failures = [f"{name}: {why}" for name, why in result.left_out.items() if name in ours]
    return section
