"""What waves are worth: the time of the optimizer's step on ranks whose links are slow, by the number of waves.

    python -m tests.multinode.overlap --ranks 4 --delay 0 5 20 --waves 1 2 4 8 --json docs/overlap.json

Each rank is on a host of its own (network namespaces: Linux and root), and every frame takes `delay` milliseconds.
DeepSpeed ZeRO-3 over gloo. The numbers of waves take turns, so that a machine that does other things disturbs all
alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.distributed.harness import ROOT, free_port
from tests.multinode.cluster import Cluster, missing

WORKER = Path(__file__).with_name("overlap_worker.py")


def measured(cluster: Cluster, case: dict[str, Any], limit: float) -> dict[str, Any]:
    """What the first rank reports.

    Raises:
        RuntimeError: a rank failed, or took longer than `limit` seconds; says its output.
    """
    ranks = len(cluster.hosts)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder, "arguments.json").write_text(json.dumps(case))
        common = {
            "AMOS_TEST_FOLDER": folder,
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": cluster.hosts[0].address,
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        processes = [
            stack.enter_context(cluster.started(rank, sys.executable, WORKER, **common, RANK=str(rank)))
            for rank in range(ranks)
        ]
        for rank, process in enumerate(processes):
            try:
                output, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"rank {rank} has not ended after {limit} s. Take a smaller --delay.") from None
            if process.returncode:
                raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}")
        return json.loads(Path(folder, "result0.json").read_text())


def main() -> int | str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--delay", type=float, nargs="+", default=[0.0, 5.0, 20.0], help="milliseconds")
    parser.add_argument("--waves", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=16, help="matrices of the model")
    parser.add_argument("--rows", type=int, default=16, help="of each")
    parser.add_argument(
        "--columns", type=int, default=65_536, help="of each: by default 2**20 in all, about as Llama-3 8B has"
    )
    parser.add_argument("--repeat", type=int, default=9, help="turns, of three steps with each number of waves")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    given = parser.parse_args()
    if why := missing():
        return f"error: {why}"
    found = []
    with Cluster(hosts=given.ranks) as cluster:
        for delay in tqdm(given.delay, desc="delays"):
            cluster.delay(delay * 1e-3)
            model = {name: getattr(given, name) for name in ("layers", "rows", "columns")}
            case = {"waves": given.waves, "repeat": given.repeat, **model}
            times = measured(cluster, case, limit=900)
            found.append({"delay_ms": delay, "ranks": given.ranks, **model, **times})
    print("| delay, ms | " + " | ".join(f"{n} waves" for n in given.waves) + " |")
    print("|--:" * (1 + len(given.waves)) + "|")
    for one in found:
        print(
            f"| {one['delay_ms']:g} | " + " | ".join(f"{1e3 * one['seconds'][str(n)]:.1f}" for n in given.waves) + " |"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
