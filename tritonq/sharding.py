"""Quantized tensors between processes: collectives move their bytes, or refuse.

DTensor distributes and gathers with copies (broadcast, scatter, all-gather), which are the same on bytes; sums of codes
mean nothing, so reductions raise. `fully_shard` has hooks of its own, `QTensor.fsdp_pre_all_gather` and
`fsdp_post_all_gather`. Where shards begin and end is checked by `tensor_ops`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tritonq.formats import get_format
from tritonq.tensor import QTensor, implements
from tritonq.tiling import contiguous_strides

COPIES = ("broadcast_", "scatter_", "gather_", "allgather_", "alltoall_", "send", "recv_", "recv_any_source_")


@implements("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
def _communicate(func: Any, args: Any, kwargs: Any) -> Any:
    namespace, name = func._schema.name.split("::")
    if name in ("wait_tensor", "_wrap_tensor_autograd"):
        return args[0].detach()  # what came is complete
    if name == "all_gather_into_tensor":
        return _all_gather(*args)
    if name == "shard_dim_alltoall":
        return _resharded(*args)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if namespace != "c10d" or name not in COPIES or not all(isinstance(t, QTensor) for t in tensors):
        about = next(t for t in tensors if isinstance(t, QTensor)).format.name
        raise RuntimeError(
            f"{func} on quantized tensors ({about}): they can be copied from rank to rank (broadcast, scatter, gather, "
            "all_gather into quantized tensors, send and recv), not reduced; dequantize them first"
        )
    compact = {id(t): t._compacted() for t in tensors if isinstance(t, QTensor)}
    written = pytree.tree_leaves(args[0]) if name != "send" else []  # the first argument
    windows = [t for t in written if compact[id(t)] is not t]
    if any(window.device.type != "cpu" for window in windows):
        raise RuntimeError(  # waiting for NCCL from here crashes the process (torch 2.11)
            f"{func} into a part of a quantized tensor ({windows[0].format.name}) on {windows[0].device}; pass a "
            "tensor of its own, such as part.clone(), and copy it to the part afterwards"
        )
    result = func(*pytree.tree_map_only(QTensor, lambda t: compact[id(t)]._buf, args), **kwargs)
    if windows:
        (result[-1] if isinstance(result, tuple | list) else result).wait()
        for window in windows:
            window.copy_(compact[id(window)])
    return result


def _all_gather(q: QTensor, ranks: int, group: Any) -> QTensor:
    """The shards of all ranks one below the other."""
    q = q._compacted()
    functional = torch.ops._c10d_functional
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(q._buf, ranks, group))
    shards: list[Tensor] = [QTensor._wrap(buf.clone(), q._layout, q.dtype) for buf in gathered.view(ranks, -1)]
    result = torch.cat(shards)
    if not isinstance(result, QTensor):
        raise RuntimeError(
            f"{q.format.name} shards of shape {tuple(q.shape)} do not make one tensor of {ranks * q.shape[0]} rows: "
            "groups or scales differ; all-gather q.parts()"
        )
    return result


def _resharded(q: QTensor, gathered: int, sharded: int, name: Any) -> Tensor:
    """Shards along one axis from those along another: gathers and keeps a part, as torch does without an all-to-all."""
    groups: Any = torch.distributed.distributed_c10d
    group = groups._resolve_process_group(name) if isinstance(name, str) else name
    shards = _all_gather(q, group.size(), name).chunk(group.size())
    whole = torch.cat(list(shards), gathered)
    if not isinstance(whole, QTensor):
        raise RuntimeError(f"{q.format.name} shards of shape {tuple(q.shape)} do not join along axis {gathered}")
    kept = whole.chunk(group.size(), sharded)[group.rank()].clone()
    if not isinstance(kept, QTensor):
        raise RuntimeError(
            f"a {q.format.name} tensor of shape {tuple(whole.shape)} cannot be cut along axis {sharded} into "
            f"{group.size()} shards of whole groups; take another axis or number of ranks"
        )
    return kept


def linear(x: Any, weight: Any, bias: Any) -> Tensor:
    """`F.linear` of DTensors. Sharded quantized weights are multiplied where they lie, as one process does it: autograd
    then keeps their codes, where DTensor's own transpose would keep dequantized copies until backward."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    whole, last, mesh = Replicate(), Shard(x.ndim - 1), x.device_mesh
    quantized = isinstance(weight, DTensor) and isinstance(weight._local_tensor, QTensor) and not weight.requires_grad
    # Placements of the input, the gradient of the input, and the output.
    ways = {Shard(0): (whole, Partial(), last), Shard(1): (last, last, Partial()), whole: (whole, whole, whole)}
    if not quantized or mesh != weight.device_mesh or mesh.ndim != 1 or weight.placements[0] not in ways:
        return torch.nn.functional.linear(x, weight, bias)
    given, gradient, found = ways[weight.placements[0]]
    local = x.redistribute(placements=[given]).to_local(grad_placements=[gradient])
    beside = bias is not None and bias.placements == weight.placements  # added once: not to parts of a sum
    y: Tensor = torch.nn.functional.linear(local, weight.to_local(), bias.to_local() if beside else None)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    y = DTensor.from_local(y, mesh, [found], run_check=False, shape=shape, stride=contiguous_strides(shape))
    return y if bias is None or beside else y + bias


@functools.cache
def teach_dtensor() -> None:
    """Tell DTensor which shards of its input QDQ takes as they are: whole rows, and columns along whole groups. Others
    are gathered first, so that scales are those of one process."""
    from torch.distributed.tensor.experimental import register_sharding

    @register_sharding(torch.ops.tritonq.qdq.default)
    def _qdq(x: Any, name: str, *given: Any) -> Any:
        return [([own], [own, None, *_replicated(given)]) for own in _shards(x, name, given)]

    @register_sharding(torch.ops.tritonq.qdq_backward.default)
    def _qdq_backward(x: Any, dy: Any, name: str, *given: Any) -> Any:
        return [([own], [own, own, None, *_replicated(given)]) for own in _shards(x, name, given)]


def _replicated(given: tuple[Any, ...]) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [None if scale is None else Replicate() for scale in given]


def _shards(x: Any, name: str, given: tuple[Any, ...]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    fmt = get_format(name)
    rows, columns = fmt.group
    found: list[Any] = [Replicate()]
    own_scales = given[:1] in ((), (None,)) and (not fmt.tensor_scale or any(scale is not None for scale in given))
    if rows != 1 or not own_scales:  # one scale for all, or one that was given: only the whole tensor
        return found
    found += [Shard(dim) for dim in range(len(x.shape) - 1)]
    if columns > 0 and x.shape[-1] % (math.lcm(columns, fmt.super_group or 1) * x.mesh.size()) == 0:
        found.append(Shard(len(x.shape) - 1))
    return found
