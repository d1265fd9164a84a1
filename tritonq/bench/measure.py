"""Verify, then time: every format and operation on one shape after the other, peers beside us in the same run."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq import ops
from tritonq.bench import cases, peers, timing
from tritonq.bench.precompile import compile_all
from tritonq.bench.verify import verify
from tritonq.formats import Format, get_format

Row = dict[str, Any]
Say = Callable[[str], None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What to measure; `budget` seconds from the start of `run`, None for as long as it takes. With `workers`, so many
    processes compile everything first, in at most half of the budget."""

    formats: tuple[str, ...] = ()  # all
    shapes: tuple[cases.Shape2, ...] = (cases.SHAPE,)
    dtypes: tuple[str, ...] = ("bfloat16",)
    peers: tuple[str, ...] = peers.LABELS
    budget: float | None = None
    workers: int = 0
    command: str = "tritonq bench"


def environment(command: str) -> Row:
    root = Path(__file__).parents[2]
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else ""
    return {
        "gpu": gpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "commit": os.environ.get("COMMIT") or commit or None,
        "command": command,
    }


def gpu_name() -> str:
    return torch.cuda.get_device_name()


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs a CUDA GPU, and torch sees none here")
    if not ops.uses_triton(torch.empty(0, device="cuda")):
        raise ValueError("the benchmark needs Triton; install it with `pip install triton`")


def run(options: Options, say: Say = print, save: Callable[[Row], None] = lambda result: None) -> Row:
    """The result, as it is written to JSON; `save` gets it after every format, then with `complete` false and
    `left_out` naming what has not been measured yet.

    Raises:
        ValueError: no GPU, no Triton, or an unknown format.
    """
    formats = [get_format(name) for name in options.formats or cases.all_formats()]
    require_gpu()
    started, slowest = time.monotonic(), 0.0
    torch.manual_seed(0)
    result: Row = {**environment(options.command), "copy_us": None, "copy_gb_per_s": None, "copies": []}
    todo = [(dtype, shape, fmt) for dtype in options.dtypes for shape in options.shapes for fmt in formats]
    left_out = [[fmt.name, list(shape), dtype] for dtype, shape, fmt in todo]
    result |= {"budget_s": options.budget, "complete": False, "left_out": left_out, "failed": []}
    result |= {"peers": peers.available(options.peers), "host_us": _host_times(), "rows": []}
    installed = tuple(label for label in options.peers if result["peers"][label])
    say(f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}; peers: {', '.join(installed) or 'none'}")
    say(f"host time of a call, us: {result['host_us']}")
    if options.workers:
        limit = None if options.budget is None else options.budget / 2
        types = [DTYPES[dtype] for dtype in options.dtypes]
        names = [fmt.name for fmt in formats]
        done, of, seconds = compile_all(names, options.shapes, types, installed, options.workers, limit)
        result["compiled"] = {"done": done, "of": of, "seconds": round(seconds, 1)}
        say(f"compiled {done} of {of} operations in {seconds:.1f} s with {options.workers} workers")
    timing.warm_up()
    kind, x = None, torch.empty(0)
    for dtype, shape, fmt in todo:
        begun = time.monotonic()
        if options.budget is not None and begun - started + slowest > options.budget:
            break
        if kind != (dtype, shape):
            kind, x = (dtype, shape), torch.empty(0)  # frees the last one before there is another
            x = _random(shape, dtype)
            copy = _copy(x)
            result["copies"].append(copy)
            if result["copy_us"] is None:
                result |= {"copy_us": copy["us"], "copy_gb_per_s": copy["gb_per_s"]}
            say(f"{shape[0]}x{shape[1]} {dtype}: copy {copy['us']} us, {copy['gb_per_s']} GB/s")
        del left_out[0]
        try:
            rows = bench_format(fmt, x, copy["gb_per_s"], installed)
        except RuntimeError as error:  # verify.Mismatch, out of memory, a kernel that does not compile
            result["failed"].append(f"{fmt.name} {shape[0]}x{shape[1]} {dtype}: {error}".split("\n")[0])
            say(f"FAILED {result['failed'][-1]}")
            continue
        result["rows"] += rows
        slowest = max(slowest, time.monotonic() - begun)
        say(f"{fmt.name:24} " + "  ".join(map(_brief, rows)))
        save(result)
    result["complete"] = not result["left_out"] and not result["failed"]
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _brief(row: Row) -> str:
    compiled = row["peers"].get("torch.compile", {}).get("speedup")
    return f"{row['op']} {row['us']:.1f} us {100 * row['of_copy']:.0f}%" + (f" {compiled:.2f}x" if compiled else "")


