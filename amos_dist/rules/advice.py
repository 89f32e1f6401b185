"""What a parameter's place in the model says about it: the paper's sigma, how it is laid out, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ..sharding.zero import original_shape
from . import names


class Advice(NamedTuple):
    """What a parameter's place in the model says about it.

    Attributes:
        sigma: the paper's; "auto" where it has none for such a parameter.
        row_dims, moments: how it is to be read; moments: None where it has no say.
        reason: of sigma.
        fan_in: inputs of an output unit; None for what is no kernel.
        notes: of its layout, and what it is tied to.
    """

    sigma: float | str
    row_dims: int
    moments: str | None
    reason: str
    fan_in: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a model holds a parameter.

    Attributes:
        path: of its module, without what wrappers add. name: in its module.
        around: what the module is in, the nearest first.
        activations: see `_activations_read`. recurrent: see `_beside_recurrent`.
    """

    path: str
    name: str
    module: nn.Module
    around: tuple[nn.Module, ...]
    shape: tuple[int, ...]
    activations: dict[int, str]
    recurrent: dict[int, str]

    @property
    def activation(self) -> str:
        """The class of the activation that the module reads, or ""."""
        return self.activations.get(id(self.module), "")

    @property
    def beside(self) -> str:
        """The class of the recurrent net whose hidden states the module reads, or which reads an embedding, or ""."""
        return self.recurrent.get(id(self.module), "")

    @property
    def kind(self) -> str:
        """The class of the module; fully_shard and parametrizations make one of their own."""
        return type(self.module).__name__.removeprefix("FSDP").removeprefix("Parametrized")

    @property
    def leaf(self) -> str:
        return self.path.rsplit(".", 1)[-1]


_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.Mish, nn.Hardswish, nn.PReLU)
_ACTIVATION_KIND = re.compile(r"ReLU|GELU|SiLU|ELU|Mish|Swish|Activation")
_PASS = (nn.Dropout, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.Flatten)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)


