"""Quantize and QDQ in one pass: scale = choose(group), code = encode(x / scale), y = decode(code) * scale.

`group_kernel` handles groups that fit a tile and `row_kernel` those that are rows; `apply_kernel` takes the scales as
given (precomputed, or from `tritonq.kernels.stats` for groups larger than a tile, or where codes of neighbouring groups
share a byte).

ROUNDING 0 rounds to the nearest code; `seed_low`, `seed_high` and `first_index` are then None, which Triton compiles
away. Otherwise rounding is stochastic, with the random numbers of `codecs.philox` for element `first_index` of the
whole tensor on; four neighbours in a tile are neighbours in the tensor, and take ROUNDING counters, 1 or 2.
"""

import triton
import triton.language as tl

from tritonq.codecs import philox_triton as philox
from tritonq.codecs import scale_triton as scales
from tritonq.kernels import tile


@triton.jit
def _max_per_group(keys, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr):
    """[S * M * R, GROUPS * W] to [M, GROUPS]."""
    if S > 1:
        return tl.max(tl.max(keys.reshape([S, M, GROUPS, W]), 0), 2)
    elif R == 1:
        return tl.max(keys.reshape([M, GROUPS, W]), 2)
    elif GROUPS == 1 and M == 1:
        # Over both axes at once: fewer exchanges between threads. With several groups above each other Triton 3.6 mixes
        # them up where the lanes of a group are not neighbours.
        return tl.max(keys.reshape([M, R * W]), 1)[:, None]
    else:
        return tl.max(tl.max(keys.reshape([M, R, GROUPS, W]), 3), 1)


@triton.jit
def _spread(per_group, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr):
    """[M, GROUPS] to [S * M * R, GROUPS * W]."""
    if S > 1:
        return tl.broadcast_to(per_group[None, :, :, None], [S, M, GROUPS, W]).reshape([S * M, GROUPS * W])
    elif R == 1:
        return tl.broadcast_to(per_group[:, :, None], [M, GROUPS, W]).reshape([M, GROUPS * W])
    else:
        return tl.broadcast_to(per_group[:, None, :, None], [M, R, GROUPS, W]).reshape([M * R, GROUPS * W])


