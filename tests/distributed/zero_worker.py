"""Trains a small model under DeepSpeed for each case, and the same in plain torch, and reports the difference.

A case: {"name", "do": "train" or a function below, "stage", "dtype", "params": Amos's keywords,
"zero": more of zero_optimization, "config": more of the JSON, "groups": two parameter groups, "init": zero.Init,
"warmup": steps, "micro": batch of one pass, "steps", "waves": how many waves of
travelling sums there may be, however small}.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

import amos_dist
from amos_dist.sharding import holders, shares
from tests.distributed.harness import complaint, received, relative, report
from tests.distributed.model import Model, batch
from tests.distributed.waves import in_waves

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed asks for instructions that few CPUs have. torch computes in float16 on all, if slowly.
get_accelerator().is_fp16_supported = lambda: True
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(dtype: torch.dtype) -> Model:
    torch.manual_seed(1)
    return Model().to(dtype)


def grouped(model: nn.Module, split: bool) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not split:
        return [{"params": named}]
    return [
        {"params": [(n, p) for n, p in named if p.dim() >= 2], "beta": 0.9},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "lr": 0.01},
    ]


def plain(case: dict[str, Any], size: int, rates: list[list[float]]) -> dict[str, torch.Tensor]:
    """The same training in one process without DeepSpeed, in float32 (with float32 masters of a low-precision model).

    rates: the learning rate of each group at each step, as DeepSpeed's scheduler set it.
    """
    dtype = DTYPES[case["dtype"]]
    model = make_model(dtype)
    master = make_model(torch.float32)
    for frozen in (model, master) if case.get("thaw") else ():
        frozen.norm.weight.requires_grad_(False)
    with torch.no_grad():
        for a, b in zip(master.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    optimizer = amos_dist.Amos(grouped(master, case.get("groups", False)), **case["params"])
    clip = case.get("config", {}).get("gradient_clipping", 0.0)
    for step in range(case["steps"]):
        model.zero_grad()
        parts = batch(step, size).chunk(size // case.get("micro", 2))
        for part in parts:
            (model(part) / len(parts)).backward()
        for a, b in zip(master.parameters(), model.parameters(), strict=True):
            a.grad = None if b.grad is None else b.grad.float()
        if clip:
            norm = torch.sqrt(sum(p.grad.square().sum() for p in master.parameters() if p.grad is not None))
            scale = clip / max(float(norm) + 1e-6, clip)
            for p in master.parameters():
                if p.grad is not None and norm > clip:
                    p.grad.mul_(scale)
        for group, rate in zip(optimizer.param_groups, rates[step], strict=True):
            group["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(master.parameters(), model.parameters(), strict=True):
                b.copy_(a)
    return {name: p.detach().float() for name, p in model.named_parameters()}


def engine_for(case: dict[str, Any], size: int, model: Any = None) -> Any:
    dtype = case["dtype"]
    config = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": case.get("micro", 2),
        "optimizer": {"type": case.get("type", "Amos"), "params": case["params"]},
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "gradient_clipping": 0.0,
        **case.get("config", {}),
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True, **config.get("bf16", {})}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, **config.get("fp16", {})}
    if case.get("scheduler"):
        config["scheduler"] = case["scheduler"]
    if case.get("warmup"):
        config["scheduler"] = {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0.0,
                "warmup_max_lr": case["params"]["lr"],
                "warmup_num_steps": case["warmup"],
                "warmup_type": "linear",
            },
        }
    context: Any = contextlib.nullcontext()
    if case.get("init"):
        context = deepspeed.zero.Init(config_dict_or_path=config, dtype=DTYPES[dtype])
    with context:
        if model is None:
            model = make_model(DTYPES[dtype]) if not case.get("init") else make_partitioned(DTYPES[dtype])
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.get("thaw"):  # frozen when DeepSpeed lays out its partitions, but in its list; thawed before the first step
        model.norm.weight.requires_grad_(False)
        parameters = list(model.parameters())
    if case.get("groups"):
        parameters = [{**g, "params": [p for _, p in g["params"]]} for g in grouped(model, True)]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def make_partitioned(dtype: torch.dtype) -> Model:
    """Under zero.Init each module is partitioned when its constructor ends: start values are put in afterwards."""
    model = Model()
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
            if dist.get_rank() == 0:
                param.data.copy_(START[dtype][name])
    return model


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    result = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param) if hasattr(param, "ds_id") else contextlib.nullcontext():
            result[name] = param.detach().float().cpu().clone()
    return result


class Counter:
    """Counts what step() sends: for each step the kinds of its collectives and their bytes.

    Of all ranks together; of an all-to-all what this rank sends.
    """

    PLACES = ((dist, "all_reduce"), (shares, "_scatter"), (shares, "_gather"), (holders, "_all_to_all"))

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, int]]] = []

    def watch(self, engine: Any) -> None:
        base = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
        original, counted = base.step, self

        def step(*args: Any, **kwargs: Any) -> Any:
            counted.calls.append([])
            real = [(module, name, getattr(module, name)) for module, name in counted.PLACES]

            def count(kind: str, collective: Any, *tensors: torch.Tensor, **more: Any) -> Any:
                size = tensors[1].nbytes if kind == "_all_to_all" else max(tensor.nbytes for tensor in tensors)
                counted.calls[-1].append((kind.strip("_"), size))
                return collective(*tensors, **more)

            for module, name, collective in real:
                setattr(module, name, functools.partial(count, name, collective))
            try:
                return original(*args, **kwargs)
            finally:
                for module, name, collective in real:
                    setattr(module, name, collective)

        base.step = step


@in_waves
def run(case: dict[str, Any]) -> dict[str, Any]:
    ranks = dist.get_world_size()
    micro = case.get("micro", 2)
    size = case.get("size", 12 * micro)
    engine = engine_for(case, size)
    if case.get("thaw"):
        engine.module.norm.weight.requires_grad_(True)
    counter = Counter()
    counter.watch(engine)
    rates = []
    for step in range(case["steps"]):
        rates.append([float(group["lr"]) for group in engine.optimizer.param_groups])
        parts = batch(step, size).chunk(size // micro)
        mine = parts[dist.get_rank() :: ranks]
        for part in mine:
            engine.backward(engine(part))
            engine.step()
    got, expected = full_parameters(engine), plain(case, size, rates)
    worst, where = 0.0, ""
    for name, value in expected.items():
        difference = relative(got[name], value)
        if not difference <= worst:
            worst, where = difference, name
    base = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    moved = float((got["inner.weight"] - START[DTYPES[case["dtype"]]]["inner.weight"].float()).abs().max())
    steps = sorted({int(state["step"]) for state in base.state.values()})
    state_numel = sum(
        t.numel() for state in base.state.values() for k, t in state.items() if k not in ("step", "momentum")
    )
    return {
        "name": case["name"],
        "rates": rates,
        "optimizer": type(base).__name__,
        "worst": worst,
        "where": where,
        "moved": moved,
        "steps": steps,
        "calls": counter.calls,
        "state_numel": state_numel,
        "loss": float(engine(batch(0, 4))),
    }


def train_steps(engine: Any, case: dict[str, Any], steps: range, factor: float = 1.0) -> None:
    """factor: of the loss."""
    micro = case.get("micro", 2)
    size = 12 * micro
    for step in steps:
        for part in batch(step, size).chunk(size // micro)[dist.get_rank() :: dist.get_world_size()]:
            engine.backward(engine(part) * factor)
            engine.step()


def refuse(case: dict[str, Any]) -> dict[str, Any]:
    """What goes wrong, in words."""
    try:
        train_steps(engine_for(case, 12 * case.get("micro", 2)), case, range(1))
    except Exception as error:
        return {"name": case["name"], "error": type(error).__name__, "text": str(error)}
    return {"name": case["name"], "error": "", "text": ""}


def resume(case: dict[str, Any]) -> dict[str, Any]:
    """Trains 4 + 4 steps; then loads what was saved after 4 into another engine and trains the last 4 again.

    case["again"]: that engine's keywords.
    """
    folder = os.environ["AMOS_TEST_FOLDER"] + "/" + case["name"].replace(" ", "_")
    engine = engine_for(case, 12 * case.get("micro", 2))
    train_steps(engine, case, range(4))
    engine.save_checkpoint(folder, "four")
    train_steps(engine, case, range(4, 8))
    first = full_parameters(engine)
    again = engine_for({**case, "params": case.get("again", case["params"])}, 12 * case.get("micro", 2))
    again.load_checkpoint(folder, "four")
    train_steps(again, case, range(4, 8))
    second = full_parameters(again)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    return {"name": case["name"], "different": different}


def fault(case: dict[str, Any]) -> dict[str, Any]:
    """One rank's partition or state does not fit: every rank must say so, and nothing change."""
    folder = os.environ["AMOS_TEST_FOLDER"] + "/" + case["name"].replace(" ", "_")
    engine_for(case, 12 * case.get("micro", 2)).save_checkpoint(folder, "none")
    engine = engine_for(case, 12 * case.get("micro", 2))
    engine.load_checkpoint(folder, "none")
    stage3 = case["stage"] == 3
    flats = (
        engine.optimizer.fp32_partitioned_groups_flat if stage3 else engine.optimizer.single_partition_of_fp32_groups
    )
    if dist.get_rank() == 1:  # as a damaged checkpoint leaves it
        if case["fault"] == "partition":
            flats[0].data[3] += 1
        else:
            engine.optimizer.optimizer.state[flats[0]] = {"step": torch.ones(()), "momentum": torch.zeros(5)}
    before = [flat.detach().clone() for flat in flats]
    try:
        train_steps(engine, case, range(1))
        text = ""
    except RuntimeError as error:
        text = str(error)
    # Bits, because stage 3 leaves whatever was in memory, maybe NaN, in the padding.
    same = all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, flats, strict=True))
    return {"name": case["name"], "text": text, "unchanged": same}


