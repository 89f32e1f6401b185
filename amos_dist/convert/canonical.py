"""What every format is turned into and made from: whole tensors by name, as torch's state_dict functions give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Checkpoint:
    """A model and its optimizer, whole and on the CPU.

    Attributes:
        model: tensors by full name, as `get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))`.
        optimizer: {"state": {name: {"step": 0-d float32, "row_moment": …}}, "param_groups": [{"params": [names], …}]},
            as `get_optimizer_state_dict` gives it with the same options; None: weights alone.
        others: whatever else was saved beside them, such as a scheduler, at the keys where it was.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any] | None = None
    others: dict[str, Any] = field(default_factory=dict)


# ---- sections of a tree of dictionaries ------------------------------------------------------------------------------


def sections(tree: dict[str, Any], source: str, model_key: str | None, optimizer_key: str | None) -> Checkpoint:
    """Finds the model and the optimizer in what a training script has saved under keys of its own.

    Args:
        tree: nested dictionaries. model_key, optimizer_key: where to look, as "app.model"; None: found by their form.

    Raises:
        ValueError: there is none, or more than one that could be meant.
    """
    if tree and all(isinstance(value, Tensor) for value in tree.values()) and not optimizer_key and not model_key:
        return Checkpoint(dict(tree))  # a bare model.state_dict()
    if optimizer_key:
        found: tuple[str, ...] | None = _given(tree, source, optimizer_key, "--optimizer-key", _is_optimizer)
    else:
        found = _optimizer_path(tree, source)
    optimizer = None if found is None else named(_at(tree, found), source)
    if model_key:
        models = [_given(tree, source, model_key, "--model-key", _is_model)]
    else:
        models = [path for path in _paths(tree, _is_model) if path != found]
    path = _model_path(tree, source, models, [] if optimizer is None else names_in(optimizer))
    model = dict(_at(tree, path)) if path else {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    rest = _without(tree, [path or None, found])
    return Checkpoint(model, optimizer, rest if path else {k: v for k, v in rest.items() if k not in model})


def names_in(optimizer: dict[str, Any]) -> list[str]:
    """The names of all parameters in its groups."""
    return [name for group in optimizer["param_groups"] for name in group["params"]]


def tree_of(checkpoint: Checkpoint, flatten: bool, keys: tuple[str, str], source: str) -> dict[str, Any]:
    """Nested dictionaries, as `sections` reads them.

    Args:
        keys: of model and optimizer, as "app.model". flatten: the optimizer as with flatten_optimizer_state_dict=True.

    Raises:
        ValueError: something else that was saved is at that key.
    """
    tree = {**checkpoint.others}
    _put(tree, keys[0], checkpoint.model, source)
    if checkpoint.optimizer is not None:
        _put(tree, keys[1], flattened(checkpoint.optimizer) if flatten else checkpoint.optimizer, source)
    return tree


def _put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Changes `tree`, but none of the dictionaries in it."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = tree.get(parent, {})
        tree[parent] = {**inner} if isinstance(inner, dict) else {last: inner}
        tree = tree[parent]
    if last in tree:
        raise ValueError(
            f"{source} has something else at {key!r}, which would be lost. Write to other keys: --write-as."
        )
    tree[last] = value


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _given(tree: dict[str, Any], source: str, key: str, option: str, wanted: Callable[[Any], bool]) -> tuple[str, ...]:
    path, place = tuple(key.split(".")), tree
    for part in path:
        place = place.get(part, {}) if isinstance(place, dict) else {}
    if not wanted(place):
        raise ValueError(f"{option} {key}: {source} has none there. Give one of {_listed(tree)}, or leave it away.")
    return path


def _listed(tree: dict[str, Any]) -> str:
    keys = [
        f"{key}.{inner}" if inner else str(key)
        for key, value in tree.items()
        for inner in ([""] if not isinstance(value, dict) or _is_optimizer(value) or _is_model(value) else value)
    ]
    return ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "") or "nothing"


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    if isinstance(value.get("param_groups"), list) and isinstance(value.get("state", {}), dict):
        return True
    return all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in value)


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())


def _paths(
    tree: dict[str, Any], wanted: Callable[[Any], bool], path: tuple[str, ...] = ()
) -> Iterable[tuple[str, ...]]:
    """The places of the dictionaries that are `wanted`, not looking into optimizers."""
    if wanted(tree):
        yield path
    if not _is_optimizer(tree):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from _paths(value, wanted, (*path, key))


def _optimizer_path(tree: dict[str, Any], source: str) -> tuple[str, ...] | None:
    found = list(_paths(tree, _is_optimizer))
    if len(found) > 1:
        raise ValueError(
            f"{source} has more than one optimizer: {', '.join(map('.'.join, found))}. Choose one with --optimizer-key."
        )
    return found[0] if found else None


def _model_path(tree: dict[str, Any], source: str, found: list[tuple[str, ...]], names: list[str]) -> tuple[str, ...]:
    """The one of the paths `found` that has all `names`; empty where the tensors lie at the root."""
    fitting = [path for path in found if set(names) <= set(_at(tree, path))]
    called = [path for path in fitting if path and path[-1] == "model"]
    for candidates in (called, fitting):
        if len(candidates) == 1:
            return candidates[0]
    if found and not fitting:
        missing = min((sorted(set(names) - set(_at(tree, path))) for path in found), key=len)
        raise ValueError(
            f"no model in {source} has all parameters of its optimizer: {missing[0]!r} is missing. "
            "Give the checkpoint of a whole model, or say with --model-key which section is meant."
        )
    what = "no model" if not fitting else "more than one section that could be the model"
    raise ValueError(f"{source} has {what}: it has {_listed(tree)}. Say with --model-key which is meant.")


