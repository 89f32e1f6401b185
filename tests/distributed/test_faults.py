"""Ranks that die, full disks and damaged checkpoints: what every rank says, and that the last good one still loads."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from amos_dist import __main__
from tests.distributed.harness import started

WORKER = Path(__file__).with_name("faults_worker.py")


PRETRAIN = Path(__file__).with_name("faults_pretrain.py")
KILLED = -signal.SIGKILL
GONE = "Look at its log first, then restart all ranks from the last checkpoint."

IN_TRAINING = "(this step cannot be finished|training cannot go on)"  # in Amos's own collective, or in the framework's

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(600)


class Ended(NamedTuple):
    """How a rank has: its exit status, what it said, and how many seconds after the start."""

    status: int
    text: str
    seconds: float

    @property
    def last(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]


def start(
    case: dict[str, Any], *command: str | int | Path, ranks: int, folder: Path, limit: float = 200
) -> list[Ended]:
    """Runs the worker, or another command, on so many ranks, of which some may die; all must end within the limit."""
    seconds = [0.0] * ranks
    with started(command or (WORKER,), ranks, folder, case, AMOS_FAULT=json.dumps(case)) as (running, logs):
        begun = time.monotonic()
        while any(process.poll() is None for process in running) and time.monotonic() < begun + limit:
            seconds = [
                s if p.poll() is not None else time.monotonic() - begun for s, p in zip(seconds, running, strict=True)
            ]
            time.sleep(0.1)
        late = [rank for rank, process in enumerate(running) if process.poll() is None]
    result = [Ended(p.returncode, log.read_text(), s) for p, log, s in zip(running, logs, seconds, strict=True)]
    assert not late, f"ranks {late} still ran after {limit} s: {result}"
    return result


def names_the_dead(ended: list[Ended], victim: int, who: str, consequence: str) -> None:
    """One rank was killed, and all others named it within a minute."""
    assert ended[victim].status == KILLED, ended
    for rank, each in enumerate(ended):
        if rank != victim:
            assert each.status == 1, each.text
            assert re.search(f"{who} does not answer any more, so that {consequence}. {GONE}$", each.last), each.text
            assert each.seconds - ended[victim].seconds < 60


ZERO_GONE = "rank 0, or the host that it ran on,"


@pytest.mark.parametrize(("stage", "victim", "who"), [(2, 1, "rank 1"), (2, 0, ZERO_GONE), ("fsdp2", 1, "rank 1")])
def test_a_rank_that_dies_in_a_step_is_named(stage: Any, victim: int, who: str, tmp_path: Path) -> None:
    ended = start({"do": "step", "stage": stage, "victim": victim}, ranks=3, folder=tmp_path)
    names_the_dead(ended, victim, who, "this step cannot be finished")


@pytest.mark.parametrize("late", [0, 4])
def test_ranks_that_are_no_neighbours_of_the_dead_one_answer(late: int, tmp_path: Path) -> None:
    """gloo sends round a ring: of five ranks two do not notice, unless their neighbours end."""
    ended = start({"do": "call", "victim": 1, "late": late}, ranks=5, folder=tmp_path)
    names_the_dead(ended, 1, "rank 1", "this run cannot go on")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def saving(folder: Path, stage: int, fault: str, sealed: bool) -> tuple[Path, list[Ended]]:
    """Rank 1 meets the fault while "two" is written, after "one"."""
    place = folder / f"{stage} {fault} {sealed}"
    place.mkdir()
    case = {"do": "save", "stage": stage, "fault": fault, "victim": 1, "sealed": sealed, "folder": str(place)}
    return place, start(case, ranks=2, folder=folder)


def loads(folder: Path, stage: int, *which: tuple[Path, str | None], then: int = 0) -> list[Ended]:
    """then: steps after each."""
    case = {"do": "load", "stage": stage, "then": then, "loads": [(str(place), tag) for place, tag in which]}
    return start(case, ranks=2, folder=folder)


def verify(folder: Path) -> tuple[int, str]:
    """The exit status of the command, and its errors."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["amos_dist", "verify", str(folder)])
        return __main__.main(), errors.getvalue()


@pytest.mark.parametrize("stage", [2, 3])
def test_faults_while_saving_leave_the_last_good_checkpoint(stage: int, tmp_path: Path) -> None:
    half = "two/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    killed, ended = saving(tmp_path, stage, "kill", sealed=True)
    names_the_dead(ended, 1, "rank 1", "nothing could be saved")
    assert 0 < (killed / half).stat().st_size < (killed / half.replace("two", "one")).stat().st_size

    full, ended = saving(tmp_path, stage, "full", sealed=True)
    for each in ended:
        assert each.status == 1, each.text
        assert f"RuntimeError: rank 1 cannot save: {full / half}: could not be written" in each.last, each.text

    plain, ended = saving(tmp_path, stage, "kill", sealed=False)
    names_the_dead(ended, 1, "rank 1", "nothing could be saved")

    for place in (killed, full):
        assert (place / "latest").read_text() == "one"
        assert not (place / "two" / "manifest.json").exists()
        assert verify(place) == (0, "")
    # DeepSpeed's own, without a barrier before `latest` (stage 3 happens to have one): this is why manifest.save exists
    assert (plain / "latest").read_text() == {2: "two", 3: "one"}[stage]
    for each in loads(tmp_path, stage, (killed, None), (full, None), (plain, "one"), then=1):
        assert each.status == 0, each.text
        assert each.text.count(": 0 parameters differ") == 3, each.text


