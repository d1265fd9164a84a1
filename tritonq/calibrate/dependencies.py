"""What arguments are made of, and what a model has beside its blocks."""

from __future__ import annotations

import contextlib
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
    """Shape, type, fingerprint, and of floats the norm and the sum with pseudo-random factors of [-1, 1): two tensors
    that differ by d have sums that differ by about |d| / sqrt(3)."""
    squares = products = 0.0
    if tensor.is_floating_point():
        for values, factors in _chunks(tensor.detach().reshape(-1)):
            values = values.double()
            squares += float(values.square().sum())
            products += float((values * factors.double()).sum()) * 2.0**-63
    return tuple(tensor.shape), tensor.dtype, fingerprint(tensor), (squares**0.5, products)


def fingerprint(tensor: Tensor) -> int:
    """A number of the bytes of a tensor: the sum of its words with pseudo-random factors, modulo 2^64."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    words = plain.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(plain.element_size(), torch.int64))
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for values, factors in _chunks(words):
        total += (values.to(torch.int64) * factors).sum()
    return int(total)


def _chunks(flat: Tensor, size: int = 1 << 23) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of a tensor and their factors, which take many times the memory of small types."""
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        yield part, _factors(start, part.numel(), part.device)


def _factors(start: int, count: int, device: torch.device) -> Tensor:
    """Pseudo-random int64 numbers: splitmix64 (Steele, Lea, Flood 2014) from seed 0."""
    found = torch.arange(start + 1, start + count + 1, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        found = (found ^ _shifted(found, shift)) * factor
    return found ^ _shifted(found, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, zeros following; torch's shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether digests are of the same values, or of values as near as those of operations that add up in any order."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if one == other:
            continue
        if not (isinstance(one, tuple) and isinstance(other, tuple) and one[:2] == other[:2]):
            return False
        if not one[1].is_floating_point or one[1].itemsize == 1:
            return False
        norm, product = one[3]
        near = torch.finfo(one[1]).eps * norm
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
