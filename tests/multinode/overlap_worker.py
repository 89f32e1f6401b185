"""A rank of overlap.py: trains with ZeRO-3 and times Amos's own step, with as many waves as it is told."""

from __future__ import annotations

import logging
import statistics
import time
import warnings

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import amos_dist  # noqa: F401  (registers "Amos")
from amos_dist import travel
from tests.distributed.harness import received, report

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
torch.set_num_threads(1)
case = received()
deepspeed.init_distributed("gloo", verbose=False)
torch.manual_seed(1)
model = nn.Sequential(*[nn.Linear(512, 2048) if i % 2 == 0 else nn.Linear(2048, 512) for i in range(case["layers"])])
config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Amos", "params": {"lr": 0.01, "sigma": 0.1}},
    "zero_optimization": {"stage": 3},
}
engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
base = engine.optimizer.optimizer
step, times = base.step, []


def timed(*args: object, **more: object) -> object:
    dist.barrier()
    begin = time.perf_counter()
    result = step(*args, **more)
    dist.barrier()
    times.append(time.perf_counter() - begin)
    return result


base.step = timed
travel.LEAST_NUMBERS, travel.LEAST_FOR_A_RANK = 1, 0
found: dict[int, list[float]] = {most: [] for most in case["waves"]}
for turn in range(case["repeat"] + 1):
    for most in case["waves"]:
        travel.MOST_WAVES = most
        base._plans.clear()
        for _ in range(2):  # the first one makes its plan anew
            engine.backward(engine(torch.ones(1, 512)).square().mean())
            engine.step()
        if turn:
            found[most].append(times[-1])
plans = [plan for plans in base._plans.values() for plan in plans.values()]
sent = {
    kind: 4 * count for plan in plans for bucket in plan.buckets for wave in bucket.waves for kind, count in wave.moves
}
report({"seconds": {most: statistics.median(some) for most, some in found.items()}, "last_wave_sends": sent})
dist.destroy_process_group()
