"""launch/*.sh on several hosts: the losses are those of one, hosts that are gone are named, and training restarts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.harness import ROOT, free_port, launch
from tests.integration.pretraining import losses
from tests.multinode.cluster import Cluster, missing

STEPS = 24
GONE = "Look at its log first, then restart all ranks from the last checkpoint."
JOB = ("--deepspeed_config", "launch/zero2.json", "--size", "tiny", "--eval-windows", 32, "--steps", STEPS)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(f"several hosts on this machine: {reason}")
    with Cluster(hosts=2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    for part in ("train", "validation"):
        np.save(folder / f"{part}.npy", np.random.default_rng(0).integers(0, 256, 20000).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def on_one_host(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of four ranks."""
    out = tmp_path_factory.mktemp("one")
    done = launch(
        "launch/pretrain.py", *JOB, "--data", tokens, "--out", out, ranks=4, folder=ROOT, limit=400, launcher=False
    )
    assert done.returncode == 0, done.stdout
    return losses(out)


class Job:
    """launch/pretrain.py on hosts, by a script of launch/, into a folder of its own."""

    def __init__(self, cluster: Cluster, tokens: Path, out: Path, *more: str | int) -> None:
        self.cluster, self.out = cluster, out
        self.words = [*JOB, "--data", tokens, "--out", out / "out", *more]
        self.environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.hostfile("node0 slots=2\nnode1 slots=2\n")

    def hostfile(self, text: str) -> Path:
        path = self.out / "hostfile"
        path.write_text(text)
        self.environment |= {"HOSTFILE": str(path), "MASTER_PORT": str(free_port())}
        return path

    def run(self, script: str, *more: str, limit: float = 400, **environment: str) -> tuple[int, str]:
        words = [ROOT / "launch" / script, *self.words, *more]
        done = self.cluster.run(0, *words, limit=limit, check=False, **self.environment, **environment)
        return done.returncode, done.stdout

    def trains(self, script: str, *more: str, **environment: str) -> list[float]:
        status, output = self.run(script, *more, **environment)
        assert status == 0, output[-6000:]
        return losses(self.out / "out")

    def errors(self) -> dict[int, str]:
        """What each rank wrote before its end."""
        return {int(file.stem[4:]): file.read_text() for file in (self.out / "out" / "errors").glob("rank*.txt")}

    def await_checkpoint(self, step: int, limit: float = 300) -> None:
        manifest = self.out / "out" / "checkpoints" / "amos" / f"step{step:06d}" / "manifest.json"
        end = time.monotonic() + limit
        while not manifest.exists():
            assert time.monotonic() < end, f"no {manifest}"
            time.sleep(0.02)


def needs(program: str) -> None:
    if subprocess.run(["sh", "-c", f"command -v {program}"], capture_output=True).returncode:
        pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("script", ["multinode.sh", "mpirun.sh"])
def test_two_hosts_train_to_the_bit_as_one(
    script: str, cluster: Cluster, tokens: Path, on_one_host: list[float], tmp_path: Path
) -> None:
    needs({"multinode.sh": "pdsh", "mpirun.sh": "mpirun"}[script])
    assert Job(cluster, tokens, tmp_path).trains(script) == on_one_host


def test_a_link_that_is_cut_is_named_on_every_host_and_training_restarts(
    cluster: Cluster, tokens: Path, on_one_host: list[float], tmp_path: Path
) -> None:
    """With --restart on both hosts, to the bit, and on the one that is left, with two parts of a batch on each rank."""
    (tmp_path / "job").mkdir()
    job = Job(cluster, tokens, tmp_path / "job", "--save-every", 4)
    with cluster.started(0, ROOT / "launch" / "multinode.sh", *job.words, **job.environment) as process:
        try:
            job.await_checkpoint(4)
            cluster.cut(1)
            begun = time.time()
            output, _ = process.communicate(timeout=120)
            end = time.monotonic() + 60
            while len(job.errors()) < 4 and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            cluster.heal(1)
    assert process.returncode != 0, output
    there, here = "ranks 2 and 3 on node1 do not answer any more", "rank 0, or the host that it ran on, node0, does not"
    errors = job.errors()
    assert sorted(errors) == [0, 1, 2, 3], (errors, output[-6000:])
    for rank, text in errors.items():
        assert text.startswith(f"node{rank // 2}: {there if rank < 2 else here}"), errors
        assert "restart all ranks from the last checkpoint" in text
        assert (job.out / "out" / "errors" / f"rank{rank}.txt").stat().st_mtime - begun < 60
        if rank < 2:
            assert f"rank {rank}: {there}" in output, output[-6000:]  # also where the job was started

    (tmp_path / "one").mkdir()
    subprocess.run(["cp", "-r", job.out / "out", tmp_path / "one" / "out"], check=True)
    assert job.trains("multinode.sh", "--restart") == on_one_host
    assert not job.errors()
    fewer = Job(cluster, tokens, tmp_path / "one", "--save-every", 4)
    fewer.hostfile("node0 slots=2\n")
    continued = fewer.trains("multinode.sh", "--restart", LAUNCHER="ssh")
    assert continued[:4] == on_one_host[:4]
    np.testing.assert_allclose(continued, on_one_host, rtol=2e-5)


