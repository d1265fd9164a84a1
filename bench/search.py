"""Scale search on a GPU beside the eager search it replaces: `python -m bench.search [--out FILE]`.

The eager peer is what opt-RTN does in plain torch for int4 groups of 128: 201 inverse scales (8 - 0.06 k) / m around
that of the element m of largest magnitude, one full-size pass of half a dozen operations each. Errors of every group
are compared under scales that the format stores (bf16), so its scales are rounded before their error is taken.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq import ops
from tritonq.bench import measure, report, timing
from tritonq.bench.verify import same
from tritonq.formats import Format, get_format
from tritonq.timing import median_us

FORMATS = ("int4_g128", "int4_g32", "int4_g128_asym", "int3_g128", "int2_g128", "mxfp4", "nvfp4", "nf4_g64", "mxfp8",
           "fp8_e4m3_channel", "fp8_e4m3_b128x128", "int8_g128")  # fmt: skip
SHAPE = (4096, 14336)
PUBLISHED_MS = 404.0  # auto-round's eager search of this shape on an H100, measured apart


def microseconds(call: Callable[[], Any], calls: int = 15) -> float:
    """Median of single calls: milliseconds, beside which launches do not count."""
    return median_us(call, 1, (calls, calls))


def eager_search(x: Tensor) -> Tensor:
    """Scales fp32 [groups, 1]."""
    groups = x.float().reshape(-1, 128)
    largest = torch.take_along_dim(groups, groups.abs().argmax(-1, keepdim=True), -1)
    best_scale = -largest / 8
    best = squares(groups, best_scale)
    for k in range(-100, 101):
        scale = -largest / (8 - 0.06 * k)
        loss = squares(groups, scale)
        better = loss < best
        best_scale[better] = scale[better]
        best[better] = loss[better]
    return best_scale


def squares(groups: Tensor, scale: Tensor) -> Tensor:
    return ((torch.round(groups / scale).clamp_(-8, 7) * scale - groups) ** 2).sum(-1, keepdim=True)


def _exactly(groups: Tensor, scale: Tensor) -> Tensor:
    """Squared errors [groups] in fp64, of codes taken in fp32."""
    codes = torch.round(groups / scale).clamp_(-8, 7)
    return torch.cat([((c.double() * s.double() - g.double()) ** 2).sum(-1) for c, s, g in
                      zip(codes.split(1 << 16), scale.split(1 << 16), groups.split(1 << 16), strict=True)])  # fmt: skip


def against_eager(x: Tensor) -> dict[str, Any]:
    """Times and errors of both."""
    fmt = get_format("int4_g128")
    ours_us = microseconds(functools.partial(ops.quantize, x, fmt, search="mse"))
    eager_us = microseconds(functools.partial(eager_search, x), 3)
    groups = x.float().reshape(-1, 128)
    ours = _exactly(groups, ops.quantize(x, fmt, search="mse")["scale"].float().reshape(-1, 1))
    rule = _exactly(groups, ops.quantize(x, fmt)["scale"].float().reshape(-1, 1))
    theirs = _exactly(groups, eager_search(x).to(torch.bfloat16).float())
    return {
        "format": fmt.name, "us": round(ours_us, 1), "eager_us": round(eager_us, 1),
        "times_faster": round(eager_us / ours_us, 1),
        "times_faster_than_published": round(PUBLISHED_MS * 1e3 / ours_us, 1),
        "groups": ours.numel(), "error_of_rule": float((ours.sum() / rule.sum()).item()),
        "error_of_eager": float((ours.sum() / theirs.sum()).item()),
        "groups_with_larger_error": int((ours > theirs * (1 + 1e-5)).sum()),
        "largest_excess": float((ours / theirs).amax().item()) - 1,
    }  # fmt: skip


def one(fmt: Format, x: Tensor, copy_us: float) -> dict[str, Any]:
    search_us = microseconds(functools.partial(ops.quantize, x, fmt, search="mse"))
    rows = x[:256]
    found, host = ops.quantize(rows, fmt, search="mse"), ops.quantize(rows.cpu(), fmt, search="mse")
    verified = all(same(found[name], host[name]) for name in host)
    if not verified:
        raise RuntimeError(f"{fmt.name}: GPU and CPU differ")
    noise = [(ops.dequantize(p, fmt, tuple(x.shape), x.dtype).float() - x.float()).square().sum() for p in
             (ops.quantize(x, fmt, search="mse"), ops.quantize(x, fmt))]  # fmt: skip
    return {"format": fmt.name, "us": round(search_us, 1), "copies": round(search_us / copy_us, 1),
            "error_of_rule": round(float(noise[0] / noise[1]), 4), "verified_rows": 256}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measure.require_gpu()
    torch.manual_seed(0)
    timing.warm_up()
    x = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    copy_us = timing.device_us(torch.clone, [(x,), (x.clone(),)])
    result = {**measure.environment("python -m bench.search"), "shape": list(SHAPE), "copy_us": round(copy_us, 1)}
    result["against_eager"] = against_eager(x)
    print(result["against_eager"])
    result["rows"] = []
    for name in FORMATS:
        result["rows"].append(one(get_format(name), x, copy_us))
        print(result["rows"][-1], flush=True)
        if arguments.out:  # after every row, so that a run that is cut short leaves what it has
            report.write(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
