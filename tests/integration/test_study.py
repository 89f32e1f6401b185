"""launch/study.py: the plan of tuning and seeds, a study that is killed and goes on, and its tables and figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amos_dist import Amos, RelativeStep, param_groups
from tests.integration.pretraining import LAUNCH

FEW = ("--steps", 2, "--tasks", "lstm", "--entries", "amos", "adamw_tuned", "--workers", 1)
RUNS = 12 + 15 + 12  # Amos: three seeds, of four lengths; AdamW: 15 trials and as many


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(LAUNCH)
    yield
    for name in [name for name in sys.modules if name.startswith("study_")]:
        del sys.modules[name]


def pretend(study: Any, job: dict[str, Any], loss: float) -> None:
    """A run that ends with that loss."""
    import study_plan

    curve = [(0, 5.0, 0.0), (job["steps"], loss, 1.0)]
    found = {**job, "lr": 0.1, "curve": curve, "diverged": not math.isfinite(loss), "parameters": 1, "state_bytes": 8}
    study.runs[study_plan.key_of(job)] = found


def tuned_by(losses: Any) -> tuple[Any, list[dict[str, Any]]]:
    """A study of AdamW on one task whose runs end with losses(setting), and its jobs in their order."""
    import study_plan
    import study_tasks

    study = study_plan.Study([study_tasks.TASKS["lstm"]], [study_plan.ENTRIES["adamw_tuned"]], {})
    jobs = []
    while waiting := study.waiting():
        jobs.append(waiting[0])
        pretend(study, waiting[0], losses(waiting[0]["setting"]))
    return study, jobs


def test_a_tuning_takes_its_trials_and_then_new_seeds_at_the_best() -> None:
    """The rate between the grid's that is best, and of the changes those that help, together."""
    from study_plan import RATIO

    best = 2e-3 * RATIO**1.5

    def losses(setting: dict[str, Any]) -> float:
        helps = (setting["schedule"] == "linear") + (setting["weight_decay"] == 0.3) - (setting["beta2"] == 0.99)
        return math.log(setting["lr"] / best) ** 2 - 0.1 * helps

    study, jobs = tuned_by(losses)
    assert [job["seed"] for job in jobs] == [0] * 15 + [1, 2, 3] * 4
    assert [job["setting"]["length"] for job in jobs[15:]] == [1.0] * 3 + [0.5] * 3 + [0.7] * 3 + [0.85] * 3
    assert all(job["setting"] | {"length": 1.0} == jobs[15]["setting"] for job in jobs[15:])
    chosen = jobs[-1]["setting"]
    assert chosen["lr"] == pytest.approx(best, rel=0.01)
    assert (chosen["schedule"], chosen["weight_decay"], chosen["beta2"]) == ("linear", 0.3, 0.95)
    assert [study.left(*pair) for pair in study.pairs()] == [0]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_best_rate_at_the_end_is_looked_for_beyond_it(sign: int) -> None:
    _, jobs = tuned_by(lambda setting: sign * math.log(setting["lr"]))
    rates = [job["setting"]["lr"] for job in jobs]
    assert jobs[-1]["setting"]["lr"] == (min(rates) if sign > 0 else max(rates))
    assert max(rates) / min(rates) == pytest.approx(10 ** (2 + 2 / 3), rel=0.02)


def test_runs_that_are_lost_are_not_chosen() -> None:
    _, jobs = tuned_by(lambda setting: math.inf if setting["lr"] > 1e-3 else 1.0)
    assert jobs[-1]["setting"]["lr"] <= 1e-3


def test_the_share_of_steps_is_that_of_the_last_crossing() -> None:
    from study_report import crossing

    assert crossing([(0.0, 5.0), (100.0, 3.0), (200.0, 2.0)], 2.5) == 150
    assert crossing([(0.0, 5.0), (100.0, 2.0), (200.0, 3.0), (300.0, 1.0)], 2.0) == 250  # it was above once more
    assert crossing([(0.0, 5.0), (100.0, 2.0), (200.0, 3.0)], 2.5) is None  # it ends above
    assert crossing([(0.5, 2.0), (1.0, 1.0)], 2.5) == 0.5  # at once
    assert crossing([], 2.5) is None
    assert crossing([(0.5, math.inf), (1.0, 1.0)], 2.5) == crossing([(0.5, math.nan), (1.0, 1.0)], 2.5) == 1.0
    assert crossing([(0.5, 1.0), (1.0, math.nan)], 2.5) is None


