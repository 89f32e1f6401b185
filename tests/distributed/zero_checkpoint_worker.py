"""Saves, converts and loads checkpoints under DeepSpeed ZeRO, for each case, and reports what differs.

A case: {"name", "do": "save" | "load" | "start_fresh" | "fault", "folder", …} and what zero_worker.engine_for reads.
"load": "of": the name of the case that was saved; "step_first": state_dict() is not called before; "without": a key of
the groups that is not there, as in a checkpoint that something else has written. "fault": what to break before.
"""

from __future__ import annotations

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

from amos_dist.convert import convert
from tests.distributed.harness import received, relative, report
from tests.distributed.model import Model
from tests.distributed.zero_worker import DTYPES, engine_for, full_parameters, make_model, train_steps

BEFORE, AFTER = range(3), range(3, 13)
State = dict[str, Any]


def base(engine: Any) -> Any:
    return engine.optimizer.optimizer


def other_start(dtype: torch.dtype) -> Model:
    """The model with other start values, so that a sigma that is measured again differs.

    Not of frozen weights, which a universal checkpoint does not have.
    """
    torch.manual_seed(7)
    model = Model().to(dtype)
    model.frozen.load_state_dict(make_model(dtype).frozen.state_dict())
    return model


def new_engine(case: State, **more: Any) -> Any:
    config = {**case.get("config", {}), **more}
    return engine_for({**case, "config": config}, 24, other_start(DTYPES[case["dtype"]]))


def whole_state(engine: Any) -> dict[str, State]:
    """By name; on rank 0 alone."""
    zero = engine.optimizer
    if hasattr(zero, "_set_fp32_optimizer_param_groups"):  # as stage 3 does when it saves
        zero._set_fp32_optimizer_param_groups()
    try:
        return base(engine).state_dict()["param_groups"][0]["amos_state"]
    finally:
        if hasattr(zero, "_set_fp32_optimizer_param_groups"):
            zero._clear_fp32_optimizer_param_groups()


def whole_momentum(engine: Any) -> dict[str, torch.Tensor]:
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # as stages 1 and 2 do after a step
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {name: safe_get_full_optimizer_state(p, "momentum").view(-1).clone() for name, p in trained}


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
    """Three steps, a checkpoint, ten more; the same again from the checkpoint; then what other ranks will load."""
    folder = Path(case["folder"], case["name"].replace(" ", "_"))
    engine = engine_for(case, 24)
    train_steps(engine, case, BEFORE)
    for number, group in enumerate(base(engine).param_groups):  # as a schedule does: no longer the JSON's
        group["lr"] *= 0.5 + number
    engine.save_checkpoint(str(folder), "saved")
    live = [key for group in base(engine).param_groups for key in group if key in ("amos_state", "amos_groups")]
    own = [held[key] for held in base(engine).state.values() for key in ("row_moment", "decay") if key in held]
    state, then = whole_state(engine), full_parameters(engine)
    if dist.get_rank() == 0:
        make_universal(folder, case.get("by_deepspeed", False))
    size = sum(file.stat().st_size for file in (folder / "saved").glob("*optim_states.pt"))
    train_steps(engine, case, AFTER)
    after = full_parameters(engine)

    again = new_engine(case)
    again.load_checkpoint(str(folder), "saved")
    kept = different(whole_state(again), state)
    train_steps(again, case, AFTER)
    weights = 0.0
    if dist.get_rank() == 0:
        torch.save((state, after), folder / "expected.pt")
    if dist.get_rank() == 0 and "data_types" not in case.get("config", {}):  # zero_to_fp32 refuses BF16_Optimizer's
        masters = get_fp32_state_dict_from_zero_checkpoint(str(folder), "saved")
        dtype = DTYPES[case["dtype"]]
        weights = worst(then, {name: value.to(dtype).float() for name, value in masters.items()})
    dist.barrier()
    return {
        "live": live,
        "dims": sorted({value.dim() for value in own}),
        "kept": kept,
        "resumed": different({"": after}, {"": full_parameters(again)}),
        "names": len(state),
        "size": size,
        "fp32": weights,
    }


def load(case: State) -> State:
    """Loads what another number of ranks, or another stage, has saved, and takes the ten steps."""
    folder = Path(case["folder"], case["of"].replace(" ", "_"))
    state, after = torch.load(folder / "expected.pt")
    engine = new_engine(case, checkpoint={"load_universal": True})
    engine.load_checkpoint(str(folder / "converted"), "universal")
    for group in base(engine).param_groups:
        group.pop(case.get("without"), None)
    if not case.get("step_first"):  # adopted by state_dict(), else by step()
        got = whole_state(engine)
        changed = different(got, state) if dist.get_rank() == 0 else []
        momentum = {}
        if case["params"].get("momentum"):
            momentum = whole_momentum(engine)
        planes = {
            n: torch.load(folder / "converted" / "universal" / "zero" / n / "exp_avg.pt")["param"] for n in momentum
        }
        changed += different(
            {"momentum": {n: v.float() for n, v in momentum.items()}},
            {"momentum": {n: v.float().view(-1) for n, v in planes.items()}},
        )
    else:
        changed = []
    train_steps(engine, case, AFTER)
    narrowed = ""
    if case["stage"] == 3:  # DeepSpeed takes any tensor of a partition's state for numbers of its elements
        try:
            safe_get_full_optimizer_state(engine.module.embed.weight, "decay")
        except (RuntimeError, IndexError) as error:
            narrowed = type(error).__name__
    live = [key for group in base(engine).param_groups for key in group if key in ("amos_state", "amos_groups")]
    markers = [group["amos_group"] for group in base(engine).param_groups]
    planes_left = sorted({key for held in base(engine).state.values() for key in held if key.startswith("exp_avg")})
    return {
        "changed": changed,
        "narrowed": narrowed,
        "worst": worst(full_parameters(engine), after),
        "live": live + planes_left,
        "markers": markers,
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
    result: State = {"text": text, "weights": [], "steps": []}
    # Not load_module_only alone: stage 3 loads no weights then, and does not say so.
    for module_only in (False, True):
        engine = new_engine(case)
        engine.load_checkpoint(str(folder), "two", load_optimizer_states=False, load_module_only=module_only)
        result["weights"].append(worst(full_parameters(engine), weights))
        train_steps(engine, case, range(2, 4))
        result["steps"].append(sorted({int(held["step"]) for held in base(engine).state.values()}))
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
    for attempt in (lambda: train_steps(engine, case, AFTER[:1]), lambda: whole_state(engine)):
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
