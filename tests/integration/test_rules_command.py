"""python -m amos_dist rules: presets, configurations of Hugging Face, factories, and what is wrong with them."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from amos_dist import __main__

transformers = pytest.importorskip("transformers")


def small() -> nn.Module:
    """A factory, as the command takes one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def reads_numbers() -> nn.Module:
    """One that the meta device cannot make."""
    model = small()
    assert float(model[0].weight.sum()) != 0
    return model


NO_MODEL = 3


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["amos_dist", "rules", *arguments])
    status = __main__.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("preset", ["gpt2", "bert-base", "llama", "t5", "vit"])
def test_presets(preset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of full size, without their numbers: a Llama of 6.7 billion takes no memory."""
    counts = {
        "gpt2": 124_439_808,
        "bert-base": 110_106_428,
        "llama": 6_738_415_616,
        "t5": 60_506_624,
        "vit": 85_800_194,
    }
    status, out, _ = run(capsys, monkeypatch, preset)
    assert status == 0 and f"with {counts[preset]:,} numbers" in out
    if preset == "gpt2":
        line = next(line for line in out.split("\n") if "c_proj.weight (12)" in line and "mlp" in line)
        expected = ["transformer.h.0-11.mlp.c_proj.weight", "(12)", "3072×768", "3072", "×", "768", "factored"]
        assert line.split()[:7] == expected
        assert f" {math.sqrt(2 / 3072):.4g} " in line and "√(2/fan_in), fan_in 3072" in line


@pytest.mark.parametrize("factory", ["small", "reads_numbers"])
def test_factory(factory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run(capsys, monkeypatch, f"{__name__}:{factory}", "--json", "--moments", "row")
    assert status == 0
    found = json.loads(out)
    assert found["sigma"] == "paper" and found["frozen"] == []
    assert found["parameters"][2] == {
        "name": "2.weight",
        "shape": [2, 4],
        "rows": 2,
        "columns": 4,
        "moments": "row",
        "sigma": math.sqrt(2 / 4),
        "state": 4,
        "reason": "kernel after ReLU: √(2/fan_in), fan_in 4",
    }


def test_auto_builds_the_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run(capsys, monkeypatch, f"{__name__}:small", "--sigma", "auto", "--json")
    assert status == 0
    rms = small()[0].weight.double().square().mean().sqrt().item()
    (weight, bias, _) = json.loads(out)["parameters"]
    assert weight["sigma"] == pytest.approx(rms, rel=1e-12) and bias["sigma"] == 0.5
    assert weight["reason"] == "root mean square of the entries at start"
    _, out, _ = run(capsys, monkeypatch, "llama", "--sigma", "auto")  # not that one: 27 GB
    assert "measured" in out and "root mean square of the entries at start" in out


def test_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the class that the file names, or without one the model under it."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for architectures, name in ((["BertForPreTraining"], "cls.seq_relationship.weight"), (None, "pooler.dense.weight")):
        path.write_text(json.dumps({**values, "architectures": architectures}))
        status, out, _ = run(capsys, monkeypatch, str(path), "--json")
        found = {each["name"]: each["sigma"] for each in json.loads(out)["parameters"]}
        assert status == 0 and found[name] == math.sqrt(1 / 12)
        assert any(name.startswith("bert.") for name in found) == (architectures is not None)


BAD = {
    "gpt5": "gpt5: there is no such model. Give gpt2",
    "nowhere.at_all:model": "it cannot be imported: No module named 'nowhere'. Give module:factory",
    f"{__name__}:nothing": "it cannot be imported: .*'nothing'. Give module:factory",
    f"{__name__}:NO_MODEL": "gives a int, no nn.Module. Give a class or function",
    f"{__name__}:run": "the model cannot be made: TypeError: .*capsys.* Mend it",
    "missing.json": "no configuration can be read there: .*No such file.* Give a model's config.json",
    "list.json": "it names no model_type. Give the config.json",
    "unknown.json": "takes no such configuration: .*nonesuch.* Mend it",
}


@pytest.mark.parametrize("model", BAD)
def test_errors(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("unknown.json").write_text('{"model_type": "nonesuch"}')
    status, out, err = run(capsys, monkeypatch, model)
    assert (status, out) == (2, "") and err.startswith(f"error: {model}")
    assert re.search(BAD[model], err), err
