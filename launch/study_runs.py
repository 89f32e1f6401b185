"""How the study runs: one training run, the worker processes that take turns, and the files that keep what came out."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from amos_dist.bench import state_bytes
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from study_optimizers import RULES, build, scheduler_for
from study_plan import Job, Run, Study, key_of
from study_tasks import TASKS, Data, Task

EVALUATIONS = 15  # in a run
GIVE_UP = 20.0  # nats: a run that is above has been lost


# ---- one run ---------------------------------------------------------------------------------------------------------


def seconds(device: torch.device) -> float:
    """Of the processor, where others work on it too; on a GPU by the clock."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def validate(model: torch.nn.Module, held_out: list[tuple[torch.Tensor, ...]], device: torch.device) -> float:
    model.eval()
    losses = [(float(model(*(part.to(device) for part in batch))), len(batch[0])) for batch in held_out]
    model.train()
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def run(job: Job, text: Data, task: Task, device: torch.device) -> Run:
    """Trains a new model once."""
    setting, steps = job["setting"], job["steps"]
    torch.manual_seed(job["seed"])
    model = task.model().to(device)
    rate = setting["lr"]
    if isinstance(rate, str):
        rate = RULES[rate](text.batches, steps, text.predicted)
    return train(job, text, model, build(model, setting, rate, steps), rate)


