"""Trains a stand-in model under DeepSpeed or DDP for each case, and reports what this rank held.

A case: {"name", "zero", "optimizer", "parameters": sizes of `gpt2`, "setting": more of it}.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import deepspeed
import torch

from amos_dist.memory.estimates import Setting
from amos_dist.memory.rank import train
from amos_dist.models import gpt2
from tests.distributed.harness import serve

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def hold(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    setting = Setting(case["zero"], torch.distributed.get_world_size(), dtype, device="cpu", **case["setting"])
    return train(case["optimizer"], list(gpt2(**case["sizes"])), setting, torch.device("cpu"))


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    serve({"train": hold})
