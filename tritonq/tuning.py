"""Kernel configurations: how large a tile each kernel takes, chosen from the shape and fields of the format."""

from __future__ import annotations

from typing import Any

from tritonq.codecs.pack import chunk
from tritonq.formats import Format

TILE = 4096  # elements a program handles where the group does not ask for more
LARGEST_TILE = 32768  # elements of the largest group that stays in the registers of one program
LONG_ROW = 1 << 17  # rows in between are read twice, the second time from the cache; longer ones by several programs
ROW_TILE = 4096
ROW_WARPS = 16
ELEMENTS_PER_THREAD = 32
WRITTEN_SLICE = 32  # 64 bytes of bf16

Config = dict[str, Any]


def _power(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def _warps(elements: int) -> int:
    """Larger tiles give a thread more to do: several programs then share a multiprocessor and hide each other's
    waits."""
    per_thread = ELEMENTS_PER_THREAD * (2 if elements > 2 * TILE else 1)
    return min(16, max(1, elements // (32 * per_thread)))


def _padded_group(fmt: Format, columns: int) -> tuple[int, int]:
    rows, cols = fmt.group
    return _power(rows), _power(columns if cols == -1 else cols)


def fits_tile(fmt: Format, columns: int) -> bool:
    """Whether one program can hold a whole group."""
    if fmt.group[0] == -1:
        return False
    if fmt.group[1] == -1:
        return columns <= LONG_ROW
    rows, cols = _padded_group(fmt, columns)
    return rows * cols <= LARGEST_TILE


def fits(fmt: Format, columns: int) -> bool:
    """Whether one pass is enough: groups fit a tile and begin at whole bytes."""
    if not fits_tile(fmt, columns):
        return False
    cols = fmt.group[1]
    if cols == -1 or cols % chunk(fmt.bits)[0] == 0:
        return True
    return cols >= columns and _power(cols) >= 8  # one group a row; a tile of less than eight columns holds padding


def loops_over_rows(fmt: Format, columns: int) -> bool:
    """Whether `row_kernel` serves this format."""
    return fmt.group == (1, -1) and _power(columns) > LARGEST_TILE


def row_config() -> Config:
    return {"BLOCK_N": ROW_TILE, "num_warps": ROW_WARPS}


def _slices(columns: int, fmt: Format, mode: str) -> int:
    """Into how many slices a group is cut that lie above each other in a tile of `group_kernel`: as many as one thread
    holds, which then works out the scales of fewer groups."""
    rows, cols = fmt.group
    if rows != 1 or cols != _power(cols) or columns % cols:
        return 1
    # What a thread reads side by side: 8 elements, or 16 where it then writes 16 codes of 8 bits. Slices of values have
    # to be whole sectors, because values are written as they lie; codes are brought into the order of memory first.
    width = 16 if fmt.bits == 8 and mode != "qdq" else 8
    return max(1, min(ELEMENTS_PER_THREAD // width, cols // (WRITTEN_SLICE if mode == "qdq" else width)))


def group_config(rows: int, columns: int, fmt: Format, mode: str) -> tuple[Config, tuple[int, int]]:
    """Tile of `group_kernel`, and how many tiles cover [rows, columns]."""
    r, c = _padded_group(fmt, columns)
    group_columns = 1 if fmt.group[1] == -1 else -(-columns // fmt.group[1])
    group_rows = -(-rows // fmt.group[0])
    target = max(1, TILE // (r * c))
    groups = min(target, _power(group_columns))
    m = min(max(1, target // groups), _power(group_rows))
    if c * groups < 8:  # packing works on runs of eight codes
        groups = 8 // c
    slices = _slices(columns, fmt, mode)
    config = {
        "S": slices, "M": m, "R": r, "GROUPS": groups, "W": c // slices, "num_warps": _warps(m * r * groups * c)
    }  # fmt: skip
    return config, (-(-group_rows // m), -(-group_columns // groups))


def _block_n(columns: int) -> int:
    """The widest tile that wastes at most a sixteenth of its lanes on a row; a narrow one where none does."""
    for block in (TILE, TILE // 2, TILE // 4):
        if -columns % block <= columns // 16:
            return block
    return min(TILE, max(8, _power(columns)))


def flat_config(rows: int, columns: int, fmt: Format) -> Config:
    """Tile of `apply_kernel` and `dequantize_kernel`."""
    block_n = _block_n(columns)
    block_m = min(max(1, TILE // block_n), _power(rows))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": _warps(block_m * block_n)}


def keys_config(rows: int, columns: int) -> Config:
    block_n = _block_n(columns)
    block_m = min(max(1, TILE // block_n), _power(rows))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": _warps(block_m * block_n)}


def splits(groups: int, rows: int, columns: int, config: Config) -> int:
    """Programs that share one group: enough of them in all to fill a GPU, each with work to do."""
    tiles = -(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"])
    return max(1, min(tiles, 2048 // max(1, groups)))
