"""A tensor of the optimizer's groups as a step sees it, and the state that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import runs, settings
from .sharding import Layout, Original, dtensor
from .state import FLOAT_STATE, SCALE, State, compute_dtype, kept_dims, state_sizes, whole_shapes


@dataclass(eq=False)
class Member:
    """A tensor of the optimizer's groups, in a Plan."""

    tensor: Tensor
    group: dict[str, Any]
    layout: Layout
    name: str
    momentum_dtype: torch.dtype | None  # None: without momentum
    fused: bool | None
    capturable: bool
    master: bool  # the state holds the parameter in float32; the tensor itself only takes the rounded numbers
    checked: bool = False  # no tensor is stepped where the gradient of this one is not finite
    fault: str = ""  # why it cannot be stepped; every rank of its process groups learns of it before anything changes
    decay_init: tuple[float, ...] = ()  # b of state that is made new, for each of the layout's pieces; empty: 0


def member_of(
    tensor: Tensor,
    group: dict[str, Any],
    layout: Layout,
    originals: list[Original],
    setting: Callable[[Original, dict[str, Any], str], Any],
) -> Member:
    """Args:
    originals: the parameters of the pieces. setting: the value of a keyword for a parameter in a group.
    """
    name = ", ".join(o.name for o in originals[:3]) + (", …" if len(originals) > 3 else "")
    compute = compute_dtype(tensor)
    # One buffer for all pieces: the widest dtype that any of them asks for.
    wanted = {
        settings.momentum_dtype(setting(o, group, "momentum_dtype")) or compute
        for o in originals
        if setting(o, group, "momentum")
    }
    dtype = next(iter(wanted)) if len(wanted) == 1 else (compute if wanted else None)
    if dtype is not None and compute == torch.float64:
        dtype = torch.float64
    low = tensor.dtype in (torch.bfloat16, torch.float16)
    master = low and any(setting(o, group, "master_weights") for o in originals)
    fused = False if group["foreach"] else group["fused"]
    # DeepSpeed has looked at the gradients of partitions, on all ranks; a CUDA graph cannot decide anything.
    checked = group["on_nonfinite"] != "ignore" and not layout.is_partition and not group["capturable"]
    starts = tuple(float(setting(o, group, "decay_init")) for o in originals)
    return Member(tensor, group, layout, name, dtype, fused, group["capturable"], master, checked, layout.fault, starts)


