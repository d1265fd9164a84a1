"""Machine instructions an element of every format and op, and what they allow: `python -m bench.instructions`.

Every launch that `python -m bench.kernels` would time is recorded and compiled for a GPU, which needs none, and its
instructions are counted on the path that normal data takes (`bench/sass.py` defines it). "bound" is the time that the
busiest pipe of an H100 needs for them; "floor" the time that bytes need at the speed of a copy. Ops of several launches
add them up. Compile with the Triton that the measured machine has: versions differ.

    python -m bench.instructions                        every format; writes bench/results/instructions.json
    python -m bench.instructions --formats nvfp4 nf4_g64 --out FILE
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import sass
from bench.launches import Launch, launched
from tritonq.bench import cases, peers, report
from tritonq.formats import Format, get_format

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
INSTRUCTIONS = RESULTS / "instructions.json"
KERNELS = RESULTS / "nvidia-h100-80gb-hbm3" / "kernels.json"
BOUNDED = 90  # the target whose pipes `sass.cycles` knows
TARGET_SHARE = 0.95  # of the speed of a copy


def recorded(fmt: Format, op: str, x: torch.Tensor) -> list[Launch]:
    """The launches of one timed call."""
    calls: list[Any] = []

    def prepare() -> None:
        own = peers.ours(fmt, op, x)
        calls.extend((own.call, own.prepare(x)))

    launched(prepare)
    call, arguments = calls
    return launched(lambda: call(*arguments))


def count(one: Launch, target: int, elements: int, folder: Path) -> tuple[Row, Any]:
    """One launch as a row, and the instructions that all its warps issue."""
    compiled = one.compile(GPUTarget("cuda", target, 32))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    registers, threads = sass.resources(cubin)["REG"], one.programs * warps * 32
    code = sass.disassemble(cubin)
    taken = sass.Flow(code, one.largest / threads).taken().names
    issued = sass.Counter({name: n * one.programs * warps for name, n in taken.items()})
    row: Row = {
        "kernel": one.name, "programs": one.programs, "warps": warps, "registers": registers, "shared_bytes": shared,
        "elements_a_thread": round(elements / threads, 2), "static": len(code), "taken": round(sum(taken.values())),
        "memory": {name: round(n) for name, n in sass.memory(taken).items()},
    }  # fmt: skip
    if target == BOUNDED:
        resident = sass.H100.resident(warps, registers, shared)
        row |= {"bound_us": round(max(sass.H100.busy_us(issued).values()), 1), "resident": resident,
                "waves": round(one.programs / (resident * sass.H100.multiprocessors), 2)}  # fmt: skip
    return row, issued


def count_op(fmt: Format, op: str, x: torch.Tensor, target: int) -> Row:
    """Instructions an element [per thread of a warp], in all and by pipe, and the bound in microseconds."""
    elements = math.prod(x.shape)
    with tempfile.TemporaryDirectory() as folder:
        counted = [count(one, target, elements, Path(folder)) for one in recorded(fmt, op, x)]
    launches = [row for row, _ in counted]
    issued: sass.Counter[str] = sum((names for _, names in counted), sass.Counter())
    of_warp = 32 / elements
    result = {
        "format": fmt.name, "op": op,
        "instructions": round(sum(issued.values()) * of_warp, 2),
        "static": round(sum(row["static"] * row["programs"] * row["warps"] for row in launches) * of_warp, 2),
        "pipes": {pipe: round(n * of_warp, 2) for pipe, n in sass.pipes(issued).items()},
    }  # fmt: skip
    if target == BOUNDED:
        times = {pipe: round(us, 1) for pipe, us in sass.H100.busy_us(issued).items()}
        limit = max(times, key=lambda pipe: times[pipe])
        result |= {"bound_us": times[limit], "bound_by": limit, "busy_us": times}
    return {**result, "launches": launches}


def measure(names: list[str], target: int) -> Row:
    """Every op of every format, on the tensor of the kernel benchmark."""
    x = torch.zeros(cases.SHAPE, dtype=torch.bfloat16)
    rows = []
    for name in names:
        fmt = get_format(name)
        rows += [count_op(fmt, op, x, target) for op in cases.operations(fmt)]
        print(
            name, *(f"{row['op']} {row['instructions']}" for row in rows if row["format"] == name), sep="  ", flush=True
        )
    machine = {"multiprocessors": sass.H100.multiprocessors, "gigahertz": sass.H100.gigahertz}
    return {
        "target": f"sm_{target}", "triton": triton.__version__, "shape": list(cases.SHAPE), "dtype": "bfloat16",
        **({"machine": machine} if target == BOUNDED else {}),
        "rows": sorted(rows, key=lambda row: (row["format"], row["op"])),
    }  # fmt: skip


def compared(counted: Row, measured: Row) -> list[Row]:
    """Rows that were counted and measured, the lowest share of a copy first.

    `possible` is the largest share of a copy that the instructions allow: floor over the larger of floor and bound.
    """
    found = {(row["format"], row["op"]): row for row in counted["rows"]}
    result = []
    for row in measured["rows"]:
        own = found.get((row["format"], row["op"]))
        if own is None or row["shape"] != counted["shape"] or row["dtype"] != counted["dtype"]:
            continue
        floor = row["bytes"] / measured["copy_gb_per_s"] / 1e3
        bound = own["bound_us"]
        result.append({
            **own, "us": row["us"], "of_copy": row["of_copy"], "floor_us": floor, "possible": floor / max(floor, bound),
            "limit": own["bound_by"] if bound > floor else "bytes",
        })  # fmt: skip
    return sorted(result, key=lambda row: (row["of_copy"], row["format"], row["op"]))


def document_rows(counted: Row, measured: Row) -> list[dict[str, str]]:
    """Formats and ops that were measured below 95% of a copy, for docs/speed.md."""
    return [
        {
            "format": row["format"], "op": row["op"], "of copy": f"{100 * row['of_copy']:.1f}%",
            "possible": f"{100 * row['possible']:.0f}%", "us": f"{row['us']:.1f}",
            "floor, us": f"{row['floor_us']:.1f}", "bound, us": f"{row['bound_us']:.1f} {row['bound_by']}",
            "instructions": f"{row['instructions']:.1f}", "limit": row["limit"],
        }
        for row in compared(counted, measured) if row["of_copy"] < TARGET_SHARE
    ]  # fmt: skip


def print_table(counted: Row, measured: Row | None) -> None:
    from rich.console import Console
    from rich.table import Table

    known = {(row["format"], row["op"]): row for row in compared(counted, measured)} if measured else {}
    used = ("fp32", "imad", "alu", "xu", "shuffle", "shared", "global", "other")
    title = f"{counted['target']}, Triton {counted['triton']}: instructions an element, microseconds"
    measures = ("bound", "by", "floor", "us", "of copy", "possible")
    table = Table("format", "op", "instr.", "static", *used, *measures, title=title)
    for row in counted["rows"]:
        seen = known.get((row["format"], row["op"]))
        times = [f"{seen['floor_us']:.1f}", f"{seen['us']:.1f}", f"{100 * seen['of_copy']:.0f}%",
                 f"{100 * seen['possible']:.0f}%"] if seen else [""] * 4  # fmt: skip
        table.add_row(row["format"], row["op"], f"{row['instructions']:.1f}", f"{row['static']:.1f}",
                      *(f"{row['pipes'][pipe]:.2f}" for pipe in used),
                      str(row.get("bound_us", "")), row.get("bound_by", ""), *times)  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, default=BOUNDED, help="compute capability, 90 by default")
    parser.add_argument("--formats", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path, help=f"default: {INSTRUCTIONS.name}, where all formats are counted")
    parser.add_argument("--results", type=Path, help="print this file instead of counting")
    args = parser.parse_args()
    counted = (
        json.loads(args.results.read_text(encoding="utf-8"))
        if args.results
        else measure(args.formats or list(cases.all_formats()), args.target)
    )
    out = args.out or (INSTRUCTIONS if not args.formats and not args.results and args.target == BOUNDED else None)
    if out:
        report.write(counted, out)
    bounded = counted["target"] == f"sm_{BOUNDED}"
    print_table(counted, report.read(KERNELS) if bounded and KERNELS.is_file() else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
