"""What a job, or two side by side, came to: a table, a plot and the numbers behind them."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measure import MEMORY_MEANS


@dataclass
class Run:
    """One training job. Losses are in nats for each token; bytes and times are the largest over ranks."""

    name: str
    engine: str
    memory_of: str  # the kind of device whose memory was watched
    losses: list[float] = field(default_factory=list)  # one for each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss)
    state_bytes: int = 0
    step_bytes: int = 0  # what the step adds at its peak, on top of the state
    optimizer_ms: float = 0.0
    step_ms: float = 0.0
    training_ms: float = 0.0
    seconds: float = 0.0

    def progress(self) -> str:
        """The mean of the last training losses and the last validation loss."""
        recent = self.losses[-20:]
        shown = f"loss {sum(recent) / len(recent):.3f}"
        return shown + (f", validation {self.validation[-1][1]:.3f}" if self.validation else "")


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, total, result = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        result.append(average / total)
    return result


def table(runs: list[Run]) -> str:
    """Markdown: a row for each number, a column for each run, last the ratio of first to second."""
    rows: list[tuple[str, list[float], str]] = [
        ("validation loss, nats per token", [run.validation[-1][1] for run in runs], ".4f"),
        ("optimizer state, bytes for each rank", [run.state_bytes for run in runs], ",.0f"),
        ("peak memory of the step, bytes (1)", [run.state_bytes + run.step_bytes for run in runs], ",.0f"),
        ("step time, optimizer alone, ms (2)", [run.optimizer_ms for run in runs], ".3f"),
        ("step time, whole engine.step(), ms (3)", [run.step_ms for run in runs], ".3f"),
        ("the same with forward and backward, ms", [run.training_ms for run in runs], ".3f"),
        ("training, seconds", [run.seconds for run in runs], ".1f"),
    ]
    cells = [["", *(run.name for run in runs)] + ["ratio"] * (len(runs) == 2)]
    for label, numbers, form in rows:
        ratio = [f"{numbers[0] / numbers[1]:.3f}" if numbers[1] else "-"] if len(runs) == 2 else []
        cells.append([label, *(format(number, form) for number in numbers), *ratio])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for label, *values in cells:
        padded = [label.ljust(widths[0]), *map(str.rjust, values, widths[1:])]
        lines.append("| " + " | ".join(padded) + " |")
    lines.insert(1, "|-" + "-" * widths[0] + "-|" + "".join("-" * (width + 1) + ":|" for width in widths[1:]))
    notes = [
        "Bytes and times are those of the rank that has the most.",
        f"(1) the state and what engine.step() adds at its peak: {MEMORY_MEANS[runs[0].memory_of]}.",
        "(2) median over steps of the base optimizer's own step(); for Amos with its all-reduce.",
        "(3) the same with clipping, and with what the engine sends then: DeepSpeed the new parameters.",
    ]
    return "\n".join([*lines, "", *notes])


def plot(runs: list[Run], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[2, 1], layout="constrained")
    colours = ["tab:blue", "tab:orange"]
    for index, (run, colour) in enumerate(zip(runs, colours, strict=False)):
        first = len(run.losses) // 20  # the first losses are far above the rest and would flatten it
        steps = range(first + 1, len(run.losses) + 1)
        training = smoothed(run.losses)[first:]
        curves.plot(steps, training, color=colour, label=f"{run.name}, training (smoothed)")
        evaluated, validation = zip(*run.validation, strict=True)
        curves.plot(evaluated, validation, "o--", color=colour, label=f"{run.name}, validation")
        state, step = run.state_bytes / 2**20, run.step_bytes / 2**20
        kept = bars.bar(index, state, width=0.6, color=colour)
        added = bars.bar(index, step, width=0.6, bottom=state, color=colour, alpha=0.4)
        bars.bar_label(kept, [f"state {state:.2f}"], label_type="center")
        bars.bar_label(added, [f"step adds {step:.2f}"], label_type="center")
    curves.set(xlabel="step", ylabel="loss, nats per token", title=title)
    curves.grid(alpha=0.3)
    curves.legend()
    bars.set(title="Memory at the step's peak", ylabel="MiB for each rank")
    bars.set_xticks(range(len(runs)), [run.name for run in runs])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(runs: list[Run], folder: Path, title: str) -> None:
    """Print the table, and put it with the plot and all numbers into `folder`. On one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps([asdict(run) for run in runs]))
    text = table(runs)
    (folder / "table.md").write_text(text + "\n")
    picture = folder / "plot.png"
    plot(runs, picture, title)
    print(f"\n{text}\n\nPlot: {picture}\nNumbers: {folder / 'results.json'}", flush=True)
