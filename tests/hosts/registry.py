"""What a mode of a host is, and what has to hold: the same bits, weights still quantized, nothing left behind."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonq as tq
from tritonq.nn.schemes import Scheme
from tritonq.tensor import Layout, QTensor

# Weights of every format that has to pass; two of them with inputs that are quantized, too, one with a buffer for that.
SCHEMES = {
    "int4_g128": Scheme("int4_g128", "int4_g128"),
    "int8_channel": Scheme("int8_channel", "int8_channel"),
    "fp8_e4m3_channel": Scheme("fp8_e4m3_channel", "fp8_e4m3_channel", "fp8_e4m3_channel"),
    "mxfp8": Scheme("mxfp8", "mxfp8", scale_follows_weight=False),
    "mxfp4": Scheme("mxfp4", "mxfp4", scale_follows_weight=False),
    "nvfp4": Scheme("nvfp4", "nvfp4", "nvfp4", scale_follows_weight=False),
}


@dataclass(frozen=True)
class Mode:
    """One way of using a host library.

    `run(at)` uses it and asserts what has to hold; where `error` is given, it has to raise that, with `message` in it.
    `devices` are those on which it can be run at all; `note` is for the page; on the CPU, what is `slow` runs with one
    format.
    """

    host: str
    name: str
    run: Callable[[Setting], None]
    devices: tuple[str, ...] = ("cpu", "cuda")
    error: type[Exception] | None = None
    message: str = ""
    note: str = ""
    slow: bool = False

    @property
    def id(self) -> str:
        return f"{self.host}, {self.name}"


MODES: list[Mode] = []
IN_SAFETENSORS = "a quantized tensor has no storage of its shape and dtype"  # what their writer is told


def mode(host: str, name: str, **options: Any) -> Callable[[Callable[[Setting], None]], Callable[[Setting], None]]:
    def register(run: Callable[[Setting], None]) -> Callable[[Setting], None]:
        MODES.append(Mode(host, name, run, **options))
        return run

    return register


# ---------------------------------------------------------------------------------------------------------- tiny models


class Experts(nn.Module):
    """Fused experts [E, out, in], an ordinary parameter of rank 3 on a module that no host knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[0]) + nn.functional.linear(x, self.weight[1])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.experts = Experts(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + hidden + self.experts(hidden)


class Tiny(nn.Module):
    """Blocks, a quantized last layer, and a parameter and a buffer of its own."""

    width, depth = 160, 3

    def __init__(self) -> None:
        super().__init__()
        width = self.width
        self.blocks = nn.ModuleList(Block(width) for _ in range(self.depth))
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.randn(width))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x * self.gain + self.shift)


def quantized(build: Callable[[], nn.Module], scheme: Scheme) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(torch.bfloat16).eval()
    return tq.quantize_(model, scheme, search=False, progress=False)


_quantized = functools.lru_cache(maxsize=None)(quantized)


# ----------------------------------------------------------------------------------------------------- what has to hold


