"""Many tensors in one launch: the tiles of `quantize`, `super_groups` and `stats`, whose tensor a program looks up.

A table in device memory, int64 [entries, 32], has an entry for each matrix [batch, N, K] among the tensors (and their
transposes), sorted by `start`, the number of programs before it; `_entry` finds that of a program. Elements lie at
`x_ptr` plus an offset of elements, parts at a base plus an offset of bytes: `rows_ptr` for what is quantized along rows
(`side` 0), `columns_ptr` along columns. So a table says nothing about where results lie, and serves other calls.

Entries are of two kinds with tiles of their own: those whose columns are neighbours in memory, and all others
(`turned`), of which usually rows are. UNIT says that this stride is 1 in all entries of the kind, KNOWN what 16
divides.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.codecs import super_scale_triton as supers
from tritonq.kernels import stats, super_groups, tile
from tritonq.kernels.quantize import quantize_tile


@triton.constexpr_function
def place(name):
    """Where an entry has the field `name`."""
    return {
        "start": 0, "turned": 1, "side": 2, "x": 3, "rows": 4, "columns": 5,
        "stride_batch": 6, "stride_row": 7, "stride_col": 8, "tiles_m": 9, "tiles_n": 10, "row_bytes": 11,
        "qdata": 12, "scale": 13, "zero_point": 14, "tensor_scale": 15,
        "divisor": 16, "slot": 17,
        "group_minimum": 18, "super_scale": 19, "super_minimum": 20,  # of formats with super-groups
        "from_side": 21, "from_scale": 22, "from_zero_point": 23,  # where the one scale of a tensor is found
        "group_rows": 24, "group_cols": 25, "all_rows": 26, "groups_per_column": 27,
        "groups_per_row": 28, "splits": 29, "programs": 30,  # of keys
    }[name]  # fmt: skip


FIELDS = tl.constexpr(32)


@triton.constexpr_function
def says(known, name):
    """Whether KNOWN says so: sizes, extents and bytes are multiples of 16, tiles lie in one row."""
    return known & {"sizes": 1, "extents": 2, "bytes": 4, "flat": 8}[name] != 0


@triton.jit
def _field(entry_ptr, NAME: tl.constexpr, MULTIPLE: tl.constexpr = False):
    """A field; MULTIPLE tells the compiler, at the load, where the hint survives inlining, that 16 divides it."""
    value = tl.load(entry_ptr + place(NAME))
    if MULTIPLE:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def _starts_by(table_ptr, index, entries, pid):
    """Whether an entry starts at this program or before; those before the first do, those after the last do not."""
    inside = (index >= 0) & (index < entries)
    start = tl.load(table_ptr + index * FIELDS, inside, other=0)
    return ((index < 0) | (start <= pid)) & (index < entries)


@triton.jit
def _entry(table_ptr, entries, scale):
    """The entry of this program, the last that starts no later, and which of its programs this is.

    Where tensors are alike it lies beside pid * entries / programs, `scale` being 2^31 times the ratio: four loads that
    wait for nothing instead of a search, whose loads wait for each other.
    """
    pid = tl.program_id(0)
    guess = ((pid.to(tl.int64) * scale) >> 31).to(tl.int32)
    before, own = _starts_by(table_ptr, guess - 1, entries, pid), _starts_by(table_ptr, guess, entries, pid)
    later, after = _starts_by(table_ptr, guess + 1, entries, pid), _starts_by(table_ptr, guess + 2, entries, pid)
    near = before & (after == 0)
    first = tl.where(near, guess - 1 + own.to(tl.int32) + later.to(tl.int32), 0)
    end = tl.where(near, first + 1, entries)
    while end - first > 1:
        middle = (first + end) // 2
        starts = tl.load(table_ptr + middle * FIELDS) <= pid
        first = tl.where(starts, middle, first)
        end = tl.where(starts, end, middle)
    entry_ptr = table_ptr + first * FIELDS
    return entry_ptr, pid - _field(entry_ptr, "start").to(tl.int32)


@triton.jit
def _base(entry_ptr, rows_ptr, columns_ptr, NAME: tl.constexpr):
    return tl.where(_field(entry_ptr, NAME) == 0, rows_ptr, columns_ptr)


@triton.jit
def _part(entry_ptr, base_ptr, NAME: tl.constexpr, KNOWN: tl.constexpr, BITS: tl.constexpr):
    """Where a part begins, as integers of so many bits."""
    part_ptr = base_ptr + _field(entry_ptr, NAME, says(KNOWN, "bytes"))
    if BITS == 32:
        part_ptr = part_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    elif BITS == 16:
        part_ptr = part_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    return part_ptr


@triton.jit
def _position(entry_ptr, index, TURNED: tl.constexpr, KNOWN: tl.constexpr):
    """(batch, row, column) of a tile: neighbours among programs are neighbours in memory."""
    none = tl.full([], 0, tl.int64)
    if says(KNOWN, "flat"):
        return none, none, index.to(tl.int64)
    tiles_m, tiles_n = _field(entry_ptr, "tiles_m").to(tl.int32), _field(entry_ptr, "tiles_n").to(tl.int32)
    if TURNED:
        rest, tile_m = index // tiles_m, index % tiles_m
        return (rest // tiles_n).to(tl.int64), tile_m.to(tl.int64), (rest % tiles_n).to(tl.int64)
    rest, tile_n = index // tiles_n, index % tiles_n
    return (rest // tiles_m).to(tl.int64), (rest % tiles_m).to(tl.int64), tile_n.to(tl.int64)


@triton.jit
def _strides(entry_ptr, TURNED: tl.constexpr, UNIT: tl.constexpr, KNOWN: tl.constexpr):
    """Strides of a row and of a column."""
    if UNIT and TURNED:
        return 1, _field(entry_ptr, "stride_col", says(KNOWN, "sizes"))
    elif UNIT:
        return _field(entry_ptr, "stride_row", says(KNOWN, "sizes")), 1
    else:
        return _field(entry_ptr, "stride_row"), _field(entry_ptr, "stride_col")


@triton.jit
def _extents(entry_ptr, TURNED: tl.constexpr, KNOWN: tl.constexpr):
    """N and K; 16 may divide the one that neighbours in memory run along."""
    NEIGHBOURS: tl.constexpr = says(KNOWN, "extents")
    if TURNED:
        return _field(entry_ptr, "rows", NEIGHBOURS), _field(entry_ptr, "columns")
    return _field(entry_ptr, "rows"), _field(entry_ptr, "columns", NEIGHBOURS)


@triton.jit
def _store_tensor_scale(entry_ptr, index, base_ptr, divisor_ptr):
    """The tensor scale beside the parts of its tensor."""
    own_ptr = _part(entry_ptr, base_ptr, "tensor_scale", 0, 32)
    bits = tl.load(divisor_ptr).to(tl.int32, bitcast=True)
    tl.store(own_ptr, bits, index == 0)


@triton.jit
def _quantize(
    entry_ptr, index, x_ptr, base_ptr, divisor_ptr,
    FMT: tl.constexpr, MODE: tl.constexpr, TURNED: tl.constexpr, UNIT: tl.constexpr, KNOWN: tl.constexpr,
    PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A tile of `quantize_tile`."""
    batch, tile_m, tile_n = _position(entry_ptr, index, TURNED, KNOWN)
    N, K = _extents(entry_ptr, TURNED, KNOWN)
    stride_batch = _field(entry_ptr, "stride_batch", says(KNOWN, "sizes"))
    stride_row, stride_col = _strides(entry_ptr, TURNED, UNIT, KNOWN)
    if FMT.tensor_scale:
        divisor_ptr += _field(entry_ptr, "divisor")
        _store_tensor_scale(entry_ptr, index, base_ptr, divisor_ptr)
    quantize_tile(
        x_ptr + _field(entry_ptr, "x", says(KNOWN, "sizes")),
        _part(entry_ptr, base_ptr, "qdata", KNOWN, 8),
        _part(entry_ptr, base_ptr, "scale", KNOWN, FMT.scale.bits),
        _part(entry_ptr, base_ptr, "zero_point", KNOWN, 8),
        divisor_ptr, None, None, None, batch, tile_m, tile_n, N, K,
        _field(entry_ptr, "row_bytes", says(KNOWN, "bytes")), stride_batch, stride_row, stride_col,
        FMT, MODE, 0, 0.0, PARTIAL, WORDS, S, M, R, GROUPS, W, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["entries", "scale"])
