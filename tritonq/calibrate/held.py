"""Arguments of one block that need no forward a second time.

A leaf is an output in the cache, which is looked up; a tensor that several samples have in common, which is held once;
or a constant. Other tensors are kept in the cache as far as the outputs that they were made of can go for them, which
keeps the memory as it is; else a sample's arguments are made again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq.calibrate.dependencies import fingerprint
from tritonq.calibrate.trees import Tree

Use = tuple[int, int]
Mark = tuple[Any, ...]  # equal for tensors of the same values
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)


class Held:
    """At most a sixteenth of the largest leaves of all samples is held.

    Args:
        samples: how many there are.
    """

    def __init__(self, samples: int) -> None:
        self._count, self._largest = samples, 0
        self._block: int | None = None
        self._shared: dict[Mark, Tensor] = {}
        self._first: dict[Mark, tuple[int, int]] = {}  # sample and position where a tensor was seen first
        self._samples: dict[int, tuple[list[tuple[str, Any]], Tree]] = {}
        self._used: set[Mark] = set()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._shared.values())

    def at(self, block: int) -> None:
        """Forget samples of another block, and tensors that it did not use."""
        if block != self._block:
            self._shared = {mark: tensor for mark, tensor in self._shared.items() if mark in self._used}
            self._block, self._used, self._first, self._samples = block, set(), {}, {}

    def to(self, device: torch.device) -> None:
        """Move what is held."""
        self._shared = {mark: tensor.to(device) for mark, tensor in self._shared.items()}

    def take(
        self, sample: int, leaves: Sequence[Any], tree: Tree, loaded: Mapping[int, tuple[Use, Mark]]
    ) -> tuple[list[Any], list[Mark | None], list[int] | None, list[tuple[int, int]]]:
        """Look at the leaves of a sample. Returns them, with tensors that are held in place of equal ones; by what
        tensors of one shape are told apart; positions of those that need a place before `keep` is called, None where
        there cannot be any; and (sample, position) of such that need none any more.

        Args:
            loaded: what came out of the cache, by `id`, and where it lies there.
        """
        entries: list[tuple[str, Any]] = []
        result: list[Any] = []
        marks: list[Mark | None] = []
        known, over = True, []
        self._largest = max((leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)), default=0)
        for position, leaf in enumerate(leaves):
            mark = None
            if not isinstance(leaf, Tensor):
                known &= isinstance(leaf, _CONSTANTS) or callable(leaf)
                entries.append(("value", leaf))
            else:
                if id(leaf) in loaded:
                    use, mark = loaded[id(leaf)]
                    entries.append(("use", use))
                else:
                    mark = (tuple(leaf.shape), leaf.dtype, fingerprint(leaf))
                    over += self._share(sample, position, mark, leaf)
                    entries.append(("shared", mark) if mark in self._shared else ("made", position))
                    leaf = self._shared.get(mark, leaf)
            marks.append(mark)
            result.append(leaf)
        self._new = (entries, tree)
        new = [position for position, (kind, _) in enumerate(entries) if kind == "made"]
        return result, marks, new if known else None, over

    def _share(self, sample: int, position: int, mark: Mark, leaf: Tensor) -> list[tuple[int, int]]:
        """Hold a tensor if it was seen before."""
        if mark in self._shared:
            self._used.add(mark)
            return []
        first = self._first.setdefault(mark, (sample, position))
        if first[0] == sample or self.nbytes + leaf.nbytes > self._largest * self._count / 16:
            return []
        self._shared[mark] = leaf.clone() if leaf.untyped_storage().nbytes() > leaf.nbytes else leaf
        self._used.add(mark)
        entries = self._samples[first[0]][0] if first[0] in self._samples else []
        found = [(first[0], p) for p, entry in enumerate(entries) if entry == ("made", p) and p == first[1]]
        for _, p in found:
            entries[p] = ("shared", mark)
        return found

    def keep(self, sample: int) -> None:
        """What `take` saw last is asked for by `give` from now on."""
        self._samples[sample] = self._new

    def give(
        self, sample: int, use: Callable[[Use], Tensor], made: Callable[[int], Tensor]
    ) -> tuple[list[Any], Tree] | None:
        """Leaves of a sample, if no forward is needed for them: what it finds in the cache of outputs, and of tensors
        that were made, by position."""
        found = self._samples.get(sample)
        if found is None:
            return None
        look: dict[str, Callable[[Any], Any]] = {
            "use": use,
            "made": made,
            "shared": self._shared.__getitem__,
            "value": lambda entry: entry,
        }
        return [look[kind](entry) for kind, entry in found[0]], found[1]
