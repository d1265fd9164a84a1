"""Row-wise and column-wise quantization of one read: the parts of x [N, K] and those of its transpose [K, N].

Groups are (1, g): g elements of a row of x for the one, g elements of a column of x for the other; or squares (r, r),
which have the same scales and codes both ways. A tile holds whole groups in both directions, each padded to W, a power
of two.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.kernels import tile
from tritonq.kernels.quantize import _max_per_group, _quotient, _spread


@triton.jit
def _position(tiles_m, tiles_n, BAND: tl.constexpr):
    """As `tile.position`, but column by column in bands of BAND rows of tiles: neighbours in both directions are then
    written at about the same time, and sectors that hold scales of several tiles are whole before they leave the
    cache."""
    pid = tl.program_id(0)
    tiles, band = tiles_m * tiles_n, tl.minimum(tiles_m, BAND)
    batch, pid = pid // tiles, pid % tiles
    first = pid // (band * tiles_n) * band
    pid = pid % (band * tiles_n)
    height = tl.minimum(tiles_m - first, band)
    return batch.to(tl.int64), (first + pid % height).to(tl.int64), (pid // height).to(tl.int64)


@triton.jit
def _axis(position, first_tile, size, EXTENT: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr):
    """Where the positions of a tile of EXTENT lie along an axis of `size` elements, and whether anything is there."""
    if GROUP == W:
        index = first_tile * EXTENT + position
        return index, index < size
    else:
        index = first_tile * (EXTENT // W * GROUP) + (position // W) * GROUP + position % W
        return index, (index < size) & (position % W < GROUP)


@triton.jit
def _choose(x, tensor_scale, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
            FMT: tl.constexpr):  # fmt: skip
    """Scales [M, GROUPS] of a tile [M * R, GROUPS * W], as `scales.choose` returns them."""
    high, low = scales.keys(x, FMT)
    high = _max_per_group(high, 1, M, R, GROUPS, W)
    if FMT.scale.signed_range:
        low = _max_per_group(low, 1, M, R, GROUPS, W)
    return scales.choose(high, low, tensor_scale, FMT)


@triton.jit
def _encode(x, factor, zero, bad, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
            W: tl.constexpr, FMT: tl.constexpr):  # fmt: skip
    """Codes of a tile [M * R, GROUPS * W] under the scales that `_choose` returned."""
    ELEM: tl.constexpr = FMT.element
    if FMT.zero_point:
        zero = _spread(zero, 1, M, R, GROUPS, W)
    else:
        zero = ELEM.zero_code
    x = _quotient(x, factor, False, 1, M, R, GROUPS, W, FMT)
    return ELEM.codec.encode(x, zero, _spread(~bad, 1, M, R, GROUPS, W), ELEM)


@triton.jit
def _store(
    q_ptr, scale_ptr, zero_ptr, codes, stored, zero, batch, row, row_mask, group_tile, tile_n, N, K, row_bytes, mask,
    R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """Parts of a tile of a matrix [N, K]; with R > 1 its scales are those of rows of blocks, from `group_tile` on."""
    ROWS: tl.constexpr = FMT.group[0]
    GROUP: tl.constexpr = FMT.group[1]
    in_row, in_col = (K + GROUP - 1) // GROUP, (N + ROWS - 1) // ROWS
    scale_col = tile_n * GROUPS + tl.arange(0, GROUPS)
    if ROWS == 1:
        scale_row, scale_row_mask = row, row_mask
    else:
        scale_row = group_tile * stored.shape[0] + tl.arange(0, stored.shape[0])
        scale_row_mask = scale_row < in_col
    index = (batch * in_col + scale_row)[:, None] * in_row + scale_col[None, :]
    scale_mask = scale_row_mask[:, None] & (scale_col < in_row)[None, :]
    tl.store(scale_ptr + index, stored.to(scale_ptr.dtype.element_ty), scale_mask)
    if FMT.zero_point:
        tl.store(zero_ptr + index, zero.to(tl.uint8), scale_mask)
    if PARTIAL:
        codes = tl.where(mask, codes, 0)
    row_start = (batch * N + row) * row_bytes
    if GROUP == W:
        BYTES: tl.constexpr = GROUPS * W * FMT.bits // 8
        tile.store_codes(q_ptr, row_start, row_mask, row_bytes, tile_n * BYTES, codes, 1, 0, WORDS, FMT)
    else:
        BYTES: tl.constexpr = GROUP * FMT.bits // 8
        first_byte = tile_n * (GROUPS * BYTES)
        tile.store_codes(q_ptr, row_start, row_mask, row_bytes, first_byte, codes, GROUPS, BYTES, WORDS, FMT)


@triton.jit(do_not_specialize=["N", "tiles_m", "tiles_n"])
def both_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, other_q_ptr, other_scale_ptr, other_zero_ptr,
    tensor_scale_ptr, other_tensor_scale_ptr,
    N, K, row_bytes, column_bytes, tiles_m, tiles_n, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, PARTIAL: tl.constexpr, OTHER_PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    OTHER_WORDS: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_N] of x; the parts of the transpose are the `other` ones.

    The rows of the tile are read in an order in which one thread gets RUN neighbouring rows, hence a patch of RUN rows
    and the columns of one load: it then holds neighbouring codes of both results, and works out most of both maxima
    itself. PARTIAL: a row's last byte is not full. The tensor scale is stored again beside the other parts.
    """
    ROWS: tl.constexpr = FMT.group[0]
    GROUP: tl.constexpr = FMT.group[1]
    batch, tile_m, tile_n = _position(tiles_m, tiles_n, BAND)
    position = tl.arange(0, BLOCK_M)
    read, read_mask = _axis((position % (BLOCK_M // RUN)) * RUN + position // (BLOCK_M // RUN), tile_m, N, BLOCK_M,
                            GROUP, W)  # fmt: skip
    row, row_mask = _axis(position, tile_m, N, BLOCK_M, GROUP, W)
    col, col_mask = _axis(tl.arange(0, BLOCK_N), tile_n, K, BLOCK_N, GROUP, W)
    offsets = (batch * stride_batch + read * stride_row)[:, None] + col[None, :] * stride_col
    x = tile.to_float32(tl.load(x_ptr + offsets, read_mask[:, None] & col_mask[None, :], other=0.0))
    x = tl.permute(x.reshape([RUN, BLOCK_M // RUN, BLOCK_N]), 1, 0, 2).reshape([BLOCK_M, BLOCK_N])
    mask = row_mask[:, None] & col_mask[None, :]

    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
        tl.store(other_tensor_scale_ptr, tensor_scale, tl.program_id(0) == 0)
    DOWN: tl.constexpr = BLOCK_M // W
    ACROSS: tl.constexpr = BLOCK_N // W
    SQUARE: tl.constexpr = ROWS == GROUP
    R: tl.constexpr = W if SQUARE else 1
    stored, factor, zero, bad = _choose(x, tensor_scale, BLOCK_M // R, R, ACROSS, W, FMT)
    if not SQUARE:  # here, where the elements alone are alive
        turned = tl.trans(x)
        other_stored, other_factor, other_zero, other_bad = _choose(turned, tensor_scale, BLOCK_N, 1, DOWN, W, FMT)
    codes = _encode(x, factor, zero, bad, BLOCK_M // R, R, ACROSS, W, FMT)
    _store(
        q_ptr, scale_ptr, zero_ptr, codes, stored, zero, batch, row, row_mask, tile_m, tile_n, N, K, row_bytes, mask,
        R, ACROSS, W, PARTIAL, WORDS, FMT,
    )  # fmt: skip
    if SQUARE:
        other_stored, other_zero, other_codes = tl.trans(stored), tl.trans(zero), tl.trans(codes)
    else:
        other_codes = _encode(turned, other_factor, other_zero, other_bad, BLOCK_N, 1, DOWN, W, FMT)
    _store(
        other_q_ptr, other_scale_ptr, other_zero_ptr, other_codes, other_stored, other_zero, batch, col, col_mask,
        tile_n, tile_m, K, N, column_bytes, tl.trans(mask), R, DOWN, W, OTHER_PARTIAL, OTHER_WORDS, FMT,
    )  # fmt: skip
