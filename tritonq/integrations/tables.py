"""The tables of schemes and formats that the CLI, the README and the documentation show."""

from __future__ import annotations

from tritonq.formats import FORMATS, Format, storage_bits
from tritonq.io import compressed_tensors
from tritonq.nn.schemes import SCHEMES

_SHAPE = (4096, 4096)  # for the bits a weight


def _granularity(fmt: Format) -> str:
    rows, cols = fmt.group
    if rows == -1:
        return "tensor"
    if cols == -1:
        return "row"
    return f"{cols} of a row" if rows == 1 else f"{rows} x {cols}"


def _second_level(fmt: Format) -> str:
    if fmt.super_group:
        return f"{' and minimum' * fmt.minimum} x {fmt.super_scale.name} per {fmt.super_group}"
    return " + f32 divisor" if fmt.tensor_scale else ""


def format_rows() -> list[dict[str, str]]:
    """One row for every registered format; bits are those of a 4096 x 4096 weight, scales included."""
    return [
        {
            "format": name,
            "element": fmt.element.name,
            "largest": f"{fmt.element.max:g}",
            "one scale per": _granularity(fmt),
            "scale": fmt.scale.name + _second_level(fmt),
            "rule": fmt.scale.rule,
            "bits": f"{storage_bits(fmt, _SHAPE):.3f}",
        }
        for name, fmt in FORMATS.items()
    ]


def scheme_rows() -> list[dict[str, str]]:
    """One row for every scheme, for a bf16 model."""
    import torch

    rows = []
    for scheme in SCHEMES.values():
        fmt = scheme.weight_format(torch.bfloat16)
        rows.append(
            {
                "scheme": scheme.name,
                "weights": fmt.name,
                "inputs": scheme.inputs or "as they are",
                "checkpoint layout": (
                    compressed_tensors.layout(fmt, scheme.input_format) if compressed_tensors.holds(scheme) else "none"
                ),
                "bits": f"{storage_bits(fmt, _SHAPE):.2f}",
            }
        )
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join(lines)
