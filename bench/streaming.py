"""Tensors in host memory through a GPU: `python -m bench.streaming [--gib 16] [--pageable-gib 4] [--out FILE]`.

Quantizes a pinned tensor to the GPU, takes it through QDQ back to the host, and does both from pageable memory. Rates
are bytes of the tensor a second, beside those of copies of pinned memory in the same run: to the device, or both ways
at a time where results come back. Formats with a scale or divisor of the whole tensor read it twice, which counts as
twice the bytes. Bytes of the first, the middle and the last rows are compared with those of a call on the GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tritonq as tq
from tritonq import memory, ops
from tritonq.bench import measure as measured
from tritonq.bench import report
from tritonq.formats import get_format
from tritonq.tensor import Layout

FORMATS = ("int4_g128", "mxfp8", "nvfp4", "fp8_e4m3_tensor")
COLUMNS = 8192
BLOCK = 8191  # rows that repeat, so that no two windows hold the same ones
WINDOW = 256  # rows that are compared


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The best of several calls, from an idle device to an idle one."""
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def filled(rows: int, block: Tensor, pinned: bool) -> Tensor:
    x = torch.empty(rows, COLUMNS, dtype=block.dtype, pin_memory=pinned)
    for start in range(0, rows, BLOCK):
        x[start : start + BLOCK] = block[: min(BLOCK, rows - start)]
    return x


def copies(x: Tensor, y: Tensor) -> dict[str, float]:
    """GB/s of copies of pinned memory in pieces of 256 MiB: to the device, from it, and of each of both at a time."""
    rows = (256 << 20) // (COLUMNS * x.element_size())
    there, back = (torch.empty(rows, COLUMNS, dtype=x.dtype, device="cuda") for _ in range(2))
    into, out = torch.cuda.Stream(), torch.cuda.Stream()

    def run(lanes: tuple[bool, bool]) -> None:
        for source, target in zip(x.split(rows), y.split(rows), strict=True):
            if lanes[0]:
                with torch.cuda.stream(into):
                    there[: len(source)].copy_(source, non_blocking=True)
            if lanes[1]:
                with torch.cuda.stream(out):
                    target.copy_(back[: len(target)], non_blocking=True)

    lanes = {"to_device": (True, False), "to_host": (False, True), "both_ways": (True, True)}
    return {name: x.nbytes / seconds(lambda chosen=chosen: run(chosen), 2) / 1e9 for name, chosen in lanes.items()}


def windows(rows: int) -> list[slice]:
    starts = (0, (rows - WINDOW) // 2 // WINDOW * WINDOW, rows - WINDOW)
    return [slice(start, start + WINDOW) for start in starts]


def known(q: tq.QTensor, block: Tensor) -> dict[str, Tensor]:
    """Parts that the whole tensor shares, which are those of the block that repeats."""
    fmt = q.format
    names = {"tensor_scale"} if fmt.tensor_scale else {"scale"} if fmt.group[0] == -1 else set()
    own = ops.quantize(block.to(q.device), fmt)
    for name in names:
        if not torch.equal(own[name], q.parts()[name]):
            raise SystemExit(f"{fmt.name}: {name} is {q.parts()[name].tolist()}, not {own[name].tolist()}")
    return {name: own[name] for name in names}


def check(name: str, what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found.cuda().view(torch.uint8), expected.view(torch.uint8)):
        raise SystemExit(f"{name}: {what} differs from that of a call on the GPU")


def verify(x: Tensor, q: tq.QTensor, y: Tensor, block: Tensor) -> None:
    """Windows of a quantized tensor and of QDQ."""
    shared = known(q, block)
    for rows in windows(len(x)):
        parts = ops.quantize(x[rows].cuda(), q.format, **shared)
        check(q.format.name, f"qdata of rows {rows}", q.qdata[rows], parts["qdata"])
        if "scale" not in shared:
            check(q.format.name, f"scale of rows {rows}", q.scale[rows], parts["scale"])
        check(q.format.name, f"QDQ of rows {rows}", y[rows], ops.qdq(x[rows].cuda(), q.format, **shared))


def measure(
    x: Tensor, y: Tensor, block: Tensor, name: str, rates: dict[str, float], repeats: int
) -> list[dict[str, Any]]:
    fmt, rows = get_format(name), []
    passes = 2 if fmt.tensor_scale or fmt.group[0] == -1 else 1
    part = (512 << 20) // (COLUMNS * x.element_size())
    tq.quantize(x[:part], fmt, device="cuda")  # loads kernels, and makes staging buffers
    tq.qdq(x[:part], fmt, device="cuda", out=y[:part])
    layout = Layout.of(fmt, tuple(x.shape))
    q = tq.QTensor(torch.empty(layout.nbytes, dtype=torch.uint8, device="cuda"), layout, x.dtype)
    calls = {
        "quantize": (lambda: tq.quantize(x, fmt, device="cuda", out=q), rates["to_device"], passes),
        "qdq": (lambda: tq.qdq(x, fmt, device="cuda", out=y), rates["both_ways"], passes),
    }
    for what, (call, copy, times) in calls.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        taken = seconds(call, repeats)
        extra = torch.cuda.max_memory_allocated() - before
        rate = times * x.nbytes / taken / 1e9
        if what == "qdq" and times == 2:  # one of the passes goes one way only
            copy = 2 / (1 / rates["to_device"] + 1 / rates["both_ways"])
        row = {
            "format": name, "op": what, "memory": "pinned" if x.is_pinned() else "pageable", "gib": x.nbytes / 2**30,
            "seconds": round(taken, 4), "passes": times, "gb_s": round(rate, 2), "copy_gb_s": round(copy, 2),
            "of_copy": round(rate / copy, 4), "extra_mib": round(extra / 2**20, 2),
            "budget_mib": memory.budget() / 2**20,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:16} {what:8} {row['memory']:8} {row['gib']:5.1f} GiB {row['seconds']:7.3f} s {rate:6.2f} GB/s, "
            f"{100 * row['of_copy']:5.1f}% of copy, {row['extra_mib']:6.2f} MiB beside the result",
            flush=True,
        )
    verify(x, q, y, block)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--pageable-gib", type=float, default=4)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    generator = torch.Generator("cuda").manual_seed(0)
    block = torch.randn(BLOCK, COLUMNS, device="cuda", dtype=torch.bfloat16, generator=generator).cpu()
    result: dict[str, Any] = measured.environment(" ".join(["python -m bench.streaming", *sys.argv[1:]]))
    result |= {"threads": torch.get_num_threads(), "rows": []}
    for gib, pinned in ((args.gib, True), (args.pageable_gib, False)):
        rows = int(gib * 2**30) // (2 * COLUMNS)
        x, y = filled(rows, block, pinned), torch.empty(rows, COLUMNS, dtype=block.dtype, pin_memory=pinned)
        print(f"{gib} GiB {'pinned' if pinned else 'pageable'}, twice: {time.perf_counter() - start:.1f} s", flush=True)
        if pinned:
            result["copies_gb_s"] = rates = copies(x, y)
            print(", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()), flush=True)
        else:
            y.fill_(0)  # pages are there
        for name in args.formats.split(","):
            result["rows"] += measure(x, y, block, name, rates, args.repeats)
        del x, y
    report.finish(result, start, args.out)


if __name__ == "__main__":
    main()
