"""y = H (s * x) / 4 over blocks of 16 elements, and its inverse x = s * (H y) / 4; see `tritonq.rotation`."""

import triton
import triton.language as tl

from tritonq.kernels import tile


@triton.jit
def butterflies(x, BLOCKS: tl.constexpr):
    """H x of blocks [BLOCKS, 16], fp32. Each stage takes the lowest bit of the index and puts it on top, so that after
    four of them, h = 1, 2, 4, 8, every bit is in its place again."""
    for _ in tl.static_range(4):
        a, b = tl.split(x.reshape([BLOCKS, 8, 2]))
        x = tl.permute(tl.join(a + b, a - b), 0, 2, 1).reshape([BLOCKS, 16])
    return x


@triton.jit(do_not_specialize=["N", "blocks", "per_row", "signs"])
def hadamard_kernel(
    x_ptr, y_ptr, N, blocks, per_row, signs, stride_batch, stride_row, stride_col,
    INVERSE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of x [batch, N, 16 * per_row] to contiguous y; bit i of `signs` is set where sign i is -1.

    The tile is read as the first halves of all blocks and then the second ones, which gives a thread whole blocks.
    """
    position = tl.arange(0, 2 * BLOCKS)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + position % BLOCKS
    within = (position // BLOCKS * 8)[:, None] + tl.arange(0, 8)[None, :]
    mask = (block < blocks)[:, None]
    row = block // per_row
    start = (row // N) * stride_batch + (row % N) * stride_row + (block % per_row) * 16 * stride_col
    x = tile.to_float32(tl.load(x_ptr + start[:, None] + within.to(tl.int64) * stride_col, mask, other=0.0))
    sign = tl.where((signs >> within) & 1 != 0, -1.0, 1.0)
    if not INVERSE:
        x = x * sign
    x = tl.permute(x.reshape([2, BLOCKS, 8]), 1, 0, 2).reshape([BLOCKS, 16])
    x = butterflies(x, BLOCKS)
    y = tl.permute(x.reshape([BLOCKS, 2, 8]), 1, 0, 2).reshape([2 * BLOCKS, 8]) * 0.25
    if INVERSE:
        y = y * sign
    tl.store(y_ptr + (block * 16)[:, None] + within, y.to(y_ptr.dtype.element_ty), mask)
