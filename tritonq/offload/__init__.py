"""Weights in host memory or on a disk, copied to the device while others compute: `docs/offload.md`."""

from tritonq.offload.arena import DiskArena, HostArena
from tritonq.offload.weights import Handle, enable

__all__ = ["DiskArena", "Handle", "HostArena", "enable"]
