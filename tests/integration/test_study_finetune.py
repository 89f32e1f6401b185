"""launch/study_finetune.py: what each way starts from, a study that goes on where it stopped, and its tables."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amos_dist import decay_after
from tests.integration.pretraining import LAUNCH

SEEDS, WAYS, STEPS, PRETRAINING = (1, 2), 5, 3, 8


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, with two seeds, one rate and a model that trains in no time."""
    monkeypatch.syspath_prepend(LAUNCH)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    import study_finetune
    import study_tasks
    from model import GPT, Config

    monkeypatch.setattr(study_finetune, "SEEDS", SEEDS)
    monkeypatch.setattr(study_finetune, "MOVES", (1e-2,))
    tiny = Config(layers=1, width=16, heads=1, sequence=8)
    task = replace(study_tasks.TASKS["gpt-small"], model=lambda: GPT(tiny), data=study_tasks.text(8, 4), batch=4)
    monkeypatch.setitem(study_tasks.TASKS, "gpt-small", task)
    yield study_finetune
    for name in [name for name in sys.modules if name.startswith("study_")]:
        del sys.modules[name]


def start(study: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path, out: Path) -> None:
    other = out / "other"  # of one byte alone: what has been trained on it knows it at once
    if not other.is_dir():
        shutil.copytree(corpus, other)
        for part in ("train", "validation"):
            np.save(other / f"{part}.npy", np.full_like(np.load(other / f"{part}.npy"), 65))
    words = ["--steps", STEPS, "--pretraining", PRETRAINING, "--data", corpus, other, "--out", out]
    monkeypatch.setattr(sys, "argv", ["study_finetune.py", *map(str, words)])
    study.main()


def lines(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted((out / task).glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_it_goes_on_where_it_stopped_and_shows_what_it_found(
    study: Any, monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        real, count = study.train, iter(range(4))
        patch.setattr(study, "train", lambda *given: (next(count), real(*given))[1])
        with pytest.raises(StopIteration):  # after a pretraining and three runs
            start(study, monkeypatch, corpus, tmp_path)
    kept = lines(tmp_path, "finetune")
    assert len(kept) == 3

    made: dict[tuple[int, str], list[float]] = {}
    real_train = study.train

    def train(job: dict[str, Any], *given: Any) -> Any:
        (optimizer,) = given[2]
        found = real_train(job, *given)
        if job["task"] == "finetune" and "decay" in next(iter(optimizer.state.values())):
            steps = max(float(state["step"]) for state in optimizer.state.values())
            for key, name in (("momentum", "momentum"), ("lr", "initial_lr")):  # whatever pretraining had
                assert {group[name] for group in optimizer.param_groups} == {job["setting"][key]}, job["entry"]
            made[job["seed"], job["entry"]] = [steps, study.mean_decay(optimizer)]
        return found

    monkeypatch.setattr(study, "train", train)
    start(study, monkeypatch, corpus, tmp_path)
    runs = lines(tmp_path, "finetune")
    assert all(run in runs for run in kept), "runs of the stopped study were lost"
    described = [json.dumps([run["setting"], run["seed"]], sort_keys=True) for run in runs]
    assert len(runs) == len(set(described)) == len(SEEDS) * WAYS
    (own,) = {run["setting"]["decay_init"] for run in runs if run["entry"] == "amos_own"}
    for seed in SEEDS:
        of_seed = [run for run in runs if run["seed"] == seed]
        (learnt,) = [run for run in lines(tmp_path, "pretrain") if run["seed"] == seed]
        # All begin with the weights that pretraining has left.
        assert {run["other"][0] for run in of_seed} == {learnt["curve"][-1][1]}
        assert len(of_seed[0]["other"]) == len(of_seed[0]["curve"])
        assert {run["curve"][0][1] for run in of_seed} == {learnt["other"][-1]}  # and see the other text now
        assert learnt["curve"][-1][1] < learnt["other"][-1]
        assert learnt["decay"] == pytest.approx(own, rel=0.5)  # eight steps of four windows
    assert made[2, "amos"][0] == made[2, "amos_own"][0] == STEPS and made[2, "amos_on"][0] == STEPS + PRETRAINING
    assert made[2, "amos"][1] < own <= made[2, "amos_own"][1] < 293 < made[2, "amos_bert"][1]

    page = (tmp_path / "tables.md").read_text()
    mean = sum(run["curve"][-1][1] for run in runs if run["entry"] == "adamw") / 2
    assert (
        f"| AdamW | {mean:.3f} ± " in page
        and f"| AdamW | 0.01 | {mean:.3f} ± " in page
        and "10 of 10 runs are there" in page
    )
    zero, bert = (
        {run["seed"]: run["other"][-1] for run in runs if run["entry"] == name} for name in ("amos", "amos_bert")
    )
    assert f"{sum(bert[seed] - zero[seed] for seed in SEEDS) / 2:+.4f} ± " in page.split("And on the old text")[1]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_counts_as_so_many_steps_at_its_peak(study: Any) -> None:
    common = {"warmup": 0.0}
    assert study.peak_steps(common | {"schedule": "constant"}, 1000) == 1000
    assert study.peak_steps(common | {"schedule": "linear"}, 1000) == pytest.approx(1000 / 3, rel=0.01)
    assert study.peak_steps(common | {"schedule": "cosine"}, 1000) == pytest.approx(1000 * 3 / 8, rel=0.01)
    (own,) = [way.setting["decay_init"] for way in study.ways(600) if way.name == "amos_own"]
    assert own == pytest.approx(math.expm1(1 / 3), rel=0.05) and study.ways(600)[2].setting["decay_init"] == (
        decay_after(300_000, 0.005)
    )


def test_runs_of_other_lengths_stay_out_of_the_page(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study_finetune.py", "--steps", "2"])
    with pytest.raises(SystemExit):
        study.main()
