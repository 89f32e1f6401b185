"""Checkpoint folders that say what they hold: a manifest of the sizes and check sums of their files.

A folder without a manifest was cut off, and does not count. With one, damage is found before anything is loaded, and
named: torch loads a weight with a flipped bit without a word.

    manifest.save(engine, "checkpoints", tag)  # instead of engine.save_checkpoint, on every rank
    manifest.check("checkpoints/" + tag)       # before engine.load_checkpoint, on one rank
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .convert.files import first_line, progress

NAME = "manifest.json"
ROOM = "Make room there, or save to another place; what was saved before is whole."
REMEDY = "Load an older checkpoint, or copy this one again from a place where it is whole."


CHUNK = 1 << 22


def _checksums(folder: Path, names: Iterable[str], doing: str) -> Iterator[tuple[str, int]]:
    """(name, CRC-32) of each file, with a bar.

    Raises:
        OSError: it cannot be read; names it.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    with progress(f"{doing} {folder.name}", sum(1 + size // CHUNK for size in sizes.values())) as step:
        for name in sizes:
            value = 0
            try:
                with (folder / name).open("rb") as file:
                    while chunk := file.read(CHUNK):
                        value = zlib.crc32(chunk, value)
                        step()
            except OSError as error:
                raise OSError(f"{folder / name}: cannot be read ({error.strerror})") from error
            yield name, value


def _files(folder: Path) -> dict[str, int]:
    """The size of each file in a folder, by its path there, in order."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _own_sum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({key: value for key, value in content.items() if key != "sum"}).encode())


def replace_text(path: Path, text: str) -> None:
    """Writes a file beside its place and puts it there when it is complete.

    Raises:
        OSError: it cannot be written; names it. What was there before is still there.
    """
    beside = path.with_name(f"{path.name}.part")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses power may keep the new name and not the content
        beside.replace(path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror}). {ROOM}") from error


def seal(folder: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Writes the manifest of a folder, which makes it complete. On one rank, after all have saved.

    Args:
        extra: what else the manifest shall hold, for `read`: anything that JSON can.

    Raises:
        OSError: a file cannot be read, or the manifest not be written; it is named.
    """
    folder = Path(folder)
    (folder / NAME).unlink(missing_ok=True)  # of another content
    (folder / f"{NAME}.part").unlink(missing_ok=True)
    files = _files(folder)
    sums = {name: [files[name], value] for name, value in _checksums(folder, files, "seal")}
    content = json.loads(json.dumps({**(extra or {}), "files": sums}))
    replace_text(folder / NAME, json.dumps({**content, "sum": _own_sum(content)}, indent=1))


def read(folder: str | Path, remedy: str = REMEDY) -> dict[str, Any]:
    """The manifest of a folder: `extra`, and "files": {name: [size, sum]}. Looks at no other file.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise ValueError(f"{path}: there is none, so that the save was cut off, or never sealed. {remedy}")
    try:
        content = json.loads(path.read_text())
        files = {str(name): (int(size), int(value)) for name, (size, value) in content["files"].items()}
        whole = content.get("sum", _own_sum(content)) == _own_sum(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error!r}). {remedy}") from error
    if not whole:
        raise ValueError(f"{path}: damaged, its content is not what was written. {remedy}")
    return {**content, "files": files}


def check(folder: str | Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Reads every file of a sealed folder, and returns its manifest. On one rank, before all load.

    Raises:
        ValueError: names the first file that is missing, truncated, damaged, of another run, or not in the manifest.
    """
    folder = Path(folder)
    content = read(folder, remedy)
    expected, found = content["files"], _files(folder)
    for name, (size, _) in expected.items():  # first what takes no time
        if name not in found:
            raise ValueError(f"{folder / name}: missing from the checkpoint. {remedy}")
        if found[name] != size:
            kind = "truncated" if found[name] < size else "of another run, or damaged"
            raise ValueError(f"{folder / name}: {kind}, {found[name]} bytes instead of {size}. {remedy}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{folder / name}: not of this checkpoint. Move it away if you know what it is. {remedy}")
    try:
        for name, value in _checksums(folder, expected, "check"):
            if value != expected[name][1]:
                wrong = "damaged, or of another run: its content is not what was saved"
                raise ValueError(f"{folder / name}: {wrong}. {remedy}")
    except OSError as error:
        raise ValueError(f"{error}. {remedy}") from error
    return content


def verify(folder: Path) -> str:
    """`check` of a folder, or of the checkpoint in it that DeepSpeed's file `latest` names; says what was found.

    Raises:
        ValueError: as `check`; or there is no checkpoint.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder. Give the folder of a checkpoint.")
    latest = folder / "latest"
    if not (folder / NAME).is_file() and latest.is_file():
        folder = folder / latest.read_text().strip()
    files = check(folder)["files"]
    return f"{folder}: {len(files)} files, {sum(size for size, _ in files.values()):,} bytes, as they were saved"


# ---- saving under DeepSpeed ------------------------------------------------------------------------------------------


def write(engine: Any, folder: Path, client_state: dict[str, Any] | None = None) -> None:
    """engine.save_checkpoint into `folder`, without `latest`. Every rank calls this.

    A rank that cannot write a file goes on through DeepSpeed's barriers, at which the others would wait for it.

    Raises:
        OSError: on this rank alone, when all are through: a file could not be written; names it.
        RuntimeError: anything else, after which the ranks are not at the same place.
    """
    faults: list[str] = []
    files = engine.checkpoint_engine
    real = files.save

    def save(state_dict: Any, path: Any) -> Any:  # DeepSpeed gives them by place and by name
        try:
            return real(state_dict, path)
        except (OSError, RuntimeError) as error:
            faults.append(f"{path}: could not be written ({first_line(error)}). {ROOM}")

    files.save = save
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=client_state or {}, save_latest=False)
    except OSError as error:
        raise RuntimeError(f"{folder}: could not be written ({first_line(error)}). {ROOM}") from error
    finally:
        del files.save
    if faults:
        raise OSError(faults[0])


def save(engine: Any, save_dir: str | Path, tag: str, client_state: dict[str, Any] | None = None) -> None:
    """engine.save_checkpoint, sealed; `latest` names it only when all ranks' files are there. Every rank calls this.

    DeepSpeed itself has rank 0 write `latest` as soon as its own files are written, whatever became of the others'.

    Raises:
        RuntimeError: on every rank, where any could not write; names the file. `latest` is as before.
    """
    folder = Path(save_dir, tag)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).unlink(missing_ok=True)  # the same tag again: what it says will be false in a moment

    def finish() -> None:
        seal(folder)
        replace_text(folder.parent / "latest", tag)

    first = dist.get_rank() == 0
    _all_or_none(begin if first else None)
    _all_or_none(lambda: write(engine, folder, client_state))
    _all_or_none(finish if first else None)


def _all_or_none(work: Callable[[], None] | None) -> None:
    """Does it, and raises on every rank the OSError that any had."""
    fault = ""
    try:
        if work:
            work()
    except OSError as error:
        fault = str(error)
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, fault)
    for rank, text in enumerate(found):
        if text:
            raise RuntimeError(f"rank {rank} cannot save: {text}")
