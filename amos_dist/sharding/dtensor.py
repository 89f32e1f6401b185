"""DTensors: FSDP2, HSDP, tensor parallel and what is made of them. All that is needed is on the parameter itself.

Each dimension of the mesh cuts rows, or cuts columns, or replicates. Sums over rows' elements are added up over the
dimensions that cut columns, those over columns' elements over the ones that cut rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout, Original
from .piece import Tile
from .reduce import Pending


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor. Does not load their module, which takes a second: without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, without a copy and unknown to autograd; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def local_gradients(params: Sequence[Any]) -> list[Tensor | None]:
    """The gradients of what this rank holds of each parameter.

    Tensor parallel may leave sums that are still to be added up over ranks, or whole gradients of cut parameters: they
    are brought to the parameter's placements. Sums take one all-reduce for each process group; every rank of it must
    have those gradients.

    Raises:
        RuntimeError: a parameter is a DTensor and its gradient is not.
    """
    grads = [param.grad for param in params]
    odd = [
        i
        for i, (param, grad) in enumerate(zip(params, grads, strict=True))
        if grad is not None and is_dtensor(param) and getattr(grad, "placements", None) != param.placements
    ]
    sums: dict[tuple[Any, torch.dtype], list[int]] = {}
    for i in odd:
        param, grad = params[i], grads[i]
        if not is_dtensor(grad):
            raise RuntimeError(
                f"the gradient of a DTensor of shape {tuple(param.shape)} is a plain tensor. "
                "Give it as a DTensor: torch.distributed.tensor.distribute_tensor."
            )
        pairs = zip(grad.placements, param.placements, strict=True)
        differ = [dim for dim, (has, wanted) in enumerate(pairs) if has != wanted]
        if all(_is_sum(grad.placements[dim]) and param.placements[dim].is_replicate() for dim in differ):
            for dim in differ:
                sums.setdefault((param.device_mesh.get_group(dim), grad.dtype), []).append(i)
        else:
            grads[i] = grad.redistribute(param.device_mesh, param.placements)
    found = [None if grad is None else _finished(local_of(grad)) for grad in grads]
    for (group, _), some in sums.items():
        parts = [part for i in some if (part := found[i]) is not None]
        flat = torch.cat([part.reshape(-1) for part in parts])
        Pending(flat, group).wait()
        for i, part, total in zip(some, parts, flat.split([part.numel() for part in parts]), strict=True):
            found[i] = total.view(part.shape)
    return found


def _is_sum(placement: Any) -> bool:
    return placement.is_partial() and getattr(placement, "reduce_op", "") == "sum"


def _finished(local: Any) -> Tensor:
    """A collective of the backward pass may still be under way."""
    return local.wait() if hasattr(local, "wait") else local


def cut_dim(placement: Any) -> int | None:
    """The tensor dimension that a mesh dimension of this placement cuts; None: it replicates.

    Asked by attribute: torch's _StridedShard (FSDP over tensor parallel) is no Shard.
    """
    return None if placement.is_replicate() else placement.dim


def refuse_unplaced(param: Any, name: str) -> None:
    """Raises:
    RuntimeError: the parts of the DTensor `param` are no rectangles of it.
    """
    for placement in param.placements:
        if not placement.is_replicate() and not isinstance(getattr(placement, "dim", None), int):
            raise RuntimeError(
                f"parameter {name!r} has the placement {placement}, which is not known here. "
                "Use Shard and Replicate, as fully_shard and parallelize_module do."
            )


def groups_over(param: Any, dims: Container[int | None]) -> tuple[Any, ...]:
    """The process groups of those mesh dimensions that cut any of the dimensions `dims` of `param`; None: replicate."""
    mesh = param.device_mesh
    cuts = enumerate(map(cut_dim, param.placements))
    return tuple(mesh.get_group(i) for i, dim in cuts if dim in dims and mesh.size(i) > 1)


def find(param: Any, original: Original) -> Layout:
    """The layout of a parameter that is a DTensor."""
    held, row_dims = local_of(param).shape, original.row_dims
    rows, columns = range(row_dims), range(row_dims, param.dim())
    start, fault = _first_element(param, original.name)
    some = (math.prod(held[:row_dims]), math.prod(held[row_dims:])) if original.numel else (0, 0)
    groups = groups_over(param, range(param.dim()))
    return Layout(
        [Tile(original.key, original.rows, original.cols, *some, start)],
        groups,
        groups_over(param, (*range(param.dim()), None)),
        ranks=max(map(dist.get_world_size, groups), default=1),
        row_groups=groups_over(param, columns),
        column_groups=groups_over(param, rows),
        fault=fault,
    )


def _first_element(param: Any, name: str) -> tuple[int, str]:
    """The number of the first element held here, row-major, and whether torch contradicts itself about what is held.

    From there on a tile counts as if its rows, and its columns, followed each other in the parameter. They do where
    the first dimension of the rows, and of the columns, is cut; in other cuts some numbers occur twice: no harm.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    held = tuple(local_of(param).shape)
    if tuple(shape) != held:  # some uneven cuts over two dimensions of a mesh
        return 0, (
            f"torch takes this rank's part of parameter {name!r}, of shape {tuple(param.shape)}, for one of shape "
            f"{tuple(shape)}, but it is {held}: it could not be saved. Make the dimension that is cut a multiple of "
            f"{param.device_mesh.size()}."
        )
    strides = (math.prod(param.shape[dim + 1 :]) for dim in range(param.dim()))
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True)), ""


def like(param: Any, local: Tensor, kept: Container[int]) -> Any:
    """A DTensor over `local`: of `param`'s shape, but 1 in the dimensions that are not in `kept`.

    Every rank has all of such a dimension: the mesh dimensions that cut it there replicate.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    shape = torch.Size(size if dim in kept else 1 for dim, size in enumerate(param.shape))
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    placements = tuple(each if cut_dim(each) in kept else Replicate() for each in param.placements)
    # Not from_local: it moves offloaded tensors to the device of the mesh.
    spec = DTensorSpec(param.device_mesh, placements, tensor_meta=TensorMeta(shape, strides, local.dtype))
    return DTensor(local, spec, requires_grad=False)


def held_in(memory: Tensor, state: Any) -> Tensor:
    """A state tensor of any kind whose numbers are from now on in `memory`, which has its shape.

    A DTensor stays the object that it is: one made anew over a part of a buffer would have that part's offset for its
    own, and torch could neither copy nor save it.
    """
    if not is_dtensor(state):
        return memory
    state._local_tensor = memory
    return state


def is_placed(state: Any, param: Any, kept: Container[int]) -> bool:
    """Whether `state` is cut as `like(param, …, kept)` is; of a parameter that is no DTensor: whether it is none."""
    if not is_dtensor(param) or not is_dtensor(state):
        return is_dtensor(param) == is_dtensor(state)
    held = [None if dim not in kept else dim for dim in map(cut_dim, param.placements)]
    return state.device_mesh == param.device_mesh and [cut_dim(each) for each in state.placements] == held


def held_shape(param: Any, kept: Container[int]) -> tuple[int, ...]:
    """The shape of what a rank holds of `like(param, …, kept)`."""
    return tuple(size if dim in kept else 1 for dim, size in enumerate(local_of(param).shape))


def rectangle(param: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What this rank holds of a DTensor: its shape, and where it begins in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return tuple(shape), tuple(offsets)
