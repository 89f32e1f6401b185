"""A small modern GPT: RMSNorm before each sub-layer, rotary positions, a GELU MLP, no biases.

Names end in `embedding.weight`, `attention.{q,k,v,out}.weight`, `mlp.{up,out}.weight`, `norm*.weight` and
`head.weight`: name rules (`"rules"` in the optimizer's JSON) can pick them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of the model. `sequence` and `vocabulary` are in tokens, `width` in features."""

    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int = 256  # bytes
    tied: bool = False  # the head is the embedding's transpose


SIZES = {
    "tiny": Config(layers=2, width=64, heads=2, sequence=64),  # 0.13 M parameters, for tests
    "small": Config(layers=4, width=160, heads=5, sequence=128),  # 1.3 M, the quickstart
    "medium": Config(layers=12, width=512, heads=8, sequence=512),  # 38 M
    "gpt2": Config(layers=12, width=768, heads=12, sequence=1024, vocabulary=50257, tied=True),  # 124 M
}


class Linear(nn.Linear):
    """A layer without bias whose outputs start with `gain` times the mean square of its inputs."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=math.sqrt(gain / inputs))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features (j, j + half) of x (…, sequence, features) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)  # angles may be float32


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, config.width)
        self.v = Linear(config.width, config.width)
        self.out = Linear(config.width, config.width, gain=0.5 / config.layers)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        layers = (self.q, self.k, self.v)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.activation = nn.GELU()  # a module, so that "sigma": "paper" sees what `out` reads
        self.out = Linear(4 * config.width, config.width, gain=0.5 / config.layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """tokens (batch, sequence + 1) → the mean cross-entropy of each token given those before it, in nats."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = Linear(config.width, config.vocabulary)
        if config.tied:
            self.head.weight = self.embedding.weight

        half = config.width // config.heads // 2
        angle = torch.outer(torch.arange(config.sequence), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        cos, sin = self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]]
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
