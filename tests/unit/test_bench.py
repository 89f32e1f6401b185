"""python -m amos_dist bench: its shapes, its errors, its table, its numbers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from amos_dist import bench, bench_cases, bench_report
from amos_dist.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["amos_dist", "bench", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        return main()
    finally:
        torch.set_num_threads(threads)


def numel(shapes: list[bench_cases.Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def test_sets() -> None:
    gpt2 = bench_cases.shapes_of("gpt2", "cpu")
    assert len(gpt2) == 148 and numel(gpt2) == 124_439_808
    layer = bench_cases.shapes_of("llama", "cpu")
    assert len(layer) == 9 and numel(layer) == 218_112_000
    assert bench_cases.shapes_of("llama", "cuda") == 2 * layer
    assert len(bench_cases.shapes_of("tiny", "cpu")) == 2000


@pytest.mark.parametrize(
    "text",
    [
        "768x3072\n\n# a comment\n64, 3, 7 , 7\n  5 # five\n",
        "768 3072\r\n64×3×7×7\r\n5",
        "[[768, 3072],\n [64, 3, 7, 7], [5]]",
    ],
)
def test_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shapes"
    path.write_text(text)
    assert bench_cases.shapes_of(str(path), "cpu") == [(768, 3072), (64, 3, 7, 7), (5,)]


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("3x4\n\n5x", 3, "'5x'"),
        ("3x4\n3x-4", 2, "'3x-4'"),
        ("3x4\n0", 2, r"\[0\]"),
        ("3.5", 1, "'3.5'"),
        ("[[3],\n[4],\n 5]", 3, "5"),
        ('[[3], [4,\n 5],\n\n["a"]]', 4, r"\['a'\]"),
        ("[[3], [true]]", 1, r"\[True\]"),
        ("[[3],\n[4", 2, "this is not JSON"),
        ("", 1, "no shape"),
        ("# nothing\n", 1, "no shape"),
        ("[]", 1, "no shape"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, line: int, found: str) -> None:
    path = tmp_path / "shapes"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}, line {line}: .*{found}.*\. Write .*\.$"):
        bench_cases.shapes_of(str(path), "cpu")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'nothing' is neither.*\. Give gpt2, llama, tiny, or a file's path\."):
        bench_cases.shapes_of("nothing", "cpu")
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be read.*\. Give"):
        bench_cases.shapes_of(str(tmp_path), "cpu")


def test_peers() -> None:
    assert [peer.name for peer in bench_cases.peers_named("sgd, adamw,sgd")] == ["SGD fused, momentum", "AdamW fused"]
    with pytest.raises(ValueError, match=r"--against lion: .*\. Known are adamw, adamw-foreach, adafactor, muon, sgd"):
        bench_cases.peers_named("adamw,lion")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "lion"], "Known are adamw"),
        (["--repeat", 0], "--repeat 0"),
        (["--threads", 0], "--threads 0"),
        (["--device", "mps"], "--device mps"),
        (["--shapes", "nothing"], "neither"),
    ],
)
def test_bad_arguments(
    arguments: list[object], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert not shown.out


def test_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 10**9)
    with pytest.raises(ValueError, match=r"about \d+\.\d GB on cpu, which has 1\.0 GB free\. Choose smaller"):
        bench.run("big", [(10_000, 10_000)], [], torch.device("cpu"), 1)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(monkeypatch, "--plot", "x.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed, and what is written, of a run with a peer that is not installed."""
    monkeypatch.setitem(sys.modules, "apex", None)
    shapes, numbers = tmp_path / "shapes", tmp_path / "new" / "numbers.json"
    shapes.write_text("64x96\n96\n")
    given = ["--device", "cpu", "--shapes", shapes, "--against", "apex,sgd,adamw", "--repeat", 1, "--json", numbers]
    assert run(monkeypatch, *given) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
    measured = ["ms", "bytes/param", "GB/s", "state MB"]
    beside = ["state x SGD fused, momentum", "share of bandwidth", "x axpy", "x SGD fused, momentum"]
    assert columns == ["", *measured, *beside]  # the ratios last
    assert len(lines) == 2 + 1 + 2 + len(bench_cases.AMOS)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "left out: apex FusedAdam: not installed" in shown

    found = json.loads(numbers.read_text())
    assert found["shapes"] == [[64, 96], [96]] and found["parameters"] == 64 * 96 + 96
    assert found["repeat"] == found["copies"] == 1 and found["first_peer"] == "SGD fused, momentum"
    assert set(found["left_out"]) == {"apex FusedAdam"}
    machine = found["machine"]
    assert machine["torch"] == torch.__version__ and found["threads"] == 1
    assert machine["cpu"] and machine["gpu"] is None and machine["build"]["cpu_instruction_set"]
    yardstick, rows = found["yardstick"], {row["name"]: row for row in found["rows"]}
    assert set(rows) == {"SGD fused, momentum", "AdamW fused", *(variant.name for variant in bench_cases.AMOS)}
    assert rows["SGD fused, momentum"]["ratios"]["x SGD fused, momentum"] == 1
    for row in (yardstick, *rows.values()):
        assert len(row["samples"]) == len(row["host_samples"]) == 1
        assert row["seconds"] == row["samples"][0] > 0
        assert row["bytes_per_second"] == pytest.approx(row["traffic"] * row["parameters"] / row["seconds"])
        assert row["ratios"]["x axpy"] == pytest.approx(row["seconds"] / yardstick["seconds"])
        expected = row["bytes_per_second"] / yardstick["bytes_per_second"]
        assert row["ratios"]["share of bandwidth"] == pytest.approx(expected)


