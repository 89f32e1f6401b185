"""What the files in launch/ would run, without hosts: dry runs, a stand-in for Slurm, and the JSONs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT

LAUNCH = ROOT / "launch"
MORE = ("--steps", "7", "--restart")


def script(name: str, *words: str, folder: Path = ROOT, **environment: str) -> str:
    command = ["bash", str(LAUNCH / name), *words]
    inherited = {**os.environ, "HOSTFILE": "launch/hostfile.example", "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def jobs() -> list[list[str]]:
    """The arguments of launch/pretrain.py in each file."""
    found = []
    for name, environment in (
        ("multinode.sh", {"LAUNCHER": "pdsh"}),
        ("multinode.sh", {"LAUNCHER": "ssh"}),
        ("mpirun.sh", {}),
        ("slurm.sbatch", {}),
    ):
        if name == "mpirun.sh" and subprocess.run(["sh", "-c", "command -v mpirun"], capture_output=True).returncode:
            continue
        lines = script(name, "--dry-run", *MORE, **environment).splitlines()
        assert len(lines) == (2 if environment == {"LAUNCHER": "ssh"} else 1), lines  # a line for each host
        for line in lines:
            words = shlex.split(line)
            if words[0] == "ssh":
                assert words[-2] == f"node{lines.index(line)}"
                words = shlex.split(words[-1])
            assert any(word in words for word in ("--hostfile", "srun")), line
            found.append(words[words.index("launch/pretrain.py") + 1 :])
            assert found[-1][-3:] == list(MORE)
    return found


PARSE = "import json, sys, pretrain\nfor words in json.load(sys.stdin): sys.argv[1:] = words; pretrain.arguments()"


def test_dry_runs_say_what_pretrain_understands() -> None:
    given = jobs()
    yaml = (LAUNCH / "kubernetes.yaml").read_text()
    (line,) = (line for line in yaml.splitlines() if "args: [" in line)
    given.append([word.strip(' "') for word in line.partition("[")[2].rstrip("]").split(",")])
    for words in given:
        assert (ROOT / words[words.index("--deepspeed_config") + 1]).is_file(), words
    done = subprocess.run(
        [sys.executable, "-c", PARSE], cwd=LAUNCH, input=json.dumps(given), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


SRUN = """#!/bin/sh
while case $1 in --*) true ;; *) false ;; esac; do shift; done
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@"
done
"""
RANK = '#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $GLOO_SOCKET_IFNAME $1 $*"\n'


def test_daemons_of_both_mpis_are_started(tmp_path: Path) -> None:
    """MPICH calls what takes the place of ssh with an option before the host, Open MPI without."""
    programs = {
        "mpirun": "echo HYDRA build details:",
        "ssh": 'shift $(($# - 2)); echo "$1: $2"',
        "python": f'exec "{sys.executable}" "$@"',  # programs beside it are found first
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = script("mpirun.sh", "--dry-run", PYTHON=str(tmp_path / "python"), PATH=path)
    assert "--launcher mpich" in said
    for options in (["-x"], [], ["-X", "-l", "me"]):
        words = [*options, "node1", "daemon", "--port"]
        agent = [ROOT / "out" / "mpi_ssh.sh", *words]
        found = subprocess.run(agent, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
        assert found.stdout.startswith("node1: OPAL_PREFIX=") and found.stdout.endswith("; daemon --port\n")


def test_slurm_tasks_know_their_ranks(tmp_path: Path) -> None:
    scontrol = '#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol), ("rank", RANK)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "n[7-8]", "INTERFACE": "ib0"}
    said = script("slurm.sbatch", "--steps", "7", PYTHON=str(tmp_path / "rank"), PATH=path, **job).splitlines()
    assert len(said) == 4
    for task, line in enumerate(said):
        assert line.startswith(f"{task} {task % 2} 4 n7 24567 ib0 launch/pretrain.py "), line
        assert line.endswith(" --restart --steps 7"), line


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_bf16_json_is_the_other_one_in_bf16(stage: int) -> None:
    plain, bf16 = (json.loads((LAUNCH / f"{name}zero{stage}.json").read_text()) for name in ("", "bf16_"))
    assert bf16 == plain | {"bf16": {"enabled": True}}
    assert plain["zero_optimization"]["stage"] == stage
