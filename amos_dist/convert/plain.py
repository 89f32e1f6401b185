"""A file of torch.save: {"model": …, "optimizer": …} by name, which loads with weights_only=True."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .canonical import Checkpoint, sections, tree_of
from .files import first_line


def read(path: Path, model_key: str | None, optimizer_key: str | None) -> Checkpoint:
    """Raises:
    ValueError: the file is damaged, holds objects that could run code, or has no model.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in str(error) else "more than tensors"
        raise ValueError(
            f"{path} is no file of torch.save that is safe to load: it holds {reason}. "
            "Save tensors, numbers, strings, lists and dictionaries only."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)}). Give another file.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, no dictionary. Give a file with a state_dict.")
    return sections(tree, str(path), model_key, optimizer_key)


def write(checkpoint: Checkpoint, path: Path, flatten: bool, keys: tuple[str, str], source: str) -> list[str]:
    """Returns: warnings of what was saved beside model and optimizer and cannot be in such a file."""
    safe = {key: value for key, value in checkpoint.others.items() if _is_safe(value)}
    torch.save(tree_of(replace(checkpoint, others=safe), flatten, keys, source), path)
    return [
        f"{key!r} of {source} is left out: it is more than tensors, numbers, strings, lists and dictionaries."
        for key in checkpoint.others
        if key not in safe
    ]


def _is_safe(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever pickling the user's own object raises
        return False
    return True