def state_shapes(
    tensor: Tensor, layout: Layout, original: Original | None, kinds: dict[int, str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of a tensor's float state: keepdim shapes of a whole parameter, else one row for all pieces.

    Args:
        original: the parameter of the first piece. kinds: moments by key.
    """
    is_part = layout.is_partition or len(layout.pieces) != 1
    if is_part or original is None or original.shape != tuple(tensor.shape) or not original.numel:
        # A row and not a vector: DeepSpeed would take a vector in a partition's state for numbers of its elements.
        return {key: (1, size) for key, size in state_sizes(layout.pieces, kinds).items() if size}
    return whole_shapes(kinds[original.key], original.shape, original.row_dims)


def misplaced(value: Any, key: str, tensor: Tensor, name: str, kept: range) -> str:
    """What is wrong with how the state `key` of a parameter is cut, or nothing. kept: the dimensions that it has."""
    if dtensor.is_placed(value, tensor, kept):
        return ""
    return (
        f"the state {key!r} of {name!r} is not sharded as the parameter is. "
        "Load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
    )


def is_lost(state: State, tensor: Tensor) -> bool:
    """Whether the state was made while the model was on the meta device, which it has left since."""
    return not tensor.is_meta and any(isinstance(value, Tensor) and value.is_meta for value in state.values())


def _start_decay(decay: Tensor, member: Member, kinds: dict[int, str]) -> None:
    """Fills the b of a tensor, as this rank has it, with `decay_init`: a partition's parameters may differ in it."""
    sizes = [state_sizes([piece], kinds)["decay"] for piece in member.layout.pieces]
    for part, start in zip(decay.view(-1).split(sizes), member.decay_init, strict=False):
        part.fill_(start)


def make_state(member: Member, state: State, original: Original | None, kinds: dict[int, str]) -> str:
    """Makes or completes the state of a tensor, in place: float32, where the tensor is; of a DTensor, DTensors.

    Returns:
        What is wrong with the state that is there already, or nothing.
    """
    tensor, compute = member.tensor, compute_dtype(member.tensor)
    shapes = state_shapes(tensor, member.layout, original, kinds)
    kept: dict[str, range] = {}
    if dtensor.is_dtensor(tensor) and original is not None:
        kept = kept_dims(kinds[original.key], tensor.dim(), original.row_dims)

    def zeros(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not dtensor.is_dtensor(tensor):
            return torch.zeros(shape, dtype=dtype, device=tensor.device)
        dims = kept.get(key, range(tensor.dim()))
        held = torch.zeros(dtensor.held_shape(tensor, dims), dtype=dtype, device=tensor.device)
        return dtensor.like(tensor, held, dims)

    if is_lost(state, tensor):
        state.clear()
    if foreign := [key for key in FLOAT_STATE if key in state and key not in shapes]:
        return (
            f"the state of {member.name!r} has {foreign[0]!r}, which its `moments` do not have. "
            "Use the `moments` that the state was made with, or clear it."
        )
    if plane := next((key for key in ("exp_avg", "exp_avg_sq") if key in state), ""):
        return (
            f"the state of {member.name!r} is not of Amos: it has {plane!r}, and the checkpoint no 'amos_state'. "
            "To start with a fresh optimizer, load the weights only, for example what zero_to_fp32.py writes."
        )
    whole = {**state}  # what is refused stays as it is
    counts_on = tensor.device if member.capturable else "cpu"
    whole["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=counts_on)
    if not state:
        for key, shape in shapes.items():
            whole[key] = zeros(key, shape, compute)
        if "decay" in whole:
            _start_decay(dtensor.local_of(whole["decay"]), member, kinds)
    if member.master:
        if "master" not in state:
            whole["master"] = zeros("master", tuple(tensor.shape), torch.float32)
            dtensor.local_of(whole["master"]).copy_(dtensor.local_of(tensor).detach())
        shapes["master"] = tuple(tensor.shape)
    if member.momentum_dtype is not None:
        if "momentum" not in state:
            whole["momentum"] = zeros("momentum", tuple(tensor.shape), member.momentum_dtype)
        shapes["momentum"] = tuple(tensor.shape)
    for key, shape in shapes.items():
        if key not in whole or whole[key].numel() != math.prod(shape):
            return (
                f"the state {key!r} of {member.name!r} has {whole[key].numel() if key in whole else 'no'} entries, "
                f"expected {math.prod(shape)}. The checkpoint is of another model, another number of ranks, "
                "other `moments`, or an earlier amos_dist whose ranks kept other shares of it: use what it "
                "was written with, there also to convert it (python -m amos_dist convert)."
            )
        if fault := misplaced(whole[key], key, tensor, member.name, kept.get(key, range(tensor.dim()))):
            return fault
        dtype = compute
        if key == "momentum" and member.momentum_dtype is not None:
            eight_bits = torch.int8 in (member.momentum_dtype, whole[key].dtype)
            dtype = whole[key].dtype if eight_bits else member.momentum_dtype
        whole[key] = whole[key].to(tensor.device, dtype).contiguous()  # the model may have been moved since
    if fault := _fit_eight_bits(member, whole):
        return fault
    state.clear()
    state.update(whole)
    return ""


def _fit_eight_bits(member: Member, state: State) -> str:
    """Momentum from and to 8 bits, in place: new, loaded (always float32) or of another `momentum_dtype` until now.

    Under ZeRO it becomes a row: DeepSpeed would show a vector of a partition's length as if it were the numbers.

    Returns:
        What is wrong with the scales that are there, or nothing.
    """
    if member.momentum_dtype is None or "momentum" not in state:
        return ""
    tensor, pieces, scale = member.tensor, member.layout.pieces, state.get(SCALE)
    held = dtensor.local_of(state["momentum"])
    if scale is not None and scale.numel() != runs.scale_count(pieces):
        return (
            f"the state {SCALE!r} of {member.name!r} has {scale.numel()} entries, "
            f"expected {runs.scale_count(pieces)}. Load what Amos.state_dict() returned, or clear the state."
        )
    if member.momentum_dtype == torch.int8:
        if scale is None and held.dtype == torch.int8:  # new, all zeros
            scale = torch.zeros(runs.scale_count(pieces), device=tensor.device)
        elif scale is None:
            held, scale = runs.narrowed(held, pieces)
        state[SCALE] = scale.to(tensor.device, torch.float32).contiguous()
        held = held.view(1, -1) if member.layout.is_partition else held
    elif scale is not None:
        held = runs.widened(held, scale.to(tensor.device), pieces).to(member.momentum_dtype)
        held = held.view(dtensor.local_of(tensor).shape)
        del state[SCALE]
    if held is not dtensor.local_of(state["momentum"]):
        is_placed = dtensor.is_dtensor(tensor)
        state["momentum"] = dtensor.like(tensor, held, range(tensor.dim())) if is_placed else held
    return ""
