"""Numbers to start from: learning rates and weight decays that follow from the data, the scale and the length of a run.

Sources: Tian & Parikh 2022 (arXiv 2210.11693), sections 2 and 5; J. Su, kexue.fm/archives/9344.
"""

from __future__ import annotations

import math
from typing import SupportsFloat

INTERVALS = 400  # of Simpson's rule; its error is far below what a gradient's noise does
HALVINGS = 64  # of an interval, in a search: down to the last bit of a double
LARGEST = math.log(2.0**127)  # of ln(1 + b): a b beyond is none that float32 holds


def suggest_lr(batches: int, predicted: float = 1.0) -> float:
    """1 / sqrt(N), the paper's learning rate (Su's alpha_0) for N independent batches in the training set.

    Of a run that ends before it has seen them all, N are its steps (docs/quality.md).

    Args:
        predicted: the share of a batch's tokens that the loss is taken over, 0.15 for BERT's masked words: N is
            batches / predicted then. Not the paper's, but what a small BERT wanted (docs/quality.md).

    Raises:
        ValueError: there is no batch; or a share that is not above 0 and at most 1.
    """
    if _positive("predicted", predicted) > 1:
        raise ValueError(f"predicted={predicted} is out of range. It is a share: above 0, and at most 1.")
    return math.sqrt(predicted / _positive("batches", batches))


def weight_decay_for(lr: float, sigma: float, q: float = 1.0) -> float:
    """lr / (2 q sigma^2): Su's weight decay as torch's AdamW reads it, for entries of the scale sigma.

    AdamW takes lr * weight_decay * theta off. An Adam-like direction has entries of about 1, so that lr is
    alpha_0 sigma and alpha_0^2 / (2 q) is lr * (lr / (2 q sigma^2)). Keep it while a schedule moves lr.

    Raises:
        ValueError: a number that is not positive.
    """
    return _positive("lr", lr) / (2 * _positive("q", q) * _positive("sigma", sigma) ** 2)


def lr_for_half_life(steps: float, sigma: float, *, c_coef: float = 0.25, d_coef: float = 0.25) -> float:
    """Amos's `lr` for which its own decay halves the learning rate after that many steps.

    Args:
        steps: of a constant lr, without warm-up. sigma: of the parameters that matter most. c_coef, d_coef: Amos's.

    Raises:
        ValueError: a number that is not positive, or so few steps that no lr up to 1 halves in them.
    """
    _positive("steps", steps)
    low, high = 1e-12, 1.0
    for name, value in (("sigma", sigma), ("d_coef", d_coef)):
        _positive(name, value)
    if half_life(low, sigma, c_coef, d_coef) < steps:
        raise ValueError(f"steps={steps} is too many: with lr={low} the rate has halved by then. Give fewer steps.")
    if half_life(high, sigma, c_coef, d_coef) > steps:
        raise ValueError(f"steps={steps} is too few: with lr=1 the rate has not halved by then. Give more steps.")
    while high / low > 1 + 1e-12:  # half_life falls as lr rises
        middle = math.sqrt(low * high)
        low, high = (low, middle) if half_life(middle, sigma, c_coef, d_coef) < steps else (middle, high)
    return high


def half_life(lr: float, sigma: float, c_coef: float = 0.25, d_coef: float = 0.25) -> float:
    """Steps until Amos's d = 1 / (1 + d_coef sqrt(lr sigma) b) is 1/2, for gradients that keep their size.

    Raises:
        ValueError: a number that is not positive (c_coef: negative).
    """
    for name, value in (("lr", lr), ("sigma", sigma), ("d_coef", d_coef)):
        _positive(name, value)
    if not 0 <= c_coef < math.inf:
        raise ValueError(f"c_coef={c_coef!r} is out of range. Give a finite number, 0 or more.")
    return _steps_until(math.log1p(1 / (d_coef * math.sqrt(lr * sigma))), lr, c_coef)


def decay_after(steps: float, lr: float, *, c_coef: float = 0.25) -> float:
    """Amos's b after that many steps, for gradients that keep their size: `decay_init` of weights that had them.

    About exp(lr^2 steps) - 1 up to a b of 1 / (c_coef sqrt(lr)), and less beyond. See docs/finetuning.md.

    Args:
        steps: at a constant lr; of a schedule, the sum of its squared rates over lr^2. 0 gives 0.
        lr: Amos's, in the training that is over. c_coef: Amos's.

    Raises:
        ValueError: a number that is out of range, or so many steps that b is beyond float32.
    """
    _positive("lr", lr)
    for name, value in (("steps", steps), ("c_coef", c_coef)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} is out of range. Give a finite number, 0 or more.")
    low, high = 0.0, LARGEST
    try:
        most = _steps_until(high, lr, c_coef)
    except ArithmeticError:
        raise ValueError(f"lr={lr!r} is out of range. Give that of the training, such as 0.01.") from None
    if most < steps:
        raise ValueError(
            f"steps={steps!r} at lr={lr!r} bring b beyond what float32 can hold. "
            "Give fewer steps, or the lr that the training really had."
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _steps_until(middle, lr, c_coef) < steps else (low, middle)
    return math.expm1(low)


def _steps_until(end: float, lr: float, c_coef: float) -> float:
    """Steps until x = ln(1 + b) is `end`.

    b grows by b <- b + gamma (1 + b) with gamma = lr^2 / sqrt(1 + c_coef sqrt(lr) b), so that x grows by ln(1 + gamma)
    in a step: the steps are the integral of dx / ln(1 + gamma).
    """

    def steps_for(x: float) -> float:
        gamma = lr**2 / math.sqrt(1 + c_coef * math.sqrt(lr) * math.expm1(x))
        return 1 / math.log1p(gamma)

    width = end / INTERVALS
    inner = sum((4 if i % 2 else 2) * steps_for(i * width) for i in range(1, INTERVALS))
    return width / 3 * (steps_for(0) + inner + steps_for(end))


def _positive(name: str, value: float) -> float:
    if not isinstance(value, SupportsFloat) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r} is out of range. Give a positive number.")
    return float(value)
