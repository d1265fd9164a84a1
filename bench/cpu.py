"""The CPU path beside naive eager torch: `python -m bench.cpu [--threads N] [--shape 4096x14336] [--out FILE]`.

Naive eager code is what a definition of the format looks like in torch, one full-size intermediate a step. Both give
the same bits, which is checked first. Times are medians; ratios hold on the machine they were taken on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq import ops


def naive_int4(x: Tensor) -> Tensor:
    """QDQ to int4_g128 as one writes it down: symmetric, full range, bf16 scales."""
    groups = x.float().reshape(-1, 128)
    high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    scale = (torch.where(high >= -low, -high, -low) / 8).to(torch.bfloat16).float()
    codes = torch.clamp(torch.round(groups / scale), -8, 7)
    return (codes * scale).reshape(x.shape).to(x.dtype)


def naive_mxfp4(x: Tensor) -> Tensor:
    """QDQ to mxfp4: scale 2^(floor(log2 amax) - 2), e2m1 by its three ranges."""
    groups = x.float().reshape(-1, 32)
    amax = groups.abs().amax(1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(amax)) - 2)
    scaled = torch.clamp(groups / scale, -6, 6)
    magnitude = scaled.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (torch.round(scaled / step) * step * scale).reshape(x.shape).to(x.dtype)


def rounded_straight_through(x: Tensor) -> Tensor:
    """Rounding whose gradient is the identity, as eager code writes it."""
    return x + (torch.round(x) - x).detach()


def tuned_int4(x: Tensor) -> Tensor:
    """The same numbers from the definition that tuning uses, s * clamp(rne(x / s + v)), with v = 0 and factors of 1 on
    the ends of a group: what weights go through that are fake-quantized in eager torch."""
    groups = x.float().reshape(-1, 128)
    v = torch.zeros(1)
    high = groups.amax(1, keepdim=True).clamp(min=0) * 1.0
    low = groups.amin(1, keepdim=True).clamp(max=0) * 1.0
    scale = (torch.where(high >= -low, -high, -low) / 8).to(torch.bfloat16).float()
    codes = torch.clamp(rounded_straight_through(groups / scale + v) + 8, 0, 15)
    return ((codes - 8) * scale).reshape(x.shape).to(x.dtype)


NAIVE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "shortest definition of int4_g128": ("int4_g128", naive_int4),
    "tuning definition of int4_g128": ("int4_g128", tuned_int4),
    "definition of mxfp4": ("mxfp4", naive_mxfp4),
}


def seconds(fn: Callable[[], Any], repeats: int) -> float:
    fn()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def run(shape: tuple[int, int], threads: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(shape).to(torch.bfloat16)
    y = torch.empty_like(x)
    copy = seconds(lambda: y.copy_(x), repeats)
    result: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(), "threads": threads, "shape": list(shape),
        "torch": torch.__version__, "command": "python -m bench.cpu", "copy_ms": round(copy * 1e3, 2), "rows": [],
    }  # fmt: skip
    for against, (name, naive) in NAIVE.items():
        if not torch.equal(ops.qdq(x, name), naive(x)):
            raise SystemExit(f"{name}: the CPU path and the naive definition differ")
        theirs = seconds(lambda fn=naive: fn(x), 5)
        for out in (None, y):
            ours = seconds(lambda name=name, out=out: ops.qdq(x, name, out=out), repeats)
            row = {
                "format": name, "op": "qdq", "against": against, "out": "fresh" if out is None else "given",
                "ms": round(ours * 1e3, 1), "naive_ms": round(theirs * 1e3, 1), "speedup": round(theirs / ours, 2),
                "of_copy": round(copy / ours, 4),
            }  # fmt: skip
            result["rows"].append(row)
            times = f"{row['ms']} ms ({row['out']} output), naive {row['naive_ms']} ms: {row['speedup']}x"
            print(f"{against:33} {times}; {100 * row['of_copy']:.0f}% of copy")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "qdq.json")
    args = parser.parse_args()
    rows, columns = map(int, args.shape.split("x"))
    result = run((rows, columns), args.threads, args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
