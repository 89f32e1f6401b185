"""Hostfiles, the comparison of hosts and ranks, and `python -m amos_dist info --hostfile`, with a program for ssh."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from amos_dist import build_info, hosts, originals, preflight, versions
from amos_dist.__main__ import main
from amos_dist.versions import NOTABLE, REQUIRED, Report, Row, rows_of

ROOT = Path(__file__).parents[2]
FACTS: dict[str, Any] = {**dict.fromkeys(versions.ALL_FACTS, "1"), "extension": True, "cuda_archs": ["sm_80", "sm_90"]}


# ---- hostfiles -------------------------------------------------------------------------------------------------------

GOOD = "# two of them\n\nworker-1 slots=4\n  10.0.0.2\tslots=2   # the small one\nworker-3 slots=0 max_slots=8\n"


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = hostfile(tmp_path, GOOD)
    assert list(hosts.read(path).items()) == [("worker-1", 4), ("10.0.0.2", 2), ("worker-3", 0)]
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert hosts.read(path) == runner.fetch_hostfile(str(path))


def test_hosts_of_ranks(tmp_path: Path) -> None:
    path = hostfile(tmp_path, GOOD)
    assert hosts.of_ranks(path, 6) == ["worker-1"] * 4 + ["10.0.0.2"] * 2
    assert hosts.of_ranks(path, 5) == []  # --include or --exclude: nobody knows which


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=1\nb\n", "line 2: 'b' is no host"),
        ("a slots=1\n\nb slots=many\n", "line 3: 'b slots=many' is no host"),
        ("a slots = 1\n", "line 1"),
        ("-oProxyCommand=ls slots=1\n", "line 1"),
        ("a # slots=1\n", "line 1"),
        ("a slots=1\n#\nb slots=1\na slots=2\n", "line 4: a is there twice"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        hosts.read(hostfile(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path / 'hostfile'}") and words in str(error.value)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: cannot be read .*\. Give a DeepSpeed hostfile"):
        hosts.read(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary: cannot be read"):
        hosts.read(tmp_path / "binary")


# ---- the comparison --------------------------------------------------------------------------------------------------


def two(ahead: float = 0.0, **other: Any) -> Report:
    return Report((Row("node1", (0, 1), FACTS), Row("node2", (2, 3), {**FACTS, **other}, ahead)))


def test_alike() -> None:
    report = two()
    assert report.error == "" and report.warnings == []
    assert report.summary.startswith("4 ranks on 2 hosts with amos_dist 1, Python 1, torch 1")


@pytest.mark.parametrize("key", REQUIRED)
def test_what_must_be_alike(key: str) -> None:
    there = "built" if key == "extension" else "1"
    report = two(**{key: None})
    clause = f"{REQUIRED[key]} is {there} on node1 (ranks 0-1) and missing on node2 (ranks 2-3)"
    assert report.error == f"{clause}. {versions.INSTALL}" and report.warnings == []
    assert f"{REQUIRED[key]} 1" not in report.summary


@pytest.mark.parametrize("key", NOTABLE)
def test_what_may_differ(key: str) -> None:
    there = "sm_80, sm_90" if key == "cuda_archs" else "1"
    report = two(**{key: ["2"] if key == "cuda_archs" else "2"})
    clause = f"{NOTABLE[key]} is {there} on node1 (ranks 0-1) and 2 on node2 (ranks 2-3)"
    assert report.warnings == [f"{clause}. {versions.MAY_BE_MEANT}"] and report.error == ""


def test_no_gpu_on_one_host() -> None:
    assert two(gpu=None).error.endswith(f"missing on node2 (ranks 2-3). {versions.LOOK_AT_GPU}")


def test_several_differences_are_one_sentence() -> None:
    error = two(version="2", sources="2", torch="2", ahead=-100.0).error
    assert error.count("; ") == 2 and "code" not in error
    assert error.endswith(f"is 100 s behind the others. {versions.INSTALL} {versions.SET_CLOCKS}")


@pytest.mark.parametrize(
    ("ahead", "kind"), [(4.0, ""), (-4.0, ""), (6.0, "warning"), (-6.0, "warning"), (61.0, "error")]
)
def test_clocks(ahead: float, kind: str) -> None:
    report = two(ahead)
    assert (bool(report.warnings), bool(report.error)) == (kind == "warning", kind == "error")
    if kind:
        said = report.error or report.warnings[0]
        apart = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the others"
        assert said == f"the clock of node2 (ranks 2-3) is {apart}. {versions.SET_CLOCKS}"


def test_hundreds_of_hosts_are_not_all_listed() -> None:
    rows = [Row(f"node{i}", (2 * i, 2 * i + 1), FACTS) for i in range(300)]
    rows[7] = Row("node7", (14, 15), {**FACTS, "torch": "2"})
    many = "node0 (ranks 0-1), node1 (ranks 2-3), node2 (ranks 4-5), 296 more hosts"
    assert Report(tuple(rows)).error.startswith(f"torch is 1 on {many} and 2 on node7 (ranks 14-15). ")


@pytest.mark.parametrize(("ranks", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 4, 6, 7), "0-2, 4, 6-7")])
def test_spans(ranks: tuple[int, ...], text: str) -> None:
    assert versions.spans(ranks) == text


def test_ranks_of_a_host_that_are_alike_are_one_row() -> None:
    found = [{**FACTS, "host": host, "gpu": gpu} for host in ("node1", "node2") for gpu in ("A", "A", "B")]
    rows = rows_of(found, [100.0, 101.0, 100.0, 100.0, 100.0, 130.0])
    assert [(row.host, row.ranks, row.ahead) for row in rows] == [
        ("node1", (0, 1), 1.0),
        ("node1", (2,), 0.0),
        ("node2", (3, 4), 0.0),
        ("node2", (5,), 30.0),
    ]
    head, *lines = str(Report(tuple(rows))).splitlines()
    assert head.split()[:3] == ["ranks", "host", "amos_dist"] and head.endswith("clock")
    assert lines[0].startswith("0-1    node1  1  ") and lines[3].endswith("+30.0 s") and len(lines) == 4


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_facts_are_those_of_build_info_and_more() -> None:
    facts = versions.facts()
    assert facts.items() >= build_info().items() and set(versions.ALL_FACTS) <= set(facts)
    assert facts["host"] == os.uname().nodename and abs(facts["clock"] - time.time()) < 60
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_the_hash_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes with a file's content, its name and its folder; not with compiled files or the place of it all."""
    here = versions._sources()
    copy = tmp_path / "amos_dist"
    shutil.copytree(ROOT / "amos_dist", copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (copy / "zz").mkdir()
    monkeypatch.setattr(versions, "__file__", str(copy / "versions.py"))
    assert versions._sources() == here
    changes: list[Callable[[], object]] = [
        lambda: (copy / "decay.py").write_text((copy / "decay.py").read_text() + "\n"),
        lambda: (copy / "decay.py").rename(copy / "zz.py"),
        lambda: (copy / "zz.py").rename(copy / "zz" / "zz.py"),  # still the last
    ]
    seen = {here}
    for change in changes:
        change()
        seen.add(versions._sources())
    assert len(seen) == 4


def test_a_driver_is_found_in_what_its_module_says(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    for text, version in ((closed, "535.104.05"), (opened, "570.86.15"), ("something else", None)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert versions._driver() == version


def test_one_process_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preflight.check().summary.startswith("1 rank on 1 host with amos_dist ")


def test_what_check_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout=0"):
        preflight.check(timeout=0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r"MASTER_ADDR and MASTER_PORT, .* Start the ranks with a launcher"):
        preflight.check(timeout=30)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE=two in the environment is no number"):
        preflight.check()


def test_what_the_first_step_compares_is_compared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else ranks would pass here, and be refused there."""
    info, before = build_info(), originals.facts_of([], {}, {}, [])
    compared = set()
    for key in info:
        monkeypatch.setattr(originals, "build_info", lambda key=key: {**info, key: "another"})
        compared |= {key} if originals.facts_of([], {}, {}, []) != before else set()
    assert {"version", "torch"} <= compared <= set(REQUIRED)


def test_the_first_verdict_counts() -> None:
    """Ranks that give up and ranks that compare may write at the same moment."""
    meeting = preflight._Meeting(0, 2, 1.0, ())
    meeting.store = dist.HashStore()
    for text in ("first", "second"):
        meeting._decide({"absent": text})
    assert json.loads(meeting.store.get(f"{meeting.place}/verdict")) == {"absent": "first"}


# ---- info --hostfile -------------------------------------------------------------------------------------------------

SSH = """
import json, os, subprocess, sys, time
from pathlib import Path

folder = Path(__file__).parent
*options, host, command = sys.argv[1:]
with (folder / f"asked_{host}").open("w") as file:
    json.dump(sys.argv[1:], file)
if host == "down":
    print("Pseudo-terminal\\nssh: connect to host down port 22: Connection refused", file=sys.stderr)
    sys.exit(255)
if host == "mute":
    sys.exit(3)
if host == "frozen":
    child = subprocess.Popen(["sleep", "1000"])
    (folder / "child").write_text(str(child.pid))
    child.wait()
if host == "strange":
    print("hello")
    sys.exit()
if host.startswith("real"):
    sys.exit(subprocess.run(["sh", "-c", command], env={"PATH": os.environ["PATH"]}).returncode)
facts = json.loads((folder / "facts.json").read_text())
facts["clock"] = time.time() + (200 if host.startswith("future") else 0)
if host == "old":
    for key in ("sources", "clock", "host", "python"):
        del facts[key]
if host == "other":
    facts["version"] = "0.2.0"
print("Welcome to " + host + " {today}")
print(json.dumps(facts, indent=1))
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `info --hostfile` in this process on hosts of those names: its status and what it printed."""
    (tmp_path / "facts.json").write_text(json.dumps(versions.facts()))
    (tmp_path / "ssh.py").write_text(SSH)

    def asked(*names: str, more: tuple[str, ...] = ()) -> tuple[int, str]:
        path = hostfile(tmp_path, "".join(f"{name} slots=2\n" for name in names))
        ssh = shlex.join([sys.executable, str(tmp_path / "ssh.py"), "-F", "my config"])
        words = ["info", "--hostfile", str(path), "--ssh", ssh, *more]
        monkeypatch.setattr(sys, "argv", ["amos_dist", *words])
        status = main()
        return status, capsys.readouterr().out

    return asked


def test_hosts_that_are_alike(ask: Callable[..., Any], tmp_path: Path) -> None:
    status, output = ask("one", "two")
    assert status == 0, output
    head, one, two, _, end = output.splitlines()
    assert head.split()[:2] == ["host", "amos_dist"] and one.startswith("one ") and two.startswith("two ")
    assert end.startswith("2 hosts with amos_dist ") and end.endswith("nothing keeps them from training together")
    first, second, *connect, host, command = json.loads((tmp_path / "asked_two").read_text())
    assert (first, second, host) == ("-F", "my config", "two")
    assert connect == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    assert command.startswith(f"cd {Path.cwd()} && env ") and command.endswith(" -m amos_dist info --json")


def test_hosts_that_differ(ask: Callable[..., Any]) -> None:
    status, output = ask("one", "two", "other")
    version = build_info()["version"]
    assert status == 1 and f"\namos_dist is {version} on one, two and 0.2.0 on other. Install " in output, output
    status, output = ask("one", "two", "future")
    assert status == 1 and "\nthe clock of future is 200 s ahead of the others. Set " in output, output
    status, output = ask("future1", "future2")  # then it is the clock here that is wrong
    assert status == 0 and "clock of" not in output, output
    status, output = ask("one", "old")  # an amos_dist that does not say all yet
    assert status == 1 and "Python is 3." in output and " on one and missing on old. " in output, output


def test_hosts_that_do_not_answer(ask: Callable[..., Any], tmp_path: Path) -> None:
    begun = time.monotonic()
    status, output = ask("one", "down", "frozen", "mute", "strange", more=("--timeout", "20"))
    assert status == 1 and time.monotonic() - begun < 100
    assert "\ndown does not answer: ssh: connect to host down port 22: Connection refused\n" in output
    assert "\nfrozen does not answer: no answer within 20 s\n" in output
    assert f"\nmute does not answer: {sys.executable} ended with 3\n" in output
    assert "\nstrange does not answer: what it says is no answer of `info --json`: 'hello\\n'\n" in output
    state = Path("/proc", (tmp_path / "child").read_text(), "stat")  # nothing of it goes on here
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() - begun < 100
        time.sleep(0.1)
    assert "nothing keeps" not in output and output.splitlines()[1].startswith("one ")


def test_hosts_for_programs(ask: Callable[..., Any]) -> None:
    status, output = ask("one", "down", more=("--json",))
    seen = json.loads(output)
    assert status == 1 and list(seen["hosts"]) == ["one"] and "refused" in seen["silent"]["down"]
    assert seen["hosts"]["one"]["sources"] == versions.facts()["sources"] and seen["error"] == ""


def test_no_ssh_at_all(ask: Callable[..., Any]) -> None:
    status, output = ask("one", more=("--ssh", "no-such-program"))
    assert (status, output) == (
        1,
        "one does not answer: no-such-program cannot be started (No such file or directory)\n",
    )


def test_the_command_runs_there(ask: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same folder, with the same interpreter and paths, also where these have spaces; and why it fails."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder}")
    status, output = ask("one", "real")
    assert status == 0, output
    (folder / "amos_dist").mkdir()
    (folder / "amos_dist" / "__init__.py").write_text("")
    status, output = ask("one", "real")
    assert status == 1 and "\nreal does not answer: " in output and "amos_dist.__main__" in output, output


def test_a_malformed_hostfile_on_the_command_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "amos_dist", "info", "--hostfile", str(hostfile(tmp_path, "a slots=1\nb\n"))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "line 2: 'b' is no host" in done.stderr
