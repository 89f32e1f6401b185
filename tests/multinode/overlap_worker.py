"""A rank of overlap.py: times Amos's step under ZeRO-3, of made-up gradients, with as many waves as it is told."""

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


class Wide(nn.Module):
    """Matrices of many columns, as a large model has in all, and of few rows, so that they fit here."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(case["columns"], case["rows"], bias=False) for _ in range(case["layers"]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(inputs).square().mean() for layer in self.layers]).mean()


model = Wide()
config = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "Amos", "params": {"lr": 0.01, "sigma": 0.1}},
    "zero_optimization": {"stage": 3},
}
engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
zero, base = engine.optimizer, engine.optimizer.optimizer
gradient = torch.randn_like(zero.fp32_partitioned_groups_flat[0])


def timed() -> float:
    """Of one step, in seconds. Not through engine.step, which gathers all weights behind it over the slow links."""
    zero.fp32_partitioned_groups_flat[0].grad = gradient
    dist.barrier()
    begin = time.perf_counter()
    zero._optimizer_step(0)
    dist.barrier()
    return time.perf_counter() - begin


travel.LEAST_NUMBERS, travel.LEAST_FOR_A_RANK = 1, 0
found: dict[int, list[float]] = {most: [] for most in case["waves"]}
for turn in range(case["repeat"] + 1):
    for most in case["waves"]:
        travel.MOST_WAVES = most
        base._plans.clear()
        timed()  # makes its plan anew
        times = [timed() for _ in range(3)]
        if turn:
            found[most] += times
plans = [plan for plans in base._plans.values() for plan in plans.values()]
sent = {
    kind: 4 * count for plan in plans for bucket in plan.buckets for wave in bucket.waves for kind, count in wave.moves
}
report({"seconds": {most: statistics.median(some) for most, some in found.items()}, "last_wave_sends": sent})
dist.destroy_process_group()
