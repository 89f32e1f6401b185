"""What was built: build_info, `python -m amos_dist info`, and life without the extension."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import amos_dist
from amos_dist import Amos, build_info, ops

from ..conftest import TOLERANCES, relative_error
from .compare import KINDS, gradients, parameters

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


def test_build_info() -> None:
    info = build_info()
    assert info["version"] == amos_dist.__version__
    assert info["torch"] == torch.__version__
    assert info["extension"] is True and info["reason"] == ""
    assert info["torch_built"][:1].isdigit()
    assert info["cpu_instruction_set"] in info["cpu_instruction_sets"]
    assert all(arch.startswith("sm_") for arch in info["cuda_archs"])
    assert bool(info["cuda_archs"]) != bool(info["cuda_reason"])


def test_cpu_kernels_take_what_the_cpu_has() -> None:
    has = torch.backends.cpu.get_cpu_capability()  # DEFAULT, AVX2, AVX512
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(has)
    if expected is None:
        pytest.skip(f"torch says {has}")
    assert build_info()["cpu_instruction_set"] == expected


def test_info_for_programs_and_people() -> None:
    done = run("-m", "amos_dist", "info", "--json")
    assert done.returncode == 0 and json.loads(done.stdout).items() >= build_info().items()


def test_info_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from amos_dist.__main__ import main

    monkeypatch.setattr(sys, "argv", ["amos_dist", "info"])
    main()
    shown = capsys.readouterr().out
    info = build_info()
    for fact in (info["version"], info["torch_built"], info["cpu_instruction_set"], info["cuda_reason"]):
        assert fact in shown
    monkeypatch.setattr(ops, "_C", None)
    monkeypatch.setattr(ops, "_missing", "the extension is not there (no reason)")
    main()
    shown = capsys.readouterr().out
    assert "no reason" in shown and "pip install" in shown


def test_fused_without_kernels() -> None:
    with pytest.raises(RuntimeError, match=r"fused=True cannot be had on 'meta'.*\. Reinstall"):
        ops.backend(torch.device("meta"), True)


WITHOUT_EXTENSION = """
import importlib.abc, json, sys, warnings

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "amos_dist._C":
            raise ImportError("undefined symbol: aoti_torch_something")

sys.meta_path.insert(0, Broken())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import amos_dist, torch
    from tests.unit.test_info import trained
    file = sys.argv[1]
    torch.save(trained(None), file)
    trained(None)
    try:
        amos_dist.Amos([torch.zeros(2, 2)], lr=0.1, fused=True)
        refused = ""
        trained(True)
    except RuntimeError as error:
        refused = str(error)
ours = [str(w.message) for w in caught if "amos_dist" in str(w.message)]
print(json.dumps({"warnings": ours, "refused": refused, "info": amos_dist.build_info()}))
"""


def trained(fused: bool | None) -> list[torch.Tensor]:
    """Parameters and state after three steps, of every kind of moments."""
    result: list[torch.Tensor] = []
    for moments in KINDS:
        params = parameters(torch.float32, [(5, 7), (37,), (3, 4, 5)])
        optimizer = Amos(params, lr=0.1, momentum=0.9, moments=moments, fused=fused)
        for t in (1, 2, 3):
            for param, grad in zip(params, gradients(params)(t), strict=True):
                param.grad = grad
            optimizer.step()
        for param in params:
            result += [param.detach(), *optimizer.state[param].values()]
    return result


def test_without_the_extension(tmp_path: Path) -> None:
    """One warning, that says why and what to do; the same numbers; fused=True is an error."""
    file = tmp_path / "trained.pt"
    done = run("-c", WITHOUT_EXTENSION, str(file))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    (warning,) = seen["warnings"]
    assert "undefined symbol: aoti_torch_something" in warning and "pip install" in warning
    assert "undefined symbol" in seen["refused"] and "fused=True" in seen["refused"]
    assert seen["info"]["extension"] is False and "undefined symbol" in seen["info"]["reason"]
    for value, expected in zip(torch.load(file), trained(None), strict=True):
        assert relative_error(value, expected) <= TOLERANCES[torch.float32].param
