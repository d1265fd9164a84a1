"""Packed codes and scales of what `tritonq.kernels.learned` makes of x, v and the ratios of groups.

`learned_quantize_kernel` handles whole groups of a tile. Groups that are larger, or share bytes with their neighbours,
take `learned_choose_kernel` (or mode "scale" of the former) for their scales, and `learned_apply_kernel` for their
codes.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.codecs import super_scale_triton as supers
from tritonq.kernels import learned, learned_loop, tile
from tritonq.kernels import quantize as groups


@triton.jit
def _store(ptr, index, mask, number):
    tl.store(ptr + index, number.to(ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N", "tiles_m"])
def learned_quantize_kernel(
    x_ptr, v_ptr, q_ptr, high_ptr, low_ptr, tensor_scale_ptr,
    scale_ptr, zero_ptr, super_scale_ptr, minimum_ptr, super_minimum_ptr,
    N, K, row_bytes, tiles_m, tiles_n, x_batch, x_row, x_col, v_batch, v_row, v_col,
    FMT: tl.constexpr, MODE: tl.constexpr, HAS_V: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr,
    PARTIAL: tl.constexpr, WORDS: tl.constexpr, AXES: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A tile of M x GROUPS groups a program. MODE "quantize" writes codes and scales, "scale" only scales."""
    ELEM: tl.constexpr = FMT.element
    BOTH: tl.constexpr = FMT.scale.signed_range or HAS_HIGH or HAS_LOW
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row, slice_col, col, mask = learned._place(tile_m, tile_n, N, K, S, M, R, GROUPS, W, FMT)
    at = x_ptr + batch * x_batch + learned._offsets(row, slice_col, col, x_row, x_col)
    x = tile.to_float32(tl.load(at, mask, other=0.0))
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    in_row = 1 if FMT.group[1] == -1 else (K + FMT.group[1] - 1) // FMT.group[1]
    in_col = (N + FMT.group[0] - 1) // FMT.group[0]
    group_row, group_col = tile_m * M + tl.arange(0, M), tile_n * GROUPS + tl.arange(0, GROUPS)
    group_mask = (group_row < in_col)[:, None] & (group_col < in_row)[None, :]
    index = (batch * in_col + group_row)[:, None] * in_row + group_col[None, :]
    high, low = 1.0, 1.0
    if HAS_HIGH:
        high = tl.load(high_ptr + index, group_mask, other=1.0).to(tl.float32)
    if HAS_LOW:
        low = tl.load(low_ptr + index, group_mask, other=1.0).to(tl.float32)
    positive, negative = learned.extremes(x, BOTH, S, M, R, GROUPS, W, FMT)
    positive, negative = learned.scaled(positive, negative, high, low, HAS_HIGH, HAS_LOW)
    high_key, low_key = learned.as_keys(positive, negative, FMT)
    if FMT.super_group:
        SUPERS: tl.constexpr = GROUPS * S * W // FMT.super_group
        scale, minimum, super_scale, super_minimum, factor, offset, bad = supers.choose(
            high_key, low_key, M, SUPERS, GROUPS, FMT
        )
        in_super = (K + FMT.super_group - 1) // FMT.super_group
        super_col = tile_n * SUPERS + tl.arange(0, SUPERS)
        super_mask = (group_row < N)[:, None] & (super_col < in_super)[None, :]
        super_index = (batch * N + group_row)[:, None] * in_super + super_col[None, :]
        _store(scale_ptr, index, group_mask, scale.to(tl.int32))
        _store(super_scale_ptr, super_index, super_mask, super_scale)
        if FMT.minimum:
            _store(minimum_ptr, index, group_mask, minimum.to(tl.int32))
            _store(super_minimum_ptr, super_index, super_mask, super_minimum)
    else:
        stored, factor, zero, bad = scales.choose(high_key, low_key, tensor_scale, FMT)
        _store(scale_ptr, index, group_mask, stored)
        if FMT.zero_point:
            _store(zero_ptr, index, group_mask, zero)
    if MODE == "quantize":
        v = 0.0
        if HAS_V:
            v_at = v_ptr + batch * v_batch + learned._offsets(row, slice_col, col, v_row, v_col)
            v = tile.to_float32(tl.load(v_at, mask, other=0.0))
        if FMT.zero_point:
            zero = groups._spread(zero, S, M, R, GROUPS, W)
        else:
            zero = FMT.zero_code
        if FMT.minimum:
            x = x + groups._spread(offset, S, M, R, GROUPS, W)
        quotient = learned._divided(x, factor, tensor_scale, False, S, M, R, GROUPS, W, FMT)
        sign = learned.sign_of(quotient, x, groups._spread(factor, S, M, R, GROUPS, W), False, FMT)
        u = learned.shifted(quotient, v, sign, HAS_V)
        codes = ELEM.codec.encode(u, zero, groups._spread(~bad, S, M, R, GROUPS, W), ELEM)
        if PARTIAL:
            codes = tl.where(mask, codes, 0)
        if S > 1:
            row = tile_m * M + tl.arange(0, M)
        first_byte = tile_n * (GROUPS * S * W * FMT.bits // 8)
        row_start = (batch * N + row) * row_bytes
        tile.store_codes(q_ptr, row_start, row < N, row_bytes, first_byte, codes, S, GROUPS, 0, WORDS, FMT)


@triton.jit(do_not_specialize=["groups_in_all"])
def learned_choose_kernel(
    keys_ptr, high_ptr, low_ptr, tensor_scale_ptr, scale_ptr, zero_ptr, groups_in_all,
    FMT: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of groups from both of their extremes, keys [groups, 2], and their ratios."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < groups_in_all
    tensor_scale, high, low = 1.0, 1.0, 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    if HAS_HIGH:
        high = tl.load(high_ptr + index, mask, other=1.0).to(tl.float32)
    if HAS_LOW:
        low = tl.load(low_ptr + index, mask, other=1.0).to(tl.float32)
    positive, negative = learned_loop.load_keys(keys_ptr, index, mask)
    positive, negative = learned.scaled(positive, negative, high, low, HAS_HIGH, HAS_LOW)
    high_key, low_key = learned.as_keys(positive, negative, FMT)
    stored, _, zero, _ = scales.choose(high_key, low_key, tensor_scale, FMT)
    _store(scale_ptr, index, mask, stored)
    if FMT.zero_point:
        _store(zero_ptr, index, mask, zero)


@triton.jit(do_not_specialize=["N", "tiles_m"])
def learned_apply_kernel(
    x_ptr, v_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    N, K, row_bytes, tiles_m, tiles_n, x_batch, x_row, x_col, v_batch, v_row, v_col,
    FMT: tl.constexpr, GIVEN: tl.constexpr, HAS_V: tl.constexpr, PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    AXES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Codes for scales and zero points that are there, found with their ratios or GIVEN; `groups.apply_kernel` with
    v."""
    ELEM: tl.constexpr = FMT.element
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < N
    mask = row_mask[:, None] & (col < K)[None, :]
    at = x_ptr + batch * x_batch + row[:, None] * x_row + col[None, :] * x_col
    x = tile.to_float32(tl.load(at, mask, other=0.0))
    v = 0.0
    if HAS_V:
        v_at = v_ptr + batch * v_batch + row[:, None] * v_row + col[None, :] * v_col
        v = tile.to_float32(tl.load(v_at, mask, other=0.0))
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    factor, zero = tile.load_factors(
        scale_ptr, zero_ptr, tensor_scale, batch, row, row_mask, tile_n * BLOCK_N, N, K, BLOCK_N, FMT
    )
    quotient = scales.divide(x, factor)
    u = learned.shifted(quotient, v, learned.sign_of(quotient, x, factor, True, FMT), HAS_V)
    if GIVEN:
        codes = ELEM.codec.encode(u, zero, None, ELEM)
        if ELEM.nan_code >= 0:
            codes = tl.where(groups._lost(x, factor), ELEM.nan_code, codes)
    else:
        codes = ELEM.codec.encode(u, zero, tl.broadcast_to(factor == factor, u.shape), ELEM)
    if PARTIAL:
        codes = tl.where(mask, codes, 0)
    BYTES: tl.constexpr = BLOCK_N * FMT.bits // 8
    row_start = (batch * N + row) * row_bytes
    tile.store_codes(q_ptr, row_start, row_mask, row_bytes, tile_n * BYTES, codes, 1, 1, 0, WORDS, FMT)
