"""Tensors that are whole parameters: plain torch, DDP, and DeepSpeed's ZeRO stage 0."""

from __future__ import annotations

import torch

from .layout import Layout, Original


def find(tensor: torch.Tensor, originals: list[Original]) -> Layout | None:
    """The layout of `tensor` if it is one of its group's parameters."""
    for original in originals:
        if original.param is tensor:
            return Layout([original.whole()])
    return None


def find_clone(tensor: torch.Tensor, index: int, originals: list[Original]) -> Layout | None:
    """The layout of `tensor`, the index-th of its group, if it is a copy of a parameter.

    DeepSpeed's stage 0 in fp16 and bf16 hands over float32 clones of the trainable parameters, in their order.
    """
    trainable = [original for original in originals if original.trainable]
    if index < len(trainable) and trainable[index].shape == tuple(tensor.shape):
        return Layout([trainable[index].whole()], clone=True)
    return None
