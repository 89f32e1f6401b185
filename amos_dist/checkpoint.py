"""ZeRO checkpoints that another number of ranks, or another stage, can read: who gathers, who cuts, who adopts.

DeepSpeed's universal checkpoint cuts anew what has a partition's shape and is called `exp_avg` or `exp_avg_sq`. Of all
else it keeps the param_groups of data-parallel rank 0, and on loading writes them into the optimizer's groups without
asking the optimizer. So momentum is saved as `exp_avg`, and the rest of the state, whole, by the parameters' names in a
group of rank 0. The next step(), or state_dict(), finds it in the groups, and each rank cuts out what it needs.

`full_state` gathers the same, with momentum, for whoever wants to look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .member import Member
from .runs import in_float32
from .sharding import Original, Piece, disagreement
from .state import State, has_rows, refuse_foreign, refuse_shapes, state_sizes, whole_shapes

if TYPE_CHECKING:
    from .optimizer import Amos

ENTRY = "amos_state"  # in a saved group: the whole state of each parameter, by name
SETTINGS = "amos_groups"  # beside it: what each group had, because stage 3's loader gives group 0's to all
PARAMETERS = "amos_parameters"  # beside it: the names and shapes of what each group's partitions were cut from
BESIDE = (SETTINGS, PARAMETERS)
SHARD = "amos_shard"  # in the saved state of a partition: this rank's own, for the same number of ranks

FRESH = (
    "To start with a fresh optimizer, load the weights only: engine.load_checkpoint(…, load_optimizer_states=False) "
    "without load_universal, or what zero_to_fp32.py writes."
)


# ---- which numbers ---------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """`size` numbers of a parameter's state, from the `first` on of what is called `name` when it is whole."""

    key: int
    name: str
    first: int
    size: int


def _whole_name(key: str, kind: str) -> str:
    return "moment" if key == "row_moment" and kind in ("scalar", "full") else key


def _is_by_row(key: str, kind: str) -> bool:
    return key == "row_moment" or (key == "decay" and has_rows(kind))


def _held(pieces: Sequence[Any], state: State, kinds: dict[int, str]) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
    """Each piece of a partition and what the partition's state has of it: vectors, views."""
    begins = dict.fromkeys(("row_moment", "column_moment", "decay"), 0)
    for piece in pieces:
        held = {}
        for key, size in state_sizes([piece], kinds).items():
            if size:
                held[key] = state[key].view(-1)[begins[key] : begins[key] + size]
            begins[key] += size
        yield piece, held


def shares(
    pieces: Sequence[Any], state: State, kinds: dict[int, str], momentum: bool = False
) -> Iterator[tuple[Share, Tensor]]:
    """What a partition contributes to the whole state of its parameters: over all ranks each number once.

    A row belongs to the rank that has its first element, the step to the one that has the parameter's, and so do
    columns of which the ranks do not keep a share each.
    """
    for piece, held in _held(pieces, state, kinds):
        kind, rows = kinds[piece.key], piece.owned_rows
        if piece.is_first:
            yield Share(piece.key, "step", 0, 1), state["step"].view(1)
        for key, vector in held.items():
            name = _whole_name(key, kind)
            if _is_by_row(key, kind):
                own = vector[rows.start - piece.first_row : rows.stop - piece.first_row]
                yield Share(piece.key, name, rows.start, len(own)), own
            elif piece.owns_columns:
                yield Share(piece.key, name, piece.first_col, len(vector)), vector
        if momentum and "momentum" in state:
            own = state["momentum"][piece.offset : piece.offset + piece.length]
            yield Share(piece.key, "momentum", piece.start, piece.length), own


