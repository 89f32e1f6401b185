"""Which kind of checkpoint a path holds, and writing another so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS = ("plain", "dcp", "zero")


def kind_of(path: Path) -> str:
    """ "plain" (a file), "dcp" or "zero" (folders).

    Raises:
        ValueError: nothing is there, or no checkpoint.
    """
    if path.is_file():
        return "plain"
    if not path.exists():
        raise ValueError(f"{path}: there is nothing. Give a checkpoint's folder, or a file of torch.save.")
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder. Give a checkpoint's folder, or a file of torch.save.")
    if (path / ".metadata").is_file():
        return "dcp"
    if any((path / name).is_file() for name in ("latest", "latest_universal")) or is_tag(path):
        return "zero"
    if any(is_tag(folder) for folder in path.iterdir() if folder.is_dir()):
        return "zero"
    raise ValueError(
        f"{path} is no checkpoint: it has no .metadata, as of torch.distributed.checkpoint, and no latest, zero or "
        "*_optim_states.pt, as of DeepSpeed. Give the folder that was saved into."
    )


def is_universal(folder: Path) -> bool:
    """Whether it is a tag's folder of a DeepSpeed universal checkpoint."""
    return (folder / "zero" / "optimizer_state.pt").is_file()


def is_tag(folder: Path) -> bool:
    """Whether it is a tag's folder of DeepSpeed, with the files of each rank or universal."""
    return is_universal(folder) or next(folder.glob("*_model_states.pt"), None) is not None


def refuse_destination(source: Path, destination: Path, force: bool) -> None:
    """Raises:
    ValueError: writing there would destroy something that was not asked for, or cannot be done.
    """
    here, there = source.resolve(), destination.resolve()
    if here == there or there in here.parents:
        raise ValueError(f"{destination} holds the source, {source}. Give another destination.")
    parent = destination.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{destination}: {parent} is no folder that can be written to. Make it, or give another.")
    if not os.path.lexists(destination):
        return
    if not force:
        raise ValueError(f"{destination} is there already. Give another destination, or --force to replace it.")
    if here in there.parents:
        raise ValueError(f"{destination} is a part of the source, {source}. Give another destination.")
    if destination.is_file() and not zipfile.is_zipfile(destination):  # which torch.save writes
        raise ValueError(
            f"--force replaces checkpoints, and {destination} is another file. Give another destination, or remove it."
        )
    if destination.is_dir() and any(destination.iterdir()):
        try:
            kind_of(destination)
        except ValueError:
            raise ValueError(
                f"--force replaces checkpoints, and {destination} is a folder of other things. "
                "Give another destination."
            ) from None


@contextlib.contextmanager
def written_beside(destination: Path) -> Iterator[Path]:
    """Gives a free path in a new folder beside `destination`; what was written there is put in its place at the end.

    Where the body raises, `destination` is as it was, and nothing is left beside it.
    """
    destination = destination.absolute()
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        yield new
        replaced = os.path.lexists(destination)
        if replaced:
            destination.rename(old)
        try:
            new.rename(destination)
        except OSError:
            if replaced:
                old.rename(destination)
            raise


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, where tqdm is installed; what it gives is called after each of `total` things."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc=text, unit="", disable=None, leave=False) as bar:
        yield bar.update
