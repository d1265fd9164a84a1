"""The tables of README.md are those of the code and of the committed results. `make tables` writes them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
KERNELS = ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "kernels.json"


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


def tables():
    from tritonq.integrations.tables import format_rows, markdown, scheme_rows

    return {"schemes": markdown(scheme_rows()), "formats": markdown(format_rows()), "speed": markdown(speed_rows())}


def marked(name):
    return re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)", re.DOTALL)


@pytest.mark.parametrize("name", ["schemes", "formats", "speed"])
def test_table_is_current(name):
    found = marked(name).search(README.read_text(encoding="utf-8"))
    assert found, f"README.md has no {name} table"
    assert tables()[name] in found[0], "run `make tables`"


def test_python_example_runs(tmp_path):
    """The first Python block of the README, on a tiny model instead of the one it names."""
    import torch
    from models import build

    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {"model": build("llama"), "x": torch.randn(4, 256), "folder": str(tmp_path / "out")}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "out" / "config.json").is_file()


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for key, table in tables().items():
        text = marked(key).sub(lambda match, table=table: match[1] + table + match[2], text)
    README.write_text(text, encoding="utf-8")
