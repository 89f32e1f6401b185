"""Runs a training script in which "type": "Amos" is known, without an import in the script:

deepspeed --module amos_dist.run train.py --deepspeed_config ds.json …
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch.distributed as dist

import amos_dist  # noqa: F401  registers "Amos"


def main() -> None:
    # The launcher may put --local_rank before the script.
    ours = 1
    while ours < len(sys.argv) and sys.argv[ours].startswith("--local_rank"):
        ours += 1 if "=" in sys.argv[ours] else 2
    if ours >= len(sys.argv):
        sys.exit("amos_dist.run: no script given. Use: deepspeed --module amos_dist.run train.py …")
    script = sys.argv.pop(ours)
    if not Path(script).is_file():
        sys.exit(f"amos_dist.run: there is no script {script}. Give the path of your training script.")
    sys.argv[0] = script
    sys.path[0] = str(Path(script).resolve().parent)  # as python does
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    # A thread of gloo's that is still at work while Python shuts down would abort a run that has ended well.
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
