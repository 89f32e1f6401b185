"""launch/pretrain.py from the command line: 1 and 2 ranks, comparison, exact resume, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from amos_dist.monitor.plot import read
from tests.integration.pretraining import LAUNCH, copy_of, losses, pretrain, refused

pytest.importorskip("deepspeed")


def test_one_rank_learns(corpus: Path, tmp_path: Path) -> None:
    done = pretrain("--data", corpus, "--steps", 40, "--out", tmp_path, ranks=1)
    assert done.returncode == 0, done.stdout
    curve = losses(tmp_path)
    assert len(curve) == 40
    assert sum(curve[-5:]) / 5 < curve[0] - 2.0


def test_one_rank_in_two_parts_equals_two_ranks(corpus: Path, saved: Path, tmp_path: Path) -> None:
    config = json.loads((LAUNCH / "zero2.json").read_text())
    config["gradient_accumulation_steps"] = 2
    (tmp_path / "parts.json").write_text(json.dumps(config))
    parts = ("--deepspeed_config", tmp_path / "parts.json")
    done = pretrain("--data", corpus, *parts, "--steps", 10, "--out", tmp_path, ranks=1)
    assert done.returncode == 0, done.stdout
    np.testing.assert_allclose(losses(tmp_path), losses(saved), rtol=2e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_stages_equal_stage_2(corpus: Path, saved: Path, tmp_path: Path, stage: int) -> None:
    """Also with a monitor, which says the same in each."""
    config = ("--deepspeed_config", LAUNCH / f"zero{stage}.json")
    watched = ("--monitor", "csv", "--monitor-every", 4)
    done = pretrain("--data", corpus, *config, *watched, "--steps", 10, "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    np.testing.assert_allclose(losses(tmp_path), losses(saved), rtol=2e-5)
    curves = read(tmp_path / "monitor" / "amos" / "monitor.csv")
    assert set(curves["update_norm"]["total"]) == {4, 8} and len(curves["update_norm"]) > 10
    picture = tmp_path / "monitor.png"
    command = [sys.executable, "-m", "amos_dist.monitor", tmp_path / "monitor" / "amos" / "monitor.csv", picture]
    if stage == 3:
        assert subprocess.run(command, check=True, timeout=100).returncode == 0 and picture.stat().st_size > 10_000


def test_resume_is_exact(corpus: Path, saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    done = pretrain("--data", corpus, "--steps", 10, "--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path) == losses(saved)


def test_truncated_checkpoint_is_refused(corpus: Path, saved: Path, tmp_path: Path) -> None:
    file = max(copy_of(saved, tmp_path).glob("*optim_states.pt"))
    os.truncate(file, file.stat().st_size // 2)
    result = pretrain("--data", corpus, "--steps", 10, "--out", tmp_path, "--resume", launcher=True)
    refused(result, file, "truncated")
    assert not (tmp_path / "results.json").exists()


def test_other_settings_are_refused(corpus: Path, saved: Path, tmp_path: Path) -> None:
    copy_of(saved, tmp_path)
    result = pretrain("--data", corpus, "--steps", 10, "--seed", 1, "--out", tmp_path, "--resume", ranks=1)
    refused(result, "seed = 0, not 1", ranks=1)


def test_compare(corpus: Path, tmp_path: Path) -> None:
    done = pretrain("--data", corpus, "--steps", 10, "--compare", "AdamW", "--out", tmp_path)
    assert done.returncode == 0, done.stdout
    amos, adamw = json.loads((tmp_path / "results.json").read_text())
    assert (amos["name"], adamw["name"]) == ("Amos", "AdamW")
    assert amos["losses"][0] == adamw["losses"][0]  # the same start and batch
    assert 0 < amos["state_bytes"] < 0.6 * adamw["state_bytes"]
    for run in (amos, adamw):
        assert run["step_ms"] >= run["optimizer_ms"] > 0 and run["step_bytes"] > 0
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert table.splitlines()[0].replace(" ", "") == "||Amos|AdamW|ratio|"
    assert str(tmp_path / "plot.png") in done.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def too_short(path: Path) -> str:
    np.save(path, np.zeros(64, dtype=np.uint8))
    return "fewer than one sequence"


def wrong_type(path: Path) -> str:
    np.save(path, np.zeros(1000, dtype=np.float32))
    return "float32"


def truncated(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return "truncated"


def missing(path: Path) -> str:
    path.unlink()
    return "no such token file"


@pytest.mark.parametrize("damage, ranks", [(too_short, 2), (wrong_type, 1), (truncated, 1), (missing, 1)])
def test_bad_data_is_refused(corpus: Path, tmp_path: Path, damage: Callable[[Path], str], ranks: int) -> None:
    subprocess.run(["cp", "-r", corpus, tmp_path / "data"], check=True)
    file = tmp_path / "data" / "validation.npy"
    words = damage(file)
    result = pretrain("--data", tmp_path / "data", "--steps", 2, "--out", tmp_path, ranks=ranks)
    refused(result, file, words, ranks=ranks)


def test_unknown_keyword_in_the_json(corpus: Path, tmp_path: Path) -> None:
    config = json.loads((LAUNCH / "zero2.json").read_text())
    config["optimizer"]["params"]["sigmma"] = 1.0
    (tmp_path / "bad.json").write_text(json.dumps(config))
    bad = ("--deepspeed_config", tmp_path / "bad.json")
    result = pretrain("--data", corpus, *bad, "--out", tmp_path, ranks=1)
    assert result.returncode != 0
    assert "sigmma" in result.stdout.splitlines()[-1], result.stdout
