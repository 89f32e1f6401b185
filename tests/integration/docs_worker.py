"""Runs what docs/sharding.md shows on every rank, and the same steps in one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import amos_dist
from tests.distributed.harness import relative, report
from tests.integration.pages import DOCS, python_blocks

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5))
alone = copy.deepcopy(model)
single = amos_dist.Amos(alone.named_parameters(), lr=0.01)
batches = torch.randn(10, dist.get_world_size(), 4, 7)

page: dict[str, Any] = {"model": model, "batch": batches[0, dist.get_rank()], "amos_dist": amos_dist}
for block in python_blocks(DOCS / "sharding.md"):
    exec(block, page)
for step in range(1, len(batches)):
    model.zero_grad()
    model(batches[step, dist.get_rank()]).square().mean().backward()
    page["shards"].step()
for batch in batches:
    alone.zero_grad()
    alone(batch.flatten(0, 1)).square().mean().backward()
    single.step()

state, expected = amos_dist.full_state(page["optimizer"]), amos_dist.full_state(single)
if dist.get_rank() == 0:
    assert [entry.keys() for entry in state.values()] == [entry.keys() for entry in expected.values()]
pairs = [*zip(model.parameters(), alone.parameters(), strict=True)]
pairs += [(entry[key], expected[name][key]) for name, entry in state.items() for key in entry]
report({"worst": max(relative(got, wanted.detach()) for got, wanted in pairs), "compared": len(pairs)})
dist.destroy_process_group()