def truncate(file: Path, _: Path) -> str:
    os.truncate(file, file.stat().st_size // 2)
    return "truncated"


def remove(file: Path, _: Path) -> str:
    file.unlink()
    return "missing"


def flip(file: Path, _: Path) -> str:
    """One bit of one weight."""
    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
    weights = next(saved[key] for key in ("single_partition_of_fp32_groups", "fp32_flat_groups") if key in saved)[0]
    content = bytearray(file.read_bytes())
    content[content.index(weights.detach().numpy().tobytes()) + 4 * 20 + 3] ^= 0x40
    file.write_bytes(content)
    return "damaged"


def mix(file: Path, other: Path) -> str:
    file.write_bytes(other.read_bytes())
    return "of another run"


@pytest.fixture(scope="module", params=[2, 3])
def stage_and_saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Two sealed checkpoints of 2 ranks."""
    folder = tmp_path_factory.mktemp("sealed")
    case = {"do": "save", "stage": request.param, "sealed": True, "folder": str(folder)}
    ended = start(case, ranks=2, folder=tmp_path_factory.mktemp("run"))
    assert [each.status for each in ended] == [0, 0], ended
    return request.param, folder


def damaged(saved: Path, folder: Path, damage: Any) -> tuple[Path, Path, str]:
    """A copy with the damage in a file of rank 1: the folder, the file, and what it is called."""
    place = folder / damage.__name__
    subprocess.run(["cp", "-r", saved, place], check=True)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    word = damage(place / "one" / name, place / "two" / name)
    (place / "latest").write_text("one")
    return place, place / "one" / name, word


@pytest.mark.parametrize("damage", [truncate, remove, flip, mix])
def test_the_manifest_finds_damage(damage: Any, stage_and_saved: tuple[int, Path], tmp_path: Path) -> None:
    assert verify(stage_and_saved[1]) == (0, "")
    place, file, word = damaged(stage_and_saved[1], tmp_path, damage)
    status, errors = verify(place)
    assert status == 2
    assert errors.startswith(f"error: {file}: ") and word in errors, errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("damage", [truncate, remove])
def test_without_the_manifest_half_a_checkpoint_is_an_error(
    damage: Any, stage_and_saved: tuple[int, Path], tmp_path: Path
) -> None:
    stage, saved = stage_and_saved
    place, _, _ = damaged(saved, tmp_path, damage)
    for each in loads(tmp_path, stage, (place, None)):
        assert each.status == 1 and "Error" in each.last, each.text


def test_without_the_manifest_other_damage_is_loaded(stage_and_saved: tuple[int, Path], tmp_path: Path) -> None:
    """Which is what the manifest is for. Should this fail, DeepSpeed or torch have learnt to see it."""
    stage, saved = stage_and_saved
    places = [damaged(saved, tmp_path, damage)[0] for damage in (flip, mix)]
    for each in loads(tmp_path, stage, *[(place, None) for place in places]):
        assert each.status == 0, each.text
        assert each.text.count("loaded ") == 2 and ": 0 parameters" not in each.text, each.text


# ---- launch/pretrain.py ----------------------------------------------------------------------------------------------


def pretrain(case: dict[str, Any], engine: str, folder: Path, *more: str) -> list[Ended]:
    options = ("--size", "tiny", "--eval-windows", 32, "--steps", 12, "--save-every", 5, "--engine", engine)
    where = ("--data", folder / "data", "--out", folder / "out")
    (folder / "data").mkdir(exist_ok=True)
    for part in ("train", "validation"):
        np.save(folder / "data" / f"{part}.npy", np.arange(20000, dtype=np.uint16).astype(np.uint8))
    return start(case, PRETRAIN, *options, *where, *more, ranks=2, folder=folder)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "out" / "checkpoints" / "amos").glob("*/manifest.json"))


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_pretraining_names_the_dead_and_goes_on(engine: str, tmp_path: Path) -> None:
    """Killed between checkpoints, then with half of one on the disk; and then it is resumed to the end."""
    ended = pretrain({"fault": "kill", "rank": 1, "step": 8}, engine, tmp_path)
    names_the_dead(ended, 1, "rank 1", IN_TRAINING)
    assert "Traceback" not in ended[0].text
    assert checkpoints(tmp_path) == ["step000005"]

    file = "step000010.part"
    ended = pretrain({"fault": "kill", "rank": 1, "file": file}, engine, tmp_path, "--resume")
    names_the_dead(ended, 1, "rank 1", "training cannot go on")
    assert checkpoints(tmp_path) == ["step000005"]
    assert (tmp_path / "out" / "checkpoints" / "amos" / file).is_dir()

    ended = pretrain({"rank": -1}, engine, tmp_path, "--resume")
    assert [each.status for each in ended] == [0, 0], ended
    assert checkpoints(tmp_path) == ["step000005", "step000010"]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_pretraining_with_a_full_disk(engine: str, tmp_path: Path) -> None:
    ended = pretrain({"fault": "full", "rank": 1, "file": "step000010.part"}, engine, tmp_path)
    place = tmp_path / "out" / "checkpoints" / "amos" / "step000010.part"
    named = (
        place / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        if engine == "deepspeed"
        else f"rank 1 could not write {place}"
    )
    for rank, each in enumerate(ended):
        assert each.status == 1, each.text
        assert each.last.startswith(f"rank {rank}: ") and str(named) in each.last, each.text
        assert "Make room there" in each.last and "Traceback" not in each.text, each.text
    assert checkpoints(tmp_path) == ["step000005"]