def test_state_and_traffic() -> None:
    """The bytes that docs/performance.md tells, and the state that is really held."""
    traffic = [variant.traffic for variant in bench_cases.AMOS]
    assert traffic == [12, 16, 16, 16, 16, 16, 16, 20, 24, 16, 20, 14, 18, 12]
    for variant in bench_cases.AMOS:
        (params,) = bench._make_copies([(64, 256)], variant.dtype, 1, torch.device("cpu"))
        optimizer = variant.make(params)
        optimizer.step()
        assert variant.memory <= bench.state_bytes(optimizer) / 64 / 256 < variant.memory + 0.2, variant.name


def test_muon_is_held_against_its_own_part() -> None:
    """Muon takes matrices only: its ratios are those of as many parameters."""
    result = bench.run("", [(32, 32), (1024,)], bench_cases.peers_named("sgd,muon"), torch.device("cpu"), 1)
    muon = next(row for row in result.rows if row.name.startswith("Muon"))
    assert muon.parameters == 1024 and result.parameters == 2048
    held = bench_report.ratios(result, muon)
    assert held["x axpy"] == pytest.approx(2 * muon.seconds / result.yardstick.seconds)
    assert held["state x SGD fused, momentum"] == pytest.approx(1, rel=0.01)
    nothing = bench.run("", [(4,)], bench_cases.peers_named("muon"), torch.device("cpu"), 1)
    assert nothing.first_peer is None and "no matrix" in nothing.left_out["Muon, 2-D only"]
    assert list(bench_report.ratios(nothing, nothing.yardstick)) == ["share of bandwidth", "x axpy"]


def test_a_variant_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, the others are measured, and the command says that it is not content."""

    def broken(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        raise RuntimeError("no kernel image\nand more lines")

    row, *_ = bench_cases.AMOS
    failing = (bench_cases.Variant("Amos broken", broken, 12), row)
    monkeypatch.setattr(bench, "AMOS", failing)
    monkeypatch.setattr(bench_cases, "AMOS", failing)
    monkeypatch.setattr(bench_cases, "tiny_shapes", lambda: [(3, 4)])
    assert run(monkeypatch, "--shapes", "tiny", "--repeat", 1, "--device", "cpu", "--against", "") == 1
    shown = capsys.readouterr().out
    assert "left out: Amos broken: RuntimeError: no kernel image\n" in shown and "| Amos row " in shown


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    device = torch.device("cpu")
    result = bench.run("small", [(16, 16)], bench_cases.peers_named("adamw"), device, 1)
    bench_report.plot(result, bench_report.facts(device), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("shapes", "copies"),
    [
        (bench_cases.gpt2_shapes(), 1),  # 1 GB does not fit into any cache
        ([(1000, 5000)], 6),  # 40 MB, 6 of which are 240
        ([(10,)], bench.MAX_COPIES),
        (bench_cases.tiny_shapes(), bench.MAX_TENSORS // 2000),
        ([(1,)] * 2 * bench.MAX_TENSORS, 1),
    ],
)
def test_copies_outgrow_the_cache(
    shapes: list[bench_cases.Shape], copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_cache_bytes", lambda device: 240_000_000)
    assert bench._copies(shapes, numel(shapes), torch.device("cuda")) == copies
    monkeypatch.undo()
    assert bench._copies(shapes, numel(shapes), torch.device("cpu")) == 1


def test_events_are_what_counts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.cuda replaced: the time between the events, for each of the steps in between."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "wait"  # the end has been reached
            return 30.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    row = bench.Row("fake", 1000, 12)
    contestant = bench.Contestant(row, [lambda: log.append("a"), lambda: log.append("b")], share=0.5)
    contestant.prepare(torch.device("cuda"))
    assert contestant.loops == 1  # 15 ms each: one step is long enough
    contestant.loops, log[:] = 3, []
    contestant.sample(torch.device("cuda"))
    assert "".join(log) == "waiteventabaeventwait"  # the copies take turns
    assert row.seconds == pytest.approx(0.5 * 0.030 / 3) and row.host_seconds < 0.01
