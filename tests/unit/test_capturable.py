"""capturable=True on the CPU: the same numbers, with `step` and the table of hyper-parameters beside the tensors.

That a CUDA graph replays it is checked on a GPU: tests/gpu/features.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amos_dist import Amos

from .compare import KINDS, follow, gradients, parameters

KEYWORDS: dict[str, Any] = {"sigma": 0.3, "beta": 0.9}


@pytest.mark.parametrize("fused", [True, False])
def test_same_bits(fused: bool) -> None:
    runs = []
    for capturable in (False, True):
        params = parameters(torch.float32)
        groups = [{"params": params[i::5], "moments": kind} for i, kind in enumerate(KINDS)]
        optimizer = Amos(groups, lr=0.1, capturable=capturable, fused=fused, momentum=0.9, **KEYWORDS)
        for t in range(1, 5):
            for param, grad in zip(params, gradients(params)(t), strict=True):
                param.grad = grad
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
        runs.append([*params, *(v for p in params for v in optimizer.state[p].values())])
    assert all(map(torch.equal, *runs))


def test_lr_is_a_tensor_that_moves() -> None:
    params = parameters(torch.float32)
    optimizer = Amos(params, lr=torch.tensor(0.1), capturable=True, **KEYWORDS)
    lr = optimizer.param_groups[0]["lr"]

    def at(t: int) -> Any:
        lr.fill_(0.1 * 0.5**t)
        return gradients(params)(t)

    follow(optimizer, params, at)
    assert optimizer.param_groups[0]["lr"] is lr


def test_some_without_gradients() -> None:
    params = parameters(torch.float32)

    def at(t: int) -> Any:
        return [grad if (i + t) % 3 else None for i, grad in enumerate(gradients(params)(t))]

    follow(Amos(params, lr=0.1, capturable=True, **KEYWORDS), params, at, steps=6)
