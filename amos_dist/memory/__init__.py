"""What training holds on each rank, with Amos and with others: computed before GPUs are rented, and measured.

`python -m amos_dist memory MODEL` prints it. Bytes, decimal units. Activations are never counted.
"""

from __future__ import annotations

from .command import add_arguments, command
from .estimates import Estimate, Setting, estimate
from .fits import Largest, largest
from .watching import Profile, Watch, profile

__all__ = [
    "Estimate",
    "Largest",
    "Profile",
    "Setting",
    "Watch",
    "add_arguments",
    "command",
    "estimate",
    "largest",
    "profile",
]
