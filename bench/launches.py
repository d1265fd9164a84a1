"""What a call would launch on a GPU, recorded on CPU tensors, and compiled for any target without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tritonq import launch, learned_plans, ops, plans

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
         torch.uint8: "*u8",
         torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")


class Launch:
    """A kernel with one set of arguments: signature, specialisation and options are those of the real launch.

    `programs` is its grid, `largest` the bytes of its largest tensor; `key` is equal where compiling gives the same.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], programs: int = 1) -> None:
        self.kernel, self.programs, names = kernel, programs, kernel.arg_names
        bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        self.options = {k: v for k, v in kwargs.items() if k in OPTIONS}
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.attributes: dict[tuple[int], Any] = {}
        self.largest = max((v.nbytes for v in bound.values() if isinstance(v, torch.Tensor)), default=0)
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        plain = {p.name for p in kernel.params if p.do_not_specialize}
        for i, name in enumerate(names):
            value = bound[name]
            if isinstance(value, torch.Tensor):
                self.signature[name] = TYPES[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif name in constexprs or value is None or (value == 1 and name not in plain):
                self.signature[name], self.constants[name], aligned = "constexpr", value, False
            else:
                self.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0 and name not in plain
            if aligned:
                self.attributes[(i,)] = [["tt.divisibility", 16]]
        shown = [self.constants[k] for k in ("MODE", "FINITE") if k in self.constants]
        self.name = "-".join(map(str, (kernel.__name__, *shown)))
        self.key = (self.name, repr(self.signature), repr(self.constants), repr(self.attributes), repr(self.options))

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, constexprs=self.constants, attrs=self.attributes)

    def compile(self, target: GPUTarget) -> Any:
        without = set() if target.backend == "cuda" else {"maxnreg", "launch_pdl"}
        if target.backend == "cuda" and target.arch < 90:
            without = {"launch_pdl"}
        options = {k: v for k, v in self.options.items() if k not in without}
        return triton.compile(self.source(), target=target, options=options)


def launched(call: Callable[[], Any], early: bool = True) -> list[Launch]:
    """What call() launches on CPU tensors, as on a GPU; nothing runs. Args: early: as on one that launches kernels
    before earlier ones have ended, see `Plan.waits`."""
    found = []

    def run(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        found.append(Launch(self, args, kwargs, grid[0]))

    with (
        patch.object(JITFunction, "run", run),
        patch.object(ops, "uses_triton", lambda x: True),
        patch.object(launch, "launches_early", lambda device: early),
    ):
        plans.forget()
        learned_plans.forget()
        call()
    plans.forget()  # their kernels were never compiled
    learned_plans.forget()
    return found
