"""The last rank is stopped, so that its connections stay open; the first waits for it, or does something else."""

import os
import signal
import time

import torch
import torch.distributed as dist

from amos_dist import heartbeat, roll_call
from tests.distributed.harness import received

dist.init_process_group("gloo")
rank, last = dist.get_rank(), dist.get_world_size() - 1
try:
    # Ranks count every 2 seconds: where nobody stops, a busy machine must not look like silence.
    with roll_call.guard(), heartbeat.watch(patience=3.0 if received()["stops"] else 6.0):
        dist.barrier()
        if rank == last and received()["stops"]:
            print("stopped", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        if received()["leaves"]:
            time.sleep(10 * rank)  # the first rank, and with it the store, is gone by then
        elif received()["waits"] or rank:
            dist.all_reduce(torch.ones(1))
        else:
            time.sleep(600 if received()["stops"] else 8)
            dist.all_reduce(torch.ones(1))
except roll_call.CollectiveError as error:
    raise SystemExit(f"rank {rank}: {error}") from None
dist.destroy_process_group()
