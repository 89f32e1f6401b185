"""--restart: from the newest checkpoint that is whole, with the same batch, on other numbers of ranks too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.integration.pretraining import LAUNCH, copy_of, losses, pretrain, pretrain_fsdp2, refused

pytest.importorskip("deepspeed")


def restarted(saved: Path, folder: Path, losses_after: list[float], output: str) -> None:
    """The steps before are those of `saved`, and so, but for rounding, are those after."""
    assert losses_after[:5] == losses(saved)[:5], output
    np.testing.assert_allclose(losses_after, losses(saved), rtol=2e-5)
    assert sorted(path.name for path in (folder / "checkpoints" / "amos").glob("step*")) == ["step000005", "step000010"]


def test_zero_3_bf16_goes_on_with_fewer_and_with_more_ranks(corpus: Path, tmp_path: Path) -> None:
    """From 2 ranks to 1 and back to 2; a damaged checkpoint is passed over."""
    job = ("--data", corpus, "--deepspeed_config", LAUNCH / "bf16_zero3.json", "--steps", 15, "--save-every", 5)
    whole = tmp_path / "whole"
    done = pretrain(*job, "--out", whole, "--restart")  # nothing is there yet: from the beginning
    assert done.returncode == 0, done.stdout

    subprocess.run(["cp", "-r", whole, tmp_path / "parts"], check=True)
    saves = tmp_path / "parts" / "checkpoints" / "amos"
    subprocess.run(["rm", "-r", saves / "step000015"], check=True)
    damaged = max((saves / "step000010").glob("*optim_states.pt"))
    os.truncate(damaged, damaged.stat().st_size // 2)
    for ranks in (1, 2):
        done = pretrain(*job, "--out", tmp_path / "parts", "--restart", ranks=ranks)
        assert done.returncode == 0, done.stdout
        assert (f"{damaged}: truncated" in done.stdout) == (ranks == 1), done.stdout
        np.testing.assert_allclose(losses(tmp_path / "parts"), losses(whole), rtol=2e-2)
        assert losses(tmp_path / "parts")[:5] == losses(whole)[:5]
        subprocess.run(["rm", "-r", saves / "step000015"], check=True)
    assert sorted(path.name for path in saves.glob("step*")) == ["step000005", "step000010"]  # no copies are left


def test_zero_2_goes_on_with_one_rank(corpus: Path, saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    job = ("--data", corpus, "--steps", 10, "--save-every", 5, "--out", tmp_path, "--restart")
    done = pretrain(*job, ranks=1)
    assert done.returncode == 0, done.stdout
    restarted(saved, tmp_path, losses(tmp_path), done.stdout)
    done = pretrain(*job, ranks=1)  # it has ended: there is nothing to do
    assert done.returncode == 0, done.stdout
    restarted(saved, tmp_path, losses(tmp_path), done.stdout)


def test_fsdp2_goes_on_with_one_rank(corpus: Path, saved: Path, tmp_path: Path) -> None:
    job = ("--data", corpus, "--steps", 10, "--save-every", 5)
    done = pretrain_fsdp2(tmp_path, *job)
    assert done.returncode == 0, done.stdout
    subprocess.run(["rm", "-r", tmp_path / "checkpoints" / "amos" / "step000010"], check=True)
    done = pretrain_fsdp2(tmp_path, *job, "--restart", ranks=1)
    assert done.returncode == 0, done.stdout
    np.testing.assert_allclose(losses(tmp_path), losses(saved), rtol=2e-5)


def test_ranks_that_cannot_share_the_batch_are_refused(corpus: Path, saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    done = pretrain("--data", corpus, "--steps", 10, "--out", tmp_path, "--restart", ranks=3)
    refused(done, "3 ranks cannot share a batch of 16 sequences. Restart on 1, 2, 4, 8, 16 ranks.", ranks=3)
    assert "rank2" in {file.stem for file in (tmp_path / "errors").iterdir()}


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(LAUNCH)
    return pytest.importorskip("checkpoints")


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "expected"),
    [(4, 16, 4, (4, 1)), (2, 16, 4, (4, 2)), (8, 16, 4, (2, 1)), (3, 18, 4, (3, 2)), (1, 14, 4, (2, 7))],
)
def test_the_batch_stays_and_no_part_grows(
    ranks: int,
    batch: int,
    micro: int,
    expected: tuple[int, int],
    checkpoints: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: ranks)
    settings: dict[str, Any] = {"batch": batch, "ranks": 4, "engine": "deepspeed", "ZeRO stage": 2}
    found = checkpoints.Found(Path("x"), 5, settings, {"micro": micro})
    config = found.fit({"train_batch_size": batch, "gradient_accumulation_steps": 1})
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == expected
    assert config["train_batch_size"] == batch == ranks * expected[0] * expected[1]
    assert config.get("checkpoint", {}).get("load_universal", False) == (ranks != 4)
    with pytest.raises(ValueError, match=f"saved with batch = {batch}, not 32"):
        found.fit({"train_batch_size": 32})
