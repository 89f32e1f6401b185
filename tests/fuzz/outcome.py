"""How a call ended, and whether it has changed anything."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amos_dist.reference import RUN, widened_int8
from amos_dist.sharding.dtensor import local_of

# A sentence, and a second one that says what to do.
TWO_SENTENCES = re.compile(r"[.?)] [A-Z\"'`].*[.?]$", re.DOTALL)


def undeclared(error: BaseException) -> str:
    """Why `error` is none that a user may see; nothing if it is one."""
    if type(error) not in (TypeError, ValueError, RuntimeError):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    # torch.optim.Optimizer refuses some parameter groups in its own words, and Python calls without an argument.
    if frames[-1].filename.endswith("torch/optim/optimizer.py"):
        return ""
    python = r"Amos\.__init__\(\) missing 1 required positional |multiple values for "
    if isinstance(error, TypeError) and re.search(python, str(error)):
        return ""
    if not TWO_SENTENCES.search(str(error)):
        return f"no two sentences: {type(error).__name__}: {error}"
    return ""


def ending(work: Callable[[], Any]) -> str | None:
    """What the declared error says that `work` ends with; None where it ends well.

    Raises:
        AssertionError: it ends with another error.
    """
    try:
        work()
    except Exception as error:
        if why := undeclared(error):
            raise AssertionError(why) from error
        return str(error)
    return None


def bits(tensor: Tensor) -> bytes:
    """The numbers of a tensor to the last bit, and what kind of numbers they are."""
    held = local_of(tensor.detach()).contiguous().reshape(-1)
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return kind + held.view(torch.uint8).numpy().tobytes()


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """All that an optimizer can change. State that was made and has not moved is none.

    Momentum of 8 bits is shown in float32, as it is between load_state_dict and the next step.
    """
    groups, params, states = [], [], []
    for group in optimizer.param_groups:
        groups.append({key: frozen(value) for key, value in group.items() if key != "params"})
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            params.append(bits(param))
            moved = {key: frozen(value) for key, value in _widened(state).items()}
            states.append(moved if state and _has_moved(state) else {})
    return groups, params, states


def _widened(state: dict[str, Any]) -> dict[str, Any]:
    """The same with momentum in float32, where its runs are those of a whole parameter."""
    levels, scale = state.get("momentum"), state.get("momentum_scale")
    if levels is None or scale is None or scale.numel() != -(-levels.numel() // RUN):
        return state
    wide = widened_int8(levels.view(-1), scale).view(levels.shape)
    return {key: value for key, value in state.items() if key != "momentum_scale"} | {"momentum": wide}


def frozen(value: Any) -> Any:
    return bits(value) if isinstance(value, Tensor) else repr(value)


def _has_moved(state: dict[str, Any]) -> bool:
    from_zero = [v for k, v in state.items() if isinstance(v, Tensor) and k not in ("master", "decay")]
    return any(bool((local_of(v) != 0).any()) for v in from_zero)
