"""param_groups and sigma="auto": the paper's table and Su's scales, on small models of every common module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from amos_dist import Amos, param_groups
from amos_dist.rules import advise
from amos_dist.rules.table import table


def settings_by_name(model: nn.Module, sigma: Any = "paper", **given: Any) -> dict[str, dict[str, Any]]:
    """What each parameter gets, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for group in param_groups(model, sigma, **given):
        for name, param in group["params"]:
            assert dict(model.named_parameters())[name] is param and name not in found
            found[name] = {key: value for key, value in group.items() if key != "params"}
    return found


def sigmas(model: nn.Module) -> dict[str, float]:
    return {name: values["sigma"] for name, values in settings_by_name(model).items()}


class Attention(nn.Module):
    """As language models name their parts; the activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(12, 12), nn.Linear(12, 12)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(12, 48), nn.Linear(48, 12)
        self.relative_position = nn.Parameter(torch.zeros(4, 31))
        self.norm = nn.LayerNorm(12)
        self.temperature = nn.Parameter(torch.ones(()))


def root(x: float) -> Any:
    return pytest.approx(math.sqrt(x), rel=1e-12)


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 20), nn.Linear(20, 5)),
        {
            "0.weight": root(1 / 6), "0.bias": 0.5, "3.weight": root(2 / 10), "3.bias": 0.5,
            "4.weight": root(1 / 20), "4.bias": 0.5,
        },
    ),
    "gelu": (lambda: nn.Sequential(nn.GELU(), nn.Linear(8, 3, bias=False)), {"1.weight": root(2 / 8)}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(50, 8)), {"0.weight": root(2 / 8)}),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)),
        {f"{i}.weight": 1.0 for i in range(4)} | {f"{i}.bias": 0.5 for i in range(3)},
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 1)),
        {
            "0.weight": root(8 / 75), "0.bias": 0.5, "3.weight": root(2 / 72), "3.bias": 0.5,
            "4.weight": root(2 / 16), "4.bias": 0.5,
        },
    ),
    "grouped convolution": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3, groups=4, bias=False)), {"0.weight": root(2 / 6)}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, bias=False)),
        {"0.weight": root(1 / 54)},
    ),
    "grouped transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=4, bias=False)),
        {"0.weight": root(1 / 18)},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(12, 3),
        {"in_proj_weight": root(1 / 12), "in_proj_bias": 0.5, "out_proj.weight": root(1 / 12), "out_proj.bias": 0.5},
    ),
    "lstm": (
        lambda: nn.LSTM(5, 7),
        {"weight_ih_l0": root(1 / 5), "weight_hh_l0": 2 * 7**-0.25, "bias_ih_l0": 0.5, "bias_hh_l0": 0.5},
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(12, 3, kdim=8, vdim=6, bias=False),
        {
            "q_proj_weight": root(1 / 12), "k_proj_weight": root(1 / 8), "v_proj_weight": root(1 / 6),
            "out_proj.weight": root(1 / 12),
        },
    ),
    "gru": (
        lambda: nn.GRU(5, 7, bidirectional=True, bias=False),
        {
            "weight_ih_l0": root(1 / 5), "weight_hh_l0": 7**-0.25, "weight_ih_l0_reverse": root(1 / 5),
            "weight_hh_l0_reverse": 7**-0.25,
        },
    ),
    "projected lstm": (
        lambda: nn.LSTM(5, 7, proj_size=3, bias=False),
        {"weight_ih_l0": root(1 / 5), "weight_hh_l0": 2 * 3**-0.25, "weight_hr_l0": 7**-0.25},
    ),
    "cells": (
        lambda: nn.Sequential(nn.LSTMCell(5, 7, bias=False), nn.GRUCell(4, 6, bias=False), nn.RNNCell(6, 2)),
        {
            "0.weight_ih": root(1 / 5), "0.weight_hh": 2 * 7**-0.25, "1.weight_ih": root(1 / 4),
            "1.weight_hh": 6**-0.25, "2.weight_ih": 6**-0.25, "2.weight_hh": 2**-0.25, "2.bias_ih": 0.5,
            "2.bias_hh": 0.5,
        },
    ),
    "language model": (
        lambda: nn.Sequential(
            nn.Embedding(50, 5),
            nn.Dropout(),
            nn.LSTM(5, 7, 2, bias=False),
            nn.Dropout(),
            nn.Linear(7, 50),
            nn.Linear(50, 4),
        ),
        {
            "0.weight": 5**-0.25, "2.weight_ih_l0": 2 * 5**-0.25, "2.weight_hh_l0": 2 * 7**-0.25,
            "2.weight_ih_l1": 2 * 7**-0.25, "2.weight_hh_l1": 2 * 7**-0.25, "4.weight": 5 * 7**-0.25, "4.bias": 0.5,
            "5.weight": root(1 / 50), "5.bias": 0.5,
        },
    ),
    "two heads": (
        lambda: nn.Sequential(
            nn.Embedding(9, 4),
            nn.Embedding(3, 4),
            nn.GRU(4, 6, bidirectional=True, bias=False),
            nn.Linear(12, 3, bias=False),
            nn.Linear(12, 1, bias=False),
        ),
        {
            "0.weight": 4**-0.25, "1.weight": 4**-0.25, "2.weight_ih_l0": 4**-0.25, "2.weight_hh_l0": 6**-0.25,
            "2.weight_ih_l0_reverse": 4**-0.25, "2.weight_hh_l0_reverse": 6**-0.25, "3.weight": 2.5 * 12**-0.25,
            "4.weight": 2.5 * 12**-0.25,
        },
    ),
    "what does not read a recurrent net": (
        lambda: nn.Sequential(
            nn.LSTM(4, 6, bias=False),
            nn.LSTM(5, 6, bias=False),
            nn.Linear(20, 6, bias=False),
            nn.Linear(6, 2, bias=False),
            nn.Embedding(9, 3),
            nn.RNN(2, 2, bias=False),
        ),
        {
            "0.weight_ih_l0": root(1 / 4), "0.weight_hh_l0": 2 * 6**-0.25, "1.weight_ih_l0": root(1 / 5),
            "1.weight_hh_l0": 2 * 6**-0.25, "2.weight": root(1 / 20), "3.weight": root(1 / 6), "4.weight": root(2 / 3),
            "5.weight_ih_l0": root(1 / 2), "5.weight_hh_l0": 2**-0.25,
        },
    ),
    "embedding before another module": (
        lambda: nn.Sequential(nn.Embedding(50, 5), nn.Linear(5, 5, bias=False), nn.GRU(5, 7, bias=False)),
        {"0.weight": root(2 / 5), "1.weight": root(1 / 5), "2.weight_ih_l0": root(1 / 5), "2.weight_hh_l0": 7**-0.25},
    ),
    "norms of several dimensions": (lambda: nn.LayerNorm([4, 5, 5]), {"weight": 1.0, "bias": 0.5}),
    "convolutions of 1 and 3 dimensions": (
        lambda: nn.Sequential(nn.Conv1d(8, 6, 5, bias=False), nn.Conv3d(1, 2, 3, bias=False)),
        {"0.weight": root(2 / 40), "1.weight": root(8 / 27)},
    ),
    "transposed after an activation": (
        lambda: nn.Sequential(nn.GELU(), nn.ConvTranspose1d(6, 4, 3, bias=False), nn.ConvTranspose3d(4, 2, 3)),
        {"1.weight": root(2 / 18), "2.weight": root(1 / 108), "2.bias": 0.5},
    ),
    "bags": (lambda: nn.EmbeddingBag(50, 8), {"weight": root(2 / 8)}),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5, bias=False), {"weight": root(1 / 12)}),
    "weight_norm": (
        lambda: nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 7, bias=False))),
        {  # rows of 6 entries of √(2/6) have a norm of √2
            "1.parametrizations.weight.original0": root(2), "1.parametrizations.weight.original1": root(2 / 6),
        },
    ),
    "weight_norm of kernel positions": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 8, 3, bias=False), dim=2),
        {  # 48 entries of √(2/18) for each of 3 magnitudes
            "parametrizations.weight.original0": root(48 * 2 / 18), "parametrizations.weight.original1": root(2 / 18),
        },
    ),
    "weight_norm, the older": (
        lambda: nn.utils.weight_norm(nn.Linear(6, 7, bias=False)),
        {"weight_g": root(1), "weight_v": root(1 / 6)},
    ),
    "spectral_norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 7, bias=False)),
            nn.utils.spectral_norm(nn.Conv2d(8, 7, 3, bias=False)),
        ),
        {"0.parametrizations.weight.original": root(1 / 6), "1.weight_orig": root(2 / 72)},
    ),
    "after an activation in Sequential alone": (
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 5, bias=False)),
        {"0.weight": root(1 / 4), "2.weight": root(1 / 4)},
    ),
    "names of an MLP behind its activation": (
        lambda: nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"activation_fn": nn.ReLU(), "fc1": nn.Linear(4, 6, bias=False)})])}
        ),
        {"layers.0.fc1.weight": root(1 / 4)},
    ),
    "transformer names": (
        Attention,
        {
            "q_proj.weight": root(1 / 12), "q_proj.bias": 0.5, "out_proj.weight": root(1 / 12), "out_proj.bias": 0.5,
            "mlp.c_fc.weight": root(1 / 12), "mlp.c_fc.bias": 0.5, "mlp.c_proj.weight": root(2 / 48),
            "mlp.c_proj.bias": 0.5, "relative_position": 0.5, "norm.weight": 1.0, "norm.bias": 0.5, "temperature": 0.5,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_paper(name: str) -> None:
    make, expected = MODELS[name]
    assert sigmas(make()) == expected


def test_biases_of_attention() -> None:
    found = sigmas(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    assert found["bias_k"] == found["bias_v"] == 0.5


def test_torch_transformer_layer() -> None:
    found = sigmas(nn.TransformerEncoderLayer(12, 3, 48))
    assert found["linear1.weight"] == root(1 / 12) and found["linear2.weight"] == root(2 / 48)
    assert found["self_attn.in_proj_weight"] == root(1 / 12) and found["norm1.weight"] == 1.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_come_once_and_are_embeddings() -> None:
    assert sigmas(Tied()) == {"embed.weight": root(2 / 8)}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 2))
    model[0].weight.requires_grad_(False)
    assert set(settings_by_name(model)) == {"0.bias", "1.weight", "1.bias"}


def test_row_dims_of_transposed_and_stacked_kernels() -> None:
    model = nn.Module()
    model.up = nn.ConvTranspose2d(6, 4, 3, bias=False)
    model.experts = nn.Parameter(torch.randn(4, 10, 6))
    model.plain = nn.Linear(3, 3, bias=False)
    found = settings_by_name(model)
    assert found["up.weight"]["row_dims"] == 2 and found["experts"]["row_dims"] == 2
    assert "row_dims" not in found["plain.weight"]
    assert found["experts"]["sigma"] == root(1 / 6)
    assert settings_by_name(model, row_dims=1)["up.weight"]["row_dims"] == 1  # what the user says wins


class Conv1D(nn.Module):
    """As Hugging Face's: the weight is (in, out)."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, out)), nn.Parameter(torch.zeros(out))


