"""What the kernels share: loading, spreading scales over elements, storing packed codes."""

import triton
import triton.language as tl

from tritonq.codecs import pack_triton as bits
from tritonq.codecs import scale_triton as scales


def begin(_semantic=None):
    """Wait for what earlier launches write, before anything is read or written. A kernel that does so may be launched
    while the last programs of the launch before it are still at work (programmatic dependent launch, `Plan.waits`);
    compiled without that option this is nothing."""
    if _semantic is not None and getattr(_semantic.builder.options, "launch_pdl", False):
        from triton.language.extra.cuda import gdc_wait

        gdc_wait(_semantic=_semantic)


begin.__triton_builtin__ = True  # the compiler calls it with what it builds


@triton.jit
def position(tiles_m, tiles_n, AXES: tl.constexpr):
    """Which tile of which matrix this program handles: (batch, row, column), int64. AXES: 1 one row of tiles, 2 one
    matrix, 3 perhaps a batch of them; a division by what the compiler does not know takes some 35 instructions."""
    begin()
    pid = tl.program_id(0)
    none = tl.full([], 0, tl.int64)
    if AXES == 1:
        return none, none, pid.to(tl.int64)
    row, column = pid // tiles_n, (pid % tiles_n).to(tl.int64)
    if AXES == 2:
        return none, row.to(tl.int64), column
    return (row // tiles_m).to(tl.int64), (row % tiles_m).to(tl.int64), column


@triton.jit
def to_float32(x):
    """fp32 of any floating type; finite fp64 numbers beyond fp32 saturate."""
    y = x.to(tl.float32)
    if x.dtype == tl.float64:
        beyond = (tl.abs(y) == float("inf")) & (tl.abs(x) != float("inf"))
        y = tl.where(beyond, tl.where(x > 0, 3.4028234663852886e38, -3.4028234663852886e38), y)
    return y


@triton.jit
def saturate(y, LIMIT: tl.constexpr):
    """Clamp to the finite range of the output type; NaN stays NaN."""
    y = tl.minimum(y, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(y, -LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def swizzled(row, col, padded_columns):
    """Where the scales of rows [M] and columns [N] lie in tiles of 128 x 4 (`tritonq.scale_tiles`): [M, N]."""
    within_row = (row % 32) * 16 + (row % 128) // 32 * 4 + row // 128 * (128 * padded_columns)
    return within_row[:, None] + (col // 4 * 512 + col % 4)[None, :]


@triton.jit
def store_codes(
    q_ptr,
    row_start,
    row_mask,
    row_bytes,
    first_byte,
    codes,
    S: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    WORDS: tl.constexpr,
    FMT: tl.constexpr,
):
    """Pack int32 codes [S * M, COLS] and store them from `first_byte` of each row on; rows begin at `row_start` [M].

    The columns are GROUPS groups, whose S slices lie above each other. With GROUP_BYTES the groups are padded, and the
    first GROUP_BYTES of each are kept; with 0 they are whole. Bytes past the end of a row are not written. WORDS: rows
    and runs of codes are whole 32-bit words.
    """
    M: tl.constexpr = codes.shape[0] // S
    if FMT.sign_flip != 0:
        codes = codes ^ FMT.sign_flip
    if WORDS:
        data = bits.pack_words(bits.in_order(bits.pieces(codes, FMT.bits), S, GROUPS), FMT.bits)
        q_ptr = q_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        UNIT: tl.constexpr = 4  # bytes of what is stored
        WIDTH: tl.constexpr = 4 * bits.words_of(FMT.bits)[2]  # bytes of a run
    elif 8 % FMT.bits == 0:
        data = bits.in_order(bits.pack(codes, FMT.bits).to(tl.uint8), S, GROUPS)
        UNIT: tl.constexpr = 1
        WIDTH: tl.constexpr = 1
    else:
        data = bits.pack(bits.in_order(codes, S, GROUPS), FMT.bits).to(tl.uint8)
        UNIT: tl.constexpr = 1
        WIDTH: tl.constexpr = 3 if FMT.bits == 6 else FMT.bits
    run = tl.arange(0, data.shape[1])
    if GROUP_BYTES == 0:
        byte = first_byte + run * WIDTH
        keep = byte < row_bytes
    else:
        RUNS: tl.constexpr = data.shape[1] // GROUPS
        byte = first_byte + (run // RUNS) * GROUP_BYTES + (run % RUNS) * WIDTH
        keep = (byte < row_bytes) & ((run % RUNS) * WIDTH < GROUP_BYTES)
    if WIDTH == 1:
        tl.store(q_ptr + row_start[:, None] + byte[None, :], data, row_mask[:, None] & keep[None, :])
    else:
        within = tl.arange(0, data.shape[2]) * UNIT
        byte = byte[:, None] + within[None, :]
        mask = keep[:, None] & (within < WIDTH)[None, :] & (byte < row_bytes)
        mask = tl.reshape(row_mask, [M, 1, 1]) & mask[None, :, :]
        tl.store(q_ptr + tl.reshape(row_start // UNIT, [M, 1, 1]) + byte[None, :, :] // UNIT, data, mask)


@triton.jit
def load_codes(q_ptr, row, row_mask, row_bytes, first_byte, COLS: tl.constexpr, WORDS: tl.constexpr, FMT: tl.constexpr):
    """int32 codes [M, COLS] of consecutive columns; inverse of `store_codes`."""
    M: tl.constexpr = row.shape[0]
    row_offset = row * row_bytes
    if 8 % FMT.bits == 0:
        byte = first_byte + tl.arange(0, COLS * FMT.bits // 8)
        mask = row_mask[:, None] & (byte < row_bytes)[None, :]
        data = tl.load(q_ptr + row_offset[:, None] + byte[None, :], mask, other=0)
        codes = bits.unpack(data.to(tl.int32), FMT.bits)
    else:
        if WORDS:
            q_ptr = q_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
            UNIT: tl.constexpr = 4
            WIDTH: tl.constexpr = 4 * bits.words_of(FMT.bits)[2]
            PADDED: tl.constexpr = 4 if WIDTH == 12 else 8
        else:
            UNIT: tl.constexpr = 1
            WIDTH: tl.constexpr = 3 if FMT.bits == 6 else FMT.bits
            PADDED: tl.constexpr = 4 if FMT.bits == 6 else 8
        RUNS: tl.constexpr = COLS * FMT.bits // (8 * WIDTH)
        within = tl.arange(0, PADDED) * UNIT
        byte = first_byte + tl.arange(0, RUNS)[:, None] * WIDTH + within[None, :]
        mask = (within < WIDTH)[None, :] & (byte < row_bytes)
        data = tl.load(
            q_ptr + tl.reshape(row_offset // UNIT, [M, 1, 1]) + byte[None, :, :] // UNIT,
            tl.reshape(row_mask, [M, 1, 1]) & mask[None, :, :],
            other=0,
        )
        if WORDS:
            codes = bits.unpack_words(data, FMT.bits)
        else:
            codes = bits.unpack(data.to(tl.int32), FMT.bits)
    if FMT.sign_flip != 0:
        codes = codes ^ FMT.sign_flip
    return codes


@triton.jit
def _scale_row(row, batch, N, FMT: tl.constexpr):
    """Index of the row of scales that a row of elements [M] uses."""
    R: tl.constexpr = FMT.group[0]
    if R == -1:
        return row * 0
    elif R == 1:
        return batch * N + row
    else:
        return batch * ((N + R - 1) // R) + row // R


@triton.jit
def _load_factors(scale_ptr, zero_ptr, index, mask, tensor_scale, FMT: tl.constexpr):
    factor = scales.load(tl.load(scale_ptr + index, mask, other=1), tensor_scale, FMT)
    if FMT.zero_point:
        zero = tl.load(zero_ptr + index, mask, other=0).to(tl.float32)
    else:
        zero = tl.zeros_like(factor) + FMT.element.zero_code
    return factor, zero


@triton.jit
def _over_columns(per_group, M: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr):
    """[M, GROUPS] to [M, COLS], each repeated over its COLS / GROUPS columns."""
    return tl.broadcast_to(per_group[:, :, None], [M, GROUPS, COLS // GROUPS]).reshape([M, COLS])


@triton.jit
def load_factors(
    scale_ptr, zero_ptr, tensor_scale, batch, row, row_mask, first_col, N, K, COLS: tl.constexpr, FMT: tl.constexpr
):
    """Scale and zero point of every element of a tile, fp32 [M, COLS] or [M, 1]; first_col is a multiple of COLS."""
    C: tl.constexpr = FMT.group[1]
    M: tl.constexpr = row.shape[0]
    scale_row = _scale_row(row, batch, N, FMT)
    if C == -1:
        factor, zero = _load_factors(scale_ptr, zero_ptr, scale_row, row_mask, tensor_scale, FMT)
        factor, zero = factor[:, None], zero[:, None]
    else:
        # Pointers are per run of columns that surely share a group: the largest power of two that divides both.
        RUN: tl.constexpr = min(C & -C, COLS)
        RUNS_OF_GROUP: tl.constexpr = C // RUN
        GROUPS: tl.constexpr = COLS // RUN
        in_row = (K + C - 1) // C
        first_run = first_col // RUN
        within = (first_run % RUNS_OF_GROUP).to(tl.int32)  # of its group
        column = first_run // RUNS_OF_GROUP + (within + tl.arange(0, GROUPS)) // RUNS_OF_GROUP
        mask = row_mask[:, None] & (column < in_row)[None, :]
        index = scale_row[:, None] * in_row + column[None, :]
        factor, zero = _load_factors(scale_ptr, zero_ptr, index, mask, tensor_scale, FMT)
        if GROUPS != COLS:
            factor, zero = _over_columns(factor, M, GROUPS, COLS), _over_columns(zero, M, GROUPS, COLS)
    return factor, zero
