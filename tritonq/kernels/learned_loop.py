"""`learned_kernel` for groups larger than its tiles: rows, large blocks, the whole tensor.

`learned_loop_kernel` goes over a group twice, for its extremes and for everything else. Where a group is SPLIT among
several programs, its extremes are there before (`kernels.stats`, keys [groups, 2]), and programs leave sums [groups,
splits, 2], which `learned_finish_kernel` adds up in their order.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.kernels import learned, tile
from tritonq.kernels import quantize as groups


@triton.jit
def _choose(
    positive, negative, high_ptr, low_ptr, index, mask, tensor_scale,
    GIVEN: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """(ratios, factor, zero point, whether that is free, whether the group is not finite)."""
    high, low = tl.full(index.shape, 1.0, tl.float32), tl.full(index.shape, 1.0, tl.float32)
    free = mask
    if GIVEN:
        factor, zero, free = learned.load_given(high_ptr, low_ptr, index, mask, tensor_scale, FMT)
        bad = index < 0
    else:
        if HAS_HIGH:
            high = tl.load(high_ptr + index, mask, other=1.0).to(tl.float32)
        if HAS_LOW:
            low = tl.load(low_ptr + index, mask, other=1.0).to(tl.float32)
        above, below = learned.scaled(positive, negative, high, low, HAS_HIGH, HAS_LOW)
        high_key, low_key = learned.as_keys(above, below, FMT)
        _, factor, zero, bad = scales.choose(high_key, low_key, tensor_scale, FMT)
    return high, low, factor, zero, free, bad


@triton.jit
def load_keys(keys_ptr, index, mask):
    """Bits of max(x, 0) and max(-x, 0)."""
    high = tl.load(keys_ptr + 2 * index, mask, other=0)
    low = tl.load(keys_ptr + 2 * index + 1, mask, other=0).to(tl.uint32, bitcast=True)
    return learned.magnitudes(high, low)


@triton.jit
def _tile_at(
    t, first_row, last_row, first_col, last_col, tiles_n, FLAT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(rows, columns, mask) of tile t of a group; FLAT: it is part of one row."""
    if FLAT:
        row = first_row + tl.zeros([BLOCK_M], tl.int64)
        col = first_col + t * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (tl.arange(0, BLOCK_M) < 1)[:, None] & (col < last_col)[None, :]
    else:
        row = first_row + (t // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = first_col + (t % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (row < last_row)[:, None] & (col < last_col)[None, :]
    return row, col, mask


@triton.jit
def _at(row, col, batch, N, stride_batch, stride_row, stride_col, FLAT: tl.constexpr):
    if FLAT:
        start = batch * stride_batch + row * stride_row
    else:
        start = (batch + row // N) * stride_batch + (row % N) * stride_row
    return start[:, None] + col[None, :] * stride_col


@triton.jit(do_not_specialize=["N", "rows", "all_rows", "groups_per_column", "splits"])
def learned_loop_kernel(
    x_ptr, v_ptr, dy_ptr, out_ptr, dv_ptr, high_ptr, low_ptr, d_high_ptr, d_low_ptr, tensor_scale_ptr, rates_ptr,
    keys_ptr, sums_ptr,
    N, K, rows, cols, all_rows, groups_per_column, groups_per_row, splits,
    x_batch, x_row, x_col, v_batch, v_row, v_col, dy_batch, dy_row, dy_col,
    FMT: tl.constexpr, MODE: tl.constexpr, LIMIT: tl.constexpr, GIVEN: tl.constexpr,
    HAS_V: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr, WANT_X: tl.constexpr, WANT_V: tl.constexpr,
    WANT_HIGH: tl.constexpr, WANT_LOW: tl.constexpr, FACTOR: tl.constexpr, V_LOWEST: tl.constexpr,
    V_HIGHEST: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, SPLIT: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A group, or one of the `splits` of it, a program. Geometry as in `stats.keys_kernel`."""
    ELEM: tl.constexpr = FMT.element
    pid = tl.program_id(0).to(tl.int64)
    group, split = pid // splits, pid % splits
    group_col = group % groups_per_row
    group_row = group // groups_per_row
    batch, first_row = group_row // groups_per_column, (group_row % groups_per_column) * rows
    last_row = tl.minimum(first_row + rows, all_rows)
    first_col = group_col * cols
    last_col = tl.minimum(first_col + cols, K)
    tiles_n = tl.cdiv(last_col - first_col, BLOCK_N)
    tiles = tl.cdiv(last_row - first_row, BLOCK_M) * tiles_n
    if FLAT:
        tiles = tiles_n
    index = group + tl.zeros([1], tl.int64)
    mask_one = index >= 0

    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    positive, negative = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    if GIVEN:
        pass
    elif SPLIT:
        positive, negative = load_keys(keys_ptr, index, mask_one)
    else:
        high_key = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        low_key = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
        for t in range(tiles):
            row, col, mask = _tile_at(t, first_row, last_row, first_col, last_col, tiles_n, FLAT, BLOCK_M, BLOCK_N)
            at = _at(row, col, batch, N, x_batch, x_row, x_col, FLAT)
            bits = tile.to_float32(tl.load(x_ptr + at, mask, other=0.0)).to(tl.int32, bitcast=True)
            high_key = tl.maximum(high_key, bits)
            low_key = tl.maximum(low_key, bits.to(tl.uint32, bitcast=True))
        high_key = tl.max(tl.max(high_key, 1), 0) + tl.zeros([1], tl.int32)
        low_key = tl.max(tl.max(low_key, 1), 0) + tl.zeros([1], tl.uint32)
        positive, negative = learned.magnitudes(high_key, low_key)
    high, low, factor, zero, free, bad = _choose(
        positive, negative, high_ptr, low_ptr, index, mask_one, tensor_scale, GIVEN, HAS_HIGH, HAS_LOW, FMT
    )
    shift, divisor, inverse, below, correction = scales.reciprocal(factor, False, FMT)
    marked = tl.where(bad, float("nan"), factor)[:, None]
    usable = tl.where(bad, 0.0, factor)[:, None]
    if FMT.zero_point:
        zero = zero[:, None]
    else:
        zero = FMT.zero_code
    v_rate, rate = 0.0, 0.0
    if MODE == "step":
        v_rate, rate = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    outside = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(split, tiles, splits):
        row, col, mask = _tile_at(t, first_row, last_row, first_col, last_col, tiles_n, FLAT, BLOCK_M, BLOCK_N)
        at = _at(row, col, batch, N, x_batch, x_row, x_col, FLAT)
        x = tile.to_float32(tl.load(x_ptr + at, mask, other=0.0))
        v, v_at = 0.0, 0
        if HAS_V:
            v_at = _at(row, col, batch, N, v_batch, v_row, v_col, FLAT)
            v = tile.to_float32(tl.load(v_ptr + v_at, mask, other=0.0))
        if GIVEN:
            quotient = scales.divide(x, tl.broadcast_to(factor[:, None], x.shape))
        else:
            quotient = scales.quotient(
                x, shift[:, None], divisor[:, None], inverse[:, None], below[:, None], correction[:, None], False, FMT
            )
        sign = learned.sign_of(quotient, x, factor[:, None], GIVEN, FMT)
        u, value = learned.element(quotient, v, zero, sign, HAS_V, FMT)
        out_at = (batch * N + row)[:, None] * K + col[None, :]
        if MODE == "qdq":
            y = tile.saturate(value * marked, LIMIT)
            if GIVEN and ELEM.nan_code >= 0:
                y = tl.where(groups._lost(x, factor[:, None]), float("nan"), y)
            tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask)
        else:
            dy_at = _at(row, col, batch, N, dy_batch, dy_row, dy_col, FLAT)
            given_dy = tl.load(dy_ptr + dy_at, mask, other=0.0)
            dy = tile.to_float32(given_dy)
            kept = learned.inside(u, zero, ELEM)
            if WANT_X:
                dx = tl.where(kept | bad[:, None], given_dy, 0.0)
                tl.store(out_ptr + out_at, dx.to(out_ptr.dtype.element_ty), mask)
            if WANT_V:
                dv = tl.where(kept, dy * usable, 0.0)
                learned.store_gradient(
                    dv_ptr, out_at, v_ptr, v_at, mask, dv, v, v_rate, MODE == "step", V_LOWEST, V_HIGHEST
                )
            if WANT_HIGH or WANT_LOW:
                total += dy * tl.where(kept, value - quotient, value)
                if FMT.scale.rule == "minmax":
                    outside += tl.where(kept, 0.0, dy)
    if MODE != "qdq":
        if WANT_HIGH or WANT_LOW:
            summed = tl.sum(tl.sum(total, 1), 0) + tl.zeros([1], tl.float32)
            clipped = tl.sum(tl.sum(outside, 1), 0) + tl.zeros([1], tl.float32)
            if SPLIT:
                place = pid + tl.zeros([1], tl.int64)
                tl.store(sums_ptr + 2 * place, summed)
                tl.store(sums_ptr + 2 * place + 1, clipped)
            else:
                learned.finish(
                    summed, clipped, positive, negative, high, low, factor, free, bad, tensor_scale, rate,
                    high_ptr, low_ptr, d_high_ptr, d_low_ptr, index, mask_one,
                    FMT, MODE == "step", GIVEN, HAS_HIGH, HAS_LOW, WANT_HIGH, WANT_LOW, FACTOR, LOWEST, HIGHEST,
                )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def learned_finish_kernel(
    high_ptr, low_ptr, d_high_ptr, d_low_ptr, tensor_scale_ptr, rates_ptr, keys_ptr, sums_ptr, splits,
    FMT: tl.constexpr, MODE: tl.constexpr, GIVEN: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr,
    WANT_HIGH: tl.constexpr, WANT_LOW: tl.constexpr, FACTOR: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of high and low, a group a program, from sums [groups, splits, 2]."""
    group = tl.program_id(0).to(tl.int64)
    index = group + tl.zeros([1], tl.int64)
    mask = index >= 0
    lane = tl.arange(0, LANES)
    total, outside = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for i in range(0, splits, LANES):
        at = sums_ptr + 2 * (group * splits + i + lane)
        total += tl.load(at, i + lane < splits, other=0.0)
        outside += tl.load(at + 1, i + lane < splits, other=0.0)
    total, outside = tl.sum(total, 0) + tl.zeros([1], tl.float32), tl.sum(outside, 0) + tl.zeros([1], tl.float32)
    tensor_scale, rate = 1.0, 0.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    if MODE == "step":
        rate = tl.load(rates_ptr + 1)
    positive, negative = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    if not GIVEN:
        positive, negative = load_keys(keys_ptr, index, mask)
    high, low, factor, _, free, bad = _choose(
        positive, negative, high_ptr, low_ptr, index, mask, tensor_scale, GIVEN, HAS_HIGH, HAS_LOW, FMT
    )
    learned.finish(
        total, outside, positive, negative, high, low, factor, free, bad, tensor_scale, rate,
        high_ptr, low_ptr, d_high_ptr, d_low_ptr, index, mask,
        FMT, MODE == "step", GIVEN, HAS_HIGH, HAS_LOW, WANT_HIGH, WANT_LOW, FACTOR, LOWEST, HIGHEST,
    )  # fmt: skip
