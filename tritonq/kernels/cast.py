"""y = x rounded to numbers of a minifloat: half to even, saturating, NaN kept; x and y of one type and any strides."""

import triton
import triton.language as tl

from tritonq.kernels import tile


@triton.jit
def to_odd(x):
    """fp32 of any floating type, in which a minifloat rounds as x itself would: fp64 is rounded towards zero, and its
    last bit set where that was inexact (Boldo, Melquiond 2008)."""
    y = x.to(tl.float32)
    if x.dtype == tl.float64:
        back, bits = y.to(tl.float64), y.to(tl.int32, bitcast=True)
        bits = (bits - (tl.abs(back) > tl.abs(x)).to(tl.int32)) | (back != x).to(tl.int32)
        y = bits.to(tl.float32, bitcast=True)
    return y


@triton.jit(do_not_specialize=["N", "tiles_m"])
def cast_kernel(
    x_ptr, y_ptr, N, K, tiles_m, tiles_n,
    stride_batch, stride_row, stride_col, y_stride_batch, y_stride_row, y_stride_col,
    ELEM: tl.constexpr, LIMIT: tl.constexpr, AXES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x [batch, N, K] to y; LIMIT is the largest number of their type."""
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < N) & (col < K)
    x = to_odd(tl.load(x_ptr + batch * stride_batch + row * stride_row + col * stride_col, mask, other=0.0))
    y = ELEM.codec.round(x, ELEM.zero_code, ELEM)
    if ELEM.max > LIMIT:
        y = tile.saturate(y, LIMIT)
    y = tl.where(x == x, y, x)
    offsets = batch * y_stride_batch + row * y_stride_row + col * y_stride_col
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)
