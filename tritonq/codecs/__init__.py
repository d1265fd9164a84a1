"""Codecs: how numbers of one family become codes and back, once in torch and once for Triton.

A family is two files. `<family>.py` holds the torch functions; they are the reference and the CPU path.
`<family>_triton.py` holds the device functions of the same name, imported at the first launch only, because importing
Triton takes longer than importing tritonq may.

The functions of an element codec, on values already divided by their scale:

* `encode(x, zero, element) -> code`: fp32 to integer codes 0 .. 2^bits - 1, saturating, round half to even.
* `decode(code, zero, element) -> x`: back to fp32, exactly.
* `round(x, zero, element) -> x`: decode(encode(x)) without the code, for QDQ.
* `stochastic(x, u, zero, element) -> x`: one of the two representable numbers beside x, saturating: the upper one if
  and only if u < (x - lower) / (upper - lower), for u in [0, 1). Numbers keep their sign, up to that of zero, where the
  codes have one; `encode` and `round` take the result exactly. `tritonq.codecs.philox` says where u comes from.
* `round_product(x, factor, zero, element) -> x`: round(x * factor), for factors of 16 bits: exact products of bf16
  numbers (Triton only).
* `clipped(x, zero, element) -> bool`: whether x lies outside the range of the codes before rounding (torch only).

`zero` is the code of 0: a constant of the element type, or the zero points of asymmetric formats. NaN never reaches
`encode`; callers replace it by 0 and let the scale carry it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tritonq.codecs import integer, lookup, minifloat


@dataclass(frozen=True)
class Codec:
    """One family of number representations.

    Attributes:
        name: of the family.
        encode_ref, decode_ref, round_ref, clipped_ref: torch functions as described above. They may overwrite `x`.
        stochastic_ref: likewise; it may overwrite `u`, too, and returns `x` overwritten.
        device_module: where the device functions `encode`, `decode`, `round`, `round_product`, `stochastic` live.
        offset_binary: codes are shifted so that the most negative number is code 0.
        scratch: fp32 tensors that `round_ref` keeps at a time, x included; the CPU path makes its tiles accordingly.
    """

    name: str
    encode_ref: Callable[..., Any]
    decode_ref: Callable[..., Any]
    round_ref: Callable[..., Any]
    clipped_ref: Callable[..., Any]
    stochastic_ref: Callable[..., Any]
    device_module: str
    offset_binary: bool = False
    scratch: int = 1

    @property
    def encode(self) -> Any:
        return importlib.import_module(self.device_module).encode

    @property
    def decode(self) -> Any:
        return importlib.import_module(self.device_module).decode

    @property
    def round(self) -> Any:
        return importlib.import_module(self.device_module).round

    @property
    def round_product(self) -> Any:
        return importlib.import_module(self.device_module).round_product

    @property
    def stochastic(self) -> Any:
        return importlib.import_module(self.device_module).stochastic

    @functools.cached_property
    def cache_key(self) -> str:
        """Changes when the source of a device function changes."""
        functions = (self.encode, self.decode, self.round, self.round_product, self.stochastic)
        keys = [fn.cache_key for fn in functions]
        return hashlib.sha256("-".join(keys).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Codec({self.name})"


INTEGER = Codec(
    "integer",
    integer.encode,
    integer.decode,
    integer.round,
    integer.clipped,
    integer.stochastic,
    "tritonq.codecs.integer_triton",
    True,
)
MINIFLOAT = Codec(
    "minifloat",
    minifloat.encode,
    minifloat.decode,
    minifloat.round,
    minifloat.clipped,
    minifloat.stochastic,
    "tritonq.codecs.minifloat_triton",
    scratch=3,
)
LOOKUP = Codec(
    "lookup",
    lookup.encode,
    lookup.decode,
    lookup.round,
    lookup.clipped,
    lookup.stochastic,
    "tritonq.codecs.lookup_triton",
    scratch=3,
)
