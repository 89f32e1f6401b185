"""amos_dist: the Amos optimizer for large models; fused, sharded, with factored second moments.

import amos_dist also makes `"type": "Amos"` known to DeepSpeed's JSON.
"""

__version__ = "0.1.0"

from . import deepspeed as _deepspeed
from . import reference
from .checkpoint import full_state
from .decay import InverseSquareDecay, InverseTimeDecay
from .ops import build_info
from .optimizer import Amos
from .rules import param_groups

_deepspeed.register()

__all__ = [
    "Amos",
    "InverseSquareDecay",
    "InverseTimeDecay",
    "__version__",
    "build_info",
    "full_state",
    "param_groups",
    "reference",
]
