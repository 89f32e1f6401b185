"""Models by name, for the table of rules: on the meta device where their numbers are not asked for."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The classes of transformers, with the sizes that their configurations have by default.
PRESETS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "bert-base": ("BertConfig", "BertForPreTraining"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "t5": ("T5Config", "T5ForConditionalGeneration"),
    "vit": ("ViTConfig", "ViTForImageClassification"),
}
LARGEST = 2**30  # parameters that are built only to be measured: 4 GiB


def build(name: str, with_values: bool = False) -> nn.Module:
    """The model that `name` says: a preset, a config.json of Hugging Face, or module:factory.

    Args:
        with_values: its parameters have values; not above `LARGEST`. Without: they are on the meta device, unless the
            factory cannot do that.

    Raises:
        ValueError: two sentences: why there is no such model, and what to do.
    """
    make = _preset(name) if name in PRESETS else _from_config(name) if name.endswith(".json") else _factory(name)
    try:
        with torch.device("meta"):
            model = _made(name, make)
    except ValueError:  # it reads numbers, of a file maybe
        return _made(name, make)
    size = sum(param.numel() for param in model.parameters())
    return _made(name, make) if with_values and size <= LARGEST else model


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: the model cannot be made: {why}. Mend it, or give a factory of your own.") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name}: that gives a {type(model).__name__}, no nn.Module. Give a class or function without arguments."
        )
    return model


def _transformers(name: str) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"{name} needs transformers, which is not installed. pip install transformers, or give another."
        )
    return importlib.import_module("transformers")


def _preset(name: str) -> Callable[[], Any]:
    transformers = _transformers(name)
    config, model = (getattr(transformers, each) for each in PRESETS[name])
    return lambda: model(config())


def _from_config(name: str) -> Callable[[], Any]:
    transformers, path = _transformers(name), Path(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no configuration can be read there: {error}. Give a model's config.json.") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ValueError(f"{name}: it names no model_type. Give the config.json of a model for transformers.")
    try:
        config = transformers.AutoConfig.for_model(**values)
    except Exception as error:
        raise ValueError(
            f"{name}: transformers {transformers.__version__} takes no such configuration: {error}. Mend it."
        ) from error
    architecture = next(iter(values.get("architectures") or ()), "")
    # Only classes of transformers itself: code that comes with a model is not run.
    if architecture and (model := getattr(transformers, architecture, None)) is not None:
        return lambda: model(config)
    return lambda: transformers.AutoModel.from_config(config)


def _factory(name: str) -> Callable[[], Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(
            f"{name}: there is no such model. Give {', '.join(PRESETS)}, a config.json, or module:factory, as "
            "torchvision.models:resnet18."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name}: it cannot be imported: {error}. Give module:factory as Python imports it."
        ) from error
    return (lambda: found) if isinstance(found, nn.Module) or not callable(found) else found
