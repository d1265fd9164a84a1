"""Scale search: every candidate of `tritonq.codecs.search` against every group, x read once a stage.

A program takes M groups. Its threads divide the candidates, [Q, M, L] of them, so that a thread walks along the
elements of one group with Q scales of its own in registers, and sums need no exchange between threads: their order
does not depend on the tile. All tensors have three axes, so that none changes its layout between threads.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.codecs import search
from tritonq.kernels import tile

RUN = tl.constexpr(search.RUN)
BLOCK = tl.constexpr(search.BLOCK)
CAP = tl.constexpr(search.CAP)
ANCHORS = tl.constexpr(search.ANCHORS)


@triton.constexpr_function
def _exact(fmt):
    """Whether a candidate times a number of the element type is exact in fp32."""
    stored = fmt.scale.element
    short = fmt.scale.is_exponent or (stored is not None and stored.mbits <= 10)
    return short and not fmt.tensor_scale and not fmt.element.values


@triton.constexpr_function
def _exact_square(fmt, dtype):
    """Whether the square of an error is, too, so that a fused multiply-add sums as two operations do.

    An error is a multiple of the finer of the steps of x and of the scale times a code, and hardly larger than a step
    of the code: with 8 bits of x and of the scale and up to 4 of the code, even clipped it has at most 12 bits."""
    element, stored = fmt.element, fmt.scale.element
    few = element.bits <= 4 if element.codec.offset_binary else element.mbits <= 3
    return _exact(fmt) and few and (stored is None or stored.mbits <= 7) and dtype == tl.bfloat16


@triton.constexpr_function
def _step(fmt):
    """Exponent of the step between the largest codes."""
    element = fmt.element
    return element.emax - (element.bits - 1 if element.values else element.mbits)


@triton.jit
def _unit(factor, FMT: tl.constexpr):
    """The power of two that takes |factor| times the step between the largest codes into [1, 2), as far as fp32 has
    one."""
    STEP: tl.constexpr = _step(FMT)
    exponent = (factor.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (tl.minimum(tl.maximum(254 - STEP - exponent, 1), 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(factor):
    """1 / factor, rounded to 16 significant bits, half up."""
    bits = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor).to(tl.int32, bitcast=True)
    return ((bits + 0x80) & -0x100).to(tl.float32, bitcast=True)


@triton.jit
def _candidates(stored, k, STEP: tl.constexpr, FMT: tl.constexpr):
    """The k-th neighbours of scales: (storage bits int32, fp32 values); NaN, of groups that are not finite, has
    none."""
    if FMT.scale.is_exponent:
        bits = tl.where((k == 0) | (stored == 255), stored, tl.minimum(tl.maximum(stored + k, 0), 254))
        value = scales.load(bits, 1.0, FMT)
    else:
        origin = scales.value(stored, FMT)
        magnitude = origin.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        moved = tl.minimum(tl.maximum((magnitude & -STEP) + k * STEP, 1), 0x7F7FFFFF)
        raw = moved.to(tl.float32, bitcast=True)
        if FMT.scale.rule == "full_range":
            raw = tl.where(origin < 0.0, 0.0 - raw, raw)
        bits, value = scales.store(raw, raw != raw, FMT)
        same = (k == 0) | (origin != origin)
        bits, value = tl.where(same, stored, bits), tl.where(same, origin, value)
    return bits, value


@triton.jit
def _add_square(
    total, x_ptr, w_ptr, i, left, there, stride_col, power, inverse, minus, zero,
    FIRST: tl.constexpr, FULL: tl.constexpr, WEIGHTED: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """total [Q, M, L] and the weighted squares of the errors of element i of each group that is `there` [1, M, L], 0
    from `left` on. FIRST: there is no total yet."""
    ELEM: tl.constexpr = FMT.element
    if not FULL:
        there = there & (i < left)
    x = tile.to_float32(tl.load(x_ptr + i * stride_col, there, other=0.0)) * power
    y = ELEM.codec.round_product(x, inverse, zero, ELEM)
    EXACT: tl.constexpr = _exact(FMT)
    if EXACT:
        e = tl.fma(y, minus, x)
    else:
        e = y * minus + x
    FUSED: tl.constexpr = _exact_square(FMT, x_ptr.dtype.element_ty) and not WEIGHTED
    if FUSED and not FIRST:
        return tl.fma(e, e, total)
    else:
        square = e * e
        if WEIGHTED:
            square = square * tl.load(w_ptr + i, there, other=0.0)
        if FIRST:
            return square
        else:
            return total + square


@triton.jit
def _errors(
    x_ptr, w_ptr, rows, row_step, left, blocks, stride_col, power, factor, zero,
    FRACTION: tl.constexpr, FULL: tl.constexpr, WEIGHTED: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Integer errors [Q, M, L] of groups of up to ROWS rows, of which `rows` [1, M, L] exist, and `left` columns. FULL:
    all columns of all blocks exist."""
    ROWS: tl.constexpr = 1 if FMT.group[0] == -1 else FMT.group[0]
    factor = factor * power
    inverse = _inverse(factor)
    minus = factor * -1.0
    result = tl.zeros(factor.shape, tl.int64)
    for r in range(ROWS):
        total = tl.zeros(factor.shape, tl.float32)
        there = r < rows
        for b in range(blocks):
            x_block, w_block = x_ptr + b * (BLOCK * stride_col), w_ptr + b * BLOCK
            ahead = left - b * BLOCK
            for run in tl.static_range(2):
                found = total
                for i in tl.static_range(RUN):
                    found = _add_square(
                        found, x_block, w_block, run * RUN + i, ahead, there, stride_col, power, inverse, minus, zero,
                        i == 0, FULL, WEIGHTED, FMT,
                    )  # fmt: skip
                if run == 0:
                    first = found
                else:
                    total = total + (first + found)
        total = tl.where(total < CAP, total, CAP)  # NaN is not less
        result += (total * (2.0**FRACTION)).to(tl.int64)
        x_ptr += row_step
    return result


