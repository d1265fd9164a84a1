"""Kernel configurations: how large a tile each kernel takes, chosen from the shape and fields of the format.

A measured `Choice` (`tritonq.tuning_cache`) replaces the constants of the heuristics, never what follows from the
shape: every choice is a valid configuration at every size, and none changes a bit of the result (law 8).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

from tritonq.codecs.pack import chunk
from tritonq.formats import Format
from tritonq.tuning_files import KNOBS, OPS, Choice

TILE = 4096  # elements a program handles at most where the group does not ask for more
SMALL = 1 << 22  # elements of a tensor of which multiprocessors get so little that waits count more than instructions
LARGEST_TILE = 32768  # elements of the largest group that stays in the registers of one program
LONG_ROW = 1 << 17  # rows in between are read twice, the second time from the cache; longer ones by several programs
ROW_TILE = 4096
ROW_WARPS = 16
ELEMENTS_PER_THREAD = 32
WRITTEN_SLICE = 16  # a sector of bf16
PADDED_SLICES = 8  # of a group that is no power of two
ROW_REGISTERS = 80  # of a thread with 64 elements of a row: fewer than the compiler takes, so that more threads fit

Config = dict[str, Any]
_local = threading.local()  # what `forced` says in this thread


def forced_here() -> dict[str, Choice]:
    """The choices by kernel that `forced` makes in this thread."""
    found: dict[str, Choice] = getattr(_local, "forced", {})
    return found


@contextlib.contextmanager
def forced(op: str, choice: Choice) -> Iterator[None]:
    """Configure the kernel of `op` by `choice` here, whatever was measured; callers drop the plans they keep."""
    before = forced_here()
    _local.forced = {**before, OPS[op]: choice}
    try:
        yield
    finally:
        _local.forced = before


def _chosen(kernel: str, choice: Choice | None) -> Choice:
    return forced_here().get(kernel, choice or {})


def _power(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def _warps(elements: int, per_thread: int | None = None) -> int:
    """Larger tiles give a thread more to do: several programs then share a multiprocessor and hide each other's
    waits."""
    if per_thread is None:
        per_thread = ELEMENTS_PER_THREAD * (2 if elements > 2 * TILE else 1)
    return min(16, max(1, elements // (32 * per_thread)))


def _padded_group(fmt: Format, columns: int) -> tuple[int, int]:
    rows, cols = fmt.group
    return _power(rows), _power(columns if cols == -1 else cols)


def fits_tile(fmt: Format, columns: int) -> bool:
    """Whether one program can hold a whole group."""
    if fmt.super_group:
        return True
    if fmt.group[0] == -1:
        return False
    if fmt.group[1] == -1:
        return columns <= LONG_ROW
    rows, cols = _padded_group(fmt, columns)
    return rows * cols <= LARGEST_TILE


def _largest_tile(columns: int, stochastic: bool) -> int:
    """Random numbers take registers, too; most where groups of four elements begin between counters."""
    return LARGEST_TILE if not stochastic else LARGEST_TILE // (2 if columns % 4 == 0 else 4)


def fits(fmt: Format, columns: int, stochastic: bool = False) -> bool:
    """Whether one pass is enough: groups fit a tile and begin at whole bytes."""
    if fmt.super_group:
        return True
    if not fits_tile(fmt, columns):
        return False
    cols = fmt.group[1]
    if stochastic and cols != -1 and math.prod(_padded_group(fmt, columns)) > _largest_tile(columns, stochastic):
        return False
    if cols == -1 or cols % chunk(fmt.bits)[0] == 0:
        return True
    return cols >= columns and _power(cols) >= 8  # one group a row; a tile of less than eight columns holds padding


def loops_over_rows(fmt: Format, columns: int, stochastic: bool = False) -> bool:
    """Whether `row_kernel` serves this format."""
    return fmt.group == (1, -1) and _power(columns) > _largest_tile(columns, stochastic)


def row_config(choice: Choice | None = None) -> Config:
    if choice := _chosen("row", choice):
        return {"BLOCK_N": choice["TILE"], "num_warps": _warps(choice["TILE"], choice["PER_THREAD"])}
    return {"BLOCK_N": ROW_TILE, "num_warps": ROW_WARPS}


def _group_choice(elements: int, fmt: Format, mode: str) -> Choice:
    """Tile and elements of a thread for `elements` in all, as measured on an H100 (bench/NOTES.md): small tiles end,
    and let others begin, at different times. Where QDQ leaves 16 elements to a thread, loads and stores overlap better;
    large tables have too much to look up for that, and packing codes into words wants 32."""
    rows, cols = fmt.group
    if rows != 1 or cols == -1:
        return {"TILE": TILE}
    if cols != _power(cols):
        if _slices(cols, fmt, mode) == 1:  # Triton 3.6 lets one warp mix up groups whose elements are not neighbours
            return {"TILE": TILE}
        if mode == "qdq":
            return {"TILE": TILE // 4}
        return {"TILE": TILE // 4, "PER_THREAD": 32} if elements <= 2 * SMALL else {"TILE": TILE}
    small = elements <= SMALL
    if mode == "qdq":
        looks_up = fmt.element.cells is not None and not small
        return {"TILE": TILE // 4, "PER_THREAD": 32} if looks_up else {"TILE": TILE // 2, "PER_THREAD": 16}
    if fmt.bits == 8:
        return {"TILE": TILE // 2, "PER_THREAD": 16}
    return {"TILE": TILE // 4, "PER_THREAD": 16 if small and 8 % fmt.bits == 0 else 32}


def _slices(
    columns: int, fmt: Format, mode: str, wanted: int | None = None, per_thread: int = ELEMENTS_PER_THREAD
) -> int:
    """Into how many slices a group is cut that lie above each other in a tile of `group_kernel`: as many as one thread
    holds, which then works out the scales of fewer groups. An odd multiple of a power of two has slices of that length,
    of which those that are padding cost nothing: 96 elements are three of four slices of 32."""
    rows, cols = fmt.group
    if rows != 1 or cols == -1:
        return 1
    if cols != _power(cols):
        length = cols & -cols
        slices = _power(cols // length)
        while mode != "qdq" and length > 16 and 2 * slices <= PADDED_SLICES:  # down to whole sectors
            length, slices = length // 2, 2 * slices
        fitting = length >= (WRITTEN_SLICE if mode == "qdq" else 8) and slices <= PADDED_SLICES
        return slices if fitting and wanted != 1 else 1
    if columns % cols:
        return 1
    if wanted is not None:
        return max(1, min(wanted, cols // 8))  # packing works on runs of eight codes
    # What a thread reads side by side: 8 elements, or 16 where it then writes 16 codes of 8 bits. Slices of values have
    # to be whole sectors, because values are written as they lie; codes are brought into the order of memory first.
    width = 16 if fmt.bits == 8 and mode != "qdq" else 8
    return max(1, min(per_thread // width, cols // (WRITTEN_SLICE if mode == "qdq" else width)))


def _codes_of_words(bits: int) -> int:
    """The fewest codes that are whole 32-bit words."""
    return 32 // math.gcd(32, bits)


def in_words(fmt: Format, columns: int, config: Config) -> bool:
    """Whether codes of a width that does not divide 8 move as 32-bit words: rows and tiles hold whole ones."""
    if 8 % fmt.bits == 0 or columns * fmt.bits % 32:
        return False
    run, cols = _codes_of_words(fmt.bits), fmt.group[1]
    if "BLOCK_N" in config:
        return bool(config["BLOCK_N"] % run == 0)
    group = config["S"] * config["W"]
    if cols not in (-1, group):  # padded groups lie apart
        return bool(group % run == 0 and cols % run == 0)
    return bool(config["GROUPS"] * group % run == 0)


def group_config(
    rows: int, columns: int, fmt: Format, mode: str, choice: Choice | None = None
) -> tuple[Config, tuple[int, int]]:
    """Tile of `group_kernel` or `super_group_kernel`, and how many tiles cover [rows, columns]."""
    choice = _chosen("group", choice) or _group_choice(rows * columns, fmt, mode)
    r, c = _padded_group(fmt, columns)
    group_columns = 1 if fmt.group[1] == -1 else -(-columns // fmt.group[1])
    group_rows = -(-rows // fmt.group[0])
    target = max(1, choice["TILE"] // (r * c))
    groups = max(min(target, _power(group_columns)), fmt.super_group // c)
    m = min(max(1, target // groups), _power(group_rows))
    if c * groups < 8:  # packing works on runs of eight codes
        groups = 8 // c
    slices = _slices(columns, fmt, mode, choice.get("SLICES"), choice.get("PER_THREAD", ELEMENTS_PER_THREAD))
    per_thread = 8 * slices if slices > PADDED_SLICES // 2 else None  # slices are for threads, not for warps
    warps = _warps(m * r * groups * c, choice.get("PER_THREAD", per_thread))
    config = {"S": slices, "M": m, "R": r, "GROUPS": groups, "W": c // slices, "num_warps": warps}
    if r == 1 and per_thread is None and m * groups * c // warps > 32 * ELEMENTS_PER_THREAD:
        config["maxnreg"] = ROW_REGISTERS
    return config, (-(-group_rows // m), -(-group_columns // groups))


def fits_both(fmt: Format) -> bool:
    """Whether tiles hold whole groups of x and of its transpose. Padded groups come out wrong on sm_90 with Triton 3.6,
    though right in the interpreter and by themselves, so they take two launches."""
    rows, cols = fmt.group
    whole = cols > 0 and rows == _power(rows) and cols == _power(cols)
    return whole and not fmt.super_group and rows * cols <= LARGEST_TILE // 2


WRITTEN_COLUMNS = 64  # rows of x in a tile of its transpose, at least: bytes that 8-bit codes fill in a row there


def both_config(rows: int, columns: int, fmt: Format) -> tuple[Config, tuple[int, int], Config, tuple[int, int]]:
    """Tiles of `both_kernel` of x and of its transpose, and how many of each there are; as many warps for both."""
    own, tiles = group_config(rows, columns, fmt, "quantize", {"TILE": TILE})
    r, c = _padded_group(fmt, rows)
    group_rows, group_columns = -(-columns // fmt.group[0]), -(-rows // fmt.group[1])
    groups = max(min(max(1, WRITTEN_COLUMNS // c), _power(group_columns)), 8 // c)
    elements = own["S"] * own["M"] * own["R"] * own["GROUPS"] * own["W"]
    m = min(max(1, elements // (2 * r * c * groups)), _power(group_rows))  # turning a tile takes registers
    other = {"S": 1, "M": m, "R": r, "GROUPS": groups, "W": c}
    return own, tiles, other, (-(-group_rows // m), -(-group_columns // groups))


def hadamard_config(blocks: int) -> Config:
    """Blocks of 16 elements that a program of `hadamard_kernel` rotates."""
    taken = min(TILE // 16, max(8, _power(blocks)))
    return {"BLOCKS": taken, "num_warps": _warps(16 * taken)}


def cast_config(rows: int, columns: int) -> Config:
    """Tile of `cast_kernel`, which moves what "apply_qdq" does."""
    return _block_config(rows, columns, {"TILE": TILE // 4, "PER_THREAD": 8})


SEARCH_SCALES = 4  # candidates of one group that a thread holds


def search_config(count: int, groups: int) -> Config:
    """Groups M of a program of `search_kernel`, whose `count` candidates are Q x L."""
    scales = max(1, min(SEARCH_SCALES, count // 32))
    lanes = count // scales
    m = max(1, min(TILE // 128 // lanes, _power(groups)))  # one warp
    return {"M": m, "Q": scales, "L": lanes, "num_warps": max(1, min(4, m * lanes // 32))}


def _block_n(columns: int, tile: int) -> int:
    """The widest tile that wastes at most a sixteenth of its lanes on a row; a narrow one where none does."""
    for block in (tile, tile // 2, tile // 4):
        if block >= 8 and -columns % block <= columns // 16:
            return block
    return max(8, min(tile, _power(columns)))  # packing works on runs of eight codes


def _block_config(rows: int, columns: int, choice: Choice) -> Config:
    """A choice without BLOCK_N, a heuristic's, takes what suits the rows."""
    if "BLOCK_N" not in choice:
        block_n = _block_n(columns, choice["TILE"])
    else:
        block_n = min(choice["BLOCK_N"], max(8, _power(columns)))
        while block_n > 256 and -columns % block_n > columns // 16:  # measured where more columns divide by it
            block_n //= 2
    block_m = min(max(1, choice["TILE"] // block_n), _power(rows))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": _warps(block_m * block_n, choice["PER_THREAD"])}


def _flat_choice(elements: int, fmt: Format, op: str) -> Choice:
    """Tile and elements of a thread of "apply", "apply_qdq" and "dequantize", as measured on an H100."""
    small, (rows, cols) = elements <= SMALL, fmt.group
    if op == "apply_qdq":
        return {"TILE": TILE // 4, "PER_THREAD": 8}
    if op == "apply":
        if 8 % fmt.bits or (cols > 0 and cols != _power(cols)):  # as for the groups themselves
            return {"TILE": TILE, "PER_THREAD": 32}
        return {"TILE": TILE // 4, "PER_THREAD": 16 if small else 32}
    if elements <= SMALL // 4 and 8 % fmt.bits == 0 and not fmt.super_group:
        return {"TILE": TILE // 4, "PER_THREAD": 16 if fmt.bits == 8 else 8}
    if small:
        return {"TILE": TILE // 4, "PER_THREAD": 32}
    if elements > 4 * SMALL and rows == 1 and cols > 0 and not fmt.super_group:  # from 64 MiB of bf16 on
        if fmt.bits == 8 or (fmt.bits == 4 and cols >= 64):
            return {"TILE": TILE // 4, "PER_THREAD": 8}  # each store of a warp is whole lines
        if fmt.bits != 4:
            return {"TILE": TILE // 4, "PER_THREAD": 32}
    return {"TILE": TILE, "PER_THREAD": 32}


def flat_config(rows: int, columns: int, fmt: Format, op: str, choice: Choice | None = None) -> Config:
    """Tile of `apply_kernel` ("apply", "apply_qdq") and `dequantize_kernel` ("dequantize")."""
    return _block_config(rows, columns, _chosen("flat", choice) or _flat_choice(rows * columns, fmt, op))


def keys_config(rows: int, columns: int, choice: Choice | None = None) -> Config:
    return _block_config(rows, columns, _chosen("keys", choice) or {"TILE": TILE // 2, "PER_THREAD": 16})


AT_ONCE_REGISTERS = 128  # of a thread: so many of two programs of 8 warps, or of one of 16, fit a multiprocessor


def at_once_config(elements: int, fmt: Format, mode: str, processors: int, alone: bool) -> tuple[Config, int] | None:
    """Tiles of `at_once_kernel` for a row of so many elements, and how many they are: one for a multiprocessor, or two
    of 2 * TILE elements unless they take too many registers and run `alone`. None where there would be more."""
    size = max(TILE // 4, _power(-(-elements // processors)))
    choice = {"TILE": min(size, 2 * TILE), "PER_THREAD": 16 if size <= TILE else 32}
    if fmt.group[0] == -1:
        config = {"BLOCK_N": choice["TILE"], "num_warps": _warps(choice["TILE"], choice["PER_THREAD"])}
        tiles = -(-elements // choice["TILE"])
    else:
        config, (_, tiles) = group_config(1, elements, fmt, mode, choice)
    config["maxnreg"] = AT_ONCE_REGISTERS
    return (config, tiles) if tiles <= (1 if alone or size <= TILE else 2) * processors else None


def splits(groups: int, rows: int, columns: int, config: Config, processors: int) -> int:
    """Programs that share one group: as many in all as so many multiprocessors run at once, each with work to do."""
    tiles = -(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"])
    return max(1, min(tiles, 8 * processors // max(1, groups)))


# ------------------------------------------------------------------------------------------------------ for the tuner


def serves(op: str, fmt: Format, columns: int) -> bool:
    """Whether tensors with rows of `columns` elements reach the kernel of `op` in this format."""
    if op in ("quantize", "qdq"):
        return fits(fmt, columns) and not loops_over_rows(fmt, columns)
    if op in ("row_quantize", "row_qdq"):
        return fits(fmt, columns) and loops_over_rows(fmt, columns)
    if op == "scale":
        return fits_tile(fmt, columns) and not fits(fmt, columns)
    if op in ("apply", "apply_qdq"):
        return not fmt.super_group  # which takes no given scales
    if op == "keys":
        return fmt.tensor_scale or not fits_tile(fmt, columns)
    return True


def configure(op: str, fmt: Format, rows: int, columns: int, choice: Choice) -> Config:
    """What the kernel of `op` is launched with for a matrix [rows, columns]."""
    kernel = OPS[op]
    if kernel == "group":
        return group_config(rows, columns, fmt, op, choice)[0]
    if kernel == "row":
        return row_config(choice)
    return flat_config(rows, columns, fmt, op, choice) if kernel == "flat" else keys_config(rows, columns, choice)


_QUICK = {"TILE": (1024, 2048, 4096), "PER_THREAD": (8, 16, 32), "SLICES": (1, 2, 4), "BLOCK_N": (1024, 4096)}


def candidates(op: str, fmt: Format, rows: int, columns: int, quick: bool = False) -> list[Choice]:
    """Choices that configure the kernel of `op` differently for a matrix [rows, columns]; first {}, the heuristic."""
    knobs = KNOBS[OPS[op]]
    values = [[v for v in allowed if not quick or v in _QUICK[name]] for name, allowed in knobs.items()]
    found: dict[tuple[Any, ...], Choice] = {}
    for choice in ({}, *(dict(zip(knobs, picked, strict=True)) for picked in itertools.product(*values))):
        if choice and choice.get("BLOCK_N", 0) > choice["TILE"]:
            continue
        found.setdefault(tuple(configure(op, fmt, rows, columns, choice).values()), choice)
    return list(found.values())
