"""The roofline picture: achieved bandwidth over tensor size, the copy of the same run as the ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonq.bench.report import size_text, tensor_bytes

Row = dict[str, Any]
OPERATIONS = ("quantize", "dequantize", "qdq")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#44AA99")  # Okabe and Ito, Tol
MARKERS = "osD^vP*X"


def series(result: Row, op: str, dtype: str = "bfloat16") -> dict[str, list[tuple[int, float, float]]]:
    """Format -> (bytes of the tensor, GB/s, share of a copy), by size."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for row in result["rows"]:
        if row["op"] == op and row["dtype"] == dtype:
            point = tensor_bytes(row), row["bytes"] / row["us"] / 1e3, row["of_copy"]
            found.setdefault(row["format"], []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def draw(result: Row, path: Path, dtype: str = "bfloat16") -> None:
    """Write the picture; the suffix of `path` chooses svg or png. ValueError: no matplotlib, or nothing to draw."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the picture needs matplotlib; install it with `pip install tritonq[bench]`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    copies = sorted((tensor_bytes(c), c["gb_per_s"]) for c in result.get("copies", []) if c["dtype"] == dtype)
    sizes = sorted({point[0] for op in OPERATIONS for points in series(result, op, dtype).values() for point in points})
    if not sizes:
        raise ValueError(f"no {dtype} measurements to draw")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "tritonq", "font.size": 9, "axes.spines.top": False}
    with pyplot.rc_context({**settings, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), sharex=True, sharey="row", layout="constrained")
        for column, op in enumerate(OPERATIONS):
            bandwidth, share = axes[:, column]
            for i, (name, points) in enumerate(series(result, op, dtype).items()):
                style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 4, "lw": 1.3}
                x = [point[0] for point in points]
                bandwidth.plot(x, [point[1] for point in points], label=name, **style)
                share.plot(x, [100 * point[2] for point in points], **style)
            if copies:
                bandwidth.plot(*zip(*copies, strict=True), color="black", ls="--", lw=1.5, label="copy")
            share.axhline(100, color="black", ls="--", lw=1.5)
            bandwidth.set_title(op)
            share.set_xscale("log", base=2)
            share.set_xticks(sizes)
            share.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
            share.xaxis.set_minor_locator(NullLocator())
            share.tick_params("x", rotation=60)
            for axis in (bandwidth, share):
                axis.grid(alpha=0.25)
                axis.set_ylim(bottom=0)
        axes[0, 0].set_ylabel("GB/s, read + written")
        axes[1, 0].set_ylabel("% of a copy of that size")
        figure.supxlabel(f"bytes of the {dtype} tensor")
        figure.suptitle(f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}")
        shown: dict[str, Any] = {}
        for axis in axes[0]:
            shown |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(shown.values(), shown.keys(), loc="outside right center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=110, metadata=metadata)
        pyplot.close(figure)
