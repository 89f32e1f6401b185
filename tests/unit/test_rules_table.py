"""The table of what each parameter gets: the same as the optimizer's own, and what is printed of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from amos_dist import Amos, optimizer, param_groups
from amos_dist.originals import Surroundings
from amos_dist.rules import advise, names
from amos_dist.rules.table import folded, shown, table

from .test_rules import Bare, Conv1D, root


def make_all() -> nn.Module:
    """A layer of each kind, two that are the same, a frozen one."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(3)]
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 6),
            "h": nn.ModuleList(layers),
            "conv": nn.Conv2d(3, 4, 5),
            "up": nn.ConvTranspose2d(4, 2, 3, bias=False),
            "c_attn": Conv1D(9, 6),
            "norm": nn.LayerNorm(6),
            "experts": Bare(gate_up_proj=(2, 5, 6)),
            "frozen": nn.Linear(2, 2),
        }
    )
    model["frozen"].requires_grad_(False)
    return model


EXPECTED = """
embed.weight         11×6     11 × 6  √(2/6)   embedding: √(2/width), width 6
h.0-2.0.weight (3)   6×6      6 × 6   √(1/6)   kernel: √(1/fan_in), fan_in 6
h.0-2.0,2.bias (6)   6        1 × 6   0.5      bias: 0.5
h.0-2.2.weight (3)   6×6      6 × 6   √(2/6)   kernel after GELU: √(2/fan_in), fan_in 6
conv.weight          4×3×5×5  4 × 75  √(8/75)  convolution on pixels (3 channel(s)): √(8/fan_in), fan_in 75
conv.bias            4        1 × 4   0.5      bias: 0.5
up.weight            4×2×3×3  8 × 9   √(1/36)  transposed convolution: √(1/fan_in), fan_in 36; ConvTranspose2d is (in, out, ...): rows are (in, out)
c_attn.weight        6×9      6 × 9   √(1/6)   query, key or value: √(1/fan_in), fan_in 6; weight of Conv1D (in, out): output is dim 1
c_attn.bias          9        1 × 9   0.5      bias: 0.5
norm.weight          6        1 × 6   1        scale of a normalization: 1
norm.bias            6        1 × 6   0.5      bias: 0.5
experts.gate_up_proj 2×5×6    10 × 6  √(1/6)   stacked kernels: √(1/fan_in), fan_in 6; (E, out, in): a row is an output of an expert
"""  # noqa: E501


def test_table_for_people() -> None:
    """What is printed, column by column: σ is worked out here from the formula that the test names."""
    head, *lines, blank, totals, left_out = shown(table(make_all()), ["frozen.weight", "frozen.bias"]).split("\n")
    assert head.split() == ["parameter", "shape", "R", "×", "C", "moments", "σ", "state", "why"]
    for line, expected in zip(lines, EXPECTED.strip().split("\n"), strict=True):
        name, shape, view, moments, sigma, state, why = re.split(r"\s{2,}", line)
        given = re.fullmatch(r"(.*?)\s+(\S+)\s+(\d+ × \d+)\s+(\S+)\s+(\D.*)", expected)
        assert given and (name, shape, view, why) == (given[1], given[2], given[3], given[5])
        formula = re.fullmatch(r"√\((\d)/(\d+)\)", given[4])
        number = math.sqrt(int(formula[1]) / int(formula[2])) if formula else float(given[4])
        assert sigma == f"{number:.4g}"
        rows, columns = map(int, view.split(" × "))
        assert moments == ("scalar" if "×" not in shape else "factored")
        assert int(state) == (2 if moments == "scalar" else 2 * rows + columns)
    numbers = 66 + 3 * (36 + 6 + 36 + 6) + 304 + 72 + 63 + 12 + 60
    # 2R + C of embed, 6 × 6 (6), conv, up, c_attn and experts; 2 for each of 6 + 1 + 1 + 2 of one dimension
    state = 28 + 6 * 18 + 83 + 25 + 21 + 26 + 2 * 10
    assert totals.startswith(f"parameters: 21, with {numbers} numbers; state without momentum: {state},")
    assert left_out == "frozen and left out: 2" and not blank


