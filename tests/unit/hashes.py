"""Hashes of what some steps give, norms too, for several numbers of threads; see test_threads_and_instructions.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

from amos_dist import Amos, Monitor, build_info

from .tables import make_case

# Large enough for several threads (32768 elements each); rows, tails and columns that no vector divides.
SHAPES = [(), (37,), (131, 517), (3, 25001), (9001, 7), (1, 70003), (61, 3, 33)]
VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {"momentum": 0.9}),
    "bfloat16": (torch.bfloat16, {"momentum": 0.9, "momentum_dtype": "bfloat16"}),
    "int8": (torch.float32, {"momentum": 0.9, "momentum_dtype": "int8"}),
    "float16": (torch.float16, {}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "master": (torch.bfloat16, {"master_weights": True}),
}
# Pieces of parameters, which update_ takes: parameter, gradient, momentum.
PIECES: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {
    "float64 pieces": (torch.float64, torch.float64, torch.float64),
    "float32 pieces": (torch.float32, torch.bfloat16, torch.float32),
    "bfloat16 pieces": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16 pieces": (torch.float16, torch.float16, None),
}


def digest_of(tensors: Iterable[torch.Tensor], *more: object) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashed(variant: str, draw: list[torch.Tensor]) -> str:
    """Of whole parameters, their state and what a monitor says of them."""
    dtype, given = VARIANTS[variant]
    groups = [
        {"params": [(x / 2).to(dtype).requires_grad_() for x in draw], "moments": moments}
        for moments in ("factored", "row", "column", "scalar", "full")
    ]
    optimizer = Amos(groups, lr=0.1, sigma=0.3, beta=0.9, clip_value=2.0, **given)
    watch, seen = Monitor(optimizer, every=1), []
    for t in (1, 2):
        grads = [(x.flip(-1) if x.dim() else x).to(dtype) / t for x in draw]
        for group in groups:
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad = grad
        optimizer.step()
        seen.append(watch.last)
    return digest_of((x for param, state in optimizer.state.items() for x in (param, *state.values())), seen)


def hashed_pieces(variant: str) -> str:
    """Of what the phases change, and of the norms."""
    case = make_case(4, ("factored", "row", "column"), *PIECES[variant], largest=900)
    norms = torch.zeros(len(case.hyper), 2, dtype=torch.float64)
    native = torch.ops.amos_dist
    native.sums_(*case.arguments("sums_"))
    native.slots_(*case.arguments("slots_"))
    native.update_(*case.arguments("update_"), norms)
    return digest_of([*case.changed(), norms])


def measure() -> dict[str, Any]:
    """Leaves torch with another number of threads."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator) for shape in SHAPES]
    result: dict[str, list[str]] = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for variant in VARIANTS:
            result.setdefault(variant, []).append(hashed(variant, draw))
        for variant in PIECES:
            result.setdefault(variant, []).append(hashed_pieces(variant))
    return {"isa": build_info()["cpu_instruction_set"], "hashes": result}


if __name__ == "__main__":
    print(json.dumps(measure()))
