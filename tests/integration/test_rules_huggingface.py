"""The paper's sigma for models of transformers and factors of peft.

Every expected sigma is written as the formula with its fan-in, read off the architecture and not off the code.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from amos_dist import Amos, param_groups
from amos_dist.rules.table import Row, folded, table

transformers = pytest.importorskip("transformers")

LLAMA = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA |= {"intermediate_size": 20, "pad_token_id": 0}
BERT = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 20}
EXPERTS_OF_3 = {**LLAMA, "head_dim": 8, "num_local_experts": 3}
WORDS = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**WORDS, "n_layer": 2, "n_embd": 12, "n_head": 2, "n_positions": 9}),
    "bert": ("BertConfig", "BertForPreTraining", {**WORDS, **BERT, "max_position_embeddings": 9}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**WORDS, **LLAMA}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**WORDS, "num_layers": 2, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_heads": 2},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**BERT, "image_size": 8, "patch_size": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**WORDS, **EXPERTS_OF_3}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**WORDS, **EXPERTS_OF_3}),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {**WORDS, **EXPERTS_OF_3, "num_hidden_layers": 1}),
}


def make(name: str) -> nn.Module:
    config, model, sizes = TINY[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def root(gain: float, fan_in: int) -> Any:
    return pytest.approx(math.sqrt(gain / fan_in), rel=1e-12)


NORM, BIAS = (1.0, "scale of a normalization: 1"), (0.5, "bias: 0.5")
QKV, OUTPUT, MLP_IN = "query, key or value: √(1/fan_in)", "attention output: √(1/fan_in)", "MLP input: √(1/fan_in)"
MLP_OUT = "MLP output, after the activation: √(2/fan_in)"
EMBEDDING, HEAD, KERNEL = "embedding: √(2/width)", "head: √(1/fan_in)", "kernel: √(1/fan_in)"
EXPERTS_IN = "stacked kernels: √(1/fan_in)"
EXPERTS_OUT = "stacked MLP outputs, after the activation: √(2/fan_in)"

# By the folded name: sigma, and how the reason begins. 12 is the width, 20 that inside an MLP.
EXPECTED: dict[str, dict[str, tuple[Any, str]]] = {
    "gpt2": {
        "transformer.wte.weight": (root(2, 12), EMBEDDING),
        "transformer.wpe.weight": (root(2, 12), EMBEDDING),
        "transformer.h.0-1.ln_1.weight": NORM,
        "transformer.h.0-1.ln_1.bias": BIAS,
        "transformer.h.0-1.attn.c_attn.weight": (root(1, 12), QKV),
        "transformer.h.0-1.attn.c_attn.bias": BIAS,
        "transformer.h.0-1.attn.c_proj.weight": (root(1, 12), OUTPUT),
        "transformer.h.0-1.attn.c_proj.bias": BIAS,
        "transformer.h.0-1.ln_2.weight": NORM,
        "transformer.h.0-1.ln_2.bias": BIAS,
        "transformer.h.0-1.mlp.c_fc.weight": (root(1, 12), MLP_IN),
        "transformer.h.0-1.mlp.c_fc.bias": BIAS,
        "transformer.h.0-1.mlp.c_proj.weight": (root(2, 48), MLP_OUT),
        "transformer.h.0-1.mlp.c_proj.bias": BIAS,
        "transformer.ln_f.weight": NORM,
        "transformer.ln_f.bias": BIAS,
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": (root(2, 12), EMBEDDING),
        "bert.embeddings.position_embeddings.weight": (root(2, 12), EMBEDDING),
        "bert.embeddings.token_type_embeddings.weight": (root(2, 12), EMBEDDING),
        "bert.embeddings.LayerNorm.weight": NORM,
        "bert.embeddings.LayerNorm.bias": BIAS,
        **{
            f"bert.encoder.layer.0-1.attention.self.{name}.{kind}": value
            for name in ("query", "key", "value")
            for kind, value in (("weight", (root(1, 12), QKV)), ("bias", BIAS))
        },
        "bert.encoder.layer.0-1.attention.output.dense.weight": (root(1, 12), OUTPUT),
        "bert.encoder.layer.0-1.attention.output.dense.bias": BIAS,
        "bert.encoder.layer.0-1.attention.output.LayerNorm.weight": NORM,
        "bert.encoder.layer.0-1.attention.output.LayerNorm.bias": BIAS,
        "bert.encoder.layer.0-1.intermediate.dense.weight": (root(1, 12), MLP_IN),
        "bert.encoder.layer.0-1.intermediate.dense.bias": BIAS,
        "bert.encoder.layer.0-1.output.dense.weight": (root(2, 20), MLP_OUT),
        "bert.encoder.layer.0-1.output.dense.bias": BIAS,
        "bert.encoder.layer.0-1.output.LayerNorm.weight": NORM,
        "bert.encoder.layer.0-1.output.LayerNorm.bias": BIAS,
        "bert.pooler.dense.weight": (root(1, 12), KERNEL),
        "bert.pooler.dense.bias": BIAS,
        "cls.predictions.bias": BIAS,
        "cls.predictions.transform.dense.weight": (root(1, 12), KERNEL),
        "cls.predictions.transform.dense.bias": BIAS,
        "cls.predictions.transform.LayerNorm.weight": NORM,
        "cls.predictions.transform.LayerNorm.bias": BIAS,
        "cls.seq_relationship.weight": (root(1, 12), HEAD),
        "cls.seq_relationship.bias": BIAS,
    },
    "llama": {
        "model.embed_tokens.weight": (root(2, 12), EMBEDDING),
        **{f"model.layers.0-1.self_attn.{name}_proj.weight": (root(1, 12), QKV) for name in "qkv"},
        "model.layers.0-1.self_attn.o_proj.weight": (root(1, 12), OUTPUT),
        "model.layers.0-1.mlp.gate_proj.weight": (root(1, 12), MLP_IN),
        "model.layers.0-1.mlp.up_proj.weight": (root(1, 12), MLP_IN),
        "model.layers.0-1.mlp.down_proj.weight": (root(2, 20), MLP_OUT),
        "model.layers.0-1.input_layernorm.weight": NORM,
        "model.layers.0-1.post_attention_layernorm.weight": NORM,
        "model.norm.weight": NORM,
        "lm_head.weight": (root(1, 12), HEAD),
    },
    "t5": {
        "shared.weight": (root(2, 12), EMBEDDING),
        **{
            f"{path}.{name}.weight": (root(1, 10), OUTPUT) if name == "o" else (root(1, 12), QKV)  # 2 heads of 5
            for path in (
                "encoder.block.0-1.layer.0.SelfAttention",
                "decoder.block.0-1.layer.0.SelfAttention",
                "decoder.block.0-1.layer.1.EncDecAttention",
            )
            for name in "qkvo"
        },
        **{
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (0.5, "relative positions: 0.5")
            for part in ("encoder", "decoder")
        },
        "encoder.block.0-1.layer.0-1.layer_norm.weight": NORM,
        "decoder.block.0-1.layer.0-2.layer_norm.weight": NORM,
        "encoder.block.0-1.layer.1.DenseReluDense.wi.weight": (root(1, 12), MLP_IN),
        "decoder.block.0-1.layer.2.DenseReluDense.wi.weight": (root(1, 12), MLP_IN),
        "encoder.block.0-1.layer.1.DenseReluDense.wo.weight": (root(2, 20), MLP_OUT),
        "decoder.block.0-1.layer.2.DenseReluDense.wo.weight": (root(2, 20), MLP_OUT),
        "encoder.final_layer_norm.weight": NORM,
        "decoder.final_layer_norm.weight": NORM,
    },
    "vit": {
        "vit.embeddings.cls_token": (root(2, 12), EMBEDDING),
        "vit.embeddings.position_embeddings": (root(2, 12), EMBEDDING),
        "vit.embeddings.patch_embeddings.projection.weight": (root(8, 3 * 4 * 4), "convolution on pixels"),
        "vit.embeddings.patch_embeddings.projection.bias": BIAS,
        **{
            f"vit.layers.0-1.attention.{name}_proj.{kind}": value
            for name in "qkvo"
            for kind, value in (("weight", (root(1, 12), OUTPUT if name == "o" else QKV)), ("bias", BIAS))
        },
        "vit.layers.0-1.layernorm_before.weight": NORM,
        "vit.layers.0-1.layernorm_before.bias": BIAS,
        "vit.layers.0-1.layernorm_after.weight": NORM,
        "vit.layers.0-1.layernorm_after.bias": BIAS,
        "vit.layers.0-1.mlp.fc1.weight": (root(1, 12), MLP_IN),
        "vit.layers.0-1.mlp.fc1.bias": BIAS,
        "vit.layers.0-1.mlp.fc2.weight": (root(2, 20), MLP_OUT),
        "vit.layers.0-1.mlp.fc2.bias": BIAS,
        "vit.layernorm.weight": NORM,
        "vit.layernorm.bias": BIAS,
        "classifier.weight": (root(1, 12), HEAD),
        "classifier.bias": BIAS,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_architectures(name: str) -> None:
    found = {row.name: row for row in folded(table(make(name)))}
    assert {name: row.sigma for name, row in found.items()} == {n: sigma for n, (sigma, _) in EXPECTED[name].items()}
    for folded_name, (_, reason) in EXPECTED[name].items():
        assert found[folded_name].reason.startswith(reason), folded_name
    assert sum(row.count for row in found.values()) == len(list(make(name).parameters()))


# (E, out, in), and those that are (E, in, out); 40 = 2 · 20 are gate and up together
EXPERTS = {
    "mixtral": ("model.layers.0-1.mlp", (3 * 40, 12), (3 * 12, 20), "gate", "(E, out, in): a row is an output"),
    "gpt-oss": ("model.layers.0-1.mlp", (3 * 12, 40), (3 * 20, 12), "router", "(E, in, out): a row is an input"),
    "llama4": ("model.layers.0.feed_forward", (3 * 12, 40), (3 * 20, 12), "router", "(E, in, out): a row is an input"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts(name: str) -> None:
    path, up_view, down_view, router, note = EXPERTS[name]
    found = {row.name: row for row in folded(table(make(name)))}
    up, down = found[f"{path}.experts.gate_up_proj"], found[f"{path}.experts.down_proj"]
    assert up.sigma == root(1, 12) and down.sigma == root(2, 20)
    assert (up.rows, up.columns) == up_view and (down.rows, down.columns) == down_view
    assert up.reason.startswith(EXPERTS_IN) and down.reason.startswith(EXPERTS_OUT)
    assert note in up.reason and note in down.reason
    assert found[f"{path}.{router}.weight"].sigma == root(1, 12)
    if name == "gpt-oss":
        assert found[f"{path}.experts.gate_up_proj_bias"].sigma == 0.5


def test_layouts_and_ties() -> None:
    gpt2 = {row.name: row for row in folded(table(make("gpt2")))}
    assert gpt2["transformer.wte.weight"].reason.endswith("tied to lm_head.weight: counted once")
    c_fc = gpt2["transformer.h.0-1.mlp.c_fc.weight"]
    assert (c_fc.shape, c_fc.count) == ((12, 48), 2)
    assert c_fc.reason.endswith("fan_in 12; weight of Conv1D (in, out): output is dim 1")
    by_row = {row.name: row.moments for row in table(make("gpt2"), moments="row")}
    assert by_row["transformer.h.0.mlp.c_fc.weight"] == "column" and by_row["transformer.wte.weight"] == "row"
    t5 = next(row for row in table(make("t5")) if row.name == "shared.weight")
    others = "encoder.embed_tokens.weight, decoder.embed_tokens.weight, lm_head.weight"
    assert t5.reason.endswith(f"tied to {others}: counted once")
    vit = {row.name: row for row in table(make("vit"))}
    assert (vit["vit.embeddings.position_embeddings"].rows, vit["vit.embeddings.cls_token"].rows) == (5, 1)


@pytest.mark.parametrize("name", TINY)
def test_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = make(name)
    assert all(param.is_meta for param in model.parameters())
    assert table(model) == table(make(name))


def test_activations_and_what_only_looks_like_one() -> None:
    """transformers has activations of its own; Mamba registers one before the kernel that its input goes to."""
    activation = transformers.activations.ACT2FN["gelu_new"]
    (row,) = table(nn.Sequential(activation, nn.Linear(8, 4, bias=False)))
    assert (row.sigma, row.reason) == (root(2, 8), "kernel after NewGELUActivation: √(2/fan_in), fan_in 8")
    (row,) = table(nn.ModuleDict({"relative_proj": nn.Linear(8, 4, bias=False)}))
    assert row.sigma == root(1, 8)  # what projects positions is a kernel
    config = transformers.MambaConfig(**WORDS, hidden_size=12, state_size=3, num_hidden_layers=2)
    with torch.device("meta"):
        found = {row.name: row for row in folded(table(transformers.MambaForCausalLM(config)))}
    mixer = "backbone.layers.0-1.mixer"
    assert found[f"{mixer}.in_proj.weight"].sigma == root(1, 12)
    assert found[f"{mixer}.A_log"].reason.startswith("no rule for A_log of MambaMixer: auto")
    assert found[f"{mixer}.A_log"].sigma is None  # has no values yet


def test_training_does_what_the_table_says() -> None:
    """Three steps of a whole model; the groups and the state are those of the table, and the loss falls."""
    model = make("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    rows = {row.name: row for row in table(model)}
    optimizer = Amos(param_groups(model, sigma="paper"), lr=0.01, beta=0.9)
    tokens = torch.randint(0, 30, (8, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0] and optimizer.skipped_steps == 0
    trained: dict[str, tuple[float, int]] = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = optimizer.state[param]
            size = sum(value.numel() for key, value in state.items() if key != "step")
            trained[name] = (group["sigma"], size)
    assert trained == {name: (row.sigma, row.state) for name, row in rows.items()}
    assert "transformer.wpe.weight" not in trained


def test_rules_win_over_the_table() -> None:
    """As docs/sigma.md says to override one."""
    rules = [{"match": r"lm_head|wte", "sigma": 0.02, "moments": "row"}]
    optimizer = Amos(param_groups(make("gpt2"), sigma="paper"), lr=0.01, rules=rules)
    facts = optimizer._facts(None)
    assert "sigma=0.02 for 'transformer.wte.weight'" in facts
    assert not any(fact.startswith("sigma=") and "wpe" in fact for fact in facts)


# ---- peft ----------------------------------------------------------------------------------------------------------


def with_lora(model: nn.Module, **given: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **given))


def by_end(model: nn.Module, sigma: str = "paper") -> dict[str, Row]:
    """Rows by the names that peft's own prefix is taken from."""
    return {row.name.removeprefix("base_model.model."): row for row in table(model, sigma)}


