"""Fine-tuning and `decay_init`: a small GPT that has learnt Python's sources goes on with its documentation.

`python launch/study_finetune.py`: goes on where it stopped, then writes the tables and figure of docs/finetuning.md.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from amos_dist import decay_after, suggest_lr
from torch.optim import Optimizer
from tqdm import tqdm

import data
from study_optimizers import COMMON, Setting, build, factor
from study_plan import ADAMW, AMOS, RULE, SEEDS, Job, Run, final_loss, key_of
from study_report import STUDENT, Loss, differences, markdown, put, standard_error
from study_runs import Store, alone, train
from study_tasks import TASKS, Data, Task

ROOT = Path(__file__).resolve().parent.parent
STANDARD, PAGE = ROOT / "docs" / "quality" / "finetune", ROOT / "docs" / "finetuning.md"
BEGIN, END = "<!-- made by launch/study_finetune.py: begin -->", "<!-- made by launch/study_finetune.py: end -->"
PRETRAINING, STEPS = 600, 120
EVALUATIONS = 5  # in a run
SIGMA = 96**-0.5  # of most of the model's matrices: an entry moves by about lr * sigma in a step of Amos, lr of AdamW
MOVES = (1e-3, 2e-3, 3e-3, 1e-2, 3e-2)  # about what an entry moves by in a step at the peak rate
BERT = 300_000, 0.005  # steps and lr of the paper's pretraining


@dataclass(frozen=True)
class Way:
    """One way to fine-tune, with a rate for each of MOVES. goes_on: with the state that pretraining has left."""

    name: str
    label: str
    setting: Setting
    rates: tuple[float, ...]
    colour: str


def peak_steps(setting: Setting, steps: int) -> float:
    """So many steps at the peak rate have the sum of squared rates of a run with that schedule."""
    warmup = round(setting["warmup"] * steps)
    return sum(factor(setting["schedule"], t, steps, warmup) ** 2 for t in range(steps))


def ways(pretraining: int) -> list[Way]:
    learnt = COMMON | RULE
    ours = decay_after(peak_steps(learnt, pretraining), suggest_lr(pretraining))
    berts = decay_after(*BERT)
    rates = tuple(float(f"{move / SIGMA:.1g}") for move in MOVES)
    return [
        Way("amos", "Amos, b from 0", AMOS | {"decay_init": 0.0}, rates, "tab:blue"),
        Way("amos_own", f"Amos, b from {ours:.2g}", AMOS | {"decay_init": ours}, rates, "tab:cyan"),
        Way("amos_bert", f"Amos, b from {berts:.3g}", AMOS | {"decay_init": berts}, rates, "navy"),
        Way("amos_on", "Amos goes on, with its state", AMOS | {"goes_on": True}, rates, "tab:green"),
        Way("adamw", "AdamW", ADAMW, MOVES, "tab:red"),
    ]


# ---- runs ------------------------------------------------------------------------------------------------------------


class Finetuning:
    """The jobs, and what each needs: both texts, and the weights that a seed's pretraining has left in `weights`."""

    def __init__(self, steps: int, pretraining: int, texts: tuple[Path, Path], weights: Path) -> None:
        self.steps, self.pretraining, self.weights = steps, pretraining, weights
        self.ways, self._paths = ways(pretraining), texts
        self._texts: list[Data] = []

    def task(self, name: str) -> Task:
        return replace(TASKS["gpt-small"], name=name)

    def texts(self) -> list[Data]:
        """Of pretraining and of fine-tuning; made where they are missing."""
        if not self._texts:
            for path, found in zip(self._paths, (data.sources, data.documentation), strict=True):
                if not path.is_dir():
                    data.build(path, found())
                task = self.task("finetune")
                self._texts.append(task.data(task, path))
        return self._texts

    def job(self, way: Way, rate: float, seed: int) -> Job:
        setting = COMMON | way.setting | {"lr": rate, "pretraining": self.pretraining}
        return {"entry": way.name, "task": "finetune", "steps": self.steps, "seed": seed, "setting": setting}

    def jobs(self) -> Iterator[Job]:
        """Seed by seed, so that what a stopped study shows is of all ways and rates."""
        for seed in SEEDS:
            for place in range(len(MOVES)):
                yield from (self.job(way, way.rates[place], seed) for way in self.ways)

    def pretrained(self, seed: int, store: Store) -> dict[str, Any]:
        """Weights and the optimizer's state; made where they are missing."""
        rate = suggest_lr(self.pretraining)
        setting = COMMON | RULE | {"lr": rate}
        job = {"entry": "amos", "task": "pretrain", "steps": self.pretraining, "seed": seed, "setting": setting}
        key = key_of(job)
        path = self.weights / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        if not path.exists() or key not in store.runs:
            torch.manual_seed(seed)
            model = self.task("pretrain").model()
            (optimizer,) = build(model, setting, rate, self.pretraining)
            old, new = self.texts()
            found = train(job, old, model, [optimizer], rate, new, EVALUATIONS)
            if key not in store.runs:
                store.add({**found, "decay": mean_decay(optimizer)})
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, beside)
            beside.replace(path)
        return torch.load(path)

    def run(self, job: Job, store: Store) -> Run:
        saved = self.pretrained(job["seed"], store)
        setting = {key: value for key, value in job["setting"].items() if key not in ("goes_on", "pretraining")}
        torch.manual_seed(job["seed"])
        model = self.task("finetune").model()
        model.load_state_dict(saved["model"])
        (optimizer,) = build(model, setting, setting["lr"], self.steps)
        if "goes_on" in job["setting"]:
            settings = optimizer.state_dict()["param_groups"]  # the state goes on, no setting does, nor a peak rate
            optimizer.load_state_dict(saved["optimizer"] | {"param_groups": settings})
        old, new = self.texts()
        return train(job, new, model, [optimizer], setting["lr"], old, EVALUATIONS)


