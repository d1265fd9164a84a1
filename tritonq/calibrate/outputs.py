"""What a block put out, without its memory: enough to stand in for the block in the model's forward.

Of a call with arguments a, what counts is what it returned and what it wrote into lists and mappings among a. A tensor
of either that is one of the arguments is noted as that argument; the others get numbers, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritonq.calibrate.trees import Tree, containers, entries, flatten, unflatten

ARGUMENT, TENSOR, VALUE = "argument", "tensor", "value"


@dataclass
class Outputs:
    """The structure of what a call put out.

    Attributes:
        tree: of (returned, list of what was written).
        leaves: of it: (ARGUMENT, position among the leaves of (args, kwargs)), (TENSOR, number) or (VALUE, constant).
        written: for what was written, the number of the list or mapping among `containers`, and the position or key.
        specs: shape and dtype of tensors by number.
    """

    tree: Tree
    leaves: list[tuple[str, Any]]
    written: list[tuple[int, Any]]
    specs: list[tuple[tuple[int, ...], torch.dtype]]

    def of(self, tensors: Sequence[Tensor]) -> Outputs:
        """The same structure with other tensors."""
        return replace(self, specs=[(tuple(t.shape), t.dtype) for t in tensors])

    def like(self, other: Outputs) -> bool:
        """Whether they differ in shapes at most."""
        plain = [(kind, None if kind == VALUE else entry) for kind, entry in self.leaves]
        return (
            self.tree == other.tree
            and plain == [(kind, None if kind == VALUE else entry) for kind, entry in other.leaves]
            and self.written == other.written
            and [dtype for _, dtype in self.specs] == [dtype for _, dtype in other.specs]
        )

    def doubled(self, dims: Sequence[int | None]) -> Outputs:
        """The structure for twice as much along these dimensions of the tensors."""
        specs = []
        for (shape, dtype), dim in zip(self.specs, dims, strict=True):
            sizes = tuple(2 * size if d == dim else size for d, size in enumerate(shape))
            specs.append((sizes, dtype))
        return replace(self, specs=specs)

    def build(self, args: Any, kwargs: Any, tensors: Mapping[int, Tensor], missing: Callable[..., Tensor]) -> Any:
        """What the call returned, with these tensors; writes what it wrote.

        Args:
            tensors: by number. missing: makes others: missing(number, shape, dtype).
        """
        given, _ = flatten((args, kwargs))
        made: dict[int, Tensor] = dict(tensors)
        leaves = []
        for kind, entry in self.leaves:
            if kind == TENSOR and entry not in made:
                made[entry] = missing(entry, *self.specs[entry])
            leaves.append(given[entry] if kind == ARGUMENT else made[entry] if kind == TENSOR else entry)
        returned, values = unflatten(leaves, self.tree)
        write(args, kwargs, self.written, values)
        return returned


def write(args: Any, kwargs: Any, written: list[tuple[int, Any]], values: list[Any]) -> None:
    found = containers((args, kwargs))
    for (number, key), value in zip(written, values, strict=True):
        if isinstance(found[number], list) and key >= len(found[number]):
            found[number].append(value)
        else:
            found[number][key] = value


def version(tensor: Any) -> int | None:
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None


def observe(call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Outputs, list[Tensor], list[int]]:
    """Call a block. Returns what it returned, the structure of that and of what it wrote, the tensors by number, and
    the positions of arguments that it changed in place."""
    given, _ = flatten((args, kwargs))
    versions = [version(leaf) for leaf in given]
    before = [entries(container) for container in containers((args, kwargs))]
    held = containers((args, kwargs))
    returned = call(*args, **kwargs)
    changed = [position for position, leaf in enumerate(given) if version(leaf) != versions[position]]
    written, values = [], []
    for number, container in enumerate(held):
        for key, value in entries(container).items():
            if key not in before[number] or before[number][key] is not value:
                written.append((number, key))
                values.append(value)
    outputs, tensors = describe((returned, values), given, changed)
    outputs.written = written
    return returned, outputs, tensors, changed


def describe(value: Any, given: list[Any] = [], changed: list[int] = []) -> tuple[Outputs, list[Tensor]]:  # noqa: B006
    """The structure of a value and its tensors by number, without those that are given and unchanged."""
    leaves, tree = flatten(value)
    tensors: list[Tensor] = []
    found: list[tuple[str, Any]] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            found.append((VALUE, leaf))
            continue
        position = next((p for p, other in enumerate(given) if other is leaf and p not in changed), None)
        if position is not None:
            found.append((ARGUMENT, position))
            continue
        number = next((n for n, other in enumerate(tensors) if other is leaf), None)
        if number is None:
            number = len(tensors)
            tensors.append(leaf)
        found.append((TENSOR, number))
    return Outputs(tree, found, [], [(tuple(t.shape), t.dtype) for t in tensors]), tensors
