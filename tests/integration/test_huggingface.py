"""Hugging Face's Trainer, by the example: with a DeepSpeed JSON that names Amos, and in one process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from statistics import mean

import pytest

import amos_dist
from tests.distributed.harness import ROOT, run_ranks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TRAINER = str(ROOT / "launch" / "examples" / "trainer.py")
WORKER = Path(__file__).with_name("examples_worker.py")


def test_trainer_with_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["--deepspeed", str(ROOT / "launch" / "huggingface.json"), "--out", str(tmp_path), "--steps", "40"]
    for rank in run_ranks(WORKER, 2, {"example": TRAINER, "by": "huggingface", "arguments": words}):
        assert (rank["ranks"], rank["stage"]) == (2, 2)
        assert rank["class"].startswith("amos_dist.") and rank["class"].endswith(".Amos")
        assert len(rank["losses"]) == 40
        assert mean(rank["losses"][-5:]) < 0.65 * rank["losses"][0], rank["losses"]


def test_trainer_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [TRAINER, "--out", str(tmp_path), "--steps", "20"])
    trainer = runpy.run_path(TRAINER)["trainer"]
    assert type(trainer.optimizer.optimizer) is amos_dist.Amos
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert mean(losses[-3:]) < 0.75 * losses[0], losses
