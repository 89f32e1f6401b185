"""Saves, converts and loads checkpoints under DeepSpeed ZeRO, for each case, and reports what differs.

A case: {"name", "do": "save" | "load" | "start_fresh" | "fault", "folder", …} and what zero_worker.engine_for reads.
"overflow_at": steps of which the gradients are not finite.
"load": "of": the name of the case that was saved; "step_first": state_dict() is not called before; "without": a key of
the groups that is not there, as in a checkpoint that something else has written. "fault": what to break before.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from amos_dist.checkpoint import full_state
from amos_dist.convert import convert
from tests.distributed import zero_worker
from tests.distributed.harness import received, relative, report
from tests.distributed.model import Model
from tests.distributed.zero_worker import DTYPES, engine_for, full_parameters, make_model, train_steps

BEFORE, AFTER = range(5), range(5, 15)  # the checkpoint
OURS = ("amos_state", "amos_groups", "amos_parameters")  # in the groups of a checkpoint
State = dict[str, Any]


def base(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def scale(engine: Any) -> State:
    """The loss scale, and what decides when it changes."""
    held = getattr(engine.optimizer, "loss_scale_config", None) or getattr(engine.optimizer, "loss_scaler", None)
    return {key: value for key, value in vars(held).items() if type(value) in (int, float, bool)} if held else {}


def train(engine: Any, case: State, steps: range) -> State:
    """What was to be seen from step to step: the learning rates, the loss scale, the steps that overflowed."""
    seen: list[Any] = []
    for step in steps:
        large = 1e30 if step in case.get("overflow_at", ()) else 1.0
        train_steps(engine, case, range(step, step + 1), large)
        rates = [float(group["lr"]) for group in engine.optimizer.param_groups]
        seen.append([rates, scale(engine).get("cur_scale"), engine.skipped_steps, engine.global_steps])
    return {"seen": seen, "overflows": engine.skipped_steps, "scale": scale(engine)}


def other_start(dtype: torch.dtype) -> Model:
    """The model with other start values, so that a sigma that is measured again differs.

    Not of frozen weights, which a universal checkpoint does not have.
    """
    torch.manual_seed(7)
    model = Model().to(dtype)
    model.frozen.load_state_dict(make_model(dtype).frozen.state_dict())
    return model


def first_engine(case: State) -> Any:
    starts = make_model(DTYPES[case["dtype"]])
    return _engine(case, starts)


def new_engine(case: State, **more: Any) -> Any:
    config = {**case.get("config", {}), **more}
    return _engine({**case, "config": config}, other_start(DTYPES[case["dtype"]]))


def _engine(case: State, model: Model) -> Any:
    if case.get("init"):  # zero.Init: the model is built there, and these become its start values
        zero_worker.START = {DTYPES[case["dtype"]]: {n: p.detach().clone() for n, p in model.named_parameters()}}
    return engine_for(case, 24, None if case.get("init") else model)


def momentum_by_name(engine: Any) -> dict[str, torch.Tensor]:
    """As DeepSpeed finds it."""
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {name: safe_get_full_optimizer_state(p, "momentum").clone() for name, p in trained}


def different(a: dict[str, State], b: dict[str, State]) -> list[str]:
    """Where two states differ in a bit, a shape, a dtype or a name."""
    result = sorted(set(a) ^ set(b))
    for name in set(a) & set(b):
        result += [f"{name} {key}" for key in set(a[name]) ^ set(b[name])]
        for key in set(a[name]) & set(b[name]):
            x, y = a[name][key], b[name][key]
            if x.dtype != y.dtype or x.shape != y.shape or not torch.equal(x, y):
                result.append(f"{name} {key}")
    return result


def worst(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """max-norm, relative."""
    return max(relative(got[name], value) for name, value in expected.items())


def make_universal(folder: Path, by_deepspeed: bool) -> None:
    """folder/saved -> folder/converted/universal, for the same stage or for any."""
    if by_deepspeed:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(folder / "saved"), "--output_folder", str(folder / "converted" / "universal")]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        subprocess.run(command, check=True, env=alone, timeout=120, stdout=subprocess.DEVNULL)
    else:
        convert(folder, folder / "converted", "zero", tag="saved")


def save(case: State) -> State:
    """Some steps, a checkpoint, ten more; the same again from the checkpoint; then what other ranks will load."""
    folder = Path(case["folder"], case["name"].replace(" ", "_"))
    engine = first_engine(case)
    start = train(engine, case, BEFORE)
    if "scheduler" not in case:
        for number, group in enumerate(base(engine).param_groups):  # as a schedule does: no longer the JSON's
            group["lr"] *= 0.5 + number
    engine.save_checkpoint(str(folder), "saved")
    live = [key for group in base(engine).param_groups for key in group if key in OURS]
    own = [held[key] for held in base(engine).state.values() for key in ("row_moment", "decay") if key in held]
    state, then = full_state(engine), full_parameters(engine)
    sharded = case["stage"] > 0
    if dist.get_rank() == 0 and sharded:
        make_universal(folder, case.get("by_deepspeed", False))
    size = sum(file.stat().st_size for file in (folder / "saved").glob("*optim_states.pt"))
    steps = train(engine, case, AFTER)
    end, weights = full_state(engine), full_parameters(engine)

    again = new_engine(case)
    again.load_checkpoint(str(folder), "saved")
    kept = different(full_state(again), state)
    same_scale = scale(again) == start["scale"]
    resumed = train(again, case, AFTER) == steps
    masters_off = 0.0
    if dist.get_rank() == 0:
        torch.save((state, weights, start, steps), folder / "expected.pt")
    if dist.get_rank() == 0 and sharded and "data_types" not in case.get("config", {}):  # refuses BF16_Optimizer's
        masters = get_fp32_state_dict_from_zero_checkpoint(str(folder), "saved")
        dtype = DTYPES[case["dtype"]]
        masters_off = worst(then, {name: value.to(dtype).float() for name, value in masters.items()})
    dist.barrier()
    return {
        "live": live,
        "dims": sorted({value.dim() for value in own}),
        "kept": kept,
        "resumed": different({"": weights}, {"": full_parameters(again)}) + different(end, full_state(again)),
        "same_scale": same_scale,
        "same_steps": resumed,
        "rates": [rates for rates, *_ in steps["seen"]],
        "overflows": [start["overflows"], steps["overflows"] - start["overflows"]],
        "names": len(state),
        "size": size,
        "fp32": masters_off,
    }


def load(case: State) -> State:
    """Loads what another number of ranks, or another stage, has saved, and takes the ten steps."""
    folder = Path(case["folder"], case["of"].replace(" ", "_"))
    state, after, start, steps = torch.load(folder / "expected.pt")
    engine = new_engine(case, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder / "converted"), "universal")
    for group in base(engine).param_groups:
        group.pop(case.get("without"), None)
    found = scale(engine)
    changed, off, refused = [], 0.0, True
    if not case.get("step_first"):  # adopted by full_state(), else by step()
        got = full_state(engine)
        if eight_bits := case["params"].get("momentum_dtype") == "int8":
            for entry, other in ((got[name], state[name]) for name in got):
                off = max(off, relative(entry.pop("momentum"), other.pop("momentum")))
            with contextlib.suppress(RuntimeError, ValueError):  # levels without their scales mean nothing
                momentum_by_name(engine)
                refused = False
        changed = different(got, state) if dist.get_rank() == 0 else []
        if case["params"].get("momentum") and not eight_bits:
            momentum = momentum_by_name(engine)
            expected = {name: entry["momentum"] for name, entry in state.items()}
            changed += different({"momentum": momentum}, {"momentum": expected})
    seen = train(engine, case, AFTER)["seen"]
    narrowed = ""
    if case["stage"] == 3:  # DeepSpeed takes any tensor of a partition's state for numbers of its elements
        try:
            safe_get_full_optimizer_state(engine.module.embed.weight, "decay")
        except (RuntimeError, IndexError) as error:
            narrowed = type(error).__name__
    live = [key for group in base(engine).param_groups for key in group if key in OURS]
    markers = [group["amos_group"] for group in base(engine).param_groups]
    planes_left = sorted({key for held in base(engine).state.values() for key in held if key.startswith("exp_avg")})
    return {
        "changed": changed,
        "momentum_off": off,
        "refused": refused,
        "narrowed": narrowed,
        "worst": worst(full_parameters(engine), after),
        "live": live + planes_left,
        "markers": markers,
        "same_rates": [rates for rates, *_ in seen] == [rates for rates, *_ in steps["seen"]],
        "scales": [start["scale"], found],
        "steps": sorted({int(held["step"]) for held in base(engine).state.values()}),
    }


def start_fresh(case: State) -> State:
    """Of AdamW's checkpoint: refused with a sentence, but its weights can be taken, in two ways."""
    folder = Path(case["folder"], case["name"].replace(" ", "_"))
    adam = engine_for({**case, "type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}, 24)
    train_steps(adam, case, range(2))
    adam.save_checkpoint(str(folder), "two")
    weights = full_parameters(adam)
    try:
        new_engine(case).load_checkpoint(str(folder), "two")
        text = ""
    except ValueError as error:
        text = str(error)
    model = make_model(DTYPES[case["dtype"]])
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights[name])
    fresh = engine_for(case, 24, model)
    train_steps(fresh, case, range(2, 4))
    after = full_parameters(fresh)
    result: State = {"text": text, "weights": [], "steps": [], "after": []}
    # Not load_module_only alone: stage 3 loads no weights then, and does not say so.
    for module_only in (False, True):
        engine = new_engine(case)
        engine.load_checkpoint(str(folder), "two", load_optimizer_states=False, load_module_only=module_only)
        result["weights"].append(worst(full_parameters(engine), weights))
        train_steps(engine, case, range(2, 4))
        result["steps"].append(sorted({int(held["step"]) for held in base(engine).state.values()}))
        result["after"].append(different({"": full_parameters(engine)}, {"": after}))
    return result


def fault(case: State) -> State:
    """A universal checkpoint that does not fit: an error on every rank, and nothing changes."""
    folder = Path(case["folder"], case["of"].replace(" ", "_"))
    engine = new_engine(case, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder / "converted"), "universal")
    entries = base(engine).param_groups[0]["amos_state"]
    if case["fault"] == "absent":
        del entries["conv.weight"]
    elif case["fault"] == "shape":
        entries["conv.weight"]["decay"] = entries["conv.weight"]["decay"][1:]
    elif case["fault"] == "sigma":
        del entries["conv.weight"]["sigma"]
    elif case["fault"] == "one rank" and dist.get_rank() == 1:
        del entries["conv.weight"]
    elif case["fault"] == "none of Amos":
        for group in base(engine).param_groups:
            group.pop("amos_state", None)
    before = full_parameters(engine)
    texts = []
    for attempt in (lambda: train_steps(engine, case, AFTER[:1]), lambda: full_state(engine)):
        try:
            attempt()
            texts.append("")
        except RuntimeError as error:
            texts.append(str(error))
    return {"texts": texts, "changed": different({"": before}, {"": full_parameters(engine)})}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    do = {"save": save, "load": load, "start_fresh": start_fresh, "fault": fault}
    report([{"name": case["name"], **do[case["do"]](case)} for case in received()])
    dist.barrier()
    dist.destroy_process_group()