def advise(model: nn.Module) -> dict[str, Advice]:
    """The paper's sigma, row_dims and moments for each parameter of `model`, by its full name (tied ones once).

    Raises:
        ValueError: a parameter of a lazy module has no shape yet.
    """
    places: dict[int, dict[str, Place]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    activations, recurrent = _activations_read(model), _beside_recurrent(model)
    for prefix, module in modules.items():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{prefix}.{name}" if prefix else name
            if is_lazy(param):
                raise ValueError(f"parameter {full!r} has no shape yet: its module is lazy. Run one batch through it.")
            parts = prefix.split(".") if prefix else []
            around = tuple(modules[".".join(parts[:i])] for i in reversed(range(len(parts))))
            place = Place(names.own_path(prefix), name, module, around, original_shape(param), activations, recurrent)
            places.setdefault(id(param), {})[full] = place
    return {next(iter(each)): _advise_tied(each) for each in places.values()}


def _activations_read(model: nn.Module) -> dict[int, str]:
    """The class of the activation that modules read, by id(module), as far as the order of registration tells.

    It is the module registered before them, pooling and dropout aside. What a wrapper reads its module reads.
    """
    found: dict[int, str] = {}
    for parent in model.modules():
        before: nn.Module | None = None
        for child in parent.children():
            if before is not None and _is_activation(before):
                found[id(child)] = type(before).__name__
            if not isinstance(child, _PASS):
                before = child
        if id(parent) in found:
            for wrapper in names.WRAPPERS & dict(parent.named_children()).keys():
                found[id(getattr(parent, wrapper))] = found[id(parent)]
    return found


def _beside_recurrent(model: nn.Module) -> dict[int, str]:
    """The class of the recurrent net beside modules, by id(module), as far as the order of registration tells.

    Embeddings are before it, Linears and other recurrent nets after it, with nothing else between, and of its width.
    """
    found: dict[int, str] = {}
    for parent in model.modules():
        embeddings: list[nn.Module] = []
        net: nn.Module | None = None
        made: set[int] = set()  # widths of Linears since then: what has them reads these
        for child in parent.children():
            if isinstance(child, _EMBEDDING):
                embeddings.append(child)
                net = None
            elif isinstance(child, _RECURRENT):
                read = [each for each in embeddings if each.embedding_dim == child.input_size]
                if read or (net is not None and child.input_size in _hidden_widths(net)):
                    found |= {id(each): type(child).__name__ for each in (*read, child)}
                net, made = child, set()
            elif isinstance(child, nn.Linear) and net is not None:
                if child.in_features in _hidden_widths(net) - made:
                    found[id(child)] = type(net).__name__
                made.add(child.out_features)
            elif not isinstance(child, _PASS):
                embeddings, net = [], None
    return found


def _hidden_widths(net: Any) -> set[int]:
    width = getattr(net, "proj_size", 0) or net.hidden_size
    return {width, 2 * width} if getattr(net, "bidirectional", False) else {width}


def _is_activation(module: nn.Module) -> bool:
    named = _ACTIVATION_KIND.search(type(module).__name__) and next(module.parameters(), None) is None
    return isinstance(module, _ACTIVATIONS) or bool(named)


def _advise_tied(places: dict[str, Place]) -> Advice:
    """By the full names of one parameter: an embedding decides, else the first place, which gives the name."""
    first, *others = places
    if not others:
        return _advise(places[first])
    found = [_advise(place) for place in places.values() if isinstance(place.module, nn.Embedding)]
    advice = found[0] if found else _advise(places[first])
    return advice._replace(notes=(*advice.notes, f"tied to {', '.join(others)}: counted once"))


def _advise(place: Place) -> Advice:
    return next(advice for rule in _RULES if (advice := rule(place)) is not None)


def root(gain: int, number: int, what: str = "fan_in") -> tuple[float, str]:
    """The square root of gain/number, and how it is written."""
    return math.sqrt(gain / max(1, number)), f"√({gain}/{what}), {what} {number}"


def _kernel(
    what: str, gain: int, fan_in: int, row_dims: int = 1, moments: str | None = None, notes: tuple[str, ...] = ()
) -> Advice:
    sigma, formula = root(gain, fan_in)
    return Advice(sigma, row_dims, moments, f"{what}: {formula}", fan_in, notes)


def _of_hidden(what: str, number: int, called: str = "fan_in", times: float = 1) -> Advice:
    """What reads the hidden states of a recurrent net, or makes its inputs: n of them have a scale of n^(-1/4).

    That is the scale to which the paper's LSTM normalizes its inputs, and torch's finds it by itself (docs/sigma.md).
    """
    formula = f"{times:g}·" * (times != 1) + f"{called}^(-1/4), {called} {number}"
    return Advice(times * max(1, number) ** -0.25, 1, None, f"{what}: {formula}", number)


def _times(recurrent: str) -> float:
    """An LSTM's kernels, and what reads it, learn twice as fast as those of other classes: measured (docs/sigma.md)."""
    return 2.0 if "LSTM" in recurrent else 1.0


# ---- rules: each has an opinion, or None; the first that has one decides --------------------------------------------


def _lora(place: Place) -> Advice | None:
    """The factors of peft, which the paper does not have: with these B·A gets its scale of the kernel or embedding."""
    factor = re.search(r"(^|\.)lora_(embedding_)?([AB])\.[^.]+$", f"{place.path}.{place.name}".removesuffix(".weight"))
    if factor is None:
        return None
    if factor[3] == "B":
        adapter, layer = (place.leaf, place.around[1]) if place.name == "weight" else (place.name, place.around[0])
        ranks = getattr(layer, "r", None)  # stacked experts have their factors side by side
        rank = ranks[adapter] if isinstance(ranks, dict) and adapter in ranks else place.shape[1]
        sigma, formula = root(1, rank, "rank")
        return Advice(sigma, 1, None, f"LoRA B: {formula}", rank)
    if factor[2]:
        embedding: Any = place.around[0]
        width = original_shape(embedding.lora_embedding_B[place.name])[0]
        sigma, formula = root(2, width, "width")
        note = "(rank, words): a word is dim 1"
        return Advice(sigma, 1, "column", f"LoRA A of an embedding: {formula}", width, (note,))
    return _kernel("LoRA A", 1, math.prod(place.shape[1:]))


def _parametrized(place: Place) -> Advice | None:
    """What stands for a tensor: weight_norm's direction and magnitudes, DoRA's magnitudes, spectral_norm's tensor."""
    found = _stands_for(place)
    if found is None:
        return None
    tensor, what, is_magnitude = found
    advice = _advise(tensor)
    if not is_magnitude:
        return advice._replace(notes=(*advice.notes, what))
    if isinstance(advice.sigma, str):
        return Advice("auto", 1, None, f"{what}: auto")
    count = math.prod(tensor.shape) // max(1, math.prod(place.shape))
    return Advice(advice.sigma * math.sqrt(count), 1, None, f"{what}: √{count}·σ of {count} entries; {advice.reason}")


def _stands_for(place: Place) -> tuple[Place, str, bool] | None:
    """The tensor that a parametrization's parameter stands for; how; whether it has the norms of its parts."""
    module, name = place.module, place.name
    if type(module).__name__ == "ParametrizationList":  # its names are original, or original0, original1, …
        kind = type(module[0]).__name__.strip("_")  # type: ignore[index]
        path, _, tensor = place.path.rpartition("parametrizations.")
        host = replace(place, path=path.rstrip("."), name=tensor, module=place.around[1], around=place.around[2:])
        if name == "original":
            return host, f"under {kind}", False
        if kind != "WeightNorm":
            return None
        whole = replace(host, shape=original_shape(module.original1))
        if name == "original0":
            return whole, "weight_norm's magnitude", True
        return whole, "weight_norm's direction", False
    tensor, _, suffix = name.rpartition("_")  # before torch 2.0 they were beside it
    if suffix == "orig" and hasattr(module, f"{tensor}_u"):
        return replace(place, name=tensor), "under spectral_norm", False
    if suffix in ("g", "v") and hasattr(module, f"{tensor}_g") and hasattr(module, f"{tensor}_v"):
        whole = replace(place, name=tensor, shape=original_shape(getattr(module, f"{tensor}_v")))
        return whole, "weight_norm's " + ("magnitude" if suffix == "g" else "direction"), suffix == "g"
    if dora := re.fullmatch(r"(?:(.*)\.)?lora_magnitude_vector\.[^.]+", place.path):
        base: Any = place.around[1].base_layer
        whole = replace(place, path=dora[1] or "", name="weight", module=base, shape=original_shape(base.weight))
        return whole, "DoRA's magnitude", True
    return None


def _relative(place: Place) -> Advice | None:
    is_kernel = isinstance(place.module, (nn.Linear, *_CONV))
    if len(place.shape) < 2 or is_kernel or not names.RELATIVE.search(f"{place.leaf}.{place.name}"):
        return None
    return Advice(0.5, 1, None, "relative positions: 0.5")


def _bias(place: Place) -> Advice | None:
    return Advice(0.5, 1, None, "bias: 0.5") if names.BIAS.search(place.name) else None


def _normalization(place: Place) -> Advice | None:
    if len(place.shape) < 2:
        is_norm = bool(names.NORM.search(place.kind) or names.NORM.search(place.leaf))
    else:
        is_norm = isinstance(place.module, (nn.LayerNorm, nn.RMSNorm))
    if not is_norm:
        return None
    if names.CENTERED_NORM.search(place.kind):
        return Advice(0.5, 1, None, f"scale of {place.kind} less 1, like a bias: 0.5")
    return Advice(1.0, 1, None, "scale of a normalization: 1")


def _vector(place: Place) -> Advice | None:
    return Advice(0.5, 1, None, f"{len(place.shape)}-d: 0.5") if len(place.shape) < 2 else None


def _embedding(place: Place) -> Advice | None:
    if isinstance(place.module, (nn.Linear, *_CONV, *_TRANSPOSED)):
        return None
    is_module = isinstance(place.module, _EMBEDDING)
    if is_module and place.beside:
        return _of_hidden(f"embedding before {place.beside}", place.shape[-1], "width")
    if not is_module and not names.EMBEDDING.search(place.name) and "embed" not in place.kind.lower():
        return None
    if len(place.shape) == 4 and place.shape[2] == place.shape[3] != place.shape[1]:  # positions of a grid of patches
        sigma, formula = root(2, place.shape[1], "width")
        return Advice(sigma, 2, None, f"embedding of a square grid: {formula}")
    sigma, formula = root(2, place.shape[-1], "width")
    return Advice(sigma, len(place.shape) - 1, None, f"embedding: {formula}")


def _attention(place: Place) -> Advice | None:
    if not isinstance(place.module, nn.MultiheadAttention):
        return None
    packed = place.name == "in_proj_weight"
    return _kernel("packed query, key and value" if packed else "query, key or value", 1, place.shape[1])


def _recurrent(place: Place) -> Advice | None:
    if not isinstance(place.module, _RECURRENT) or not place.name.startswith("weight_"):
        return None
    fan_in = place.shape[1]
    if place.name.startswith("weight_hr"):
        return _of_hidden(f"projection of {place.kind}", fan_in)
    gates = place.shape[0] // place.module.hidden_size
    what = f"{gates} packed gates of {place.kind}" if gates > 1 else place.kind
    times = _times(place.kind)
    if place.name.startswith("weight_hh"):
        return _of_hidden(f"hidden state to {what}", fan_in, times=times)
    is_first = place.name == "weight_ih" or "_l0" in place.name
    if is_first and not place.beside:
        return _kernel(f"input to {what}", 1, fan_in)
    return _of_hidden(f"input to {what}", fan_in, times=times)


def _convolution(place: Place) -> Advice | None:
    if isinstance(place.module, _TRANSPOSED):
        fan_in = place.shape[0] // place.module.groups * math.prod(place.shape[2:])
        what = "transposed convolution" + (f" after {place.activation}" if place.activation else "")
        note = f"{place.kind} is (in, out, ...): rows are (in, out)"
        return _kernel(what, 2 if place.activation else 1, fan_in, row_dims=2, notes=(note,))
    if not isinstance(place.module, _CONV):
        return None
    fan_in = math.prod(place.shape[1:])
    if place.activation:
        return _kernel(f"convolution after {place.activation}", 2, fan_in)
    if place.module.in_channels <= 4:
        return _kernel(f"convolution on pixels ({place.module.in_channels} channel(s))", 8, fan_in)
    return _kernel("convolution", 2, fan_in)


def _matrix(place: Place) -> Advice | None:
    """Matrices, of modules that are kernels or are called so."""
    if isinstance(place.module, nn.Bilinear):
        return _kernel("bilinear kernel", 1, math.prod(place.shape[1:]))
    called = names.KERNEL_NAME.fullmatch(place.name) or names.KERNEL_KIND.search(place.kind)
    if len(place.shape) != 2 or not (isinstance(place.module, nn.Linear) or called):
        return None
    if place.beside:
        return _of_hidden(f"kernel after {place.beside}", place.shape[1], times=2.5 * _times(place.beside))
    is_bare = not re.fullmatch(r"weights?|kernel", place.name, re.IGNORECASE)
    gain, what = names.role(f"{place.path}.{place.name}" if is_bare else place.path, place.activation)
    if place.kind == "Conv1D":
        note = "weight of Conv1D (in, out): output is dim 1"
        return _kernel(what, gain, place.shape[0], moments="column", notes=(note,))
    return _kernel(what, gain, place.shape[1])


def _experts(place: Place) -> Advice | None:
    called = re.search(r"expert|moe", f"{place.kind} {place.path}.{place.name}", re.IGNORECASE)
    known = called or any(hasattr(place.module, name) for name in ("is_transposed", "num_experts"))
    if len(place.shape) != 3 or math.prod(place.shape) == max(place.shape) or not known:
        return None
    gain, _ = names.role(f"experts.{place.name}")
    what = "stacked MLP outputs, after the activation" if gain == 2 else "stacked kernels"
    if getattr(place.module, "is_transposed", names.TRANSPOSED_EXPERTS.search(place.kind)):
        note = "(E, in, out): a row is an input of an expert, output is dim 2"
        return _kernel(what, gain, place.shape[1], row_dims=2, notes=(note,))
    return _kernel(what, gain, place.shape[2], row_dims=2, notes=("(E, out, in): a row is an output of an expert",))


def _unknown(place: Place) -> Advice:
    if math.prod(place.shape) == max(place.shape, default=1):
        return Advice(0.5, 1, None, "a vector in all but its shape: 0.5")
    return Advice("auto", 1, None, f"no rule for {place.name} of {place.kind}: auto")


_RULES: tuple[Callable[[Place], Advice | None], ...] = (
    _lora,
    _parametrized,
    _relative,
    _bias,
    _normalization,
    _vector,
    _embedding,
    _attention,
    _recurrent,
    _convolution,
    _matrix,
    _experts,
    _unknown,
)
