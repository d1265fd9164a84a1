"""What is measured: formats, shapes, operations, and the bytes that each has to move."""

from __future__ import annotations

import math

from tritonq.formats import FORMATS, Format

Shape2 = tuple[int, int]

UNLISTED = ("e3m4_g48", "int5_g96")  # names that nobody registered, with a short last group in a row of 14336
FORMATS_OF_ISSUE = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4")
SHAPE: Shape2 = (4096, 14336)

# By the bytes of a bf16 tensor; other dtypes take the same shapes.
SIZES: dict[str, Shape2] = {
    "64K": (8, 4096),
    "1M": (128, 4096),
    "2M": (256, 4096),
    "8M": (1024, 4096),
    "32M": (4096, 4096),
    "64M": (4096, 8192),
    "112M": SHAPE,
    "512M": (16384, 16384),
    "2G": (65536, 16384),
}

GIVEN = ", tensor scale given"


def all_formats() -> tuple[str, ...]:
    return (*FORMATS, *UNLISTED)


def parse_shape(text: str) -> Shape2:
    """A name of SIZES, another size in MiB of bf16 (16M: rows of 4096), or ROWSxCOLUMNS. ValueError otherwise."""
    if text in SIZES:
        return SIZES[text]
    if text.endswith("M") and text[:-1].isdecimal() and int(text[:-1]):
        return int(text[:-1]) * 128, 4096
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        known = f"one of {', '.join(SIZES)}, MiB such as 16M"
        raise ValueError(f"a size is {known}, or ROWSxCOLUMNS such as 4096x14336, got {text!r}")
    return int(rows), int(columns)


def operations(fmt: Format) -> tuple[str, ...]:
    basic = ("quantize", "dequantize", "qdq")
    return (*basic, "quantize" + GIVEN, "qdq" + GIVEN) if fmt.tensor_scale else basic


def passes(fmt: Format, op: str) -> int:
    """How often the input has to be read to quantize it: twice where a scale belongs to the whole tensor."""
    whole = fmt.tensor_scale or fmt.group[0] == -1
    return 2 if whole and not op.endswith(GIVEN) else 1


def input_bytes(fmt: Format, op: str, shape: Shape2, itemsize: int) -> int:
    return fmt.nbytes(shape) if op == "dequantize" else math.prod(shape) * itemsize


def moved_bytes(fmt: Format, op: str, shape: Shape2, itemsize: int) -> int:
    """Every input read (as often as `passes` says) and every output written once."""
    dense, stored = math.prod(shape) * itemsize, fmt.nbytes(shape)
    if op == "dequantize":
        return stored + dense
    return passes(fmt, op) * dense + (stored if op.startswith("quantize") else dense)
