"""Real ranks that draw the same random cases from one seed: DTensors, fully_shard and ZeRO-like partitions.

Its argument: {"seed", "cases"}. Reports how many of each kind it has done, and what was wrong.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from amos_dist import Amos
from tests.conftest import relative_error
from tests.distributed.harness import received, report
from tests.fuzz.cases import keywords, shape, values
from tests.fuzz.oracle import Oracle, draw_gradients, members, slack_of_few

warnings.filterwarnings("ignore")
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 2e-2}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def compare(sharded: Amos, alone: Amos, oracle: Oracle, what: str) -> list[str]:
    """What of the sharded optimizer, put together from all ranks, is not the reference's."""
    found = []
    for number, ((param, name, _), (other, _, _)) in enumerate(zip(members(sharded), members(alone), strict=True)):
        expected = {"": oracle.params[number], **oracle.states[number]}
        if not other.numel() or len(expected) == 1:
            continue
        bound = TOLERANCES[other.dtype] * slack_of_few(other.numel())
        for key, value in expected.items():
            got = whole(param if not key else sharded.state[param][key])
            limit = 0.0 if key == "step" else max(bound, 2e-2 if got.dtype == torch.bfloat16 else 0.0)
            error = relative_error(got, torch.as_tensor(value))
            if not error <= limit:
                found.append(f"{what}: {name} {tuple(other.shape)} {other.dtype} {key}: {error:.3g}")
    return found


