"""Tensors that are the group's own parameters: plain torch, DDP, DeepSpeed's ZeRO stage 0, and, cut, DTensors."""

from __future__ import annotations

import torch

from . import dtensor
from .layout import Layout, Original


def find(tensor: torch.Tensor, originals: list[Original]) -> Layout | None:
    """The layout of `tensor` if it is one of its group's parameters."""
    for original in originals:
        if original.param is tensor:
            return dtensor.find(tensor, original) if dtensor.is_dtensor(tensor) else Layout([original.whole()])
    return None


def find_clone(tensor: torch.Tensor, index: int, originals: list[Original]) -> Layout | None:
    """The layout of `tensor`, the index-th of its group, if it is a copy of a parameter.

    DeepSpeed's stage 0 in fp16 and bf16 hands over float32 clones of the trainable parameters, in their order.
    """
    trainable = [original for original in originals if original.trainable]
    if index < len(trainable) and trainable[index].shape == tuple(tensor.shape):
        return Layout([trainable[index].whole()], clone=True)
    return None