@dataclass
class Setting:
    """Where a mode is run: a format of weights, a device to compute on, a folder of its own."""

    format: str
    device: str
    folder: Path
    build: Callable[[], nn.Module] = field(default=Tiny)

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.format]

    def model(self, build: Callable[[], nn.Module] | None = None, *, inputs: bool = True) -> nn.Module:
        """A quantized model of its own, on the CPU, the same in every call; without `inputs` only weights are."""
        scheme = self.scheme if inputs else replace(self.scheme, inputs=None)
        return copy.deepcopy(_quantized(build or self.build, scheme))

    def input(self, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[2, 3, 160], on the device."""
        return torch.randn(2, 3, 160, generator=torch.Generator().manual_seed(seed)).to(self.device, dtype)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes that tensors take on the device."""
        if self.device == "cpu":
            return 0
        self.wait()
        gc.collect()  # hooks and the modules that they wrap are cycles
        return torch.cuda.memory_allocated()

    @contextmanager
    def nothing_left(self, *models: nn.Module) -> Iterator[None]:
        """What the body allocates on the device is free when it ends, but for what models say they have there."""
        _warm(self.device)
        before = self.allocated() - resident(*models)
        yield
        left, expected = self.allocated() - before, resident(*models)
        assert left == expected, f"{left} bytes are allocated on the device, {expected} by what the models have there"


@functools.cache
def _warm(device: str) -> None:
    """Have the libraries that multiply matrices allocate their workspaces."""
    for dtype in (torch.bfloat16, torch.float32) if device != "cpu" else ():
        with torch.enable_grad():
            model = Tiny().to(device, dtype)
            model(torch.ones(2, 3, Tiny.width, device=device, dtype=dtype)).sum().backward()


def resident(*models: nn.Module) -> int:
    """Bytes of the allocator for the tensors of models that say they are on a GPU; it hands out multiples of 512."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"]
    payloads = {t.data_ptr(): getattr(t, "_buf", t) for t in tensors if t.numel()}
    return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in payloads.values())


def qtensors(model: nn.Module) -> dict[str, QTensor]:
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, QTensor)}


def contents(model: nn.Module) -> dict[str, tuple[Layout, torch.dtype, Tensor]]:
    """Layout, dtype and bytes of every quantized parameter."""
    found = {name: (q._layout, q.dtype, q._buf.cpu().clone()) for name, q in qtensors(model).items()}
    assert found, "the model has no quantized parameter"
    return found


def check_contents(model: nn.Module, wanted: dict[str, tuple[Layout, torch.dtype, Tensor]], device: str | None) -> None:
    """Quantized parameters are the same ones, with the same bytes, on `device` (None: anywhere; meta has no bytes)."""
    found = qtensors(model)
    assert found.keys() == wanted.keys(), f"no longer quantized: {sorted(wanted.keys() - found.keys())}"
    for name, q in found.items():
        layout, dtype, content = wanted[name]
        assert isinstance(q, nn.Parameter), f"{name} is no parameter any more"
        assert (q._layout, q.dtype) == (layout, dtype), f"{name} is {q!r}"
        assert q.device == q._buf.device, f"{name} says {q.device}, its payload is on {q._buf.device}"
        assert device is None or q.device.type == device, f"{name} is on {q.device}, not on {device}"
        assert q.device.type == "meta" or torch.equal(q._buf.cpu(), content), f"the bytes of {name} changed"


def equal(found: Any, wanted: Any) -> bool:
    return found.dtype is wanted.dtype and found.device == wanted.device and torch.equal(found, wanted)


Use = Callable[[nn.Module], Any]


@torch.no_grad()
def same_outputs(
    at: Setting,
    apply: Use,
    *,
    build: Callable[[], nn.Module] | None = None,
    call: Callable[[nn.Module], Tensor] | None = None,
    release: Use = lambda model: None,
    rests_on: str | None = "cpu",
    steps: int = 3,
) -> nn.Module:
    """Run a model `steps` times after `apply`, then `release` it: outputs are those of the model without the host, and
    then nothing of it is on the device any more; weights rest on `rests_on`. Returns the model."""
    call = call or (lambda model: model(at.input()))
    wanted = call(at.model(build).to(at.device))
    model = at.model(build)
    before = contents(model)
    with at.nothing_left(model):
        result = apply(model)
        used = model if result is None else result
        for step in range(steps):
            assert equal(call(used), wanted), f"outputs differ in step {step}"
    with at.nothing_left(model):
        release(used)
    check_contents(model, before, rests_on)
    return model


def save_refused(at: Setting, save: Callable[[nn.Module, str], Any], build: Callable[[], nn.Module] = Tiny) -> None:
    """`save(model, folder)` raises; it leaves no weights that somebody could load."""
    try:
        save(at.model(build).to(at.device), str(at.folder))
    finally:
        assert not [*at.folder.glob("**/*.safetensors"), *at.folder.glob("**/*.bin")]
