"""What goes to the host or a disk and comes back while others compute: weights (`docs/offload.md`), and what a model
saves for backward (`docs/activations.md`)."""

from tritonq.offload.activations import Activations, activations, mark_not_offload, start_offload
from tritonq.offload.arena import DiskArena, HostArena
from tritonq.offload.pool import PinnedPool
from tritonq.offload.weights import Handle, enable

__all__ = [
    "Activations",
    "DiskArena",
    "Handle",
    "HostArena",
    "PinnedPool",
    "activations",
    "enable",
    "mark_not_offload",
    "start_offload",
]
