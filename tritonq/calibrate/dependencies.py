"""What arguments are made of, and what a model has beside its blocks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.calibrate.trees import flatten

SIMPLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class Origins:
    """Tensors that require gradients in place of others, and which of them something was made of."""

    def __init__(self) -> None:
        self._origins: dict[int, Any] = {}
        self._alive: list[Tensor] = []  # ids are of what is alive

    def _variable(self, origin: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        variable = torch.zeros(
            (), dtype=dtype, device=device, requires_grad=dtype.is_floating_point or dtype.is_complex
        )
        self._know(variable, origin)
        return variable

    def _know(self, tensor: Tensor, origin: Any) -> None:
        self._origins[id(tensor)] = origin
        self._alive.append(tensor)

    def stand_in(
        self, origin: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, real: bool
    ) -> Tensor:
        """Zeros of an origin, `real`: with memory of their own."""
        found = self._variable(origin, dtype, device).expand(shape)
        found = found.clone() if real else found
        self._know(found, origin)
        return found

    def marked(self, origin: Any, tensor: Tensor) -> Tensor:
        """A tensor with the same values, of an origin."""
        if tensor.is_floating_point() or tensor.is_complex():
            tensor = tensor.detach() + self._variable(origin, tensor.dtype, tensor.device)
        self._know(tensor, origin)
        return tensor

    def of(self, value: Any) -> set[Any]:
        """Origins that tensors in a nested value were made of."""
        found: set[Any] = set()
        seen: set[Any] = set()
        for tensor in flatten(value)[0]:
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) in self._origins:
                found.add(self._origins[id(tensor)])
            nodes = [tensor.grad_fn]
            while nodes:
                node = nodes.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                variable = getattr(node, "variable", None)  # of AccumulateGrad
                if variable is not None and id(variable) in self._origins:
                    found.add(self._origins[id(variable)])
                nodes += [following for following, _ in node.next_functions]
        return found


def digests(value: Any) -> list[Any]:
    """Something of each leaf by which others can be told from it."""
    found: list[Any] = []
    known: dict[int, Any] = {}
    for leaf in flatten(value)[0]:
        if isinstance(leaf, Tensor):
            if id(leaf) not in known:
                known[id(leaf)] = _digest(leaf)
            found.append(known[id(leaf)])
        else:
            found.append(leaf if isinstance(leaf, bool | int | float | str | torch.dtype) else type(leaf))
    return found


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    content = plain.reshape(-1).view(torch.uint8) if plain.numel() else torch.empty(0, dtype=torch.uint8)
    return (
        tuple(tensor.shape),
        tensor.dtype,
        hashlib.blake2b(bytes(content.numpy()), digest_size=16).digest(),
        _figures(plain),
    )


def _figures(tensor: Tensor) -> tuple[float, float]:
    """Norm, and product with pseudo-random signs: two tensors that differ by d have products that differ by about
    |d|."""
    values = tensor.reshape(-1).double() if not tensor.is_complex() else torch.view_as_real(tensor).reshape(-1).double()
    bits = torch.arange(values.numel()) * 2654435761 >> 13 & 1  # Knuth's multiplicative hash
    return float(values.norm()), float((values * (2.0 * bits - 1.0)).sum())


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether digests are of the same values, or of values as near as those of operations that add up in any order."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if one == other:
            continue
        if not (isinstance(one, tuple) and isinstance(other, tuple) and one[:2] == other[:2]):
            return False
        if not one[1].is_floating_point:
            return False
        norm, product = one[3]
        near = 4 * torch.finfo(one[1]).eps * norm
        if not (abs(norm - other[3][0]) <= near and abs(product - other[3][1]) <= near):
            return False
    return True


def kind(args: Any, kwargs: Any) -> Any:
    """What samples of one kind have in common: the structure of the call, and types and dimensions of its leaves."""
    leaves, tree = flatten((tuple(args), dict(kwargs)))
    described = tuple((leaf.ndim, str(leaf.dtype)) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
    return str(tree.spec), described, tuple(sorted(tree.mappings))


def beside(model: nn.Module, blocks: set[nn.Module]) -> list[nn.Module]:
    """Modules that are not in a block."""
    inside = {module for block in blocks for module in block.modules()}
    return [module for module in model.modules() if module not in inside]


def towers(model: nn.Module, blocks: set[nn.Module]) -> list[nn.Module]:
    """Outermost modules beside the blocks that have more than one layer: what is worth leaving out of a forward."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if module in blocks:
            return
        contains = any(child in blocks for child in module.modules())
        if contains or isinstance(module, nn.ModuleList | nn.ModuleDict):
            for child in module.children():
                visit(child)
        elif sum(isinstance(child, SIMPLE) for child in module.modules()) > 1:
            found.append(module)

    visit(model)
    return found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this, all modules are as after `model.eval()`."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
