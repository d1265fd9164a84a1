"""Launching a kernel without Triton's argument binding, which costs more host time than a kernel of a few megabytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(part: Tensor) -> Tensor:
    """A part as integers of its width: kernels move bits, and sm_80 has no fp8 pointers."""
    integer = _INTEGERS[part.dtype.itemsize]
    return part if part.dtype is integer else part.view(integer)


class Plan:
    """One launch, ready but for its tensors: a kernel, how many programs, its integers and constants.

    Args:
        kernel: a Triton kernel whose parameters are tensors, then the words of a seed if calls bring one, then
            `integers`, then `constants` (constexprs). None among the integers stands for one that is not used.
        bits: positions of the tensors that the kernel sees as integers of their width.

    The first call on a device with tensors of some alignment compiles; later ones go to the driver at once. Types and
    sizes of the tensors have to be those of the first call.
    """

    __slots__ = ("_aligned", "_others", "bits", "constants", "integers", "kernel", "options", "programs")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        integers: tuple[int | None, ...],
        constants: tuple[Any, ...],
        options: dict[str, int],
        bits: tuple[int, ...] = (),
    ) -> None:
        self.kernel, self.programs, self.integers, self.constants = kernel, programs, integers, constants
        self.options, self.bits = options, bits
        self._aligned: dict[int | None, Any] = {}  # by device index
        self._others: dict[tuple[Any, ...], Any] = {}  # by device index, and which tensors begin at multiples of 16

    def __call__(self, *tensors: Tensor, seed: tuple[int, ...] = ()) -> None:
        addresses = [t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        device = tensors[0].get_device()
        if bits & 15 == 0:
            found = self._aligned.get(device)
            if found is None:
                self._aligned[device] = self._first(tensors, seed)
                return
        else:
            key = (device, *[address & 15 == 0 for address in addresses])
            found = self._others.get(key)
            if found is None:
                self._others[key] = self._first(tensors, seed)
                return
        compiled, run, function, metadata, hooks = found
        if hooks.calls:  # a profiler listens
            compiled[(self.programs, 1, 1)](*tensors, *seed, *self.integers, *self.constants)
            return
        # Addresses instead of tensors: the launcher would ask the driver about each tensor.
        run(
            self.programs, 1, 1, torch._C._cuda_getCurrentRawStream(device), function, metadata, None, None, None,
            *addresses, *seed, *self.integers, *self.constants,
        )  # fmt: skip

    def _first(self, tensors: tuple[Tensor, ...], seed: tuple[int, ...]) -> Any:
        """Launch through Triton; what later launches need, or None where they have to come here again."""
        seen = [as_integers(t) if i in self.bits else t for i, t in enumerate(tensors)]
        # A fused multiply-add would round differently from torch.
        compiled = self.kernel[(self.programs,)](
            *seen, *seed, *self.integers, *self.constants, **self.options, enable_fp_fusion=False
        )
        if not tensors[0].is_cuda or compiled is None:
            return None
        from triton import knobs

        hooks = knobs.runtime.launch_enter_hook
        return compiled, compiled.run, compiled.function, compiled.packed_metadata, hooks
