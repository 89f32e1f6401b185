"""A folder of torch.distributed.checkpoint, in one process without a process group."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .canonical import Checkpoint, sections, tree_of
from .files import first_line, progress


def read(path: Path, model_key: str | None, optimizer_key: str | None) -> Checkpoint:
    """Raises:
    ValueError: the folder is damaged, or has no model.
    """
    try:
        reader = FileSystemReader(path)
        metadata = reader.read_metadata()
        entries = metadata.state_dict_metadata
        parts = sum(len(e.chunks) if isinstance(e, TensorStorageMetadata) else 1 for e in entries.values())
        tree: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else None
            for key, entry in entries.items()
        }
        with progress("reading", parts) as done, _alone():
            dcp.load(tree, storage_reader=reader, planner=_Load(done), no_dist=True)
    except (Exception, CheckpointException) as error:  # unpickling damaged files raises anything
        raise ValueError(
            f"{path} cannot be read ({_reason(error)}). Give a folder that was saved completely."
        ) from error
    return sections(_nested(tree, metadata.planner_data or {}), str(path), model_key, optimizer_key)


def write(checkpoint: Checkpoint, path: Path, flatten: bool, keys: tuple[str, str], source: str) -> list[str]:
    """Returns: no warnings; such a folder takes whatever can be pickled."""
    tree = tree_of(checkpoint, flatten, keys, source)
    states = [] if checkpoint.optimizer is None else checkpoint.optimizer["state"].values()
    with progress("writing", len(checkpoint.model) + sum(map(len, states))) as done, _alone():
        try:
            dcp.save(tree, storage_writer=FileSystemWriter(path), planner=_Save(done), no_dist=True)
        except CheckpointException as error:  # a BaseException
            raise RuntimeError(_reason(error)) from error
    return []


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """In one line, of the first rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


class _Load(DefaultLoadPlanner):
    """Into a flat dictionary, telling `done` of each part that was read."""

    def __init__(self, done: Callable[[], object]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.done = done

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self.done()

    def load_bytes(self, read_item: Any, value: Any) -> None:
        super().load_bytes(read_item, value)
        self.done()


class _Save(DefaultSavePlanner):
    def __init__(self, done: Callable[[], object]) -> None:
        super().__init__()
        self.done = done

    def resolve_data(self, write_item: Any) -> Any:
        self.done()
        return super().resolve_data(write_item)


def _nested(flat: dict[str, Any], paths: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries and lists that `flat` was made from. paths: the keys and places, by the flat key."""
    root: dict[Any, Any] = {}
    for key, value in flat.items():
        *parents, last = paths.get(key, (key,))
        place = root
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value

    def listed(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if node and all(isinstance(key, int) for key in node):
            return [listed(node[number]) for number in sorted(node)]
        return {key: listed(value) for key, value in node.items()}

    return {key: listed(value) for key, value in root.items()}
