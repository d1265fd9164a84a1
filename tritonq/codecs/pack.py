"""Packing: a dense bitstream, least significant bit first. Code i of a row holds bits [i * B, (i + 1) * B).

A row takes ceil(B * n / 8) bytes; what is left of the last byte is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chunk(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that fills whole bytes."""
    codes = 8 // math.gcd(8, bits)
    return codes, codes * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] to bytes [..., ceil(bits * n / 8)]."""
    if bits == 8:
        return codes
    n = codes.shape[-1]
    per, width = chunk(bits)
    if n % per:
        codes = torch.nn.functional.pad(codes, (0, -n % per))
    runs = codes.unflatten(-1, (-1, per))
    out = torch.empty(*runs.shape[:-1], width, dtype=torch.uint8, device=codes.device)
    for byte in range(width):
        low, high = 8 * byte, 8 * byte + 8
        whole: Tensor | None = None
        for i in range(low // bits, min(per, -(-high // bits))):
            shift = i * bits - low
            part = runs[..., i] << shift if shift >= 0 else runs[..., i] >> -shift
            whole = part if whole is None else whole.bitwise_or_(part)
        assert whole is not None
        out[..., byte] = whole
    return out.flatten(-2)[..., : -(-bits * n // 8)]


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Bytes [..., ceil(bits * n / 8)] to uint8 codes [..., n]."""
    if bits == 8:
        return packed
    per, width = chunk(bits)
    if packed.shape[-1] % width:
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % width))
    runs = packed.unflatten(-1, (-1, width))
    out = torch.empty(*runs.shape[:-1], per, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:
            code |= runs[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, mask, out=out[..., i])
    return out.flatten(-2)[..., :n]
