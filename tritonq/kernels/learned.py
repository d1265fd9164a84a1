"""QDQ with tuning parameters, and its gradients: y = s * clamp(rne(x / s + v)), in one pass each.

hi = max(max x, 0) * high and lo = min(min x, 0) * low over a group take the place of its largest and smallest element
in the rule of its scale; `high` and `low` are `max_scale` and `min_scale`. GIVEN: they are the scale and the zero point
instead, used as they are. `tritonq.learned_reference` states the gradients.

x, v, dy [batch, N, K] with strides of their own; `out` (y, or dx) and `dv` contiguous; high, low and their gradients
one a group. MODE "qdq" writes y, "backward" gradients, and "step" moves v, high and low against the signs of gradients
that are never stored: p -= rate * sign(g), clamped; rates are {v, scales}.

`learned_kernel` handles groups that fit a tile; the others are in `tritonq.kernels.learned_loop`.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.codecs import super_scale_triton as supers
from tritonq.kernels import quantize as groups
from tritonq.kernels import super_groups, tile


@triton.constexpr_function
def _range(element):
    """Smallest and largest number that a code stands for; of integers the first and the last code, and their unit."""
    if element.codec.offset_binary:
        return 0.0, float((1 << element.bits) - 1), 2.0**-element.fraction
    if element.values:
        return element.values[0], element.values[-1], 1.0
    return -element.max, element.max, 1.0


@triton.jit
def inside(x, zero, ELEM: tl.constexpr):
    """Whether x lies within the range of the codes before rounding."""
    RANGE: tl.constexpr = _range(ELEM)
    LOW: tl.constexpr = RANGE[0]
    HIGH: tl.constexpr = RANGE[1]
    UNIT: tl.constexpr = RANGE[2]
    if ELEM.codec.offset_binary:
        low = 0.0 - zero
        high = low + HIGH
        low, high = low * UNIT, high * UNIT
    else:
        low, high = LOW, HIGH
    return tl.minimum(tl.maximum(x, low), high) == x


@triton.jit
def magnitudes(high, low):
    """Maximal bits, read as signed and as unsigned, to the bits of max(x, 0) and max(-x, 0)."""
    smallest = tl.maximum(low, 0x80000000) - 0x80000000  # in unsigned numbers, see `scales.magnitudes`
    return tl.maximum(high, 0), smallest.to(tl.int32, bitcast=True)


@triton.jit
def _times(magnitude, ratio):
    """Bits of a number >= 0 times a ratio; a negative product counts as 0."""
    product = magnitude.to(tl.float32, bitcast=True) * ratio
    return tl.where(product < 0.0, 0.0, product).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scaled(positive, negative, high, low, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr):
    """Bits of hi and -lo."""
    if HAS_HIGH:
        positive = _times(positive, high)
    if HAS_LOW:
        negative = _times(negative, low)
    return positive, negative


@triton.jit
def as_keys(positive, negative, FMT: tl.constexpr):
    """The keys of a group with these extremes, for `scales.choose`."""
    if FMT.scale.signed_range:
        return positive, negative.to(tl.uint32, bitcast=True) | 0x80000000
    else:
        key = (tl.maximum(positive, negative) << 1).to(tl.uint32, bitcast=True)
        return key, key


@triton.jit
def load_given(high_ptr, low_ptr, index, mask, tensor_scale, FMT: tl.constexpr):
    """(factor, zero point, whether that moves with what it was rounded from) of scales that are given: as they are
    stored, or as floating-point numbers."""
    stored = tl.load(high_ptr + index, mask, other=1)
    if high_ptr.dtype.element_ty == tl.uint8:
        factor = scales.load(stored, tensor_scale, FMT)
    else:
        factor = stored.to(tl.float32)
        if FMT.tensor_scale:
            factor = tl.div_rn(factor, tl.zeros_like(factor) + tensor_scale)
    zero = tl.zeros_like(factor) + FMT.zero_code
    free = mask
    if FMT.zero_point:
        LEVELS: tl.constexpr = (1 << FMT.bits) - 1
        number = tl.load(low_ptr + index, mask, other=0).to(tl.float32)
        zero = tl.minimum(tl.maximum(number, 0.0), LEVELS)
        free = zero == number
        zero = (zero + 12582912.0) - 12582912.0
    return factor, zero, free


@triton.jit
def sign_of(quotient, x, factor, GIVEN: tl.constexpr, FMT: tl.constexpr):
    """Bits that have the sign of x / factor, also where `quotient` is NaN."""
    if GIVEN:
        return quotient.to(tl.int32, bitcast=True)
    elif FMT.scale.rule == "full_range":
        return x.to(tl.int32, bitcast=True) ^ factor.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def shifted(quotient, v, sign, HAS_V: tl.constexpr):
    """x / s + v; infinite, with the sign of x / s, instead of NaN.

    `scales.quotient` is NaN where it overflows: ratios can make scales that say nothing about how large x is. v may be
    NaN, and then counts as this infinity. Groups that are not finite have it, too, but no number counts there.
    """
    u = quotient
    if HAS_V:
        u = u + v
    infinity = ((sign & -2147483648) | 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(u == u, u, infinity)


@triton.jit
def element(quotient, v, zero, sign, HAS_V: tl.constexpr, FMT: tl.constexpr):
    """(x / s + v, the number that it rounds to)."""
    ELEM: tl.constexpr = FMT.element
    u = shifted(quotient, v, sign, HAS_V)
    return u, ELEM.codec.round(u, zero, ELEM)


@triton.jit
def through(total, outside, positive, negative, factor, tensor_scale, FMT: tl.constexpr):
    """Gradients for hi and for -lo, bits `positive` and `negative`, of total = sum of dy dy/ds and outside = sum of dy
    over elements that were clipped."""
    SLOPE: tl.constexpr = FMT.slope
    PASSING: tl.constexpr = FMT.scale.passing
    ABOVE: tl.constexpr = PASSING[0]
    UP_TO: tl.constexpr = PASSING[1]
    if FMT.scale.is_exponent:
        raw = tl.maximum(positive, negative).to(tl.float32, bitcast=True) * SLOPE
    else:
        raw = tl.abs(scales.raw(positive, negative, tensor_scale, FMT))
    bits = raw.to(tl.int32, bitcast=True)
    passes = (bits > ABOVE) & (bits <= UP_TO)
    if FMT.minimum:
        of_high = tl.where(passes, total * SLOPE, 0.0)
        of_low = of_high - outside
    elif FMT.scale.rule == "minmax":
        LEVELS: tl.constexpr = (1 << FMT.bits) - 1
        zero = tl.div_rn(negative.to(tl.float32, bitcast=True), factor)
        free = zero <= LEVELS
        total = total + tl.where(free, outside * zero, 0.0)
        of_high = tl.where(passes, total * SLOPE, 0.0)
        of_low = of_high - tl.where(free, outside, 0.0)
    else:
        slope = tl.where(passes, total * SLOPE, 0.0)
        larger = positive >= negative
        if FMT.scale.rule == "full_range":
            of_high, of_low = tl.where(larger, 0.0 - slope, 0.0), tl.where(larger, 0.0, slope)
        else:
            of_high, of_low = tl.where(larger, slope, 0.0), tl.where(larger, 0.0, slope)
    return of_high, of_low


@triton.jit
def _moved(p, g, rate, LOW: tl.constexpr, HIGH: tl.constexpr):
    """p - rate * sign(g) within [LOW, HIGH]; NaN has no sign."""
    sign = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))
    return tl.minimum(tl.maximum(p - rate * sign, LOW), HIGH)


@triton.jit
def store_gradient(
    ptr, offsets, p_ptr, p_offsets, mask, g, p, rate, STEP: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """A gradient in the dtype of its parameter; or with STEP the parameter moved against its sign."""
    if STEP:
        g = g.to(p_ptr.dtype.element_ty).to(tl.float32)
        tl.store(p_ptr + p_offsets, _moved(p, g, rate, LOW, HIGH).to(p_ptr.dtype.element_ty), mask)
    else:
        tl.store(ptr + offsets, g.to(ptr.dtype.element_ty), mask)


@triton.jit
def finish(
    total, outside, positive, negative, high, low, factor, free, bad, tensor_scale, rate,
    high_ptr, low_ptr, d_high_ptr, d_low_ptr, index, mask,
    FMT: tl.constexpr, STEP: tl.constexpr, GIVEN: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr,
    WANT_HIGH: tl.constexpr, WANT_LOW: tl.constexpr, FACTOR: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters of groups from their sums. `positive` and `negative` are bits of the extremes before
    their ratios `high` and `low`."""
    if GIVEN:
        if FMT.tensor_scale:
            total = tl.div_rn(total, tl.zeros_like(total) + tensor_scale)
        of_high = total * FACTOR
        of_low = tl.where(free, (0.0 - outside) * factor, 0.0) * FACTOR
    else:
        above, below = scaled(positive, negative, high, low, HAS_HIGH, HAS_LOW)
        of_high, of_low = through(total, outside, above, below, factor, tensor_scale, FMT)
        of_high = tl.where(bad, 0.0, of_high * positive.to(tl.float32, bitcast=True))
        of_low = tl.where(bad, 0.0, of_low * negative.to(tl.float32, bitcast=True))
        if HAS_HIGH:
            of_high = tl.where(high < 0.0, 0.0, of_high)
        if HAS_LOW:
            of_low = tl.where(low < 0.0, 0.0, of_low)
    if WANT_HIGH:
        store_gradient(d_high_ptr, index, high_ptr, index, mask, of_high, high, rate, STEP, LOWEST, HIGHEST)
    if WANT_LOW:
        store_gradient(d_low_ptr, index, low_ptr, index, mask, of_low, low, rate, STEP, LOWEST, HIGHEST)