def mean_decay(optimizer: Optimizer) -> float:
    """The mean of b over its entries."""
    return float(torch.cat([state["decay"].flatten() for state in optimizer.state.values()]).mean())


# ---- what it has shown -----------------------------------------------------------------------------------------------


def old_loss(run: Run) -> float:
    return math.inf if run["diverged"] else float(run["other"][-1])


def results(study: Finetuning, store: Store, way: Way, place: int) -> list[Run]:
    keys = [key_of(study.job(way, way.rates[place], seed)) for seed in SEEDS]
    return [store.runs[key] for key in keys if key in store.runs]


def at_the_best(study: Finetuning, store: Store) -> str:
    """A table: each way at the rate with the least loss on the new text."""
    rows = []
    for way in study.ways:
        found = {rate: results(study, store, way, place) for place, rate in enumerate(way.rates)}
        means = {rate: statistics.fmean(map(final_loss, runs)) for rate, runs in found.items() if runs}
        if means:
            rate = min(means, key=lambda each: means[each])
            losses = [str(Loss([of(run) for run in found[rate]])) for of in (final_loss, old_loss)]
            rows.append([way.label, f"{rate:g}", *losses])
    return markdown(["", "lr", "new text", "old text"], rows)


def difference(runs: list[Run], others: list[Run], of: Any) -> str:
    """Mean over seeds, with its standard error: both have seen the same batches from the same weights."""
    found = differences(runs, others, of)
    if len(found) < 2 or not all(map(math.isfinite, found)):
        return "–"
    mean, error = statistics.fmean(found), standard_error(found)
    shown = f"{mean:+.4f} ± {error:.4f}"
    return f"**{shown}**" if abs(mean) > STUDENT[len(found) - 1] * error else shown


