"""Device functions of `philox`: the same numbers on tiles, and the same decision."""

import triton
import triton.language as tl


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """The four words of Philox4x32-10 for uint32 keys and counters."""
    A = tl.full([], 0xD2511F53, tl.uint64)  # one wide product takes less time than its halves
    B = tl.full([], 0xCD9E8D57, tl.uint64)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * A, c2.to(tl.uint64) * B
        high_a, high_b = (a >> 32).to(tl.uint32), (b >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, b.to(tl.uint32), high_a ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(seed_low, seed_high, row_start, column, SHARED: tl.constexpr):
    """u of the elements of a tile whose indices are row_start [M] + column (int64); fp32 [M, N].

    SHARED 4: `column` [N / 4] has every fourth column, all indices are multiples of 4 and each stands for four
    elements, which share a counter. SHARED 1: `column` [N] has all of them, and each works out its own counter.
    """
    index = row_start[:, None] + column[None, :]
    counter = index >> 2
    zero = tl.zeros(counter.shape, tl.uint32)
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox(k0, k1, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    if SHARED == 4:
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        word = pairs.reshape([counter.shape[0], counter.shape[1] * 4])
    else:
        odd, upper = (index & 1) != 0, (index & 2) != 0
        word = tl.where(upper, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return (word >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def decide(x, nearest, quantum, u):
    """x rounded to `nearest`, a multiple of the power of two `quantum`, or to the other multiple beside x; every step
    is exact, see `philox.decide`."""
    distance, limit = x - nearest, u * quantum
    step = tl.where(distance > limit, quantum, 0.0)
    return nearest + tl.where(distance <= limit - quantum, quantum * -1.0, step)
