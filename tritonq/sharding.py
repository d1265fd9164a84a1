"""Quantized tensors between processes: collectives move their bytes, or refuse.

DTensor distributes and gathers with copies (broadcast, scatter, all-gather), which are the same on bytes; sums of codes
mean nothing, so reductions raise. `fully_shard` has hooks of its own, `QTensor.fsdp_pre_all_gather` and
`fsdp_post_all_gather`. Where shards begin and end is checked by `tensor_ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonq.tensor import QTensor, implements

COPIES = ("broadcast_", "scatter_", "gather_", "allgather_", "alltoall_", "send", "recv_", "recv_any_source_")


@implements("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
def _communicate(func: Any, args: Any, kwargs: Any) -> Any:
    namespace, name = func._schema.name.split("::")
    if name in ("wait_tensor", "_wrap_tensor_autograd"):
        return args[0].detach()  # what came is complete
    if name == "all_gather_into_tensor":
        return _all_gather(*args)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if namespace != "c10d" or name not in COPIES or not all(isinstance(t, QTensor) for t in tensors):
        about = next(t for t in tensors if isinstance(t, QTensor)).format.name
        raise RuntimeError(
            f"{func} on quantized tensors ({about}): they can be copied from rank to rank (broadcast, scatter, gather, "
            "all_gather into quantized tensors, send and recv), not reduced; dequantize them first"
        )
    compact = {id(t): t if t._is_compact() else t.clone() for t in tensors}
    result = func(*pytree.tree_map_only(QTensor, lambda t: compact[id(t)]._buf, args), **kwargs)
    windows = [t for t in pytree.tree_leaves(args[0]) if compact[id(t)] is not t]
    if windows and name != "send":  # the first argument is what is written
        (result[-1] if isinstance(result, tuple | list) else result).wait()
        for window in windows:
            window.copy_(compact[id(window)])
    return result


def _all_gather(q: QTensor, ranks: int, group: Any) -> QTensor:
    """The shards of all ranks one below the other."""
    q = q if q._is_compact() else q.clone()
    functional = torch.ops._c10d_functional
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(q._buf, ranks, group))
    shards = [QTensor._wrap(buf.clone(), q._layout, q.dtype) for buf in gathered.view(ranks, -1)]
    result = torch.cat(shards)
    if not isinstance(result, QTensor):
        raise RuntimeError(
            f"{q.format.name} shards of shape {tuple(q.shape)} do not make one tensor of {ranks * q.shape[0]} rows: "
            "groups or scales differ; all-gather q.parts()"
        )
    return result
