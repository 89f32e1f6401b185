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


def beside(loss: Loss, other: Loss) -> str:
    """Whether a loss differs from another by more than two standard errors of their difference."""
    if len(loss.values) < 2 or len(other.values) < 2:
        return ""
    if not math.isfinite(loss.mean):
        return "worse"
    error = math.hypot(loss.deviation / len(loss.values) ** 0.5, other.deviation / len(other.values) ** 0.5)
    difference = loss.mean - other.mean
    return "as good" if abs(difference) <= 2 * error else "worse" if difference > 0 else "better"


def crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """Where a falling line through (x, loss) is first at or below the target; None: nowhere."""
    for number, (x, loss) in enumerate(points):
        if loss <= target:
            if number == 0:
                return x
            before, high = points[number - 1]
            return before + (x - before) * (high - target) / (high - loss)
    return None


def share_of_steps(study: Study, entry: Entry, task: Task) -> tuple[float | None, float | None]:
    """The share of tuned AdamW's steps after which its final loss is reached: on the way of full runs; by shorter runs.

    None: not reached, or not known yet. The first is the mean over seeds, the second from the means over seeds.
    """
    target = loss_of(study, ENTRIES[YARDSTICK], task)
    runs = study.results(entry, task)
    if not target.values or not runs or not math.isfinite(target.mean):
        return None, None
    reached = [crossing([(step, loss) for step, loss, _ in run["curve"]], target.mean) for run in runs]
    on_the_way = [each / task.steps for each in reached if each is not None]
    lengths = [(length, loss_of(study, entry, task, length)) for length in (*entry.lengths, 1.0)]
    some = [(length, loss.mean) for length, loss in lengths if loss.values]
    by_length = crossing(some, target.mean) if len(some) > 1 else None
    return (statistics.fmean(on_the_way) if len(on_the_way) == len(runs) else None), by_length


def seconds_per_step(runs: list[Run]) -> float:
    """The least over runs: what else the machine does only adds to it."""
    return min(run["curve"][-1][2] / max(1, run["curve"][-1][0]) for run in runs)


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
        return f"{entry.runs() - left} of {entry.runs()}" if left else "all"

    return by_task(study, cell)


def losses(study: Study) -> str:
    def cell(entry: Entry, task: Task) -> str:
        found = loss_of(study, entry, task)
        if not found.values and (trials := study.tune(entry, task)).done:
            return f"in tuning: {trials.loss:.3f} after {trials.done}"
        verdict = beside(found, loss_of(study, ENTRIES[YARDSTICK], task)) if entry.name != YARDSTICK else ""
        return f"**{found}**" if verdict == "better" else f"{found} ▼" if verdict == "worse" else str(found)

    return by_task(study, cell)


def speeds(study: Study) -> str:
    """For the entries with shorter runs."""
    rows = []
    for entry in study.entries:
        for task in study.tasks:
            if not entry.lengths or not entry.is_for(task) or not (runs := study.results(entry, task)):
                continue
            way, shorter = share_of_steps(study, entry, task)
            yardstick = study.results(ENTRIES[YARDSTICK], task)
            cost = seconds_per_step(runs) / seconds_per_step(yardstick) if yardstick else math.nan
            shares = [share for share in (way, shorter) if share is not None]
            known = bool(yardstick) and study.left(entry, task) == 0
            cells = ["not reached" if known and share is None else "–" if share is None else f"{share:.2f}"
                     for share in (way, shorter)]  # fmt: skip
            time = f"{min(shares) * cost:.2f}" if shares else "–"
            rows.append([f"{entry.label}: {task.title}", *cells, f"{cost:.2f}" if yardstick else "–", time])
    head = ["", "steps, on the way", "steps, by a shorter run", "time of a step", "time to the loss"]
    return markdown(head, rows) if rows else "Nothing has run yet."


def verdicts(study: Study) -> str:
    """Where Amos loses, ties and wins, in sentences."""
    lines = []
    for entry in (e for e in study.entries if e.name in ("amos", "amos_rule", "amos_tuned", "amos_muon")):
        found: dict[str, list[str]] = {"worse": [], "as good": [], "better": []}
        for task in study.tasks:
            loss, other = loss_of(study, entry, task), loss_of(study, ENTRIES[YARDSTICK], task)
            if verdict := beside(loss, other):
                found[verdict].append(f"{task.title} ({loss.mean - other.mean:+.4f})")
        for verdict, where in found.items():
            if where:
                lines.append(f"* {entry.label}, is **{verdict}** than tuned AdamW on: {', '.join(where)}.")
    for entry in (e for e in study.entries if not e.name.startswith("amos") and e.name != YARDSTICK):
        where = []
        for task in study.tasks:
            loss, best = loss_of(study, entry, task), loss_of(study, ENTRIES["amos_tuned"], task)
            if beside(loss, best) == "better":
                where.append(f"{task.title} ({loss.mean - best.mean:+.4f})")
        if where:
            lines.append(f"* {entry.label}, is **better** than tuned Amos on: {', '.join(where)}.")
    text = "\n".join(lines).replace("**as good** than tuned", "**as good** as tuned")
    return text or "Not enough has run to say."


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

By more than two standard errors, at equal steps, in nats.

{verdicts(study)}

### Final validation loss at equal steps

Nats, mean ± standard deviation over {len(SEEDS)} seeds. **Bold**: better than tuned AdamW by more than two standard
errors. ▼: worse by as much. "In tuning": the best of so many trials, which is not yet a result. What has no row has
not run.

{losses(study)}

![validation loss by step]({pictures}curves.png)

### Steps and time to tuned AdamW's final loss

As a share of tuned AdamW's; the paper's claim is at most {CLAIM:.2f}. "On the way": when a run of the full length first
reaches it (seldom much before its end, since the rate falls late). "By a shorter run": the length of a run, with its
schedule cut to that length, that ends at it. "Time of a step" is beside AdamW's, in processor time.

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
