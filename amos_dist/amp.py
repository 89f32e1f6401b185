"""torch.amp.GradScaler and parameters that are cut over ranks: all ranks skip a step, or none does.

GradScaler looks at the gradients of one placement only: of FSDP over tensor parallel some ranks may not hear of an
infinity. It leaves `grad_scale` and `found_inf` on an optimizer that asks for them, and skips nothing then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sharding import dtensor


def unscaled(optimizer: Any, grads: Iterable[Tensor]) -> Tensor | None:
    """Divides the gradients by the scale of the GradScaler that is calling, unless its `unscale_` has done it.

    Returns:
        Above 0: it has found a gradient that is not finite. None: no GradScaler is calling.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and optimizer.grad_scale is not None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in map(dtensor.local_of, grads):
            by_device.setdefault(grad.device, []).append(grad)
        for device, some in by_device.items():
            torch._foreach_mul_(some, optimizer.grad_scale.double().reciprocal().float().to(device))
    return found_inf


def tell_scaler() -> None:
    """Another rank has found an infinity: lowers the next scale of the GradScaler whose step() is calling, as there.

    It hands over a sum of its own tensors, so that these can only be found where it stands.
    """
    scaling = sys.modules["torch.amp.grad_scaler"].GradScaler.step.__code__
    frame = sys._getframe()
    while frame is not None and frame.f_code is not scaling:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None:
        for found in frame.f_locals["optimizer_state"]["found_inf_per_device"].values():
            found.fill_(1)