def _host_times() -> dict[str, float]:
    """Microseconds before a call on a small tensor returns."""
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    fmt = get_format("int4_g128")
    calls: dict[str, Callable[[], Any]] = {"clone": x.clone}
    for op in cases.operations(fmt):
        one = peers.ours(fmt, op, x)
        calls[op] = functools.partial(one.call, *one.prepare(x))
    return {name: round(timing.host_us(call), 1) for name, call in calls.items()}


def _random(shape: cases.Shape2, dtype: str) -> Tensor:
    return torch.randn(shape, dtype=DTYPES[dtype], device="cuda")


def _l2() -> int:
    return int(getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0))


def _rotated(x: Tensor, nbytes: int) -> list[Tensor]:
    """x, and as many copies as it takes for inputs of `nbytes` each to exceed the cache."""
    return [x, *(x.clone() for _ in range(timing.copies(nbytes, _l2()) - 1))]


def _copy(x: Tensor) -> Row:
    inputs = [(one, torch.empty_like(one)) for one in _rotated(x, x.nbytes)]
    us = timing.device_us(lambda source, target: target.copy_(source), inputs)
    return {
        "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "us": round(us, 2),
        "gb_per_s": round(2 * x.nbytes / us / 1e3, 1),
    }  # fmt: skip


EQUAL_COPIES = 64 << 20  # largest tensor whose ops are also compared with a copy that moves as many bytes


@functools.cache
def _equal_copy_us(nbytes: int, device: torch.device) -> float:
    """A copy that moves `nbytes` in all. Small tensors spend most of their time on a launch and a wait, so where fewer
    bytes move, less bandwidth is within anyone's reach."""
    us: float = _copy(torch.randn(max(1, nbytes // 4), device=device).to(torch.bfloat16))["us"]
    return us


def bench_format(fmt: Format, x: Tensor, copy_gb_per_s: float, labels: tuple[str, ...]) -> list[Row]:
    """A row for every operation of one format. Raises Mismatch where the GPU and the CPU path differ."""
    verified, rows = verify(fmt, x), []
    shape = (x.shape[0], x.shape[1])
    for op in cases.operations(fmt):
        inputs = _rotated(x, cases.input_bytes(fmt, op, shape, x.dtype.itemsize))
        own = peers.ours(fmt, op, x)
        arguments = [own.prepare(one) for one in inputs]
        us, eager_us = timing.device_us(own.call, arguments), timing.event_us(own.call, arguments)
        expected = own.values(own.call(*arguments[0]))
        del arguments
        nbytes = cases.moved_bytes(fmt, op, shape, x.dtype.itemsize)
        speed = nbytes / us / 1e3
        equal = {"of_equal_copy": round(_equal_copy_us(nbytes, x.device) / us, 4)} if x.nbytes <= EQUAL_COPIES else {}
        rows.append({
            "format": fmt.name, "op": op, "shape": list(shape), "dtype": str(x.dtype).removeprefix("torch."),
            "us": round(us, 2), "eager_us": round(eager_us, 2), "bytes": nbytes, "gb_per_s": round(speed, 1),
            "of_copy": round(speed / copy_gb_per_s, 4), **equal, "verified": verified, "inputs": len(inputs),
            "peers": {
                one.label: _against(one, inputs, expected, us) for one in peers.peers(fmt, op, x, labels)
            },
        })  # fmt: skip
    return rows


def _against(peer: peers.Contender, inputs: list[Tensor], expected: Tensor, us: float) -> Row:
    """How far a peer's values are from ours, and its time; compiling comes with the first call, before both."""
    try:
        first = peer.prepare(inputs[0])
        mismatch, largest = peers.difference(peer.values(peer.call(*first)), expected)
        arguments = [first, *(peer.prepare(one) for one in inputs[1:])]
        theirs = (timing.device_us if peer.graph else timing.event_us)(peer.call, arguments)
    except Exception as error:
        torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    comparable = mismatch <= peers.COMPARABLE
    return {
        "us": round(theirs, 2), "speedup": round(theirs / us, 3) if comparable else None, "comparable": comparable,
        "mismatch": float(f"{mismatch:.3g}"), "max_diff": float(f"{largest:.3g}"),
        "timer": "graph" if peer.graph else "events",
    }  # fmt: skip