@triton.jit
def _sum_per_group(terms, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr):
    """[S * M * R, GROUPS * W] to [M, GROUPS], one axis after the other (see `groups._max_per_group`)."""
    if S > 1:
        return tl.sum(tl.sum(terms.reshape([S, M, GROUPS, W]), 0), 2)
    elif R == 1:
        return tl.sum(terms.reshape([M, GROUPS, W]), 2)
    else:
        return tl.sum(tl.sum(terms.reshape([M, R, GROUPS, W]), 3), 1)


@triton.jit
def _place(
    tile_m, tile_n, N, K, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """(row, column of the slice [S * M * R], column within it [GROUPS * W], mask) of the lanes of a tile, which lie as
    in `groups.quantize_tile`."""
    ROWS: tl.constexpr = FMT.group[0]
    COLS: tl.constexpr = FMT.group[1]
    C: tl.constexpr = S * W
    PADDED: tl.constexpr = COLS != C and COLS != -1
    r = tl.arange(0, S * M * R)
    slice_col = tl.zeros([S * M * R], tl.int64)
    if S > 1:
        slice_col, r = ((r // M) * W).to(tl.int64), r % M
    row = (tile_m * M + r // R) * ROWS + r % R
    row_mask = row < N
    if R != ROWS:
        row_mask = row_mask & (r % R < ROWS)
    c = tl.arange(0, GROUPS * W)
    col = groups._column(tile_n * (GROUPS * (COLS if PADDED else C)), c, S, W, COLS)
    if PADDED and S > 1:
        mask = (row_mask & (slice_col < COLS))[:, None] & (slice_col[:, None] + col[None, :] < K)
    elif PADDED:
        mask = row_mask[:, None] & ((col < K) & (c % C < COLS))[None, :]
    else:
        mask = row_mask[:, None] & (col < K)[None, :]
    return row, slice_col, col, mask


@triton.jit
def _offsets(row, slice_col, col, stride_row, stride_col):
    return (row * stride_row + slice_col * stride_col)[:, None] + col[None, :] * stride_col


@triton.jit
def _divided(
    x, factor, tensor_scale, GIVEN: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """x / factor of its group; NaN where it overflows, but 0 for NaN where the factor was given."""
    if GIVEN:
        q = scales.divide(x, groups._spread(factor, S, M, R, GROUPS, W))
    elif FMT.super_group:
        q = super_groups._quotient(x, factor, S, M, GROUPS, W, FMT)
    elif FMT.tensor_scale:
        if scales.divides_fast(tensor_scale):
            q = groups._quotient(x, factor, True, S, M, R, GROUPS, W, FMT)
        else:
            q = groups._quotient(x, factor, False, S, M, R, GROUPS, W, FMT)
    else:
        q = groups._quotient(x, factor, False, S, M, R, GROUPS, W, FMT)
    return q


@triton.jit
def extremes(
    x, BOTH: tl.constexpr, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
    FMT: tl.constexpr,
):  # fmt: skip
    """Bits of max(x, 0) and max(-x, 0) of every group, or unless BOTH are asked for, of max |x|, twice."""
    if BOTH:
        bits = x.to(tl.int32, bitcast=True)
        high = groups._max_per_group(bits, S, M, R, GROUPS, W)
        low = groups._max_per_group(bits.to(tl.uint32, bitcast=True), S, M, R, GROUPS, W)
        return magnitudes(high, low)
    else:
        key, _ = scales.keys(x, FMT)
        largest = (groups._max_per_group(key, S, M, R, GROUPS, W) >> 1).to(tl.int32, bitcast=True)
        return largest, largest


@triton.jit(do_not_specialize=["N", "tiles_m"])
def learned_kernel(
    x_ptr, v_ptr, dy_ptr, out_ptr, dv_ptr, high_ptr, low_ptr, d_high_ptr, d_low_ptr, tensor_scale_ptr, rates_ptr,
    N, K, tiles_m, tiles_n, x_batch, x_row, x_col, v_batch, v_row, v_col, dy_batch, dy_row, dy_col,
    FMT: tl.constexpr, MODE: tl.constexpr, LIMIT: tl.constexpr, GIVEN: tl.constexpr,
    HAS_V: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_LOW: tl.constexpr, WANT_X: tl.constexpr, WANT_V: tl.constexpr,
    WANT_HIGH: tl.constexpr, WANT_LOW: tl.constexpr, FACTOR: tl.constexpr, V_LOWEST: tl.constexpr,
    V_HIGHEST: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, AXES: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A tile of M x GROUPS groups a program."""
    ELEM: tl.constexpr = FMT.element
    BOTH: tl.constexpr = FMT.scale.signed_range or HAS_HIGH or HAS_LOW
    batch, tile_m, tile_n = tile.position(tiles_m, tiles_n, AXES)
    row, slice_col, col, mask = _place(tile_m, tile_n, N, K, S, M, R, GROUPS, W, FMT)
    at = x_ptr + batch * x_batch + _offsets(row, slice_col, col, x_row, x_col)
    x = tile.to_float32(tl.load(at, mask, other=0.0))
    v, v_at = 0.0, 0
    if HAS_V:
        v_at = batch * v_batch + _offsets(row, slice_col, col, v_row, v_col)
        v = tile.to_float32(tl.load(v_ptr + v_at, mask, other=0.0))
    if MODE != "qdq":
        dy_at = dy_ptr + batch * dy_batch + _offsets(row, slice_col, col, dy_row, dy_col)
        given_dy = tl.load(dy_at, mask, other=0.0)
        dy = tile.to_float32(given_dy)
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)

    in_row = 1 if FMT.group[1] == -1 else (K + FMT.group[1] - 1) // FMT.group[1]
    in_col = (N + FMT.group[0] - 1) // FMT.group[0]
    group_row = tile_m * M + tl.arange(0, M)
    group_col = tile_n * GROUPS + tl.arange(0, GROUPS)
    group_mask = (group_row < in_col)[:, None] & (group_col < in_row)[None, :]
    index = (batch * in_col + group_row)[:, None] * in_row + group_col[None, :]

    high, low, positive, negative, free = 1.0, 1.0, 0, 0, group_mask
    offset = 0.0
    if GIVEN:
        factor, zero, free = load_given(high_ptr, low_ptr, index, group_mask, tensor_scale, FMT)
        bad = tl.zeros([M, GROUPS], tl.int32) != 0
    else:
        if HAS_HIGH:
            high = tl.load(high_ptr + index, group_mask, other=1.0).to(tl.float32)
        if HAS_LOW:
            low = tl.load(low_ptr + index, group_mask, other=1.0).to(tl.float32)
        positive, negative = extremes(x, BOTH, S, M, R, GROUPS, W, FMT)
        above, below = scaled(positive, negative, high, low, HAS_HIGH, HAS_LOW)
        high_key, low_key = as_keys(above, below, FMT)
        if FMT.super_group:
            SUPERS: tl.constexpr = GROUPS * S * W // FMT.super_group
            _, _, _, _, factor, offset, bad = supers.choose(high_key, low_key, M, SUPERS, GROUPS, FMT)
        else:
            _, factor, zero, bad = scales.choose(high_key, low_key, tensor_scale, FMT)
    if FMT.zero_point:
        zero = groups._spread(zero, S, M, R, GROUPS, W)
    else:
        zero = FMT.zero_code
    dividend = x
    if FMT.minimum:
        offset = groups._spread(offset, S, M, R, GROUPS, W)
        dividend = x + offset
    quotient = _divided(dividend, factor, tensor_scale, GIVEN, S, M, R, GROUPS, W, FMT)
    sign = sign_of(quotient, dividend, groups._spread(factor, S, M, R, GROUPS, W), GIVEN, FMT)
    u, value = element(quotient, v, zero, sign, HAS_V, FMT)
    out_at = out_ptr + (batch * N + row)[:, None] * K + slice_col[:, None] + col[None, :]
    if MODE == "qdq":
        y = value * groups._spread(tl.where(bad, float("nan"), factor), S, M, R, GROUPS, W)
        if FMT.minimum:
            y = y - offset
        y = tile.saturate(y, LIMIT)
        if GIVEN and ELEM.nan_code >= 0:
            y = tl.where(groups._lost(x, groups._spread(factor, S, M, R, GROUPS, W)), float("nan"), y)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask)
    else:
        kept = inside(u, zero, ELEM)
        if WANT_X:
            passed = kept | groups._spread(bad, S, M, R, GROUPS, W)
            tl.store(out_at, tl.where(passed, given_dy, 0.0).to(out_ptr.dtype.element_ty), mask)
        if WANT_HIGH or WANT_LOW:
            rate = 0.0
            if MODE == "step":
                rate = tl.load(rates_ptr + 1)
            total = _sum_per_group(dy * tl.where(kept, value - quotient, value), S, M, R, GROUPS, W)
            outside = tl.zeros_like(total)
            if FMT.scale.rule == "minmax":
                outside = _sum_per_group(tl.where(kept, 0.0, dy), S, M, R, GROUPS, W)
            finish(
                total, outside, positive, negative, high, low, factor, free, bad, tensor_scale, rate,
                high_ptr, low_ptr, d_high_ptr, d_low_ptr, index, group_mask,
                FMT, MODE == "step", GIVEN, HAS_HIGH, HAS_LOW, WANT_HIGH, WANT_LOW, FACTOR, LOWEST, HIGHEST,
            )  # fmt: skip
        if WANT_V:
            rate = 0.0
            if MODE == "step":
                rate = tl.load(rates_ptr)
            dv = tl.where(kept, dy * groups._spread(tl.where(bad, 0.0, factor), S, M, R, GROUPS, W), 0.0)
            dv_at = (batch * N + row)[:, None] * K + slice_col[:, None] + col[None, :]
            store_gradient(dv_ptr, dv_at, v_ptr, v_at, mask, dv, v, rate, MODE == "step", V_LOWEST, V_HIGHEST)
