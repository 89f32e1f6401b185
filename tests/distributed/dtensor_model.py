"""The model that FSDP2, HSDP and tensor parallel train, its batches, and its ways onto a mesh."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

EXPERTS = [{"match": "experts", "row_dims": 2}]  # (E, out, in): two dimensions of rows


class Model(nn.Module):
    """Odd sizes: 2 rows are too few for 3 ranks; 0-d, 1-d and 3-d parameters, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 14)
        self.down = nn.Linear(14, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.whole = nn.Identity()  # where the ranks of sequence parallel put their parts together
        self.conv = nn.Conv1d(6, 7, 3, padding=1)
        self.two = nn.Linear(7, 2)
        self.experts = nn.Parameter(torch.randn(3, 5, 2) / 2)
        self.head = nn.Linear(5, 11)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = self.whole(self.norm(h + self.down(torch.tanh(self.up(h)))))
        h = torch.tanh(self.two(self.conv(h.transpose(1, 2)).transpose(1, 2)))
        h = torch.einsum("bti,eoi->bto", h, torch.tanh(self.experts))
        return nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), x.flatten())


def make_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    torch.manual_seed(1)
    with torch.device(device):
        return Model().to(dtype)


def batch(step: int, size: int = 12, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 11, (size, length), generator=torch.Generator().manual_seed(100 + step))


def shard(model: Model, way: str, ranks: int, **keywords: object) -> int:
    """Puts `model` on a mesh of all ranks, in place. Returns in how many parts these cut a batch.

    Args:
        way: "fsdp", "hsdp", "tp", "fsdp tp", "sp" (tensor parallel with a norm that is sequence parallel), "fsdp sp",
            or "none". keywords: of fully_shard.
    """
    if way == "none":
        return 1
    if way == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
    elif way in ("tp", "sp"):
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    else:
        names = ("replicate", "shard") if way == "hsdp" else ("dp", "tp")
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=names)
    if "tp" in way or "sp" in way:
        between = Shard(1) if "sp" in way else Replicate()
        plan: dict[str, ParallelStyle] = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
            "up": ColwiseParallel(input_layouts=between),
            "down": RowwiseParallel(output_layouts=between),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        if "sp" in way:
            plan["norm"] = SequenceParallel(use_local_output=False)
            plan["whole"] = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
        parallelize_module(model, mesh["tp"], plan)
    if way in ("tp", "sp"):
        return 1
    crossed = way.startswith("fsdp ")
    over = mesh["dp"] if crossed else mesh
    for module in (model.up, model.conv, model):
        fully_shard(module, mesh=over, **keywords)
    return 2 if crossed else ranks
