"""What a block computes with in place of its weights, and how gradients add up there.

    grad <- momentum * grad + dy' x        the first of a step
    grad <- grad + dy' x                   those after it

Products of `F.linear` add the first of these by themselves: no gradient of the one call lies beside the sum, and no
pass over the weights multiplies it. Later ones are rounded before they are added, as autograd does it, so that it does
not matter on which device they came to be. Uses of a leaf that are not `F.linear`, and those under autocast, get their
gradients from autograd.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Leaf(Tensor):
    """A weight [N, K], or those of experts [E, N, K] whose matrices are picked one by one (`weight[e]`)."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if torch.is_grad_enabled():
                if func is functional.linear and (given := _operands(*args, **(kwargs or {}))) is not None:
                    return _Linear.apply(*given)
                if func is Tensor.__getitem__ and isinstance(args[0], Leaf) and args[0].ndim == 3:
                    index = args[1]
                    if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point():
                        index = int(index)
                    if isinstance(index, int) and not isinstance(index, bool):
                        return _Pick.apply(args[0], args[0], index)
            return func(*args, **(kwargs or {}))


def leaf_of(values: Tensor, intercept: bool = True) -> Tensor:
    """A leaf that shares its memory with `values`; without `intercept` autograd makes all of its gradient."""
    leaf = (values.as_subclass(Leaf) if intercept else values).requires_grad_()
    leaf.momentum = 1.0  # type: ignore[attr-defined]  # what the gradient is still to be multiplied by
    seen = weakref.ref(leaf)
    leaf.register_hook(lambda gradient: None if gradient is None else _settle(seen()))  # before autograd adds to it
    return leaf


def gradient(leaf: Tensor) -> Tensor | None:
    """The sum as it is now."""
    with torch._C.DisableTorchFunctionSubclass():
        _settle(leaf)
        return leaf.grad


def decay(leaf: Tensor, momentum: float) -> None:
    """A step is over: the sum counts so much in the next one."""
    if momentum:
        leaf.momentum *= momentum  # type: ignore[attr-defined]
    else:
        forget(leaf)


def forget(leaf: Tensor) -> None:
    leaf.grad, leaf.momentum = None, 1.0  # type: ignore[attr-defined]


def _settle(leaf: Any) -> None:
    if leaf.momentum != 1.0:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if leaf.grad is not None:
                leaf.grad.mul_(leaf.momentum)
        leaf.momentum = 1.0


def _operands(input: Tensor, weight: Any, bias: Tensor | None = None) -> tuple[Any, ...] | None:
    """Arguments of `_Linear`; None for products that autograd is left to."""
    usual = type(weight) is Leaf and weight.ndim == 2 and input.ndim > 0 and input.dtype == weight.dtype
    if not usual or torch.is_autocast_enabled(input.device.type) or (bias is not None and bias.requires_grad):
        return None
    return input, weight, weight, bias


class _Linear(torch.autograd.Function):
    """F.linear(x, weight, bias)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, leaf: Leaf, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        with torch._C.DisableTorchFunctionSubclass():
            dx = dy.matmul(weight) if ctx.needs_input_grad[0] else None
            _add(ctx.leaf, dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1]))
        return dx, None, None, None


def _add(leaf: Any, dy: Tensor, x: Tensor) -> None:
    """dy: [N, T], x: [T, K]."""
    if leaf.grad is None:
        leaf.grad = dy.mm(x)
    elif leaf.momentum != 1.0:
        leaf.grad.addmm_(dy, x, beta=leaf.momentum)
    else:
        leaf.grad.add_(dy.mm(x))
    leaf.momentum = 1.0


class _Pick(torch.autograd.Function):
    """One expert's matrix; its gradient is added where it belongs. Autograd would make it a tensor of all experts, with
    zeros in it, once for every expert."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, leaf: Leaf, index: int) -> Tensor:
        ctx.leaf, ctx.index = leaf, index
        return whole[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        leaf = ctx.leaf
        with torch._C.DisableTorchFunctionSubclass():
            _settle(leaf)
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            leaf.grad[ctx.index] += grads[0]
        return None, None, None
