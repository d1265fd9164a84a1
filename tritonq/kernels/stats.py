"""Scales of groups larger than a tile: maximal keys by atomic maximum (order-free, so deterministic), then the choice,
which for a single group the last program makes."""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.kernels import tile


@triton.jit
def _store_choice(high, low, index, mask, scale_ptr, zero_ptr, tensor_scale_ptr, FMT: tl.constexpr):
    """Scales and zero points of groups with these maximal keys."""
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    high, low = high.to(scales.key_type(FMT), bitcast=True), low.to(tl.uint32, bitcast=True)
    stored, _, zero, _ = scales.choose(high, low, tensor_scale, FMT)
    tl.store(scale_ptr + index, stored.to(scale_ptr.dtype.element_ty), mask)
    if FMT.zero_point:
        tl.store(zero_ptr + index, zero.to(tl.uint8), mask)


@triton.jit
def _tensor_scale(high, low, FMT: tl.constexpr):
    """G = scale.max * element.max / amax, 1 where amax is 0, at most the largest fp32 number."""
    positive, negative = scales.magnitudes(
        high.to(scales.key_type(FMT), bitcast=True), low.to(tl.uint32, bitcast=True), FMT
    )
    amax = tl.maximum(positive, negative).to(tl.float32, bitcast=True)
    PRODUCT: tl.constexpr = FMT.scale.max * FMT.element.max
    scale = tl.minimum(tl.div_rn(amax * 0.0 + PRODUCT, amax), 3.4028234663852886e38)
    return tl.where(amax > 0.0, scale, 1.0)


@triton.jit(do_not_specialize=["N", "rows", "all_rows", "groups_per_column", "groups_per_row", "splits"])
def keys_kernel(
    x_ptr, keys_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    N, K, rows, cols, all_rows, groups_per_column, groups_per_row, splits, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, FINITE: tl.constexpr, FLAT: tl.constexpr, LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """keys [groups, 2] (int32, zero-filled) of groups of rows x cols elements; `splits` programs share a group.

    all_rows is N, or batch * N where one group spans the tensor. FINITE leaves non-finite elements out (tensor scales).
    FLAT: there is one row, and one group.
    LAST: nothing is to be added to the keys of the one group; the last program to end, by the counter that follows
    them, stores its scale and zero point, or with FINITE the tensor scale.
    """
    tile.begin()
    pid = tl.program_id(0).to(tl.int64)
    group, split = pid // splits, pid % splits
    group_col = group % groups_per_row
    group_row = group // groups_per_row  # over batch and rows of groups
    batch, first_row = group_row // groups_per_column, (group_row % groups_per_column) * rows
    last_row = tl.minimum(first_row + rows, all_rows)
    first_col = group_col * cols
    last_col = tl.minimum(first_col + cols, K)
    tiles_n = tl.cdiv(last_col - first_col, BLOCK_N)
    tiles = tl.cdiv(last_row - first_row, BLOCK_M) * tiles_n
    high = tl.zeros([BLOCK_M, BLOCK_N], scales.key_type(FMT))
    low = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
    for t in range(split, tiles, splits):
        if FLAT:
            col = t * BLOCK_N + tl.arange(0, BLOCK_N)
            row_offset = tl.zeros([BLOCK_M], tl.int64)
            mask = (tl.arange(0, BLOCK_M) < 1)[:, None] & (col < K)[None, :]
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
    high_ptr = (keys_ptr + 2 * group).to(tl.pointer_type(scales.key_type(FMT)))
    tl.atomic_max(high_ptr, tl.max(tl.max(high, 1), 0))
    if FMT.scale.signed_range:
        tl.atomic_max((keys_ptr + 2 * group + 1).to(tl.pointer_type(tl.uint32)), tl.max(tl.max(low, 1), 0))
    if LAST:
        if tl.atomic_add(keys_ptr + 2, 1) == tl.num_programs(0) - 1:
            index = tl.arange(0, 1)
            signed_key, unsigned_key = tl.load(keys_ptr + index), tl.load(keys_ptr + 1 + index)
            if FINITE:
                tl.store(scale_ptr + index, _tensor_scale(signed_key, unsigned_key, FMT))
            else:
                _store_choice(signed_key, unsigned_key, index, index == 0, scale_ptr, zero_ptr, tensor_scale_ptr, FMT)


@triton.jit(do_not_specialize=["groups"])
def choose_kernel(keys_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, groups, FMT: tl.constexpr, BLOCK: tl.constexpr):
    """keys [groups, 2] to scales and zero points."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < groups
    high = tl.load(keys_ptr + 2 * index, mask, other=0)
    low = tl.load(keys_ptr + 2 * index + 1, mask, other=0)
    _store_choice(high, low, index, mask, scale_ptr, zero_ptr, tensor_scale_ptr, FMT)
