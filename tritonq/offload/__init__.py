"""Offload: what a model saves for backward goes to the host until it is wanted."""

from tritonq.offload.activations import Activations, activations, mark_not_offload, start_offload
from tritonq.offload.pool import PinnedPool

__all__ = ["Activations", "PinnedPool", "activations", "mark_not_offload", "start_offload"]
