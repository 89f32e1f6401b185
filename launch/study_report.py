"""What the study has shown: the tables of docs/quality.md, made from the runs that are there."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import study_figures
from study_plan import ENTRIES, SEEDS, Entry, Run, Study, final_loss
from study_tasks import Task

BEGIN, END = "<!-- made by launch/study.py: begin -->", "<!-- made by launch/study.py: end -->"
YARDSTICK = "adamw_tuned"
CLAIM = 0.70  # the paper's share of AdamW's steps
# 97.5 % of the t distribution, by degrees of freedom
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


# ---- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Final validation losses over seeds, in nats."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Of one seed; infinite where it cannot be told."""
        return statistics.stdev(self.values) if len(self.values) > 1 and math.isfinite(self.mean) else math.inf

    def __str__(self) -> str:
        if not self.values:
            return "–"
        if not math.isfinite(self.mean):
            return "lost"
        shown = f"{self.mean:.4f}" if self.mean < 1 else f"{self.mean:.3f}"
        shown += f" ± {self.deviation:.{4 if self.mean < 1 else 3}f}" if math.isfinite(self.deviation) else ""
        return shown + (f" ({len(self.values)} of {len(SEEDS)})" if len(self.values) < len(SEEDS) else "")


def loss_of(study: Study, entry: Entry, task: Task, length: float = 1.0) -> Loss:
    return Loss([final_loss(run) for run in study.results(entry, task, length)])


def differences(runs: list[Run], others: list[Run], of: Callable[[Run], float] = final_loss) -> list[float]:
    """Seed by seed: both have started from the same weights, and seen the same batches."""
    by_seed = {run["seed"]: of(run) for run in others}
    return [of(run) - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]


def standard_error(found: list[float]) -> float:
    return statistics.stdev(found) / len(found) ** 0.5


def verdict(runs: list[Run], others: list[Run]) -> str:
    """Whether `runs` end better or worse than others, by a paired t test at 5 %; empty where it cannot be said."""
    lost, others_lost = (any(run["diverged"] for run in some) for some in (runs, others))
    found = differences(runs, others)
    if len(found) < 2 or (lost and others_lost):
        return ""
    if lost or others_lost:
        return "worse" if lost else "better"
    if abs(statistics.fmean(found)) <= STUDENT[len(found) - 1] * standard_error(found):
        return "not told apart"
    return "worse" if statistics.fmean(found) > 0 else "better"


def crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """From where on a line through (x, loss) is at or below the target, up to its end; None: its end is above.

    A loss that is not finite is above, and the line begins after it.
    """
    if not points or not points[-1][1] <= target:
        return None
    above = [number for number, (_, loss) in enumerate(points) if not loss <= target]
    if not above:
        return points[0][0]
    (x, high), (y, low) = points[above[-1] : above[-1] + 2]
    if not math.isfinite(high):
        return y
    return x + (y - x) * (high - target) / (high - low)


def share_of_steps(study: Study, entry: Entry, task: Task) -> tuple[float | None, float | None]:
    """The share of tuned AdamW's steps after which its final loss is reached: on the way of full runs; by shorter runs.

    Both of the means over seeds. None: not reached, or not known yet.
    """
    target = loss_of(study, ENTRIES[YARDSTICK], task)
    runs = study.results(entry, task)
    if not target.values or not math.isfinite(target.mean) or not runs or any(run["diverged"] for run in runs):
        return None, None
    of_all = zip(*(run["curve"] for run in runs), strict=True)
    way = crossing([(each[0][0], statistics.fmean(loss for _, loss, _ in each)) for each in of_all], target.mean)
    lengths = [(length, loss_of(study, entry, task, length)) for length in entry.lengths_on(task)]
    some = [(length, loss.mean) for length, loss in lengths if loss.values]
    return None if way is None else way / task.steps, crossing(some, target.mean) if len(some) > 1 else None


def seconds_per_step(study: Study, entry: Entry, task: Task) -> float:
    """The least over runs: what else the machine does only adds to it. NaN where none came to its end."""
    runs = [run for length in entry.lengths_on(task) for run in study.results(entry, task, length)]
    ended = [run["curve"][-1] for run in runs if not run["diverged"]]
    return min((spent / max(1, step) for step, _, spent in ended), default=math.nan)


