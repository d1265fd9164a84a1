"""The random Hadamard transform of blocks of 16: y = H (s * x) / 4 along the last axis, in fp32.

H is the 16 x 16 Sylvester matrix, H[i, j] = (-1)^popcount(i & j), and s are 16 signs that all blocks share. H / 4 is
orthogonal and its own inverse, so x = s * (H y) / 4. It spreads outliers over their block before a cast to few bits,
and a matrix product of two rotated operands needs no rotation back. H takes four butterfly stages, h = 1, 2, 4, 8 in
this order: (a, b) -> (a + b, a - b) for the elements whose indices differ by h. Every backend adds in this order and
rounds to the dtype once, so the bits are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq import reference
from tritonq.formats import Shape

BLOCK = 16
STEP = 1 << 19  # elements that the CPU holds in fp32 at a time


def seed_bits(seed: int) -> int:
    """16 bits, of which bit i is set where sign i is -1: the low bits of SplitMix64's first output for `seed`.

    z = seed + 0x9E3779B97F4A7C15; z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z ^ z >> 31, modulo 2^64 (Steele, Lea, Flood 2014).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is an integer from 0 to 2^64 - 1, got {seed!r}; leave it out for signs of +1")
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & 0xFFFF


def sign_bits(seed: int | None, signs: Sequence[Any] | Tensor | None) -> int:
    """Bit i is set where sign i is -1."""
    if signs is None:
        return 0 if seed is None else seed_bits(seed)
    if seed is not None:
        raise ValueError(f"seed={seed} and signs both say which elements change sign; pass one of them")
    found = signs.tolist() if isinstance(signs, Tensor) else list(signs)
    if len(found) != BLOCK or any(sign not in (1, -1) for sign in found):
        raise ValueError(f"signs are {BLOCK} numbers 1 or -1, got {found}; pass a seed to have them drawn")
    return sum(1 << i for i, sign in enumerate(found) if sign == -1)


def check_shape(shape: Shape) -> None:
    if not shape or shape[-1] % BLOCK:
        raise ValueError(
            f"hadamard rotates blocks of {BLOCK} elements of the last axis, got shape {tuple(shape)}; pad the last "
            f"axis to a multiple of {BLOCK}"
        )


def hadamard(x: Tensor, bits: int, inverse: bool, y: Tensor) -> None:
    """Fill contiguous y, of x's shape and dtype, in torch."""
    signs = torch.tensor([-1.0 if bits >> i & 1 else 1.0 for i in range(BLOCK)], device=x.device)
    values = reference.to_float32(x.reshape(-1, BLOCK))
    if not inverse:
        values.mul_(signs)
    for h in (1, 2, 4, 8):
        pairs = values.view(-1, BLOCK // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        total = a + b
        torch.sub(a, b, out=b)
        a.copy_(total)
    values.mul_(0.25)
    if inverse:
        values.mul_(signs)
    y.view(-1, BLOCK).copy_(values)
