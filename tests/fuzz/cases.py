"""What the cases are made of, drawn from a random.Random."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from amos_dist import ops

Shape = tuple[int, ...]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 300, 1025, 4100)
KINDS = ("factored", "row", "column", "scalar", "full")
NATIVE = (None, False, True) if ops.build_info()["extension"] else (None, False)

OPTIONS: dict[str, tuple[Any, ...]] = {
    "beta": (0.0, 0.5, 0.9, 0.999),
    "momentum": (0.0, 0.3, 0.9),
    "moments": KINDS,
    "clip_value": (None, 0.02, 1.5),
    "extra_l2": (0.0, 0.01),
    "c_coef": (0.0, 0.25, 2.0),
    "d_coef": (0.0, 0.25, 2.0),
    "eps": (2**-125, 1e-8),
    "decay_init": (0.0, 0.5, 300.0),
    "momentum_dtype": (None, "float32", "bfloat16", torch.bfloat16, "int8"),
    "maximize": (False, True),
    "foreach": (None, False, True),
    "fused": NATIVE,
    "capturable": (False, True),
    "master_weights": (False, True),
    "stochastic_rounding": (False, True),
    "seed": (0, 1, 2**31 - 1),
    "on_nonfinite": ("skip", "ignore"),
}
# Gradients: their size, and what is special about them.
STYLES = ("plain", "plain", "plain", "rows", "zeros", "sparse", "tiny", "large", "nan", "inf")


def shape(draw: Random, dims: tuple[int, int] = (0, 5), largest: int = 4200, empty: bool = True) -> Shape:
    """0-d to 5-d, up to `largest` elements; now and then, where `empty`, none at all."""
    found: list[int] = []
    room = largest
    for _ in range(draw.randint(*dims)):
        found.append(draw.choice([size for size in SIZES if size <= room]))
        room //= found[-1]
    draw.shuffle(found)
    if empty and found and draw.randrange(20) == 0:
        found[draw.randrange(len(found))] = 0
    return tuple(found)


def values(seed: int, size: Shape, dtype: torch.dtype, style: str = "plain") -> Tensor:
    """Numbers of a parameter or a gradient; the seed says all."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(size, generator=generator, dtype=torch.float64)
    if style == "rows" and found.dim() > 1 and len(found):
        found *= torch.logspace(-3, 0, len(found)).view(-1, *[1] * (found.dim() - 1))
    elif style == "zeros":
        found.zero_()
    elif style == "sparse":
        found *= torch.rand(size, generator=generator) < 0.1
    elif style == "tiny":
        found *= 1e-4 if dtype == torch.float16 else 1e-12
    elif style == "large":
        found *= 1e3 if dtype == torch.float16 else 1e9
    elif style in ("nan", "inf") and found.numel():
        found.view(-1)[seed % found.numel()] = float(style) * (1 if seed % 2 else -1)
    return found.to(dtype)


def laid_out(draw: Random, tensor: Tensor) -> Tensor:
    """The same numbers, maybe not contiguous."""
    if tensor.dim() < 2 or draw.randrange(4):
        return tensor
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def row_dims(draw: Random, shapes: list[Shape]) -> int:
    """One that all of them can have."""
    return draw.randint(1, max(1, min((len(each) - 1 for each in shapes if len(each) > 1), default=1)))


def keywords(draw: Random, shapes: list[Shape], often: float = 0.3) -> dict[str, Any]:
    """Good keywords for parameters of those shapes."""
    found = {key: draw.choice(options) for key, options in OPTIONS.items() if draw.random() < often}
    found["lr"] = draw.choice((0.05, 0.01, 0.3, torch.tensor(0.1), 0.0))
    found["sigma"] = draw.choice(("auto", 0.3, 0.02, 2.0))
    found["row_dims"] = row_dims(draw, shapes)
    if found.get("fused") and found.get("foreach"):
        del found["foreach"]
    return found


def group(draw: Random, number: int, dtypes: tuple[torch.dtype, ...] = DTYPES, most: int = 4) -> dict[str, Any]:
    """A parameter group of good parameters and keywords, named after its number."""
    shapes = [shape(draw) for _ in range(draw.randint(1, most))]
    params = []
    for i, size in enumerate(shapes):
        start = values(draw.randrange(10**6), size, draw.choice(dtypes), draw.choice(("plain", "plain", "zeros")))
        params.append((f"g{number}.p{i}", laid_out(draw, start / 2).requires_grad_()))
    return {"params": params, **keywords(draw, shapes)}


def gradient(draw: Random, param: Tensor, missing: float = 0.15) -> Tensor | None:
    """A gradient for `param`, or none."""
    if draw.random() < missing:
        return None
    dtype, size = param.dtype, tuple(param.shape)
    return laid_out(draw, values(draw.randrange(10**6), size, dtype, draw.choice(STYLES)))


# ---- JSON ----------------------------------------------------------------------------------------------------------

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.1, -0.5, 1e-3, 0.9, 1.0, 2, 7, 1e-300, 1e300, 5e-324),
    *(10**400, -(10**400), 2**31, 2**31 - 1, 2**63, math.nan, math.inf, -math.inf),
    *("", "auto", "paper", "0.1", "float32", "bfloat16", "float16", "factored", "rows", "nn", "Tensor", "é\n\0"),
    *([], [0.1], [0.9, 0.99], [[[]]], {}, {"match": "."}, [{"match": "."}], [{"match": "("}], [{}], [None]),
)
ODD_KEYS = ("momentun", "weight_decay", "betas", "", "LR", "lr ", "moment", "torch_adam", "adam_w_mode", "é", "rules.0")


def document(draw: Random, known: tuple[str, ...]) -> dict[str, Any]:
    """The "params" of a DeepSpeed "optimizer" block: mostly good, with something odd in most. known: keywords."""
    found: dict[str, Any] = {"lr": 0.05} if draw.randrange(20) else {}
    for key, options in OPTIONS.items():
        if draw.random() < 0.1:
            found[key] = draw.choice([value for value in options if not isinstance(value, torch.dtype)])
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        key = draw.choice(known) if draw.randrange(5) else draw.choice(ODD_KEYS)
        found[key] = odd(draw)
    if draw.randrange(3) == 0:
        found["rules"] = [rule(draw, known) for _ in range(draw.randint(1, 3))]
    return found


def odd(draw: Random, depth: int = 0) -> Any:
    """Any value that a JSON document can have."""
    if depth < 3 and draw.randrange(8) == 0:
        inner = [odd(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        return inner if draw.randrange(2) else {str(i): each for i, each in enumerate(inner)}
    return draw.choice(ODD_VALUES)


def rule(draw: Random, known: tuple[str, ...]) -> Any:
    """One of the rules of a document."""
    if draw.randrange(10) == 0:
        return odd(draw)
    found: dict[str, Any] = {"match": draw.choice((".", "weight", "bias$", r"^0\.", "nowhere", "(", "", "\\"))}
    for _ in range(draw.randint(0, 2)):
        key = draw.choice(known)
        options = [v for v in OPTIONS.get(key, (0.1, 0.5)) if not isinstance(v, torch.dtype)]
        found[key] = draw.choice(options) if draw.randrange(3) else odd(draw)
    return found
