"""Device functions of `philox`: the same numbers on tiles, and the same decision."""

import triton
import triton.language as tl


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """The four words of Philox4x32-10 for uint32 keys and counters."""
    A = tl.full([], 0xD2511F53, tl.uint32)
    B = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        # Products of 64 bits would take fewer instructions, but Triton then converts layouts through shared memory.
        high_a, high_b = tl.umulhi(c0, A), tl.umulhi(c2, B)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, c2 * B, high_a ^ c3 ^ k1, c0 * A
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(seed_low, seed_high, row_start, fourth, COUNTERS: tl.constexpr):
    """u of the elements of a tile [M, N], fp32: N / 4 runs of four neighbours a row, which begin at the indices
    row_start [M] + fourth [N / 4] (int64).

    COUNTERS 1: all these indices are multiples of four, so a run has the four words of one counter. COUNTERS 2: runs
    may begin anywhere, and take their words from two counters.
    """
    index = row_start[:, None] + fourth[None, :]
    counter = index >> 2
    zero = tl.zeros(counter.shape, tl.uint32)
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox(k0, k1, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    if COUNTERS == 2:
        counter += 1
        w4, w5, w6, _ = philox(k0, k1, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
        odd, half = (index & 1) != 0, (index & 2) != 0
        w0, w1, w2 = tl.where(odd, w1, w0), tl.where(odd, w2, w1), tl.where(odd, w3, w2)
        w3, w4, w5 = tl.where(odd, w4, w3), tl.where(odd, w5, w4), tl.where(odd, w6, w5)
        w0, w1, w2, w3 = tl.where(half, w2, w0), tl.where(half, w3, w1), tl.where(half, w4, w2), tl.where(half, w5, w3)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([counter.shape[0], counter.shape[1] * 4])
    return (word >> 8).to(tl.float32) * 2.0**-24


@triton.jit
def decide(x, nearest, quantum, u):
    """x rounded to `nearest`, a multiple of the power of two `quantum`, or to the other multiple beside x; every step
    is exact, see `philox.decide`."""
    distance, limit = x - nearest, u * quantum
    step = tl.where(distance > limit, quantum, 0.0)
    return nearest + tl.where(distance <= limit - quantum, quantum * -1.0, step)
