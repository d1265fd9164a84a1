"""Weights in host memory, copied while others compute: `python -m bench.offload [--blocks 24] [--out FILE]`.

A model of transformer-like blocks (hidden size 4096, quantized linear layers, no attention) runs in three ways: all on
the GPU, offloaded (`tritonq.offload.enable`), and, where diffusers can be imported (`--peers`), with its
`apply_group_offloading(use_stream=True)`. Outputs are compared bit for bit before anything is timed.

- *transfer*: a step with few tokens, everything but the slabs offloaded. Bytes of the groups a second, beside copies of
  pinned memory in the same run.
- *balanced*: a budget of a third of the model, and as many tokens as make computing take as long as copying what does
  not fit. Time of a step beside the longer of both alone; the same for a step with backward.
- Copies and waits of the host come from a trace of torch's profiler, memory from torch's allocator.
"""

from __future__ import annotations

import argparse
import collections
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonq as tq
from tritonq.bench import measure as measured
from tritonq.bench import report

HIDDEN, INNER = 4096, 11008
FEW = 16  # tokens of the model that waits for copies
STEPS, WARM = 6, 3
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
Row = dict[str, Any]


class Block(nn.Module):
    def __init__(self, fmt: str, generator: torch.Generator) -> None:
        super().__init__()
        sizes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN),
                 "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}  # fmt: skip
        for name, (rows, columns) in sizes.items():
            layer = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.bfloat16)
            weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
            layer.weight = nn.Parameter(tq.quantize(weight / columns**0.5, fmt), requires_grad=False)
            self.add_module(name, layer)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.o(nn.functional.silu(self.q(y)) * self.k(y) + self.v(y))
        y = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, blocks: int, fmt: str) -> None:
        super().__init__()
        generator = torch.Generator("cuda").manual_seed(0)
        self.blocks = nn.ModuleList(Block(fmt, generator) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tokens(count: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(count, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)


def seconds(call: Callable[[], Any], steps: int = STEPS) -> float:
    """Of a step in a row of them, from an idle device to an idle one; the better of two rows."""
    for _ in range(WARM):
        call()
    best = float("inf")
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / steps)
    return best


def pinned_gb_s(nbytes: int) -> float:
    """Copies of `nbytes` of pinned memory to the device, one after the other, as a group is copied."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    targets = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    count = max(8, (4 << 30) // nbytes)

    def run() -> None:
        for index in range(count):
            targets[index % 2].copy_(source, non_blocking=True)

    return count * nbytes / seconds(run, 1) / 1e9


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def backward(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the input, through all blocks."""
    leaf = x.detach().requires_grad_(True)
    y = model(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return gradient


def trace(call: Callable[[], Any], steps: int) -> Row:
    """Copies a step by direction, and calls within the steps that hold up the host."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("steps"):
            for _ in range(steps):
                call()
        torch.cuda.synchronize()
    events = list(profiler.events())
    span = next(event for event in events if event.name == "steps").time_range
    waits = collections.Counter(
        e.name for e in events if e.name in WAITS and span.start <= e.time_range.start <= span.end
    )
    return {
        "copies_to_device": sum(e.name.startswith("Memcpy HtoD") for e in events) / steps,
        "copies_to_host": sum(e.name.startswith("Memcpy DtoH") for e in events) / steps,
        "host_waits": {name: count / steps for name, count in waits.items()},
    }


def check(name: str, found: Tensor, expected: Tensor) -> None:
    if not torch.isfinite(expected).all() or not torch.equal(found, expected):
        raise SystemExit(f"{name}: outputs differ from those of the model on the GPU")


def transfer_bound(model: nn.Module, name: str, pinned: float) -> Row:
    x = tokens(FEW)
    expected = forward(model, x)
    computing = seconds(lambda: forward(model, x))
    with tq.offload.enable(model, device="cuda") as handle:
        check(f"{name}, transfer", forward(model, x), expected)
        taken = seconds(lambda: forward(model, x))
        counts = trace(lambda: forward(model, x), 3)
        rate = handle.offloaded_bytes / taken / 1e9
        return {
            "model": "transfer", "format": name, "tokens": FEW, "groups": len(handle.groups),
            "gib": round(handle.offloaded_bytes / 2**30, 3), "compute_ms": round(1e3 * computing, 3),
            "step_ms": round(1e3 * taken, 3), "gb_s": round(rate, 2), "of_pinned": round(rate / pinned, 4), **counts,
        }  # fmt: skip


def balanced(model: nn.Module, name: str, pinned: float, total: int) -> tuple[list[Row], int]:
    """Rows of a step without and with backward, and the number of tokens."""
    limit, rows, count = total // 3, [], 4096
    transfer = total * (2 / 3 + 3 / len(model.blocks)) / pinned / 1e9  # what is left beside three slabs
    for _ in range(2):
        x = tokens(count)
        computing = seconds(lambda x=x: forward(model, x))
        count = max(256, round(count * transfer / computing / 128) * 128)
    x = tokens(count)
    for what, call, budget in (
        ("forward", forward, limit),
        ("forward and backward", backward, limit),
        ("forward, all offloaded", forward, None),
    ):
        expected = call(model, x)
        computing = seconds(lambda call=call: call(model, x))
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated() - total
        with tq.offload.enable(model, device="cuda", budget=budget) as handle:
            moved = handle.offloaded_bytes
            held, slabs = torch.cuda.memory_allocated() - base, len(handle._manager.slabs)
            check(f"{name}, {what}", call(model, x), expected)
            taken = seconds(lambda call=call: call(model, x))
            counts = trace(lambda call=call: call(model, x), 3)
            # Groups are equal. On the way back those that were last are still there, and the first on the next way.
            copied = moved / len(handle.groups) * counts["copies_to_device"]
            bound = max(computing, copied / pinned / 1e9)
            after = torch.cuda.memory_allocated() - base
        rows.append({
            "model": "balanced", "what": what, "format": name, "tokens": count, "groups": len(handle.groups),
            "slabs": slabs,
            "gib": round(total / 2**30, 3), "budget_gib": budget and round(budget / 2**30, 3), "held_bytes": held,
            "planned_bytes": handle.slab_bytes + handle.resident_bytes, "held_after_bytes": after,
            "compute_ms": round(1e3 * computing, 3), "transfer_ms": round(1e3 * copied / pinned / 1e9, 3),
            "step_ms": round(1e3 * taken, 3), "of_bound": round(taken / bound, 4), **counts,
        })  # fmt: skip
    return rows, count


def peer(model: nn.Module, x: Tensor, expected: Tensor, record: bool) -> Row:
    """diffusers' group offload of the same blocks, prefetched on a stream.

    `differences` are the largest ones of three steps, each waited for. They were not 0 on an H100 with diffusers
    0.42.1, and neither were those of the same model with dense weights, though every weight on the device was right
    when its block had ended; the small models of `tests/hosts` are equal bit for bit. So times of this row are those of
    a wrong result.
    """
    from diffusers.hooks import apply_group_offloading

    model.cpu()
    apply_group_offloading(
        model, torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True,
        record_stream=record,
    )  # fmt: skip
    found = []
    for _ in range(3):
        found.append(forward(model, x))
        torch.cuda.synchronize()
    differences = [float((y - expected).abs().max()) for y in found]
    taken = seconds(lambda: forward(model, x))
    return {"step_ms": round(1e3 * taken, 3), "differences": differences, **trace(lambda: forward(model, x), 2)}


def peers(blocks: int, name: str, count: int) -> dict[str, Row]:
    """Each on a model of its own, at both numbers of tokens."""
    rows: dict[str, Row] = {}
    for record, many in ((False, FEW), (False, count), (True, count)):
        label = f"use_stream{', record_stream' if record else ''}, {many} tokens"
        model, x = Model(blocks, name), tokens(many)
        expected = forward(model, x)
        try:
            rows[label] = peer(model, x, expected, record)
        except Exception as failure:
            rows[label] = {"error": f"{type(failure).__name__}: {failure}"[:300]}
        del model
        gc.collect()
        torch.cuda.empty_cache()
        print(f"  diffusers {label}: {rows[label]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="fp8_e4m3_channel,int4_g128")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--peers", default="first", choices=("none", "first", "all"), help="formats with diffusers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measured.require_gpu()
    start = time.perf_counter()
    result: Row = measured.environment(" ".join(["python -m bench.offload", *sys.argv[1:]])) | {"rows": [], "peers": {}}
    for index, name in enumerate(args.formats.split(",")):
        base = torch.cuda.memory_allocated()
        model = Model(args.blocks, name)
        total = torch.cuda.memory_allocated() - base
        pinned = pinned_gb_s(total // args.blocks)
        print(f"{name}: {total / 2**30:.2f} GiB, pinned copies {pinned:.2f} GB/s", flush=True)
        row = transfer_bound(model, name, pinned)
        print(f"  transfer: {row['gb_s']} GB/s, {100 * row['of_pinned']:.1f}% of pinned copies; {row}", flush=True)
        rows, count = balanced(model, name, pinned, total)
        for found in rows:
            print(
                f"  {found['what']}: {found['step_ms']} ms, {found['of_bound']:.3f} of the bound; {found}", flush=True
            )
        result["rows"] += [row | {"pinned_gb_s": round(pinned, 2)} for row in (row, *rows)]
        del model
        gc.collect()
        torch.cuda.empty_cache()
        if args.peers == "all" or (args.peers == "first" and index == 0):
            result["peers"][name] = peers(args.blocks, name, count)
    report.finish(result, start, args.out)


if __name__ == "__main__":
    main()