def cut(pieces: Sequence[Any], entries: dict[int, State], kinds: dict[int, str]) -> State:
    """The state of a partition, as member.make_state lays it out, but for momentum; the reverse of `shares`.

    Args:
        entries: the whole state of the parameters, by key. The steps of a partition's parameters are one number: the
            largest, because a partition also counts steps in which one of its parameters has no gradient.
    """
    found: dict[str, list[Tensor]] = {}
    for piece in pieces:
        kind = kinds[piece.key]
        for key, size in state_sizes([piece], kinds).items():
            if size:
                first = piece.first_row if _is_by_row(key, kind) else piece.first_col
                whole = entries[piece.key][_whole_name(key, kind)].reshape(-1)
                found.setdefault(key, []).append(whole[first : first + size])
    steps = [float(entries[piece.key]["step"]) for piece in pieces]
    return {"step": torch.tensor(max(steps, default=0.0))} | {key: torch.cat(some)[None] for key, some in found.items()}


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(
    state_dict: dict[str, Any],
    members: Sequence[Member],
    states: dict[Tensor, State],
    groups: Sequence[dict[str, Any]],
    originals: Sequence[Original],
    kinds: dict[int, str],
) -> None:
    """Makes of what torch's state_dict() gave, in place, one that another number of ranks can read.

    Args:
        members: the partitions. states, groups: the optimizer's, the groups in the order in which they were added.

    Raises:
        RuntimeError: on every rank, where any rank does not know what a partition holds.
    """
    entries = _entries(members, states, groups, originals, kinds, doing="save")
    settings = [{k: v for k, v in group.items() if k != "params"} for group in state_dict["param_groups"]]
    parameters = [trained(originals, number) for number in range(len(groups))]
    state_dict["param_groups"][0] |= {ENTRY: entries, SETTINGS: settings, PARAMETERS: parameters}
    partitions = {id(member.tensor) for member in members}
    tensors = [tensor for group in groups for tensor in group["params"]]
    for number, tensor in enumerate(tensors):
        if id(tensor) in partitions and number in state_dict["state"]:
            state_dict["state"][number] = _planes(state_dict["state"][number], tensor)


def full_state(trainer: Any) -> dict[str, State]:
    """The optimizer's whole state by the full name of each parameter, in the shapes of one that is not sharded.

    Every rank must call this. Under ZeRO the first rank has it all, momentum in float32 too, and the others nothing;
    otherwise every rank has it. What is returned are copies. ZeRO drops parameters without elements.

    Args:
        trainer: an engine of DeepSpeed, or an `Amos`.

    Raises:
        TypeError: it is neither.
        RuntimeError: on every rank, where any rank does not know what a partition holds.
    """
    wrapped = getattr(trainer, "optimizer", trainer)
    amos: Amos = getattr(wrapped, "optimizer", wrapped)
    if not hasattr(amos, "_partitions"):
        raise TypeError(f"there is no Amos in {type(trainer).__name__}. Give an engine of DeepSpeed or an Amos.")
    found = (getattr(original.param, "_z3_optimizer", None) for original in amos._originals)
    stage3 = next((zero for zero in found if zero is not None and zero.optimizer is amos), None)
    if stage3 is None:
        return _full_state(amos)
    stage3._set_fp32_optimizer_param_groups()  # it empties the groups between steps
    try:
        return _full_state(amos)
    finally:
        stage3._clear_fp32_optimizer_param_groups()


@torch.no_grad()
def _full_state(amos: Amos) -> dict[str, State]:
    amos._take_loaded()
    if partitions := amos._partitions():
        about = partitions, amos.state, amos._groups, amos._originals, amos._kinds
        return _entries(*about, doing="gather the state", momentum=True)
    result = {}
    for member in amos._members(bool(amos.state.get(tensor)) for tensor in amos._tensors()):
        original = amos._originals[member.layout.pieces[0].key]
        result[original.name] = sigma_entry(member.group["measured_sigma"][original.place])
        for key, value in in_float32(amos.state[member.tensor], member.tensor, member.layout.pieces).items():
            if isinstance(value, Tensor):
                whole: Any = getattr(value, "full_tensor", value.clone)  # a DTensor's, or what is whole already
                result[original.name][key] = whole()
    return result


