"""Kernels against a copy, on a GPU: `python -m bench.kernels [--formats ...] [--shape 4096x14336] [--out FILE]`.

Each op is verified against the CPU path first, bit for bit, then timed: median of many event-timed repeats, on random
data larger than the L2 cache. "of copy" is (bytes that must move / time) over the bandwidth of `copy_` on a tensor of
the same size in the same run. Formats with a tensor-wide scale have to read their input twice; the bytes say so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import triton

from tritonq import ops
from tritonq.formats import FORMATS, Format, get_format

ISSUE_FORMATS = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4")


def time_us(fn: Any, repeats: int = 30, inner: int = 10) -> float:
    """Median microseconds of one call on the device: `inner` calls captured in a CUDA graph, so that no host time
    counts."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            fn()
    return event_us(graph.replay, repeats, 1) / inner


def event_us(fn: Any, repeats: int = 30, inner: int = 20) -> float:
    """Median microseconds of one eager call, host time included where it is longer than the device's."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            fn()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / inner)
    return statistics.median(samples)


def host_us(fn: Any, calls: int = 300) -> float:
    """Median microseconds of host time a call takes before it returns, the device idle."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, whatever the device."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return torch.equal(a.cpu().view(width), b.cpu().view(width))


def passes(fmt: Format) -> int:
    """How often the input has to be read to quantize it."""
    return 2 if fmt.tensor_scale or fmt.group[0] == -1 else 1


def bench_format(fmt: Format, x: torch.Tensor, host: torch.Tensor, copy_bandwidth: float) -> list[dict[str, Any]]:
    shape = tuple(x.shape)
    parts = ops.quantize(x, fmt)
    expected = ops.quantize(host, fmt)
    y = ops.dequantize(parts, fmt, shape, x.dtype)
    verified = all(same(parts[k], expected[k]) for k in parts)
    verified &= same(y, ops.dequantize(expected, fmt, shape, x.dtype)) and same(ops.qdq(x, fmt), y)
    if not verified:
        raise SystemExit(f"{fmt.name}: GPU and CPU differ on {shape}")
    n, element = x.numel(), x.dtype.itemsize
    stored = fmt.nbytes(shape)
    reads = passes(fmt)
    cases = [
        ("quantize", lambda: ops.quantize(x, fmt), reads * n * element + stored),
        ("dequantize", lambda: ops.dequantize(parts, fmt, shape, x.dtype), n * element + stored),
        ("qdq", lambda: ops.qdq(x, fmt), (reads + 1) * n * element),
    ]
    if fmt.tensor_scale:
        given = parts["tensor_scale"]
        cases += [
            ("quantize, tensor scale given", lambda: ops.quantize(x, fmt, tensor_scale=given), n * element + stored),
            ("qdq, tensor scale given", lambda: ops.qdq(x, fmt, tensor_scale=given), 2 * n * element),
        ]
    rows = []
    for op, fn, nbytes in cases:
        us, eager = time_us(fn), event_us(fn)
        rows.append(
            {
                "format": fmt.name, "op": op, "shape": list(shape), "dtype": str(x.dtype).removeprefix("torch."),
                "us": round(us, 2), "eager_us": round(eager, 2), "bytes": nbytes,
                "of_copy": round(nbytes / (us * 1e-6) / copy_bandwidth, 4),
            }
        )  # fmt: skip
    return rows


def _small_calls(x: torch.Tensor) -> dict[str, Any]:
    fmt = get_format("int4_g128")
    parts = ops.quantize(x, fmt)
    return {
        "quantize": lambda: ops.quantize(x, fmt),
        "dequantize": lambda: ops.dequantize(parts, fmt, tuple(x.shape), x.dtype),
        "qdq": lambda: ops.qdq(x, fmt),
    }


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__, "triton": triton.__version__,
        "commit": commit or os.environ.get("COMMIT"), "command": "python -m bench.kernels",
    }  # fmt: skip


def run(formats: list[str], shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    torch.manual_seed(0)
    host = torch.randn(shape).to(dtype)
    x = host.cuda()
    y = torch.empty_like(x)
    copy_us = time_us(lambda: y.copy_(x))
    bandwidth = 2 * x.numel() * x.dtype.itemsize / (copy_us * 1e-6)
    result = {**environment(), "copy_us": round(copy_us, 2), "copy_gb_per_s": round(bandwidth / 1e9, 1), "rows": []}
    print(f"{result['gpu']}, {shape}, copy {copy_us:.1f} us, {bandwidth / 1e12:.2f} TB/s")
    small = torch.randn(64, 512, device="cuda", dtype=dtype)
    result["host_us"] = {
        "clone": round(host_us(lambda: small.clone()), 1),
        **{op: round(host_us(fn), 1) for op, fn in _small_calls(small).items()},
    }
    print("host time of a call, us:", result["host_us"])
    for name in formats:
        rows = bench_format(get_format(name), x, host, bandwidth)
        result["rows"] += rows
        print(
            f"{name:24}",
            "  ".join(f"{r['op']} {r['us']:.1f} us ({r['eager_us']:.0f}) {100 * r['of_copy']:.0f}%" for r in rows),
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/<gpu>/kernels.json")
    args = parser.parse_args()
    rows, columns = map(int, args.shape.split("x"))
    result = run(args.formats, (rows, columns))
    folder = result["gpu"].lower().replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / folder / "kernels.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    worst = min(r["of_copy"] for r in result["rows"] if r["format"] in ISSUE_FORMATS) if result["rows"] else math.nan
    print(f"wrote {out}; lowest share of a copy among {', '.join(ISSUE_FORMATS)}: {100 * worst:.0f}%")


if __name__ == "__main__":
    main()
