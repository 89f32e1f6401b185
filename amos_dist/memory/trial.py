"""Real steps on real ranks, and what they held: `--measure`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..bench import free_bytes
from ..models import Parameter
from .estimates import AMOS, Estimate
from .keepers import KEEPERS

LIMIT = 1800  # seconds


def refusal(optimizer: str, zero: int) -> str:
    """Why an optimizer is not measured; nothing: it is."""
    if optimizer in AMOS:
        return ""
    if KEEPERS[optimizer].make is None:
        return "torch has none"
    return "torch's takes matrices, not flat partitions" if zero and KEEPERS[optimizer].matrices else ""


def device_for(ranks: int) -> torch.device:
    """GPUs, if there is one for each rank."""
    return torch.device("cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "cpu")


def measure(
    parameters: Sequence[Parameter], found: Sequence[Estimate], snapshot: Path | None = None
) -> list[list[dict[str, Any]]]:
    """Trains with each optimizer of `found`, which have one setting: for each rank, for each of them, what was held.

    Args:
        snapshot: where the first rank writes what CUDA's allocator recorded; for torch's memory viewer.

    Raises:
        ValueError: it does not fit into this machine's memory, or a rank failed.
    """
    setting = found[0].setting
    device = device_for(setting.ranks)
    on_gpu = device.type == "cuda"
    needed, free = max(each.peak for each in found) * (1 if on_gpu else setting.ranks), free_bytes(device)
    if free is not None and needed > 0.9 * free:
        raise ValueError(
            f"--measure needs {needed / 1e9:.1f} GB on {device}, which has {free / 1e9:.1f} GB free. "
            "Give a smaller model, fewer ranks, or a smaller --reduce-bucket-size."
        )
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "parameters": parameters,
            "optimizers": [each.optimizer for each in found],
            "setting": asdict(setting) | {"dtype": str(setting.dtype).removeprefix("torch.")},
            "device": device.type,
            "folder": folder,
            "snapshot": str(snapshot.absolute()) if snapshot else "",
        }
        Path(folder, "job.json").write_text(json.dumps(job))
        words = [sys.executable, "-m"]
        if setting.ranks > 1 or setting.zero:
            words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={setting.ranks}", "-m"]
        threads = {"OMP_NUM_THREADS": "1"} | ({} if on_gpu else {"DS_ACCELERATOR": "cpu"})
        # What is freed goes back at once, so that resident memory is what is held.
        returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(
            [*words, f"{__package__}.rank", str(Path(folder, "job.json"))],
            env={**os.environ, **threads, **returned},
            timeout=LIMIT,
        )
        reports = [Path(folder, f"rank{rank}.json") for rank in range(setting.ranks)]
        if done.returncode or not all(map(Path.exists, reports)):
            logs = [path.read_text()[-1500:] for path in sorted(Path(folder).glob("log*"))]
            raise ValueError(
                f"--measure ended with {done.returncode} on ZeRO-{setting.zero}, {setting.ranks} ranks. "
                "What the ranks said last:\n" + "\n".join(logs)
            )
        return [json.loads(path.read_text()) for path in reports]
