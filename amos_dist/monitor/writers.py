"""Where a monitor's numbers go. A writer is anything with `write(step, {name: value})` and `close()`."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO


class Writer(Protocol):
    """A name is `quantity/parameter` or `quantity/total`. Files and connections are opened by the first `write`."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _needed(module: str, package: str, writer: str) -> Any:
    """Raises:
    RuntimeError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"the monitor's {writer} needs the package {package}, which cannot be imported ({error}). "
            f"Install it: pip install {package}"
        ) from error


class CSV:
    """A file of `step,name,value` lines. What is there already is kept: a resumed job writes on.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", newline="")
            if not self._file.tell():
                self._file.write("step,name,value\r\n")
        csv.writer(self._file).writerows((step, name, repr(value)) for name, value in values.items())
        self._file.flush()  # to be read, and not lost, while the job runs

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class TensorBoard:
    """Event files of TensorBoard: `tensorboard --logdir FOLDER`.

    Args:
        folder: for the event files.

    Raises:
        RuntimeError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._module = _needed("torch.utils.tensorboard", "tensorboard", "TensorBoard")
        self._writer: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self.folder))
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class WandB:
    """Weights & Biases: the run that is there, or a new one.

    Args:
        settings: of `wandb.init`, such as project="…", where there is no run yet.

    Raises:
        RuntimeError: the package wandb is not installed.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._wandb = _needed("wandb", "wandb", "WandB")
        self._own: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._wandb.run is None:
            self._own = self._wandb.init(**self._settings)
        # Not W&B's own step: that one must not go back, and other calls of log() move it.
        self._wandb.log({"optimizer_step": step, **values})

    def close(self) -> None:
        if self._own is not None:
            self._own.finish()
        self._own = None


class DeepSpeed:
    """DeepSpeed's own monitor, as its JSON sets it up: "tensorboard", "wandb", "csv_monitor", "comet".

    Args:
        engine: what deepspeed.initialize returned.

    Raises:
        ValueError: the engine's JSON turns none of them on.
    """

    def __init__(self, engine: Any) -> None:
        self._monitor: Any = getattr(engine, "monitor", None)
        if not getattr(self._monitor, "enabled", False):
            raise ValueError(
                "DeepSpeed's monitor is off. Add to its JSON, for example: "
                '"csv_monitor": {"enabled": true, "output_path": "logs"}.'
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._monitor.write_events([(name, value, step) for name, value in values.items()])

    def close(self) -> None:
        """It belongs to the engine."""
