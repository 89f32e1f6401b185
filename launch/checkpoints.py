"""Checkpoints that say what they hold: the engine writes the files, we a manifest of their sizes and sums.

A checkpoint is written beside its place, sealed with the manifest, and then put there. A folder without a manifest was
cut off and never counts. With one, every file is checked before anything is loaded: a damaged checkpoint is refused
with its name, and nothing has changed. The manifest itself is amos_dist.manifest.
"""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from amos_dist import manifest

from engines import Engine
from ranks import agree


def save(engine: Engine, folder: Path, step: int, settings: dict[str, Any], progress: dict[str, Any]) -> None:
    """Save `engine` after `step` steps. Every rank calls this.

    `settings` are what a later run must share to continue exactly; `progress` (JSON) is handed back to it.
    """
    place = folder / f"step{step:06d}"
    beside = folder / f"{place.name}.part"

    def put() -> None:
        shutil.rmtree(place, ignore_errors=True)  # of an earlier run; `beside` is complete and counts meanwhile
        beside.rename(place)

    def clear() -> None:
        if (beside / manifest.NAME).is_file():  # an earlier run ended within `put`
            put()
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)

    def seal() -> None:
        manifest.seal(beside, {"step": step, "settings": settings, "progress": progress})
        put()

    first = dist.get_rank() == 0
    agree(clear if first else None)
    engine.save(beside)
    agree(seal if first else None)


def newest(folder: Path) -> Path:
    """The latest complete checkpoint in `folder`."""
    complete = sorted(folder.glob(f"step*/{manifest.NAME}"))
    if not complete:
        raise ValueError(f"{folder}: no complete checkpoint to resume from. Start without --resume.")
    return complete[-1].parent


def check(checkpoint: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step and the progress of a checkpoint that is whole and of the same settings.

    Raises:
        ValueError: a file is damaged, or a setting has changed; it is named.
    """
    how = f"Remove {checkpoint} to resume from the one before."
    content = manifest.read(checkpoint, how)
    try:
        step, saved, progress = int(content["step"]), dict(content["settings"]), dict(content["progress"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / manifest.NAME}: not of this job ({error!r}). {how}") from error
    for name, value in settings.items():
        if saved.get(name) != value:
            found = f"saved with {name} = {saved.get(name)}, not {value}"
            raise ValueError(f"{checkpoint}: {found}. Resume with the same {name}, or start without --resume.")
    manifest.check(checkpoint, how)
    return step, progress


def load(engine: Engine, folder: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step and the `progress` of the newest checkpoint, which `engine` has then. Every rank calls this.

    Raises:
        AgreedError: on every rank, where there is no checkpoint that fits.
    """
    checkpoint = agree(lambda: newest(folder))
    step, progress = agree(lambda: check(checkpoint, settings))
    engine.load(checkpoint)
    return step, progress