@pytest.mark.parametrize("moments", ["factored", "row", "column", "scalar", "full"])
@pytest.mark.parametrize("sigma", ["paper", "auto"])
def test_table_is_what_the_optimizer_does(sigma: str, moments: str) -> None:
    """After a real step: sigma in the groups, and how many numbers the state has."""
    model = make_all()
    amos = Amos(param_groups(model, sigma, moments=moments), lr=0.01)
    rows = {row.name: row for row in table(model, sigma, moments=moments)}
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    amos.step()
    seen = set()
    for group in amos.param_groups:
        for name, param, measured in zip(group["param_names"], group["params"], group["measured_sigma"], strict=True):
            state = amos.state[param]
            held = {key: state[key].numel() for key in state if key not in ("step", "momentum", "master")}
            row = rows[name]
            assert row.sigma == (group["sigma"] if measured is None else measured)
            assert row.state == sum(held.values()) and row.rows * row.columns == param.numel()
            kinds = {"row_moment": row.rows, "column_moment": row.columns, "moment": held.get("moment")}
            assert all(kinds[key] == count for key, count in held.items() if key != "decay")
            seen.add(name)
    assert seen == set(rows)


def test_table_of_auto_gives_its_reasons() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ConvTranspose2d(6, 4, 3, bias=False))
    nn.init.zeros_(model[1].weight)
    rows = {row.name: row for row in table(model, "auto")}
    rms = model[0].weight.double().square().mean().sqrt().item()
    assert rows["0.weight"].sigma == pytest.approx(rms, rel=1e-12)
    assert rows["0.weight"].reason == "root mean square of the entries at start"
    assert (rows["0.bias"].sigma, rows["0.bias"].reason) == (0.5, "no matrix: 0.5")
    assert rows["1.weight"].sigma == root(1 / 54)
    assert rows["1.weight"].reason.startswith("starts at zero: √(1/fan_in), fan_in 54; ConvTranspose2d")


def test_meta_device() -> None:
    """The paper's need no numbers; "auto" says that it will measure them."""
    with torch.device("meta"):
        model = make_all()
    assert table(model) == table(make_all())
    rows = {row.name: row for row in table(model, "auto")}
    assert (rows["conv.weight"].sigma, rows["conv.bias"].sigma) == (None, 0.5)
    assert rows["conv.weight"].reason == "root mean square of the entries at start"
    assert " measured " in shown(list(rows.values()), [])


def test_a_number_is_given() -> None:
    assert {(row.sigma, row.reason) for row in table(nn.Linear(3, 2), 0.25)} == {(0.25, "given")}


def test_folding() -> None:
    """Numbers fold where all else is the same: other shapes, other names and holes do not."""

    def names_of(*modules: tuple[str, int]) -> list[str]:
        model = nn.Module()
        for path, size in modules:
            parent: nn.Module = model
            for part in path.split("."):
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.register_parameter("bias", nn.Parameter(torch.zeros(size)))
        return [f"{row.name} {row.count}" for row in folded(table(model))]

    assert names_of(("h.0", 3), ("h.1", 3), ("h.2", 4), ("h.3", 3)) == ["h.0-1,3.bias 3", "h.2.bias 1"]
    assert names_of(("a.0.b.0", 3), ("a.0.b.1", 3), ("a.1.b.0", 3), ("a.1.b.1", 3)) == ["a.0-1.b.0-1.bias 4"]
    assert names_of(("a.0.b.0", 3), ("a.0.b.1", 3), ("a.1.b.0", 3)) == ["a.0-1.b.0.bias 2", "a.0.b.1.bias 1"]
    assert names_of(("x1.0", 3), ("x2.0", 3)) == ["x1.0.bias 1", "x2.0.bias 1"]
    assert names_of(*((f"h.{i}", 3) for i in range(0, 12, 2))) == ["h.0,2,…,10.bias 6"]