def settings(draw: Random, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """Keywords with which a cut parameter is the whole one but for the order of sums.

    Not so 8-bit momentum, whose runs begin at each piece: tests/unit/test_eight_bits.py has the bound for that.
    """
    found = {**keywords(draw, shapes), "capturable": False}
    return {**found, "momentum_dtype": None} if found.get("momentum_dtype") == "int8" else found


def drawn(draw: Random, dtypes: tuple[torch.dtype, ...], dims: tuple[int, int]) -> list[dict[str, Any]]:
    """Parameter groups for one process, from which the sharded ones are made."""
    groups = []
    for number in range(draw.randint(1, 2)):
        shapes = [shape(draw, dims=dims, largest=300) for _ in range(draw.randint(1, 3))]
        dtype = draw.choice(dtypes)
        named = [
            (f"g{number}.p{i}", (values(draw.randrange(10**6), size, dtype) / 2).requires_grad_())
            for i, size in enumerate(shapes)
        ]
        given = {**settings(draw, shapes), "stochastic_rounding": False}
        groups.append({"params": named, **given, "lr": draw.choice((0.05, 0.01))})
    return groups


def placed(draw: Random, param: Tensor, mesh: DeviceMesh) -> list[Placement]:
    """Any cut: uneven, in several dimensions, over more ranks than there are rows; or none."""
    found: list[Placement] = [
        Shard(draw.randrange(param.dim())) if param.dim() and draw.randrange(4) else Replicate()
        for _ in range(mesh.ndim)
    ]
    return found


def dtensors(draw: Random, meshes: list[DeviceMesh]) -> list[str]:
    """Placements of every kind; gradients that some ranks do not have, which count as zeros there."""
    groups = drawn(draw, (torch.float32, torch.float64, torch.bfloat16), (0, 4))
    alone = Amos(groups, lr=0.1)
    oracle = Oracle(alone)
    copies, described = [], []
    for each in groups:
        some = []
        for name, param in each["params"]:
            mesh = draw.choice(meshes)
            placements = placed(draw, param, mesh)
            described.append(f"{tuple(param.shape)} {mesh.shape} {placements}")
            some.append((name, nn.Parameter(distribute_tensor(param.detach().clone(), mesh, placements))))
        copies.append({**each, "params": some})
    sharded = Amos(copies, lr=0.1)
    found: list[str] = []
    for _ in range(draw.randint(1, 3)):
        draw_gradients(
            alone, lambda p: values(draw.randrange(10**6), tuple(p.shape), p.dtype, draw.choice(("plain", "rows")))
        )
        for (param, _, _), (other, _, _) in zip(members(sharded), members(alone), strict=True):
            param.grad = distribute_tensor(other.grad, param.device_mesh, param.placements)
            if draw.randrange(6) == 0:
                param.grad = other.grad = None
        oracle.step(alone)
        sharded.step()
        found += compare(sharded, alone, oracle, f"dtensors {described}")
    return found


class Bag(nn.Module):
    """Parameters of any shape; the loss of one is a product with a batch's own numbers."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.held = nn.ParameterList([nn.Parameter(param.detach().clone()) for param in params])

    def forward(self, batch: int) -> Tensor:
        pairs = [(p, values(batch + 7 * i, tuple(p.shape), p.dtype)) for i, p in enumerate(self.held)]
        return torch.stack([(torch.tanh(p) * x).sum() for p, x in pairs]).sum()


def fsdp(draw: Random, meshes: list[DeviceMesh]) -> list[str]:
    """fully_shard, each parameter along a dimension of its own; torch cuts only the first one unevenly."""
    mesh = meshes[0]
    ranks, dtype = mesh.size(), draw.choice((torch.float32, torch.float64))
    shapes = [shape(draw, dims=(1, 4), largest=300, empty=False) for _ in range(draw.randint(1, 4))]
    start = [values(draw.randrange(10**6), size, dtype) / 2 for size in shapes]
    dims = [draw.choice([d for d in range(len(size)) if d == 0 or size[d] % ranks == 0]) for size in shapes]
    model, alone = Bag(start), Bag(start)
    number = {id(param): i for i, param in enumerate(model.held)}
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda param: Shard(dims[number[id(param)]]))
    given = {**settings(draw, shapes), "lr": 0.03}
    one, other = Amos(model.named_parameters(), **given), Amos(alone.named_parameters(), **given)
    oracle, found = Oracle(other), []
    for _ in range(draw.randint(1, 3)):
        seeds = [draw.randrange(10**6) for _ in range(ranks)]
        model(seeds[dist.get_rank()]).backward()
        (torch.stack([alone(seed) for seed in seeds]).sum() / ranks).backward()
        oracle.step(other)
        one.step()
        for param, expected in zip(alone.held, oracle.params, strict=True):
            param.data.copy_(expected)
        found += compare(one, other, oracle, f"fully_shard {shapes} {dims}")
        one.zero_grad()
        other.zero_grad()
    return found


class Zero3:
    """What stage 3 leaves on parameters: see amos_dist/sharding/zero.py."""

    def __init__(self) -> None:
        self.fp32_partitioned_groups_flat: list[Tensor] = []
        self.fp16_groups: list[list[Any]] = []
        self.grad_position: dict[int, list[int]] = {}

    def get_param_id(self, param: Any) -> int:
        return id(param)


def zero(draw: Random, meshes: list[DeviceMesh]) -> list[str]:
    """Flat partitions as DeepSpeed's, in any order and with gaps, found by the addresses of the parameters."""
    group, rank, ranks = meshes[0].get_group(), dist.get_rank(), dist.get_world_size()
    groups, stage = drawn(draw, (torch.float32,), (0, 4)), draw.choice((2, 3))
    if any(not sum(p.numel() for _, p in each["params"]) for each in groups):
        return []  # known: a partition of nothing cannot be told from a stranger (docs/fuzz.md)
    alone = Amos(groups, lr=0.1)
    oracle = Oracle(alone)
    copies = [{**e, "params": [(n, p.detach().clone().requires_grad_()) for n, p in e["params"]]} for e in groups]
    sharded = Amos(copies, lr=0.1)
    made, cuts = Zero3(), []
    for each in sharded.param_groups:
        params, cut = each["params"], _stage3 if stage == 3 else _stage2
        flat, part = cut(draw, params, group, made)
        each["params"] = [flat.requires_grad_()]
        cuts.append(part)
    for _ in range(draw.randint(1, 3)):
        draw_gradients(
            alone, lambda p: values(draw.randrange(10**6), tuple(p.shape), p.dtype, draw.choice(("plain", "rows")))
        )
        oracle.step(alone)
        for each, other, part in zip(sharded.param_groups, alone.param_groups, cuts, strict=True):
            each["params"][0].grad = part([p.grad for p in other["params"]])
        sharded.step()
    found = []
    for i, (each, other, part) in enumerate(zip(sharded.param_groups, alone.param_groups, cuts, strict=True)):
        first = sum(len(before["params"]) for before in alone.param_groups[:i])
        expected = part(oracle.params[first : first + len(other["params"])])
        error = relative_error(each["params"][0].detach(), expected)
        if not error <= TOLERANCES[torch.float32]:
            found.append(
                f"stage {stage}: {[tuple(p.shape) for p in other['params']]} rank {rank} of {ranks}: {error:.3g}"
            )
    return found


Part = Callable[[list[Tensor]], Tensor]


def _stage2(draw: Random, params: list[Any], group: Any, _: Zero3) -> tuple[Tensor, Part]:
    """One buffer of all parameters, in any order and with gaps, in as many equal parts as there are ranks."""
    order = list(range(len(params)))
    draw.shuffle(order)
    places, used = {}, 0
    for i in order:
        places[i] = used
        used += params[i].numel() and params[i].numel() + draw.choice((0, 0, 3))  # no gap behind nothing
    size = max(1, -(-used // dist.get_world_size(group)))
    rank = dist.get_rank(group)

    def laid_out(tensors: list[Tensor]) -> Tensor:
        buffer = torch.zeros(size * dist.get_world_size(group))
        for i, tensor in enumerate(tensors):
            buffer[places[i] : places[i] + tensor.numel()] = tensor.detach().reshape(-1)
        return buffer

    buffer = laid_out(params)
    for i, param in enumerate(params):
        param.data = buffer[places[i] : places[i] + param.numel()].view(param.shape)
        param._dp_group = group

    def part(tensors: list[Tensor]) -> Tensor:
        return laid_out(tensors)[rank * size : (rank + 1) * size].clone()

    return part(params), part


def _stage3(draw: Random, params: list[Any], group: Any, made: Zero3) -> tuple[Tensor, Part]:
    """Every parameter in equal parts, padding at the end."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def part(tensors: list[Tensor]) -> Tensor:
        parts = []
        for tensor in tensors:
            size = -(-tensor.numel() // ranks)
            padded = torch.zeros(size * ranks)
            padded[: tensor.numel()] = tensor.detach().reshape(-1)
            parts.append(padded[rank * size : (rank + 1) * size])
        return torch.cat(parts).clone()

    flat = part(params)
    for param in params:
        size = -(-param.numel() // ranks)
        param._z3_optimizer, param.ds_process_group, param.ds_numel = made, group, param.numel()
        param.partition_numel = lambda size=size: size
        param.ds_tensor = part([param])
    made.fp32_partitioned_groups_flat.append(flat)
    made.fp16_groups.append(list(params))
    return flat, part


def main(seed: int, cases: int) -> dict[str, Any]:
    """Ranks that disagree about an error would wait for each other: it is told to all, and ends the run."""
    ranks = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (ranks,)), *(init_device_mesh("cpu", s) for s in ((ranks, 1), (1, ranks)))]
    kinds, done, wrong = (dtensors, fsdp, zero), Counter[str](), []
    for case in range(cases):
        draw = Random(f"{seed} {case}")
        kind = draw.choice(kinds)
        try:
            found = kind(draw, meshes)
        except Exception:
            wrong.append(f"case {case} of seed {seed}: {traceback.format_exc()[-1500:]}")
            break
        wrong += [f"case {case} of seed {seed}: {each}" for each in found]
        done[kind.__name__] += 1
    return {"done": dict(done), "wrong": wrong[:10]}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    report(main(**received()))
    os._exit(0)