def made(study: Finetuning, store: Store, picture: str) -> str:
    """The text between the page's markers."""
    jobs = list(study.jobs())
    there = [store.runs[key] for job in jobs if (key := key_of(job)) in store.runs]
    if not there:
        return "Nothing has run yet."
    learnt = [run for run in store.runs.values() if run["task"] == "pretrain" and run["steps"] == study.pretraining]
    begun = [next(r for r in there if r["seed"] == seed) for seed in {run["seed"] for run in there}]
    head = ["a step moves an entry by about", *(f"{move:g}" for move in MOVES)]

    def table(cell: Any, some: list[Way]) -> str:
        rows = [[way.label, *(cell(way, place) for place in range(len(MOVES)))] for way in some]
        return markdown(head, rows)

    def loss(of: Any) -> Any:
        return lambda way, place: str(Loss([of(run) for run in results(study, store, way, place)]))

    def from_zero(of: Any) -> Any:
        zero = study.ways[0]
        return lambda way, place: difference(results(study, store, way, place), results(study, store, zero, place), of)

    started = [way for way in study.ways if way.name.startswith("amos_")]
    before = Loss([run["curve"][0][1] for run in begun]), Loss([run["other"][0] for run in begun])
    spent = sum(run["curve"][-1][2] for run in (*there, *learnt)) / 60
    versions = {f"Python {run['versions']['python']}, torch {run['versions']['torch']}" for run in there}
    of_amos, of_adamw = (", ".join(f"{rate:g}" for rate in way.rates) for way in (study.ways[0], study.ways[-1]))
    return f"""{len(there)} of {len(jobs)} runs are there: {spent:.0f} minutes of training on {there[0]["device"]};
{"; ".join(sorted(versions))}. b after pretraining, the mean of all rows and seeds:
{statistics.fmean(run["decay"] for run in learnt):.3f}; by the helper: {study.ways[1].setting["decay_init"]:.3f}.
Before fine-tuning the loss is {before[0]} on the new text and {before[1]} on the old.
Rates of Amos: {of_amos}; of AdamW: {of_adamw}.

Each at its best rate, by the loss on the new text:

{at_the_best(study, store)}

Final validation loss on the **new** text, nats, mean ± standard deviation over seeds:

{table(loss(final_loss), study.ways)}

On the **old** text, after the same runs:

{table(loss(old_loss), study.ways)}

What a start of b changes beside b from 0, at the same rate, on the new text. Mean difference ± its standard error;
bold: by a paired t test at 5 %:

{table(from_zero(final_loss), started)}

And on the old text:

{table(from_zero(old_loss), started)}

![learning and forgetting]({picture})"""


def draw(study: Finetuning, store: Store, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for way in study.ways:
        found = [(move, results(study, store, way, place)) for place, move in enumerate(MOVES)]
        found = [(move, runs) for move, runs in found if runs and not any(run["diverged"] for run in runs)]
        new, old = ([statistics.fmean(map(of, runs)) for _, runs in found] for of in (final_loss, old_loss))
        line = {"marker": "o", "ms": 4, "color": way.colour, "label": way.label}
        left.plot([move for move, _ in found], new, **line)
        right.plot(new, old, **line)
    left.set(xscale="log", xlabel="a step moves an entry by about", ylabel="loss on the new text, nats")
    right.set(xlabel="loss on the new text, nats", ylabel="loss on the old text, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=100)
    beside.replace(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=STANDARD, help="folder of the curves and the figure (docs/quality/finetune)")
    add(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="of a fine-tuning (%(default)s); others want another --out",
    )
    add("--pretraining", type=int, default=PRETRAINING, metavar="N", help="steps of pretraining (%(default)s)")
    add("--data", type=Path, nargs=2, metavar=("OLD", "NEW"), help="folders with train.npy and validation.npy, bytes")
    add("--report", action="store_true", help="run nothing: tables and figure from the curves that are there")
    args = parser.parse_args()
    out = args.out.resolve()
    other = args.data or (args.steps, args.pretraining) != (STEPS, PRETRAINING)
    if out == STANDARD and other:
        parser.error("--steps, --pretraining and --data make other runs than those of docs/quality. Give another --out")
    cache = ROOT / "out" / "finetune" if out == STANDARD else out / "cache"
    texts = args.data or (cache / "sources", cache / "documentation")
    page = PAGE if out == STANDARD else out / "tables.md"
    torch.set_num_threads(1)
    try:
        with nullcontext() if args.report else alone(out):
            study, store = Finetuning(args.steps, args.pretraining, tuple(texts), cache), Store(out)
            jobs = list(study.jobs())
            missing = [] if args.report else [job for job in jobs if key_of(job) not in store.runs]
            for job in tqdm(missing, initial=len(jobs) - len(missing), total=len(jobs), unit="run", ncols=100):
                store.add(study.run(job, store))
            draw(study, store, out / "losses.png")
            put(made(study, store, "quality/finetune/losses.png" if page == PAGE else "losses.png"), page, BEGIN, END)
    except ValueError as wrong:
        sys.exit(f"error: {wrong}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    print(f"tables: {page}")


if __name__ == "__main__":
    main()
