"""launch/pretrain.py --engine fsdp2 under torchrun: the numbers of ZeRO-2, with DeepSpeed out of reach.

Exact resume, comparison, and what it refuses.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.pretraining import LAUNCH, changed, copy_of, losses, pretrain_fsdp2, refused


@pytest.fixture(scope="module")
def trained(saved: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 steps on 2 ranks without a break, with checkpoints after 5 and 10."""
    out = tmp_path_factory.mktemp("trained")
    done = pretrain_fsdp2(out, "--data", corpus, "--steps", 10, "--save-every", 5, launcher=True)
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture
def launch_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(LAUNCH)


def run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())[0]


def test_trains_as_zero_2_does(saved: Path, trained: Path) -> None:
    fsdp2, zero2 = run_of(trained), run_of(saved)
    assert (fsdp2["engine"], zero2["engine"]) == ("fsdp2", "deepspeed")
    np.testing.assert_allclose(fsdp2["losses"], zero2["losses"], rtol=2e-6)
    np.testing.assert_allclose(fsdp2["validation"], zero2["validation"], rtol=2e-6)
    assert fsdp2["losses"][-1] < fsdp2["losses"][0] - 0.5
    # Each rank's part alone: momentum and, here, one number for each row and column.
    assert 0.95 < fsdp2["state_bytes"] / zero2["state_bytes"] < 1.1
    assert fsdp2["training_ms"] > fsdp2["step_ms"] > fsdp2["optimizer_ms"] > 0


