"""Trains a small model on DTensors for each case, and the same in one process, and reports the difference.

A case: {"name", "do": a function below, "way": see dtensor_model.shard, "params": Amos's keywords, "steps", …}.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import amos_dist
from amos_dist.reference import amos_step
from tests.distributed.dtensor_model import EXPERTS, batch, make_model, shard
from tests.distributed.harness import complaint, relative, serve
from tests.distributed.waves import in_waves

warnings.filterwarnings("ignore")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def worst_of(differences: dict[str, float]) -> dict[str, Any]:
    where = max(differences, key=lambda name: differences[name] if differences[name] == differences[name] else 1e9)
    return {"worst": differences[where], "where": where}


@contextlib.contextmanager
def counted(calls: list[list[int]]) -> Iterator[None]:
    """Notes the numbers of each all-reduce of one step."""
    real = dist.all_reduce
    calls.append([])

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[-1].append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = count
    try:
        yield
    finally:
        dist.all_reduce = real


def optimizer_of(model: nn.Module, case: dict[str, Any]) -> amos_dist.Amos:
    params = {"rules": EXPERTS, **case["params"]}
    if case.get("paper"):
        return amos_dist.Amos(amos_dist.param_groups(model, sigma="paper"), **params)
    if case.get("groups"):
        return amos_dist.Amos(amos_dist.param_groups(model, sigma="auto"), **params)
    return amos_dist.Amos(model.named_parameters(), **params)


class Trainer:
    """A model on a mesh, and its optimizer."""

    def __init__(self, case: dict[str, Any], way: str) -> None:
        keywords: dict[str, Any] = {}
        if case.get("offload") and way != "none":
            keywords["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if case.get("mixed") and way != "none":
            keywords["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.case, self.calls = case, []
        meta = case.get("meta") and way != "none"
        self.model = make_model(DTYPES[case.get("dtype", "fp32")], "meta" if meta else "cpu")
        self.parts = shard(self.model, way, dist.get_world_size(), **keywords)
        self.part = dist.get_rank() // (dist.get_world_size() // self.parts) if way != "none" else 0
        if meta:
            self.optimizer = optimizer_of(self.model, case)
            self.model.to_empty(device="cpu")
            start = dict(make_model().named_parameters())
            with torch.no_grad():
                for name, param in self.model.named_parameters():
                    param.copy_(distribute_tensor(start[name].detach(), param.device_mesh, param.placements))
        else:
            self.optimizer = optimizer_of(self.model, case)
        self.forward = torch.compile(self.model, backend="eager") if case.get("compile") else self.model

    def step(self, number: int) -> None:
        pieces = self.case.get("accumulate", 1)
        for piece in batch(number, length=self.case.get("length", 9)).chunk(pieces):
            (self.loss(piece) / pieces).backward()
        if clip := self.case.get("clip"):
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        with counted(self.calls):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, piece: torch.Tensor) -> torch.Tensor:
        """Of this rank's part of the batch."""
        return self.forward(piece.chunk(self.parts)[self.part])

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: whole(param).float() for name, param in self.model.named_parameters()}

    def states(self) -> dict[str, torch.Tensor]:
        """As it is saved: momentum of 8 bits in float32."""
        saved = self.optimizer.state_dict()["state"]
        numbers = {id(tensor): number for number, tensor in enumerate(self.optimizer._tensors())}
        return {
            f"{name} {key}": whole(value)
            for name, param in self.model.named_parameters()
            for key, value in saved.get(numbers[id(param)], {}).items()
        }


