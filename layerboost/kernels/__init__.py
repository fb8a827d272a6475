"""Provides Triton kernels of the `linear_window` treatment: prefill with gradients, and decode.

`layerboost.attention` defines what they compute and uses them if they can run; tests compare the two.
"""

from .prefill import linear_window_prefill, supports
from .step import linear_window_evict, linear_window_step

__all__ = ["linear_window_evict", "linear_window_prefill", "linear_window_step", "supports"]