def test_transposed_linear() -> None:
    model = nn.ModuleDict({"c_attn": Conv1D(36, 12)})
    assert sigmas(model) == {"c_attn.weight": root(1 / 12), "c_attn.bias": 0.5}
    assert settings_by_name(model, moments="row")["c_attn.weight"]["moments"] == "column"
    assert "moments" not in settings_by_name(model)["c_attn.weight"]


def test_auto_of_zeros_in_transposed_kernels() -> None:
    """fan_in is dim 0 of Conv1D, and dim 0 times the kernel's size of ConvTranspose."""
    model = nn.ModuleDict({"c_attn": Conv1D(12, 48), "up": nn.ConvTranspose2d(6, 4, 3, bias=False)})
    for param in model.parameters():
        nn.init.zeros_(param)
    groups = Amos(param_groups(model), lr=0.1).param_groups
    given = [group["sigma"] for group in groups if group["sigma"] != "auto"]  # by the module: "auto" sees no scale
    assert sorted(given, reverse=True) == [root(1 / 48), root(1 / 54)]


def test_groups_share_equal_settings_and_carry_keywords() -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    groups = param_groups(model, "paper", beta=0.98, momentum=0.9)
    assert len(groups) == 2
    assert all(group["beta"] == 0.98 and group["momentum"] == 0.9 for group in groups)
    optimizer = Amos(groups, lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]


