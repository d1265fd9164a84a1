"""Kernels against a copy and against peers, on a GPU: `python -m bench.kernels`, for `make bench`.

Each op is verified against the CPU path first, bit for bit, then timed: median of many replays of a CUDA graph, on
random inputs that together exceed the L2 cache. "of copy" is (bytes that must move / time) over the bandwidth of
`copy_` on a tensor of the same size in the same run. Formats with a tensor-wide scale have to read their input twice;
the bytes say so. Peers (torch.compile of plain definitions; torchao and bitsandbytes where they are installed) run on
the same tensors; how far their values are from ours stands beside their times.

    python -m bench.kernels                                    every format, 4096 x 14336 bf16, with peers
    python -m bench.kernels --sizes                            64 KiB to 2 GiB, some formats, without peers
    python -m bench.kernels --sizes 2M 16M 64M 256M --peers torch.compile --workers 16 --budget 300
    python -m bench.kernels --results SWEEP.json --plot roofline.svg     draw what was measured; no GPU needed
    python -m bench.kernels --peers none --check bench/results/GPU/kernels.json      exit code 1 if slower
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tritonq.bench import command

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", help="default: all, with --sizes some")
    parser.add_argument("--shape", help="ROWSxCOLUMNS; default 4096x14336")
    parser.add_argument("--sizes", nargs="*", help="names such as 64K, 112M, 2G, or ROWSxCOLUMNS; none: all names")
    parser.add_argument("--dtypes", nargs="*", help="bfloat16 (default), float16, float32")
    parser.add_argument("--peers", nargs="*", help="torch.compile, torchao, bitsandbytes, or none")
    parser.add_argument("--budget", type=float, help="seconds; what would not fit is left out, and the JSON says so")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile everything before it is timed")
    parser.add_argument("--out", type=Path, help="JSON file; default bench/results/<gpu>/kernels.json or sweep.json")
    parser.add_argument("--results", type=Path, help="use this file instead of measuring")
    parser.add_argument("--check", type=Path, help="committed results to compare with; writes nothing unless --out")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the share of a copy; default 0.05")
    parser.add_argument("--plot", type=Path, help="write the roofline picture, .svg or .png; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    args = parser.parse_args()
    try:
        wanted = command.options(
            args.formats, args.shape, args.sizes, args.dtypes, args.peers, args.budget,
            " ".join(["python -m bench.kernels", *sys.argv[1:]]), args.workers,
        )  # fmt: skip
        return command.execute(
            wanted, out=args.out, folder=RESULTS, results=args.results, check=args.check, tolerance=args.tolerance,
            picture=args.plot, as_json=args.json,
        )  # fmt: skip
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
