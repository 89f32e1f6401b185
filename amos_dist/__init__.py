"""amos_dist: the Amos optimizer for large models; fused, sharded, with factored second moments.

import amos_dist also makes `"type": "Amos"` known to DeepSpeed's JSON.
"""

__version__ = "0.1.0"

from . import deepspeed as _deepspeed
from . import reference
from .checkpoint import full_state
from .decay import IntegralDecay, InverseSquareDecay, InverseTimeDecay
from .guidance import decay_after, lr_for_half_life, suggest_lr, weight_decay_for
from .monitor import Monitor
from .ops import build_info
from .optimizer import Amos
from .relative_step import RelativeStep
from .rules import param_groups

_deepspeed.register()

__all__ = [
    "Amos",
    "IntegralDecay",
    "InverseSquareDecay",
    "InverseTimeDecay",
    "Monitor",
    "RelativeStep",
    "__version__",
    "build_info",
    "decay_after",
    "full_state",
    "lr_for_half_life",
    "param_groups",
    "reference",
    "suggest_lr",
    "weight_decay_for",
]