@in_waves
def train(case: dict[str, Any]) -> dict[str, Any]:
    sharded, alone = Trainer(case, case["way"]), Trainer(case, "none")
    for step in range(case["steps"]):
        sharded.step(step)
        alone.step(step)
    got, expected = sharded.parameters(), alone.parameters()
    start = dict(make_model(DTYPES[case.get("dtype", "fp32")]).named_parameters())
    states, wanted = sharded.states(), alone.states()
    odd = [key for key in states if key in wanted and states[key].shape != wanted[key].shape]
    locals_ = [getattr(value, "_local_tensor", value) for s in sharded.optimizer.state.values() for value in s.values()]
    return {
        **worst_of({name: relative(got[name], expected[name]) for name in expected}),
        "state": worst_of({key: relative(states[key], wanted[key]) for key in wanted}),
        "odd": odd,
        "keys": sorted(set(wanted) ^ set(states)),
        "moved": float((got["up.weight"] - start["up.weight"]).abs().max()),
        "steps": sorted({int(state["step"]) for state in sharded.optimizer.state.values()}),
        "dtypes": sorted({str(value.dtype) for value in locals_}),
        "calls": sharded.calls,
        "shapes": {name: list(param.shape) for name, param in sharded.model.named_parameters()},
        "held": {n: list(getattr(p, "_local_tensor", p).shape) for n, p in sharded.model.named_parameters()},
    }


@in_waves
def synthetic(case: dict[str, Any]) -> dict[str, Any]:
    """Parameters of given shapes and placements, whose gradients are made up, some of them missing on some ranks.

    case["meshes"]: their shapes; case["tensors"]: [shape, number of the mesh, placements (a dimension or None), kind,
    row_dims]; case["missing"]: whether gradients are; case["partial"]: they are still to be added up.
    """
    meshes = [init_device_mesh("cpu", tuple(shape)) for shape in case["meshes"]]
    params, references, states, settings = [], [], [], {**case["params"]}
    dtype = DTYPES[case.get("dtype", "fp32")]
    groups = []
    for i, (shape, mesh, dims, kind, row_dims) in enumerate(case["tensors"]):
        full = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        params.append(nn.Parameter(distribute_tensor(full.clone(), meshes[mesh], placements)))
        references.append(full)
        states.append({})
        groups.append({"params": [(f"p{i}", params[-1])], "moments": kind, "row_dims": row_dims})
    optimizer = amos_dist.Amos(groups, **settings)
    calls: list[list[int]] = []
    for step in range(case["steps"]):
        for i, (param, reference) in enumerate(zip(params, references, strict=True)):
            full = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(dtype)
            grad = distribute_tensor(full.clone(), param.device_mesh, param.placements)
            there = True
            if case.get("missing"):
                coordinates = zip(param.device_mesh.get_coordinate(), param.placements, strict=True)
                here = sum((k + 1) * c for k, (c, p) in enumerate(coordinates) if p != Replicate())
                there = (here + i + step) % 3 == 0 and (i + step) % 4 != 0
            part = grad._local_tensor * there
            grad = DTensor.from_local(part, param.device_mesh, param.placements, run_check=False, shape=full.shape,
                                      stride=full.stride())  # fmt: skip
            full = whole(grad)
            anywhere = torch.tensor(float(there))
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            if case.get("partial") and param.device_mesh.ndim == 1:
                share = full * (0.25 if dist.get_rank() == 0 else 0.75 / (dist.get_world_size() - 1))
                grad = DTensor.from_local(share, param.device_mesh, [Partial()], run_check=False)
            param.grad = grad if there else None
            if anywhere:
                moments, row_dims = case["tensors"][i][3:]
                own = {"seed": amos_dist.tables.seed_of_parameter(settings.get("seed", 0), i)}
                given = {**settings, **own, "moments": moments, "row_dims": row_dims}
                amos_step(reference, full, states[i], **given)
        with counted(calls):
            optimizer.step()
    differences = {f"p{i}": relative(whole(p), r) for i, (p, r) in enumerate(zip(params, references, strict=True))}
    for i, (param, state) in enumerate((p, s) for p, s in zip(params, states, strict=True) if p.numel()):
        for key, value in state.items():
            differences[f"p{i} {key}"] = relative(whole(optimizer.state[param][key]), torch.as_tensor(value))
    return {**worst_of(differences), "calls": calls}


def options_of(case: dict[str, Any]) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=case.get("flatten", False))