@pytest.mark.filterwarnings("ignore")
def test_lora() -> None:
    """B·A may become as large as the paper lets the kernel be: √(1/4) · √(1/12) · √4 = √(1/12)."""
    model = with_lora(make("gpt2"), target_modules=["c_attn", "wte"])
    found = by_end(model)
    assert len(found) == 2 * 2 + 2  # the rest is frozen
    a, b = (found[f"transformer.h.0.attn.c_attn.lora_{each}.default.weight"] for each in "AB")
    assert (a.shape, a.sigma, a.reason) == ((4, 12), root(1, 12), "LoRA A: √(1/fan_in), fan_in 12")
    assert (b.shape, b.sigma, b.reason) == ((36, 4), root(1, 4), "LoRA B: √(1/rank), rank 4")
    a, b = (found[f"transformer.wte.lora_embedding_{each}.default"] for each in "AB")
    assert (a.shape, a.sigma) == ((4, 30), root(2, 12)) and (b.shape, b.sigma) == ((12, 4), root(1, 4))
    assert a.reason.endswith("(rank, words): a word is dim 1")
    rows = {row.name: row.moments for row in table(model, moments="row")}
    assert rows["base_model.model.transformer.wte.lora_embedding_A.default"] == "column"


@pytest.mark.filterwarnings("ignore")
def test_lora_at_start() -> None:
    """sigma="auto": A is as it starts; B starts at zero, and has √(1/rank)."""
    model = with_lora(make("llama"), target_modules=["q_proj"])
    found = by_end(model, "auto")
    a, b = (found[f"model.layers.1.self_attn.q_proj.lora_{each}.default.weight"] for each in "AB")
    weight = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default").weight
    assert a.sigma == pytest.approx(weight.double().square().mean().sqrt().item(), rel=1e-12)
    assert (b.sigma, b.reason) == (root(1, 4), "starts at zero: √(1/fan_in), fan_in 4")
    optimizer = Amos(param_groups(model), lr=0.01)
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    b = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.lora_B.default").weight
    assert 0 < b.abs().max() < 0.1


@pytest.mark.filterwarnings("ignore")
def test_lora_of_experts_has_its_own_rank() -> None:
    """The factors of 3 experts lie side by side: 12 columns of B, and yet rank 4."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    found = by_end(with_lora(make("mixtral"), target_modules=[], target_parameters=targets))
    b = {row.name: row for name, row in found.items() if ".lora_B." in name}
    assert {row.shape[1] for row in b.values()} == {12} and len(b) == 4
    assert {row.reason for row in b.values()} == {"LoRA B: √(1/rank), rank 4"}


@pytest.mark.filterwarnings("ignore")
def test_dora_magnitudes_are_norms_of_rows() -> None:
    """A row of 12 entries of √(1/12) has a norm of 1; after a GELU one of √2."""
    model = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 6))
    found = by_end(with_lora(model, target_modules=["0", "2"], use_dora=True))
    magnitudes = {name: row.sigma for name, row in found.items() if "magnitude" in name}
    assert magnitudes == {
        "0.lora_magnitude_vector.default.weight": root(1, 1),
        "2.lora_magnitude_vector.default.weight": root(2, 1),
    }
