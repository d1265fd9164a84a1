"""Who multiplies what: every `F.linear` or matrix product with an operand that lies in the memory of a weight.

Whichever module calls it, and however: linear layers, code that reads their weights, experts that are called one by one
or several at once. The expert follows from the operand's address.
"""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Calls(TorchFunctionMode):
    """Tells `see(name, expert, x)` of every matrix product with (a view of) one of the named weights.

    x is the other operand as the model passed it; an expert is a number or, of one product for several, a range of
    them, which x has on its first axis.
    """

    def __init__(self, weights: Mapping[Any, Tensor], see: Callable[[Any, int | range, Tensor], None]) -> None:
        super().__init__()
        found = sorted((w.data_ptr(), i, key, w) for i, (key, w) in enumerate(weights.items()) if w.numel())
        self.starts = [start for start, _, _, _ in found]
        self.weights = [(key, w) for _, _, key, w in found]
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None:
            x, operand = (_argument(args, kwargs, *where) for where in product[:2])
            if isinstance(x, Tensor) and isinstance(operand, Tensor):
                self.look(x, operand if product[2] else operand.mT if operand.ndim > 1 else operand)
        return func(*args, **kwargs)

    def look(self, x: Tensor, operand: Tensor) -> None:
        address = operand.data_ptr() if operand.ndim >= 2 and operand.numel() else 0
        place = bisect.bisect_right(self.starts, address) - 1
        if place < 0:
            return
        key, weight = self.weights[place]
        offset = (address - self.starts[place]) // weight.element_size()
        same = operand.dtype is weight.dtype and operand.stride(-1) == 1 and operand.shape[-1] == weight.shape[-1]
        if offset >= weight.numel() or not same or x.shape[-1] != weight.shape[-1]:
            return
        expert = offset // (weight.shape[-2] * weight.shape[-1]) if weight.ndim == 3 else 0
        if operand.ndim == 3 and operand.shape[0] > 1:
            self.see(key, range(expert, expert + operand.shape[0]), x)
        else:
            self.see(key, expert, x)


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


# Function: (rows, weight, whether the weight is [.., out, in] and not its transpose).
_PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str], bool]] = {
    nn.functional.linear: ((0, "input"), (1, "weight"), True),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ((0, "input"), (1, "other"), False)),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), ((0, "input"), (1, "mat2"), False)),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ((1, "mat1"), (2, "mat2"), False)),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ((1, "batch1"), (2, "batch2"), False)),
}  # fmt: skip


@contextlib.contextmanager
def eagerly(block: nn.Module) -> Iterator[None]:
    """Inside, code runs call by call: compiled modules as they were written, and fused experts one at a time, as far as
    transformers runs them."""
    configs = {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}
    found = [c for c in configs.values() if hasattr(c, "_experts_implementation_internal")]
    before = [c._experts_implementation_internal for c in found]
    compiles = "torch._dynamo" in sys.modules  # else nothing is compiled, and the import takes a while
    try:
        for config in found:
            config._experts_implementation_internal = "eager"
        with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
            yield
    finally:
        for config, old in zip(found, before, strict=True):
            config._experts_implementation_internal = old
