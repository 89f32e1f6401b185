"""What the study runs: its entries, how each is tuned, and which runs are missing, given those that are there."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study_optimizers import COMMON, Setting
from study_tasks import Task

Run = dict[str, Any]
Job = dict[str, Any]  # entry, task, steps, seed, setting: all that decides a run's curve
TUNING_SEED, SEEDS = 0, (1, 2, 3)

RATES, DECADES = 7, 2.0
RATIO = 10 ** (DECADES / (RATES - 1))  # between neighbours of the first rates


@dataclass(frozen=True)
class Tuning:
    """The same number of trials for every optimizer, one run each, of the full length, on a seed for this alone.

    1. RATES learning rates over two decades around `centre`.  2. Two more: half a step to either side of the best, or,
    where the best is at an end, two steps beyond it.  3. Each of `changes` in turn, kept if it is better.
    Better: the validation loss after the last step.
    """

    centre: float
    changes: tuple[Setting, ...]

    @property
    def trials(self) -> int:
        return RATES + 2 + len(self.changes)

    def rates(self) -> list[float]:
        return [rounded(self.centre * RATIO ** (place - RATES // 2)) for place in range(RATES)]

    def near(self, best: float) -> list[float]:
        rates = self.rates()
        place = rates.index(best)
        exponents = (-1.0, -2.0) if place == 0 else (1.0, 2.0) if place == RATES - 1 else (-0.5, 0.5)
        return [rounded(best * RATIO**exponent) for exponent in exponents]


@dataclass(frozen=True)
class Entry:
    """One optimizer of the study. A variant of Amos is one of these, in ENTRIES.

    Args:
        setting: what differs from COMMON. With a tuning it is where that starts.
        tuning: None: the setting is run as it is.
        wave: entries of a lower wave run first.
        tasks: "small" ones, of these those on language ("language"), or "named": none but `also`.
        also: of the tasks that only run for who names them.
        without: tasks where it makes no sense.
        lengths: shares of a small task's steps for which it is run too, in a later wave, with schedules that end there.
    """

    name: str
    label: str
    setting: Setting
    tuning: Tuning | None = None
    wave: int = 2
    tasks: str = "small"
    also: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    lengths: tuple[float, ...] = ()

    def is_for(self, task: Task) -> bool:
        if task.if_named or task.name in self.without:
            return task.name in self.also
        return self.tasks == "small" or (self.tasks == "language" and task.language)

    def start(self) -> Setting:
        rate = {"lr": self.tuning.rates()[RATES // 2]} if self.tuning else {}
        return COMMON | self.setting | rate

    def lengths_on(self, task: Task) -> tuple[float, ...]:
        """All, from the shortest to the whole."""
        return (1.0,) if task.if_named else (*self.lengths, 1.0)

    def runs(self, task: Task) -> int:
        """How many there are on one task."""
        return (self.tuning.trials if self.tuning else 0) + len(SEEDS) * len(self.lengths_on(task))

    def wave_of(self, task: Task, setting: Setting) -> int:
        return self.wave + task.wave + (LATER if setting["length"] < 1 else 0)

    def work(self, task: Task) -> float:
        """The same in runs of the full length."""
        return self.runs(task) - len(SEEDS) * sum(1 - length for length in self.lengths_on(task))


# ---- the table -------------------------------------------------------------------------------------------------------

SHORTER, LATER = (0.5, 0.7, 0.85), 2
LARGE, BATCH, LLAMA = "gpt-large", "gpt-batch", "llama"
AMOS: Setting = {"optimizer": "amos", "lr": "1/sqrt(batches)", "sigma": "paper", "beta": 0.99, "momentum": 0.9}
LINEAR, LONG_WARMUP, UNCLIPPED = {"schedule": "linear"}, {"warmup": 0.15}, {"clip": None}
# What came of the tuning on three language tasks: docs/quality.md says how.
RULE: Setting = AMOS | LINEAR | LONG_WARMUP | {"lr": "1/sqrt(predicted)", "momentum": 0.7}
ADAMW: Setting = {"optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
PLAIN_CHANGES: tuple[Setting, ...] = (LINEAR, LONG_WARMUP, {"beta": 0.98}, {"beta": 0.999}, {"sigma": "auto"})
AMOS_CHANGES: tuple[Setting, ...] = (*PLAIN_CHANGES, {"momentum": 0.7})
ADAM_CHANGES: tuple[Setting, ...] = (
    LINEAR,
    LONG_WARMUP,
    {"beta2": 0.99},
    {"weight_decay": 0.01},
    {"weight_decay": 0.3},
    {"beta1": 0.7},
)
RELATIVE_CHANGES: tuple[Setting, ...] = (
    LINEAR,
    LONG_WARMUP,
    {"sigma": "lamb"},
    {"q": 4.0},
    {"decay": "none"},
    UNCLIPPED,
)


def variant(
    name: str,
    label: str,
    tasks: str = "language",
    also: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    **changes: Any,
) -> Entry:
    """Amos by the rule, with these settings changed."""
    return Entry(f"amos_{name}", f"Amos, {label}", RULE | changes, None, 1, tasks, also, without)


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("amos", "Amos, untuned, 1/√N", AMOS, wave=0, lengths=SHORTER),
        Entry(
            "adamw_tuned",
            "AdamW, tuned",
            ADAMW,
            Tuning(2e-3, ADAM_CHANGES),
            0,
            also=(LARGE, BATCH, LLAMA),
            lengths=SHORTER,
        ),
        Entry(
            "adamw",
            "AdamW, untuned",  # torch's numbers, with the warm-up and the cosine that untuned Amos has
            ADAMW | {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.999},
            wave=0,
            also=(LARGE, LLAMA),
        ),
        Entry(
            "adamw_hand",
            "AdamW, tuned, then by hand",  # a reviewer's: tuning does not come back to the rate
            ADAMW | LINEAR | LONG_WARMUP | {"lr": 0.00431, "weight_decay": 0.01, "beta1": 0.7, "beta2": 0.99},
            wave=0,
            tasks="named",
            also=(LLAMA,),
        ),
        Entry("amos_tuned", "Amos, tuned", AMOS, Tuning(0.02, AMOS_CHANGES), 1, lengths=SHORTER),
        # Amos, one thing changed: what its defaults are to be set from
        Entry("amos_rule", "Amos, untuned, by the rule", RULE, wave=0, also=(LARGE, BATCH, LLAMA), lengths=SHORTER),
        variant("momentum9", "momentum 0.9", momentum=0.9),
        variant("momentum5", "momentum 0.5", momentum=0.5),
        # also: where the runs are shorter than the rule's shortest
        variant("steps", "1/√steps wherever", also=(LARGE, BATCH), lr="1/sqrt(steps)"),
        variant("cosine", "cosine", schedule="cosine"),
        variant("warmup", "warm-up of 5 %", warmup=0.05),
        variant("su", "Su's decay", schedule="su"),
        variant("constant", "its own decay alone", schedule="constant"),
        variant("own", "its own decay, to 10 % at the end", schedule="constant", ends_at=0.1),
        variant("auto", 'σ "auto"', sigma="auto"),
        variant("row", 'moments "row"', moments="row"),
        variant("beta999", "β 0.999", beta=0.999),
        variant("plain", "no momentum, untuned", also=(BATCH, LLAMA), momentum=0.0),
        variant("bf16", "bf16 momentum", momentum_dtype="bfloat16"),
        variant("int8", "8-bit momentum", also=(LARGE, BATCH, LLAMA), momentum_dtype="int8"),
        variant("noclip", "gradients not clipped", clip=None),
        variant("direction", "momentum of the direction", optimizer="amos_variant", momentum_of="direction"),
        variant("rms", "the same, RMS clipped to 1", optimizer="amos_variant", momentum_of="direction", rms_clip=1.0),
        variant("nesterov", "Nesterov's momentum", optimizer="amos_variant", momentum_of="update", nesterov=True),
        variant("marginals", "momentum of rows' and columns' means", optimizer="amos_variant", momentum_of="marginals"),
        variant("still", "its own decay off", optimizer="amos_variant", momentum_of="update", own_decay=False),
        variant(
            "lstm_once",
            "σ of an LSTM as of other recurrent nets",  # sigma.md: why it has twice that
            without=("gpt-small", "bert"),
            rules=[
                {"match": r"weight_ih", "sigma": 128**-0.25},
                {"match": r"weight_hh", "sigma": 256**-0.25},
                {"match": r"head\.weight", "sigma": 2.5 * 256**-0.25},
            ],
        ),
        variant(
            "muon",
            "RelativeStep(Muon) for hidden matrices",
            tasks="small",
            also=(LARGE, LLAMA),
            without=("cnn",),  # it has no such matrices
            optimizer="amos_muon",
        ),
        Entry(
            "amos_plain_tuned",
            "Amos without momentum, tuned",
            AMOS | {"momentum": 0.0},
            Tuning(0.01, (*PLAIN_CHANGES, UNCLIPPED)),
            1,
            "language",
        ),
        # The others
        Entry(
            "muon",
            "Muon, tuned",
            {"optimizer": "muon", "weight_decay": 0.1, "momentum": 0.95, "adam": 1.0},
            Tuning(
                3e-3, (LINEAR, LONG_WARMUP, {"adam": 0.4}, {"momentum": 0.9}, {"weight_decay": 0.01}, {"momentum": 0.8})
            ),
            without=("cnn",),  # torch's Muon takes matrices alone, and it has none but the head
        ),
        Entry(
            "adafactor",
            "Adafactor, tuned",
            {"optimizer": "adafactor", "weight_decay": 0.0, "beta2_decay": -0.8},
            Tuning(
                0.02,
                (
                    LINEAR,
                    LONG_WARMUP,
                    {"beta2_decay": -0.6},
                    {"weight_decay": 0.01},
                    {"weight_decay": 0.1},
                    UNCLIPPED,
                ),
            ),
        ),
        Entry(
            "lamb",
            "LAMB, tuned",
            {"optimizer": "lamb", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95},
            Tuning(0.02, ADAM_CHANGES),
        ),
        Entry(
            "sgd",
            "SGD with momentum, tuned",
            {"optimizer": "sgd", "weight_decay": 0.0, "momentum": 0.9, "nesterov": False},
            Tuning(
                0.3,
                (
                    LINEAR,
                    LONG_WARMUP,
                    {"nesterov": True},
                    {"momentum": 0.95},
                    {"weight_decay": 1e-4},
                    {"momentum": 0.7},
                ),
            ),
        ),
        Entry(
            "relative_rule",
            "RelativeStep(Adam), untuned, by Amos's rule",
            {"optimizer": "relative", "base": "adam"} | LINEAR | LONG_WARMUP | {"lr": "1/sqrt(predicted)"},
            without=("cnn",),
        ),
        Entry(
            "relative_muon",
            "RelativeStep(Muon), untuned, by Amos's rule",
            {"optimizer": "relative", "base": "muon"} | LINEAR | LONG_WARMUP | {"lr": "1/sqrt(predicted)"},
            without=("cnn",),
        ),
        Entry(
            "relative_tuned",
            "RelativeStep(Adam), tuned",
            {"optimizer": "relative", "base": "adam"},
            Tuning(0.02, RELATIVE_CHANGES),
            tasks="language",
        ),
    )
}


# ---- runs ------------------------------------------------------------------------------------------------------------


def rounded(rate: float) -> float:
    """To three digits, so that it reads well and is the same everywhere."""
    return float(f"{rate:.3g}")


def key_of(job: Mapping[str, Any]) -> str:
    """The same for runs that are the same, whichever entry has asked for them."""
    return json.dumps([job[name] for name in ("task", "steps", "seed", "setting")], sort_keys=True)


def final_loss(run: Run) -> float:
    """The validation loss after the last step; infinite where it was lost on the way."""
    return math.inf if run["diverged"] else float(run["curve"][-1][1])


@dataclass(frozen=True)
class Tuned:
    """How far a tuning is: the best setting so far, its loss, the next trials (none when it is done), how many ran."""

    setting: Setting
    loss: float
    missing: list[Job]
    done: int


class Study:
    """Which runs there are and which are missing; `runs` by their key."""

    def __init__(self, tasks: Sequence[Task], entries: Sequence[Entry], runs: Mapping[str, Run]) -> None:
        self.tasks, self.entries, self.runs = tasks, entries, runs

    def job(self, entry: Entry, task: Task, setting: Setting, seed: int) -> Job:
        steps = round(task.steps * setting["length"])
        return {"entry": entry.name, "task": task.name, "steps": steps, "seed": seed, "setting": setting}

    def tune(self, entry: Entry, task: Task) -> Tuned:
        best, best_loss, done = entry.start(), math.inf, 0
        if entry.tuning is None:
            return Tuned(best, math.inf, [], 0)
        for stage in range(2 + len(entry.tuning.changes)):
            if stage < 2:
                rates = entry.tuning.near(best["lr"]) if stage else entry.tuning.rates()
                settings = [best | {"lr": rate} for rate in rates]
            else:
                settings = [best | entry.tuning.changes[stage - 2]]
            jobs = [self.job(entry, task, setting, TUNING_SEED) for setting in settings]
            missing = [job for job in jobs if key_of(job) not in self.runs]
            done += len(jobs) - len(missing)
            found = [(final_loss(self.runs[key_of(job)]), job["setting"]) for job in jobs if job not in missing]
            for loss, setting in found:
                if loss < best_loss:
                    best, best_loss = setting, loss
            if missing:
                return Tuned(best, best_loss, missing, done)
        return Tuned(best, best_loss, [], done)

    def trials(self, entry: Entry, task: Task) -> list[Run]:
        """Those that have run, with the setting that the tuning started from but for the rate."""
        start = {key: value for key, value in entry.start().items() if key != "lr"}
        return [
            run
            for run in self.runs.values()
            if (run["task"], run["seed"], run["setting"]["length"]) == (task.name, TUNING_SEED, 1.0)
            and {key: value for key, value in run["setting"].items() if key != "lr"} == start
        ]

    def seeds(self, entry: Entry, task: Task, length: float = 1.0) -> list[Job]:
        """The runs that count, of the setting as it is now."""
        setting = self.tune(entry, task).setting
        return [self.job(entry, task, setting | {"length": length}, seed) for seed in SEEDS]

    def results(self, entry: Entry, task: Task, length: float = 1.0) -> list[Run]:
        """Those of them that have run; none before the tuning is done."""
        if self.tune(entry, task).missing:
            return []
        return [self.runs[key] for job in self.seeds(entry, task, length) if (key := key_of(job)) in self.runs]

    def missing(self, entry: Entry, task: Task) -> list[Job]:
        """Those that can run now."""
        if trials := self.tune(entry, task).missing:
            return trials
        jobs = [job for length in entry.lengths_on(task) for job in self.seeds(entry, task, length)]
        return [job for job in jobs if key_of(job) not in self.runs]

    def pairs(self) -> Iterator[tuple[Entry, Task]]:
        return ((entry, task) for task in self.tasks for entry in self.entries if entry.is_for(task))

    def waiting(self) -> list[Job]:
        """All that can run now: by wave, then by task, the entries in turn."""
        waves: dict[int, dict[str, dict[str, list[Job]]]] = {}
        for entry, task in self.pairs():
            for job in self.missing(entry, task):
                of_task = waves.setdefault(entry.wave_of(task, job["setting"]), {}).setdefault(task.name, {})
                of_task.setdefault(entry.name, []).append(job)
        return [
            job
            for wave in sorted(waves)
            for lists in waves[wave].values()
            for turn in itertools.zip_longest(*lists.values())
            for job in turn
            if job is not None
        ]

    def planned(self) -> int:
        return sum(entry.runs(task) for entry, task in self.pairs())

    def left(self, entry: Entry, task: Task) -> int:
        """Runs to go of one pair, those included that depend on others."""
        seeds = sum(len(self.results(entry, task, length)) for length in entry.lengths_on(task))
        return entry.runs(task) - self.tune(entry, task).done - seeds

    def seconds(self) -> float:
        """Of one core, for all that was planned."""
        return sum(entry.work(task) * task.seconds for entry, task in self.pairs())