def grouped_kernel(
    x_ptr, rows_ptr, columns_ptr, divisor_ptr, table_ptr, entries, scale,
    FMT: tl.constexpr, MODE: tl.constexpr, R: tl.constexpr,
    UNIT: tl.constexpr, KNOWN: tl.constexpr, PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    OTHER_UNIT: tl.constexpr, OTHER_KNOWN: tl.constexpr, OTHER_PARTIAL: tl.constexpr, OTHER_WORDS: tl.constexpr,
    OTHER_M: tl.constexpr, OTHER_GROUPS: tl.constexpr, OTHER_W: tl.constexpr,
):  # fmt: skip
    """Codes and scales ("quantize"), or scales alone ("scale"), a tile a program. M or OTHER_M of 0: there are no
    entries of this kind. Tensor scales are read from `divisor_ptr`."""
    entry_ptr, index = _entry(table_ptr, entries, scale)
    base_ptr = _base(entry_ptr, rows_ptr, columns_ptr, "side")
    if OTHER_M == 0:
        _quantize(
            entry_ptr, index, x_ptr, base_ptr, divisor_ptr, FMT, MODE, False, UNIT, KNOWN, PARTIAL, WORDS,
            S, M, R, GROUPS, W,
        )  # fmt: skip
    elif M == 0:
        _quantize(
            entry_ptr, index, x_ptr, base_ptr, divisor_ptr, FMT, MODE, True, OTHER_UNIT, OTHER_KNOWN,
            OTHER_PARTIAL, OTHER_WORDS, 1, OTHER_M, R, OTHER_GROUPS, OTHER_W,
        )  # fmt: skip
    elif _field(entry_ptr, "turned") == 0:
        _quantize(
            entry_ptr, index, x_ptr, base_ptr, divisor_ptr, FMT, MODE, False, UNIT, KNOWN, PARTIAL, WORDS,
            S, M, R, GROUPS, W,
        )  # fmt: skip
    else:
        _quantize(
            entry_ptr, index, x_ptr, base_ptr, divisor_ptr, FMT, MODE, True, OTHER_UNIT, OTHER_KNOWN,
            OTHER_PARTIAL, OTHER_WORDS, 1, OTHER_M, R, OTHER_GROUPS, OTHER_W,
        )  # fmt: skip


