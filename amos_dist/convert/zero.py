"""DeepSpeed's ZeRO: the files of its ranks are read, a universal checkpoint is read and written. Seen with 0.19.8.

A universal checkpoint is a folder for each parameter with its float32 numbers and its momentum, which DeepSpeed
calls exp_avg. What Amos has for rows and columns is in `param_groups[0]["amos_state"]`, by name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..checkpoint import BESIDE, ENTRY, SETTINGS, measured_in, sigma_entry
from ..state import FLOAT_STATE, refuse_foreign
from .canonical import Checkpoint, tied
from .files import first_line, is_tag, is_universal, progress

MISSING = "amos_missing"  # in the file of a plane that stands there only because ZeRO-3 asks for it
TRAINING = ("lr_scheduler", "global_steps", "global_samples", "skipped_steps", "data_sampler", "random_ltd")
# Of a *_model_states.pt; the rest is what the user gave save_checkpoint as client_state.
LAYOUT = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
    *("shared_params", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "checkpoint_parallel_dimensions"),
    *("universal_checkpoint_info", "num_experts", "ds_autoep_layers"),
)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, tag: str | None, room: Path, workers: int) -> Checkpoint:
    """Args:
        path: what save_checkpoint was given, or the folder of a tag in it.
        room: a folder for temporary files, as large as the checkpoint, removed again.

    Raises:
        ValueError: files are missing or damaged, or it is no checkpoint of Amos that can be converted.
    """
    folder = _tagged(path, tag)
    if is_universal(folder):
        return _read_universal(folder, folder)
    if next(folder.glob("*_optim_states.pt"), None) is None:
        raise ValueError(
            f"{folder} has no *_optim_states.pt: it was saved without ZeRO, at stage 0. "
            "Its mp_rank_00_model_states.pt is a file of torch.save, with 'module' and 'optimizer' in it."
        )
    with tempfile.TemporaryDirectory(dir=room) as temporary:
        universal = Path(temporary, "universal")
        _make_universal(folder, universal, workers)
        return _read_universal(universal, folder)


def _tagged(path: Path, tag: str | None) -> Path:
    if tag is not None:
        if not is_tag(path / tag):
            raise ValueError(f"--tag {tag}: {path} has no such checkpoint. It has {_tags(path)}: give one of these.")
        return path / tag
    if is_tag(path):
        return path
    for latest in (path / "latest", path / "latest_universal"):
        if latest.is_file():
            folder = path / latest.read_text().strip()
            if not is_tag(folder):
                raise ValueError(
                    f"{latest} says {folder.name!r}, but there is none. Give one of {_tags(path)} as --tag."
                )
            return folder
    raise ValueError(f"{path} has no file latest. Say with --tag which checkpoint is meant: {_tags(path)}.")


def _tags(path: Path) -> str:
    return ", ".join(sorted(each.name for each in path.iterdir() if each.is_dir() and is_tag(each))) or "none"


def _make_universal(folder: Path, universal: Path, workers: int) -> None:
    """Lets DeepSpeed's own converter read the files of all ranks."""
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError as error:
        raise ValueError(
            f"{folder} is read by DeepSpeed, which is missing ({error}). pip install deepspeed."
        ) from error
    asked = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(universal),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with contextlib.redirect_stdout(io.StringIO()), bar:
            ds_to_universal.main(asked)
    except Exception as error:  # damaged files raise anything
        raise ValueError(
            f"{folder} cannot be read: DeepSpeed says {type(error).__name__}: {first_line(error)}. "
            "Give a checkpoint that all ranks have saved completely."
        ) from error


