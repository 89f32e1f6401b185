"""nvcc compiles the kernels for real chips, and no kernel spills registers to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import SOURCE

FULL = "90"
# These are without float16, which is much like bfloat16, to save time.
CHIPS = ("80", "86", "89", "100", "120")


def test_no_spills(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH: the CUDA toolkit compiles what this test looks at")
    shutil.copytree(SOURCE.parents[1], tmp_path / "csrc")
    shorter = tmp_path / "csrc" / "cuda" / SOURCE.name
    shorter.write_text(re.sub(r"\n.*is\(Dtype::f\d\d, Dtype::f16\).*", "", SOURCE.read_text()))
    command = [nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]
    compilers = {
        chip: subprocess.Popen(
            [*command, f"-arch=sm_{chip}", "-o", str(tmp_path / f"{chip}.cubin"), str(source)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for chip, source in [(FULL, SOURCE), *((chip, shorter) for chip in CHIPS)]
    }  # fmt: skip
    for chip, compiler in compilers.items():
        output, _ = compiler.communicate()
        assert compiler.returncode == 0, output[-4000:]
        assert "warning" not in output, output[-4000:]
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
        assert len(frames) >= output.count("Compiling entry function") > (40 if chip == FULL else 25)
        assert {int(size) for frame in frames for size in frame} == {0}, (
            f"sm_{chip} uses local memory:\n{output[-4000:]}"
        )
