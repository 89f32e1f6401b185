"""Every kind of moments, dtype and option of the kernels against the slow reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from amos_dist import Amos
from amos_dist.reference import amos_step
from amos_dist.tables import seed_of_parameter

from ..conftest import TOLERANCES, relative_error
from . import common

STEPS = 3
COLUMNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "bf16 momentum": {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    "8-bit momentum": {"momentum": 0.9, "momentum_dtype": torch.int8},
    "clip, L2, maximize": {"clip_value": 0.5, "extra_l2": 0.01, "maximize": True},
    "momentum, unaligned": {"momentum": 0.9},
}


# What one element may be off, over the largest, where it was rounded to the other neighbour.
ROUNDED = {"bf16 momentum": 1e-4, "8-bit momentum": 3e-3}


@dataclass(frozen=True)
class Case:
    """Parameters of all shapes in one optimizer."""

    moments: str
    dtype: torch.dtype
    column: str

    @property
    def options(self) -> dict[str, Any]:
        return COLUMNS[self.column]

    @property
    def offset(self) -> int:
        return 3 if "unaligned" in self.column else 0

    def __str__(self) -> str:
        return f"{self.moments}, {str(self.dtype)[6:]}, {self.column}"


def cases() -> Iterator[Case]:
    for moments in common.KINDS:
        for dtype in TOLERANCES:
            for column in COLUMNS:
                if dtype != torch.float64 or column not in ROUNDED:
                    yield Case(moments, dtype, column)


def train(
    case: Case, sizes: list[tuple[int, ...]], device: torch.device
) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    """Parameters and state after all steps, by the kernels."""
    values, *gradients = common.draws(sizes, case.dtype, STEPS)
    params = common.parameters(values, device, case.offset)
    optimizer = Amos(params, moments=case.moments, fused=True, **common.HYPER, **case.options)
    for grads in gradients:
        common.give(params, grads, case.offset)
        optimizer.step()
    return params, [optimizer.state[param] for param in params]


def error_over_tolerance(
    case: Case, sizes: list[tuple[int, ...]], params: list[torch.nn.Parameter], states: list[dict[str, Any]]
) -> float:
    """The largest error of parameters and state beside the reference, which torch computes on the same device."""
    # float32 is held against float64. What is rounded after every step (parameters, momentum) needs the same rounding.
    dtype = torch.float64 if case.dtype == torch.float32 and case.column not in ROUNDED else case.dtype
    tolerance = TOLERANCES[case.dtype]
    bound = max(tolerance.param, ROUNDED.get(case.column, 0))
    values, *gradients = common.draws(sizes, case.dtype, STEPS)
    worst = 0.0
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        expected = values[i].to(param.device, dtype, copy=True)
        expected_state: dict[str, Any] = {}
        for grads in gradients:
            grad = grads[i].to(param.device, dtype)
            given = {"moments": case.moments, "seed": seed_of_parameter(0, i), **common.HYPER, **case.options}
            amos_step(expected, grad, expected_state, **given)
        worst = max(worst, relative_error(param, expected) / bound)
        for key in {"row_moment", "column_moment", "moment", "decay"} & expected_state.keys():
            error = relative_error(state[key].reshape(expected_state[key].shape), expected_state[key])
            worst = max(worst, error / tolerance.state)
    return worst


def check(device: torch.device, quick: bool) -> common.Section:
    section = common.Section("Against the reference")
    sizes = common.shapes(quick)
    found: dict[Case, str] = {}
    for case in cases():
        try:
            params, states = train(case, sizes, device)
            error = error_over_tolerance(case, sizes, params, states)
            again, _ = train(case, sizes, device)
            same = all(torch.equal(x, y) for x, y in zip(params, again, strict=True))
            problem = "" if error <= 1 else "too far from the reference"
            problem = problem if same else f"{problem} two runs differ".strip()
            found[case] = f"{error:.2g}" + (f" **{problem}**" if problem else "")
            section.data[str(case)] = error
        except Exception as raised:  # a report with one failure says more than none
            problem = common.error_text(raised)
            found[case] = "**error**"
        if problem:
            section.failures.append(f"{case}: {found[case]}: {problem}")
            print("FAILED", section.failures[-1], flush=True)
    section.lines = [
        f"Error / tolerance, {STEPS} steps of {len(sizes)} tensors each, run twice with the same bits. "
        "float32 is held against float64.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for moments in common.KINDS:
        for dtype in TOLERANCES:
            cells = [found.get(Case(moments, dtype, column), "") for column in COLUMNS]
            section.lines.append(f"| {moments}, {str(dtype)[6:]} | {' | '.join(cells)} |")
    return section