def test_shares_of_steps_are_of_the_whole_run() -> None:
    """AdamW ends at 2; Amos falls from 5 to 1, and its shorter runs end at 3, 2.5 and 1.5."""
    from study_plan import ENTRIES, Study
    from study_report import share_of_steps
    from study_tasks import TASKS

    task, amos = TASKS["lstm"], ENTRIES["amos"]
    study = Study([task], [amos, ENTRIES["adamw_tuned"]], {})
    losses = {0.5: 3.0, 0.7: 2.5, 0.85: 1.5, 1.0: 1.0}
    while waiting := study.waiting():
        for job in waiting:
            pretend(study, job, losses[job["setting"]["length"]] if job["entry"] == "amos" else 2.0)
    assert share_of_steps(study, amos, task) == (pytest.approx(0.75), pytest.approx(0.775))


def test_a_verdict_pairs_the_seeds() -> None:
    """A small difference in each seed counts, where seeds differ by far more; and one that is by chance does not."""
    from study_report import verdict

    def runs(*losses: float) -> list[dict[str, Any]]:
        return [
            {"seed": seed, "diverged": not math.isfinite(loss), "curve": [(0, 9.0, 0.0), (5, loss, 1.0)]}
            for seed, loss in enumerate(losses)
        ]

    adamw = runs(1.0, 2.0, 3.0)
    assert verdict(runs(0.9, 1.91, 2.89), adamw) == "better" and verdict(adamw, runs(0.9, 1.91, 2.89)) == "worse"
    assert verdict(runs(0.9, 1.5, 2.99), adamw) == "not told apart"
    assert verdict(runs(0.7, 1.9, 2.8), adamw) == "not told apart"  # t = 3.46, of 4.30
    assert verdict(runs(9.0, 9.0, 9.0), runs(1.0, 1.0, math.inf)) == "better"
    assert verdict(runs(0.5, math.inf, 0.5), adamw) == "worse"
    assert verdict(runs(0.5, math.inf), runs(math.inf, 1.0)) == verdict(runs(0.5), adamw) == ""
    assert verdict(list(reversed(runs(0.9, 1.91, 2.89))), adamw) == "better"  # by seed, in whatever order


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 7))


def trained(optimizer_of: Any, steps: int = 4) -> list[torch.Tensor]:
    trained_model = model()
    (optimizer,) = optimizer_of(trained_model)
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(7, (8,), generator=random)
        nn.functional.cross_entropy(trained_model(tokens), (tokens * 3 + 1) % 7).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in trained_model.parameters()]


def test_the_plain_variant_of_amos_is_amos_where_nothing_is_changed() -> None:
    from study_optimizers import AmosVariant

    settings = {"lr": 0.1, "beta": 0.9, "momentum": 0.9}
    ours = trained(lambda m: [AmosVariant(param_groups(m, sigma="paper"), **settings, momentum_of="update")])
    theirs = trained(lambda m: [Amos(param_groups(m, sigma="paper"), **settings)])
    changed = trained(lambda m: [AmosVariant(param_groups(m, sigma="paper"), **settings)])
    for one, other, far in zip(ours, theirs, changed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(far, other, rtol=1e-3)


def test_the_own_decay_of_amos_ends_where_it_is_told() -> None:
    from study_optimizers import amos

    made = amos(model(), 0.03, sigma="paper", beta=0.9, ends_at=0.1, steps=300)
    random = torch.Generator().manual_seed(1)
    for _ in range(300):
        for group in made[0].param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=random)
        made[0].step()
    for group in made[0].param_groups:
        for param in group["params"]:
            b = made[0].state[param]["decay"].mean().item()
            assert 1 / (1 + group["d_coef"] * math.sqrt(0.03 * group["sigma"]) * b) == pytest.approx(0.1, rel=0.1)


def test_every_entry_moves_each_parameter_once() -> None:
    """Also where an optimizer takes the hidden matrices and another one the rest."""
    from study_optimizers import build
    from study_plan import ENTRIES, TUNING_SEED
    from study_tasks import TASKS

    for task in (TASKS["gpt-small"], TASKS["cnn"], TASKS["llama"]):
        torch.manual_seed(TUNING_SEED)
        model = task.model()
        for entry in (each for each in ENTRIES.values() if each.is_for(task)):
            made = build(model, entry.start(), 0.01, 10)
            taken = [id(param) for one in made for group in one.param_groups for param in group["params"]]
            assert sorted(taken) == sorted(map(id, model.parameters())), entry.name
            before = [param.detach().clone() for param in model.parameters()]
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            for one in made:
                one.step()
            moved = [(p - q).abs().max() > 0 for p, q in zip(model.parameters(), before, strict=True)]
            assert all(moved), entry.name


