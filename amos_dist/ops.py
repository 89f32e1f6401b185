"""The Python face of the kernels: loads the extension, registers its fakes, and says what was built.

`backend(device, fused)` gives the four functions sums_, slots_, update_ and step_ (see csrc/ops.cpp) for a device:
torch.ops.amos_dist where the extension has kernels for it, amos_dist.fallback elsewhere, with one warning that says
why.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from . import __version__, fallback


def _load() -> tuple[Any, str]:
    """The extension, or None and why it is not there."""
    name = f"{__package__}._C"
    try:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"the extension cannot be loaded ({error})"
    # Started in a checkout, Python imports the sources there, not the installed package: take the extension of that.
    here = Path(__file__).parent
    for folder in map(Path, sys.path):
        for file in sorted((folder / here.name).glob("_C*.so")):
            spec = importlib.util.spec_from_file_location(name, file)
            if spec is None or spec.loader is None:
                continue
            try:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            except (ImportError, OSError) as error:
                return None, f"the extension {file} cannot be loaded ({error})"
            if getattr(module, "version", "unknown") == __version__:
                return module, ""
            return None, f"the extension {file} is of another version than these sources, {__version__}"
    return None, "the extension is not built"


_C, _missing = _load()

OPS = ("sums_", "slots_", "update_", "step_")

if _C is not None:
    # Straight to the kernels: there is nothing to differentiate, and autograd's own stop costs a third of a small call.
    _past_autograd = torch.library.Library("amos_dist", "IMPL")
    for _op in OPS:  # they only mutate their arguments, so under a fake tensor there is nothing to do
        torch.library.register_fake(f"amos_dist::{_op}", lambda *args, **kwargs: None)
        _past_autograd.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def why_not(device_type: str) -> str:
    """Why there are no native kernels for this kind of device; empty where there are."""
    if _C is None:
        return _missing
    if device_type == "cuda" and not _C.cuda_archs:
        return f"it was built without CUDA kernels: {_C.no_cuda_reason}"
    return "" if device_type in ("cpu", "cuda") else f"there are no kernels for {device_type!r}"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"amos_dist uses its slower pure-torch step, because {reason}. "
        "Reinstall with `pip install --no-build-isolation .` (AMOS_CUDA=1 for CUDA), or pass fused=False to accept it.",
        stacklevel=4,
    )


def backend(device: torch.device, fused: bool | None) -> Any:
    """The four functions for tensors on `device`.

    Raises:
        RuntimeError: fused=True, and the extension has no kernels for this device.
    """
    if fused is False:
        return fallback
    if reason := why_not(device.type):
        if fused:
            raise RuntimeError(
                f"fused=True cannot be had on {device.type!r}: {reason}. Reinstall amos_dist, or drop fused=True."
            )
        _warn_once(reason)
        return fallback
    return torch.ops.amos_dist


def build_info() -> dict[str, Any]:
    """What was built: version, torch built against, CPU instruction set, CUDA architectures or why there are none."""
    info: dict[str, Any] = {"version": __version__, "torch": torch.__version__, "torch_built": None}
    info |= {"extension": _C is not None, "reason": _missing}
    info |= {"cpu_instruction_set": None, "cpu_instruction_sets": [], "cuda_archs": [], "cuda_reason": why_not("cuda")}
    if _C is not None:
        info["torch_built"] = _C.torch_built
        info["cpu_instruction_set"] = _C.cpu_isa
        info["cpu_instruction_sets"] = _C.cpu_isas.split(";")
        info["cuda_archs"] = [f"sm_{arch}" for arch in _C.cuda_archs.split(";") if arch]
    return info
