"""The tables of README.md and docs/speed.md are those of the code and of the committed results. `make tables` writes
them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SPEED = ROOT / "docs" / "speed.md"
KERNELS = ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "kernels.json"
SIZES = KERNELS.with_name("sizes.json")
STEPS = KERNELS.with_name("tuning_step.json")


def speed_rows():
    """Time and share of a copy of every measured format; a line of its own where the tensor scale was given."""
    cells = {}
    for row in json.loads(KERNELS.read_text(encoding="utf-8"))["rows"]:
        op, _, variant = row["op"].partition(", ")
        name = f"{row['format']}, {variant}" if variant else row["format"]
        cells.setdefault(name, {})[op] = f"{row['us']:.0f} us, {100 * row['of_copy']:.0f}%"
    return [
        {"format": name, **{op: found.get(op, "") for op in ("quantize", "dequantize", "qdq")}}
        for name, found in cells.items()
    ]


def limit_rows():
    """What was measured below 95% of a copy, with what its instructions allow."""
    from bench import instructions

    counted = json.loads(instructions.INSTRUCTIONS.read_text(encoding="utf-8"))
    return instructions.document_rows(counted, json.loads(KERNELS.read_text(encoding="utf-8")))


def size_rows():
    """Small tensors: lowest and median share of a copy, and what is below 85% of a copy that moves as many bytes."""
    from statistics import median

    from tritonq.bench.report import size_text, tensor_bytes

    groups = {}
    for row in json.loads(SIZES.read_text(encoding="utf-8"))["rows"]:
        groups.setdefault((size_text(tensor_bytes(row)), row["op"].partition(",")[0]), []).append(row)

    def shares(rows, key):
        values = [row[key] for row in rows]
        return f"{100 * min(values):.0f}%, {100 * median(values):.0f}%"

    def below(rows):
        slow = sorted((row for row in rows if row["of_equal_copy"] < 0.85), key=lambda row: row["of_equal_copy"])
        return ", ".join(
            f"{row['format']}{' (given)' if 'given' in row['op'] else ''} {100 * row['of_equal_copy']:.0f}"
            for row in slow
        )

    return [
        {
            "tensor": size, "op": op, "rows": str(len(rows)), "of copy": shares(rows, "of_copy"),
            "of an equal copy": shares(rows, "of_equal_copy"), "below 85% of an equal copy": below(rows),
        }
        for (size, op), rows in groups.items()
    ]  # fmt: skip


def times(row, what, peer):
    """How many times as long a peer takes, eager / compiled."""
    keys = [f"{what}_times_{kind}" for kind in (("eager", "compiled") if peer is None else (peer, f"{peer}_compiled"))]
    return " / ".join(f"{row[key]:.{1 if row[key] > 10 else 2}f}" if key in row else "-" for key in keys)


def step_rows():
    """Forward with backward, and the fused step of sign descent."""
    return [
        {
            "format": row["format"], "v": row["v"],
            "forward + backward": f"{row['both_us']:.0f} us, {100 * row['both_of_floor']:.0f}% of the floor",
            "x definition": times(row, "both", None), "x auto-round": times(row, "both", "auto_round"),
            "whole step, fused": f"{row['step_us']:.0f} us",
            "x definition, step": times(row, "step", None), "x auto-round, step": times(row, "step", "auto_round"),
        }
        for row in json.loads(STEPS.read_text(encoding="utf-8"))["rows"]
    ]  # fmt: skip


def tables(path):
    from tritonq.integrations.tables import format_rows, markdown, scheme_rows

    rows = {
        README: {"schemes": scheme_rows, "formats": format_rows, "speed": speed_rows, "steps": step_rows},
        SPEED: {"limits": limit_rows, "sizes": size_rows},
    }
    return {name: markdown(of()) for name, of in rows[path].items()}


def marked(name):
    return re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)


@pytest.mark.parametrize(
    "path,name",
    [*((README, name) for name in ("schemes", "formats", "speed", "steps")), (SPEED, "limits"), (SPEED, "sizes")],
    ids=["schemes", "formats", "speed", "steps", "limits", "sizes"],
)
def test_table_is_current(path, name):
    found = marked(name).search(path.read_text(encoding="utf-8"))
    assert found, f"{path.name} has no {name} table"
    assert tables(path)[name] in found[0], "run `make tables`"


def test_python_example_runs(tmp_path):
    """The first Python block of the README, on a tiny model instead of the one it names."""
    import torch
    from models import build

    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {"model": build("llama"), "x": torch.randn(4, 256), "folder": str(tmp_path / "out")}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "out" / "config.json").is_file()


if __name__ == "__main__":
    for document in (README, SPEED):
        text = document.read_text(encoding="utf-8")
        for key, table in tables(document).items():
            text = marked(key).sub(lambda match, table=table: match[1] + table + match[2], text)
        document.write_text(text, encoding="utf-8")
