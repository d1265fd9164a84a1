"""Device functions of `pack`, on tiles [ROWS, COLS] whose columns are consecutive codes of a row."""

import triton
import triton.language as tl


@triton.jit
def _pairs(codes, WIDTH: tl.constexpr):
    """Neighbouring codes of WIDTH bits to one of 2 * WIDTH, the left one low."""
    low, high = tl.split(codes.reshape([codes.shape[0], codes.shape[1] // 2, 2]))
    return low | (high << WIDTH)


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """int32 codes to bytes: [ROWS, COLS * BITS / 8] where BITS divides 8; else runs [ROWS, runs, padded bytes of a
    run]."""
    if BITS == 8:
        return codes
    elif BITS == 4:
        return _pairs(codes, 4)
    elif BITS == 2:
        return _pairs(_pairs(codes, 2), 4)
    else:
        word = _pairs(_pairs(codes, BITS), 2 * BITS)
        PADDED: tl.constexpr = 4 if BITS == 6 else 8
        if BITS != 6:  # eight codes, more than 32 bits together from five bits on
            word = _pairs(word.to(tl.int64), 4 * BITS)
        shifts = tl.arange(0, PADDED) * 8
        return ((word[:, :, None] >> shifts[None, None, :]) & 0xFF).to(tl.int32)


@triton.jit
def _halves(codes, WIDTH: tl.constexpr):
    """Inverse of `_pairs`."""
    both = tl.join(codes & ((1 << WIDTH) - 1), codes >> WIDTH)
    return both.reshape([codes.shape[0], codes.shape[1] * 2])


@triton.jit
def unpack(data, BITS: tl.constexpr):
    """Inverse of `pack`; bytes that belong to no run are 0."""
    if BITS == 8:
        return data
    elif BITS == 4:
        return _halves(data, 4)
    elif BITS == 2:
        return _halves(_halves(data, 4), 2)
    else:
        PADDED: tl.constexpr = 4 if BITS == 6 else 8
        PER: tl.constexpr = 4 if BITS == 6 else 8
        word = tl.sum(data.to(tl.int64) << (tl.arange(0, PADDED) * 8)[None, None, :], 2)
        codes = (word[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & ((1 << BITS) - 1)
        return codes.to(tl.int32).reshape([data.shape[0], data.shape[1] * PER])
