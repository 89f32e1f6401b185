"""python -m amos_dist plan: its arithmetic against brute force, its models, its errors, what it prints and writes."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from amos_dist import models
from amos_dist.__main__ import main
from amos_dist.models import PRESETS, Parameter, parameters_of
from amos_dist.reference import MOMENTS
from amos_dist.runs import scale_count
from amos_dist.scaling import links
from amos_dist.scaling.forecast import Model, Setting, forecast, forecast_of_rank
from amos_dist.scaling.layout import Flat, Spread, entries_of_all, runs_of_all
from amos_dist.scaling.report import sized, timed
from amos_dist.state import state_sizes

EXAMPLES = hypothesis_settings(max_examples=200, deadline=None, derandomize=True, database=None)

# ---- arithmetic ------------------------------------------------------------------------------------------------------


@st.composite
def spreads(draw: st.DrawFn) -> Spread:
    rows, cols, share = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 40))
    first = draw(st.integers(1, share))
    kind, owner = draw(st.sampled_from(("row", "column", "factored"))), draw(st.integers(0, 3))
    spread = Spread(rows, cols, kind, owner, first, share)
    return spread._replace(everybody=draw(st.sampled_from((0, spread.holders.stop, spread.holders.stop + 2))))


@EXAMPLES
@given(spreads())
def test_what_borders_cut(spread: Spread) -> None:
    """By walking along the borders."""
    borders, cut = list(spread.borders), spread.cut(7)
    assert spread.borders_inside_rows == sum(border % spread.cols > 0 for border in borders)
    assert spread.cut_rows == len({border // spread.cols for border in borders if border % spread.cols})
    assert (cut is None) == (not borders) and (cut is None or cut.holders == spread.holders)


@EXAMPLES
@given(spreads())
def test_every_element_has_one_holder(spread: Spread) -> None:
    held = [spread.held(rank) for rank in range(spread.holders.stop + 2)]
    elements = [element for start, length in held for element in range(start, start + length)]
    assert elements == list(range(spread.numel))
    assert [rank for rank, (_, length) in enumerate(held) if length] == list(spread.holders)
    assert [start for start, length in held if length][1:] == list(spread.borders)


def owners(shapes: list[tuple[int, int]], zero: int, ranks: int) -> list[list[int]]:
    """For each element of each parameter the rank that has it, written anew."""
    if zero == 3:
        shares = [math.ceil(r * c / ranks) for r, c in shapes]
        return [[k // n for k in range(r * c)] for (r, c), n in zip(shapes, shares, strict=True)]
    part = math.ceil(sum(r * c for r, c in shapes) / (2 * ranks)) * 2
    begins = itertools.accumulate((r * c for r, c in shapes), initial=0)
    return [[(begin + k) // part for k in range(r * c)] for (r, c), begin in zip(shapes, begins, strict=False)]


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from((1, 2, 3)),
    st.integers(1, 9),
    st.sampled_from(("factored", "row", "column", "full", "scalar")),
    st.sampled_from((0, 3, 10**9)),
)
def test_against_brute_force(shapes: list[tuple[int, int]], zero: int, ranks: int, kind: str, most: int) -> None:
    """State of each rank, what travels, and between whom, counted element by element."""
    model = Model([[Parameter(str(i), shape) for i, shape in enumerate(shapes)]], kind)
    setting = Setting(zero, ranks, sub_group_size=most)
    state, shared, whole = [0] * ranks, [0] * ranks, forecast(model, setting)
    rows_cut = columns_cut = means = rows_of_all = scattered = 0
    sent = [0] * ranks  # to those that hold a part of the same
    planes = 2 if kind == "column" else 1  # what comes back of a column in a share
    for (rows, cols), mine in zip(shapes, owners(shapes, zero, ranks), strict=True):
        rows, cols = {"full": (rows * cols, 1), "scalar": (1, rows * cols)}.get(kind, (rows, cols))
        by_row = [set(mine[row * cols : (row + 1) * cols]) for row in range(rows)] if kind != "column" else []
        holders = sorted(set(mine))
        by_column = [set(mine)] * cols if kind in ("factored", "column") else []
        rows_cut += sum(len(some) > 1 for some in by_row)
        columns_cut += sum(len(some) > 1 for some in by_column)
        # By all, where a row may be on more than 8 ranks: the elements that a rank has bound it.
        length = min((mine.count(rank) for rank in holders[1:-1]), default=mine.count(holders[0]))
        many = 1 + min(len(holders) - 1, math.ceil(cols / length)) > 8
        for some in by_row:
            rows_of_all += many and len(some) > 1
            for rank in some:
                shared[rank] += len(some) > 1
                sent[rank] += 0 if many else len(some) - 1
        if by_column and len(holders) > 1:
            keepers = range(ranks) if zero == 3 else holders
            each = math.ceil(cols / len(keepers))
            by_column = [{keepers[column // each]} for column in range(cols)]
            if zero == 3:
                scattered += ranks * each
                means += 2 if by_row else 0
            else:
                for rank in holders:
                    kept = sum(some == {rank} for some in by_column)
                    sent[rank] += cols - kept + (2 * (len(holders) - 1) if by_row else 0)
                    sent[rank] += planes * kept * (len(holders) - 1)
        # A moment and a decay for each row, or for each column where there are no rows.
        for some, numbers in ((by_row, 2), (by_column, 1 if by_row else 2)):
            for rank in itertools.chain(*some):
                state[rank] += numbers
    flats = model.partitions(setting)
    for rank in range(ranks):
        found = forecast_of_rank(model, setting, rank)
        assert found.state_bytes == 4 * state[rank] + 4 * len(flats)
        assert found.shared_rows == shared[rank]
        assert sum(found.sizes("all_reduce")) == 4 * (rows_of_all + means)
        assert (sum(found.sizes("scatter")), sum(found.sizes("gather"))) == (4 * scattered, 4 * planes * scattered)
        assert sum(found.sizes("holders")) == 4 * sent[rank]
        by_all = (ranks - 1) / ranks * 4 * (2 * (rows_of_all + means) + (1 + planes) * scattered)
        assert found.sent(ranks) == pytest.approx(by_all + 4 * sent[rank])
    assert whole.most.state_bytes == 4 * max(state) + 4 * len(flats)
    assert whole.state_of_all == 4 * sum(state) + 4 * len(flats) * ranks
    assert (whole.cut_rows, whole.cut_columns) == (rows_cut, columns_cut)
    added = rows_cut + (columns_cut if zero < 3 else 0)
    by_everybody = (ranks - 1) / ranks * 4 * (2 * (added + rows_of_all + means) + (1 + planes) * scattered)
    assert whole.sent_by_everybody == pytest.approx(by_everybody)
    entries = entries_of_all(flats, ranks)
    for rank in range(ranks):
        pieces = [piece for flat in flats for piece in flat.pieces(rank)]
        for flat in flats:  # stage 3 keeps everybody's share free; before, nothing is between the pieces
            mine = flat.pieces(rank)
            shares = list(itertools.accumulate((spread.share for spread in flat.spreads), initial=0))
            closed = list(itertools.accumulate((piece.length for piece in mine), initial=0))[:-1]
            wanted = [shares[piece.key - flat.keys.start] for piece in mine] if zero == 3 else closed
            assert [piece.offset for piece in mine] == wanted
        assert {key: int(count[rank]) for key, count in entries.items()} == state_sizes(pieces, model.kinds)


def test_sub_groups() -> None:
    """As DeepSpeed makes them: a sub-group ends with the parameter that fills it; each group begins one."""
    shapes = [(4, 5), (4, 1), (4, 9), (4, 2), (4, 2)]
    named = [Parameter(str(i), shape) for i, shape in enumerate(shapes)]

    def sizes(groups: list[list[Parameter]], most: int) -> list[tuple[range, int]]:
        flats: list[Flat] = Model(groups, "row").partitions(Setting(3, 4, sub_group_size=most))
        return [(flat.keys, flat.numel) for flat in flats]

    assert sizes([named], 19) == [(range(5), 19)]
    assert sizes([named], 6) == [(range(2), 6), (range(2, 3), 9), (range(3, 5), 4)]
    assert sizes([named], 7) == [(range(3), 15), (range(3, 5), 4)]
    assert sizes([named[:1], [], named[1:]], 10**9) == [(range(1), 5), (range(1, 5), 14)]


def test_momentum_and_adam() -> None:
    """Of the padding too: 15 numbers on 4 ranks are 4 each."""
    model = Model([[Parameter("a", (3, 5))]], "row")
    found = forecast(model, Setting(2, 4, torch.bfloat16, torch.float32))
    assert found.most.state["momentum"] == 2 * 4
    assert found.most.state["step"] == 4
    assert found.adam == 2 * 4 * 4 + 4
    assert found.gradients == 15 * 4 and found.sent_of_gradients == 15 * 3


def test_scales_of_momentum_in_8_bits() -> None:
    """Of every rank as its pieces have them: with ends of rows, whole rows and beginnings of rows."""
    shapes = [(3, 700), (1, 5), (70, 33), (11, 300), (900,), (2, 3, 256), (513, 1)]
    model = Model([[Parameter(str(shape), shape) for shape in shapes]], "factored")
    for zero in (1, 2, 3):
        setting = Setting(zero, 7, torch.int8, sub_group_size=200)
        flats = model.partitions(setting)
        counted = [scale_count(piece for flat in flats for piece in flat.pieces(rank)) for rank in range(7)]
        assert runs_of_all(flats, 7).tolist() == counted
        each = [forecast_of_rank(model, setting, rank) for rank in range(7)]
        assert [one.state["momentum_scale"] for one in each] == [4 * count for count in counted]
        assert forecast(model, setting).state_of_all == sum(one.state_bytes for one in each)


# ---- links -----------------------------------------------------------------------------------------------------------


def test_links() -> None:
    nvlink, ib, plain = links.links_of("nvlink:8=450GB/s@4us, ib=400Gb/s@14us,x=1.5MB/s")
    assert nvlink == ("nvlink", 450e9, 4e-6, 8) and ib[1:] == (50e9, 14e-6, 0) and plain[1:] == (1.5e6, 0, 0)
    assert nvlink.joins(8) and not nvlink.joins(9) and ib.joins(10**6)
    for wrong in ("", "ib", "ib=50", "ib=0GB/s", "=5GB/s", "ib=5GB/s@3", "ib=5GB/s,,x=1GB/s"):
        with pytest.raises(ValueError, match=r"this is no link\. Write them like nvlink:8="):
            links.links_of(wrong)


def test_times() -> None:
    """By hand: 1 MB over 8 ranks at 1 GB/s; a ring has 14 steps of 1/8, a tree 6 of latency alone."""
    slow, quick = links.Link("slow", 1e9, 1e-3), links.Link("quick", 1e9, 0.0)
    assert links.all_reduce(10**6, 8, quick) == pytest.approx(14 / 8 * 1e-3)
    assert links.all_reduce(10**6, 8, slow) == pytest.approx(6e-3 + 2e-3)
    assert links.all_reduce(10**9, 8, slow) == pytest.approx(14e-3 + 14 / 8)
    assert links.half_ring(10**9, 8, slow) == pytest.approx(7e-3 + 7 / 8)
    assert links.all_reduce(10**6, 1, slow) == links.half_ring(10**6, 1, slow) == links.all_reduce(0, 8, slow) == 0
    assert links.to_few(10**6, slow) == pytest.approx(2e-3)
    assert links.sent_by_all_reduce(800, 8) == 2 * links.sent_by_half_ring(800, 8) == 1400


# ---- models ----------------------------------------------------------------------------------------------------------

# Published: model cards and papers say 8B, 70B, 405B, 124M, 1.5B, 110M (the encoder, with its pooler), 770M, 304M.
TOTALS = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_514_298,
    "t5-large": 737_668_096,
    "vit-l": 304_326_632,
}


def llama_config(layers: int, width: int, hidden: int, heads: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": hidden}
    return {"vocab_size": 128256, "num_attention_heads": heads, "num_key_value_heads": 8, **sizes}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": ("LlamaForCausalLM", llama_config(32, 4096, 14336, 32)),
    "llama3-70b": ("LlamaForCausalLM", llama_config(80, 8192, 28672, 64)),
    "llama3-405b": ("LlamaForCausalLM", llama_config(126, 16384, 53248, 128)),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-xl": ("GPT2LMHeadModel", {"n_layer": 48, "n_embd": 1600, "n_head": 25}),
    "bert-base": ("BertForMaskedLM", {}),
    "t5-large": (
        "T5ForConditionalGeneration",
        {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    ),
    "vit-l": (
        "ViTForImageClassification",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "num_labels": 1000,
        },
    ),
}


def test_totals() -> None:
    assert {name: models.total(parameters_of(name)) for name in PRESETS} == TOTALS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_real_models(name: str, tmp_path: Path) -> None:
    """Names, shapes and order of Hugging Face's own classes, built from a config file without their weights."""
    transformers = pytest.importorskip("transformers")
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind).config_class(**sizes, architectures=[kind])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert parameters_of(str(path)) == parameters_of(name)