def _entries(
    members: Sequence[Member],
    states: dict[Tensor, State],
    groups: Sequence[dict[str, Any]],
    originals: Sequence[Original],
    kinds: dict[int, str],
    doing: str,
    momentum: bool = False,
) -> dict[str, State]:
    """The whole state by name, on the first rank of each process group; the arguments are those of `save`."""
    fault = next((member.fault for member in members if member.fault), "")
    process_groups = list(dict.fromkeys(group for member in members for group in member.layout.fellows))
    for process_group in process_groups:
        fault = disagreement(process_group, fault, doing=doing)
    if fault:
        raise RuntimeError(fault)
    entries: dict[str, State] = {}
    for process_group in process_groups:
        some = [member for member in members if process_group in member.layout.fellows]
        mine: list[tuple[Share, Tensor]] = []
        for member in some:
            tensor, pieces = member.tensor, member.layout.pieces
            state = in_float32(states[tensor], tensor, pieces) if momentum else states[tensor]
            mine += shares(pieces, state, kinds, momentum)
        for share, numbers in _gathered(mine, process_group):
            original = originals[share.key]
            if original.name not in entries:
                entries[original.name] = _empty_entry(original, kinds[share.key], groups[original.group])
            entry = entries[original.name]
            if share.name not in entry:
                entry[share.name] = torch.zeros(original.shape)
            entry[share.name].view(-1)[share.first : share.first + share.size] = numbers
    return entries


def _gathered(mine: list[tuple[Share, Tensor]], group: Any) -> Iterator[tuple[Share, Tensor]]:
    """On the first rank of `group` what all ranks have, on the others nothing: DeepSpeed keeps only the first's.

    One gather of objects, since only a partition's own rank knows its pieces. Each is padded to the largest, which is
    about the state divided by the ranks.
    """
    sent: Any = None
    if dist.get_rank(group):
        sent = [share for share, _ in mine], torch.cat([torch.empty(0), *(numbers.cpu() for _, numbers in mine)])
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(sent, None if sent else found, dst=dist.get_global_rank(group, 0), group=group)
    if sent:
        return
    yield from mine
    for index, numbers in found[1:]:
        yield from zip(index, numbers.split([share.size for share in index]), strict=True)


def _empty_entry(original: Original, kind: str, group: dict[str, Any]) -> State:
    entry = {"step": torch.zeros(())}
    for key, shape in whole_shapes(kind, original.shape, original.row_dims).items():
        entry[key] = torch.zeros(shape)
    return entry | sigma_entry(group["measured_sigma"][original.place])


def sigma_entry(measured: float | None) -> State:
    """What an entry has of a sigma that was measured: by name, because loaders lose what is in the groups."""
    return {} if measured is None else {"sigma": torch.tensor(measured, dtype=torch.float64)}


def measured_in(entries: dict[str, State], names: Sequence[str]) -> list[float | None]:
    """The sigmas that the entries of those parameters have, as a group's `measured_sigma`."""
    sigmas = [entries.get(name, {}).get("sigma") for name in names]
    return [None if sigma is None else float(sigma) for sigma in sigmas]


def _planes(state: State, flat: Tensor) -> State:
    """A partition's state in DeepSpeed's terms. Planes that are missing take one number in memory and in the file."""
    missing = flat.detach().new_zeros(1).expand(flat.shape)
    held = {key: value for key, value in state.items() if key not in ("step", "momentum")}
    # In a dict, because the converter cuts off the padding of every tensor of a partition, whatever it is.
    return {"step": state["step"], "exp_avg": state.get("momentum", missing), "exp_avg_sq": missing, SHARD: held}


# ---- loading ---------------------------------------------------------------------------------------------------------


