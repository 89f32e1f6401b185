"""What the tests of launch/pretrain.py share: a text, its launch under both engines, and what a run has left."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, free_port, launch

LAUNCH = ROOT / "launch"
TINY = ("--size", "tiny", "--eval-windows", 32)


def pretrain(*arguments: str | int | Path, ranks: int = 2, launcher: bool = False) -> subprocess.CompletedProcess[str]:
    """With DeepSpeed; under its launcher, if asked for."""
    return launch(LAUNCH / "pretrain.py", *TINY, *arguments, ranks=ranks, launcher=launcher)


@functools.cache
def without_deepspeed() -> tempfile.TemporaryDirectory[str]:
    """A folder for PYTHONPATH."""
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "deepspeed.py").write_text("raise ImportError('DeepSpeed was imported')\n")
    return folder


def pretrain_fsdp2(
    out: Path, *arguments: str | int | Path, ranks: int = 2, launcher: bool = False
) -> subprocess.CompletedProcess[str]:
    """With FSDP2, without DeepSpeed; under torchrun, if asked for. No process may outlive its launcher."""
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port())
    job = (LAUNCH / "pretrain.py", "--engine", "fsdp2", *TINY, "--out", out, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", without_deepspeed().name, prepend=os.pathsep)
        try:
            result = launch(*torchrun, *job, ranks=1) if launcher else launch(*job, ranks=ranks, launcher=False)
            assert not running(out), result.stdout
        finally:
            for process in running(out):  # torchrun gives each rank a session of its own
                os.kill(process, signal.SIGKILL)
    return result


def running(out: Path) -> list[int]:
    """Processes whose command line names that folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if str(out).encode() in words:
            found.append(int(file.parent.name))
    return found


def losses(folder: Path) -> list[float]:
    (run,) = json.loads((folder / "results.json").read_text())
    return run["losses"]


def copy_of(saved: Path, folder: Path) -> Path:
    """The checkpoints of `saved` as they were after 5 steps; returns that checkpoint."""
    checkpoints = folder / "checkpoints"
    subprocess.run(["cp", "-r", saved / "checkpoints", checkpoints], check=True)
    subprocess.run(["rm", "-r", checkpoints / "amos" / "step000010"], check=True)
    return checkpoints / "amos" / "step000005"


def changed(folder: Path, name: str = "zero2", **blocks: object) -> Path:
    """launch/NAME.json with other blocks, as a file in `folder`."""
    path = folder / "changed.json"
    path.write_text(json.dumps(json.loads((LAUNCH / f"{name}.json").read_text()) | blocks))
    return path


def refused(result: subprocess.CompletedProcess[str], *words: str | Path, ranks: int = 2) -> None:
    """It ended with an error, and every rank said one sentence that has `words` in it and no traceback."""
    assert result.returncode != 0, result.stdout
    for rank in range(ranks):
        said = [line for line in result.stdout.splitlines() if f"rank {rank}: " in line]
        assert said and all(str(word) in said[0] for word in words), result.stdout
    launchers = result.args.count("torch.distributed.run")  # which ends with a traceback of its own
    assert result.stdout.count("Traceback") == launchers, result.stdout
