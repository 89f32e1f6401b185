"""launch/pretrain.py in which a rank meets a fault, as the environment's AMOS_FAULT says, in JSON:

{"fault": "kill" | "full", "rank": which, "step": the optimizer's step at which it dies | "file": in whose writing}.
"""

import json
import os
import runpy
import sys
from typing import Any

os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.distributed.faults_worker import break_saving, die
from tests.distributed.harness import ROOT

steps = 0
case = json.loads(os.environ["AMOS_FAULT"])


def count(*_: Any) -> None:
    global steps
    steps += 1
    if steps == case["step"]:
        die()


if case["rank"] == int(os.environ["RANK"]):
    if "step" in case:
        register_optimizer_step_pre_hook(count)
    else:
        break_saving(case["fault"], case["file"])
sys.argv[0] = str(ROOT / "launch" / "pretrain.py")
sys.path[0] = str(ROOT / "launch")
runpy.run_path(sys.argv[0], run_name="__main__")
