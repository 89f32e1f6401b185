"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (CUDA threads are its threads)."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_on_cpu import HERE, MOMENTS, SANITIZERS, SOURCE, Problem, Replay, Types, compile_for_cpu, replay

SHAPES = [(1, 1), (3, 7), (5, 255), (70, 36), (2, 1100), (300, 1)]
CALLS = [
    *(
        Replay(
            [Problem(moments, *shape, types) for moments in MOMENTS for shape in SHAPES], way, (offset, offset, offset)
        )
        for types in (Types(momentum="f32"), Types("bf16", "bf16", "bf16"), Types("f64", "f64"))
        for way, offset in (("step", 0), ("phases", 1))
    ),
    Replay([Problem("row", 1, 33000, Types("f32", "f16"))], "step"),
]


@pytest.mark.parametrize(("sanitizer", "order"), [("asan", "fwd"), ("tsan", "rev")])
def test_sanitizer(sanitizer: str, order: str, tmp_path: Path) -> None:
    driver = compile_for_cpu(tmp_path / sanitizer, SOURCE, HERE / "driver.cpp", flags=SANITIZERS[sanitizer])
    replay(driver, tmp_path, CALLS, order)