def test_resume_is_exact(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Also where a save was cut off: before its seal it does not count, after it, it does in whatever place it is."""
    checkpoint = copy_of(trained, tmp_path)
    checkpoint.rename(checkpoint.with_name("step000005.part"))
    half = checkpoint.with_name("step000010.part")
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    done = pretrain_fsdp2(tmp_path, "--data", corpus, "--steps", 10, "--save-every", 5, "--resume")
    assert done.returncode == 0, done.stdout
    assert losses(tmp_path) == losses(trained)
    assert run_of(tmp_path)["validation"] == run_of(trained)["validation"]
    assert sorted(each.name for each in checkpoint.parent.iterdir()) == ["step000005.part", "step000010"]
    ours, theirs = (
        json.loads((folder / "checkpoints" / "amos" / "step000010" / "manifest.json").read_text())
        for folder in (tmp_path, trained)
    )
    assert ours["settings"] == theirs["settings"]


def test_truncated_checkpoint_is_refused(trained: Path, tmp_path: Path, launch_modules: None) -> None:
    import checkpoints

    checkpoint = copy_of(trained, tmp_path)
    file = max(checkpoint.glob("*.distcp"))
    progress = {"losses": losses(trained)[:5], "validation": [], "micro": 8}
    assert checkpoints.check(checkpoint, {"seed": 0}) == (5, progress)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{file}: truncated"):
        checkpoints.check(checkpoint, {"seed": 0})


def test_other_settings_are_refused(corpus: Path, trained: Path, tmp_path: Path) -> None:
    copy_of(trained, tmp_path)
    result = pretrain_fsdp2(tmp_path, "--data", corpus, "--steps", 10, "--seed", 1, "--resume", launcher=True)
    refused(result, "step000005", "seed = 0, not 1")


def test_checkpoint_of_the_other_engine_is_refused(saved: Path, trained: Path, launch_modules: None) -> None:
    import checkpoints

    for mine, other in ((saved, trained), (trained, saved)):
        settings = [
            json.loads((folder / "checkpoints" / "amos" / "step000010" / "manifest.json").read_text())["settings"]
            for folder in (mine, other)
        ]
        with pytest.raises(ValueError, match=f"engine = {settings[0]['engine']}, not {settings[1]['engine']}"):
            checkpoints.check(checkpoints.newest(mine / "checkpoints" / "amos"), settings[1])


def test_unknown_keyword_in_the_json(corpus: Path, tmp_path: Path) -> None:
    bad = changed(tmp_path, optimizer={"type": "Amos", "params": {"lr": 0.1, "sigmma": 1.0}})
    refused(pretrain_fsdp2(tmp_path, "--data", corpus, "--deepspeed_config", bad, ranks=1), "Amos", "sigmma", ranks=1)


def test_compare(corpus: Path, tmp_path: Path) -> None:
    done = pretrain_fsdp2(tmp_path, "--data", corpus, "--steps", 10, "--compare", "AdamW")
    assert done.returncode == 0, done.stdout
    amos, adamw = json.loads((tmp_path / "results.json").read_text())
    assert (amos["name"], adamw["name"]) == ("Amos", "AdamW")
    assert amos["losses"][0] == adamw["losses"][0]  # the same start and batch
    assert 0 < amos["state_bytes"] < 0.6 * adamw["state_bytes"]
    # 2 numbers for each of 131,072 + 320 parameters, a half of them on each rank
    assert adamw["state_bytes"] == pytest.approx(2 * 4 * (131_072 + 320) / 2, rel=1e-3)
    for run in (amos, adamw):
        assert run["step_ms"] >= run["optimizer_ms"] > 0 and run["step_bytes"] > 0


def test_two_parts_equal_one(corpus: Path, tmp_path: Path) -> None:
    """With an optimizer that, unlike Amos and Adam, feels the size of gradients. One rank; any class of torch.optim."""
    curves = []
    for parts in (1, 2):
        out = tmp_path / str(parts)
        out.mkdir()
        block = {"type": "SGD", "params": {"lr": 0.1}}
        given = {"optimizer": block, "gradient_clipping": 0.0, "gradient_accumulation_steps": parts}
        config = changed(out, **given, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3}})
        done = pretrain_fsdp2(out, "--data", corpus, "--deepspeed_config", config, "--steps", 6, ranks=1)
        assert done.returncode == 0, done.stdout
        curves.append(losses(out))
    np.testing.assert_allclose(*curves, rtol=2e-6)
    assert curves[0][-1] < curves[0][0] - 0.1


def test_bf16_on_one_rank_is_near(corpus: Path, trained: Path, tmp_path: Path) -> None:
    config = changed(tmp_path, "zero3", gradient_accumulation_steps=2, bf16={"enabled": True})
    done = pretrain_fsdp2(tmp_path, "--data", corpus, "--deepspeed_config", config, "--steps", 10, ranks=1)
    assert done.returncode == 0, done.stdout
    np.testing.assert_allclose(losses(tmp_path), losses(trained), rtol=1e-2)
    assert max(abs(np.subtract(losses(tmp_path), losses(trained)))) > 1e-4  # it is bfloat16


SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    "given, wanted",
    [
        ((16, None, None), (16, 8, 1)),
        ((16, 2, None), (16, 2, 4)),
        ((16, None, 4), (16, 2, 4)),
        ((None, 3, 2), (12, 3, 2)),
        ((None, 3, None), (6, 3, 1)),
        ((16, 8, 1), (16, 8, 1)),
    ],
)
def test_batch_sizes_are_deepspeeds(given: tuple[Any, ...], wanted: tuple[int, ...], launch_modules: None) -> None:
    import engine_fsdp2

    settings = engine_fsdp2.read({key: n for key, n in zip(SIZES, given, strict=True) if n}, ranks=2)
    assert (settings.batch, settings.micro, settings.accumulation) == wanted
    assert settings.clip == 1.0


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"train_batch_size": 15}, ["15", "7 sequences", "2 ranks"]),
        ({"train_batch_size": 1}, ["0 sequences"]),
        ({"train_batch_size": "auto"}, ["\"train_batch_size\": 'auto'"]),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3}, ["16", "3 sequences"]),
        ({}, ["no batch size"]),
        ({"train_batch_size": 16, "gradient_clipping": "auto"}, ["gradient_clipping", "auto"]),
        ({"train_batch_size": 16, "fp16": {"enabled": True}}, ['"fp16"', "--engine deepspeed"]),
        ({"train_batch_size": 16, "zero_optimization": {"offload_param": {"device": "cpu"}}}, ["offload_param"]),
    ],
)
def test_json_that_fsdp2_cannot_follow(blocks: dict[str, Any], words: list[str], launch_modules: None) -> None:
    import engine_fsdp2

    with pytest.raises(ValueError) as raised:
        engine_fsdp2.read(blocks, ranks=2)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("block", [
    {"type": "WarmupLR", "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.03, "warmup_num_steps": 7}},
    {"type": "WarmupLR", "params": {"warmup_num_steps": 1, "warmup_type": "linear"}},
    {"type": "WarmupDecayLR", "params": {"total_num_steps": 15, "warmup_num_steps": 4, "warmup_max_lr": 0.02}},
    {"type": "WarmupCosineLR", "params": {"total_num_steps": 15, "warmup_num_steps": 4, "warmup_min_ratio": 0.02}},
    {"type": "WarmupCosineLR", "params": {"total_num_steps": 15, "warmup_type": "linear", "warmup_num_steps": 3}},
    {"type": "InverseSquareDecay", "params": {"half_life": 5, "warmup": 3}},
    {"type": "StepLR", "params": {"step_size": 3}},
    {},
], ids=str)  # fmt: skip
def test_schedules_are_deepspeeds(block: dict[str, Any], launch_modules: None) -> None:
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    from schedules import scheduler_from

    def rates(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.024)
        schedule, found = make(optimizer), []
        for _ in range(20):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule:
                schedule.step()
        return found

    def deepspeeds(optimizer: torch.optim.Optimizer) -> Any:
        kind = getattr(schedules, block["type"], None) or getattr(torch.optim.lr_scheduler, block["type"])
        return kind(optimizer, **block["params"])

    found = rates(lambda optimizer: scheduler_from(optimizer, block))
    assert found == rates(deepspeeds if block else lambda _: None)
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize(
    "block, words",
    [
        ({"type": "OneCycle", "params": {}}, ["OneCycle", "WarmupCosineLR"]),
        ({"type": "WarmupLR", "params": {"warmup_steps": 3}}, ["WarmupLR", "warmup_steps"]),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, ["warmup_num_steps", "auto"]),
    ],
)
def test_schedule_that_cannot_be(block: dict[str, Any], words: list[str], launch_modules: None) -> None:
    from schedules import scheduler_from

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.024)
    with pytest.raises(ValueError) as raised:
        scheduler_from(optimizer, block)
    assert all(word in str(raised.value) for word in words), raised.value