@pytest.mark.parametrize("given", [{"sigmma": 1.0}, {"weight_decay": 0.1}, {"beta": 2.0}, {"moments": "rows"}], ids=str)
def test_bad_keywords(given: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(given))):
        param_groups(nn.Linear(2, 2), **given)


def test_a_number_for_all() -> None:
    assert {v["sigma"] for v in settings_by_name(nn.Linear(3, 2), 0.25).values()} == {0.25}


def test_every_parameter_has_advice_with_a_reason() -> None:
    for make, _ in MODELS.values():
        model = make()
        advice = advise(model)
        assert set(advice) == {name for name, _ in model.named_parameters()}
        assert all(a.reason for a in advice.values())


# ---- what no type tells --------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """Parameters that are no module's of torch."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))


def test_tokens_and_positions_are_embeddings_with_a_row_each() -> None:
    found = settings_by_name(Bare(cls_token=(1, 1, 8), position_embeddings=(1, 17, 8), pos_embed=(4, 4, 8)))
    assert [values["sigma"] for values in found.values()] == [root(2 / 8)] * 3
    assert [values["row_dims"] for values in found.values()] == [2, 2, 2]


def test_stacked_experts_that_say_they_are_transposed() -> None:
    """(E, out, in), and (E, in, out) where the module says is_transposed, as in transformers."""
    experts = Bare(gate_up_proj=(4, 12, 6), down_proj=(4, 6, 10), gate_up_proj_bias=(4, 12))
    assert sigmas(experts)["gate_up_proj"] == "auto"  # nothing says that these are experts
    experts.num_experts = 4
    expected = {"gate_up_proj": root(1 / 6), "down_proj": root(2 / 10), "gate_up_proj_bias": 0.5}
    assert sigmas(experts) == expected
    found = settings_by_name(experts)
    assert found["gate_up_proj"]["row_dims"] == found["down_proj"]["row_dims"] == 2
    experts.is_transposed = True
    assert sigmas(experts) == expected | {"gate_up_proj": root(1 / 12), "down_proj": root(2 / 6)}


