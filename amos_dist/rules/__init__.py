"""sigma, moments and row_dims of each parameter, from the modules of a model or from the numbers in a parameter.

Sources: Tian & Parikh 2022, section 3 and appendix (the table of eta, here sigma="paper"); J. Su,
kexue.fm/archives/9344 (sigma = the scale at initialization, here sigma="auto").
"""

from __future__ import annotations

from .advice import Advice, advise
from .groups import current, param_groups, scales, settings_from

__all__ = ["Advice", "advise", "current", "param_groups", "scales", "settings_from"]
