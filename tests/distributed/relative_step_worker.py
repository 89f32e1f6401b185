"""Trains small models by RelativeStep on DTensors or under DeepSpeed, and the same in one process.

A case: {"name", "do": a function below, "base": see `BASES`, "params": RelativeStep's keywords, "steps", …}; for
DTensors "way": see dtensor_model.shard; for DeepSpeed "stage" and what else `engine_for` reads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from amos_dist import InverseSquareDecay, RelativeStep
from tests.distributed import dtensor_model
from tests.distributed import model as zero_model
from tests.distributed.harness import complaint, received, relative, serve

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "AdamW": functools.partial(torch.optim.AdamW, eps=1e-6),
    "smooth AdamW": functools.partial(torch.optim.AdamW, eps=0.1),  # no sign of a tiny gradient makes a difference
    "Adafactor": torch.optim.Adafactor,
    "Muon": torch.optim.Muon,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def optimizer_of(model: nn.Module, case: dict[str, Any]) -> RelativeStep:
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if case["base"] == "Muon":
        named = [(name, param) for name, param in named if param.dim() == 2]
    some = [{"params": named}]
    if case.get("groups"):
        some = [
            {"params": [each for each in named if each[1].dim() >= 2]},
            {"params": [each for each in named if each[1].dim() < 2], "sigma": 0.1, "decay": "none"},
        ]
    return RelativeStep(BASES[case["base"]](some), **{"lr": 0.05, **case.get("params", {})})


@contextlib.contextmanager
def counted(calls: list[int]) -> Iterator[None]:
    """Notes how many all-reduces there were."""
    real, before = dist.all_reduce, [0]

    def count(*args: Any, **kwargs: Any) -> Any:
        before[0] += 1
        return real(*args, **kwargs)

    dist.all_reduce = count
    try:
        yield
    finally:
        dist.all_reduce = real
        calls.append(before[0])


def worst(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> Any:
    """The largest difference, where it is, and how far the least parameter has moved."""
    differences = {name: relative(got[name], value) for name, value in expected.items()}
    where = max(differences, key=lambda name: differences[name] if differences[name] == differences[name] else 1e9)
    moved = {name: relative(got[name], start[name]) for name in got if "unused" not in name and "frozen" not in name}
    return {
        "worst": differences[where],
        "where": where,
        "moved": min(moved.values()),
        "least": min(moved, key=moved.get),
    }


# ---- DTensors --------------------------------------------------------------------------------------------------------


class Trainer:
    """A model on a mesh, and its optimizer."""

    def __init__(self, case: dict[str, Any], way: str) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.get("dtype", "fp32")]
        self.model, self.calls = dtensor_model.make_model(dtype), []
        if "folder" in case:  # the bases make state with the first gradient, and torch misses what was never made
            self.model.unused.requires_grad_(False)
        self.parts = dtensor_model.shard(self.model, way, dist.get_world_size())
        self.part = dist.get_rank() // (dist.get_world_size() // self.parts) if way != "none" else 0
        self.optimizer = optimizer_of(self.model, case)
        self.scheduler = InverseSquareDecay(self.optimizer, half_life=5)

    def steps(self, some: range) -> None:
        for step in some:
            self.model(dtensor_model.batch(step).chunk(self.parts)[self.part]).backward()
            with counted(self.calls):
                self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def parameters(self) -> dict[str, torch.Tensor]:
        held = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        return {name: whole(p).float() for name, p in self.model.named_parameters() if id(p) in held}


def train(case: dict[str, Any]) -> dict[str, Any]:
    sharded, alone = Trainer(case, case["way"]), Trainer(case, "none")
    start = alone.parameters()
    for trainer in (sharded, alone):
        trainer.steps(range(case["steps"]))
    return {**worst(sharded.parameters(), alone.parameters(), start), "calls": sharded.calls, "alone": alone.calls}


def muon(case: dict[str, Any]) -> dict[str, Any]:
    """Muon computes in bfloat16, in which ranks and one process differ: so beside torch's own Muon on the same mesh."""
    trainer, twin = Trainer(case, case["way"]), Trainer(case, case["way"])
    base = torch.optim.Muon(twin.optimizer.param_groups[0]["params"], lr=1.0, weight_decay=0.0)
    for each in (trainer, twin):
        each.model(dtensor_model.batch(0).chunk(each.parts)[each.part]).backward()
    start = trainer.parameters()
    with counted(trainer.calls):
        trainer.optimizer.step()
    base.step()
    expected, rate = {}, 0.05
    for name, after in twin.parameters().items():
        u = (start[name] - after).double()
        moved = rate * start[name].norm() * u / u.norm() if u.any() else u  # one parameter is never used
        expected[name] = start[name] * (1 - (rate**2 / 2 if u.any() else 0)) - moved
    return {**worst(trainer.parameters(), expected, start), "calls": trainer.calls, "alone": [0]}


def save(case: dict[str, Any]) -> dict[str, Any]:
    """Also: another optimizer that takes the state in this process goes on to the bit."""
    first, second = Trainer(case, case["way"]), Trainer(case, case["way"])
    first.steps(range(3))
    state = {"model": first.model.state_dict(), "optimizer": get_optimizer_state_dict(first.model, first.optimizer)}
    dcp.save(state, checkpoint_id=case["folder"])
    own = copy.deepcopy([first.optimizer.state_dict(), first.model.state_dict(), first.scheduler.state_dict()])
    second.optimizer.load_state_dict(own[0])
    second.model.load_state_dict(own[1])
    second.scheduler.load_state_dict(own[2])
    first.steps(range(3, 6))
    second.steps(range(3, 6))
    got, expected = first.parameters(), second.parameters()
    if dist.get_rank() == 0:
        torch.save(got, f"{case['folder']}.pt")
    return {"different": [name for name in got if not torch.equal(got[name], expected[name])]}


