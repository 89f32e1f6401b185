"""Names and shapes of the parameters of known models, by formulas, and of others without their weights.

In the order of `named_parameters()` of Hugging Face's classes, tied parameters once: it decides what a ZeRO partition
holds. Sources of the sizes: the config.json that each model was published with.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

Shape = tuple[int, ...]


class Parameter(NamedTuple):
    """One parameter of a model."""

    name: str
    shape: Shape


Parameters = Iterator[Parameter]

# ---- formulas --------------------------------------------------------------------------------------------------------


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Parameters:
    yield Parameter(f"{name}.weight", (outputs, inputs))
    if bias:
        yield Parameter(f"{name}.bias", (outputs,))


def _turned(name: str, inputs: int, outputs: int) -> Parameters:
    """GPT-2's Conv1D: the weight is (in, out)."""
    yield Parameter(f"{name}.weight", (inputs, outputs))
    yield Parameter(f"{name}.bias", (outputs,))


def _norm(name: str, width: int, bias: bool = True) -> Parameters:
    yield Parameter(f"{name}.weight", (width,))
    if bias:
        yield Parameter(f"{name}.bias", (width,))


def llama(layers: int, width: int, hidden: int, keys: int = 1024, words: int = 128256) -> Parameters:
    """LlamaForCausalLM of Llama 3: input and output embeddings are two.

    Args:
        hidden: of the MLP. keys: the width of all key heads: 8 of 128.
    """
    yield Parameter("model.embed_tokens.weight", (words, width))
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, outputs in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            yield from _linear(f"{at}.self_attn.{name}_proj", width, outputs, bias=False)
        for name, sizes in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            yield from _linear(f"{at}.mlp.{name}_proj", *sizes, bias=False)
        yield from _norm(f"{at}.input_layernorm", width, bias=False)
        yield from _norm(f"{at}.post_attention_layernorm", width, bias=False)
    yield from _norm("model.norm", width, bias=False)
    yield from _linear("lm_head", width, words, bias=False)


def gpt2(layers: int, width: int, words: int = 50257, positions: int = 1024) -> Parameters:
    """GPT2LMHeadModel: the head is the embedding."""
    yield Parameter("transformer.wte.weight", (words, width))
    yield Parameter("transformer.wpe.weight", (positions, width))
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        yield from _norm(f"{at}.ln_1", width)
        yield from _turned(f"{at}.attn.c_attn", width, 3 * width)
        yield from _turned(f"{at}.attn.c_proj", width, width)
        yield from _norm(f"{at}.ln_2", width)
        yield from _turned(f"{at}.mlp.c_fc", width, 4 * width)
        yield from _turned(f"{at}.mlp.c_proj", 4 * width, width)
    yield from _norm("transformer.ln_f", width)


def bert(layers: int, width: int, words: int = 30522, positions: int = 512) -> Parameters:
    """BertForMaskedLM: the head's matrix is the embedding."""
    for name, count in (("word", words), ("position", positions), ("token_type", 2)):
        yield Parameter(f"bert.embeddings.{name}_embeddings.weight", (count, width))
    yield from _norm("bert.embeddings.LayerNorm", width)
    for layer in range(layers):
        at = f"bert.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{at}.attention.self.{name}", width, width)
        yield from _linear(f"{at}.attention.output.dense", width, width)
        yield from _norm(f"{at}.attention.output.LayerNorm", width)
        yield from _linear(f"{at}.intermediate.dense", width, 4 * width)
        yield from _linear(f"{at}.output.dense", 4 * width, width)
        yield from _norm(f"{at}.output.LayerNorm", width)
    yield Parameter("cls.predictions.bias", (words,))
    yield from _linear("cls.predictions.transform.dense", width, width)
    yield from _norm("cls.predictions.transform.LayerNorm", width)


def t5(layers: int, width: int, inner: int, hidden: int, heads: int, words: int = 32128) -> Parameters:
    """T5ForConditionalGeneration (1.0): one embedding for encoder, decoder and head.

    Args:
        layers: of the encoder, and of the decoder. inner: the width of all heads. hidden: of the MLP.
    """
    yield Parameter("shared.weight", (words, width))
    for stack in ("encoder", "decoder"):
        attentions = ("SelfAttention", "EncDecAttention")[: 1 if stack == "encoder" else 2]
        for block in range(layers):
            at = f"{stack}.block.{block}.layer"
            for i, attention in enumerate(attentions):
                for name in "qkv":
                    yield from _linear(f"{at}.{i}.{attention}.{name}", width, inner, bias=False)
                yield from _linear(f"{at}.{i}.{attention}.o", inner, width, bias=False)
                if block == i == 0:
                    yield Parameter(f"{at}.{i}.{attention}.relative_attention_bias.weight", (32, heads))
                yield from _norm(f"{at}.{i}.layer_norm", width, bias=False)
            last = f"{at}.{len(attentions)}"
            yield from _linear(f"{last}.DenseReluDense.wi", width, hidden, bias=False)
            yield from _linear(f"{last}.DenseReluDense.wo", hidden, width, bias=False)
            yield from _norm(f"{last}.layer_norm", width, bias=False)
        yield from _norm(f"{stack}.final_layer_norm", width, bias=False)


