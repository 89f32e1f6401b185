"""Checkpoints that say what they hold: the engine writes the files, we a manifest of their sizes and sums.

A checkpoint is written beside its place, sealed with the manifest, and then put there. A folder without a manifest was
cut off and never counts. With one, every file is checked before anything is loaded: a damaged checkpoint is refused
with its name, and nothing has changed. The manifest itself is amos_dist.manifest.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from amos_dist import convert, manifest

from engines import Engine
from ranks import agree, of_first


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
    found = _read(checkpoint, how)
    found.compare(settings)
    manifest.check(checkpoint, how)
    return found.step, found.progress


def load(engine: Engine, folder: Path, settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The step and the `progress` of the newest checkpoint, which `engine` has then. Every rank calls this.

    Raises:
        AgreedError: on every rank, where there is no checkpoint that fits.
    """
    checkpoint = agree(lambda: newest(folder))
    step, progress = agree(lambda: check(checkpoint, settings))
    engine.load(checkpoint)
    return step, progress


@dataclass
class Found:
    """A checkpoint on the disk, and what its manifest says of it."""

    place: Path
    step: int
    settings: dict[str, Any]
    progress: dict[str, Any]

    def compare(self, settings: dict[str, Any]) -> None:
        """Raises:
        ValueError: one of `settings` is another one there.
        """
        for name, value in settings.items():
            if self.settings.get(name) != value:
                found = f"saved with {name} = {self.settings.get(name)}, not {value}"
                raise ValueError(f"{self.place}: {found}. Resume with the same {name}, or start without --resume.")

    @property
    def universal(self) -> Path | None:
        """Where its copy for another number of ranks is, if this number is another, and the engine needs one."""
        s = self.settings
        other = s.get("ranks") != dist.get_world_size() and s.get("engine") == "deepspeed" and s.get("ZeRO stage")
        return self.place.with_name(f"{self.place.name}.universal") if other else None

    def fit(self, config: dict[str, Any]) -> dict[str, Any]:
        """The DeepSpeed configuration that goes on with the same batch on this many ranks.

        No forward pass has more sequences than before: on fewer ranks there are more of them in a step.

        Raises:
            ValueError: the batch has changed, or these ranks cannot share it.
        """
        batch, ranks = int(self.settings["batch"]), dist.get_world_size()
        if config.get("train_batch_size", batch) != batch:
            self.compare({"batch": config["train_batch_size"]})
        if batch % ranks:
            fitting = ", ".join(str(count) for count in range(1, batch + 1) if batch % count == 0)
            raise ValueError(f"{ranks} ranks cannot share a batch of {batch} sequences. Restart on {fitting} ranks.")
        share, before = batch // ranks, int(self.progress.get("micro", batch))
        micro = next(size for size in range(min(before, share), 0, -1) if share % size == 0)
        sizes = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": share // micro}
        config = {**config, "train_batch_size": batch, **sizes}
        if self.universal:
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
        return config

    def load(self, engine: Engine, settings: dict[str, Any]) -> None:
        """`engine`, made from what `fit` gave, has it then. Every rank calls this.

        Raises:
            AgreedError: on every rank, where the settings differ or the copy cannot be made.
        """
        agree(lambda: self.compare({name: value for name, value in settings.items() if name != "ranks"}))
        copy = self.universal
        if copy is None:
            engine.load(self.place)
            return
        first = dist.get_rank() == 0
        agree((lambda: convert.convert(self.place, copy, "zero", force=copy.exists())) if first else None)
        engine.load(copy / "universal")
        agree((lambda: shutil.rmtree(copy)) if first else None)


def _read(checkpoint: Path, how: str) -> Found:
    content = manifest.read(checkpoint, how)
    try:
        return Found(checkpoint, int(content["step"]), dict(content["settings"]), dict(content["progress"]))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / manifest.NAME}: not of this job ({error!r}). {how}") from error


def newest_whole(folder: Path) -> Found | None:
    """The latest checkpoint in `folder` without damage; None where nothing was saved yet. Every rank calls this.

    Raises:
        AgreedError: on every rank, where all are damaged.
    """

    def look() -> Found | None:
        places = sorted((path.parent for path in folder.glob(f"step*/{manifest.NAME}")), reverse=True)
        for place in places:
            try:
                manifest.check(place, "An older one is looked for.")
                return _read(place, "An older one is looked for.")
            except ValueError as error:
                sys.stderr.write(f"{error}\n")
        if places:
            raise ValueError(f"{folder}: all checkpoints are damaged. Remove them to start from the beginning.")
        return None

    return of_first(look)