def nonfinite(case: dict[str, Any]) -> dict[str, Any]:
    """NaN in one rank's gradients in the second of four steps."""
    engine = engine_for(case, 12 * case.get("micro", 2))
    base, changed, texts = engine.basic_optimizer, [], []

    def held() -> list[torch.Tensor]:
        states = [value for state in base.state.values() for value in state.values()]
        return [value.clone() for value in (*full_parameters(engine).values(), *states)]

    for step in range(4):
        before, factor = held(), float("nan") if step == 1 and dist.get_rank() == 1 else 1.0
        texts.append(complaint(functools.partial(train_steps, engine, case, range(step, step + 1), factor)))
        after = held()
        changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    steps = sorted({int(state["step"]) for state in base.state.values()})
    return {"name": case["name"], "changed": changed, "texts": texts, "steps": steps, "skipped": base.skipped_steps}


def second(case: dict[str, Any]) -> dict[str, Any]:
    """An engine of another stage on the model of an earlier one: what that left on the parameters is stale."""
    size = 12 * case.get("micro", 2)
    first = engine_for({**case, "stage": 2}, size)
    train_steps(first, case, range(1))
    model = first.module
    first.destroy()
    engine = engine_for(case, size, model)
    train_steps(engine, case, range(1, 4))
    return {"name": case["name"], "steps": sorted({int(s["step"]) for s in engine.basic_optimizer.state.values()})}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    START = {
        dtype: {n: p.detach().clone() for n, p in make_model(dtype).named_parameters()} for dtype in DTYPES.values()
    }
    do = {"train": run, "refuse": refuse, "resume": resume, "fault": fault, "second": second, "nonfinite": nonfinite}
    report([do[case.get("do", "train")](case) for case in received()])
    dist.barrier()
    dist.destroy_process_group()
