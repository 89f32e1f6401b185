"""The examples that users copy, run as they are, on real text (Python's own documentation)."""

from __future__ import annotations

import ast
import json
import math
import runpy
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import pytest
import torch

from tests.distributed.harness import ROOT, run_ranks

EXAMPLES = ROOT / "launch" / "examples"
WORKER = Path(__file__).with_name("examples_worker.py")


@pytest.fixture(scope="module")
def guess() -> float:
    """The loss of one who knows how often each byte comes in the text, and nothing else: nats per byte, 3.26."""
    text = "".join(topics.values()).encode()
    return -sum(count / len(text) * math.log(count / len(text)) for count in Counter(text).values())


def on_two_ranks(example: str, by: str, *arguments: str) -> list[dict[str, Any]]:
    return run_ranks(WORKER, 2, {"example": str(EXAMPLES / example), "by": by, "arguments": arguments})


def test_plain_torch_in_ten_lines(guess: float, capsys: pytest.CaptureFixture[str]) -> None:
    body = ast.parse((EXAMPLES / "plain.py").read_text()).body
    after_imports = [line for line in body[1:] if not isinstance(line, ast.Import | ast.ImportFrom)]
    assert sum(node.end_lineno - node.lineno + 1 for node in after_imports) == 10
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / "plain.py"))
    assert float(capsys.readouterr().out.split()[0]) < 0.7 * guess


def learned_in_shards(rank: dict[str, Any], guess: float) -> None:
    assert rank["amos"] and rank["ranks"] == [2]
    assert (rank["sharded parameters"], rank["sharded states"]) == (
        5,
        3 * 3 + 2 * 2,
    )  # row, column, decay; of biases two
    assert mean(rank["losses"][-5:]) < 0.75 * guess < guess < mean(rank["losses"][:5]), rank["losses"]


def test_accelerate_with_fsdp2(guess: float) -> None:
    pytest.importorskip("accelerate")
    for rank in on_two_ranks("with_accelerate.py", "accelerate"):
        learned_in_shards(rank, guess)


def test_lightning_with_fsdp2(guess: float) -> None:
    pytest.importorskip("lightning")
    for rank in on_two_ranks("with_lightning.py", "lightning", "--devices", "2", "--steps", "100"):
        assert len(rank["losses"]) == 100
        learned_in_shards(rank, guess)


def test_notebook(guess: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, cell by cell, without Jupyter, which takes long to install; plots are drawn by Agg."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    drawn: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(len(plt.gcf().axes)) or plt.gcf().canvas.draw())
    cells = json.loads((EXAMPLES / "amos.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    left: dict[str, Any] = {}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), left)
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
    plt.close("all")
    assert drawn == [2, 1]
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"]) == 2
    for losses, _ in left["runs"].values():
        assert mean(losses[-20:]) < 0.65 * guess
    assert left["sizes"]["Amos"] < 0.27 * left["sizes"]["AdamW"]
    assert f"{len(left['text']):,} bytes" in capsys.readouterr().out
