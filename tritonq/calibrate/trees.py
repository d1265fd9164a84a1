"""Nested arguments and outputs as flat lists: pytrees, and mappings of classes that pytree does not know.

transformers, for one, hands keys and values from layer to layer in a `UserDict` that the layers write to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(eq=False)
class Tree:
    """The structure of a value without its leaves; two are equal if their values are of one structure.

    Attributes:
        spec: of pytree. mappings: by position among the leaves of `spec`: an empty mapping of that class, its keys and
            the structure of the list of its values.
    """

    spec: Any
    mappings: dict[int, tuple[MutableMapping[Any, Any], list[Any], Tree]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tree) or self.spec != other.spec or self.mappings.keys() != other.mappings.keys():
            return False
        for position, (empty, keys, inner) in self.mappings.items():
            other_empty, other_keys, other_inner = other.mappings[position]
            if type(empty) is not type(other_empty) or keys != other_keys or inner != other_inner:
                return False
        return True

    __hash__ = None  # type: ignore[assignment]


def flatten(value: Any) -> tuple[list[Any], Tree]:
    """The leaves of a nested value, in order, and its structure."""
    leaves, spec = pytree.tree_flatten(value)
    flat: list[Any] = []
    mappings = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, MutableMapping):
            keys = list(leaf)
            inner, tree = flatten([leaf[key] for key in keys])
            empty = copy.copy(leaf)
            empty.clear()
            mappings[position] = (empty, keys, tree)
            flat += inner
        else:
            flat.append(leaf)
    return flat, Tree(spec, mappings)


def unflatten(leaves: list[Any], tree: Tree) -> Any:
    """The value of which `flatten` gave these."""
    return _unflatten(iter(leaves), tree)


def _unflatten(leaves: Iterator[Any], tree: Tree) -> Any:
    flat = []
    for position in range(tree.spec.num_leaves):
        if position in tree.mappings:
            empty, keys, inner = tree.mappings[position]
            mapping = copy.copy(empty)
            for key, value in zip(keys, _unflatten(leaves, inner), strict=True):
                mapping[key] = value
            flat.append(mapping)
        else:
            flat.append(next(leaves))
    return pytree.tree_unflatten(flat, tree.spec)


def tree_map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with a function applied to its tensors."""
    leaves, tree = flatten(value)
    return unflatten([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)


def containers(value: Any) -> list[Any]:
    """Lists and mappings in a nested value that can be written to, each once, in order."""
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, list | MutableMapping):
            if any(value is other for other in found):
                return
            found.append(value)
        if isinstance(value, MutableMapping):
            for entry in value.values():
                visit(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                visit(entry)

    visit(value)
    return found


def entries(container: Any) -> dict[Any, Any]:
    """What a list or a mapping holds, by position or key."""
    return dict(container) if isinstance(container, MutableMapping) else dict(enumerate(container))
