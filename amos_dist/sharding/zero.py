"""DeepSpeed's ZeRO: which elements of which parameters a flat float32 partition holds.

Nothing of DeepSpeed is imported: it leaves what is needed on the parameters (seen with 0.19.8).
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .layout import Cut, Layout, Original
from .piece import Piece
from .reduce import disagreement


class _Check(NamedTuple):
    """A piece of a flat partition, to be looked at once.

    Attributes:
        offset: where it begins in the partition. held: the parameter's own numbers there.
        mapped: whether DeepSpeed's map, by which its `safe_set_full_fp32_param` writes, says the same place.
    """

    original: Original
    offset: int
    held: torch.Tensor
    mapped: bool


def find(flat: torch.Tensor, originals: list[Original], everywhere: list[Original], alone: bool) -> Layout | None:
    """The layout of a flat partition.

    Args:
        flat: 1-D, the partition.
        originals: the parameters of its group.
        everywhere: the parameters of all groups (ZeRO-3's sub-groups are looked up by identity).
        alone: there is no other tensor in its group. Where stages 1 and 2 have others, these are no partitions, and
            what is on the parameters was left by an earlier engine.
    """
    for original in originals:
        if hasattr(original.param, "_z3_optimizer"):
            return _stage3(flat, original.param._z3_optimizer, everywhere)
    # Set at `initialize` on what was trainable then; requires_grad may have changed since.
    flattened = [o for o in originals if getattr(o.param, "_dp_group", None) is not None and o.numel]
    return _stage12(flat, flattened) if alone and flattened and flat.dim() == 1 else None


def partition_sum_of_squares(param: Any) -> tuple[torch.Tensor, Any] | None:
    """For a parameter that zero.Init has partitioned: its local sum of squares, and the process group to add over."""
    if not hasattr(param, "ds_tensor") or param.numel() == param.ds_numel:
        return None
    group, length = param.ds_process_group, param.partition_numel()
    held = min(length, max(0, param.ds_numel - dist.get_rank(group) * length))
    return param.ds_tensor.data.view(-1)[:held].double().square().sum(), group


def link(flat: torch.Tensor, state: dict[str, Any], originals: list[Original]) -> None:
    """Stages 1 and 2 read momentum by the parameter's name, through views that they make once, after the first step.

    Loading and offloading put other tensors into the state: the old views would show, and take, numbers of no use.
    """
    for original in originals:
        mapping = getattr(original.param, "_hp_mapping", None)
        if mapping is not None:
            mapping.set_optim_state_fragment(flat, state)


def original_shape(param: Any) -> tuple[int, ...]:
    """The shape of a parameter, partitioned (zero.Init) or not."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _stage3(flat: torch.Tensor, zero: Any, everywhere: list[Original]) -> Layout | None:
    """Every parameter is split over its group: rank r holds elements [r n, (r + 1) n), padding at the end.

    Nearly all pieces touch all columns, whose state would be the same on every rank: each keeps a share of it.
    """
    number = next((i for i, held in enumerate(zero.fp32_partitioned_groups_flat) if held is flat), None)
    if number is None:
        return None
    by_identity = {id(original.param): original for original in everywhere}
    layout, offset, checks = Layout([]), 0, []
    for param in zero.fp16_groups[number]:
        original = by_identity[id(param)]
        if layout.groups and layout.groups[0] is not param.ds_process_group:
            raise RuntimeError(
                f"parameter {original.name!r} is partitioned over another process group than its neighbours. "
                "Put the parameters of each process group into a parameter group of their own."
            )
        group = param.ds_process_group
        n, rank, ranks = param.partition_numel(), dist.get_rank(group), dist.get_world_size(group)
        layout.groups = layout.fellows = (group,)
        layout.rank, layout.ranks = rank, ranks
        start, length = rank * n, max(0, min(n, original.numel - rank * n))
        share = None
        borders = range(n, min(n * ranks, original.numel), max(1, n))  # 0: a parameter without elements
        if borders:
            layout.cuts.append(Cut(original.key, original.rows, original.cols, borders, everybody=ranks))
            share = layout.cuts[-1].share_of(rank)
        if length:  # where there is no element, there is no share either: r ceil(C/n) < C means r ceil(RC/n) < RC
            layout.pieces.append(Piece(original.key, original.rows, original.cols, start, length, offset, share))
            mapped = zero.grad_position.get(zero.get_param_id(param)) == [number, offset, n]
            checks.append(_Check(original, offset, param.ds_tensor.data.view(-1)[:length], mapped))
        offset += n
    layout.fault = _compare(flat, checks)
    return layout


def _stage12(flat: torch.Tensor, flattened: list[Original]) -> Layout:
    """The group's parameters lie one behind the other in a low-precision buffer; rank r's flat is its r-th equal part.

    The addresses in that buffer are the truth: DeepSpeed's own map is wrong with round_robin_gradients.
    """
    group = flattened[0].param._dp_group  # type: ignore[attr-defined]
    rank, size = dist.get_rank(group), flat.numel()
    base = min(original.param.data_ptr() for original in flattened)
    layout, checks = Layout([], (group,), (group,), rank=rank, ranks=dist.get_world_size(group)), []
    for original in sorted(flattened, key=lambda o: o.param.data_ptr()):
        param = original.param
        param.get_full_hp_param = functools.partial(_gathered, original)  # type: ignore[attr-defined]
        begin = (param.data_ptr() - base) // param.element_size()
        if begin + original.numel > size * layout.ranks:
            # Addresses differ from rank to rank then: nothing that depends on them may reach the all-reduce.
            return Layout([], (group,), (group,), fault=_misplaced(original))
        owner, share = begin // size, None
        borders = range((owner + 1) * size - begin, original.numel, size)
        if borders:
            layout.cuts.append(Cut(original.key, original.rows, original.cols, borders, owner))
            share = layout.cuts[-1].share_of(rank)
        first, last = max(begin, rank * size), min(begin + original.numel, (rank + 1) * size)
        if first < last:
            start, offset = first - begin, first - rank * size
            layout.pieces.append(Piece(original.key, original.rows, original.cols, start, last - first, offset, share))
            mapped = _maps(getattr(param, "_hp_mapping", None), start, last - first, offset)
            checks.append(_Check(original, offset, param.data.view(-1)[start : start + last - first], mapped))
    layout.fault = _compare(flat, checks)
    return layout


def _maps(mapping: Any, start: int, length: int, offset: int) -> bool:
    """Whether DeepSpeed's map has these elements of a parameter at that place of the partition, too."""
    if mapping is None:
        return False
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return (low.start, high.numel, high.start) == (start, length, offset)


def _gathered(original: Original, optim_state_key: str | None = None) -> torch.Tensor:
    """A parameter's float32 weights, or state: DeepSpeed's method of it, but no rank waits for ever.

    Of a key that is not there, only the ranks that have a part of the parameter would learn.

    Raises:
        ValueError: on every rank, where any has no such state.
    """
    param: Any = original.param
    if optim_state_key is not None:
        fault, mapping = "", param._hp_mapping
        if mapping is not None and optim_state_key not in (mapping.optim_fragment or ()):
            fault = (
                f"no {optim_state_key!r} of the shape of parameter {original.name!r} is in the state of Amos. "
                "Of this shape it has 'momentum', where that is not 0 and not of 8 bits: take all else from "
                "amos_dist.full_state(engine)."
            )
        if fault := disagreement(param._dp_group, fault, doing="give that state"):
            raise ValueError(fault)
    return sys.modules["deepspeed.utils"].get_full_hp_param(param, optim_state_key)


def _compare(flat: torch.Tensor, checks: list[_Check]) -> str:
    """A wrong map would train garbage: once, the partition's numbers must be those of the parameters.

    Where they are not, but DeepSpeed's own map is the same, somebody has set weights on purpose. Not so after loading.
    """
    changed = []
    for original, offset, held, mapped in checks:
        part = flat.detach().view(-1)[offset : offset + held.numel()].to(held.device, held.dtype)
        if not torch.equal(part, held) and not torch.equal(part.nan_to_num(), held.nan_to_num()):
            if original.loaded or not mapped:
                return _misplaced(original)
            changed.append(original.name)
    if changed:
        warnings.warn(
            f"the float32 weights of {len(changed)} parameters, {changed[0]!r} among them, are not those of the "
            "parameters. Training goes on from the float32 weights, as safe_set_full_fp32_param sets them: if you have "
            "changed the parameters themselves, do so before deepspeed.initialize.",
            stacklevel=2,
        )
    return ""


def _misplaced(original: Original) -> str:
    return (
        f"the float32 partition does not hold what parameter {original.name!r} says at this place. "
        "Do not change or replace parameters between deepspeed.initialize and the first step. If you did not, a loaded "
        "checkpoint may be damaged (python -m amos_dist verify), or this version of DeepSpeed lays partitions out in a "
        "way that amos_dist does not know: please report that."
    )
