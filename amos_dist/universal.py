"""Makes a folder that DeepSpeed's `ds_to_universal` has written loadable at every ZeRO stage.

As it is, only the stage that has saved it can load it, whatever the optimizer: stages 1 and 2 look for other file names
than stage 3, and for tensors in dicts; stage 3 looks for the groups in another place. Seen with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

MODEL = "mp_rank_00_model_states.pt"
MODEL_3 = "zero_pp_rank_0_" + MODEL  # what stage 3 looks for
PLANES = ("fp32", "exp_avg", "exp_avg_sq")


def complete(folder: Path) -> None:
    """Adds to `folder` what the other stages look for. Doing it again changes nothing.

    Raises:
        ValueError: it is no universal checkpoint, or one of tensor parallel training.
    """
    optimizer_file = folder / "zero" / "optimizer_state.pt"
    models = [folder / name for name in (MODEL, MODEL_3) if (folder / name).is_file()]
    if not optimizer_file.is_file() or not models:
        raise ValueError(
            f"{folder} is no universal checkpoint: it has no {optimizer_file.relative_to(folder)} or no {MODEL}. "
            "Give the --output_folder of python -m deepspeed.checkpoint.ds_to_universal."
        )
    if list(folder.glob("*mp_rank_01*")):
        raise ValueError(
            f"{folder} was written by tensor parallel ranks, which only the same stage can read. "
            "Load it at the stage that has saved it."
        )
    shared = _load(optimizer_file)
    version = _load(models[0]).get("ds_version")
    for name in (MODEL, MODEL_3):
        if not (folder / name).is_file():
            shutil.copy2(models[0], folder / name)
    step: Any = None
    for plane in sorted(path for key in PLANES for path in (folder / "zero").rglob(f"{key}.pt")):
        value = _load(plane)
        if isinstance(value, torch.Tensor):  # as stage 3 writes it
            torch.save({"param": value}, plane)
        if step is None and (plane.parent / "step.pt").is_file():
            step = _load(plane.parent / "step.pt")
    shared.setdefault("ds_version", version)
    shared.setdefault("optimizer_state_dict", {"state": {0: {"step": step}}, "param_groups": shared["param_groups"]})
    torch.save(shared, optimizer_file)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)
