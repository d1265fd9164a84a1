"""Launching a kernel without Triton's argument binding, which costs more host time than a kernel of a few megabytes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
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
        waits: the kernel begins with `kernels.tile.begin`, so that it may be launched before earlier ones have ended
            (`launches_early`), and the time a launch takes is not added to theirs.

    The first call on a device with tensors of some alignment compiles; later ones go to the driver at once. Types and
    sizes of the tensors have to be those of the first call.
    """

    __slots__ = ("_others", "_ready", "bits", "constants", "integers", "kernel", "options", "programs", "waits")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        integers: tuple[int | None, ...],
        constants: tuple[Any, ...],
        options: dict[str, int],
        bits: tuple[int, ...] = (),
        waits: bool = False,
    ) -> None:
        self.kernel, self.programs, self.integers, self.constants = kernel, programs, integers, constants
        self.options, self.bits, self.waits = options, bits, waits
        self._ready: dict[int, Callable[..., None]] = {}  # by device: what launches tensors at multiples of 16 bytes
        self._others: dict[tuple[Any, ...], Callable[..., None]] = {}  # by device, and which tensors are aligned

    def __call__(self, *tensors: Tensor, seed: tuple[int, ...] = ()) -> None:
        addresses = [t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        device = tensors[0].get_device()
        aligned = bits & 15 == 0
        key = () if aligned else (device, *[address & 15 == 0 for address in addresses])
        run = self._ready.get(device) if aligned else self._others.get(key)
        if run is not None:
            run(*addresses, *seed)
            return
        run = self._first(tensors, seed)
        if run is not None and aligned:
            self._ready[device] = run
        elif run is not None:
            self._others[key] = run

    def five(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> None:
        """As a call with these tensors, in less host time."""
        of_a, of_b, of_c, of_d, of_e = a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr()
        if (of_a | of_b | of_c | of_d | of_e) & 15 == 0:
            run = self._ready.get(a.get_device())
            if run is not None:
                run(of_a, of_b, of_c, of_d, of_e)
                return
        self(a, b, c, d, e)

    def ready(self, beside: Tensor) -> Callable[..., None] | None:
        """What launches on the device of a tensor, given addresses that are multiples of 16; None before a call did."""
        return self._ready.get(beside.get_device())

    def _first(self, tensors: tuple[Tensor, ...], seed: tuple[int, ...]) -> Callable[..., None] | None:
        """Launch through Triton; what later launches call, or None where they have to come here again."""
        seen = [as_integers(t) if i in self.bits else t for i, t in enumerate(tensors)]
        early = {"launch_pdl": True} if self.waits and launches_early(tensors[0].device) else {}
        # A fused multiply-add would round differently from torch.
        compiled = self.kernel[(self.programs,)](
            *seen, *seed, *self.integers, *self.constants, **self.options, **early, enable_fp_fusion=False
        )
        if not tensors[0].is_cuda or compiled is None:
            return None
        return _launcher(compiled, self.programs, (*self.integers, *self.constants), tensors[0].get_device())


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels that wait for earlier launches are launched before these have ended: asked for by the environment
    variable TRITONQ_PDL, on NVIDIA GPUs from sm_90 on."""
    if os.environ.get("TRITONQ_PDL", "0") in ("", "0") or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _launcher(compiled: Any, programs: int, rest: tuple[Any, ...], device: int) -> Callable[..., None]:
    """What launches a compiled kernel on the current stream, given addresses: its launcher would ask the driver about
    each tensor."""
    from triton import knobs

    stream = torch._C._cuda_getCurrentRawStream
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    driver, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    into_driver = _into_driver(driver)

    def launch(*arguments: int) -> None:
        if before.calls or after.calls:  # a profiler listens
            compiled[(programs, 1, 1)](*arguments, *rest)
        elif into_driver is None:
            driver(programs, 1, 1, stream(device), function, metadata, None, None, None, *arguments, *rest)
        else:
            into_driver(programs, stream(device), function, metadata, (*arguments, *rest))

    return launch


def _into_driver(launcher: Any) -> Callable[[int, int, Any, Any, tuple[Any, ...]], None] | None:
    """The C function below Triton's launcher, where this version of Triton is known and the kernel takes no scratch
    memory, which is what the launcher looks after."""
    import triton

    version = tuple(triton.__version__.split(".")[:2])
    try:
        if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
            return None
        start, options = launcher.launch, (launcher.launch_cooperative_grid, launcher.launch_pdl)
        if version == ("3", "6"):
            return lambda programs, stream, function, metadata, arguments: start(
                programs, 1, 1, stream, function, *options, None, None, metadata, None, None, None, *arguments
            )
        if version == ("3", "9"):
            types = launcher.arg_annotations, launcher.kernel_signature
            return lambda programs, stream, function, metadata, arguments: start(
                programs, 1, 1, stream, function, *options, metadata, None, None, None, None, None, *types, arguments
            )
    except AttributeError:
        pass
    return None
