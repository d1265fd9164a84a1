"""Many experts at once: `python -m bench.grouped [--experts 64] [--shape 1536x2048] [--out FILE]`.

One grouped call beside a loop of single ones over the same tensors, and beside a copy that moves as many bytes (each
input read once, or twice by formats with a tensor scale, each output written once). Device times are those of CUDA
graphs; wall times are of eager calls, host included. Launches are counted by torch's profiler. Members are compared
with single calls, and two of them with the CPU, bit for bit, before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tritonq as tq
from tritonq import timing
from tritonq.bench import cases, measure, report
from tritonq.bench.timing import host_us, warm_up
from tritonq.formats import get_format

FORMATS = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4", "fp8_e4m3_tensor", "q4_k")
DIRECTIONS = {"rows": (True, False), "columns": (False, True), "both": (True, True)}
Parts = dict[str, Tensor]


def events(call: Callable[[], Any]) -> list[str]:
    """What a call runs on the device."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as log:
        call()
        torch.cuda.synchronize()
    return [event.name for event in log.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def same(got: Parts, expected: Parts, what: str) -> None:
    for name, part in expected.items():
        if not torch.equal(got[name].view(torch.uint8), part.to(got[name].device).view(torch.uint8)):
            raise SystemExit(f"{what}: {name} differs")


def verify(tensors: list[Tensor], made: tq.BulkBuffer, name: str) -> None:
    """All members against single calls, the first and the last also against the CPU."""
    for i, x in enumerate(tensors):
        columns = () if made.columns is None else made.columns
        for side, members, view in (("rows", made, x), ("columns", columns, x.mT)):
            if len(members) == 0:
                continue
            same(members[i].parts(), tq.quantize(view, name).parts(), f"{name} {side} {i}")
            if i in (0, len(tensors) - 1):
                same(members[i].parts(), tq.quantize(view.cpu(), name).parts(), f"{name} {side} {i}, CPU")


def copy_us(nbytes: int) -> float:
    """Of a copy that moves so many bytes in all."""
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return timing.device_us([lambda: target.copy_(source)])


def case(tensors: list[Tensor], name: str, direction: str) -> dict[str, Any]:
    fmt, (rowwise, columnwise) = get_format(name), DIRECTIONS[direction]
    out = tq.grouped_quantize(tensors, name, rowwise=rowwise, columnwise=columnwise)
    verify(tensors, out, name)

    def grouped() -> None:
        tq.grouped_quantize(tensors, name, rowwise=rowwise, columnwise=columnwise, out=out)

    singles = list(zip(tensors, out.members, strict=True)) if rowwise else []
    singles += zip([x.mT for x in tensors], out.columns, strict=True) if out.columns is not None else []

    def loop() -> None:
        for x, q in singles:
            tq.quantize(x, name, out=q)

    inputs = sum(x.nbytes for x in tensors)
    written = sum(fmt.nbytes(tuple(q.shape)) for _, q in singles)
    nbytes = inputs * cases.passes(fmt, "quantize") + written
    found = {
        "format": name, "directions": direction, "members": len(tensors), "shape": list(tensors[0].shape),
        "moved_bytes": nbytes, "grouped_us": timing.device_us([grouped]), "loop_us": timing.device_us([loop]),
        "copy_us": copy_us(nbytes), "grouped_wall_us": timing.median_us(lambda: grouped(), 1),
        "loop_wall_us": timing.median_us(lambda: loop(), 1), "grouped_host_us": host_us(grouped, 30),
        "launches": len(events(grouped)), "loop_launches": len(events(loop)),
    }  # fmt: skip
    found = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
    found["of_copy"] = round(found["copy_us"] / found["grouped_us"], 4)
    print(
        f"{name:18} {direction:8} {found['grouped_us']:8.1f} us ({100 * found['of_copy']:5.1f}% of copy), loop "
        f"{found['loop_us']:8.1f}; eager {found['grouped_wall_us']:8.1f} (host {found['grouped_host_us']:6.1f}), loop "
        f"{found['loop_wall_us']:8.1f}; {found['launches']} launches, {found['loop_launches']} in the loop",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shape", default="1536x2048", help="of an expert, ROWSxCOLUMNS")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.require_gpu()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = cases.parse_shape(args.shape)
    tensors = [
        torch.randn(shape, device="cuda", generator=generator).to(torch.bfloat16) * 0.02 for _ in range(args.experts)
    ]
    result: dict[str, Any] = measure.environment(" ".join(["python -m bench.grouped", *sys.argv[1:]]))
    warm_up()
    result["rows"] = [case(tensors, f, d) for f in args.formats.split(",") for d in args.directions.split(",")]
    if args.out:
        report.write(result, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
