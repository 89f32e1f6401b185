"""Trains a small model under DeepSpeed for each case it is given, and the same in plain torch, and reports the difference.

A case: {"name", "stage", "dtype", "ranks"?, "params": Amos's keywords, "zero": more of zero_optimization,
"config": more of the JSON, "groups": bool, "init": zero.Init, "micro", "accumulate", "steps"}.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import amos_dist
from amos_dist import plan
from tests.distributed.harness import received, report

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Model(nn.Module):
    """Odd sizes, a convolution, a parameter smaller than a row, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 13)
        self.conv = nn.Conv1d(13, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(5, 11, bias=False)
        self.tiny = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.inner(self.embed(x)))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = self.frozen(self.norm(h)) + self.tiny(h.mean(-1, keepdim=True))
        loss = nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), x.flatten())
        return loss + 0.0 * self.unused.weight.float().sum() * 0.0


def make_model(dtype: torch.dtype) -> Model:
    torch.manual_seed(1)
    return Model().to(dtype)


def batch(step: int, size: int) -> torch.Tensor:
    return torch.randint(0, 11, (size, 9), generator=torch.Generator().manual_seed(100 + step))


def grouped(model: nn.Module, split: bool) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not split:
        return [{"params": named}]
    return [
        {"params": [(n, p) for n, p in named if p.dim() >= 2], "beta": 0.9},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "lr": 0.01},
    ]


def plain(case: dict[str, Any], size: int, rates: list[list[float]]) -> dict[str, torch.Tensor]:
    """The same training in one process without DeepSpeed, in float32 (or with float32 masters of a low-precision model).

    rates: the learning rate of each group at each step, as DeepSpeed's scheduler set it.
    """
    dtype = DTYPES[case["dtype"]]
    model = make_model(dtype)
    master = make_model(torch.float32)
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


def engine_for(case: dict[str, Any], size: int) -> Any:
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
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
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
        model = make_model(DTYPES[dtype]) if not case.get("init") else make_partitioned(DTYPES[dtype])
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.get("groups"):
        parameters = [{**g, "params": [p for _, p in g["params"]]} for g in grouped(model, True)]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def make_partitioned(dtype: torch.dtype) -> Model:
    """Under zero.Init each module is partitioned when its constructor ends: start values are put in afterwards."""
    model = Model()
    start = make_values(dtype)
    for name, param in model.named_parameters():
        with deepspeed.zero.GatheredParameters(param, modifier_rank=0):
            if dist.get_rank() == 0:
                param.data.copy_(start[name])
    model.frozen.weight.requires_grad_(False)
    return model


def make_values(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return VALUES[dtype]


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    result = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param) if hasattr(param, "ds_id") else contextlib.nullcontext():
            result[name] = param.detach().float().cpu().clone()
    return result


class Counter:
    """Counts the all-reduces of step() and their bytes."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def watch(self, engine: Any) -> None:
        base = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
        original, counted = base.step, self

        def step(*args: Any, **kwargs: Any) -> Any:
            counted.calls.append([])
            real = dist.all_reduce

            def count(tensor: torch.Tensor, *a: Any, **k: Any) -> Any:
                counted.calls[-1].append(tensor.numel() * tensor.element_size())
                return real(tensor, *a, **k)

            dist.all_reduce = count
            try:
                return original(*args, **kwargs)
            finally:
                dist.all_reduce = real

        base.step = step


def run(case: dict[str, Any]) -> dict[str, Any]:
    ranks = dist.get_world_size()
    micro = case.get("micro", 2)
    size = case.get("size", 12 * micro)
    engine = engine_for(case, size)
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
        difference = float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        if not difference <= worst:
            worst, where = difference, name
    base = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    moved = float((got["inner.weight"] - make_values(DTYPES[case["dtype"]])["inner.weight"].float()).abs().max())
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


def refusal(case: dict[str, Any]) -> dict[str, Any]:
    try:
        engine = engine_for(case, 12 * case.get("micro", 2))
        size = 12 * case.get("micro", 2)
        for part in batch(0, size).chunk(size // 2)[dist.get_rank() :: dist.get_world_size()]:
            engine.backward(engine(part))
            engine.step()
    except Exception as error:
        return {"name": case["name"], "error": type(error).__name__, "text": str(error)}
    return {"name": case["name"], "error": "", "text": ""}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    VALUES = {
        dtype: {n: p.detach().clone() for n, p in make_model(dtype).named_parameters()} for dtype in DTYPES.values()
    }
    assert plan.Plan  # the package under test is the one of this checkout
    cases = received()
    report([refusal(case) if case.get("refused") else run(case) for case in cases])
    dist.barrier()
    dist.destroy_process_group()
