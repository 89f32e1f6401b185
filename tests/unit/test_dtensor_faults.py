"""A DTensor whose layout torch describes wrongly: seen as one rank of eight, without the others."""

from __future__ import annotations

import subprocess
import sys

AS_THE_LAST_RANK = """
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from amos_dist.sharding import Original, dtensor

dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
for rows in (9, 16, 50257):
    model = nn.Sequential(nn.Linear(3, rows, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    param = model[0].weight
    print(dtensor.find(param, Original(0, "head.weight", 0, 0, param, (rows, 3), 1, True)).fault or "-")
"""


def test_torch_contradicts_itself() -> None:
    """torch 2.13 on a 4 x 2 mesh. A fault of one rank is told to all before anything changes."""
    command = [sys.executable, "-W", "ignore", "-c", AS_THE_LAST_RANK]
    nine, sixteen, odd = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.split(
        "\n"
    )[:3]
    assert sixteen == "-"
    for fault, rows in ((nine, 9), (odd, 50257)):
        assert f"part of parameter 'head.weight', of shape ({rows}, 3)" in fault
        assert fault.endswith("Make the dimension that is cut a multiple of 8.")
