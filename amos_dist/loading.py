"""Whether a state_dict fits an optimizer: asked before anything of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import settings
from .checkpoint import FRESH, PARAMETERS, absent, trained
from .member import misplaced, state_shapes
from .sharding import Layout, Original
from .state import State, kept_dims, refuse_foreign, refuse_shapes


def in_own_terms(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], originals: Sequence[Original]
) -> dict[str, Any]:
    """The same with the numbers of this optimizer's groups, and measured sigmas in the order of its parameters.

    torch.distributed.checkpoint finds a parameter's state by its name, but hands over groups as they were saved.
    """
    saved = state_dict.get("param_groups", [])
    if len(saved) != len(groups) or not all("measured_sigma" in each for each in saved):
        return state_dict
    own = []
    for each, group in zip(saved, groups, strict=True):
        number = group["amos_group"]
        names = [original.name for original in originals if original.group == number]
        own.append({**each, "amos_group": number, **_in_order(each, names)})
    return {**state_dict, "param_groups": own}


def _in_order(saved: dict[str, Any], names: list[str]) -> dict[str, list[Any]]:
    """What a saved group has of each parameter, in the order of `names`; nothing where it does not name them all.

    Args:
        names: with which the optimizer was built. Those in its groups may be of a file that was loaded before.
    """
    measured, there = saved["measured_sigma"], list(saved.get("param_names", ()))
    if names == there or len(there) != len(measured) or not set(names) <= set(there):
        return {}
    by_name = dict(zip(there, measured, strict=True))
    return {"param_names": names, "measured_sigma": [by_name[name] for name in names]}


def refuse_damaged(state_dict: dict[str, Any]) -> None:
    """Raises:
    ValueError: `state_dict` is no state_dict of any optimizer: something is missing, or of another type.
    """
    groups = state_dict.get("param_groups")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if key not in state_dict:
            raise ValueError(f"the state_dict has no {key!r}. Give what Amos.state_dict() returned.")
        if not isinstance(state_dict[key], kind) or isinstance(state_dict[key], str):
            raise _damaged(repr(key), state_dict[key])
    numbers: list[Any] = []
    for i, saved in enumerate(groups or ()):
        if not isinstance(saved, Mapping):
            raise _damaged(f"param_groups[{i}]", saved)
        for key in ("params", "measured_sigma", "param_names"):
            if not isinstance(saved.get(key, [] if key != "params" else None), (list, tuple)):
                raise _damaged(f"{key!r} of param_groups[{i}]", saved.get(key))
        for key, kinds in (("params", (int, str)), ("param_names", (str,))):
            if odd := [each for each in saved.get(key, ()) if not isinstance(each, kinds) or isinstance(each, bool)]:
                raise _damaged(f"an entry of {key!r} of param_groups[{i}]", odd[0])
        numbers += saved["params"]
        for sigma in saved.get("measured_sigma", ()):
            if sigma is not None:
                settings.check({"sigma": sigma}, f"param_groups[{i}]")
    for number in numbers:
        if not isinstance(state_dict["state"].get(number, {}), Mapping):
            raise _damaged(f"the state of parameter {number}", state_dict["state"][number])


def _damaged(what: str, value: Any) -> ValueError:
    return ValueError(
        f"{what} in the state_dict is damaged: it is {value!r:.80}. "
        "Give what Amos.state_dict() returned, or use another file."
    )


def refuse_state_dict(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    originals: Sequence[Original],
    kinds: dict[int, str],
    setting: Callable[[Original, dict[str, Any], str], Any],
) -> None:
    """Args:
        groups: the optimizer's. setting: the value of a keyword for a parameter in a group.

    Raises:
        ValueError: `state_dict` is of another optimizer, another model or other `moments`.
    """
    if len(state_dict["param_groups"]) != len(groups):
        raise ValueError(
            f"the state_dict has {len(state_dict['param_groups'])} parameter groups, the optimizer has "
            f"{len(groups)}. Build the optimizer with the groups that the checkpoint was written with."
        )
    by_identity = {id(original.param): original for original in originals}
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"a parameter group of the state_dict has {len(saved['params'])} parameters, the optimizer's has "
                f"{len(group['params'])}. Load it into the model that it was written with."
            )
        for place, (number, tensor) in enumerate(zip(saved["params"], group["params"], strict=True)):
            _refuse_state(state_dict["state"].get(number, {}), tensor, place, by_identity.get(id(tensor)), kinds)
        if "amos_group" not in saved or "measured_sigma" not in saved:
            raise ValueError(
                "the state_dict is not of Amos: a parameter group has no 'amos_group'. "
                "To start with a fresh optimizer on these weights, load the model only "
                "(DeepSpeed: load_optimizer_states=False)."
            )
        if "lr" not in saved:
            raise ValueError(
                "a parameter group of the state_dict has no 'lr'. "
                "Give what Amos.state_dict() returned, or use another file."
            )
        settings.check({key: saved[key] for key in settings.KEYWORDS if key in saved})
        mine = [original for original in originals if original.group == saved["amos_group"]]
        for original in mine:
            measured = saved["measured_sigma"]
            if setting(original, {"sigma": "auto", **saved}, "sigma") == "auto" and (
                len(measured) != len(mine) or measured[original.place] is None
            ):
                raise ValueError(
                    f"the state_dict has no sigma for {original.name!r}. Build the optimizer with the groups, the "
                    "`sigma` and the rules that the checkpoint was written with; named parameters may be fewer."
                )


def refuse_other_model(state_dict: dict[str, Any], originals: Sequence[Original]) -> None:
    """ZeRO's partitions do not say what they were cut from: those of another model would be taken for this one's.

    A parameter may have another name, at the same place.

    Raises:
        ValueError: on every rank: the model has gained, lost or moved a parameter.
    """
    groups = state_dict.get("param_groups") or [{}]
    saved = [[(name, tuple(shape)) for name, shape in group] for group in groups[0].get(PARAMETERS, ())]
    own = [trained(originals, number) for number in range(len(saved))]
    there, here = ({name for group in groups for name, _ in group} for groups in (saved, own))
    for theirs, mine in zip(saved, own, strict=True):
        different = [
            (a, b)
            for a, b in zip(mine, theirs, strict=False)
            if a[1] != b[1] or (a[0] != b[0] and (a[0] in there or b[0] in here))
        ]
        gained = next((name for name, _ in mine if name not in there), None)
        lost = next((name for name, _ in theirs if name not in here), None)
        if len(mine) > len(theirs) and gained is not None:
            raise ValueError(absent(gained))
        if len(mine) < len(theirs) and lost is not None:
            what = f"the checkpoint has state for parameter {lost!r}, which the optimizer does not have"
        elif different:
            (name, shape), (other, there_shape) = different[0]
            what = f"parameter {name!r} of shape {shape} is where the checkpoint has {other!r} of shape {there_shape}"
        elif len(mine) != len(theirs):
            what = "a parameter is in another group than in the checkpoint"
        else:
            continue
        raise ValueError(f"{what}. Load it into the model that it was written with. {FRESH}")


def refuse_other_views(group: dict[str, Any], built: dict[int, dict[str, Any]]) -> None:
    """`moments` and `row_dims` shape the state: they are fixed when the optimizer is built.

    Args:
        built: the settings with which the groups were added, by number.

    Raises:
        ValueError: the group now has others.
    """
    for key in ("moments", "row_dims"):
        before = built.get(group["amos_group"], group)[key]
        if group[key] != before:
            raise ValueError(
                f"{key}={group[key]!r} in a parameter group, but its state was made for {key}={before!r}. "
                "Build a new optimizer to change it."
            )


def _refuse_state(state: State, tensor: Tensor, place: int, original: Original | None, kinds: dict[int, str]) -> None:
    if not state:
        return
    name = original.name if original else f"the tensor at place {place}"
    refuse_foreign(state, name)
    if original is None:  # a partition's state is checked when its layout is known, at the next step
        return
    refuse_shapes(state, name, original.shape, state_shapes(tensor, Layout([original.whole()]), original, kinds))
    kept = kept_dims(kinds[original.key], len(original.shape), original.row_dims)
    for key, value in state.items():
        dims = kept.get(key, range(len(original.shape)))
        if key != "step" and (fault := misplaced(value, key, tensor, name, dims)):
            raise ValueError(fault)