def _read_universal(folder: Path, source: Path) -> Checkpoint:
    """Args:
    source: to be named in errors.
    """
    files = sorted(folder.glob("*_model_states.pt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if not files:
        raise ValueError(f"{source} has no *_model_states.pt. Give a checkpoint that was saved completely.")
    saved, common = _load(files[0]), _load(folder / "zero" / "optimizer_state.pt")
    if saved.get("mp_world_size", 1) != 1:
        raise ValueError(
            f"{source} was saved with tensor or pipeline parallelism, of which Amos's state cannot be put together. "
            "Save it with data parallelism only."
        )
    groups = [{**group} for group in common.get("param_groups", ())]
    entries = groups[0].pop(ENTRY, None) if groups else None
    for group in groups:
        for key in BESIDE:
            group.pop(key, None)
    if not entries:
        raise ValueError(
            f"{source} has no state of Amos: another optimizer wrote it. "
            "Train and save it with Amos, or take the weights alone with DeepSpeed's zero_to_fp32.py."
        )
    shapes = {name: tuple(shape) for group in saved["param_shapes"] for name, shape in group.items()}
    for group, names in zip(groups, _names_by_group(saved["param_shapes"], groups, source), strict=True):
        # Amos built from named parameters has their names in its groups, and torch asks a checkpoint for all of it.
        group["params"] = group["param_names"] = names
        group["measured_sigma"] = measured_in(entries, names)
    weights, states = {}, {}
    with progress("reading", len(shapes)) as done:
        for group in groups:
            momenta: dict[str, Tensor] = {}
            for name in group["params"]:
                weights[name], _ = _plane(folder, name, "fp32", shapes[name])
                if name in entries:
                    states[name] = {key: value for key, value in entries[name].items() if key in ("step", *FLOAT_STATE)}
                    plane, there = _plane(folder, name, "exp_avg", shapes[name])
                    momenta |= {name: plane} if there else {}
                done()
            # Rules may give momentum to some, and do not stand in the checkpoint. What is too much does no harm.
            if group["momentum"] or any(plane.any() for plane in momenta.values()):
                for name, plane in momenta.items():
                    states[name]["momentum"] = _narrowed(plane, settings.momentum_dtype(group["momentum_dtype"]))
    model = _model(weights, saved, files, source)
    training = {key: saved[key] for key in TRAINING if saved.get(key) is not None} | _loss_scale(common)
    others = {key: value for key, value in saved.items() if key not in (*TRAINING, *LAYOUT)}
    return Checkpoint(model, {"state": states, "param_groups": groups}, {**others, "deepspeed": training})


def _loss_scale(common: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of fp16's dynamic loss scale: other files than DeepSpeed's hold no objects of its classes."""
    if not common.get("dynamic_loss_scale"):
        return {}
    held = vars(common["loss_scaler"])
    return {"loss_scale": {key: value for key, value in held.items() if isinstance(value, int | float)}}


def _names_by_group(shapes: list[dict[str, Any]], groups: list[dict[str, Any]], source: Path) -> list[list[str]]:
    """ZeRO-3 cuts groups into sub-groups, one behind the other; the other stages do not."""
    if len(shapes) == len(groups):
        return [list(names) for names in shapes]
    rest, result = [name for names in shapes for name in names], []
    if len(groups) == 1:
        return [rest]
    for group in groups:
        count = len(group["measured_sigma"])
        result.append(rest[:count])
        rest = rest[count:]
    if rest or any(len(names) != len(g["measured_sigma"]) for names, g in zip(result, groups, strict=True)):
        raise ValueError(
            f"{source} does not say which parameters its groups have: some were frozen. "
            "Give DeepSpeed only parameters that are trained, or set sub_group_size to more than the model has."
        )
    return result


def _narrowed(plane: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the dtype that momentum had, where that loses nothing: DeepSpeed makes float32 of a plane that it loads."""
    if dtype == torch.int8:
        return plane  # checkpoints have it in float32
    narrow = plane.to(dtype or plane.dtype)
    return narrow if torch.equal(narrow.to(plane.dtype), plane) else plane


def _plane(folder: Path, name: str, key: str, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    """What a parameter's folder has, whole or flat, alone or in a dictionary; and whether it means anything."""
    saved = _load(folder / "zero" / name / f"{key}.pt")
    saved = saved if isinstance(saved, dict) else {"param": saved}
    return saved["param"].reshape(shape), not saved.get(MISSING, False)


def _model(weights: dict[str, Tensor], saved: dict[str, Any], files: list[Path], source: Path) -> dict[str, Tensor]:
    """The whole model in its own order: trained weights in float32; buffers and frozen weights as they were saved."""
    shared, frozen = dict(saved.get("shared_params") or {}), saved.get("frozen_param_shapes") or {}
    fragments = [_load(file)["frozen_param_fragments"] for file in files] if frozen else []
    model = {}
    for name, tensor in saved["module"].items():
        owner = shared.get(name, name)
        if owner in weights:
            model[name] = weights[owner]
            if tensor.shape == weights[owner].shape and not torch.equal(weights[owner].to(tensor.dtype), tensor):
                raise ValueError(
                    f"{source} has two {name!r} that differ, in the model and in the partitions of the optimizer. "
                    "DeepSpeed mixes up what it saves with round_robin_gradients: set it to false, and save once more."
                )
        elif owner in frozen:  # at stage 3 each rank has a part, with padding at the end
            whole = torch.cat([part[owner].flatten() for part in fragments])
            shape = frozen[owner]
            model[name] = whole[: shape.numel()].reshape(shape)
        else:
            model[name] = tensor
    return model


def _load(file: Path) -> Any:
    """DeepSpeed's files hold objects of DeepSpeed, and whatever the user has saved with them."""
    try:
        return torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling damaged files raises anything
        raise ValueError(
            f"{file} cannot be read ({first_line(error)}). Give a checkpoint that was saved completely."
        ) from error


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, path: Path, source: str, tag: str = "universal") -> list[str]:
    """Writes what `engine.load_checkpoint(path)` loads with "checkpoint": {"load_universal": true}.

    Raises:
        ValueError: there is no optimizer, or not Amos.
    """
    if checkpoint.optimizer is None:
        raise ValueError(
            f"{source} has no optimizer, without which DeepSpeed loads no ZeRO checkpoint. "
            "Load its weights into the model before deepspeed.initialize."
        )
    states, groups = checkpoint.optimizer["state"], _trained(checkpoint.optimizer)
    for name, state in states.items():
        refuse_foreign(state, name)
    if any("amos_group" not in group for group in groups):
        raise ValueError(f"the optimizer in {source} is not Amos. Give a checkpoint of Amos.")
    folder, warnings = path / tag, []
    names = [name for group in groups for name in group["params"]]
    step = torch.tensor(max((float(state["step"]) for state in states.values()), default=0.0))
    with progress("writing", len(names)) as done:
        for name in names:
            weight = states.get(name, {}).get("master", checkpoint.model[name]).float()
            _write_planes(folder / "zero" / name, weight, states.get(name, {}).get("momentum"), step)
            done()
    sigmas = {n: sigma for g in groups for n, sigma in zip(g["params"], g["measured_sigma"], strict=True)}
    entries = {name: _entry(state, sigmas[name]) for name, state in states.items()}
    keywords = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    written = [{**group, "params": [number]} for number, group in enumerate(keywords)]
    written[0] |= {ENTRY: entries, SETTINGS: keywords}
    optimizer = {"state": {0: {"step": step}}, "param_groups": written}
    version = _version()
    # Stages 1 and 2 look for the groups at the top, stage 3 beside the state.
    common = {"param_groups": written, "optimizer_state_dict": optimizer, "ds_version": version}
    others = {**checkpoint.others}
    training = {"lr_scheduler": None, "global_steps": int(step), "skipped_steps": 0, **others.pop("deepspeed", {})}
    if scale := training.pop("loss_scale", None):
        try:
            common |= _loss_scaler(scale)
        except ImportError as error:
            warnings.append(
                f"the loss scale of {source} starts anew: DeepSpeed, which has its class, is missing ({error})."
            )
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    shapes = [{name: checkpoint.model[name].shape for name in group["params"]} for group in groups]
    empty = torch.empty(0)
    saved = {
        **others,
        **training,
        "module": {name: empty if name in names else tensor for name, tensor in checkpoint.model.items()},
        "param_shapes": shapes,
        "shared_params": tied(checkpoint.model, names),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": version,
    }
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2, and 3
        torch.save(saved, folder / f"{name}_model_states.pt")
    (path / "latest_universal").write_text(tag)
    if training["lr_scheduler"] is None:
        warnings.append(
            f"{source} has no scheduler of DeepSpeed. If the JSON has one, load with load_lr_scheduler_states=False "
            "and set it yourself."
        )
    return warnings


def _loss_scaler(scale: dict[str, float]) -> dict[str, Any]:
    """What DeepSpeed loads: see `_loss_scale`. Raises ImportError."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    held = DynamicLossScaler(
        scale["cur_scale"],
        scale["scale_window"],
        scale["min_scale"],
        scale["delayed_shift"],
        scale["consecutive_hysteresis"],
    )
    vars(held).update(scale)
    return {"loss_scaler": held, "dynamic_loss_scale": True}


def _trained(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups without frozen parameters, which DeepSpeed does not give to an optimizer."""
    groups = []
    for group in optimizer["param_groups"]:
        kept = [i for i, name in enumerate(group["params"]) if name in optimizer["state"] or not optimizer["state"]]
        group = {**group, "params": [group["params"][i] for i in kept]}
        for key in ("measured_sigma", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
        groups.append(group)
    return groups


def _entry(state: dict[str, Any], sigma: float | None) -> dict[str, Tensor]:
    """What Amos has for a parameter beside its momentum; and the sigma that was measured."""
    return {key: value for key, value in state.items() if key in ("step", *FLOAT_STATE)} | sigma_entry(sigma)


def _write_planes(folder: Path, weight: Tensor, momentum: Tensor | None, step: Tensor) -> None:
    folder.mkdir(parents=True)
    nothing = torch.zeros(()).expand(weight.shape)  # takes no room in the file
    for key, plane in {"fp32": weight, "exp_avg": momentum, "exp_avg_sq": None}.items():
        saved = {"param": nothing, MISSING: True} if plane is None else {"param": plane}
        torch.save({**saved, "cat_dim": 0}, folder / f"{key}.pt")
    torch.save(step, folder / "step.pt")


def _version() -> str:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return "0.19.8"