def vit(layers: int, width: int, patch: int = 16, image: int = 224, labels: int = 1000) -> Parameters:
    """ViTForImageClassification."""
    yield Parameter("vit.embeddings.cls_token", (1, 1, width))
    yield Parameter("vit.embeddings.position_embeddings", (1, (image // patch) ** 2 + 1, width))
    yield Parameter("vit.embeddings.patch_embeddings.projection.weight", (width, 3, patch, patch))
    yield Parameter("vit.embeddings.patch_embeddings.projection.bias", (width,))
    for layer in range(layers):
        at = f"vit.layers.{layer}"
        for name in "qkvo":
            yield from _linear(f"{at}.attention.{name}_proj", width, width)
        yield from _norm(f"{at}.layernorm_before", width)
        yield from _norm(f"{at}.layernorm_after", width)
        yield from _linear(f"{at}.mlp.fc1", width, 4 * width)
        yield from _linear(f"{at}.mlp.fc2", 4 * width, width)
    yield from _norm("vit.layernorm", width)
    yield from _linear("classifier", width, labels)


PRESETS: dict[str, Callable[[], Parameters]] = {
    "llama3-8b": functools.partial(llama, 32, 4096, 14336),
    "llama3-70b": functools.partial(llama, 80, 8192, 28672),
    "llama3-405b": functools.partial(llama, 126, 16384, 53248),
    "gpt2": functools.partial(gpt2, 12, 768),
    "gpt2-xl": functools.partial(gpt2, 48, 1600),
    "bert-base": functools.partial(bert, 12, 768),
    "t5-large": functools.partial(t5, 24, 1024, 1024, 4096, 16),
    "vit-l": functools.partial(vit, 24, 1024),
}

# ---- models without their weights ------------------------------------------------------------------------------------


def parameters_of(model: str) -> list[Parameter]:
    """The trainable parameters of a model, in order; no weights are made.

    Args:
        model: a preset's name, the path of a Hugging Face config.json (needs transformers), or "module:factory", where
            factory() returns the model; it is called under torch.device("meta").

    Raises:
        ValueError: there is no such model, or it cannot be built.
    """
    if model in PRESETS:
        return list(PRESETS[model]())
    path = Path(model)
    if path.suffix == ".json" or path.exists():
        return _named(_from_config(path), f"the model of {path}")
    module, colon, factory = model.rpartition(":")
    if colon and module and factory:
        return _named(_from_factory(module, factory), model)
    known = ", ".join(PRESETS)
    raise ValueError(f"no model {model!r} is known. Give {known}, a config.json, or module:factory.")


@contextlib.contextmanager
def without_memory(device: str) -> Iterator[str]:
    """Gives the device on which to make tensors of shapes alone, which are planned for as those on `device` are."""
    # Meta tensors are planned for as those of a GPU are.
    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        yield "cpu" if device == "cpu" else "meta"


def _named(model: nn.Module, what: str) -> list[Parameter]:
    if any(map(is_lazy, model.parameters())):
        raise ValueError(f"{what} has a lazy module, whose shape is not known yet. Give all its sizes.")
    found = [Parameter(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not found:
        raise ValueError(f"{what} has no parameter that is trained. Give another model.")
    return found


def _from_config(path: Path) -> nn.Module:
    """The class that the file names under "architectures", or the bare model of its "model_type"."""
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Give the path of a model's config.json.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Give a model's config.json.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{path} has no "model_type". Give a config.json of Hugging Face, as a model comes with.')
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{path} needs transformers, which is not installed. pip install transformers.")
    import transformers

    try:
        settings = transformers.AutoConfig.for_model(**config)
        names = [name for name in config.get("architectures") or () if hasattr(transformers, name)]
        with torch.device("meta"):
            return getattr(transformers, names[0])(settings) if names else transformers.AutoModel.from_config(settings)
    except Exception as error:  # whatever a model's code finds wrong with its settings
        reason = _first_line(error)
        raise ValueError(
            f"transformers {transformers.__version__} cannot build the model of {path}: {reason}. "
            "Mend the file, or give module:factory."
        ) from None


def _from_factory(module: str, factory: str) -> nn.Module:
    try:
        make: Any = importlib.import_module(module)
        for name in factory.split("."):
            make = getattr(make, name)
        with torch.device("meta"):
            model = make()
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(
            f"the model {module}:{factory} cannot be built: {reason}. Give a function or class that needs no arguments."
        ) from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{factory} returns a {type(model).__name__}. It must return an nn.Module.")
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def total(parameters: Iterable[Parameter]) -> int:
    """How many numbers they are."""
    return sum(torch.Size(each.shape).numel() for each in parameters)
