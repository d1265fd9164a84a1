"""Dequantize: y = (code - zero) * scale, in fp32, rounded once to the output type."""

import triton
import triton.language as tl

from tritonq.kernels import tile


@triton.jit(do_not_specialize=["N", "tiles_m"])
def dequantize_kernel(
    q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, y_ptr,
    N, K, row_bytes, tiles_m, tiles_n,
    FMT: tl.constexpr, LIMIT: tl.constexpr, AXES: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [batch, N, K] from packed codes; everything contiguous."""
    ELEM: tl.constexpr = FMT.element
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_n * BLOCK_N
    col = first + tl.arange(0, BLOCK_N)
    row_mask = row < N
    BYTES: tl.constexpr = BLOCK_N * FMT.bits // 8
    codes = tile.load_codes(q_ptr, batch * N + row, row_mask, row_bytes, tile_n * BYTES, BLOCK_N, WORDS, FMT)
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    factor, zero = tile.load_factors(scale_ptr, zero_ptr, tensor_scale, batch, row, row_mask, first, N, K, BLOCK_N, FMT)
    y = tile.saturate(ELEM.codec.decode(codes, zero, ELEM) * factor, LIMIT)
    offsets = (batch * N + row)[:, None] * K + col[None, :]
    mask = row_mask[:, None] & (col < K)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask)
