"""What fits into a device's memory, and the largest model that does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..models import Parameter, total
from .estimates import Setting, estimate

MOST_LAYERS = 2**16
RULE = "more or fewer layers, each as the last one; without layers, each parameter as those of a second such model"


class Largest(NamedTuple):
    """The largest model of a kind that fits. layers: 0: it has none, and was scaled as a whole."""

    elements: int
    layers: int


class _Stack(NamedTuple):
    """Parameters that stand together in a model. layers: of what is numbered: name behind the number, and shape."""

    prefix: str
    layers: list[list[Parameter]]
    is_repeated: bool


def _split(name: str) -> tuple[str, int, str] | None:
    """What stands before the first number between dots, that number, and the rest."""
    found = re.match(r"((?:[^.]+\.)*?)(\d+)\.(.+)$", name)
    return (found[1], int(found[2]), found[3]) if found else None


def _stacks(parameters: Sequence[Parameter]) -> list[_Stack]:
    """In order. A stack can grow where its last two layers are alike."""
    found = []
    for prefix, some in itertools.groupby(parameters, lambda each: (_split(each.name) or (None,))[0]):
        run = list(some)
        if prefix is None:
            found.append(_Stack("", [run], False))
            continue
        by_number: dict[int, list[Parameter]] = {}
        for name, shape in run:
            _, number, rest = _split(name) or ("", 0, "")
            by_number.setdefault(number, []).append(Parameter(rest, shape))
        layers = list(by_number.values())
        alike = len(layers) > 1 and layers[-1] == layers[-2]
        found.append(_Stack(prefix, layers, True) if alike else _Stack("", [run], False))
    return found


def layers_of(parameters: Sequence[Parameter]) -> int:
    """How many layers the deepest stack has; 0: there is none that can grow."""
    return max((len(stack.layers) for stack in _stacks(parameters) if stack.is_repeated), default=0)


def with_layers(parameters: Sequence[Parameter], count: int) -> list[Parameter]:
    """The same model where each stack has so many layers: the first ones, then the last one again and again."""
    result: list[Parameter] = []
    for stack in _stacks(parameters):
        if not stack.is_repeated:
            result += stack.layers[0]
            continue
        for number in range(count):
            layer = stack.layers[min(number, len(stack.layers) - 1)]
            result += [Parameter(f"{stack.prefix}{number}.{rest}", shape) for rest, shape in layer]
    return result


def largest(parameters: Sequence[Parameter], optimizer: str, setting: Setting, memory: int) -> Largest:
    """The largest model of this kind whose peak is at most `memory` bytes on each rank; see RULE.

    Returns:
        Zeros where not even one layer fits.
    """
    if not (deepest := layers_of(parameters)):
        one, two = (estimate([*parameters] * times, optimizer, setting).peak for times in (1, 2))
        return Largest(max(0, int(total(parameters) * (1 + (memory - one) / max(1, two - one)))), 0)
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        peaks[count] = estimate(with_layers(parameters, count), optimizer, setting).peak
        return peaks[count] <= memory

    low, high = 0, MOST_LAYERS + 1  # the first fits, the second does not
    for count in (deepest, 2 * deepest):
        low, high = (max(low, count), high) if fits(count) else (low, min(high, count))
    while high - low > 1:
        # On the line through the two that are nearest: it bends where a bucket is full. Ever further from both ends, so
        # that a line that leads nowhere ends as bisection, and no model is built that is far larger than what fits.
        one, other = sorted(peaks, key=lambda count: abs(peaks[count] - memory))[:2]
        guess = one + (memory - peaks[one]) * (one - other) // ((peaks[one] - peaks[other]) or 1)
        margin = max(1, min(2 ** len(peaks) // 16, (high - low) // 2))
        middle = min(max(guess, low + margin), high - margin)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Largest(total(with_layers(parameters, low)) if low else 0, low)