@triton.jit
def _smallest(values):
    """The smallest of [Q, M, L] along Q and L, as [1, M, 1]."""
    return tl.min(tl.min(values, 0), 1)[None, :, None]


@triton.jit
def _only(values, pick):
    """[M]: the one of [Q, M, L] that is picked."""
    return tl.sum(tl.sum(tl.where(pick, values, 0), 0), 1)


@triton.jit
def _position(N, K, groups, M: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr):
    """(group, whether it exists, batch, first row, rows, first column, columns) of the groups of a program [1, M, L];
    rows of the matrix stand for groups where one group is all there is."""
    ROWS: tl.constexpr = 1 if FMT.group[0] == -1 else FMT.group[0]
    group = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    group = tl.broadcast_to(group[None, :, None], [1, M, L])
    exists = group < groups
    if FMT.group[1] == -1:
        columns, in_row = K, 1
    else:
        columns, in_row = FMT.group[1], (K + FMT.group[1] - 1) // FMT.group[1]
    in_column = (N + ROWS - 1) // ROWS
    group_row = group // in_row
    first_col = (group % in_row) * columns
    first_row = (group_row % in_column) * ROWS
    rows = tl.where(exists, tl.minimum(N - first_row, ROWS), 0)
    left = tl.minimum(K - first_col, columns).to(tl.int32)
    return group, exists, group_row // in_column, first_row, rows, first_col, left


@triton.jit
def _zero_points(zero, ratio, ANCHOR: tl.constexpr, FMT: tl.constexpr):
    LEVELS: tl.constexpr = (1 << FMT.bits) - 1
    low = zero * ratio
    high = LEVELS - (LEVELS - zero) * ratio
    if ANCHOR == 0:
        moved = low
    elif ANCHOR == 1:
        moved = high
    else:
        moved = (low + high) * 0.5
    moved = tl.where(moved == moved, moved, zero)
    moved = tl.minimum(tl.maximum(moved, -1.0), LEVELS + 1.0)  # the sum below rounds numbers up to 2^22
    return tl.minimum(tl.maximum((moved + 12582912.0) - 12582912.0, 0.0), LEVELS)