def test_router_and_bare_kernels() -> None:
    model = nn.ModuleDict({"router": Bare(weight=(4, 12)), "mlp": Bare(w1=(9, 6), w2=(6, 9))})
    assert sigmas(model) == {"router.weight": root(1 / 12), "mlp.w1": root(1 / 6), "mlp.w2": root(2 / 9)}


def test_scales_less_one_are_like_biases() -> None:
    """Gemma's norms scale by 1 + weight."""

    class Gemma2RMSNorm(Bare):
        pass

    class Gemma3nRMSNorm(Bare):
        pass

    model = nn.Sequential(Gemma2RMSNorm(weight=(6,)), Gemma3nRMSNorm(weight=(6,)))
    assert sigmas(model) == {"0.weight": 0.5, "1.weight": 1.0}


def test_a_vector_in_all_but_its_shape() -> None:
    assert sigmas(Bare(gamma=(6, 1, 1), level=(1, 6))) == {"gamma": 0.5, "level": 0.5}


def test_no_rule_is_auto() -> None:
    """The optimizer measures what the paper knows nothing of, and only that."""
    model = nn.ModuleDict({"mixer": Bare(A_log=(5, 3)), "out": nn.Linear(6, 3, bias=False)})
    assert sigmas(model) == {"mixer.A_log": "auto", "out.weight": root(1 / 6)}
    optimizer = Amos(param_groups(model, "paper"), lr=0.1)
    scale = model["mixer"].A_log.double().square().mean().sqrt().item()
    assert [group["measured_sigma"] for group in optimizer.param_groups] == [[pytest.approx(scale, rel=1e-12)], [None]]
    row = next(row for row in table(model) if row.name == "mixer.A_log")
    assert row.sigma == pytest.approx(scale, rel=1e-12)
    assert row.reason == "no rule for A_log of Bare: auto; root mean square of the entries at start"


