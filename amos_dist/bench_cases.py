"""What the benchmark measures: whose shapes, and which optimizers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .monitor import Monitor
from .optimizer import Amos

Shape = tuple[int, ...]

# ---- shapes ----------------------------------------------------------------------------------------------------------


def gpt2_shapes(layers: int = 12, width: int = 768, words: int = 50257, positions: int = 1024) -> list[Shape]:
    """The shapes of GPT-2's parameters; the defaults are GPT-2 small, 124 million in 148 tensors."""
    norm: list[Shape] = [(width,), (width,)]
    shapes: list[Shape] = [(words, width), (positions, width)]
    for _ in range(layers):
        shapes += [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return shapes + norm


def llama_shapes(layers: int) -> list[Shape]:
    """Layers of Llama-3-8B, 218 million parameters each: q, k, v, o; gate, up, down; two norms."""
    width, keys, hidden = 4096, 8 * 128, 14336
    attention: list[Shape] = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    return [*attention, *mlp, (width,), (width,)] * layers


def tiny_shapes(tensors: int = 2000) -> list[Shape]:
    """So many tensors, so small, that nothing counts but the work around them."""
    return list(islice(cycle([(16,), (64,), (16, 16), (32, 24)]), tensors))


SETS = ("gpt2", "llama", "tiny")


def shapes_of(source: str, device_type: str) -> list[Shape]:
    """The shapes of the set or the file `source`. On a CPU, llama is one layer of two: that alone takes 10 GB.

    Raises:
        ValueError: there is no such set or file, or a line in it is no shape.
    """
    if source == "gpt2":
        return gpt2_shapes()
    if source == "llama":
        return llama_shapes(1 if device_type == "cpu" else 2)
    if source == "tiny":
        return tiny_shapes()
    path = Path(source)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ValueError(
            f"{source!r} is neither a known set of shapes nor a file. Give {', '.join(SETS)}, or a file's path."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}. Give a file with one shape a line.") from None
    entries = _from_json(text, path) if text.lstrip().startswith("[") else _from_lines(text)
    shapes = [_checked(entry, path, line) for line, entry in entries]
    if not shapes:
        raise ValueError(f"{path}, line 1: there is no shape in this file. Write one a line, such as 768x3072.")
    return shapes


def _from_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Line numbers and sizes; what is no number stays text."""
    for number, line in enumerate(text.splitlines(), 1):
        written = line.split("#")[0].strip()
        if written:
            sizes = re.split(r"\s*[x×,]\s*|\s+", written)
            yield number, [int(size) for size in sizes] if all(s.isdecimal() for s in sizes) else written


def _from_json(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and entries of a JSON list."""
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: this is not JSON: {error.msg}. "
            "Write a list of shapes, such as [[768, 3072], [768]]."
        ) from None
    decoder, end = json.JSONDecoder(), text.index("[") + 1
    for _ in entries:  # once more, one by one, for the lines that they begin in
        start = end + len(text[end:]) - len(text[end:].lstrip(" \t\r\n,"))
        entry, end = decoder.raw_decode(text, start)
        yield text.count("\n", 0, start) + 1, entry


def _checked(entry: Any, path: Path, line: int) -> Shape:
    good = isinstance(entry, list) and all(isinstance(size, int) and 0 < size < 2**40 for size in entry)
    if not good or any(isinstance(size, bool) for size in entry):
        raise ValueError(
            f"{path}, line {line}: {entry!r} is no shape. Write its sizes, each from 1 to 2**40, such as 768x3072."
        )
    return tuple(entry)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One optimizer. `traffic`: bytes for each parameter that its step must at least read and write.

    `memory`: bytes for each parameter that it holds at its peak, beside parameters and gradients.
    """

    name: str
    make: Callable[[list[Tensor]], Optimizer]
    traffic: int
    memory: int = 0
    dtype: torch.dtype = torch.float32  # of parameters and gradients
    only_matrices: bool = False


def _amos(on_nonfinite: str = "ignore", **keywords: Any) -> Callable[[list[Tensor]], Optimizer]:
    """Unchecked, as under ZeRO, where DeepSpeed has looked at the gradients."""
    return lambda params: Amos(params, lr=1e-3, sigma=0.05, on_nonfinite=on_nonfinite, **keywords)


def _monitored(params: list[Tensor]) -> Optimizer:
    optimizer = _amos("skip")(params)
    Monitor(optimizer, every=1)
    return optimizer


def _muon(params: list[Tensor]) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch {torch.__version__} has no torch.optim.Muon")
    return torch.optim.Muon(params, lr=1e-3)


def _apex(params: list[Tensor]) -> Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(params, lr=1e-3)


def _deepspeed(params: list[Tensor]) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    return (FusedAdam if params[0].is_cuda else DeepSpeedCPUAdam)(params, lr=1e-3)


# Reading and writing a float32 parameter takes 8 bytes, a gradient 4, as often as it is needed, each moment 8.
PEERS = {
    "adamw": Variant("AdamW fused", lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True), 28, 8),
    "adamw-foreach": Variant("AdamW foreach", lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True), 28, 16),
    # It also reads the gradient for the size of its update, and the parameter for its own.
    "adafactor": Variant("Adafactor", lambda params: torch.optim.Adafactor(params, lr=1e-3), 24, 8),
    "muon": Variant("Muon, 2-D only", _muon, 20, 8, only_matrices=True),
    "sgd": Variant(
        "SGD fused, momentum", lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True), 20, 4
    ),
    "apex": Variant("apex FusedAdam", _apex, 28, 8),
    "deepspeed": Variant("DeepSpeed Adam", _deepspeed, 28, 8),
}
AMOS = (
    Variant("Amos row", _amos(moments="row"), 12),
    Variant("Amos row, checked", _amos("skip", moments="row"), 16),
    Variant("Amos factored", _amos(), 16),
    Variant("Amos factored, checked", _amos("skip"), 16),
    Variant("Amos factored, checked, looked at", _monitored, 16),
    Variant("Amos column", _amos(moments="column"), 16),
    Variant("Amos scalar", _amos(moments="scalar"), 16),
    Variant("Amos row, momentum", _amos(moments="row", momentum=0.9), 20, 4),
    Variant("Amos factored, momentum", _amos(momentum=0.9), 24, 4),
    Variant("Amos row, bf16 momentum", _amos(moments="row", momentum=0.9, momentum_dtype=torch.bfloat16), 16, 2),
    Variant("Amos factored, bf16 momentum", _amos(momentum=0.9, momentum_dtype=torch.bfloat16), 20, 2),
    Variant("Amos row, 8-bit momentum", _amos(moments="row", momentum=0.9, momentum_dtype=torch.int8), 14, 1),
    Variant("Amos factored, 8-bit momentum", _amos(momentum=0.9, momentum_dtype=torch.int8), 18, 1),
    # bfloat16 gradient read, float32 master read and written, bfloat16 parameter written
    Variant("Amos row, bf16, fp32 master", _amos(moments="row", master_weights=True), 12, 4, torch.bfloat16),
)


def peers_named(names: str) -> list[Variant]:
    """The peers of a list such as "adamw,muon".

    Raises:
        ValueError: one is unknown.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in wanted:
        if name not in PEERS:
            raise ValueError(f"--against {name}: no such optimizer is known here. Known are {', '.join(PEERS)}.")
    return [PEERS[name] for name in wanted]