def own_part(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What a rank saved, without what it saved for other numbers of ranks; any other state_dict as it is."""
    if not {"state", "param_groups"} <= state_dict.keys():
        return state_dict
    states = dict(state_dict["state"])
    for number, state in states.items():
        if isinstance(state, dict) and SHARD in state:
            plane = state["exp_avg"]
            states[number] = {"step": state["step"], **state[SHARD]}
            if plane.numel() < 2 or plane.stride() != (0,):
                states[number]["momentum"] = plane
    groups = [{k: v for k, v in g.items() if k not in (ENTRY, *BESIDE)} for g in state_dict["param_groups"]]
    return {**state_dict, "state": states, "param_groups": groups}


def trained(originals: Sequence[Original], group: int) -> list[tuple[str, tuple[int, ...]]]:
    """What ZeRO cuts into the partitions of a group, in its order."""
    return [(o.name, o.shape) for o in originals if o.group == group and o.trainable and o.numel]


@dataclass(eq=False)
class Loaded:
    """Whole state that a universal load has left in the groups, until each partition has taken its part.

    Attributes:
        entries: by name. waiting: the partitions that have taken nothing yet; none: all is done.
        fault: why none can, or nothing.
    """

    entries: dict[str, State] = field(default_factory=dict)
    waiting: set[Tensor] = field(default_factory=set)
    fault: str = ""

    def adopt(self, member: Member, state: State, originals: Sequence[Original], kinds: dict[int, str]) -> str:
        """Puts a partition's part into its state, in place of what DeepSpeed has put there.

        Returns:
            Why it cannot, or nothing; the state is as before then.
        """
        if member.tensor not in self.waiting:
            return ""
        here = {piece.key: originals[piece.key] for piece in member.layout.pieces}
        absent = [original for original in here.values() if original.name not in self.entries]
        if self.fault or absent:  # the latter were frozen when the optimizer was built: see `take`
            return self.fault or _fault(None, absent[0], "", False)
        taken = cut(member.layout.pieces, {key: self.entries[o.name] for key, o in here.items()}, kinds)
        if member.momentum_dtype is not None and "exp_avg" in state:
            taken["momentum"] = state["exp_avg"]  # make_state knows its dtype
        state.clear()
        state.update(taken)
        self.waiting.discard(member.tensor)
        if not self.waiting:
            self.entries = {}  # other ranks' part of it need not be kept
        return ""


def take(
    groups: Sequence[dict[str, Any]],
    built: dict[int, dict[str, Any]],
    states: dict[Tensor, State],
    originals: Sequence[Original],
    kinds: dict[int, str],
    setting: Callable[[Original, dict[str, Any], str], Any],
) -> Loaded | None:
    """Takes what a universal load has left in the groups, and mends what it has done to them; None: nothing is there.

    Args:
        groups: all of the optimizer's, in the order in which they were added.
        built: the settings with which they were, by number. states: the optimizer's, of which the loader made some.
        setting: the value of a keyword for a parameter in a group.
    """
    written = next((group for group in groups if ENTRY in group), None)
    if written is None:
        return None
    entries, settings = written[ENTRY], written.get(SETTINGS, ())
    for number, group in enumerate(groups):
        overwritten = number > 0 and ENTRY in group  # by group 0's: what stage 3's loader does
        for key in (ENTRY, *BESIDE):
            group.pop(key, None)
        if len(settings) == len(groups):
            group.update(settings[number])
        elif overwritten:
            group.update(built[number])
        group.update({key: built[number][key] for key in ("moments", "row_dims")})  # entries that differ say it better
        group["amos_group"] = number
        names = [original.name for original in originals if original.group == number]
        group["measured_sigma"] = measured_in(entries, names)
        if "param_names" in group:  # by now the file's, in the file's order
            group["param_names"] = names

    partitions = [tensor for group in groups for tensor in group["params"]]
    fault = ""
    if any(tensor not in states for tensor in partitions):  # its weights are not there either
        fault = (
            "DeepSpeed has loaded nothing into one of the parameter groups. "
            "Build the engine with the groups that the checkpoint was written with."
        )
    for original in originals:
        if original.name in entries or (original.trainable and original.numel):
            is_auto = setting(original, groups[original.group], "sigma") == "auto"
            fault = fault or _fault(entries.get(original.name), original, kinds[original.key], is_auto)
    return Loaded(entries, {*states, *partitions}, fault)


def absent(name: str) -> str:
    return (
        f"the checkpoint has no state for parameter {name!r}. Load it into the model that it was written with. {FRESH}"
    )


def _fault(entry: State | None, original: Original, kind: str, is_auto: bool) -> str:
    """What keeps a parameter from taking `entry`. is_auto: sigma must have been measured."""
    name = original.name
    if entry is None:
        return absent(name)
    if is_auto and "sigma" not in entry:
        return (
            f"the checkpoint has no sigma for {name!r}. "
            "Build the optimizer with the `sigma` and the rules that it was written with."
        )
    state = {key: value for key, value in entry.items() if key != "sigma"}
    try:
        refuse_foreign(state, name)
        refuse_shapes(state, name, original.shape, whole_shapes(kind, original.shape, original.row_dims))
    except ValueError as error:
        return str(error)
    return ""