def test_what_is_better_than_amos_is_said() -> None:
    """Whatever it is."""
    import study_plan
    import study_report
    import study_tasks

    entries = [study_plan.ENTRIES[name] for name in ("adamw_tuned", "amos_tuned", "muon", "sgd")]
    study = study_plan.Study([study_tasks.TASKS["lstm"]], entries, {})
    losses = {"adamw_tuned": 1.5, "amos_tuned": 1.4, "muon": 1.3, "sgd": 1.45}
    while waiting := study.waiting():
        for job in waiting:
            pretend(study, job, losses[job["entry"]] + 1e-3 * job["seed"])
    said = study_report.verdicts(study)
    assert "Amos, tuned, is **better** than tuned AdamW" in said
    assert "* Muon, tuned, is **better** than tuned Amos on: LSTM, 0.5 M (-0.1000)." in said and "SGD" not in said


def test_lamb_is_adam_with_the_norm_of_relative_step() -> None:
    from study_optimizers import LAMB

    def relative(m: nn.Module) -> list[torch.optim.Optimizer]:
        base = torch.optim.Adam(m.parameters(), betas=(0.9, 0.95), eps=1e-6)
        return [RelativeStep(base, lr=0.1, sigma="lamb", decay="none")]

    ours = trained(lambda m: [LAMB(m.parameters(), 0.1, (0.9, 0.95), 0.0)])
    for one, other in zip(ours, trained(relative), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_rule_stops_to_rise_in_runs_of_less_than_600_steps() -> None:
    from study_optimizers import RULES

    rule = RULES["1/sqrt(predicted)"]
    assert [rule(9, steps, 1.0) for steps in (150, 600, 2400)] == pytest.approx([600**-0.5, 600**-0.5, 2400**-0.5])
    assert rule(9, 150, 0.15) == pytest.approx((0.15 / 600) ** 0.5)


@pytest.mark.parametrize("name", ["gpt-small", "lstm", "bert", "llama", "vit", "cnn"])
def test_a_task_starts_as_a_guess(name: str, corpus: Path) -> None:
    """Nothing is known of the targets, nor told."""
    from study_tasks import TASKS, prepare

    task = TASKS[name]
    prepare(corpus, [task])
    torch.manual_seed(0)
    data, made = task.data(task, corpus), task.model()
    (guess,) = {part.shape[0] for name, part in made.named_parameters() if name.endswith("head.weight")}
    with torch.no_grad():
        for batch in (data.train(1, 1), data.validation()[0]):
            loss = float(made(*batch))
            assert math.log(guess) - 0.1 < loss < math.log(guess) + 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "su"])
def test_schedules_rise_to_the_peak_and_fall_to_their_end(schedule: str) -> None:
    from study_optimizers import COMMON, scheduler_for

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = scheduler_for(optimizer, COMMON | {"schedule": schedule}, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = rates.index(max(rates))
    assert peak in (4, 5) and rates[peak] == pytest.approx(1, abs=0.02)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.06


def start(corpus: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    words = [sys.executable, LAUNCH / "study.py", *FEW, "--data", corpus, "--out", out, *more]
    return subprocess.Popen(map(str, words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "runs").glob("*/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_killed_study_goes_on_and_shows_what_it_found(corpus: Path, tmp_path: Path) -> None:
    first = start(corpus, tmp_path)
    try:
        while len(lines(tmp_path)) < 2 and first.poll() is None:
            time.sleep(0.05)
    finally:
        first.kill()
        said = first.communicate()[0]
    kept = lines(tmp_path)
    assert 2 <= len(kept) < RUNS, said

    second = start(corpus, tmp_path)
    said = second.communicate(timeout=240)[0]
    assert second.returncode == 0, said
    assert f"{RUNS} runs, {RUNS - len(kept)} to go" in said
    found = lines(tmp_path)
    assert all(run in found for run in kept), "runs of the killed study were lost"
    described = [json.dumps([run["setting"], run["seed"]], sort_keys=True) for run in found]
    assert len(found) == len(set(described)) == RUNS, "a run was repeated, or left out"
    assert {run["curve"][-1][0] for run in found} == {1, 2}  # shorter runs end earlier
    amos, adamw = (next(run for run in found if run["entry"] == name) for name in ("amos", "adamw_tuned"))
    assert adamw["state_bytes"] / adamw["parameters"] == pytest.approx(8, rel=0.01)
    assert amos["state_bytes"] / amos["parameters"] == pytest.approx(4, rel=0.05)

    page = (tmp_path / "tables.md").read_text()
    whole = [run for run in found if run["seed"] > 0 and run["setting"]["length"] == 1]
    mean = sum(run["curve"][-1][1] for run in whole if run["entry"] == "adamw_tuned") / 3
    assert "This study is whole" in page and f"| AdamW, tuned | {mean:.3f} ± " in page
    for name in ("curves", "lengths", "rates", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_lengths_stay_out_of_the_page(tmp_path: Path) -> None:
    words = [sys.executable, LAUNCH / "study.py", "--steps", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Give another --out" in done.stderr
