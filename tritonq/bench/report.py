"""Results as a table, as a file, and against the committed ones."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, tuple[int, ...], str]

COMPILE = "torch.compile"


def slug(gpu: str) -> str:
    return gpu.lower().replace(" ", "-")


def size_text(nbytes: float) -> str:
    for unit, scale in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << scale:
            return f"{nbytes / (1 << scale):.4g} {unit}"
    return f"{nbytes / 1024:.4g} KiB"


def tensor_bytes(row: Row) -> int:
    """Bytes of the dense tensor of a row."""
    rows, columns = row["shape"]
    return int(rows * columns * {"float32": 4}.get(row["dtype"], 2))


def table_rows(result: Row) -> list[dict[str, str]]:
    """One row a measurement, as text: time, share of a copy, and how many times as long each peer takes."""
    rows = []
    for row in result["rows"]:
        rivals = row.get("peers", {})
        others = [f"{label} {_ratio(peer)}" for label, peer in rivals.items() if label != COMPILE]
        rows.append({
            "format": row["format"], "op": row["op"], "tensor": f"{size_text(tensor_bytes(row))} {row['dtype']}",
            "us": f"{row['us']:.1f}", "of copy": f"{100 * row['of_copy']:.0f}%",
            "x torch.compile": _ratio(rivals[COMPILE]) if COMPILE in rivals else "", "others": ", ".join(others),
        })  # fmt: skip
    return rows


def _ratio(peer: Row) -> str:
    if "error" in peer:
        return "fails"
    return f"{peer['speedup']:.2f}" if peer["comparable"] else f"({peer['us']:.1f} us, other values)"


def print_table(result: Row) -> None:
    """Through rich where it is installed, which a bare GPU machine may lack."""
    rows = table_rows(result)
    if not rows:
        print("no measurements")
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
        for cells in (dict(zip(widths, widths, strict=True)), *rows):
            print("  ".join(cells[name].ljust(width) for name, width in widths.items()).rstrip())
        return
    table = Table(*rows[0], title=f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}")
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def write(result: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def finish(result: Row, began: float, out: Path | None) -> None:
    """Say how long a benchmark took since `began` (`time.perf_counter`), and write its result where one is wanted."""
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(f"{result['seconds']} s in all")
    if out:
        write(result, out)
        print(f"wrote {out}")


def read(path: Path) -> Row:
    """A result file. ValueError where it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not all({"format", "op", "shape", "of_copy"} <= row.keys() for row in result["rows"]):
            raise KeyError("of_copy")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no result of the kernel benchmark") from None
    return dict(result)


def _key(row: Row) -> Key:
    return row["format"], row["op"], tuple(row["shape"]), row.get("dtype", "bfloat16")


def _name(key: Key) -> str:
    return f"{key[0]} {key[1]} {'x'.join(map(str, key[2]))} {key[3]}"


def regressions(new: Row, committed: Row, tolerance: float = 0.05) -> tuple[list[str], list[str]]:
    """Rows whose share of a copy fell by more than `tolerance` of itself, and rows that were not measured again.

    Raises:
        ValueError: the two have no row in common.
    """
    measured = {_key(row): row["of_copy"] for row in new["rows"]}
    slower, missing = [], []
    for row in committed["rows"]:
        key, before = _key(row), row["of_copy"]
        if key not in measured:
            missing.append(_name(key))
        elif measured[key] < before * (1 - tolerance):
            slower.append(f"{_name(key)}: {100 * before:.1f}% of a copy before, {100 * measured[key]:.1f}% now")
    if len(missing) == len(committed["rows"]):
        raise ValueError("no row of the committed results was measured again, so there is nothing to compare")
    return slower, missing
