"""Random numbers of stochastic rounding, and the decision they make.

The number of element i of a tensor (its index in row-major order) is a function of a 64-bit seed and i alone:

    word = Philox4x32-10(key = seed, counter = i // 4)[i % 4]        (Salmon et al. 2011; words of the counter: low,
    u = (word >> 8) * 2^-24, in [0, 1)                                high, 0, 0; of the key: low, high)

so that neither tiles nor strides nor devices show in a result. A number t between the neighbours lower and upper takes
upper if and only if u < (t - lower) / (upper - lower). u has 24 bits, so the probability of upper is the fraction
rounded up to a multiple of 2^-24: too large by less than 2^-24.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.codecs.scratch import buffer

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def halves(seed: int) -> tuple[int, int]:
    """A seed as (low, high) 32-bit words, signed, as kernels take them."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    return low - ((low & 0x80000000) << 1), high - ((high & 0x80000000) << 1)


def philox(key: tuple[int, int], counter: list[Tensor]) -> list[Tensor]:
    """The four words of Philox4x32-10 in the low 32 bits of int64 tensors, which overwrite those of the counter; what
    is above them is not defined."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    high = buffer("philox", c0)
    for _ in range(_ROUNDS):
        # int64 products wrap, and so keep their 64 bits.
        a, b = c0.bitwise_and_(_WORD).mul_(_MULTIPLIERS[0]), c2.bitwise_and_(_WORD).mul_(_MULTIPLIERS[1])
        torch.bitwise_right_shift(b, 32, out=high)
        c0 = c1.bitwise_xor_(high).bitwise_xor_(k0)
        torch.bitwise_right_shift(a, 32, out=high)
        c1, c2, c3 = b, c3.bitwise_xor_(high).bitwise_xor_(k1), a
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return [c0, c1, c2, c3]


def _quads(seed: int, counter: Tensor) -> Tensor:
    """u of the four elements of each counter, fp32 [rows, 4 * counters of a row]."""
    rows, count = counter.shape
    start = [buffer(f"philox{i}", counter) for i in range(4)]
    start[0].copy_(counter)
    torch.bitwise_right_shift(counter, 32, out=start[1])
    words = philox((seed & _WORD, (seed >> 32) & _WORD), [*start[:2], start[2].zero_(), start[3].zero_()])
    u = buffer("quads", counter.unsqueeze(-1).expand(rows, count, 4), torch.float32)
    for i, word in enumerate(words):
        u[..., i] = word.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return u.mul_(2.0**-24).view(rows, 4 * count)


def uniform(seed: int, first: int, rows: int, columns: int, pitch: int, device: torch.device) -> Tensor:
    """u of a window of a row-major matrix, fp32 [rows, columns]: `first` is the index of its first element, `pitch` how
    far apart the indices of rows are. It may be overwritten, and lasts until the next call."""
    if columns == pitch or rows == 1:  # indices without a gap
        skip, count = first % 4, rows * columns
        counter = torch.arange(first // 4, -(-(first + count) // 4), device=device).unsqueeze(0)
        return _quads(seed, counter)[0, skip : skip + count].view(rows, columns)
    starts = torch.arange(rows, device=device).mul_(pitch).add_(first)
    counter = starts.bitwise_right_shift(2).unsqueeze(1) + torch.arange((columns + 6) // 4, device=device)
    quads = _quads(seed, counter)
    u = torch.empty((rows, columns), device=device)
    for i in range(min(4, rows)):  # every fourth row begins at the same word
        skip = (first + i * pitch) % 4
        u[i::4] = quads[i::4, skip : skip + columns]
    return u


def decide(x: Tensor, nearest: Tensor, quantum: Tensor | float, u: Tensor) -> Tensor:
    """x rounded to `nearest`, a multiple of the power of two `quantum`, or to the other multiple beside x (overwrites
    nearest and u).

    x - nearest is exact and within half a quantum. Where it is positive, nearest is the lower neighbour, left for the
    upper one if u < (x - nearest) / quantum; where it is negative, nearest is the upper one, left for the lower one
    unless u < 1 + (x - nearest) / quantum. u * quantum and (u - 1) * quantum are exact, so both tests are.
    """
    distance = torch.sub(x, nearest, out=buffer("distance", x))
    u = u.mul_(quantum)
    steps = torch.gt(distance, u, out=buffer("steps", x))
    steps.sub_(torch.le(distance, u.sub_(quantum), out=buffer("down", x)))
    return nearest.add_(steps, alpha=quantum) if isinstance(quantum, float) else nearest.addcmul_(steps, quantum)
