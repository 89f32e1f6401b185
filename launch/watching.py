"""`--monitor`: what Amos does, parameter by parameter; see docs/monitor.md."""

from collections.abc import Sequence
from pathlib import Path

import amos_dist
from amos_dist import monitor

from engines import Engine

KINDS = ("tensorboard", "csv", "wandb", "deepspeed")


def watch(engine: Engine, kinds: Sequence[str], every: int, folder: Path) -> amos_dist.Monitor | None:
    """A monitor of the engine's optimizer; None: none is asked for, or it is not Amos, as in a job to compare with.

    Args:
        kinds: of KINDS. every: steps from one look to the next. folder: for what is written.

    Raises:
        ValueError: a package is not installed, or DeepSpeed's own monitor is off in the JSON.
    """
    if not kinds or not isinstance(engine.optimizer, amos_dist.Amos):
        return None
    writers = [_writer(kind, engine, folder) for kind in kinds]
    # DeepSpeed's engine has counted the steps that it left out itself.
    return amos_dist.Monitor(getattr(engine, "engine", engine.optimizer), every, writers)


def _writer(kind: str, engine: Engine, folder: Path) -> monitor.Writer:
    try:
        if kind == "tensorboard":
            return monitor.TensorBoard(folder / "tensorboard")
        if kind == "csv":
            return monitor.CSV(folder / "monitor.csv")
        if kind == "wandb":
            return monitor.WandB(project="amos_dist", dir=str(folder.parent))
        return monitor.DeepSpeed(getattr(engine, "engine", None))
    except RuntimeError as error:  # a package is missing, on this rank at least
        raise ValueError(str(error)) from error
