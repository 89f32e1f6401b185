"""What the state of a tensor is made of, and whether a loaded one fits."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .sharding import Piece, Tile, dtensor

State = dict[str, Any]
FLOAT_STATE = ("row_moment", "column_moment", "moment", "decay")
WHOLE_STATE = ("momentum", "master")  # of the parameter's own shape
SCALE = "momentum_scale"  # of a momentum in 8 bits; never in a state_dict, where momentum is float32: see runs.py


def has_rows(kind: str) -> bool:
    return kind != "column"


def has_columns(kind: str) -> bool:
    return kind in ("column", "factored")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def state_sizes(pieces: list[Piece | Tile], kinds: dict[int, str]) -> dict[str, int]:
    """Entries of row_moment, column_moment and decay that a tensor made of `pieces` needs. kinds: moments by key."""
    sizes = {"row_moment": 0, "column_moment": 0, "decay": 0}
    for piece in pieces:
        kind = kinds[piece.key]
        rows = piece.touched_rows if has_rows(kind) else 0
        columns = piece.touched_cols if has_columns(kind) else 0
        sizes["row_moment"] += rows
        sizes["column_moment"] += columns
        sizes["decay"] += rows if has_rows(kind) else columns
    return sizes


def kept_dims(kind: str, dims: int, row_dims: int) -> dict[str, range]:
    """The dimensions that the float state of a whole parameter has of its `dims`; in the others its size is 1.

    Args:
        row_dims: of the parameter's matrix view: none for "scalar", all for "full".
    """
    rows, columns = range(row_dims), range(row_dims, dims)
    if kind == "column":
        return {"column_moment": columns, "decay": columns}
    own = "moment" if kind in ("scalar", "full") else "row_moment"
    return {own: rows, "decay": rows} | ({"column_moment": columns} if kind == "factored" else {})


def whole_shapes(kind: str, shape: tuple[int, ...], row_dims: int) -> dict[str, tuple[int, ...]]:
    """The keepdim shapes of the float state of a whole parameter; the arguments are those of `kept_dims`."""
    kept = kept_dims(kind, len(shape), row_dims)
    return {key: tuple(n if i in dims else 1 for i, n in enumerate(shape)) for key, dims in kept.items()}


def refuse_foreign(state: State, name: str) -> None:
    """Raises:
    ValueError: `state`, as loaded, is no state of Amos.
    """
    foreign = set(state) - {"step", *WHOLE_STATE, *FLOAT_STATE}
    if foreign or "step" not in state:
        raise ValueError(
            f"the state of {name!r} is not of Amos: it has {', '.join(sorted(map(repr, state)))}. "
            "To start with a fresh optimizer on these weights, load the model only "
            "(DeepSpeed: load_optimizer_states=False)."
        )
    for key, value in state.items():
        if key != "step" and not (isinstance(value, Tensor) and value.is_floating_point()):
            what = f"of {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"the state {key!r} of {name!r} is no tensor of floats but {what:.80}. "
                "Load what Amos.state_dict() returned."
            )
    step = state["step"].item() if isinstance(state["step"], Tensor) and state["step"].numel() == 1 else state["step"]
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < 2**53:
        raise ValueError(f"the state 'step' of {name!r} is {step!r:.80}. The file is damaged: use another.")


def refuse_shapes(state: State, name: str, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises:
    ValueError: `state` does not fit a parameter of that shape whose float state has the shapes `expected`.
    """
    for key in FLOAT_STATE:
        has = tuple(state[key].shape) if key in state else None
        if has != expected.get(key):
            raise ValueError(
                f"the state {key!r} of {name!r} has shape {has}, expected {expected.get(key)}. "
                "Load it into the model and with the `moments` that it was written with."
            )
    for key in WHOLE_STATE:
        if key in state and tuple(state[key].shape) != shape:
            raise ValueError(
                f"the state {key!r} of {name!r} has shape {tuple(state[key].shape)}, expected {shape}. "
                "Load it into the model that it was written with."
            )


def own_memory(state: State) -> State:
    """The same state, where tensors that are views of a larger buffer are copied: saving one would save the buffer."""
    if not isinstance(state, dict):  # hooks and users keep other things beside the states of the tensors
        return state
    return {
        key: value.clone() if isinstance(value, Tensor) and _is_part(dtensor.local_of(value)) else value
        for key, value in state.items()
    }


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def put_back(state_dict: dict[str, Any], groups: list[dict[str, Any]], states: dict[Tensor, State]) -> None:
    """torch casts loaded float state to the parameter's dtype: puts back what was written, in the compute dtype."""
    saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    mine = itertools.chain.from_iterable(group["params"] for group in groups)
    for number, tensor in zip(saved, mine, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if key in FLOAT_STATE:
                states[tensor][key] = value.detach().to(tensor.device, compute_dtype(tensor), copy=True)
            elif key in WHOLE_STATE:
                states[tensor][key] = value.detach().to(tensor.device, copy=True)
            elif key == "step":
                states[tensor][key] = (
                    torch.as_tensor(value, dtype=torch.float32, device="cpu").detach().clone().view(())
                )