def test_a_config_without_architectures(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    found = parameters_of(str(tmp_path / "config.json"))
    assert found[:2] == [Parameter("wte.weight", (50257, 768)), Parameter("wpe.weight", (1024, 768))]
    assert len(found) == 2 + 12 + 2


def test_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built without memory; frozen parameters, and those without elements, are in no partition."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Models:\n"
        "    def huge():\n"
        "        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.Linear(3, 2), nn.Embedding(0, 4))\n"
        "        model[1].bias.requires_grad_(False)\n"
        "        return model\n"
        "def wrong(): return 3\n"
        "def broken(): raise RuntimeError('no such file.\\nmore')\n"
        "def frozen(): return nn.Linear(2, 2).requires_grad_(False)\n"
        "def lazy(): return nn.LazyLinear(2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    huge = [Parameter("0.weight", (10**6, 10**6)), Parameter("0.bias", (10**6,)), Parameter("1.weight", (2, 3))]
    assert parameters_of("mine:Models.huge") == huge
    for name, words in {
        "wrong": r"returns a int\. It must return an nn\.Module\.",
        "broken": r"cannot be built: RuntimeError: no such file\. Give",
        "nothing": r"cannot be built: AttributeError: .*'nothing'\. Give",
        "frozen": r"has no parameter that is trained\. Give",
        "lazy": r"has a lazy module, whose shape is not known yet\. Give",
    }.items():
        with pytest.raises(ValueError, match=words):
            parameters_of(f"mine:{name}")
    with pytest.raises(ValueError, match=r"ModuleNotFoundError: No module named 'nowhere'\. Give"):
        parameters_of("nowhere:make")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1", r"is not JSON: .*\. Give"),
        ("[1]", r'has no "model_type"\. Give'),
        ('{"layers": 3}', r'has no "model_type"\. Give'),
        ('{"model_type": "nothing"}', r"cannot build the model of .*config\.json: .*\. Mend"),
        ('{"model_type": "gpt2", "n_embd": 5, "n_head": 2}', r"cannot build the model of .*config\.json: .*\. Mend"),
    ],
)
def test_bad_config(text: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        parameters_of(str(tmp_path / "config.json"))


def test_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no model 'llama9' is known\. Give llama3-8b, .*, a config\.json, or"):
        parameters_of("llama9")
    with pytest.raises(ValueError, match=r"nothing\.json cannot be read: No such file or directory\. Give"):
        parameters_of(str(tmp_path / "nothing.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs transformers, which is not installed\. pip install transformers\."):
        parameters_of(str(tmp_path / "config.json"))


# ---- the command -----------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["amos_dist", "plan", *map(str, arguments)])
    return main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, picture = tmp_path / "new" / "numbers.json", tmp_path / "plot.png"
    given = ["--model", "gpt2", "--ranks", "8,2", "--zero", "1,3", "--moments", "factored,row", "--rank", 1]
    given += ["--bandwidth", "near:4=1GB/s@1us,far=1Gb/s", "--momentum", 0.9, "--momentum-dtype", "bfloat16"]
    given += ["--json", numbers, *(["--plot", picture] if _has_matplotlib() else [])]
    assert run(monkeypatch, *given) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("gpt2: 124.4 M parameters in 148 tensors\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:1] == "|"]
    states, traffic = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert states[0] == [
        *("ranks", "ZeRO", "moments", "rows", "columns", "decay", "momentum", "state", "Adam's", "x Adam's"),
        "workspace",
    ]
    wanted = [[str(n), str(z), kind] for z in (1, 3) for kind in ("factored", "row") for n in (2, 8)]
    assert [line[:3] for line in states[2:]] == [line[:3] for line in traffic[2:]] == wanted
    assert traffic[0][-4:] == ["near", "near, gradients", "far", "far, gradients"]
    assert [line[-4] == "" for line in traffic[2:]] == [False, True] * 4  # 4 ranks at most
    assert shown.count("\nrank 1 of ") == 8

    found = json.loads(numbers.read_text())
    assert found["links"][1] == {"name": "far", "bandwidth": 1e9 / 8, "latency": 0.0, "most": 0}
    model = Model([parameters_of("gpt2")], "row")
    one, plan = found["plans"][-1], forecast(model, Setting(3, 8, torch.bfloat16))
    assert (one["ranks"], one["zero"], one["moments"], one["momentum"]) == (8, 3, "row", "bfloat16")
    assert one["most"]["state"] == plan.most.state and one["most"]["state_bytes"] == plan.most.state_bytes
    assert one["most"]["collectives"] == [[list(each) for each in some] for some in plan.most.collectives]
    assert one["cut_rows"] == plan.cut_rows
    assert one["rank"]["state"] == forecast_of_rank(model, Setting(3, 8, torch.bfloat16), 1).state
    assert set(one["seconds"]) == {"far"}
    ((kind, few),) = one["most"]["collectives"][0]
    assert kind == "holders" and one["seconds"]["far"]["holders"] == pytest.approx(few / (1e9 / 8))
    assert one["seconds"]["far"]["all_reduces"] == one["seconds"]["far"]["exchanges"] == 0
    factored = next(
        each for each in found["plans"] if (each["zero"], each["moments"], each["ranks"]) == (3, "factored", 8)
    )
    sizes = dict(factored["most"]["collectives"][0])
    matrices = [shape for _, shape in parameters_of("gpt2") if len(shape) > 1]
    assert sizes["scatter"] == sizes["gather"] == sum(4 * math.prod(shape[1:]) for shape in matrices)
    assert sizes["all_reduce"] == 4 * 2 * len(matrices)
    assert factored["seconds"]["far"]["exchanges"] == pytest.approx(7 / 8 * 2 * sizes["scatter"] / (1e9 / 8))
    assert factored["seconds"]["far"]["all_reduces"] == pytest.approx(14 / 8 * sizes["all_reduce"] / (1e9 / 8))
    assert one["seconds"]["far"]["gradients"] == pytest.approx(7 / 8 * 2 * 124_439_808 / (1e9 / 8))
    assert not _has_matplotlib() or picture.read_bytes()[:4] == b"\x89PNG"


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_nothing_travels_on_one_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--model", "bert-base", "--ranks", 1, "--zero", 3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    headings = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[4])]
    assert "workspace" not in headings[0] and "momentum" not in headings[0]  # what nothing has, has no column
    assert headings[1][:5] == ["ranks", "ZeRO", "moments", "collectives", "cut rows"]
    assert [[cell.strip() for cell in line.split("|")[4:6]] for line in lines[6:]] == [["0", "0"]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "8,x"], "--ranks 8,x: 'x' is no number from 1 to 1048576. Write"),
        (["--ranks", "0"], "--ranks 0: '0'"),
        (["--ranks", "9999999"], "from 1 to 1048576"),
        (["--zero", "0"], "--zero 0: '0' is no number from 1 to 3. Write"),
        (["--moments", "row,rows"], "moments='rows' is unknown. Use"),
        (["--momentum", "1.5"], "momentum=1.5 is out of range. It"),
        (["--momentum", "0.9", "--momentum-dtype", "int4"], "momentum_dtype='int4' is not supported. Use"),
        (["--dtype", "int8"], "--dtype int8: no such dtype. Give"),
        (["--sub-group-size", "-1"], "--sub-group-size -1: it cannot be negative. Give"),
        (["--rank", "8"], "--rank 8: not among 8 ranks. Give 0 to 7."),
        (["--bandwidth", "fast"], "--bandwidth fast: this is no link. Write"),
        (["--model", "llama9"], "no model 'llama9' is known. Give"),
        (["--plot", "plan.gif"], "--plot plan.gif: what kind of picture is that? Give"),
        (["--json", "/"], "--json /: no file can be written there. Give"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", "gpt2", *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert not shown.out


def test_the_page_shows_what_the_commands_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    shown = re.findall(r"```sh\npython -m amos_dist plan ([^\n]*)\n```\n\n(\|[^`]*\|)\n\n", page)
    assert len(shown) == 4 and page.count("\n|--") == 2 * len(shown) + 2  # two are measured
    for command, tables in shown:
        assert run(monkeypatch, *command.split()) == 0
        assert f"\n\n{tables}\n\nstate: " in capsys.readouterr().out


def test_stages_1_and_2_are_laid_out_alike() -> None:
    one, two = (Model([parameters_of("gpt2")], "factored").partitions(Setting(zero, 7)) for zero in (1, 2))
    assert one == two


def test_every_kind_of_moments() -> None:
    named = parameters_of("vit-l")
    totals = {kind: forecast(Model([named], kind), Setting(3, 8)).most.state_bytes for kind in MOMENTS}
    assert totals["scalar"] < totals["row"] < totals["factored"] < totals["full"]
    assert totals["full"] == pytest.approx(forecast(Model([named], "full"), Setting(3, 8)).adam, rel=1e-6)


def test_words() -> None:
    assert [sized(n) for n in (0, 999, 1000, 76_513_280, 4.06e11, 3e15)] == [
        *("0 B", "999 B", "1 KB", "76.5 MB", "406 GB"),
        "3e+03 TB",
    ]
    assert [timed(s) for s in (0, 2e-5, 3.31e-3, 16.2)] == ["0", "20 us", "3.31 ms", "16.2 s"]


def test_one_rank_of_4096_of_the_largest_model() -> None:
    """Aimed at: under a second and 200 MB. The rank is in the middle, and 4,095 ranks cut far more rows."""
    script = """
import resource, time
from amos_dist.models import parameters_of
from amos_dist.scaling.forecast import Model, Setting, forecast, forecast_of_rank
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
model = Model([parameters_of("llama3-405b")], "factored")
one = [forecast_of_rank(model, Setting(zero, ranks), 2000) for zero in (2, 3) for ranks in (4096, 4095)]
alone = time.process_time() - begin
for zero in (2, 3):
    for ranks in (4096, 4095):
        forecast(model, Setting(zero, ranks))
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(alone, time.process_time() - begin, kilobytes * 1024, one[-1].state_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    alone, every, grown, state = map(float, done.stdout.split())
    assert alone < 5 and every < 20, (alone, every)
    assert grown < 200e6
    # A share of 16,384 or 53,248 columns is 5 or 14 of them on 4,095 ranks. The rest: moments and decay of rows.
    assert 4 * 126 * (6 * 5 + 14) < state < 100e3
