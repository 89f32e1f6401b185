"""The one table of tolerances, and the one measure that they are for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("tests.unit.compare")  # so that its asserts show their numbers


@dataclass(frozen=True)
class Tolerance:
    """Largest `relative_error` of a parameter and of its state, for one dtype of parameters.

    The state of low-precision parameters is float32, and so is its tolerance. A low-precision parameter may differ by
    one unit in the last place, where float32 values that differ in their last bit are rounded to different neighbours.
    """

    param: float
    state: float


TOLERANCES = {
    torch.float64: Tolerance(param=1e-12, state=1e-12),
    torch.float32: Tolerance(param=2e-6, state=2e-6),
    torch.bfloat16: Tolerance(param=2**-7, state=2e-6),
    torch.float16: Tolerance(param=2**-10, state=2e-6),
}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """max |value - expected| / max |expected|, in float64; infinite where the shapes or the NaNs differ."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    if value.shape != expected.shape or not torch.equal(value.isnan(), expected.isnan()):
        return float("inf")
    different = (value != expected) & ~expected.isnan()  # equal infinities have no difference
    if not different.any():
        return 0.0
    distance = (value - expected)[different].abs().max().item()
    size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    return distance / size if size else float("inf")