@triton.jit
def _column(first, c, S: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr):
    """Columns of the lanes c of a tile whose first column is `first`."""
    C: tl.constexpr = S * W
    if S > 1:
        return first + (c // W) * COLS + c % W
    elif COLS == C or COLS == -1:
        return first + c
    else:
        return first + (c // C) * COLS + c % C


@triton.jit
def _quotient(
    x, factor, MODERATE: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """x / factor of its group."""
    shift, divisor, inverse, below, correction = scales.reciprocal(factor, MODERATE, FMT)
    return scales.quotient(
        x,
        _spread(shift, S, M, R, GROUPS, W),
        _spread(divisor, S, M, R, GROUPS, W),
        _spread(inverse, S, M, R, GROUPS, W),
        _spread(below, S, M, R, GROUPS, W),
        _spread(correction, S, M, R, GROUPS, W),
        MODERATE,
        FMT,
    )


@triton.jit
def quantize_tile(
    x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, seed_low, seed_high, first_index,
    batch, tile_m, tile_n, N, K, row_bytes, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, LIMIT: tl.constexpr, PARTIAL: tl.constexpr,
    WORDS: tl.constexpr, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    SWIZZLED: tl.constexpr,
):  # fmt: skip
    """A tile of M x GROUPS groups, each padded to R x (S * W) elements (powers of two).

    The S slices of a group (more than one only where R = 1, and whole groups fill rows exactly) lie above each other in
    the tile, so that a thread holds more elements of fewer groups, and works out fewer scales. Of padded groups in
    slices whole slices are padding.
    PARTIAL: a row's last byte is not full, so codes beyond the row have to be 0.
    MODE "quantize" writes codes to q_ptr, and scales; "qdq" writes values to q_ptr and no scales; "scale" only scales.
    SWIZZLED: scales go to tiles of 128 x 4, whose padding the tiles of this kernel cover and fill with zeros.
    """
    ELEM: tl.constexpr = FMT.element
    ROWS: tl.constexpr = FMT.group[0]
    COLS: tl.constexpr = FMT.group[1]
    C: tl.constexpr = S * W

    r = tl.arange(0, S * M * R)
    slice_col = tl.zeros([S * M * R], tl.int64)
    if S > 1:
        slice_col, r = ((r // M) * W).to(tl.int64), r % M
    group_row = tile_m * M + r // R
    row = group_row * ROWS + r % R
    row_mask = row < N
    if R != ROWS:
        row_mask = row_mask & (r % R < ROWS)
    c = tl.arange(0, GROUPS * W)
    PADDED: tl.constexpr = COLS != C and COLS != -1
    first = tile_n * (GROUPS * (COLS if PADDED else C))
    col = _column(first, c, S, W, COLS)
    if PADDED and S > 1:  # by whole slices; rows may end within a group
        mask = (row_mask & (slice_col < COLS))[:, None] & (slice_col[:, None] + col[None, :] < K)
    elif PADDED:
        mask = row_mask[:, None] & ((col < K) & (c % C < COLS))[None, :]
    else:
        mask = row_mask[:, None] & (col < K)[None, :]
    offsets = (row * stride_row + slice_col * stride_col)[:, None] + col[None, :] * stride_col
    x = tile.to_float32(tl.load(x_ptr + batch * stride_batch + offsets, mask, other=0.0))

    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    high, low = scales.keys(x, FMT)
    high = _max_per_group(high, S, M, R, GROUPS, W)
    if FMT.scale.signed_range:
        low = _max_per_group(low, S, M, R, GROUPS, W)
    stored, factor, zero, bad = scales.choose(high, low, tensor_scale, FMT)

    if MODE != "qdq":
        in_row = 1 if COLS == -1 else (K + COLS - 1) // COLS
        in_col = (N + ROWS - 1) // ROWS
        scale_row = tile_m * M + tl.arange(0, M)
        scale_col = tile_n * GROUPS + tl.arange(0, GROUPS)
        scale_mask = (scale_row < in_col)[:, None] & (scale_col < in_row)[None, :]
        index = (batch * in_col + scale_row)[:, None] * in_row + scale_col[None, :]
        if SWIZZLED:
            padded_rows, padded_columns = (in_col + 127) // 128 * 128, (in_row + 3) // 4 * 4
            index = batch * padded_rows * padded_columns + tile.swizzled(scale_row, scale_col, padded_columns)
            stored = tl.where(scale_mask, stored, 0)
            scale_mask = (scale_row < padded_rows)[:, None] & (scale_col < padded_columns)[None, :]
        tl.store(scale_ptr + index, stored.to(scale_ptr.dtype.element_ty), scale_mask)
        if FMT.zero_point:
            tl.store(zero_ptr + index, zero.to(tl.uint8), scale_mask)
    if MODE != "scale":
        if FMT.zero_point:
            zero = _spread(zero, S, M, R, GROUPS, W)
        else:
            zero = ELEM.zero_code
        if FMT.tensor_scale:
            if scales.divides_fast(tensor_scale):
                x = _quotient(x, factor, True, S, M, R, GROUPS, W, FMT)
            else:
                x = _quotient(x, factor, False, S, M, R, GROUPS, W, FMT)
        else:
            x = _quotient(x, factor, False, S, M, R, GROUPS, W, FMT)
        if ROUNDING != 0:
            starts = first_index + (batch * N + row) * K + slice_col
            fourth = _column(first, tl.arange(0, GROUPS * W // 4) * 4, S, W, COLS)
            u = philox.uniform(seed_low, seed_high, starts, fourth, ROUNDING)
            x = ELEM.codec.stochastic(x, u, zero, ELEM)
        if MODE == "qdq":
            factor = _spread(tl.where(bad, float("nan"), factor), S, M, R, GROUPS, W)
            y = tile.saturate(ELEM.codec.round(x, zero, ELEM) * factor, LIMIT)
            offsets = (batch * N + row)[:, None] * K + slice_col[:, None] + col[None, :]
            tl.store(q_ptr + offsets, y.to(q_ptr.dtype.element_ty), mask)
        else:
            codes = ELEM.codec.encode(x, zero, _spread(~bad, S, M, R, GROUPS, W), ELEM)
            if PARTIAL:
                codes = tl.where(mask, codes, 0)
            LIE: tl.constexpr = S > 1 and FMT.bits == 8 and not PADDED  # codes are stored as they lie
            if S > 1 and not LIE:
                if PADDED:  # which the compiler then knows to be 0, and leaves out what led to it
                    codes = tl.where((slice_col < COLS)[:, None], codes, 0)
                row, slice_col = tile_m * M + tl.arange(0, M), 0
                row_mask = row < N
            row_start = (batch * N + row) * row_bytes  # an argument: the compiler knows whether 16 divides it
            if PADDED or LIE:
                BYTES: tl.constexpr = (COLS * FMT.bits + 7) // 8  # whole, or the only group of its row
                ORDER: tl.constexpr = 1 if LIE else S
                first_byte = tile_n * (GROUPS * BYTES)
                row_start += slice_col
                tile.store_codes(
                    q_ptr, row_start, row_mask, row_bytes, first_byte, codes, ORDER, GROUPS, BYTES, WORDS, FMT
                )
            else:
                first_byte = tile_n * (GROUPS * C * FMT.bits // 8)
                tile.store_codes(q_ptr, row_start, row_mask, row_bytes, first_byte, codes, S, GROUPS, 0, WORDS, FMT)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_index", "N", "tiles_m"])
def group_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    seed_low, seed_high, first_index, N, K, row_bytes, tiles_m, tiles_n, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, LIMIT: tl.constexpr, PARTIAL: tl.constexpr,
    AXES: tl.constexpr, WORDS: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    SWIZZLED: tl.constexpr,
):  # fmt: skip
    """A tile a program."""
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    quantize_tile(
        x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, seed_low, seed_high, first_index,
        batch, tile_m, tile_n, N, K, row_bytes, stride_batch, stride_row, stride_col,
        FMT, MODE, ROUNDING, LIMIT, PARTIAL, WORDS, S, M, R, GROUPS, W, SWIZZLED,
    )  # fmt: skip


@triton.jit
def _step(t, K, stride_col, BLOCK_N: tl.constexpr):
    """Columns t * BLOCK_N on: (the first, offsets of the elements from it, which of them exist). What each element has
    of its own stays in 32 bits where columns are neighbours."""
    first = tl.cast(t, tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    mask = (lane < tl.minimum(K - first, BLOCK_N).to(tl.int32))[None, :]
    if isinstance(stride_col, tl.constexpr):
        return first, lane[None, :], mask
    else:
        return first, (lane.to(tl.int64) * stride_col)[None, :], mask


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_index", "N"])
def row_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    seed_low, seed_high, first_index, N, K, row_bytes, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, LIMIT: tl.constexpr, PARTIAL: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row, which is one group, a program: read once for the scale and again, from the cache, for the codes."""
    ELEM: tl.constexpr = FMT.element
    tile.begin()
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // N) * stride_batch + (row % N) * stride_row
    index = row + tl.zeros([1], tl.int64)
    row_mask = index >= 0
    high = tl.zeros([1, BLOCK_N], scales.key_type(FMT))
    low = tl.zeros([1, BLOCK_N], tl.uint32)
    for t in range(tl.cdiv(K, BLOCK_N)):
        first, offsets, mask = _step(t, K, stride_col, BLOCK_N)
        x = tile.to_float32(tl.load(x_ptr + first * stride_col + offsets, mask, other=0.0))
        signed, unsigned = scales.keys(x, FMT)
        high = tl.maximum(high, signed)
        if FMT.scale.signed_range:
            low = tl.maximum(low, unsigned)
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    stored, factor, zero, bad = scales.choose(tl.max(high, 1), tl.max(low, 1), tensor_scale, FMT)
    if MODE == "quantize":
        tl.store(scale_ptr + index, stored.to(scale_ptr.dtype.element_ty))
        if FMT.zero_point:
            tl.store(zero_ptr + index, zero.to(tl.uint8))
    shift, divisor, inverse, below, correction = scales.reciprocal(factor, False, FMT)
    finite, factor = ~bad[:, None], factor[:, None]
    if FMT.zero_point:
        zero = zero[:, None]
    else:
        zero = ELEM.zero_code
    for t in range(tl.cdiv(K, BLOCK_N)):
        first, offsets, mask = _step(t, K, stride_col, BLOCK_N)
        x = tile.to_float32(tl.load(x_ptr + first * stride_col + offsets, mask, other=0.0))
        x = scales.quotient(
            x, shift[:, None], divisor[:, None], inverse[:, None], below[:, None], correction[:, None], False, FMT
        )
        if ROUNDING != 0:
            fourth = first + tl.arange(0, BLOCK_N // 4) * 4
            u = philox.uniform(seed_low, seed_high, first_index + index * K, fourth, ROUNDING)
            x = ELEM.codec.stochastic(x, u, zero, ELEM)
        if MODE == "qdq":
            y = tile.saturate(ELEM.codec.round(x, zero, ELEM) * tl.where(finite, factor, float("nan")), LIMIT)
            lane = tl.arange(0, BLOCK_N)[None, :]
            tl.store(q_ptr + row * K + first + lane, y.to(q_ptr.dtype.element_ty), mask)
        else:
            codes = ELEM.codec.encode(x, zero, finite, ELEM)
            if PARTIAL:
                codes = tl.where(mask, codes, 0)
            BYTES: tl.constexpr = BLOCK_N * FMT.bits // 8
            tile.store_codes(q_ptr, index * row_bytes, row_mask, row_bytes, t * BYTES, codes, 1, 1, 0, WORDS, FMT)


@triton.jit
def _lost(x, factor):
    """What a scale that was passed in, and says nothing about x, leaves to be NaN in element types that have one."""
    return (x - x != 0.0) & (factor == factor)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_index", "N", "tiles_m"])
def apply_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    seed_low, seed_high, first_index, N, K, row_bytes, tiles_m, tiles_n, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, LIMIT: tl.constexpr, PARTIAL: tl.constexpr,
    AXES: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Codes ("quantize") or values ("qdq") for scales and zero points that are given. OWN: they are what `choose` found
    for x, so that one reciprocal can serve a whole row."""
    ELEM: tl.constexpr = FMT.element
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_n * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    row_mask = row < N
    mask = row_mask[:, None] & (col < K)[None, :]
    offsets = row[:, None] * stride_row + col[None, :] * stride_col
    x = tile.to_float32(tl.load(x_ptr + batch * stride_batch + offsets, mask, other=0.0))
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    factor, zero = tile.load_factors(scale_ptr, zero_ptr, tensor_scale, batch, row, row_mask, first, N, K, BLOCK_N, FMT)
    if OWN and FMT.group[1] == -1:
        finite = factor == factor
        shift, divisor, inverse, below, correction = scales.reciprocal(tl.where(finite, factor, 1.0), False, FMT)
        scaled = scales.quotient(x, shift, divisor, inverse, below, correction, False, FMT)
    else:
        finite = None
        scaled = scales.divide(x, factor)
    if ROUNDING != 0:
        fourth = first + tl.arange(0, BLOCK_N // 4) * 4
        u = philox.uniform(seed_low, seed_high, first_index + (batch * N + row) * K, fourth, ROUNDING)
        scaled = ELEM.codec.stochastic(scaled, u, zero, ELEM)
    if MODE == "qdq":
        y = tile.saturate(ELEM.codec.round(scaled, zero, ELEM) * factor, LIMIT)
        if ELEM.nan_code >= 0 and not OWN:
            y = tl.where(_lost(x, factor), float("nan"), y)
        offsets = (batch * N + row)[:, None] * K + col[None, :]
        tl.store(q_ptr + offsets, y.to(q_ptr.dtype.element_ty), mask)
    else:
        codes = ELEM.codec.encode(scaled, zero, finite, ELEM)
        if ELEM.nan_code >= 0 and not OWN:
            codes = tl.where(_lost(x, factor), ELEM.nan_code, codes)
        if PARTIAL:
            codes = tl.where(mask, codes, 0)
        BYTES: tl.constexpr = BLOCK_N * FMT.bits // 8
        row_start = (batch * N + row) * row_bytes
        tile.store_codes(q_ptr, row_start, row_mask, row_bytes, tile_n * BYTES, codes, 1, 1, 0, WORDS, FMT)
