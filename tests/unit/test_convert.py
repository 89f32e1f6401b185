"""convert without ranks: kinds, forms of an optimizer's section, refusals, and files that are whole or absent."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from amos_dist import Amos
from amos_dist.__main__ import main
from amos_dist.convert import canonical, convert, files, numbered, zero

Tree = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)  # buffers, one of them int64
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(4, 7, bias=False)
        self.to(dtype)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.frozen(self.norm(self.embed(x)))).float(), x)


def groups(model: nn.Module) -> list[Tree]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "beta": 0.9},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "momentum": 0.9},
    ]


def trained(dtype: torch.dtype = torch.float32, **keywords: Any) -> tuple[Model, Amos]:
    model = Model(dtype)
    optimizer = Amos(groups(model), lr=0.02, rules=[{"match": "norm", "sigma": 0.3}], **keywords)
    for _ in range(3):
        model(torch.arange(7)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saved(model: nn.Module, optimizer: Amos, **options: bool) -> Tree:
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
    return {"model": get_model_state_dict(model), "optimizer": state}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a plain file and a dcp folder of the same."""
    tree = saved(*trained())
    torch.save(tree, tmp_path / "a.pt")
    dcp.save(tree, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path


def load(path: Path) -> Tree:
    tree: Tree = torch.load(path, weights_only=True)
    return tree


def same(a: Any, b: Any, path: str = "") -> None:
    """To the bit, with its dtypes."""
    assert type(a) is type(b) or {type(a), type(b)} <= {dict, type(nn.Module().state_dict())}, path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert set(a) == set(b), f"{path}: {set(a) ^ set(b)}"
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{number}")
    else:
        assert a == b, path


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_every_kind_gives_back_what_it_was_made_from(tmp_path: Path, flatten: bool, low: bool) -> None:
    keywords: Tree = {"master_weights": True, "momentum_dtype": "bfloat16"} if low else {}
    model, optimizer = trained(torch.bfloat16 if low else torch.float32, **keywords)
    tree = saved(model, optimizer)
    torch.save({**saved(model, optimizer, flatten_optimizer_state_dict=flatten), "epoch": 3}, tmp_path / "0.pt")
    convert(tmp_path / "0.pt", tmp_path / "dcp", "dcp", flatten=flatten)
    convert(tmp_path / "dcp", tmp_path / "1.pt", "plain", flatten=flatten)
    convert(tmp_path / "1.pt", tmp_path / "2.pt", "plain")
    same(load(tmp_path / "2.pt"), {**tree, "epoch": 3})

    again, other = trained(torch.bfloat16 if low else torch.float32, **keywords)
    wanted = saved(again, other, flatten_optimizer_state_dict=flatten)
    dcp.load(wanted, checkpoint_id=tmp_path / "dcp", no_dist=True)
    same(wanted, saved(model, optimizer, flatten_optimizer_state_dict=flatten))


@pytest.mark.parametrize("way", ["by name", "numbered"])
def test_a_plain_file_loads_into_an_optimizer(folder: Path, way: str) -> None:
    convert(folder / "dcp", folder / "b.pt", "plain")
    model, optimizer = trained()
    fresh = Model()
    other = Amos(groups(fresh), lr=0.5, rules=[{"match": "norm", "sigma": 0.3}])
    tree = load(folder / "b.pt")
    fresh.load_state_dict(tree["model"])
    if way == "by name":
        set_optimizer_state_dict(fresh, other, tree["optimizer"])
    else:
        other.load_state_dict(numbered(tree["optimizer"]))
    for each, its in ((model, optimizer), (fresh, other)):
        each(torch.arange(7)).backward()
        its.step()
    same(fresh.state_dict(), model.state_dict())
    same(other.state_dict(), optimizer.state_dict())


def test_a_universal_checkpoint_gives_back_what_it_was_made_from(folder: Path) -> None:
    tree = load(folder / "a.pt")
    convert(folder / "a.pt", folder / "zero", "zero")
    convert(folder / "zero", folder / "b.pt", "plain")
    got = load(folder / "b.pt")
    assert got.pop("deepspeed")["global_steps"] == 3
    first, second = tree["optimizer"]["param_groups"]
    place = first["params"].index("frozen.weight")  # DeepSpeed's optimizers have no frozen parameters
    for key in ("params", "param_names", "measured_sigma"):
        del first[key][place]
    assert len(first["params"]) == 2 and len(second["params"]) == 4
    same(got, tree)


def test_a_bfloat16_model_keeps_its_float32_numbers(folder: Path) -> None:
    convert(folder / "a.pt", folder / "low.pt", "plain", dtype="bfloat16")
    convert(folder / "low.pt", folder / "high.pt", "plain", dtype="float32")
    tree, low, high = (load(folder / f"{name}.pt") for name in ("a", "low", "high"))
    assert {v.dtype for k, v in low["model"].items() if "num_batches" not in k} == {torch.bfloat16}
    assert low["optimizer"]["param_groups"][0]["master_weights"] is True
    for name in ("embed.weight", "norm.weight", "unused.bias"):
        same(high["model"][name], tree["model"][name])
    same(high["optimizer"]["state"], tree["optimizer"]["state"])
    convert(folder / "low.pt", folder / "zero", "zero")
    convert(folder / "zero", folder / "back.pt", "plain")
    for got in (high, load(folder / "back.pt")):
        for name in ("embed.weight", "head.weight"):  # the same parameter
            same(got["model"][name], tree["model"][name])


# ---- finding things --------------------------------------------------------------------------------------------------


def test_kinds(folder: Path) -> None:
    for name in ("tag/mp_rank_00_model_states.pt", "root/step4/zero_pp_rank_0_mp_rank_00_model_states.pt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    (folder / "named").mkdir()
    (folder / "named/latest").write_text("step4")
    kinds = {name: files.kind_of(folder / name) for name in ("a.pt", "dcp", "tag", "root", "named", "root/step4")}
    zeros = dict.fromkeys(("tag", "root", "named", "root/step4"), "zero")
    assert kinds == {"a.pt": "plain", "dcp": "dcp", **zeros}


def test_sections_are_found_wherever_they_are() -> None:
    tree = saved(*trained())
    model, optimizer = tree["model"], tree["optimizer"]
    forms: dict[str, Tree] = {
        "as the tutorial": {"app": {"model": model, "optim": optimizer, "epoch": 3}, "rng": torch.ones(3)},
        "model at the root": {**model, "optimizer": optimizer, "app": {"epoch": 3}},
        "an average beside it": {"ema": dict(model), "model": model, "o": optimizer, "app": {"epoch": 3}},
        "flattened": {"m": model, "o": canonical.flattened(optimizer), "app": {"epoch": 3}},
    }
    for name, form in forms.items():
        got = canonical.sections(form, "x", None, None)
        same(got.model, model, name)
        same(got.optimizer, optimizer, name)
        assert got.others["app"] == {"epoch": 3} and set(got.others) <= {"app", "rng", "ema"}
    bare = canonical.sections(dict(model), "x", None, None)
    assert (bare.optimizer, bare.others) == (None, {}) and bare.model == model
    chosen = canonical.sections(forms["an average beside it"], "x", "ema", None)
    assert set(chosen.others) == {"model", "app"}


def test_parameters_numbered_by_torch_get_their_names() -> None:
    model, optimizer = trained()
    same(canonical.named(optimizer.state_dict(), "x"), saved(model, optimizer)["optimizer"])


# ---- what is refused -------------------------------------------------------------------------------------------------


def written(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def refusals(folder: Path) -> dict[str, tuple[Any, Tree]]:
    """What the message says: the source, and keywords of convert."""
    tree = load(folder / "a.pt")
    model, optimizer = tree["model"], tree["optimizer"]
    unnamed = Amos(Model().parameters(), lr=0.1)
    unnamed.load_state_dict(unnamed.state_dict())
    adam = torch.optim.AdamW(Model().parameters(), lr=0.1)
    for name in ("empty", "cut", "odd"):
        (folder / name).mkdir()
    (folder / "odd/latest").write_text("four")
    (folder / "odd/five").mkdir()
    (folder / "odd/five/mp_rank_00_model_states.pt").touch()
    (folder / "cut/.metadata").write_bytes((folder / "dcp/.metadata").read_bytes())
    (folder / "cut/__0_0.distcp").write_bytes((folder / "dcp/__0_0.distcp").read_bytes()[:999])
    (folder / "cut.pt").write_bytes((folder / "a.pt").read_bytes()[:999])
    fitting = {**optimizer, "state": {name: {"step": 1, "exp_avg": 0} for name in optimizer["state"]}}
    flat = canonical.flattened(optimizer) | {"param_groups.embed.weight.measured_sigma": [0.1, 0.2]}
    flat = {key: value for key, value in flat.items() if not key.endswith("param_names")}
    return {
        "there is nothing": ("nowhere", {}),
        "is no checkpoint: it has no .metadata": ("empty", {}),
        "dcp is no ZeRO checkpoint, and has no tags": ("dcp", {"tag": "four"}),
        "says 'four', but there is none. Give one of five": ("odd", {}),
        "--tag six: .*has no such checkpoint. It has five": ("odd", {"tag": "six"}),
        "saved without ZeRO, at stage 0": ("odd", {"tag": "five"}),
        "cut cannot be read": ("cut", {}),
        "cut.pt cannot be read": ("cut.pt", {}),
        "it holds print": (written(folder / "code.pt", print), {}),
        "holds a list": (written(folder / "list.pt", [1]), {}),
        "has no model: it has optimizer": (written(folder / "none.pt", {"optimizer": optimizer}), {}),
        "more than one section that could be the model: it has a, b": (
            written(folder / "two.pt", {"a": dict(model), "b": dict(model), "optimizer": optimizer}),
            {},
        ),
        "more than one optimizer: a, b.c": (written(folder / "more.pt", {"a": optimizer, "b": {"c": optimizer}}), {}),
        "'embed.weight' is missing": (
            written(folder / "part.pt", {"model": {"x": torch.ones(1)}, "optimizer": optimizer}),
            {},
        ),
        "no model in .*half.pt has all .*: 'embed.weight' is missing": (
            written(folder / "half.pt", {"ema": {"x": torch.ones(1)}, **tree}),
            {"model_key": "ema"},
        ),
        "--model-key app.model: .*a.pt has none there. Give one of model, optimizer": (
            "a.pt",
            {"model_key": "app.model"},
        ),
        "numbers its parameters and does not name them": (
            written(folder / "numbers.pt", {"model": model, "optimizer": adam.state_dict()}),
            {},
        ),
        "the order of its parameters, which sigma='auto' needs": (
            written(folder / "flat.pt", {"model": model, "optimizer": flat}),
            {},
        ),
        "something else at 'model'": (
            written(folder / "ema.pt", {"model": dict(model), "ema": model, "optimizer": optimizer}),
            {"model_key": "ema"},
        ),
        "has no optimizer, without which": (written(folder / "bare.pt", dict(model)), {"to": "zero"}),
        "'embed.weight' is not of Amos": (
            written(folder / "adam.pt", {"model": model, "optimizer": fitting}),
            {"to": "zero"},
        ),
        "is no complete checkpoint .KeyError: 'params'": (
            written(folder / "groups.pt", {"model": model, "optimizer": {"state": {}, "param_groups": [{}]}}),
            {},
        ),
        "--to onnx": ("a.pt", {"to": "onnx"}),
        "--dtype int8": ("a.pt", {"dtype": "int8"}),
        "--workers 0": ("a.pt", {"workers": 0}),
        "--write-as a,a": ("a.pt", {"write_as": ("a", "a")}),
    }


def test_refusals_say_what_and_what_to_do_and_leave_everything(folder: Path) -> None:
    table = refusals(folder)
    target = folder / "target"
    torch.save("mine", target)
    before, mine = sorted(folder.rglob("*")), target.read_bytes()
    for expected, (source, keywords) in table.items():
        with pytest.raises(ValueError, match=expected) as caught:
            convert(folder / source, target, **{"to": "dcp", "force": True, **keywords})
        text = str(caught.value)
        assert text.endswith(".") and ". " in text, text
        assert (target.read_bytes(), sorted(folder.rglob("*"))) == (mine, before), expected


def test_destinations_that_are_refused(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine/thesis").touch()
    (folder / "dcp/part").mkdir()
    (folder / "notes.md").write_text("mine")
    for destination, force, expected in [
        ("b/c.pt", False, "is no folder that can be written to"),
        ("a.pt", False, "is there already"),
        ("dcp", True, "holds the source"),
        ("", True, "holds the source"),
        ("dcp/part", True, "is a part of the source"),
        ("mine", True, "is a folder of other things"),
        ("notes.md", True, "is another file"),
    ]:
        with pytest.raises(ValueError, match=expected):
            convert(folder / "dcp", folder / destination, "plain", force=force)
    assert (folder / "mine/thesis").exists() and (folder / "dcp/.metadata").exists()


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "there"), list(itertools.product(("plain", "dcp", "zero"), (False, True))))
def test_an_error_in_the_middle_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, to: str, there: bool
) -> None:
    target = folder / "target"
    if there:
        convert(folder / "a.pt", target, "dcp")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    seen = []
    real = torch.save

    def fill_up(*args: Any, **kwargs: Any) -> None:
        seen.append(args)
        real(*args, **kwargs)
        if len(seen) == (1 if to == "plain" else 9):
            raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(ValueError, match=r"target cannot be written \(.*No space left on device"):
        convert(folder / "a.pt", target, to, force=True)
    assert len(seen) >= (1 if to == "plain" else 9)  # it had begun
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    convert(folder / "a.pt", target, to, force=True)
    assert files.kind_of(target) == to
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_what_was_there_comes_back_when_the_new_cannot_take_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(folder / "a.pt", folder / "target", "dcp")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ValueError, match=r"target cannot be written \(Input/output error\)"):
        convert(folder / "a.pt", folder / "target", "plain", force=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_cannot_be_in_a_plain_file_is_said(tmp_path: Path) -> None:
    dcp.save({**saved(*trained()), "path": tmp_path, "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (warning,) = convert(tmp_path / "dcp", tmp_path / "a.pt", "plain")
    assert "'path' of" in warning
    assert load(tmp_path / "a.pt")["epoch"] == 3


def test_state_of_another_optimizer_passes_between_torch_s_own(tmp_path: Path) -> None:
    model = Model()
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    tree = saved(model, adam)  # type: ignore[arg-type]
    torch.save(tree, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "dcp", "dcp")
    convert(tmp_path / "dcp", tmp_path / "b.pt", "plain")
    same(load(tmp_path / "b.pt"), tree)


def test_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["amos_dist", "convert", f"{folder}/dcp", f"{folder}/b.pt", "--to", "plain"])
    for code, expected in (
        (0, ""),
        (2, f"error: {folder}/b.pt is there already. Give another destination, or --force"),
    ):
        assert main() == code
        assert capsys.readouterr().err.startswith(expected) if code else capsys.readouterr().err == ""
    same(load(folder / "b.pt"), load(folder / "a.pt"))


def test_names_of_zero_3_s_sub_groups(tmp_path: Path) -> None:
    parts = [{"a": 0, "b": 0}, {"c": 0}, {"d": 0}]
    lengths = [{"measured_sigma": [None] * 3}, {"measured_sigma": [None]}]
    assert zero._names_by_group(parts, lengths, tmp_path) == [["a", "b", "c"], ["d"]]
    with pytest.raises(ValueError, match="some were frozen"):
        zero._names_by_group(parts, [{"measured_sigma": [None] * 4}, {"measured_sigma": [None]}], tmp_path)
