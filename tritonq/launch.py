"""Launching a kernel without Triton's argument binding, which costs more host time than a kernel of a few megabytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HIP = torch.version.hip is not None
_compiled: dict[tuple[Any, ...], Any] = {}


def _specialisation(value: Any) -> Any:
    """What Triton specialises an argument on: type and alignment of a pointer; being 1, the type and divisibility by 16
    of an integer."""
    if isinstance(value, Tensor):
        if _HIP:  # AMD's backend also uses whether 32-bit offsets reach the whole tensor
            return value.dtype, value.data_ptr() % 16 == 0, value.nbytes < 2**31
        return value.dtype, value.data_ptr() % 16 == 0
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int) -> None:
    """Run `programs` instances. `arguments` are tensors and integers, `constants` the values of the trailing
    constexprs, both in the order of the kernel's parameters.

    The first launch goes through Triton; later ones with the same specialisation take the compiled kernel at once.
    """
    device = arguments[0].device
    key = (kernel, device.index, constants, warps, *[_specialisation(a) for a in arguments])
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *constants)
        return
    # A fused multiply-add would round differently from torch.
    result = kernel[(programs,)](*arguments, *constants, num_warps=warps, enable_fp_fusion=False)
    if device.type != "cpu" and not torch.compiler.is_compiling():
        _compiled[key] = result
