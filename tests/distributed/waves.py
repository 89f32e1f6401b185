"""For workers: small models whose sums travel in more than one wave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from amos_dist import travel

Do = Callable[[dict[str, Any]], dict[str, Any]]


def in_waves(do: Do) -> Do:
    """Does a case with as many waves as its "waves" says, however small they are; without it as many as usual."""

    @functools.wraps(do)
    def done(case: dict[str, Any]) -> dict[str, Any]:
        usual = travel.MOST_WAVES, travel.LEAST_NUMBERS, travel.LEAST_FOR_A_RANK
        if "waves" in case:
            travel.MOST_WAVES, travel.LEAST_NUMBERS, travel.LEAST_FOR_A_RANK = case["waves"], 1, 0
        try:
            return do(case)
        finally:
            travel.MOST_WAVES, travel.LEAST_NUMBERS, travel.LEAST_FOR_A_RANK = usual

    return done
