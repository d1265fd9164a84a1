"""Formats with super-groups: scales that are integers times an f16 super-scale; `codecs/scale.py` has the formulas.

A tile holds whole super-groups: M rows of GROUPS groups each. Quantize and QDQ reduce elements to groups and groups to
super-groups in registers, so they read their input once.

x, y [batch, N, K]; scale and group_minimum [batch, N, ceil(K / g)] bytes; super_scale and super_minimum
[batch, N, ceil(K / super_group)] bits of f16. Formats without minima get any pointers for theirs.
"""

import triton
import triton.language as tl

from tritonq.codecs import philox_triton as philox
from tritonq.codecs import scale_triton as scales
from tritonq.codecs import super_scale_triton as supers
from tritonq.kernels import tile


@triton.jit
def _max_per_group(keys, S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr):
    """[S * M, GROUPS * W] to [M, GROUPS]."""
    if S > 1:
        return tl.max(tl.max(keys.reshape([S, M, GROUPS, W]), 0), 2)
    else:
        return tl.max(keys.reshape([M, GROUPS, W]), 2)


@triton.jit
def _spread(per_group, S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr):
    """[M, GROUPS] to [S * M, GROUPS * W]."""
    return tl.broadcast_to(per_group[None, :, :, None], [S, M, GROUPS, W]).reshape([S * M, GROUPS * W])


