"""Triton kernels that expand, gather and scatter KV blocks, and their NumPy twins.

Importing this imports neither triton nor torch: the first launch does.
"""

from kvpack.kernels.copy import gather, scatter
from kvpack.kernels.expand import expand
from kvpack.kernels.launch import warmup
from kvpack.kernels.table import LaneTable

__all__ = ["LaneTable", "expand", "gather", "scatter", "warmup"]
