"""Calls of a block put together to one, along dimensions that were found out.

A leaf of the arguments has the dimension d along which it doubles when the model is called with two samples put
together; leaves that stay as they are have none and are shared by samples that agree in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonq.calibrate.trees import Tree, flatten, unflatten

Dims = list[int | None]


@dataclass
class Rule:
    """Along which dimensions calls of a block are put together, None for leaves that are shared.

    Attributes:
        arguments: by leaf. outputs: by number of the tensor, see `outputs`. targets: by floating output.
    """

    arguments: Dims
    outputs: Dims
    targets: Dims


def describe(leaves: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    """What tells leaves apart without keeping them: of tensors shape, type and what they have in `shared`, else the
    leaf."""
    return [
        (tuple(leaf.shape), leaf.dtype, mark) if isinstance(leaf, Tensor) else (leaf,)
        for leaf, mark in zip(leaves, shared, strict=True)
    ]


def alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether descriptions are of leaves that agree in everything but the values of tensors."""
    return len(one) == len(other) and all(
        a[:2] == b[:2] if len(a) == len(b) == 3 else len(a) == len(b) and equal(a[0], b[0])
        for a, b in zip(one, other, strict=True)
    )


def equal(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except (RuntimeError, ValueError, TypeError):  # objects that compare by elements
        return False


def agree(one: Sequence[Any], other: Sequence[Any], dims: Dims) -> bool:
    """Whether descriptions that are alike are of tensors with the same values where these are shared."""
    return all(
        dim is not None or len(a) == 1 or (a[2] is not None and a[2] == b[2])
        for a, b, dim in zip(one, other, dims, strict=True)
    )


def same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def doubled(one: tuple[int, ...], both: tuple[int, ...]) -> int | None:
    """The dimension that is twice as large, None where they are equal.

    Raises:
        ValueError: anything else has changed.
    """
    if tuple(one) == tuple(both):
        return None
    changed = [d for d, (a, b) in enumerate(zip(one, both, strict=False)) if a != b]
    if len(one) != len(both) or len(changed) != 1 or both[changed[0]] != 2 * one[changed[0]]:
        raise ValueError(f"{tuple(one)} became {tuple(both)}")
    return changed[0]


def dims_of(
    one: Sequence[Any], other: Sequence[Any], both: Sequence[Any], counts: Sequence[bool] | None = None
) -> Dims | None:
    """Dimensions of leaves, from those of two samples and of the call with both; None where the call with both is not
    made of the two.

    Args:
        counts: for which leaves this has to be; of others only shapes are looked at.
    """
    if not (len(one) == len(other) == len(both)):
        return None
    found: Dims = []
    for a, b, c, counted in zip(one, other, both, counts or [True] * len(one), strict=True):
        if not isinstance(a, Tensor):
            if isinstance(c, Tensor) or not (a is c or equal(a, c)):
                return None
            found.append(None)
            continue
        try:
            dim = doubled(tuple(a.shape), tuple(c.shape))
        except (ValueError, AttributeError):
            return None
        if counted and not (near(torch.cat((a, b), dim), c) if dim is not None else same(a, b) and near(a, c)):
            return None
        found.append(dim)
    return found


def guessed(one: Sequence[Any], other: Sequence[Any]) -> Dims:
    """Dimensions where the model cannot be asked: the first for what differs."""
    return [0 if isinstance(a, Tensor) and a.ndim and not same(a, b) else None for a, b in zip(one, other, strict=True)]


def near(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by rounding, |a - b| <= sqrt(eps) |a|: operations of other sizes may add up in another order,
    and a token may go to another expert for it."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    difference = (a.float() - b.float()).nan_to_num().norm()
    return bool(difference <= torch.finfo(a.dtype).eps ** 0.5 * a.float().nan_to_num().norm())


def join(leaves: Sequence[Sequence[Any]], dims: Dims) -> list[Any]:
    """Leaves of several calls as those of one."""
    first = leaves[0]
    if len(leaves) == 1:
        return list(first)
    return [
        torch.cat([entry[position] for entry in leaves], dim) if dim is not None else first[position]
        for position, dim in enumerate(dims)
    ]


def part(tensor: Tensor, dim: int | None, number: int, count: int) -> Tensor:
    """What is of one of `count` calls in an output of all."""
    if dim is None or count == 1:
        return tensor
    size = tensor.shape[dim] // count
    return tensor.narrow(dim, number * size, size)


def joined_calls(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """Calls of the model with two samples put together along the first dimension: of all tensors; then of those that
    differ."""
    a, tree = flatten((tuple(one.args), dict(one.kwargs)))
    b, _ = flatten((tuple(other.args), dict(other.kwargs)))
    nothing = [None] * len(a)
    if len(a) != len(b) or not alike(describe(a, nothing), describe(b, nothing)):
        return
    tensors = [position for position, leaf in enumerate(a) if isinstance(leaf, Tensor)]
    if any(not a[p].ndim and not same(a[p], b[p]) for p in tensors):
        return
    different = {p for p in tensors if a[p].ndim and not same(a[p], b[p])}
    every = {p for p in tensors if a[p].ndim}
    for chosen in (every, different) if different != every else (every,):
        yield _joined(a, b, chosen, tree)


def _joined(a: list[Any], b: list[Any], chosen: set[int], tree: Tree) -> tuple[Any, Any]:
    leaves = [torch.cat((x, b[p])) if p in chosen else x for p, x in enumerate(a)]
    return unflatten(leaves, tree)  # type: ignore[no-any-return]