def test_lazy_modules() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet.* Run one batch"):
        param_groups(nn.Sequential(nn.LazyLinear(3)), "paper")


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_weights_are_embeddings_whoever_comes_first(head_first: bool) -> None:
    embed, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"head": head, "embed": embed} if head_first else {"embed": embed, "head": head})
    (row,) = table(model)
    name, other = ("head.weight", "embed.weight") if head_first else ("embed.weight", "head.weight")
    assert (row.name, row.sigma) == (name, root(2 / 8))
    assert row.reason == f"embedding: √(2/width), width 8; tied to {other}: counted once"


# ---- "auto" ------------------------------------------------------------------------------------------------


def measured(model: nn.Module, **given: Any) -> dict[str, float]:
    optimizer = Amos(model.named_parameters(), lr=0.1, **given)
    (group,) = optimizer.param_groups
    return dict(zip(group["param_names"], group["measured_sigma"], strict=True))


def test_auto_is_the_root_mean_square() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Embedding(7, 3), nn.LayerNorm(4), nn.Conv2d(2, 3, 5))
    found = measured(model)
    for name, param in model.named_parameters():
        expected = param.double().square().mean().sqrt().item() if param.dim() > 1 else 0.5
        assert found[name] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_auto_of_low_precision_does_not_overflow(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.full((300, 300), 200.0, dtype=dtype))
    assert Amos([weight], lr=0.1).param_groups[0]["measured_sigma"] == [pytest.approx(200.0, rel=1e-12)]


def test_auto_of_zeros() -> None:
    """sqrt(1 / fan_in)."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Conv2d(2, 3, 5))
    for param in model.parameters():
        nn.init.zeros_(param)
    found = measured(model)
    assert found == {"0.weight": root(1 / 6), "0.bias": 0.5, "1.weight": root(1 / 50), "1.bias": 0.5}


def test_auto_does_not_change_with_training() -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = Amos([weight], lr=0.5)
    before = optimizer.param_groups[0]["measured_sigma"][:]
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.param_groups[0]["measured_sigma"] == before


def test_sigma_is_the_scale_that_weights_settle_at() -> None:
    """Noise alone as gradient: whatever the start, the entries come to the scale sigma, which nothing else says."""
    for start in (0.05, 2.0):
        torch.manual_seed(0)
        weight = nn.Parameter(start * torch.randn(64, 64))
        optimizer = Amos([weight], lr=0.3, sigma=0.4, beta=0.9, c_coef=0.0, d_coef=0.0)
        for _ in range(150):
            weight.grad = torch.randn(64, 64)
            optimizer.step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.4, rel=0.1)


def test_paper_needs_the_modules() -> None:
    model = nn.Linear(3, 2)
    for params in (model.parameters(), model.named_parameters()):
        with pytest.raises(ValueError, match=r"sigma='paper' needs the module .*param_groups\(model"):
            Amos(params, lr=0.1, sigma="paper")
