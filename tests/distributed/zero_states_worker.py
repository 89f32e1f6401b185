"""Looks at, changes and moves the optimizer's state under DeepSpeed ZeRO, and loads checkpoints of other models.

A case: {"name", "do": "model" | "look" | "move" | "set", …} and what zero_worker.engine_for reads.
"model": "to": the model that loads. "look": reads and writes state by DeepSpeed's names and by full_state.
"move": "how": what is moved: see `MOVES`. "set": float32 weights, before the first step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from amos_dist.checkpoint import full_state
from amos_dist.convert import convert
from tests.distributed.harness import serve
from tests.distributed.model import Model, batch
from tests.distributed.zero_checkpoint_worker import base, different
from tests.distributed.zero_worker import DTYPES, engine_for, full_parameters, make_model, train_steps

STATE = ("row_moment", "column_moment", "decay", "step")


class Gained(Model):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(6, 4)


class Lost(Model):
    def __init__(self) -> None:
        super().__init__()
        self.unused.register_parameter("bias", None)


class Moved(Model):
    """The same parameters, two of one shape in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.weight, self.norm.bias = None, None
        self.norm.register_parameter("bias", nn.Parameter(torch.zeros(5)))
        self.norm.register_parameter("weight", nn.Parameter(torch.ones(5)))
        self.norm._parameters = {name: self.norm._parameters[name] for name in ("bias", "weight")}


class Renamed(Model):
    def __init__(self) -> None:
        super().__init__()
        self.small = self.tiny
        del self.tiny

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("small" if name == "tiny" and "small" in self._modules else name)


MODELS = {"gained": Gained, "lost": Lost, "moved": Moved, "renamed": Renamed}


