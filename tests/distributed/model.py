"""The model that the ranks train, and its batches."""

from __future__ import annotations

import torch
from torch import nn


class Model(nn.Module):
    """Odd sizes, a convolution, a parameter smaller than a row, a frozen and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 13)
        self.conv = nn.Conv1d(13, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(5, 11, bias=False)
        self.tiny = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.inner(self.embed(x)))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = self.frozen(self.norm(h)) + self.tiny(h.mean(-1, keepdim=True))
        loss = nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), x.flatten())
        return loss + 0.0 * self.unused.weight.float().sum() * 0.0


def batch(step: int, size: int) -> torch.Tensor:
    return torch.randint(0, 11, (size, 9), generator=torch.Generator().manual_seed(100 + step))