def _without(tree: dict[str, Any], paths: list[tuple[str, ...] | None]) -> dict[str, Any]:
    rest = {}
    for key, value in tree.items():
        inner = [path[1:] for path in paths if path and path[0] == key]
        if not inner:
            rest[key] = value
        elif () not in inner and (kept := _without(value, list(inner))):
            rest[key] = kept
    return rest


# ---- the forms of an optimizer's section -----------------------------------------------------------------------------


def named(optimizer: dict[str, Any], source: str) -> dict[str, Any]:
    """The canonical form of an optimizer section in any of torch's: by name, flattened, or with numbered parameters.

    Raises:
        ValueError: parameters are numbered, or flattened, and their names or their order are not known.
    """
    if "param_groups" not in optimizer:
        return _unflattened(optimizer, source)
    state, groups = optimizer.get("state", {}), [{**group} for group in optimizer["param_groups"]]
    if not any(isinstance(each, int) for group in groups for each in group["params"]):
        return {"state": {name: {**values} for name, values in state.items()}, "param_groups": groups}
    numbers: dict[int, str] = {}
    for group in groups:
        if len(group.get("param_names", ())) != len(group["params"]):
            raise ValueError(
                f"the optimizer in {source} numbers its parameters and does not name them. Save what "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives, or build Amos from "
                "model.named_parameters()."
            )
        numbers |= dict(zip(group["params"], group["param_names"], strict=True))
        group["params"] = list(group["param_names"])
    return {"state": {numbers[int(n)]: {**values} for n, values in state.items()}, "param_groups": groups}


def numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The form that `Amos.load_state_dict` takes, for one process without DTensors.

    >>> checkpoint = torch.load("plain.pt", weights_only=True)
    >>> optimizer.load_state_dict(amos_dist.convert.numbered(checkpoint["optimizer"]))
    """
    numbers = {name: number for number, name in enumerate(names_in(optimizer))}
    return {
        "state": {numbers[name]: {**state} for name, state in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


def flattened(optimizer: dict[str, Any]) -> dict[str, Any]:
    """As get_optimizer_state_dict gives it with flatten_optimizer_state_dict=True."""
    flat = {f"state.{name}.{key}": v for name, state in optimizer["state"].items() for key, v in state.items()}
    for group in optimizer["param_groups"]:
        for name in group["params"]:
            flat |= {f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"}
    return flat


def _unflattened(flat: dict[str, Any], source: str) -> dict[str, Any]:
    state: dict[str, dict[str, Any]] = {}
    keywords: dict[str, dict[str, Any]] = {}
    for whole, value in flat.items():
        section, rest = whole.split(".", 1)
        name, key = rest.rsplit(".", 1)
        (state if section == "state" else keywords).setdefault(name, {})[key] = value
    groups: dict[Any, dict[str, Any]] = {}
    for name, group in keywords.items():  # the members of a group repeat all its keywords
        mark = group.get("amos_group", repr(sorted(group.items(), key=lambda item: item[0])))
        groups.setdefault(mark, {"params": [], **group})["params"].append(name)
    for group in groups.values():
        order, sigmas = group.get("param_names"), group.get("measured_sigma", [])
        if order is not None and set(order) == set(group["params"]):
            group["params"] = list(order)
        elif len({*sigmas}) > 1:  # they are in the group's order, which is lost
            raise ValueError(
                f"the optimizer in {source} is flattened, and the order of its parameters, which sigma='auto' needs, "
                "is lost. Save it without flatten_optimizer_state_dict, or build Amos from model.named_parameters()."
            )
    return {"state": state, "param_groups": [groups[mark] for mark in sorted(groups, key=str)]}


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def tied(model: dict[str, Any], owners: Iterable[str]) -> dict[str, str]:
    """By the name of a weight that is not among `owners`: which of these it is. torch saves a shared weight twice.

    Equal numbers tell it, if they are not all the same: untrained biases and norms are equal by chance.
    """
    found: dict[str, str] = {}
    owners = list(owners)
    for name in model.keys() - set(owners):
        weight = model[name]
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.unique().numel() < 2:
            continue
        for owner in owners:
            if model[owner].dtype == weight.dtype and torch.equal(model[owner], weight):
                found[name] = owner
    return found


def cast(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The same with its floating-point weights in `dtype`; what that would lose stays as Amos's float32 `master`.

    Weights that become float32 take the numbers of their master, where there is one. The groups of an optimizer whose
    weights became smaller say `master_weights=True`.
    """
    states: dict[str, dict[str, Any]] = {} if checkpoint.optimizer is None else checkpoint.optimizer["state"]
    model, states = {**checkpoint.model}, {name: {**state} for name, state in states.items()}
    masters = set()
    for name, weight in checkpoint.model.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        state = states.get(name, {})
        exact = state.pop("master", weight)
        model[name] = exact.to(dtype)
        if state and exact.dtype == torch.float32 and dtype != torch.float32:
            state["master"] = exact
            masters.add(name)
    model |= {name: model[owner] for name, owner in tied(checkpoint.model, states).items()}
    if checkpoint.optimizer is None:
        return Checkpoint(model, None, checkpoint.others)
    groups = [
        {**group, "master_weights": True} if masters & set(group["params"]) else group
        for group in checkpoint.optimizer["param_groups"]
    ]
    return Checkpoint(model, {"state": states, "param_groups": groups}, checkpoint.others)