def load(case: dict[str, Any]) -> dict[str, Any]:
    """What 2 ranks have saved, into another layout."""
    trainer = Trainer(case, case["way"])
    model, optimizer = trainer.model, trainer.optimizer
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=case["folder"])
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for _ in range(3):
        trainer.scheduler.step()
    trainer.steps(range(3, 6))
    expected = torch.load(f"{case['folder']}.pt")
    return worst(trainer.parameters(), expected, expected)


def refuse(case: dict[str, Any]) -> dict[str, Any]:
    """What goes wrong on a mesh, in words."""
    trainers: list[Trainer] = []

    def work() -> None:
        mine = case.get("others", {}) if dist.get_rank() == 1 else {}
        trainers.append(Trainer({**case, "params": {**case.get("params", {}), **mine}}, case["way"]))
        trainers[0].before = trainers[0].parameters()
        trainers[0].steps(range(1))

    text = complaint(work)
    same = all(all(torch.equal(p, t.before[n]) for n, p in t.parameters().items()) for t in trainers)
    return {"text": text, "unchanged": same}


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


def engine_for(case: dict[str, Any], optimizer: bool = True) -> Any:
    import deepspeed

    from tests.distributed.zero_worker import DTYPES, make_model

    config: dict[str, Any] = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "scheduler": case.get("scheduler", {"type": "InverseSquareDecay", "params": {"half_life": 5}}),
    }
    if case["dtype"] != "fp32":
        config["bf16"] = {"enabled": True}
    model = make_model(DTYPES[case["dtype"]])
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model, case), config=config)[0]


def plain(case: dict[str, Any], steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One process without DeepSpeed, with float32 masters: what comes out, and the start."""
    from tests.distributed.zero_worker import DTYPES, make_model

    model, master = make_model(DTYPES[case["dtype"]]), make_model(torch.float32)
    pairs = list(zip(master.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(master, case)
    scheduler = InverseSquareDecay(optimizer, half_life=5)
    for step in range(steps):
        model.zero_grad()
        parts = zero_model.batch(step, 24).chunk(12)
        for part in parts:
            (model(part) / len(parts)).backward()
        for a, b in pairs:  # ZeRO's partitions have zeros where there is no gradient
            a.grad = None if not b.requires_grad else torch.zeros_like(a) if b.grad is None else b.grad.float()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for a, b in pairs:
                b.copy_(a)
    return {name: p.detach().float() for name, p in model.named_parameters()}, start


def zero(case: dict[str, Any]) -> dict[str, Any]:
    from tests.distributed.zero_worker import Counter, full_parameters, train_steps

    engine, counter = engine_for(case), Counter()
    counter.watch(engine)
    train_steps(engine, case, range(case["steps"]))
    expected, start = plain(case, case["steps"])
    counts = sorted({int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state})
    result = worst(full_parameters(engine), expected, start)
    return {**result, "calls": [len(each) for each in counter.calls], "steps": counts}


def zero_resume(case: dict[str, Any]) -> dict[str, Any]:
    from tests.distributed.zero_worker import full_parameters, train_steps

    folder = f"{os.environ['AMOS_TEST_FOLDER']}/{case['name'].replace(' ', '_')}"
    engine = engine_for(case)
    train_steps(engine, case, range(3))
    engine.save_checkpoint(folder, "three")
    train_steps(engine, case, range(3, 6))
    again = engine_for(case)
    again.load_checkpoint(folder, "three")
    train_steps(again, case, range(3, 6))
    first, second = full_parameters(engine), full_parameters(again)
    return {"different": [name for name in first if not torch.equal(first[name], second[name])]}


def zero_refuse(case: dict[str, Any]) -> dict[str, Any]:
    from tests.distributed.zero_worker import full_parameters, train_steps

    engine = engine_for(case)
    before = full_parameters(engine)
    text = complaint(lambda: train_steps(engine, case, range(1)))
    return {"text": text, "unchanged": all(torch.equal(p, before[n]) for n, p in full_parameters(engine).items())}


def scheduler(case: dict[str, Any]) -> dict[str, Any]:
    """AdamW and a decay from DeepSpeed's JSON: lr and weight_decay of every step."""
    from tests.distributed.zero_worker import engine_for as from_json
    from tests.distributed.zero_worker import train_steps

    engine, seen = from_json(case, 24), []
    for step in range(case["steps"]):
        group = engine.optimizer.param_groups[0]
        seen.append([float(group["lr"]), float(group["weight_decay"])])
        train_steps(engine, case, range(step, step + 1))
    return {"seen": seen, "optimizer": type(engine.basic_optimizer).__name__}


if __name__ == "__main__":
    if any("stage" in case for case in received()):
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    do = {"train": train, "muon": muon, "save": save, "load": load, "refuse": refuse}
    serve({**do, "zero": zero, "zero resume": zero_resume, "zero refuse": zero_refuse, "scheduler": scheduler})
