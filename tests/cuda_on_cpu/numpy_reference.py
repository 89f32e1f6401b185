"""Amos in plain numpy and float64, for one R x C matrix: written from the paper's formulas, not from the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class Hyper:
    """One parameter's numbers for one step; the fields, and their order, are those of `amos::Hyper`."""

    lr: float = 0.3
    sigma: float = 0.5
    beta: float = 0.9
    t: float = 3.0
    momentum: float = 0.9
    clip: float = np.inf
    extra_l2: float = 0.01
    c_coef: float = 0.25
    d_coef: float = 0.25
    eps: float = 2.0**-125
    grad_sign: float = 1.0
    seed: float = -1.0

    @property
    def bias(self) -> float:
        return 1 - self.beta**self.t


@dataclass
class State:
    """What a parameter remembers; `decay` has one entry for each row, or for each column of "column"."""

    row_moment: Array
    column_moment: Array
    decay: Array
    momentum: Array | None = None


def step(theta: Array, grad: Array, state: State, moments: str, h: Hyper) -> tuple[Array, State]:
    """What is taken from the parameter, and the next state. `moments` is "row", "column" or "factored"."""
    g = np.clip(grad, -h.clip, h.clip)
    squares = g * g
    row_moment, column_moment = state.row_moment, state.column_moment
    if moments != "column":
        row_moment = h.beta * row_moment + (1 - h.beta) * squares.mean(1)
    if moments != "row":
        column_moment = h.beta * column_moment + (1 - h.beta) * squares.mean(0)

    # The moment that an element is divided by, and the one that its weight decay sees.
    if moments == "row":
        G, v = squares.mean(1), row_moment
        element_v = np.broadcast_to(v[:, None], g.shape)
    elif moments == "column":
        G, v = squares.mean(0), column_moment
        element_v = np.broadcast_to(v[None, :], g.shape)
    else:
        G, v = squares.mean(1), row_moment
        mean = column_moment.mean()
        profile = np.ones_like(column_moment) if mean == 0 else column_moment / mean
        element_v = v[:, None] * profile[None, :]

    def spread(x: Array) -> Array:
        return x[None, :] if moments == "column" else x[:, None]

    b = state.decay
    gamma = h.lr**2 * G * h.bias / np.maximum(v, h.eps) / np.sqrt(1 + h.c_coef * np.sqrt(h.lr) * b)
    d = 1 / (1 + h.d_coef * np.sqrt(h.lr * h.sigma) * b)
    rate = h.lr * h.sigma * np.sqrt(h.bias / np.maximum(element_v, h.eps))
    delta = spread(d) * (rate * h.grad_sign * g + (spread(gamma) / 2 + h.extra_l2) * theta)
    momentum = state.momentum
    if momentum is not None:
        momentum = h.momentum * momentum + (1 - h.momentum) * delta
        delta = momentum
    return delta, State(row_moment, column_moment, b + gamma * (1 + b), momentum)


def mixed(x: Array | int, salt: int) -> Array:
    """Spreads a change of one bit of 32-bit numbers over all."""
    x = np.asarray(x, np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD) ^ np.uint32(salt)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97)
    return x ^ (x >> np.uint32(15))


def random_bits(index: Array, h: Hyper) -> Array:
    """32 random bits for each element number of a parameter, at step t."""
    with np.errstate(over="ignore"):
        key = mixed(int(h.seed if h.seed >= 0 else -1 - h.seed), int(h.t))
        low, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
        return mixed(low ^ (key + high * np.uint32(0x9E3779B1)), int(mixed(key, 0x9E3779B9)))


RUN = 256


def run_scales(x: Array) -> Array:
    """Of each run: a little less than a 127th of the largest; 0 below 2**-100, NaN where one is not finite."""
    runs = np.abs(np.pad(x, (0, -len(x) % RUN)).reshape(-1, RUN))
    largest = np.where(np.isfinite(runs).all(1), runs.max(1, initial=0), np.nan)
    with np.errstate(all="ignore"):
        units = 2 ** (np.floor(np.log2(largest / 127)) - 15)  # of 16 bits
        return np.where(largest < 2**-100, 0, np.floor(largest / 127 / units * (1 - 2**-20)) * units)


def levels(x: Array, scales: Array, index: Array, h: Hyper) -> Array:
    """Whole multiples of the runs' scales, up or down by chance."""
    with np.errstate(all="ignore"):
        multiples = np.nan_to_num(x / np.repeat(scales, RUN)[: len(x)], posinf=0, neginf=0)
    return np.clip(np.floor(multiples + (random_bits(index, h) & np.uint32(0xFFFF)) / 2**16), -127, 127)


def round_stochastically(x: Array, index: Array, h: Hyper) -> Array:
    """The bits of a bfloat16 next to each float32: away from zero with a probability of the part that is cut off."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + (random_bits(index, h) >> np.uint32(16))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
