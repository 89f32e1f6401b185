"""What fits into a device's memory, and the largest model that does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..models import Parameter, total
from .estimates import Setting, estimate

MOST_LAYERS = 2**16
RULE = "more or fewer layers, each as the last one; without layers, the same bytes for each parameter"


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
        peak = estimate(parameters, optimizer, setting).peak
        return Largest(int(total(parameters) * (memory / peak)), 0)
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        peaks[count] = estimate(with_layers(parameters, count), optimizer, setting).peak
        return peaks[count] <= memory

    low, high = 0, MOST_LAYERS + 1  # the first fits, the second does not
    fits(deepest), fits(2 * deepest)
    for count in sorted(peaks):
        low, high = (count, high) if peaks[count] <= memory else (low, min(high, count))
    first, second = (peaks[count] for count in (deepest, 2 * deepest))
    guess = deepest + int((memory - first) * deepest / max(1, second - first))  # along the line through both
    while high - low > 1:
        middle = min(max(guess, low + 1), high - 1) if len(peaks) < 10 else (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Largest(total(with_layers(parameters, low)) if low else 0, low)