def model(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps and a checkpoint; another model loads it and steps."""
    folder = f"{os.environ['AMOS_TEST_FOLDER']}/{case['name'].replace(' ', '_')}"
    engine = engine_for(case, 24)
    train_steps(engine, case, range(2))
    engine.save_checkpoint(folder, "two")
    if case.get("universal"):
        if dist.get_rank() == 0:
            convert(folder, f"{folder}/converted", "zero", tag="two")
        dist.barrier()
    torch.manual_seed(1)
    config = {"checkpoint": {"load_universal": case.get("universal", False)}}
    other = engine_for({**case, "config": config}, 24, MODELS[case["to"]]().to(DTYPES[case["dtype"]]))
    text, same = "", False
    try:
        if case.get("universal"):
            other.load_checkpoint(f"{folder}/converted", "universal", load_module_strict=False)
            train_steps(other, case, range(2, 3))
        elif case["to"] == "renamed":
            other.load_checkpoint(folder, "two", custom_load_fn=load_renamed)
        else:
            other.load_checkpoint(folder, "two", load_module_strict=False)
    except (ValueError, RuntimeError, OSError) as error:
        text = f"{type(error).__name__}: {error}"
    else:
        train_steps(engine, case, range(2, 4))
        train_steps(other, case, range(2, 4))
        got, expected = full_parameters(other), full_parameters(engine)
        same = all(torch.equal(got[name.replace("tiny", "small")], value) for name, value in expected.items())
    return {"text": text, "same": same}


def load_renamed(src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    dst.load_state_dict({name.replace("tiny", "small"): value for name, value in src.items()})


def said(work: Callable[[], Any]) -> str:
    """The error's class, or nothing."""
    try:
        work()
    except Exception as error:  # DeepSpeed's errors are of any class
        return type(error).__name__
    return ""


def look(case: dict[str, Any]) -> dict[str, Any]:
    """By name: momentum, float32 weights, gradients; what DeepSpeed says to the other keys; all of it by full_state."""
    engine = engine_for(case, 24)
    train_steps(engine, case, range(2))
    params = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    whole = full_state(engine)
    of_optimizer = full_state(base(engine))
    momentum = {name: safe_get_full_optimizer_state(p, "momentum").clone() for name, p in params.items()}
    result: dict[str, Any] = {"momentum": [], "optimizer": different(whole, of_optimizer)}
    if dist.get_rank() == 0:
        result["momentum"] = different({"": {name: entry["momentum"] for name, entry in whole.items()}}, {"": momentum})
        result["shapes"] = {key: list(value.shape) for key, value in whole["inner.weight"].items()}
        result["moved"] = min(float(value.abs().sum()) for name, value in momentum.items() if "unused" not in name)
    inner, stage3 = params["inner.weight"], case["stage"] == 3
    shape = tuple(getattr(inner, "ds_shape", inner.shape))
    result["others"] = []
    for key in STATE:
        # Of the smallest, too: one rank has all of it, and the others nothing.
        for each in (inner,) if stage3 else (inner, params["tiny.weight"]):
            result["others"] += [said(lambda key=key, each=each: safe_get_full_optimizer_state(each, key))]
        if stage3:
            result["others"] += [said(lambda key=key: safe_get_local_optimizer_state(inner, key))]
    ramp = torch.arange(inner.ds_numel if stage3 else inner.numel()).view(shape) / 64  # exact in bfloat16
    safe_set_full_optimizer_state(inner, ramp, "momentum")
    result["set"] = torch.equal(safe_get_full_optimizer_state(inner, "momentum"), ramp)
    seen = full_state(engine)
    result["set"] &= dist.get_rank() > 0 or torch.equal(seen["inner.weight"]["momentum"], ramp)
    if stage3:
        local = safe_get_local_optimizer_state(inner, "momentum")
        size = local.numel()
        own = ramp.view(-1)[dist.get_rank() * size :][:size]
        result["set"] &= torch.equal(local[: own.numel()].float(), own)
    # New weights and a momentum of zero: the next step starts from them.
    safe_set_full_fp32_param(inner, ramp)
    result["weights"] = torch.equal(safe_get_full_fp32_param(inner), ramp)
    *parts, last = batch(2, 24).chunk(12)[dist.get_rank() :: dist.get_world_size()]
    for part in parts:
        engine.backward(engine(part))
        engine.step()
    engine.backward(engine(last))
    gradient = safe_get_full_grad(inner)
    result["gradient"] = [list(gradient.shape), float(gradient.abs().sum())]
    engine.step()
    change = float((safe_get_full_fp32_param(inner) - ramp).abs().max())
    result["change"] = change  # momentum pulls: 0.9 of the ramp, at least
    return result


def replaced(engine: Any, keys: tuple[str, ...]) -> None:
    """As reload_states leaves the state on an accelerator: every tensor is another one."""
    for state in base(engine).state.values():
        for key in keys:
            if key in state:
                state[key] = state[key].clone()


def moved(engine: Any, keys: tuple[str, ...]) -> None:
    """As DeepSpeed moves what it knows: the same tensors with other memory."""
    for state in base(engine).state.values():
        for key in keys:
            if key in state:
                state[key].data = state[key].data.clone()


def flats(engine: Any) -> None:
    for tensor in base(engine).state:
        tensor.data = tensor.data.clone()


def api(*include: str, pin: bool = False) -> Callable[[Any], None]:
    """DeepSpeed's own offload_states and reload_states."""

    def move(engine: Any) -> None:
        engine.offload_states(include=[OffloadStateTypeEnum(each) for each in include] or None, pin_memory=pin)
        engine.reload_states()

    return move


FLOAT = ("row_moment", "column_moment", "moment", "decay")
MOVES: dict[str, Callable[[Any], None]] = {
    "offload_states": api(),
    "offload_states, pinned": api(pin=True),
    "offload_states of optim_states": api("optim_states"),
    "offload_states of hp_params": api("hp_params"),
    "offload_states of lp_params": api("lp_params"),
    "offload_states of gradients": api("lp_grads", "contiguous_grad_buffer"),
    "all replaced": lambda engine: replaced(engine, (*FLOAT, "momentum", "step")),
    "momentum replaced": lambda engine: replaced(engine, ("momentum",)),
    "all moved": lambda engine: (moved(engine, (*FLOAT, "momentum", "step")), flats(engine)),
    "float state moved": lambda engine: moved(engine, FLOAT),
    "rows moved": lambda engine: moved(engine, ("row_moment",)),
    "columns moved": lambda engine: moved(engine, ("column_moment",)),
    "steps moved": lambda engine: moved(engine, ("step",)),
    "momentum moved": lambda engine: moved(engine, ("momentum",)),
    "partitions moved": flats,
}


def move(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a move, two more, for each way to move; beside a run without."""
    expected, result = None, {}
    for how in ("", *case["how"]):
        engine = engine_for(case, 24, make_model(DTYPES[case["dtype"]]))
        train_steps(engine, case, range(2))
        refused = said(lambda how=how, engine=engine: MOVES[how](engine)) if how else ""
        train_steps(engine, case, range(2, 4))
        found = full_parameters(engine), full_state(engine)
        expected = expected or found
        wrong = different({"": found[0]}, {"": expected[0]}) + different(found[1], expected[1])
        if how.endswith("replaced"):  # what DeepSpeed sees is what is there
            momentum = safe_get_full_optimizer_state(engine.module.inner.weight, "momentum")
            if dist.get_rank() == 0 and not torch.equal(momentum, found[1]["inner.weight"]["momentum"]):
                wrong.append("stale momentum")
        result[how] = [refused, wrong]
        engine.destroy()
    return {"moves": result}


def set_weights(case: dict[str, Any]) -> dict[str, Any]:
    """Float32 weights that are set after the first backward pass are what the first step moves.

    "foreign": DeepSpeed's own map of the partition is not what Amos takes for it.
    """
    engine = engine_for(case, 24)
    params = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    *parts, last = batch(0, 24).chunk(12)[dist.get_rank() :: dist.get_world_size()]
    for part in parts:
        engine.backward(engine(part))
        engine.step()
    engine.backward(engine(last))
    wanted = {name: safe_get_full_fp32_param(p) + 1 for name, p in params.items()}
    if case["stage"] == 3:  # it can set only what it has cut into equal parts
        wanted = {name: value for name, value in wanted.items() if value.numel() % dist.get_world_size() == 0}
    for name in wanted:
        param = params[name]
        safe_set_full_fp32_param(param, wanted[name])
        if case.get("foreign") and param._hp_mapping is not None:
            param._hp_mapping.lp_fragment_address.start += 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = said(engine.step)
    if text or case.get("foreign"):
        return {"text": text}
    changes = {name: float((safe_get_full_fp32_param(params[name]) - w).abs().max()) for name, w in wanted.items()}
    told = sum("Training goes on from the float32 weights" in str(each.message) for each in caught)
    return {"text": text, "changes": changes, "told": told}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    serve({"model": model, "look": look, "move": move, "set": set_weights})
