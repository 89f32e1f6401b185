"""The study's figures: curves with bands, loss by length of the run, by learning rate, and by bytes of state."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from study_plan import ENTRIES, Entry, Run, Study, final_loss
from study_tasks import Task

COLOURS = {
    "amos": "tab:blue", "amos_tuned": "tab:cyan", "amos_rule": "royalblue",
    "amos_plain": "navy", "amos_plain_tuned": "darkblue", "amos_muon": "darkviolet",
    "adamw_tuned": "tab:red", "adamw_hand": "firebrick", "adamw": "tab:orange", "muon": "tab:green",
    "adafactor": "tab:brown", "lamb": "tab:pink", "sgd": "tab:gray", "relative_tuned": "tab:olive",
    "relative_rule": "olivedrab", "relative_muon": "limegreen",
}  # fmt: skip
VARIANT = "slateblue"  # other variants of Amos
MARKERS = "ovsDP^X<*>hp8dH1234+x"
HEADLINE = ("amos", "amos_rule", "amos_tuned", "adamw_tuned", "adamw", "muon", "amos_muon")  # of the curves
YARDSTICK = "adamw_tuned"


def colour(entry: Entry) -> str:
    return COLOURS.get(entry.name, VARIANT)


def finals(runs: list[Run]) -> list[float]:
    return [final_loss(run) for run in runs]


def draw(study: Study, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figures = {"curves": curves, "lengths": lengths, "rates": rates, "memory": memory}
    for name, panel in figures.items():
        columns = min(3, len(study.tasks))
        rows = math.ceil(len(study.tasks) / columns)
        size = (4.2 * columns, 3.1 * rows + 0.7)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for place, axes in enumerate(grid.flat):
            if place >= len(study.tasks):
                axes.set_axis_off()
                continue
            panel(study, study.tasks[place], axes)
            axes.set_title(study.tasks[place].title, fontsize=10)
            axes.grid(alpha=0.3)
            if not axes.has_data():
                axes.set(xticks=[], yticks=[])
                axes.text(0.5, 0.5, "has not run", transform=axes.transAxes, ha="center", color="gray")
        shown = {
            label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if shown:
            figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8)
        beside = folder / f".{name}.png"
        figure.savefig(beside, dpi=100)
        beside.replace(folder / f"{name}.png")
        plt.close(figure)


def band(axes: Any, x: list[float], columns: list[list[float]], entry: Entry, **more: Any) -> None:
    """The mean over seeds, and from the least to the greatest."""
    axes.plot(x, [statistics.fmean(each) for each in columns], color=colour(entry), label=entry.label, **more)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour(entry), alpha=0.2, lw=0)


def curves(study: Study, task: Task, axes: Any) -> None:
    shown = []
    for entry in (ENTRIES[name] for name in HEADLINE):
        runs = [run for run in study.results(entry, task) if not run["diverged"]]
        if not runs:
            continue
        points = list(zip(*(run["curve"] for run in runs), strict=True))
        band(axes, [each[0][0] for each in points], [[loss for _, loss, _ in each] for each in points], entry)
        shown += [loss for run in runs for step, loss, _ in run["curve"] if step > task.steps / 5]
    if shown:
        margin = (max(shown) - min(shown)) / 20 or 1e-3
        axes.set(xlabel="step", ylabel="validation loss, nats", ylim=(min(shown) - margin, max(shown) + margin))


def lengths(study: Study, task: Task, axes: Any) -> None:
    for entry in (each for each in study.entries if len(each.lengths_on(task)) > 1 and each.is_for(task)):
        found = [(length, finals(study.results(entry, task, length))) for length in entry.lengths_on(task)]
        some = [(length, losses) for length, losses in found if losses]
        if some:
            band(axes, [length for length, _ in some], [losses for _, losses in some], entry, marker="o")
    if target := finals(study.results(ENTRIES[YARDSTICK], task)):
        entry = ENTRIES[YARDSTICK]
        axes.axhline(statistics.fmean(target), color=colour(entry), label=f"{entry.label}, all steps")
        axes.axhspan(min(target), max(target), color=colour(entry), alpha=0.2, lw=0)
    if axes.has_data():
        axes.axvline(0.7, color="gray", ls="--", label="the paper's claim")
        axes.set(xlabel="length of the run, share of the steps", ylabel="final loss, nats")


def rates(study: Study, task: Task, axes: Any) -> None:
    lowest, highest = math.inf, -math.inf
    for entry in (each for each in study.entries if each.tuning):
        trials = sorted(study.trials(entry, task), key=lambda run: float(run["lr"]))
        some = [(run["lr"], final_loss(run)) for run in trials if math.isfinite(final_loss(run))]
        if len(some) < 3:
            continue
        best = min(some, key=lambda each: each[1])[0]
        wide = 2.5 if entry.name in HEADLINE else 1
        line = {"marker": ".", "lw": wide, "color": colour(entry), "label": entry.label}
        axes.plot([rate / best for rate, _ in some], [loss for _, loss in some], **line)
        lowest, highest = min(lowest, *(loss for _, loss in some)), max(highest, sorted(each for _, each in some)[-2])
    if axes.has_data():
        margin = (highest - lowest) / 20
        axes.set(xlabel="learning rate / the best of the optimizer", ylabel="final loss, nats", xscale="log")
        axes.set_ylim(lowest - margin, highest + margin)


def memory(study: Study, task: Task, axes: Any) -> None:
    for number, entry in enumerate(study.entries):
        runs = study.results(entry, task)
        if not runs or not math.isfinite(loss := statistics.fmean(finals(runs))):
            continue
        state = runs[0]["state_bytes"] / runs[0]["parameters"]
        marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]
        axes.scatter(state, loss, color=colour(entry), marker=marker, s=36, label=entry.label)
    if axes.has_data():
        axes.set(xlabel="bytes of state for each parameter", ylabel="final loss, nats", xlim=(-0.5, 9))
