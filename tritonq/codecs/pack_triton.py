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
def in_order(x, S: tl.constexpr, GROUPS: tl.constexpr):
    """[S * M, GROUPS * W], the slices of groups above each other, to [M, GROUPS * S * W], whole groups."""
    if S == 1:
        return x
    else:
        M: tl.constexpr = x.shape[0] // S
        W: tl.constexpr = x.shape[1] // GROUPS
        return x.reshape([S, M, GROUPS, W]).permute(1, 2, 0, 3).reshape([M, GROUPS * S * W])


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


# Widths that do not divide 8, on rows of whole 32-bit words: a run of 32 codes (16 of 6 bits) is BITS words (3).


@triton.constexpr_function
def words_of(bits):
    """(codes of a piece, pieces of a run, words of a run): pieces are codes put together in 32 bits."""
    return (8, 4, 3) if bits == 3 else (4, 4, 3) if bits == 6 else (4, 8, bits)


@triton.jit
def _halved(x):
    """[M, N] to (even, odd) columns."""
    return tl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _eighths(x, COUNT: tl.constexpr):
    """[M, N] to COUNT (4 or 8) tensors [M, N / COUNT] of every COUNT-th column."""
    even, odd = _halved(x)
    a, c = _halved(even)
    b, d = _halved(odd)
    if COUNT == 4:
        return a, b, c, d
    else:
        a, e = _halved(a)
        b, f = _halved(b)
        c, g = _halved(c)
        d, h = _halved(d)
        return a, b, c, d, e, f, g, h


@triton.jit
def _joined(parts, COUNT: tl.constexpr):
    """Inverse of `_eighths`: COUNT (4 or 8) tensors [M, N] to [M, N * COUNT]."""
    if COUNT == 4:
        even, odd = tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])
    else:
        even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
    return tl.join(even, odd).reshape([parts[0].shape[0], parts[0].shape[1] * COUNT])


@triton.jit
def _shifted(part, SHIFT: tl.constexpr, WIDTH: tl.constexpr, TAKE: tl.constexpr):
    """A part moved left by SHIFT, right where that is negative; 0 where nothing is left of it in TAKE bits."""
    if SHIFT >= TAKE or SHIFT <= -WIDTH:
        return part * 0
    elif SHIFT >= 0:
        return part << SHIFT
    else:
        return part >> -SHIFT


@triton.jit
def _gather(parts, WIDTH: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr, TAKE: tl.constexpr):
    """TAKE bits from bit FIRST on of COUNT parts of WIDTH bits each, laid end to end (uint32)."""
    result = _shifted(parts[0], -FIRST, WIDTH, TAKE)
    for i in tl.static_range(1, COUNT):
        result = result | _shifted(parts[i], i * WIDTH - FIRST, WIDTH, TAKE)
    return result


@triton.jit
def pieces(codes, BITS: tl.constexpr):
    """int32 codes [M, COLS] to pieces (uint32)."""
    piece = _pairs(_pairs(codes, BITS), 2 * BITS)
    if words_of(BITS)[0] == 8:
        piece = _pairs(piece, 4 * BITS)
    return piece.to(tl.uint32, bitcast=True)


@triton.jit
def pack_words(pieces, BITS: tl.constexpr):
    """Pieces [M, N] to words [M, runs, 4 or 8] (uint32), the last ones of each run unused."""
    PIECE: tl.constexpr = words_of(BITS)[0]
    COUNT: tl.constexpr = words_of(BITS)[1]
    WORDS: tl.constexpr = words_of(BITS)[2]
    M: tl.constexpr = pieces.shape[0]
    RUNS: tl.constexpr = pieces.shape[1] // COUNT
    pieces = _eighths(pieces, COUNT)
    WIDTH: tl.constexpr = PIECE * BITS
    unused = pieces[0] * 0
    if COUNT == 4:
        words = (
            _gather(pieces, WIDTH, COUNT, 0, 32),
            _gather(pieces, WIDTH, COUNT, 32, 32),
            _gather(pieces, WIDTH, COUNT, 64, 32),
            unused,
        )
    else:
        words = (
            _gather(pieces, WIDTH, COUNT, 0, 32),
            _gather(pieces, WIDTH, COUNT, 32, 32),
            _gather(pieces, WIDTH, COUNT, 64, 32),
            _gather(pieces, WIDTH, COUNT, 96, 32),
            _gather(pieces, WIDTH, COUNT, 128, 32),
            _gather(pieces, WIDTH, COUNT, 160, 32),  # zeros where there are five words
            _gather(pieces, WIDTH, COUNT, 192, 32),
            unused,
        )
    PADDED: tl.constexpr = 4 if WORDS == 3 else 8
    return _joined(words, PADDED).reshape([M, RUNS, PADDED])


@triton.jit
def unpack_words(words, BITS: tl.constexpr):
    """Inverse of `pieces` and `pack_words`: codes."""
    PIECE: tl.constexpr = words_of(BITS)[0]
    COUNT: tl.constexpr = words_of(BITS)[1]
    WORDS: tl.constexpr = words_of(BITS)[2]
    WIDTH: tl.constexpr = PIECE * BITS
    M: tl.constexpr = words.shape[0]
    RUNS: tl.constexpr = words.shape[1]
    MASK: tl.constexpr = (1 << WIDTH) - 1
    parts = _eighths(words.to(tl.uint32, bitcast=True).reshape([M, RUNS * words.shape[2]]), words.shape[2])
    if COUNT == 4:
        pieces = (
            _gather(parts, 32, WORDS, 0, WIDTH) & MASK,
            _gather(parts, 32, WORDS, WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 2 * WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 3 * WIDTH, WIDTH) & MASK,
        )
    else:
        pieces = (
            _gather(parts, 32, WORDS, 0, WIDTH) & MASK,
            _gather(parts, 32, WORDS, WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 2 * WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 3 * WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 4 * WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 5 * WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 6 * WIDTH, WIDTH) & MASK,
            _gather(parts, 32, WORDS, 7 * WIDTH, WIDTH) & MASK,
        )
    piece = _joined(pieces, COUNT)
    codes = (piece[:, :, None] >> (tl.arange(0, PIECE) * BITS).to(tl.uint32)[None, None, :]) & ((1 << BITS) - 1)
    return codes.to(tl.int32, bitcast=True).reshape([M, RUNS * COUNT * PIECE])