def optimizer_state(trainer: Trainer) -> dict[str, Any]:
    return get_optimizer_state_dict(trainer.model, trainer.optimizer, options=options_of(trainer.case))


def save(case: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves, and goes on: what the other layouts must do after loading."""
    trainer = Trainer(case, case["way"])
    for step in range(5):
        trainer.step(step)
    folder = Path(case["folder"])
    model, state = trainer.model.state_dict(), optimizer_state(trainer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    expected = {"states": trainer.states(), "before": trainer.parameters()}
    for step in range(5, 15):
        trainer.step(step)
    expected["after"] = trainer.parameters()
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    return {}


def load(case: dict[str, Any]) -> dict[str, Any]:
    trainer = Trainer(case, case["way"])
    folder = Path(case["folder"])
    model, state = trainer.model.state_dict(), optimizer_state(trainer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    trainer.model.load_state_dict(model)
    set_optimizer_state_dict(trainer.model, trainer.optimizer, state, options=options_of(case))
    expected = torch.load(folder / "expected.pt")
    states, parameters = trainer.states(), trainer.parameters()
    different = [key for key, value in expected["states"].items() if not torch.equal(states[key], value)]
    different += [key for key, value in expected["before"].items() if not torch.equal(parameters[key], value)]
    odd = [key for key in states if states[key].dtype != expected["states"][key].dtype]
    dtypes = sorted({str(value.dtype) for value in states.values()})
    for step in range(5, 15):
        trainer.step(step)
    after = trainer.parameters()
    return {
        "different": different,
        "dtypes": dtypes,
        "odd": odd,
        "keys": sorted(set(states) ^ set(expected["states"])),
        **worst_of({name: relative(after[name], value) for name, value in expected["after"].items()}),
    }


def refuse(case: dict[str, Any]) -> dict[str, Any]:
    """What goes wrong, in words."""
    trainer = Trainer(case, case["way"])
    before = trainer.parameters()
    states = trainer.optimizer.state
    if dist.get_rank() == 1:
        state = states[trainer.model.up.weight]
        state["decay"] = state["decay"].to_local()[:1].clone()
    text = complaint(lambda: trainer.step(0))
    same = all(torch.equal(value, before[name]) for name, value in trainer.parameters().items())
    return {"text": text, "unchanged": same}


def differ(case: dict[str, Any]) -> dict[str, Any]:
    """The last rank was started with something else: what each rank says of it."""
    mine = {**case, **(case["other"] if dist.get_rank() == dist.get_world_size() - 1 else {})}
    if version := mine.get("version"):
        amos_dist.ops.__version__ = version
    trainer = Trainer(mine, case["way"])
    before = trainer.parameters()
    text = complaint(lambda: trainer.step(0))
    amos_dist.ops.__version__ = amos_dist.__version__
    same = all(torch.equal(value, before[name]) for name, value in trainer.parameters().items())
    return {"text": text, "unchanged": same}


def dry(case: dict[str, Any]) -> dict[str, Any]:
    """Asking for the state before the first step changes nothing."""
    trainer = Trainer(case, case["way"])
    before = trainer.parameters()
    get_optimizer_state_dict(trainer.model, trainer.optimizer)
    same = all(torch.equal(value, before[name]) for name, value in trainer.parameters().items())
    steps = sorted({int(state["step"]) for state in trainer.optimizer.state.values()})
    return {"unchanged": same, "steps": steps, "states": len(trainer.optimizer.state)}


def again(case: dict[str, Any]) -> dict[str, Any]:
    """State that goes through a file of torch.save, and whole through the first rank, is the same to the bit."""
    trainer = Trainer(case, case["way"])
    for step in range(3):
        trainer.step(step)
    file = io.BytesIO()
    torch.save(copy.deepcopy(trainer.optimizer.state_dict()), file)
    file.seek(0)
    model, second, third = trainer.model.state_dict(), Trainer(case, case["way"]), Trainer(case, case["way"])
    second.optimizer.load_state_dict(torch.load(file, weights_only=False))
    full = get_optimizer_state_dict(trainer.model, trainer.optimizer, options=StateDictOptions(full_state_dict=True))
    refused = ""
    try:
        trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": numbered(full["state"])})
    except ValueError as error:
        refused = str(error)
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    full = full if dist.get_rank() == 0 else {}
    set_optimizer_state_dict(third.model, third.optimizer, full, options=from_first)
    for other in (second, third):
        other.model.load_state_dict(model)
    found: list[str] = []
    for step in (3, 4):  # before and after a step
        states, parameters = trainer.states(), trainer.parameters()
        for other in (second, third):
            now, theirs = other.states(), other.parameters()
            found += [key for key, value in states.items() if not torch.equal(now[key], value)]
            found += [key for key, value in parameters.items() if not torch.equal(theirs[key], value)]
        for each in (trainer, second, third):
            each.step(step)
    return {"different": found, "refused": refused}


def numbered(states: dict[str, Any]) -> dict[int, Any]:
    return dict(enumerate(states.values()))


def follow(case: dict[str, Any]) -> dict[str, Any]:
    """Weights that are loaded after some steps reach the masters."""
    trainer = Trainer(case, case["way"])
    for step in range(2):
        trainer.step(step)
    moved = trainer.parameters()
    start = {name: param.detach() for name, param in make_model(DTYPES[case["dtype"]]).named_parameters()}
    set_model_state_dict(trainer.model, dict(start), options=StateDictOptions(full_state_dict=True))
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-9
    trainer.step(2)
    masters = {name: value for name, value in trainer.states().items() if name.endswith(" master")}
    left = {name: relative(value, start[name.removesuffix(" master")]) for name, value in masters.items()}
    return {**worst_of(left), "masters": len(masters), "moved": relative(moved["up.weight"], start["up.weight"])}


def lonely(case: dict[str, Any]) -> dict[str, Any]:
    """Steps for which no rank, and for which only the first rank has a gradient."""
    trainer = Trainer(case, case["way"])
    with counted(trainer.calls):
        trainer.optimizer.step()
    param = trainer.model.up.weight
    if dist.get_rank() == 0:
        param.grad = torch.ones_like(param)
    before = trainer.parameters()
    with counted(trainer.calls):
        trainer.optimizer.step()
    moved = [name for name, value in trainer.parameters().items() if not torch.equal(value, before[name])]
    steps = {name: int(trainer.optimizer.state[p]["step"]) for name, p in trainer.model.named_parameters()}
    return {"moved": moved, "stepped": [name for name, count in steps.items() if count], "calls": trainer.calls}


@in_waves
def scaled(case: dict[str, Any]) -> dict[str, Any]:
    """Gradients that are infinite in one step, on one rank, in what is cut in one way only; with GradScaler or not."""
    sharded, alone = Trainer(case, case["way"]), Trainer(case, "none")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=case.get("scaler", True))
    scales, moved, errors = [], [], []
    for step in range(case["steps"]):
        before = sharded.parameters()
        scaler.scale(sharded.loss(batch(step))).backward()
        if step == 1 and dist.get_rank() == 1:
            sharded.model.down.weight.grad.to_local()[-1, -1] = float("inf")
        if case.get("unscale"):
            scaler.unscale_(sharded.optimizer)
        with counted(sharded.calls):
            errors.append(complaint(functools.partial(scaler.step, sharded.optimizer)))
        scaler.update()
        sharded.optimizer.zero_grad()
        moved.append(any(not torch.equal(value, before[name]) for name, value in sharded.parameters().items()))
        scales.append(scaler.get_scale())
        if step != 1:
            alone.step(step)
    got, expected = sharded.parameters(), alone.parameters()
    worst = worst_of({name: relative(got[name], expected[name]) for name in expected})
    steps = sorted({int(state["step"]) for state in sharded.optimizer.state.values()})
    told = {"errors": errors, "skipped": sharded.optimizer.skipped_steps}
    return {**worst, **told, "moved": moved, "scales": scales, "steps": steps, "calls": sharded.calls}


def stale(case: dict[str, Any]) -> dict[str, Any]:
    """A parameter has NaN in one step, and no gradient in the next."""
    sharded = Trainer(case, case["way"])
    before = sharded.parameters()
    for step in range(2):
        sharded.loss(batch(step)).backward()
        if step == 0 and dist.get_rank() == 1:
            sharded.model.down.weight.grad.to_local()[-1, -1] = float("nan")
        if step == 1:
            sharded.model.down.weight.grad = None
        sharded.optimizer.step()
        sharded.optimizer.zero_grad()
    moved = [name for name, value in sharded.parameters().items() if not torch.equal(value, before[name])]
    return {"moved": moved, "skipped": sharded.optimizer.skipped_steps}


def experts(case: dict[str, Any]) -> dict[str, Any]:
    """Each rank has an expert of its own, of another name, scale and dtype, before what all ranks cut.

    In the last step one rank's gradient is not finite: no rank takes it, of its own expert neither.
    """
    mesh, rank = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank()
    whole_dense = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    dense = nn.Parameter(distribute_tensor(whole_dense, mesh, [Shard(0)]))
    own = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(2 + rank)).double() * (1 + rank))
    optimizer = amos_dist.Amos([(f"experts.{rank}", own), ("dense", dense)], **case["params"])
    for step in range(3):
        dense.grad, own.grad = torch.ones_like(dense), torch.ones_like(own)
        if step == 2 and rank == 1:
            dense.grad.to_local()[0, 0] = float("nan")
        optimizer.step()
    steps = [int(optimizer.state[param]["step"]) for param in (dense, own)]
    return {"steps": steps, "skipped": optimizer.skipped_steps}


def unequal(case: dict[str, Any]) -> dict[str, Any]:
    """Ranks 0 and 1 cut an expert, before or behind what all ranks cut, and a monitor watches."""
    everybody, few = (DeviceMesh("cpu", list(range(size))) for size in (dist.get_world_size(), 2))
    here = few.get_coordinate() is not None
    shapes = {"expert": (8, 3), "dense": (12, 5), "other": (7, 4)}
    names = ["dense", "other"]
    if here:
        names.insert(2 if case["last"] else 0, "expert")
    full = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) for name, shape in shapes.items()
    }
    params = {
        name: nn.Parameter(distribute_tensor(full[name].clone(), few if name == "expert" else everybody, [Shard(0)]))
        for name in names
    }
    optimizer = amos_dist.Amos(list(params.items()), **case["params"])
    monitor = amos_dist.Monitor(optimizer, every=1)
    states: dict[str, dict[str, Any]] = {name: {} for name in names}
    for step in range(3):
        for name in names:
            grad = torch.randn(shapes[name], generator=torch.Generator().manual_seed(10 * step + len(name)))
            params[name].grad = distribute_tensor(grad.clone(), params[name].device_mesh, [Shard(0)])
            amos_step(full[name], grad, states[name], moments="factored", **case["params"])
        optimizer.step()
    worst = worst_of({name: relative(whole(param), full[name]) for name, param in params.items()})
    seen = monitor.last
    assert seen is not None
    norms = {name: seen.values[name]["update_norm"] for name in names}
    return {**worst, "skipped": optimizer.skipped_steps, "norms": norms}


def early(case: dict[str, Any]) -> dict[str, Any]:
    """Groups that were made before the model was sharded follow its parameters."""
    model = make_model()
    groups = amos_dist.param_groups(model, sigma="paper")
    shard(model, case["way"], dist.get_world_size())
    optimizer = amos_dist.Amos(groups, **case["params"])
    names = {
        id(p): n for group in optimizer.param_groups for n, p in zip(group["param_names"], group["params"], strict=True)
    }
    return {"wrong": [name for name, param in model.named_parameters() if names.get(id(param)) != name]}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    do = (
        train,
        synthetic,
        save,
        load,
        refuse,
        differ,
        dry,
        again,
        follow,
        lonely,
        scaled,
        stale,
        experts,
        unequal,
        early,
    )
    serve({each.__name__: each for each in do})
