"""Tensors that are the group's own parameters: plain torch, DDP, DeepSpeed's ZeRO stage 0, and, cut, DTensors."""

from __future__ import annotations

import torch

from . import dtensor
from .layout import Layout, Original


def followers(tensors: list[torch.Tensor], originals: list[Original]) -> list[tuple[Original, torch.Tensor]]:
    """The DTensors that are in the places of a group's parameters and were made of them: those of the same shape.

    Copies of parameters that frameworks step in their stead are no DTensors.
    """
    if len(tensors) != len(originals):
        return []
    return [
        (original, tensor)
        for original, tensor in zip(originals, tensors, strict=True)
        if original.param is not tensor and dtensor.is_dtensor(tensor) and original.shape == tuple(tensor.shape)
    ]


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
    if dtensor.is_dtensor(tensor):
        return None
    trainable = [original for original in originals if original.trainable]
    if index < len(trainable) and trainable[index].shape == tuple(tensor.shape):
        return Layout([trainable[index].whole()], clone=True)
    return None
