"""How many cases: the profile "ci", or "long" where the environment variable AMOS_FUZZ says so."""

from __future__ import annotations

import os
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

LONG = os.environ.get("AMOS_FUZZ", "ci") == "long"
TIMES = 20 if LONG else 1


def examples(number: int, **more: Any) -> settings:
    """`number` cases under "ci", the same in every run. more: of hypothesis.settings."""
    return settings(
        max_examples=number * TIMES,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        **more,
    )


def randoms() -> SearchStrategy[random.Random]:
    """A random.Random whose draws hypothesis chooses, and shrinks."""
    return st.randoms(note_method_calls=False, use_true_random=False)
