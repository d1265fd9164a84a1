"""Arguments of one block that need no forward a second time.

A leaf is an output in the cache, which is looked up; a tensor that several samples, or this block and the one before,
have in common, which is held once; or a constant. Other tensors are kept in the cache as far as the outputs that they
were made of can go for them, which keeps the memory as it is; else a sample's arguments are made again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq.calibrate.trees import Tree

Use = tuple[int, int]
_TRIES = 4  # tensors of one shape and type that others are compared with
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)


def fingerprint(tensor: Tensor) -> int:
    """A number of the bytes of a tensor."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(plain.element_size(), torch.int64)
    codes = plain.view(width).to(torch.int64)
    places = torch.arange(codes.numel(), device=codes.device)
    return int(
        (codes * (places * 0x9E3779B97F4A7C1 + 1)).sum()
    )  # modulo 2^64; the factor is odd times the golden ratio


class Held:
    """Args: limit: bytes of tensors that are held, asked for when one is to be added."""

    def __init__(self, limit: Callable[[], float]) -> None:
        self._limit = limit
        self._block: int | None = None
        self._shared: list[Tensor] = []
        self._used: set[int] = set()  # positions in `_shared`, by this block
        self._samples: dict[int, tuple[list[tuple[str, Any]], Tree]] = {}
        self._new: tuple[list[tuple[str, Any]], Tree]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._shared)

    def at(self, block: int) -> None:
        """Forget samples of another block, and tensors that it did not use."""
        if block != self._block:
            kept = sorted(self._used) if self._samples else range(len(self._shared))
            self._shared = [self._shared[position] for position in kept]
            self._block, self._used, self._samples = block, set(), {}

    def clear(self) -> int:
        """Let go of everything. Returns bytes."""
        freed = self.nbytes
        self._shared, self._used, self._samples = [], set(), {}
        return freed

    def take(self, leaves: Sequence[Any], tree: Tree, loaded: Mapping[int, Use]) -> tuple[list[Any], list[int] | None]:
        """Leaves of a sample, with tensors that are held in place of equal ones; and the positions of tensors that
        `keep` has to find a place for, None where nothing can be held.

        Args:
            loaded: what came out of the cache, by `id`.
        """
        entries: list[tuple[str, Any]] = []
        result: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                entries.append(("value", leaf))
                if not (isinstance(leaf, _CONSTANTS) or callable(leaf)):
                    entries[-1] = ("unknown", None)
            elif id(leaf) in loaded:
                entries.append(("use", loaded[id(leaf)]))
            else:
                position = self._find(leaf)
                entries.append(("made", len(entries)) if position is None else ("shared", position))
                leaf = leaf if position is None else self._shared[position]
            result.append(leaf)
        self._new = (entries, tree)
        if any(kind == "unknown" for kind, _ in entries):
            return result, None
        return result, [position for position, (kind, _) in enumerate(entries) if kind == "made"]

    def keep(self, sample: int) -> None:
        """What `take` saw last is asked for by `give` from now on."""
        self._samples[sample] = self._new

    def marks(self, leaves: Sequence[Any]) -> list[Any]:
        """By which the tensors that `take` saw last are told from others of their shape; None: by nothing."""
        marks: list[Any] = []
        for leaf, (kind, entry) in zip(leaves, self._new[0], strict=True):
            marks.append((kind, entry) if kind == "shared" else fingerprint(leaf) if kind == "made" else None)
        return marks

    def _find(self, leaf: Tensor) -> int | None:
        tries = 0
        for position, other in enumerate(self._shared):
            if other.shape == leaf.shape and other.dtype == leaf.dtype and other.device == leaf.device:
                if leaf is other or torch.equal(leaf, other):
                    self._used.add(position)
                    return position
                tries += 1
        if tries >= _TRIES or self.nbytes + leaf.nbytes > self._limit():
            return None
        self._shared.append(leaf.clone() if leaf.untyped_storage().nbytes() > leaf.nbytes else leaf)
        self._used.add(len(self._shared) - 1)
        return len(self._shared) - 1

    def give(
        self, sample: int, use: Callable[[Use], Tensor], made: Callable[[int], Tensor]
    ) -> tuple[list[Any], Tree] | None:
        """Leaves of a sample, if no forward is needed for them: what it finds in the cache of outputs, and of tensors
        that were made, by position."""
        found = self._samples.get(sample)
        if found is None:
            return None
        entries, tree = found
        leaves = [
            use(entry)
            if kind == "use"
            else made(entry)
            if kind == "made"
            else self._shared[entry]
            if kind == "shared"
            else entry
            for kind, entry in entries
        ]
        return leaves, tree