@triton.jit
def _quantize_supers(
    entry_ptr, index, x_ptr, base_ptr,
    FMT: tl.constexpr, TURNED: tl.constexpr, UNIT: tl.constexpr, KNOWN: tl.constexpr, PARTIAL: tl.constexpr,
    WORDS: tl.constexpr, S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A tile of `super_group_kernel`, in mode "quantize"."""
    ELEM: tl.constexpr = FMT.element
    C: tl.constexpr = S * W
    SUPERS: tl.constexpr = GROUPS * C // FMT.super_group
    batch, tile_m, tile_n = _position(entry_ptr, index, TURNED, KNOWN)
    N, K = _extents(entry_ptr, TURNED, KNOWN)
    stride_batch = _field(entry_ptr, "stride_batch", says(KNOWN, "sizes"))
    stride_row, stride_col = _strides(entry_ptr, TURNED, UNIT, KNOWN)
    x_ptr += _field(entry_ptr, "x", says(KNOWN, "sizes")) + batch * stride_batch
    r = tl.arange(0, S * M)
    row = tile_m * M + r % M
    slice_col = ((r // M) * W).to(tl.int64)
    c = tl.arange(0, GROUPS * W)
    col = tile_n * (GROUPS * C) + (c // W) * C + c % W
    mask = (row < N)[:, None] & (col < K)[None, :]
    offsets = (row * stride_row + slice_col * stride_col)[:, None] + col[None, :] * stride_col
    x = tile.to_float32(tl.load(x_ptr + offsets, mask, other=0.0))

    high, low = scales.keys(x, FMT)
    high = super_groups._max_per_group(high, S, M, GROUPS, W)
    if FMT.scale.signed_range:
        low = super_groups._max_per_group(low, S, M, GROUPS, W)
    scale, minimum, super_scale, super_minimum, factor, offset, bad = supers.choose(high, low, M, SUPERS, GROUPS, FMT)

    row = tile_m * M + tl.arange(0, M)
    row_mask = row < N
    in_row = (K + C - 1) // C
    group = tile_n * GROUPS + tl.arange(0, GROUPS)
    group_mask = row_mask[:, None] & (group < in_row)[None, :]
    at = (batch * N + row)[:, None] * in_row + group[None, :]
    scale_ptr = _part(entry_ptr, base_ptr, "scale", KNOWN, 8)
    tl.store(scale_ptr + at, scale.to(tl.int32).to(tl.uint8), group_mask)
    in_row = (K + FMT.super_group - 1) // FMT.super_group
    super_group = tile_n * SUPERS + tl.arange(0, SUPERS)
    super_mask = row_mask[:, None] & (super_group < in_row)[None, :]
    super_at = (batch * N + row)[:, None] * in_row + super_group[None, :]
    super_ptr = _part(entry_ptr, base_ptr, "super_scale", KNOWN, 16)
    tl.store(super_ptr + super_at, super_scale.to(tl.int16), super_mask)
    if FMT.minimum:
        minimum_ptr = _part(entry_ptr, base_ptr, "group_minimum", KNOWN, 8)
        tl.store(minimum_ptr + at, minimum.to(tl.int32).to(tl.uint8), group_mask)
        super_ptr = _part(entry_ptr, base_ptr, "super_minimum", KNOWN, 16)
        tl.store(super_ptr + super_at, super_minimum.to(tl.int16), super_mask)
        x = x + super_groups._spread(offset, S, M, GROUPS, W)
    x = super_groups._quotient(x, factor, S, M, GROUPS, W, FMT)
    codes = ELEM.codec.encode(x, FMT.zero_code, super_groups._spread(~bad, S, M, GROUPS, W), ELEM)
    if PARTIAL:
        codes = tl.where(mask, codes, 0)
    row_bytes = _field(entry_ptr, "row_bytes", says(KNOWN, "bytes"))
    q_ptr = _part(entry_ptr, base_ptr, "qdata", KNOWN, 8)
    first_byte = tile_n * (GROUPS * C * FMT.bits // 8)
    row_start = (batch * N + row) * row_bytes
    tile.store_codes(q_ptr, row_start, row_mask, row_bytes, first_byte, codes, S, GROUPS, 0, WORDS, FMT)


@triton.jit(do_not_specialize=["entries", "scale"])
def grouped_super_kernel(
    x_ptr, rows_ptr, columns_ptr, table_ptr, entries, scale,
    FMT: tl.constexpr,
    UNIT: tl.constexpr, KNOWN: tl.constexpr, PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    OTHER_UNIT: tl.constexpr, OTHER_KNOWN: tl.constexpr, OTHER_PARTIAL: tl.constexpr, OTHER_WORDS: tl.constexpr,
    OTHER_M: tl.constexpr, OTHER_GROUPS: tl.constexpr, OTHER_W: tl.constexpr,
):  # fmt: skip
    """As `grouped_kernel`, for formats with super-groups."""
    entry_ptr, index = _entry(table_ptr, entries, scale)
    base_ptr = _base(entry_ptr, rows_ptr, columns_ptr, "side")
    if OTHER_M == 0:
        _quantize_supers(entry_ptr, index, x_ptr, base_ptr, FMT, False, UNIT, KNOWN, PARTIAL, WORDS, S, M, GROUPS, W)
    elif M == 0:
        _quantize_supers(
            entry_ptr, index, x_ptr, base_ptr, FMT, True, OTHER_UNIT, OTHER_KNOWN, OTHER_PARTIAL, OTHER_WORDS,
            1, OTHER_M, OTHER_GROUPS, OTHER_W,
        )  # fmt: skip
    elif _field(entry_ptr, "turned") == 0:
        _quantize_supers(entry_ptr, index, x_ptr, base_ptr, FMT, False, UNIT, KNOWN, PARTIAL, WORDS, S, M, GROUPS, W)
    else:
        _quantize_supers(
            entry_ptr, index, x_ptr, base_ptr, FMT, True, OTHER_UNIT, OTHER_KNOWN, OTHER_PARTIAL, OTHER_WORDS,
            1, OTHER_M, OTHER_GROUPS, OTHER_W,
        )  # fmt: skip


@triton.jit
def _reduce(
    entry_ptr, group, split, x_ptr, TURNED: tl.constexpr, UNIT: tl.constexpr, KNOWN: tl.constexpr,
    FINITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Maximal keys of every `splits`-th tile of a group. FLAT: all entries are one group in one row."""
    group_col = group % _field(entry_ptr, "groups_per_row")
    group_row = group // _field(entry_ptr, "groups_per_row")  # over batch and rows of groups
    per_column, rows = _field(entry_ptr, "groups_per_column"), _field(entry_ptr, "group_rows")
    cols = _field(entry_ptr, "group_cols", says(KNOWN, "extents"))
    N, K = _field(entry_ptr, "rows"), _field(entry_ptr, "columns", says(KNOWN, "extents"))
    stride_batch = _field(entry_ptr, "stride_batch", says(KNOWN, "sizes"))
    stride_row, stride_col = _strides(entry_ptr, TURNED, UNIT, KNOWN)
    x_ptr += _field(entry_ptr, "x", says(KNOWN, "sizes"))
    batch, first_row = group_row // per_column, (group_row % per_column) * rows
    last_row = tl.minimum(first_row + rows, _field(entry_ptr, "all_rows"))
    first_col = group_col * cols
    last_col = tl.minimum(first_col + cols, K)
    tiles_n = tl.cdiv(last_col - first_col, BLOCK_N)
    tiles = tl.cdiv(last_row - first_row, BLOCK_M) * tiles_n
    high = tl.zeros([BLOCK_M, BLOCK_N], scales.key_type(FMT))
    low = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
    for t in range(split, tiles, _field(entry_ptr, "splits")):
        if says(KNOWN, "flat"):
            col = t * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = (tl.arange(0, BLOCK_M) < 1)[:, None] & (col < last_col)[None, :]
            row_offset = tl.zeros([BLOCK_M], tl.int64)
        else:
            row = first_row + (t // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
            col = first_col + (t % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = (row < last_row)[:, None] & (col < last_col)[None, :]
            row_offset = (batch + row // N) * stride_batch + (row % N) * stride_row
        x = tile.to_float32(tl.load(x_ptr + row_offset[:, None] + col[None, :] * stride_col, mask, other=0.0))
        if FINITE:
            x = tl.where(x - x == 0.0, x, 0.0)
        signed, unsigned = scales.keys(x, FMT)
        high = tl.maximum(high, signed)
        if FMT.scale.signed_range:
            low = tl.maximum(low, unsigned)
    return tl.max(tl.max(high, 1), 0), tl.max(tl.max(low, 1), 0)


@triton.jit(do_not_specialize=["entries", "scale"])
def grouped_keys_kernel(
    x_ptr, rows_ptr, columns_ptr, divisor_ptr, keys_ptr, table_ptr, entries, scale,
    FMT: tl.constexpr, FINITE: tl.constexpr,
    UNIT: tl.constexpr, KNOWN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OTHER_UNIT: tl.constexpr, OTHER_KNOWN: tl.constexpr, OTHER_BLOCK_M: tl.constexpr, OTHER_BLOCK_N: tl.constexpr,
):  # fmt: skip
    """keys [groups, 3] (int32, zero-filled) of groups larger than a tile, and with FINITE of whole tensors: two maxima
    and the number of programs that have ended. The last of `programs` stores the scale and zero point of its group, or
    with FINITE the tensor scale at `divisor_ptr`, which otherwise is only read, and leaves zeros for the next launch.
    """
    entry_ptr, index = _entry(table_ptr, entries, scale)
    splits = _field(entry_ptr, "splits")
    group, split = index // splits, index % splits
    if OTHER_BLOCK_M == 0:
        high, low = _reduce(entry_ptr, group, split, x_ptr, False, UNIT, KNOWN, FINITE, BLOCK_M, BLOCK_N, FMT)
    elif BLOCK_M == 0:
        high, low = _reduce(
            entry_ptr, group, split, x_ptr, True, OTHER_UNIT, OTHER_KNOWN, FINITE, OTHER_BLOCK_M, OTHER_BLOCK_N, FMT
        )
    elif _field(entry_ptr, "turned") == 0:
        high, low = _reduce(entry_ptr, group, split, x_ptr, False, UNIT, KNOWN, FINITE, BLOCK_M, BLOCK_N, FMT)
    else:
        high, low = _reduce(
            entry_ptr, group, split, x_ptr, True, OTHER_UNIT, OTHER_KNOWN, FINITE, OTHER_BLOCK_M, OTHER_BLOCK_N, FMT
        )
    keys_ptr += 3 * (_field(entry_ptr, "slot") + group)
    tl.atomic_max(keys_ptr.to(tl.pointer_type(scales.key_type(FMT))), high)
    if FMT.scale.signed_range:
        tl.atomic_max((keys_ptr + 1).to(tl.pointer_type(tl.uint32)), low)
    if tl.atomic_add(keys_ptr + 2, 1) == _field(entry_ptr, "programs") - 1:
        own_divisor_ptr = divisor_ptr + _field(entry_ptr, "divisor")
        one = tl.arange(0, 1)
        signed_key, unsigned_key = tl.atomic_xchg(keys_ptr, 0) + one * 0, one * 0
        if FMT.scale.signed_range:
            unsigned_key += tl.atomic_xchg(keys_ptr + 1, 0)
        tl.atomic_xchg(keys_ptr + 2, 0)
        if FINITE:
            tl.store(own_divisor_ptr + one, stats._tensor_scale(signed_key, unsigned_key, FMT))
        else:
            base_ptr = _base(entry_ptr, rows_ptr, columns_ptr, "side")
            scale_ptr = _part(entry_ptr, base_ptr, "scale", 0, FMT.scale.bits) + group
            zero_ptr = _part(entry_ptr, base_ptr, "zero_point", 0, 8) + group
            stats._store_choice(signed_key, unsigned_key, one, one == 0, scale_ptr, zero_ptr, own_divisor_ptr, FMT)


@triton.jit
def _apply(
    entry_ptr, index, x_ptr, base_ptr, from_ptr, divisor_ptr,
    FMT: tl.constexpr, TURNED: tl.constexpr, UNIT: tl.constexpr, KNOWN: tl.constexpr, PARTIAL: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of `apply_kernel` whose scales are OWN, in mode "quantize"."""
    ELEM: tl.constexpr = FMT.element
    batch, tile_m, tile_n = _position(entry_ptr, index, TURNED, KNOWN)
    N, K = _extents(entry_ptr, TURNED, KNOWN)
    stride_batch = _field(entry_ptr, "stride_batch", says(KNOWN, "sizes"))
    stride_row, stride_col = _strides(entry_ptr, TURNED, UNIT, KNOWN)
    x_ptr += _field(entry_ptr, "x", says(KNOWN, "sizes")) + batch * stride_batch
    scale_ptr = _part(entry_ptr, from_ptr, "from_scale", 0, FMT.scale.bits)
    zero_ptr = _part(entry_ptr, from_ptr, "from_zero_point", 0, 8)
    tensor_scale = 1.0
    if FMT.tensor_scale:
        divisor_ptr += _field(entry_ptr, "divisor")
        _store_tensor_scale(entry_ptr, index, base_ptr, divisor_ptr)
        tensor_scale = tl.load(divisor_ptr)
    if FMT.group[0] == -1:  # the scale of this tensor may have been found elsewhere
        tl.store(_part(entry_ptr, base_ptr, "scale", 0, FMT.scale.bits), tl.load(scale_ptr), index == 0)
        if FMT.zero_point:
            tl.store(_part(entry_ptr, base_ptr, "zero_point", 0, 8), tl.load(zero_ptr), index == 0)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_n * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    row_mask = row < N
    mask = row_mask[:, None] & (col < K)[None, :]
    x = tile.to_float32(tl.load(x_ptr + (row[:, None] * stride_row + col[None, :] * stride_col), mask, other=0.0))
    factor, zero = tile.load_factors(scale_ptr, zero_ptr, tensor_scale, batch, row, row_mask, first, N, K, BLOCK_N, FMT)
    if FMT.group[1] == -1:
        finite = factor == factor
        shift, divisor, inverse, below, correction = scales.reciprocal(tl.where(finite, factor, 1.0), False, FMT)
        x = scales.quotient(x, shift, divisor, inverse, below, correction, False, FMT)
    else:
        finite = None
        x = scales.divide(x, factor)
    codes = ELEM.codec.encode(x, zero, finite, ELEM)
    if PARTIAL:
        codes = tl.where(mask, codes, 0)
    row_bytes = _field(entry_ptr, "row_bytes", says(KNOWN, "bytes"))
    q_ptr = _part(entry_ptr, base_ptr, "qdata", KNOWN, 8)
    BYTES_OF_TILE: tl.constexpr = BLOCK_N * FMT.bits // 8
    row_start = (batch * N + row) * row_bytes
    tile.store_codes(q_ptr, row_start, row_mask, row_bytes, tile_n * BYTES_OF_TILE, codes, 1, 1, 0, WORDS, FMT)


@triton.jit(do_not_specialize=["entries", "scale"])
def grouped_apply_kernel(
    x_ptr, rows_ptr, columns_ptr, divisor_ptr, table_ptr, entries, scale,
    FMT: tl.constexpr,
    UNIT: tl.constexpr, KNOWN: tl.constexpr, PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OTHER_UNIT: tl.constexpr, OTHER_KNOWN: tl.constexpr, OTHER_PARTIAL: tl.constexpr, OTHER_WORDS: tl.constexpr,
    OTHER_BLOCK_M: tl.constexpr, OTHER_BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes for scales and zero points that `grouped_keys_kernel`, or `grouped_kernel` in mode "scale", left."""
    entry_ptr, index = _entry(table_ptr, entries, scale)
    base_ptr = _base(entry_ptr, rows_ptr, columns_ptr, "side")
    from_ptr = _base(entry_ptr, rows_ptr, columns_ptr, "from_side")
    if OTHER_BLOCK_M == 0:
        _apply(
            entry_ptr, index, x_ptr, base_ptr, from_ptr, divisor_ptr, FMT, False, UNIT, KNOWN, PARTIAL, WORDS,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif BLOCK_M == 0:
        _apply(
            entry_ptr, index, x_ptr, base_ptr, from_ptr, divisor_ptr, FMT, True, OTHER_UNIT, OTHER_KNOWN,
            OTHER_PARTIAL, OTHER_WORDS, OTHER_BLOCK_M, OTHER_BLOCK_N,
        )  # fmt: skip
    elif _field(entry_ptr, "turned") == 0:
        _apply(
            entry_ptr, index, x_ptr, base_ptr, from_ptr, divisor_ptr, FMT, False, UNIT, KNOWN, PARTIAL, WORDS,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _apply(
            entry_ptr, index, x_ptr, base_ptr, from_ptr, divisor_ptr, FMT, True, OTHER_UNIT, OTHER_KNOWN,
            OTHER_PARTIAL, OTHER_WORDS, OTHER_BLOCK_M, OTHER_BLOCK_N,
        )  # fmt: skip