@triton.jit
def _trials(
    scale_ptr, zero_ptr, tensor_scale_ptr, index, exists, BELOW: tl.constexpr, STEP: tl.constexpr, Q: tl.constexpr,
    L: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Candidates for scales at `index` [1, M, L]: k [Q, 1, L], their storage bits and factors [Q, M, L]; the unit and
    the zero point of the rule, and how much smaller than the rule's scale each candidate is."""
    k = (tl.arange(0, Q)[:, None, None] * L + tl.arange(0, L)[None, None, :]) - BELOW
    stored = tl.load(scale_ptr + index, exists, other=1).to(tl.int32)
    tensor_scale = 1.0
    if FMT.tensor_scale:
        tensor_scale = tl.load(tensor_scale_ptr)
    power = _unit(scales.load(stored, tensor_scale, FMT), FMT)
    bits, value = _candidates(stored, k, STEP, FMT)
    factor = scales.over_tensor_scale(value, tensor_scale, FMT)
    zero = tl.load(zero_ptr + index, exists, other=0).to(tl.float32) if FMT.zero_point else power
    ratio = tl.div_rn(scales.value(stored, FMT) + tl.zeros_like(value), value) if FMT.zero_point else factor
    return k, bits, factor, power, zero, ratio


@triton.jit
def _trial_errors(
    x_ptr, w_ptr, rows, row_step, left, blocks, stride_col, power, factor, zero, ratio,
    FRACTION: tl.constexpr, FULL: tl.constexpr, WEIGHTED: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Errors of candidates with their best zero points, and these."""
    if FMT.zero_point:
        best_zero = _zero_points(zero, ratio, 0, FMT)
        error = _errors(x_ptr, w_ptr, rows, row_step, left, blocks, stride_col, power, factor, best_zero, FRACTION,
                        FULL, WEIGHTED, FMT)  # fmt: skip
        for anchor in tl.static_range(1, ANCHORS):
            moved = _zero_points(zero, ratio, anchor, FMT)
            found = _errors(x_ptr, w_ptr, rows, row_step, left, blocks, stride_col, power, factor, moved, FRACTION,
                            FULL, WEIGHTED, FMT)  # fmt: skip
            best_zero = tl.where(found < error, moved, best_zero)
            error = tl.minimum(found, error)
        return error, best_zero
    else:
        ZERO: tl.constexpr = FMT.element.zero_code
        error = _errors(x_ptr, w_ptr, rows, row_step, left, blocks, stride_col, power, factor, ZERO, FRACTION,
                        FULL, WEIGHTED, FMT)  # fmt: skip
        return error, factor


@triton.jit
def _store_best(error, k, bits, zero, scale_ptr, zero_ptr, index, exists, FMT: tl.constexpr):
    """Scale and zero point with the smallest error; of several the one nearest to the rule's."""
    rank = tl.where(error == _smallest(error), tl.abs(k) * 2 - (k > 0).to(tl.int32), 1 << 20)
    pick = rank == _smallest(rank)
    tl.store(scale_ptr + index, _only(bits, pick).to(scale_ptr.dtype.element_ty), exists)
    if FMT.zero_point:
        tl.store(zero_ptr + index, _only(zero, pick).to(tl.uint8), exists)


@triton.jit
def _tied(x_ptr, rows, row_step, left, columns, stride_col, M: tl.constexpr, L: tl.constexpr, FMT: tl.constexpr):
    """Which groups [1, M, 1] have a largest and a smallest element of the same magnitude; a lane takes every L-th."""
    high, low = tl.zeros([1, M, L], tl.float32), tl.zeros([1, M, L], tl.float32)
    for r in range(FMT.group[0]):
        for b in range(tl.cdiv(columns, L)):
            i = b * L + tl.arange(0, L)[None, None, :]
            x = tile.to_float32(tl.load(x_ptr + i * stride_col, (r < rows) & (i < left), other=0.0))
            high, low = tl.maximum(high, x), tl.minimum(low, x)
        x_ptr += row_step
    high = tl.max(high, 2)[:, :, None]
    return (high == 0.0 - tl.min(low, 2)[:, :, None]) & (high > 0.0)


@triton.jit(do_not_specialize=["N", "groups"])
def search_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    N, K, groups, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, FULL: tl.constexpr, WEIGHTED: tl.constexpr, FRACTION: tl.constexpr, STEP: tl.constexpr,
    BELOW: tl.constexpr, MIRROR: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One stage: replace the scales and zero points of a rule by the best of their neighbours; with MIRROR, of those of
    the other sign, too, where a group is tied."""
    group, exists, batch, first_row, rows, first_col, left = _position(N, K, groups, M, L, FMT)
    x_ptr += batch * stride_batch + first_row * stride_row + first_col * stride_col
    k, bits, factor, power, zero, ratio = _trials(
        scale_ptr, zero_ptr, tensor_scale_ptr, group, exists, BELOW, STEP, Q, L, FMT
    )
    columns = K if FMT.group[1] == -1 else FMT.group[1]
    error, zero = _trial_errors(
        x_ptr, w_ptr + first_col, rows, stride_row, left, tl.cdiv(columns, BLOCK), stride_col, power, factor, zero,
        ratio, FRACTION, FULL, WEIGHTED, FMT,
    )  # fmt: skip
    if MIRROR:
        tied = _tied(x_ptr, rows, stride_row, left, columns, stride_col, M, L, FMT)
        if tl.max(tl.max(tl.max(tied.to(tl.int32), 2), 1), 0) > 0:
            other, _ = _trial_errors(
                x_ptr, w_ptr + first_col, rows, stride_row, left, tl.cdiv(columns, BLOCK), stride_col, power,
                factor * -1.0, zero, ratio, FRACTION, FULL, WEIGHTED, FMT,
            )  # fmt: skip
            better = tied & (_smallest(other) < _smallest(error))
            SIGN: tl.constexpr = -(1 << (FMT.scale.bits - 1))
            error, bits = tl.where(better, other, error), tl.where(better, bits ^ SIGN, bits)
    index = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    _store_best(error, k, bits, zero, scale_ptr, zero_ptr, index, index < groups, FMT)


@triton.jit(do_not_specialize=["N", "groups"])
def errors_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, error_ptr,
    N, K, groups, stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, FULL: tl.constexpr, WEIGHTED: tl.constexpr, FRACTION: tl.constexpr, STEP: tl.constexpr,
    BELOW: tl.constexpr, M: tl.constexpr, Q: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Where one group spans the tensor: errors [anchors, Q * L] (int64, zero-filled) of its candidates, summed over
    `groups` rows by all programs."""
    row, exists, batch, first_row, rows, first_col, left = _position(N, K, groups, M, L, FMT)
    x_ptr += batch * stride_batch + first_row * stride_row
    _, _, factor, power, zero, ratio = _trials(
        scale_ptr, zero_ptr, tensor_scale_ptr, row * 0, exists, BELOW, STEP, Q, L, FMT
    )
    for anchor in tl.static_range(ANCHORS if FMT.zero_point else 1):
        if FMT.zero_point:
            moved = _zero_points(zero, ratio, anchor, FMT)
        else:
            moved: tl.constexpr = FMT.element.zero_code
        error = _errors(
            x_ptr, w_ptr + first_col, rows, stride_row, left, tl.cdiv(K, BLOCK), stride_col, power, factor, moved,
            FRACTION, FULL, WEIGHTED, FMT,
        )  # fmt: skip
        candidate = tl.arange(0, Q)[:, None] * L + tl.arange(0, L)[None, :]
        tl.atomic_add(error_ptr + anchor * (Q * L) + candidate, tl.sum(error, 1))


@triton.jit
def pick_kernel(
    error_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
    FMT: tl.constexpr, STEP: tl.constexpr, BELOW: tl.constexpr, Q: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The best candidate by the errors of `errors_kernel`."""
    one = tl.zeros([1, 1, L], tl.int64)
    k, bits, factor, _, zero, ratio = _trials(
        scale_ptr, zero_ptr, tensor_scale_ptr, one, one == 0, BELOW, STEP, Q, L, FMT
    )
    candidate = tl.arange(0, Q)[:, None, None] * L + tl.arange(0, L)[None, None, :]
    error = tl.load(error_ptr + candidate)
    best_zero = factor
    if FMT.zero_point:
        best_zero = _zero_points(zero, ratio, 0, FMT)
        for anchor in tl.static_range(1, ANCHORS):
            found = tl.load(error_ptr + anchor * (Q * L) + candidate)
            best_zero = tl.where(found < error, _zero_points(zero, ratio, anchor, FMT), best_zero)
            error = tl.minimum(found, error)
    index = tl.arange(0, 1).to(tl.int64)
    _store_best(error, k, bits, best_zero, scale_ptr, zero_ptr, index, index == 0, FMT)
