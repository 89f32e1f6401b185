"""amos_dist.manifest: what is sealed is found to be whole, and each damage is named. And the words of a roll call."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from amos_dist import manifest, roll_call
from tests.distributed.harness import full_disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tag"
    (place / "sub").mkdir(parents=True)
    (place / "a.pt").write_bytes(bytes(range(256)) * 40)
    (place / "sub" / "b.pt").write_bytes(b"")
    manifest.seal(place, {"step": 3, "losses": [0.1, 1e-30]})
    return place


def test_what_is_sealed_is_whole(folder: Path) -> None:
    content = manifest.check(folder)
    assert (content["step"], content["losses"]) == (3, [0.1, 1e-30])
    assert {name: size for name, (size, _) in content["files"].items()} == {"a.pt": 10240, "sub/b.pt": 0}
    manifest.seal(folder)  # again: neither the old manifest nor its rest counts as a file
    assert set(manifest.check(folder)["files"]) == {"a.pt", "sub/b.pt"}


def test_a_folder_that_was_moved_is_whole(folder: Path) -> None:
    manifest.check(folder.rename(folder.with_name("elsewhere")))


def truncated(folder: Path) -> str:
    os.truncate(folder / "a.pt", 5000)
    return "a.pt: truncated, 5000 bytes instead of 10240."


def longer(folder: Path) -> str:
    (folder / "a.pt").write_bytes(bytes(20000))
    return "a.pt: of another run, or damaged, 20000 bytes instead of 10240."


def flipped(folder: Path) -> str:
    content = bytearray((folder / "a.pt").read_bytes())
    content[7777] ^= 1
    (folder / "a.pt").write_bytes(content)
    return "a.pt: damaged, or of another run: its content is not what was saved."


def missing(folder: Path) -> str:
    (folder / "sub" / "b.pt").unlink()
    return "sub/b.pt: missing from the checkpoint."


def foreign(folder: Path) -> str:
    (folder / "c.pt").write_bytes(b"x")
    return "c.pt: not of this checkpoint."


def never_sealed(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json: there is none, so that the save was cut off, or never sealed."


def half_a_manifest(folder: Path) -> str:
    os.truncate(folder / "manifest.json", 50)
    return "manifest.json: not a readable manifest"


def changed_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 8'))
    return "manifest.json: damaged, its content is not what was written."


def another_json(folder: Path) -> str:
    (folder / "manifest.json").write_text(json.dumps({"files": ["a.pt"]}))
    return "manifest.json: not a readable manifest"


DAMAGES = [
    truncated, longer, flipped, missing, foreign, never_sealed, half_a_manifest, changed_manifest, another_json
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: Callable[[Path], str], folder: Path) -> None:
    words = damage(folder)
    with pytest.raises(ValueError) as raised:
        manifest.check(folder)
    assert str(raised.value).startswith(f"{folder}/{words}"), raised.value
    assert str(raised.value).endswith(manifest.REMEDY)


def test_files_of_two_runs(folder: Path) -> None:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    (other / "a.pt").write_bytes(bytes(10240))  # as long, which a size does not tell
    manifest.seal(other)
    shutil.copy(other / "a.pt", folder / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: damaged, or of another run"):
        manifest.check(folder)


def test_sealing_on_a_full_disk_names_the_manifest(folder: Path) -> None:
    said = r"manifest\.json: could not be written \(File too large\)\. Make room there"
    with pytest.raises(OSError, match=said), full_disk(100):
        manifest.seal(folder)
    with pytest.raises(ValueError, match="never sealed"):
        manifest.check(folder)


def test_a_file_that_cannot_be_replaced_is_as_before(tmp_path: Path) -> None:
    manifest.replace_text(tmp_path / "latest", "one")
    with pytest.raises(OSError, match="latest: could not be written"), full_disk(100):
        manifest.replace_text(tmp_path / "latest", "two" * 100)
    assert (tmp_path / "latest").read_text() == "one"


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "amos_dist", "verify", str(folder)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_verify(folder: Path) -> None:
    found = verify(folder)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"{folder}: 2 files, 10,240 bytes, as they were saved\n"
    (folder.parent / "latest").write_text("tag\n")  # DeepSpeed's
    assert verify(folder.parent).stdout == found.stdout
    words = flipped(folder)
    found = verify(folder.parent)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"error: {folder}/{words} {manifest.REMEDY}\n"
    assert verify(folder / "no").returncode == 2


# ---- roll call -------------------------------------------------------------------------------------------------------

CAUSE = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.3]:4711.\nMore."


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (None, "rank 0, or the host that it ran on, does not answer any more, so that x. Look at its log first"),
        ([1], "rank 1 does not answer any more, so that x. Look at its log first"),
        ([1, 5], "ranks 1 and 5 do not answer any more, so that x. Look at their logs first"),
        ([1, 2, 5], "ranks 1, 2 and 5 do not answer any more, so that x. Look at their logs first"),
        (list(range(8, 16)), "ranks 8, 9, 10, 11, 12, 13, 14 and 15 do not"),
        (list(range(16)), "16 ranks (0, 1, 2, 3, 4, 5, 6, 7, …) do not"),
        ([], "all ranks live, but a connection between them has failed, so that x ([/gloo/transport/tcp/pair.cc:553] "),
    ],
)
def test_sentence(gone: list[int] | None, words: str) -> None:
    said = roll_call.sentence(gone, "x", CAUSE)
    assert said.startswith(words)
    assert said.endswith("then restart all ranks from the last checkpoint.") and "\n" not in said


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError(CAUSE), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[enforce fail at /gloo/transport/tcp/pair.cc:4] op.nbytes. 8 vs 4"), False),
        (RuntimeError("rank 1 cannot take this step: sparse gradients"), False),
        (roll_call.CollectiveError(f"all ranks live … ({CAUSE})"), False),
        (ValueError(CAUSE), False),
        (torch.OutOfMemoryError(CAUSE), False),
    ],
)
def test_only_errors_of_the_backend_start_a_roll_call(error: Exception, wanted: bool) -> None:
    assert roll_call.is_of_backend(error) == wanted
    with pytest.raises(type(error)) as raised, roll_call.guard():  # without a process group it passes in any case
        raise error
    assert raised.value is error


def test_a_roll_call_that_nobody_answers_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where rank 0's host has lost power: the store neither answers nor refuses."""

    class Mute:
        def set(self, *_: str) -> None:
            signal.pause()  # this thread, for ever

    monkeypatch.setattr(roll_call, "LIMIT", 0.5)
    monkeypatch.setattr(roll_call, "_held", None)
    monkeypatch.setattr(roll_call.distributed_c10d, "_get_default_store", Mute)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with (
        pytest.raises(roll_call.CollectiveError, match=r"^rank 0, or the host that it ran on, does not"),
        roll_call.guard(),
    ):
        raise RuntimeError(CAUSE)


def test_sigterm_ends_the_waiting_and_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of four, which nobody answers, and a launcher that ends it at once."""
    store = dist.FileStore(str(tmp_path / "store"), 4)
    monkeypatch.setattr(roll_call.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(roll_call, "QUIET", 100.0)
    monkeypatch.setattr(roll_call, "LAST", 0.2)
    monkeypatch.setattr(roll_call, "_held", None)
    monkeypatch.setattr(roll_call, "cut_connections", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert roll_call.absent() == [0, 1, 3]
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(roll_call, "_RollCall", None)
    assert roll_call.absent() == [0, 1, 3]  # once is enough
