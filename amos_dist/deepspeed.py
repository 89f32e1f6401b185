"""DeepSpeed: `"optimizer": {"type": "Amos", ...}` in its JSON, for ZeRO stages 0 to 3.

DeepSpeed takes any optimizer that is an attribute of torch.optim, and asks that ZeRO know its class. Nothing of
DeepSpeed is imported: its modules are looked up where they are loaded already. Nothing is patched but one method that
it leaves on parameters: see sharding/zero.py. Seen with 0.19.8.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from . import optimizer
from .optimizer import Amos
from .originals import Surroundings
from .rules import advise


def register() -> None:
    """Makes "Amos", in any case, a name that DeepSpeed's JSON knows. Called by `import amos_dist`."""
    for letters in itertools.product(*zip("amos", "AMOS", strict=True)):
        setattr(torch.optim, "".join(letters), Amos)
    if _look_around not in optimizer.LOOK_AROUND:
        optimizer.LOOK_AROUND.append(_look_around)


def _look_around(making: Any) -> Surroundings | None:
    """Lets ZeRO accept the class; names and advice, if an engine is making the optimizer right now."""
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    if zero is None:
        return None
    if type(making) not in zero.ZERO_SUPPORTED_OPTIMIZERS:
        zero.ZERO_SUPPORTED_OPTIMIZERS.append(type(making))
    engine = _engine_at_work()
    if engine is None:
        return None
    _refuse(engine)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    return Surroundings(names, advise(engine.module))


def _engine_at_work() -> Any:
    """The DeepSpeed engine whose constructor called us: it hands an optimizer only tensors and its JSON params."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_configure_basic_optimizer":
            return frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _refuse(engine: Any) -> None:
    """Raises:
    RuntimeError: the JSON asks for something that Amos cannot do under DeepSpeed; the sentence says what to change.
    """
    config = engine._config
    zero, offload = config.zero_config, getattr(config.zero_config, "offload_optimizer", None)
    refusals = []
    if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
        why = "DeepSpeed swaps all state as if it had the parameters' shape, which row and column moments do not have"
        refusals.append(("zero_optimization.offload_optimizer.device=nvme", f'use "cpu": {why}'))
    if offload is not None and getattr(offload, "ratio", 1.0) != 1.0:
        refusals.append((f"zero_optimization.offload_optimizer.ratio={offload.ratio}", "set it to 1.0"))
    if getattr(offload, "super_offload", False):
        refusals.append(("zero_optimization.offload_optimizer.super_offload", "set it to false"))
    if getattr(zero, "zenflow", None) is not None:
        refusals.append(("zero_optimization.zenflow", "remove it"))
    if getattr(zero, "elastic_checkpoint", False):
        refusals.append(("zero_optimization.elastic_checkpoint", "set it to false"))
    for section in ("bfloat16_config", "float16_config", "fp16_config"):
        low = getattr(config, section, None)
        for option in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads", "bf16_optimizer_states"):
            if getattr(low, option, False):
                refusals.append((option, "set it to false: Amos keeps float32 master weights"))
    skips = zero.stage or engine.fp16_enabled() or engine.bfloat16_enabled()
    if skips and (config.optimizer_params or {}).get("on_nonfinite") == "raise":
        remedy = "leave it out: DeepSpeed skips such steps itself, before the optimizer hears of them"
        refusals.append(("on_nonfinite='raise'", remedy))
    for what, remedy in refusals:
        raise RuntimeError(f"Amos does not work with {what}. In DeepSpeed's JSON, {remedy}.")