@triton.jit
def _quotient(x, factor, S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, FMT: tl.constexpr):
    """x / factor of its group. Factors lie between 2^-24 and 2^24, which is MODERATE for `scale_triton.quotient`."""
    _, divisor, inverse, below, correction = scales.reciprocal(factor, True, FMT)
    return scales.quotient(
        x,
        1.0,
        _spread(divisor, S, M, GROUPS, W),
        _spread(inverse, S, M, GROUPS, W),
        _spread(below, S, M, GROUPS, W),
        _spread(correction, S, M, GROUPS, W),
        True,
        FMT,
    )


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_index", "N", "tiles_m"])
def super_group_kernel(
    x_ptr, q_ptr, scale_ptr, super_scale_ptr, minimum_ptr, super_minimum_ptr,
    seed_low, seed_high, first_index, N, K, row_bytes, tiles_m, tiles_n, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, LIMIT: tl.constexpr, PARTIAL: tl.constexpr,
    AXES: tl.constexpr, WORDS: tl.constexpr, S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """MODE "quantize" writes codes to q_ptr, and scales; "qdq" values to q_ptr and no scales; "scale" only scales.

    The S slices of a group, W elements each, lie above each other in the tile as in `group_kernel`; more than one only
    where groups fill rows exactly. PARTIAL: a row's last byte is not full, so codes beyond the row have to be 0.
    ROUNDING as in `quantize`.
    """
    ELEM: tl.constexpr = FMT.element
    ZERO: tl.constexpr = FMT.zero_code
    C: tl.constexpr = S * W
    SUPERS: tl.constexpr = GROUPS * C // FMT.super_group
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    r = tl.arange(0, S * M)
    row = tile_m * M + r % M
    slice_col = ((r // M) * W).to(tl.int64)
    c = tl.arange(0, GROUPS * W)
    col = tile_n * (GROUPS * C) + (c // W) * C + c % W
    row_mask = row < N
    mask = row_mask[:, None] & (col < K)[None, :]
    offsets = (row * stride_row + slice_col * stride_col)[:, None] + col[None, :] * stride_col
    x = tile.to_float32(tl.load(x_ptr + batch * stride_batch + offsets, mask, other=0.0))

    high, low = scales.keys(x, FMT)
    high = _max_per_group(high, S, M, GROUPS, W)
    if FMT.scale.signed_range:
        low = _max_per_group(low, S, M, GROUPS, W)
    scale, minimum, super_scale, super_minimum, factor, offset, bad = supers.choose(high, low, M, SUPERS, GROUPS, FMT)

    if MODE != "qdq":
        scale_row = tile_m * M + tl.arange(0, M)
        in_row = (K + C - 1) // C
        group = tile_n * GROUPS + tl.arange(0, GROUPS)
        group_mask = (scale_row < N)[:, None] & (group < in_row)[None, :]
        index = (batch * N + scale_row)[:, None] * in_row + group[None, :]
        tl.store(scale_ptr + index, scale.to(tl.int32).to(scale_ptr.dtype.element_ty), group_mask)
        in_row = (K + FMT.super_group - 1) // FMT.super_group
        super_group = tile_n * SUPERS + tl.arange(0, SUPERS)
        super_mask = (scale_row < N)[:, None] & (super_group < in_row)[None, :]
        super_index = (batch * N + scale_row)[:, None] * in_row + super_group[None, :]
        tl.store(super_scale_ptr + super_index, super_scale.to(super_scale_ptr.dtype.element_ty), super_mask)
        if FMT.minimum:
            tl.store(minimum_ptr + index, minimum.to(tl.int32).to(minimum_ptr.dtype.element_ty), group_mask)
            tl.store(super_minimum_ptr + super_index, super_minimum.to(super_minimum_ptr.dtype.element_ty), super_mask)
    if MODE != "scale":
        if FMT.minimum:
            offset = _spread(offset, S, M, GROUPS, W)
            x = x + offset
        x = _quotient(x, factor, S, M, GROUPS, W, FMT)
        if ROUNDING != 0:
            starts = first_index + (batch * N + row) * K + slice_col
            quarter = tl.arange(0, GROUPS * W // 4) * 4
            fourth = tile_n * (GROUPS * C) + (quarter // W) * C + quarter % W
            x = ELEM.codec.stochastic(x, philox.uniform(seed_low, seed_high, starts, fourth, ROUNDING), ZERO, ELEM)
        if MODE == "qdq":
            y = ELEM.codec.round(x, ZERO, ELEM) * _spread(tl.where(bad, float("nan"), factor), S, M, GROUPS, W)
            if FMT.minimum:
                y = y - offset
            offsets = ((batch * N + row) * K + slice_col)[:, None] + col[None, :]
            tl.store(q_ptr + offsets, tile.saturate(y, LIMIT).to(q_ptr.dtype.element_ty), mask)
        else:
            codes = ELEM.codec.encode(x, ZERO, _spread(~bad, S, M, GROUPS, W), ELEM)
            if PARTIAL:
                codes = tl.where(mask, codes, 0)
            BYTES: tl.constexpr = GROUPS * C * FMT.bits // 8
            row = tile_m * M + tl.arange(0, M)
            row_start = (batch * N + row) * row_bytes
            tile.store_codes(q_ptr, row_start, row < N, row_bytes, tile_n * BYTES, codes, S, GROUPS, 0, WORDS, FMT)


@triton.jit(do_not_specialize=["N", "tiles_m"])
def super_dequantize_kernel(
    q_ptr, scale_ptr, super_scale_ptr, minimum_ptr, super_minimum_ptr, y_ptr,
    N, K, row_bytes, tiles_m, tiles_n,
    FMT: tl.constexpr, LIMIT: tl.constexpr, AXES: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y from packed codes; everything contiguous. A tile holds whole groups, or part of one."""
    ELEM: tl.constexpr = FMT.element
    W: tl.constexpr = FMT.group[1]
    PER_SUPER: tl.constexpr = FMT.super_group // W
    GROUPS: tl.constexpr = BLOCK_N // W if BLOCK_N > W else 1
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_n * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    row_mask = row < N
    BYTES: tl.constexpr = BLOCK_N * FMT.bits // 8
    codes = tile.load_codes(q_ptr, batch * N + row, row_mask, row_bytes, tile_n * BYTES, BLOCK_N, WORDS, FMT)

    in_row = (K + W - 1) // W
    supers_in_row = (K + FMT.super_group - 1) // FMT.super_group
    group = first // W + tl.arange(0, GROUPS)
    mask = row_mask[:, None] & (group < in_row)[None, :]
    index = (batch * N + row)[:, None] * in_row + group[None, :]
    super_index = (batch * N + row)[:, None] * supers_in_row + (group // PER_SUPER)[None, :]
    super_scale = tl.load(super_scale_ptr + super_index, mask, other=0)
    factor = supers.load(tl.load(scale_ptr + index, mask, other=0), super_scale, FMT)
    y = ELEM.codec.decode(codes, FMT.zero_code, ELEM) * _spread(factor, 1, BLOCK_M, GROUPS, BLOCK_N // GROUPS)
    if FMT.minimum:
        super_minimum = tl.load(super_minimum_ptr + super_index, mask, other=0)
        offset = supers.load(tl.load(minimum_ptr + index, mask, other=0), super_minimum, FMT)
        y = y - _spread(offset, 1, BLOCK_M, GROUPS, BLOCK_N // GROUPS)
    offsets = (batch * N + row)[:, None] * K + col[None, :]
    mask = row_mask[:, None] & (col < K)[None, :]
    tl.store(y_ptr + offsets, tile.saturate(y, LIMIT).to(y_ptr.dtype.element_ty), mask)