def state_per_parameter(runs: list[Run]) -> float:
    """Bytes."""
    return runs[0]["state_bytes"] / runs[0]["parameters"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = "|---|" + "--:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def by_task(study: Study, cell: Callable[[Entry, Task], str], entries: list[Entry] | None = None) -> str:
    """A row for each entry of which there is anything to show."""
    rows = [
        [entry.label, *(cell(entry, task) if entry.is_for(task) else "" for task in study.tasks)]
        for entry in entries or study.entries
    ]
    rows = [row for row in rows if set(row[1:]) - {"", "–"}]
    return markdown(["", *(task.title for task in study.tasks)], rows)


def progress(study: Study) -> str:
    """Runs that there are, of those that are planned."""

    def cell(entry: Entry, task: Task) -> str:
        left = study.left(entry, task)
        return f"{entry.runs(task) - left} of {entry.runs(task)}" if left else "all"

    return by_task(study, cell)


def losses(study: Study) -> str:
    def cell(entry: Entry, task: Task) -> str:
        found = loss_of(study, entry, task)
        if not found.values and (trials := study.tune(entry, task)).done:
            return f"in tuning: {trials.loss:.3f} after {trials.done}"
        said = verdict(study.results(entry, task), study.results(ENTRIES[YARDSTICK], task))
        return f"**{found}**" if said == "better" else f"{found} ▼" if said == "worse" else str(found)

    return by_task(study, cell)


def speeds(study: Study) -> str:
    """For the entries with shorter runs."""
    rows = []
    for entry in study.entries:
        for task in study.tasks:
            if len(entry.lengths_on(task)) == 1 or not entry.is_for(task) or not study.results(entry, task):
                continue
            shares = share_of_steps(study, entry, task)
            yardstick = study.results(ENTRIES[YARDSTICK], task)
            cost = seconds_per_step(study, entry, task) / seconds_per_step(study, ENTRIES[YARDSTICK], task)
            known = bool(yardstick) and study.left(entry, task) == 0
            cells = ["not reached" if known and share is None else "–" if share is None else f"{share:.2f}"
                     for share in shares]  # fmt: skip
            time = "–" if shares[1] is None or math.isnan(cost) else f"{shares[1] * cost:.2f}"
            rows.append([f"{entry.label}: {task.title}", *cells, "–" if math.isnan(cost) else f"{cost:.2f}", time])
    head = ["", "steps, on the way", "steps, by a shorter run", "time of a step", "time, by a shorter run"]
    return markdown(head, rows) if rows else "Nothing has run yet."


def verdicts(study: Study) -> str:
    """Where Amos loses, ties and wins, in sentences."""

    def where(entry: Entry, other: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"worse": [], "not told apart": [], "better": []}
        for task in study.tasks:
            runs, others = study.results(entry, task), study.results(ENTRIES[other], task)
            if said := verdict(runs, others):
                found[said].append(f"{task.title} ({statistics.fmean(differences(runs, others)):+.4f})")
        return {said: some for said, some in found.items() if some}

    lines = [
        f"* {entry.label}, is **{said}** {'from' if said == 'not told apart' else 'than'} tuned AdamW on: "
        f"{', '.join(some)}."
        for entry in study.entries
        if entry.name in ("amos", "amos_rule", "amos_tuned", "amos_muon")
        for said, some in where(entry, YARDSTICK).items()
    ]
    lines += [
        f"* {entry.label}, is **better** than tuned Amos on: {', '.join(some)}."
        for entry in study.entries
        if not entry.name.startswith("amos") and entry.name != YARDSTICK
        if (some := where(entry, "amos_tuned").get("better"))
    ]
    return "\n".join(lines) or "Not enough has run to say."


def memory(study: Study) -> str:
    def cell(entry: Entry, task: Task) -> str:
        runs = study.results(entry, task)
        return f"{state_per_parameter(runs):.2f}" if runs else "–"

    kept = [e for e in study.entries if e.name not in ("adamw", "relative_tuned")]
    return by_task(study, cell, kept)


def chosen(study: Study) -> str:
    """What each tuning has settled on."""

    def cell(entry: Entry, task: Task) -> str:
        tuned = study.tune(entry, task)
        if tuned.missing:
            return "–"
        start = entry.start()
        changed = [f"{key} {value}" for key, value in tuned.setting.items() if start.get(key) != value and key != "lr"]
        return ", ".join([f"lr {tuned.setting['lr']:g}", *changed])

    tuned = [entry for entry in study.entries if entry.tuning]
    return by_task(study, cell, tuned) if tuned else "Nothing is tuned here."


def rates(study: Study) -> str:
    """The rates that the rules gave."""
    ruled = [entry for entry in study.entries if isinstance(entry.setting.get("lr"), str)]

    def cell(entry: Entry, task: Task) -> str:
        runs = study.results(entry, task)
        return f"{runs[0]['lr']:.4f}" if runs else "–"

    return by_task(study, cell, ruled) if ruled else "No rule is used here."


# ---- the page --------------------------------------------------------------------------------------------------------


def made(study: Study, pictures: str) -> str:
    """All tables, with the figures in the folder `pictures`."""
    left = sum(study.left(*pair) for pair in study.pairs())
    runs = list(study.runs.values())
    versions = sorted({f"Python {run['versions']['python']}, torch {run['versions']['torch']}" for run in runs})
    devices = sorted({run["device"] for run in runs})
    whole = (
        "This study is whole."
        if not left
        else f"**This study is not whole: {left} of {study.planned()} runs are missing.**"
    )
    spent = sum(run["curve"][-1][2] for run in runs) / 3600
    return f"""{whole} What has run took {spent:.2f} hours of training on {", ".join(devices) or "nothing"};
{"; ".join(versions) or "no versions"}.

### What has run

{progress(study)}

### Where Amos loses, and where it wins

At equal steps, in nats. Runs of one seed start from the same weights and see the same batches, so it is their
differences that are tested: paired t test over {len(SEEDS)} seeds, 5 % each, not
corrected for so many tests. "Not told apart" is not "equal": three seeds tell little.

{verdicts(study)}

### Final validation loss at equal steps

Nats, mean ± standard deviation over {len(SEEDS)} seeds. **Bold**: better than tuned AdamW; ▼: worse; both by the same
test, so that it need not agree with the deviations. "In tuning": the best of so many trials, which is not yet a
result. What has no row has not run.

{losses(study)}

![validation loss by step]({pictures}curves.png)

### Steps and time to tuned AdamW's final loss

As a share of tuned AdamW's; the paper's claim is at most {CLAIM:.2f}. "On the way": from where on runs of the full
length are at or below it (seldom much before their end, since the rate falls late). "By a shorter run": the same of
the final losses of runs with schedules cut to that length. Both of means over seeds; AdamW's own rows say how much of
its budget it needed itself. "Time of a step" is beside AdamW's, in processor time, the least over runs; where runs come
from several machines, or from busy ones, it is good to a fifth, and docs/performance.md has steps timed in turn on one.
AdamW is torch's plain loop; `fused=True` would save it one or two hundredths of these steps.

{speeds(study)}

![final loss by the length of the run]({pictures}lengths.png)

### Sensitivity to the learning rate

![final loss by learning rate]({pictures}rates.png)

### Memory at equal loss

![final loss by bytes of state for each parameter]({pictures}memory.png)

Bytes of optimizer state for each parameter:

{memory(study)}

### What tuning has chosen

{chosen(study)}

What the learning rate rules gave:

{rates(study)}
"""


def write(study: Study, page: Path, out: Path) -> None:
    """The figures into `out`, the tables into `page`: between its markers, or a whole page where there are none."""
    study_figures.draw(study, out)
    pictures = os.path.relpath(out, page.parent)
    put(made(study, "" if pictures == "." else f"{pictures}/"), page, BEGIN, END)


def put(text: str, page: Path, begin: str, end: str) -> None:
    """Writes `text` into a page between two markers, or as the whole page where there are none."""
    old = page.read_text() if page.exists() else ""
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        text = f"{before}{begin}\n\n{text}\n{end}{rest.split(end, 1)[1]}"
    beside_it = page.with_name(f".{page.name}.new")
    beside_it.write_text(text)
    beside_it.replace(page)