def train(
    job: Job,
    text: Data,
    model: nn.Module,
    optimizers: list[Optimizer],
    rate: float,
    other: Data | None = None,
    evaluations: int = EVALUATIONS,
) -> Run:
    """Trains, in place. Returns the job with its curve: (step, validation loss in nats, seconds of training so far).

    Args:
        rate: what the job's learning rate comes to.
        other: text of which the loss is taken at the same steps; the run has it as "other".
        evaluations: in the run.
    """
    setting, steps, device = job["setting"], job["steps"], next(model.parameters()).device
    schedulers = [scheduler_for(optimizer, setting, steps) for optimizer in optimizers]
    held_out, beside = text.validation(), other.validation() if other else []
    every = max(1, steps // evaluations)
    curve, diverged, spent = [(0, round(validate(model, held_out, device), 5), 0.0)], False, 0.0
    of_other = [round(validate(model, beside, device), 5)] if other else []
    begun = seconds(device)
    for step in range(1, steps + 1):
        loss = model(*(part.to(device) for part in text.train(job["seed"], step)))
        loss.backward()
        if setting["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting["clip"])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % every == 0 or step == steps:
            spent += seconds(device) - begun
            value = validate(model, held_out, device)
            diverged = not math.isfinite(value) or value > GIVE_UP
            if diverged:
                break
            curve.append((step, round(value, 5), round(spent, 2)))
            of_other += [round(validate(model, beside, device), 5)] if other else []
            begun = seconds(device)
    return {
        **job,
        "lr": rate,
        "curve": curve,
        **({"other": of_other} if other else {}),
        "diverged": diverged,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(state_bytes(optimizer) for optimizer in optimizers),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "1 CPU thread",
    }


# ---- workers: this file's process starts them, and speaks with them in lines of JSON ---------------------------------


def worker(device_name: str, folder: Path) -> None:
    """Answers each job on the standard input with its run on the standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that has started this one is asked, and ends it
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    device = torch.device(device_name)
    texts: dict[str, Data] = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            task = TASKS[job["task"]]
            text = texts.setdefault(task.name, task.data(task, folder))
            answer = run(job, text, task, device)
        except Exception:  # any: the study goes on with the next run, and names this one at its end
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def end_with(parent: int) -> None:
    """Ends this process when the one that has started it is gone, in the middle of a run too."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def devices(count: int | None = None) -> list[str]:
    """One for each worker: every GPU, else two processes on the CPU, or `count` of them."""
    gpus = torch.cuda.device_count()
    return [f"cuda:{number}" for number in range(gpus)] if gpus else ["cpu"] * (count or min(2, os.cpu_count() or 1))


class Workers:
    """Runs what a study is waiting for, until nothing is left, or `until` (seconds of time.monotonic()) has come.

    Args:
        places: the device of each worker.
        data: the folder of the text.
        each: is called after each run.
    """

    def __init__(
        self, study: Study, store: Store, places: list[str], data: Path, until: float, each: Callable[[], None]
    ) -> None:
        self.study, self.store, self.until, self.each = study, store, until, each
        self.places, self.data = places, data
        self.lock = threading.Condition()
        self.in_flight: dict[str, Job] = {}
        self.failed: dict[str, str] = {}
        self.stopped: BaseException | None = None

    def run_all(self) -> dict[str, str]:
        """Returns what failed, and why."""
        total = self.study.planned()
        left = sum(self.study.left(*pair) for pair in self.study.pairs())
        with tqdm(total=total, initial=total - left, unit="run", ncols=100, smoothing=0.05) as self.bar:
            processes = [self._start(place) for place in self.places]
            threads = [threading.Thread(target=self._serve, args=(process,), daemon=True) for process in processes]
            try:
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    for thread in threads:
                        thread.join(0.2)  # with a limit, so that Ctrl-C is heard
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        if self.stopped:
            raise self.stopped
        return self.failed

    def _start(self, place: str) -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("study.py"))
        command = [sys.executable, script, "--worker", place, "--data", str(self.data)]
        one = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one)

    def _next(self) -> Job | None:
        """The next job; waits where the only ones left depend on runs that are under way."""
        with self.lock:
            while not self.stopped and time.monotonic() < self.until:
                for job in self.study.waiting():
                    if (key := key_of(job)) not in self.in_flight and key not in self.failed:
                        self.in_flight[key] = job
                        return job
                if not self.in_flight:
                    break
                self.lock.wait(1.0)
            return None

    def _serve(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        try:
            while (job := self._next()) is not None:
                self.bar.set_postfix_str(f"{job['task']}, {job['entry']}, seed {job['seed']}", refresh=False)
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(
                        f"the worker that ran {key_of(job)} ended with {process.wait()}, perhaps for want of memory. "
                        "Start the study again: it goes on with what is missing."
                    )
                self._take(job, json.loads(line))
        except BaseException as error:
            with self.lock:
                self.stopped = self.stopped or error
                self.lock.notify_all()

    def _take(self, job: Job, answer: dict[str, Any]) -> None:
        with self.lock:
            del self.in_flight[key_of(job)]
            if "error" in answer:
                self.failed[key_of(job)] = answer["error"]
            else:
                self.store.add(answer)
                self.bar.update()
                self.each()
            self.lock.notify_all()


# ---- files -----------------------------------------------------------------------------------------------------------


class Store:
    """The runs in `folder`: one file for each task and entry, one line of JSON for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: dict[Path, list[str]] = {}
        self.runs: dict[str, Run] = {}
        for path in sorted(folder.glob("*/*.jsonl")):
            self.lines[path] = path.read_text().splitlines()
            for number, line in enumerate(self.lines[path], start=1):
                try:
                    found = json.loads(line)
                    self.runs[key_of(found)] = found
                except (ValueError, KeyError) as error:
                    raise ValueError(
                        f"{path}, line {number}: not a run of this study ({error!r}). "
                        "Delete that line, and it is run again."
                    ) from error

    def add(self, found: Run) -> None:
        """Written beside and renamed: a study that is killed leaves whole files."""
        path = self.folder / found["task"] / f"{found['entry']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines.setdefault(path, []).append(json.dumps(found))
        beside = path.with_suffix(".new")
        beside.write_text("\n".join(self.lines[path]) + "\n")
        beside.replace(path)
        self.runs[key_of(found)] = found


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two studies at once would write over each other's runs.

    Raises:
        ValueError: another one works in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another study writes here. Wait for it, or give another --out.") from None
        yield
    finally:
        os.close(descriptor)