def test_wrappers_are_looked_through() -> None:
    def make(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return nn.ModuleDict({"mlp": nn.ModuleDict({"c_proj": wrap(nn.Linear(8, 4, bias=False))})})

    wrapped = make(checkpoint_wrapper)
    (row,) = table(wrapped)
    assert row.name != "mlp.c_proj.weight" and row.sigma == root(2 / 8)
    (row,) = table(make(torch.compile))
    assert row.name == "mlp.c_proj._orig_mod.weight" and row.sigma == root(2 / 8)
    (row,) = table(nn.Sequential(nn.ReLU(), checkpoint_wrapper(nn.Linear(8, 4, bias=False))))
    assert row.reason == "kernel after ReLU: √(2/fan_in), fan_in 8"


def test_reasons_of_what_is_packed() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 3), nn.GRU(4, 3), nn.RNN(4, 3), nn.Linear(3, 2))
    reasons = {row.name: row.reason for row in table(model)}
    assert reasons["0.in_proj_weight"] == "packed query, key and value: √(1/fan_in), fan_in 4"
    assert reasons["1.weight_ih_l0"] == "input to 4 packed gates of LSTM: √(1/fan_in), fan_in 4"
    assert reasons["2.weight_hh_l0"] == "hidden state to 3 packed gates of GRU: fan_in^(-1/4), fan_in 3"
    assert reasons["3.weight_hh_l0"] == "hidden state to RNN: fan_in^(-1/4), fan_in 3"
    assert reasons["4.weight"] == "kernel after RNN: 2.5·fan_in^(-1/4), fan_in 3"


def test_positions_on_a_grid() -> None:
    """(1, width, height, width in patches), as some vision transformers keep them."""
    (row,) = table(Bare(pos_embed=(1, 96, 7, 7)))
    assert row.sigma == pytest.approx((2 / 96) ** 0.5) and (row.rows, row.columns) == (96, 49)
    (row,) = table(Bare(pos_embed=(1, 7, 7, 96)))
    assert row.sigma == pytest.approx((2 / 96) ** 0.5) and (row.rows, row.columns) == (49, 96)


def test_what_is_called_a_bias() -> None:
    rows = table(Bare(debias_proj=(4, 8), pos_bias_u=(2, 3), relative_position_bias_table=(9, 2), qkv_bias=(2, 3)))
    assert [row.reason.startswith("kernel") for row in rows] == [True, False, False, False]


@pytest.mark.parametrize("path", ["transformer.ffns.3.lin2", "encoder.layer.1.ffn.0.output.dense"])
def test_outputs_of_mlps_in_lists(path: str) -> None:
    assert names.role(path) == (2, "MLP output, after the activation")


def test_relative_positions_by_their_names() -> None:
    rows = table(Bare(rel_pos_h=(7, 4), relative_position_bias_table=(9, 2), attn_rpb=(2, 3, 3)))
    assert {(row.sigma, row.reason) for row in rows} == {(0.5, "relative positions: 0.5")}


def test_a_framework_that_knows_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under DeepSpeed, which hands over bare tensors: "paper" and what it has no rule for."""
    model = nn.ModuleDict({"mixer": Bare(A_log=(5, 3)), "out": nn.Linear(6, 3, bias=False)})
    names = {id(param): name for name, param in model.named_parameters()}
    monkeypatch.setattr(optimizer, "LOOK_AROUND", [lambda making: Surroundings(names, advise(model))])
    amos = Amos(list(model.parameters()), 0.1, sigma="paper")
    scale = model["mixer"].A_log.double().square().mean().sqrt().item()
    assert amos.param_groups[0]["measured_sigma"] == [pytest.approx(scale, rel=1e-12), None]
    assert f"sigma={math.sqrt(1 / 6)!r} for 'out.weight'" in amos._facts(None)


def test_what_has_no_rule_needs_values() -> None:
    with torch.device("meta"):
        groups = param_groups(nn.Sequential(nn.Linear(3, 2), Bare(A_log=(5, 3))), "paper")
    with pytest.raises(RuntimeError, match=r"needs the values of parameter '1.A_log'.* Materialize the model first"):
        Amos(groups, lr=0.1)
