"""Checkpoints that say what they hold: DeepSpeed writes the files, we a manifest of their sizes and sums.

A folder without a manifest was cut off while it was saved and never counts. With one, every file is checked
before anything is loaded: a damaged checkpoint is refused with its name, and nothing has changed.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import deepspeed.comm as dist

from ranks import agree

MANIFEST = "manifest.json"


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def save(engine: Any, folder: Path, step: int, settings: dict[str, Any], client: dict[str, Any]) -> None:
    """Save `engine` after `step` steps. Every rank calls this.

    `settings` are what a later run must share to continue exactly; `client` is handed back to it.
    """
    tag = f"step{step:06d}"
    engine.save_checkpoint(str(folder), tag=tag, client_state=client, save_latest=False)

    def seal() -> None:
        files = sorted(path for path in (folder / tag).glob("*.pt"))
        sums = {path.name: [path.stat().st_size, checksum(path)] for path in files}
        beside = folder / tag / f"{MANIFEST}.part"
        beside.write_text(json.dumps({"step": step, "settings": settings, "files": sums}, indent=1))
        beside.replace(folder / tag / MANIFEST)

    agree(seal if dist.get_rank() == 0 else None)


def newest(folder: Path) -> Path:
    """The latest complete checkpoint in `folder`."""
    complete = sorted(folder.glob(f"step*/{MANIFEST}"))
    if not complete:
        raise ValueError(f"{folder}: no complete checkpoint to resume from. Start without --resume.")
    return complete[-1].parent


def check(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raise a ValueError that names what is wrong: a damaged file, or a setting that has changed."""
    how = f"Remove {checkpoint} to resume from the one before."
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        saved, files = dict(manifest["settings"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable manifest ({error!r}). {how}") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            found = f"saved with {name} = {saved.get(name)}, not {value}"
            raise ValueError(f"{checkpoint}: {found}. Resume with the same {name}, or start without --resume.")
    for name, (size, value) in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file}: missing from the checkpoint. {how}")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: truncated, {file.stat().st_size} bytes instead of {size}. {how}")
        if checksum(file) != value:
            raise ValueError(f"{file}: damaged, its content is not what was saved. {how}")


def load(engine: Any, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Every rank calls this. Returns the `client` dict of the newest checkpoint, or raises on every rank."""
    checkpoint = agree(lambda: newest(folder))
    agree(lambda: check(checkpoint, settings))
    _, client = engine.load_checkpoint(str(folder), tag=checkpoint.name)
    return client