def test_ranks_that_do_not_meet_say_who_is_absent(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    """The link is cut before they have met; both hosts are started by hand."""
    job = Job(cluster, tokens, tmp_path, "--preflight", 20)
    address, port, hostfile = cluster.hosts[0].address, job.environment["MASTER_PORT"], job.environment["HOSTFILE"]
    where = ("--hostfile", hostfile, "--master_addr", address, "--master_port", port, "--no_ssh")
    command = (sys.executable, "-m", "deepspeed.launcher.runner", *where, "--node_rank")
    words = (ROOT / "launch" / "pretrain.py", *job.words, "--hostfile", hostfile)
    cluster.cut(1)
    try:
        with (
            cluster.started(0, *command, 0, *words, **job.environment) as first,
            cluster.started(1, *command, 1, *words, **job.environment) as second,
        ):
            said = []
            for process in (first, second):
                output, _ = process.communicate(timeout=300)
                assert process.returncode != 0, output
                said.append("\n".join(line for line in output.splitlines() if ": rank" in line or line[:4] == "rank"))
    finally:
        cluster.heal(1)
    assert "ranks 2-3 on node1 do not answer within 20 s, so that training cannot start." in said[0], said
    assert f"{address}, port {port}, where rank 0 is to be met, cannot be reached from node1" in said[1], said


def cut(cluster: Cluster, job: Job) -> str:
    cluster.cut(1)
    return "node1 does not answer over ssh"


def unknown(cluster: Cluster, job: Job) -> str:
    job.hostfile("node0 slots=2\nnode7 slots=2\n")
    return "node7 does not answer over ssh (ssh: Could not resolve hostname node7"


def misspelt(cluster: Cluster, job: Job) -> str:
    path = job.hostfile("# ours\nnode0 slots=2\nnode1 slot=2")
    return f"{path}, line 3: 'node1 slot=2' is no host."


def twice(cluster: Cluster, job: Job) -> str:
    path = job.hostfile("node0 slots=2\nnode1 slots=2\nnode0 slots=2\n")
    return f"{path}, line 3: node0 is there twice."


def no_hostfile(cluster: Cluster, job: Job) -> str:
    path = job.hostfile("")
    path.unlink()
    return f"{path}: no such hostfile."


def other_network(cluster: Cluster, job: Job) -> str:
    job.environment["INTERFACE"] = "ib0"
    return "node1 has no network interface ib0 with an address, only eth0"


@pytest.mark.parametrize("script", ["multinode.sh", "mpirun.sh"])
@pytest.mark.parametrize("mistake", [cut, unknown, misspelt, twice, no_hostfile, other_network])
def test_hosts_that_cannot_take_part_are_named_before_the_start(
    mistake: Callable[[Cluster, Job], str], script: str, cluster: Cluster, tokens: Path, tmp_path: Path
) -> None:
    if script == "mpirun.sh":
        needs("mpirun")
    job = Job(cluster, tokens, tmp_path)
    try:
        words = mistake(cluster, job)
        status, output = job.run(script, limit=60)
    finally:
        cluster.heal(1)
    assert status == 1, output
    assert f"{script}: {words}" in output, output
    assert not (tmp_path / "out").exists()


def test_another_version_on_one_host_is_named_on_every_host(cluster: Cluster, tokens: Path, tmp_path: Path) -> None:
    init = ROOT / "amos_dist" / "__init__.py"
    other = tmp_path / "__init__.py"
    lines = [line if not line.startswith("__version__") else '__version__ = "0.0.1"' for line in init.open()]
    other.write_text("\n".join(line.rstrip("\n") for line in lines) + "\n")
    job = Job(cluster, tokens, tmp_path)
    cluster.run(1, "mount", "--bind", other, init)
    try:
        status, output = job.run("multinode.sh")
    finally:
        cluster.run(1, "umount", init)
    assert status != 0, output
    said = [line for line in output.splitlines() if "0.0.1" in line and "node1" in line]
    assert {line.partition(":")[0] for line in said} >= {"node0", "node1"}, output
