"""Formats as data: what one code means, how scales are stored, which elements share one.

A `Format` is the single value from which quantize, dequantize, QDQ, packing, storage size and export are derived.
Nothing in tritonq branches on a format's name.

Names follow `<element>_<granularity>[_asym][_<scale type>[_sN]][_<rule>]`:

* element: `int2`..`int8`, `intBfF` (F of the B bits are fractional), `eXmY` with an optional `fn` | `ieee` | `fnuz`,
  `fp8_e4m3`, `fp8_e5m2`, ..., and the tables `nf4`, `af4`
* granularity: `tensor`, `channel` (one scale a row), `gN` (N elements of a row), `bRxC` (a block of R rows and C
  columns)
* scale type: `e8m0`, `e4m3`, `ue5m3`, `f16`, `bf16`, `f32`; left out, integers take bf16, floats and tables f32
* `u4_sN`, `u6_sN`, `u8_sN`, `i6_sN`, `i8_sN` in its place: scales are integers, times an f16 super-scale that N
  elements of the row share; asymmetric ones have a minimum a group, stored the same way, instead of a zero point
* rule: how the scale follows from the group, see `RULES`; a rule of e8m0 implies that scale type

and the families `mxfp8[_e5m2]`, `mxfp6_e3m2`, `mxfp6_e2m3`, `mxfp4`, `mxint8`, `nvfp4` (OCP MX 1.0; NVFP4), with an
optional rule, and `q2_k` .. `q6_k` (the k-quants of GGUF).
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from tritonq.codecs import INTEGER, LOOKUP, MINIFLOAT, Codec
from tritonq.codecs import lookup as tables

Shape = tuple[int, ...]

FLOAT_RULES = ("absmax", "half_range", "full_range")
EXPONENT_RULES = ("floor", "rceil", "ceil", "even")
RULES = (*FLOAT_RULES, "minmax", *EXPONENT_RULES)


def _fp32_bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def _fp32(x: float) -> float:
    """x rounded to fp32; infinite beyond its range."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


@dataclass(frozen=True)
class ElementType:
    """What one code means.

    Attributes:
        name: how the field writes it: `int4`, `e2m1`, `e4m3`.
        bits: width of a code.
        max: largest finite magnitude; use `integer`, `minifloat` and `lookup` to build one, they compute it from the
            codes.
        codec: the functions that turn numbers into codes and back.
        ebits, mbits: exponent and mantissa bits (integers: `mbits` counts the bits below the leading one of `max`).
        special: minifloats only. "" every code is a finite number, "fn" all ones is NaN, "ieee" the top exponent holds
            infinity and NaN, "fnuz" the code of -0 is NaN and the bias is one higher.
        signed: minifloats only, whether the top bit is a sign.
        fraction: integers only, the number of fractional bits F: code c stands for c * 2^-F.
        values: tables only, the fp32 numbers that the codes 0, 1, ... stand for, strictly ascending.
    """

    name: str
    bits: int
    max: float
    codec: Codec
    ebits: int = 0
    mbits: int = 0
    special: str = ""
    signed: bool = True
    fraction: int = 0
    values: tuple[float, ...] = ()

    def __hash__(self) -> int:  # a table may have 256 values; equality compares them
        return hash(self.name)

    @functools.cached_property
    def table(self) -> tuple[float, ...]:
        """`values` by code for all 2^bits codes: those that a table leaves unused stand for its last value."""
        return self.values + self.values[-1:] * ((1 << self.bits) - len(self.values))

    @functools.cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Tables: the largest fp32 number that rounds to value i instead of to value i + 1, for every i."""
        return tables.thresholds(self.values)

    @functools.cached_property
    def cells(self) -> tuple[float, tuple[int, ...]] | None:
        """Tables of more than 8 values: a scale, and the integers near which the thresholds then lie, all different; so
        that x * scale rounded leaves one threshold to compare x with. None where that takes more than 4 * 2^bits."""
        return tables.cells(self.thresholds, 4 << self.bits) if len(self.values) > 8 else None

    @property  # not cached: that takes a lock in Python 3.11, which torch.compile cannot trace
    def bias(self) -> int:
        """Exponent bias, 2^(ebits - 1) - 1 (OCP MX 1.0 section 5.3); one more for fnuz."""
        return (1 << (self.ebits - 1)) - 1 + (self.special == "fnuz") if self.ebits else 0

    @functools.cached_property
    def emax(self) -> int:
        """floor(log2(max)), the exponent that MX scale rules subtract."""
        return math.frexp(self.max)[1] - 1

    @functools.cached_property
    def max_mantissa(self) -> int:
        """Mantissa field of `max` as an fp32 number."""
        return int((math.frexp(self.max)[0] * 2 - 1) * (1 << 23))

    @functools.cached_property
    def smallest_bits(self) -> int:
        """The smallest positive number of a minifloat as fp32 bits (that of bf16 is subnormal there)."""
        return _fp32_bits(2.0 ** (1 - self.bias - self.mbits))

    @functools.cached_property
    def half_smallest_bits(self) -> int:
        """Half of it: up to here magnitudes round to zero."""
        return _fp32_bits(2.0 ** (-self.bias - self.mbits))

    @property
    def zero_code(self) -> int:
        """The code of 0: integers are stored offset-binary, so 2^(bits - 1)."""
        if self.values:
            return self.values.index(0.0)
        return 1 << (self.bits - 1) if self.codec.offset_binary else 0

    @functools.cached_property
    def nan_code(self) -> int:
        """The code that stands for NaN, or -1 where every code is a number."""
        magnitude = (1 << (self.bits - self.signed)) - 1
        if self.special == "fn":
            return magnitude
        if self.special == "ieee":  # quiet NaN: the top mantissa bit set
            return (((1 << self.ebits) - 1) << self.mbits) | (1 << (self.mbits - 1))
        return 1 << (self.bits - 1) if self.special == "fnuz" else -1

    @property  # not cached: that takes a lock in Python 3.11, which torch.compile cannot trace
    def max_code(self) -> int:
        """Code of `max` without the sign (minifloats)."""
        top = (1 << (self.bits - self.signed)) - 1
        return {"fn": top - 1, "ieee": (((1 << self.ebits) - 1) << self.mbits) - 1}.get(self.special, top)

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype with the same codes, if there is one."""
        if self.codec.offset_binary:
            return torch.int8 if self.bits == 8 else None
        key = (self.ebits, self.mbits, self.special, self.signed)
        return _TORCH_FLOATS.get(key)

    @functools.cached_property
    def digest(self) -> str:
        """Everything that shapes a kernel, for cache keys."""
        minifloat_fields = (self.ebits, self.mbits, self.special, self.signed)
        table = (self.values, self.thresholds, self.cells)
        fields = (self.bits, self.max, self.codec.name, minifloat_fields, self.fraction, *table)
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:16]

    @property
    def cache_key(self) -> str:
        return f"{self.digest}-{self.codec.cache_key}"

    def __repr__(self) -> str:
        return f"ElementType({self.name}-{self.digest})"


_TORCH_FLOATS = {
    (4, 3, "fn", True): torch.float8_e4m3fn,
    (5, 2, "ieee", True): torch.float8_e5m2,
    (4, 3, "fnuz", True): torch.float8_e4m3fnuz,
    (5, 2, "fnuz", True): torch.float8_e5m2fnuz,
    (5, 10, "ieee", True): torch.float16,
    (8, 7, "ieee", True): torch.bfloat16,
}


def integer(bits: int, fraction: int = 0) -> ElementType:
    """k * 2^-fraction for k of the two's complement range [-2^(bits-1), 2^(bits-1) - 1], 2 to 8 bits.

    OCP MX 1.0 section 5.3.4 has INT8 with the implied scale 2^-6: `integer(8, 6)`, up to 127 / 64.

    Raises:
        ValueError: other numbers of bits, or a fraction that is not 0 .. bits - 1.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"integer elements have 2 to 8 bits, got {bits}")
    if not 0 <= fraction < bits:
        raise ValueError(f"int{bits} has 0 to {bits - 1} fractional bits, got {fraction}")
    name = f"int{bits}" + (f"f{fraction}" if fraction else "")
    return ElementType(
        name, bits, math.ldexp((1 << (bits - 1)) - 1, -fraction), INTEGER, 0, bits - 2, fraction=fraction
    )


def lookup(name: str, values: Iterable[float]) -> ElementType:
    """A table: code i stands for `values[i]` rounded to fp32; numbers take the nearest value, ties the even code.

    2 to 256 values, of which one is 0. Codes have max(2, ceil(log2 n)) bits; those beyond n are never written and
    decode to the last value. There is no -0. A format of it scales by `absmax`: the largest magnitude of the table
    stands for that of the group.

    Raises:
        ValueError: too few or too many values, one that is not finite in fp32, not strictly ascending, no 0, or a
            largest magnitude that is subnormal.
    """
    given = tuple(float(v) for v in values)
    if not 2 <= len(given) <= 256:
        raise ValueError(f"table {name!r} has {len(given)} values; codes of up to 8 bits stand for 2 to 256 of them")
    rounded = tuple(_fp32(v) + 0.0 for v in given)  # -0 becomes 0
    for code, value in enumerate(rounded):
        if not math.isfinite(value):
            raise ValueError(f"table {name!r} holds {given[code]!r} at {code}; its values have to be finite in fp32")
        if code and value <= rounded[code - 1]:
            raise ValueError(
                f"table {name!r} holds {given[code]!r} at {code} after {given[code - 1]!r}; its values have to ascend "
                "strictly in fp32, so sort them and drop those that are equal"
            )
    if 0.0 not in rounded:
        raise ValueError(f"table {name!r} lacks 0, which groups of zeros and NaN are stored as; add 0.0 to {given}")
    largest = max(-rounded[0], rounded[-1])
    if largest < 2.0**-126:
        raise ValueError(
            f"table {name!r} reaches {largest!r}, which is subnormal in fp32; scale it, to a largest magnitude of 1 say"
        )
    return ElementType(name, max(2, (len(rounded) - 1).bit_length()), largest, LOOKUP, values=rounded)


# QLoRA's NormalFloat (Dettmers et al. 2023, appendix E), the fp32 numbers of bitsandbytes: averages of neighbouring
# quantiles of the normal distribution, eight below and nine from 0 up, divided by the largest.
NF4 = lookup("nf4", (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))  # fmt: skip
# Yoshida 2023, "NF4 isn't information theoretically optimal (and that's good)", for groups of 64: -1, 0, 1, and in
# between each value the median of what rounds to it (next to 0: of what lies between 0 and the midpoint beyond it), for
# x / absmax of 64 normal numbers.
AF4 = lookup("af4", (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0, 0.04273164, 0.12934483,
    0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
))  # fmt: skip
_TABLES = {element.name: element for element in (NF4, AF4)}


@functools.cache
def minifloat(ebits: int, mbits: int, special: str = "", signed: bool = True, name: str | None = None) -> ElementType:
    """A float of `ebits` exponent and `mbits` mantissa bits; see `ElementType.special` for the four kinds."""
    bits = signed + ebits + mbits
    if ebits < 1 or mbits < 0 or not 2 <= bits <= 16 or special not in ("", "fn", "ieee", "fnuz"):
        raise ValueError(
            f"a minifloat has a sign, >= 1 exponent and >= 0 mantissa bits, 8 in all, and special '', 'fn', 'ieee' or "
            f"'fnuz'; got e{ebits}m{mbits} special {special!r}"
        )
    if special == "ieee" and (mbits < 1 or ebits < 2):
        raise ValueError(f"infinity and NaN need >= 1 mantissa and >= 2 exponent bits, got e{ebits}m{mbits}")
    if special == "fn" and ebits + mbits < 2:
        raise ValueError(f"e{ebits}m{mbits} has no code left for NaN")
    bare = ElementType(name or f"e{ebits}m{mbits}{special}", bits, math.nan, MINIFLOAT, ebits, mbits, special, signed)
    exponent, mantissa = bare.max_code >> mbits, bare.max_code & ((1 << mbits) - 1)
    if exponent:
        largest = math.ldexp(1 + mantissa / (1 << mbits), exponent - bare.bias)
    else:
        largest = math.ldexp(mantissa, 1 - bare.bias - mbits)
    return replace(bare, max=largest)


@dataclass(frozen=True)
class ScaleType:
    """How a scale is stored, and the rule that chooses it from its group.

    Attributes:
        name: `e8m0` | `e4m3` | `ue5m3` | `f16` | `bf16` | `f32`, or of formats with super-groups an integer: `u4` |
            `u6` | `u8` (0 .. 2^B - 1) | `i6` | `i8` (two's complement). Integers of fewer than 8 bits take a byte each.
        rule: one of `RULES`; `codecs/scale.py` states each as a formula.
    """

    name: str
    rule: str = "absmax"

    @property
    def element(self) -> ElementType | None:
        """The float type of a stored scale; None for f32 and e8m0, whose bits are part of a float, and for integers."""
        return _SCALE_ELEMENTS[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.name]

    @property
    def is_exponent(self) -> bool:
        """True where a scale is a power of two (e8m0)."""
        return self.name == "e8m0"

    @property
    def is_integer(self) -> bool:
        """True where a scale is an integer times the super-scale of its super-group."""
        return self.name in _SCALE_INTEGERS

    @property
    def passing(self) -> tuple[int, int]:
        """fp32 bits (a, b): being stored neither lifts nor saturates scales of magnitudes above a and up to b."""
        largest = 0x7F7FFFFF
        if self.is_exponent:
            return 0x3FFFFF, largest  # from 2^-127 on
        if self.is_integer:
            return -1, largest
        if self.element is None:
            return 0, largest
        # Halfway to the next number, if there were one.
        top = self.element.max + 2.0 ** (self.element.emax - self.element.mbits - 1)
        return self.element.half_smallest_bits, _fp32_bits(top)

    @property
    def low(self) -> int:
        """Smallest integer of an integer scale."""
        return _SCALE_INTEGERS[self.name][0]

    @property
    def high(self) -> int:
        """Largest integer of an integer scale."""
        return _SCALE_INTEGERS[self.name][1]

    @property
    def signed_range(self) -> bool:
        """Whether the rule looks at the largest and the smallest element, not only at magnitudes."""
        return self.rule in ("full_range", "minmax")

    @property
    def max(self) -> float:
        if self.is_exponent:
            return 2.0**127
        if self.is_integer:
            return float(self.high)
        return self.element.max if self.element else torch.finfo(torch.float32).max

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8


_SCALE_INTEGERS = {"u4": (0, 15), "u6": (0, 63), "u8": (0, 255), "i6": (-32, 31), "i8": (-128, 127)}
_SCALE_ELEMENTS: dict[str, ElementType | None] = {
    **dict.fromkeys(_SCALE_INTEGERS),
    "e8m0": None,
    "e4m3": minifloat(4, 3, "fn", name="e4m3"),
    "ue5m3": minifloat(5, 3, "fn", signed=False, name="ue5m3"),
    "f16": minifloat(5, 10, "ieee", name="f16"),
    "bf16": minifloat(8, 7, "ieee", name="bf16"),
    "f32": None,
}
_SCALE_DTYPES = {
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
    "ue5m3": torch.uint8,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    **{name: torch.int8 if low else torch.uint8 for name, (low, _) in _SCALE_INTEGERS.items()},
}
SUPER_GROUPS = tuple(1 << n for n in range(3, 13))  # whole bytes of codes; one tile of a kernel holds the largest
SUPER_PARTS = ("group_minimum", "super_scale", "super_minimum")


@dataclass(frozen=True)
class Format:
    """How a tensor is stored.

    Attributes:
        name: what `get_format` takes.
        element: type of one code.
        group: (rows, cols) of elements that share one scale; -1 means the whole axis. (1, g), (1, -1), (r, c) or
            (-1, -1), which is one scale for the whole tensor whatever its rank.
        scale: storage type and rule of the scales.
        zero_point: asymmetric integers; codes and zero points are 0 .. 2^bits - 1.
        tensor_scale: a second level, one fp32 divisor for the whole tensor (NVFP4).
        super_group: a second level, the number of elements of a row that share one f16 super-scale (GGUF k-quants);
            0 for none. Scales are integers then, and with the rule `minmax` every group has a minimum besides, which is
            quantized in the same way.
    """

    name: str
    element: ElementType
    group: tuple[int, int]
    scale: ScaleType = field(default_factory=lambda: ScaleType("f32"))
    zero_point: bool = False
    tensor_scale: bool = False
    super_group: int = 0

    def __post_init__(self) -> None:
        rows, cols = self.group
        if not ((rows >= 1 and cols >= 1) or (rows, cols) in ((1, -1), (-1, -1))):
            raise ValueError(f"{self.name}: group must be (1, g), (1, -1), (-1, -1) or (r, c), got {self.group}")
        if self.scale.name not in _SCALE_DTYPES:
            raise ValueError(f"{self.name}: unknown scale type {self.scale.name!r}; known: {', '.join(_SCALE_DTYPES)}")
        is_integer = self.element.codec.offset_binary
        if self.super_group or self.scale.is_integer:
            self._check_super_group()
        if self.zero_point and (not is_integer or self.element.fraction or self.scale.is_exponent or self.tensor_scale):
            raise ValueError(
                f"{self.name}: a zero point needs an integer element without fraction and a floating-point scale"
            )
        if self.scale.is_exponent:
            allowed: tuple[str, ...] = EXPONENT_RULES
        elif self.super_group and is_integer and not self.element.fraction:
            allowed = ("full_range",) if self.scale.low else ("minmax", "absmax", "half_range")
        elif self.zero_point:
            allowed = ("minmax",)
        else:
            allowed = FLOAT_RULES if is_integer and not self.element.fraction else ("absmax",)
        if self.scale.rule == "full_range" and self.scale.element and not self.scale.element.signed:
            raise ValueError(f"{self.name}: full_range scales can be negative, {self.scale.name} has no sign")
        if self.scale.rule not in allowed:
            raise ValueError(f"{self.name}: scale rule {self.scale.rule!r} is not one of {', '.join(allowed)}")
        if self.tensor_scale and self.element.max * 2.0 ** (11 - self.element.emax) % 1:
            raise ValueError(
                f"{self.name}: a tensor scale needs an element whose largest magnitude has at most 12 bits, "
                f"{self.element.name} has {self.element.max!r}; scale the table, to a largest magnitude of 1 say"
            )
        if self.element.bits > 8:
            raise ValueError(f"{self.name}: elements have at most 8 bits, {self.element.name} has {self.element.bits}")

    def _check_super_group(self) -> None:
        rows, cols = self.group
        if not (self.super_group and self.scale.is_integer):
            raise ValueError(
                f"{self.name}: scales of type {self.scale.name} and super-groups of {self.super_group} elements do not "
                f"go together; {', '.join(_SCALE_INTEGERS)} are the scale types of super-groups"
            )
        if self.super_group not in SUPER_GROUPS or rows != 1 or cols < 1 or self.super_group % cols:
            raise ValueError(
                f"{self.name}: a super-group holds whole groups of one row and {SUPER_GROUPS[0]} to {SUPER_GROUPS[-1]} "
                f"elements, a power of two; got {self.super_group} for groups of {rows} x {cols}"
            )
        if self.zero_point or self.tensor_scale:
            raise ValueError(f"{self.name}: super-groups have neither zero points nor a tensor scale")
        if bool(self.scale.low) != (self.scale.rule == "full_range"):
            raise ValueError(
                f"{self.name}: scales of the rule full_range have a sign and those of others have none, which "
                f"{self.scale.rule} and {self.scale.name} contradict"
            )

    # __hash__ and __repr__ run at every kernel launch: short, and distinct for distinct contents.
    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self._repr

    @functools.cached_property
    def _repr(self) -> str:
        levels = (self.zero_point, self.tensor_scale, self.super_group)
        fields = (self.element.digest, self.group, self.scale.name, self.scale.rule, *levels)
        return f"Format({self.name}-{hashlib.sha256(repr(fields).encode()).hexdigest()[:16]})"

    @property
    def cache_key(self) -> str:
        """Triton's key for a kernel specialised to this format.

        Folds in the source of the codecs' device functions, which Triton does not see in a kernel's own hash.
        """
        keys = [self._repr, self.element.cache_key]
        if self.scale.element:
            keys.append(self.scale.element.cache_key)
        return "-".join(keys)

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def group_size(self) -> int:
        """Elements of the last axis that share one scale; -1 for the whole axis."""
        return self.group[1]

    @property
    def minimum(self) -> bool:
        """Whether codes 0 .. 2^bits - 1 count from a minimum of their group: y = scale * code - minimum."""
        return self.super_group > 0 and self.scale.rule == "minmax"

    @property
    def super_scale(self) -> ScaleType:
        """How super-scales and super-minima are stored."""
        return _SUPER_SCALE

    @property
    def zero_code(self) -> int:
        """The code that stands for 0, zero points and minima apart."""
        return 0 if self.minimum else self.element.zero_code

    @property
    def saturates(self) -> bool:
        """Whether finite input can be clipped at `element.max` (its gradient is 0 there).

        Dividing by a rounded scale can pass the maximum; only a power of two rounded up never does.
        """
        return not (self.scale.is_exponent and self.scale.rule == "rceil")

    @property
    def qdtype(self) -> torch.dtype:
        """dtype of `qdata`: the torch dtype itself for 8-bit floats and symmetric int8, packed uint8 otherwise."""
        dtype = None if self.zero_point or self.minimum else self.element.dtype
        return dtype or torch.uint8

    @property
    def slope(self) -> float:
        """d scale / d amax (d scale / d(max - min) of minmax) before the scale is rounded, signs apart."""
        levels, power = 1 << self.element.bits, 2.0**-self.element.emax
        known = {"minmax": 1.0 / (levels - 1), "full_range": 2.0 / levels, "half_range": 1.0 / ((levels - 1) / 2),
                 "floor": power, "even": power}  # fmt: skip
        return known.get(self.scale.rule, 1.0 / self.element.max)

    @property
    def sign_flip(self) -> int:
        """XOR between an offset-binary code and its stored byte: 0x80 where qdata is two's complement int8."""
        return 0x80 if self.qdtype is torch.int8 else 0

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of `scale` (and `zero_point`) for a tensor of `shape`."""
        shape = tuple(shape)
        rows, cols = self.group
        if not shape:
            raise ValueError(f"{self.name} needs a tensor of >= 1 dimension, got a scalar; use x.reshape(1)")
        if rows == -1:
            return (1,)
        along = 1 if cols == -1 else -(-shape[-1] // cols)
        if rows == 1:
            return (*shape[:-1], along)
        if len(shape) < 2:
            raise ValueError(
                f"{self.name} shares one scale over blocks of {rows} x {cols} elements of the last two axes, got shape "
                f"{shape}; reshape to two dimensions, or pass a format with groups of one row"
            )
        return (*shape[:-2], -(-shape[-2] // rows), along)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one packed row: ceil(bits * columns / 8)."""
        return -(-self.bits * columns // 8)

    def storage(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> (shape, dtype) of the parts of a quantized tensor of `shape`; the one place that knows sizes.

        Integer scales and minima take a byte each in memory whatever their bits, so q4_k has 4.625 bits an element
        here and 4.5 in a GGUF file.
        """
        shape = tuple(shape)
        scales = self.scale_shape(shape)
        columns = self.row_bytes(shape[-1])
        parts: dict[str, tuple[Shape, torch.dtype]] = {
            "qdata": ((*shape[:-1], columns), self.qdtype),
            "scale": (scales, self.scale.dtype),
        }
        if self.zero_point:
            parts["zero_point"] = (scales, torch.uint8)
        if self.minimum:
            parts["group_minimum"] = (scales, self.scale.dtype)
        if self.super_group:
            supers = (*shape[:-1], -(-shape[-1] // self.super_group))
            parts["super_scale"] = (supers, self.super_scale.dtype)
            if self.minimum:
                parts["super_minimum"] = (supers, self.super_scale.dtype)
        if self.tensor_scale:
            parts["tensor_scale"] = ((1,), torch.float32)
        return parts

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all parts for a tensor of `shape`, alignment apart."""
        return sum(math.prod(s) * d.itemsize for s, d in self.storage(shape).values())


_SUPER_SCALE = ScaleType("f16", "absmax")

_ELEMENT = re.compile(
    r"(?:int(?P<int>\d)(?:f(?P<fraction>[1-9]))?|(?:fp8_)?(?P<unsigned>u)?e(?P<e>\d)m(?P<m>\d)"
    r"(?P<special>fn|ieee|fnuz)?)$"
)
_NAME = re.compile(
    rf"(?P<element>int\d(?:f[1-9])?|(?:fp8_)?e\dm\d(?:fnuz|fn|ieee)?|{'|'.join(_TABLES)})_"
    r"(?P<group>tensor|channel|g\d+|b\d+x\d+)(?P<asym>_asym)?"
    rf"(?:_(?P<scale>{'|'.join(_SCALE_DTYPES)}))?(?:_s(?P<super>\d+))?(?:_(?P<rule>{'|'.join(RULES)}))?$"
)
_MX = re.compile(rf"mx(?P<kind>fp[864]|int8)(?:_(?P<element>e\dm\d))?(?:_(?P<rule>{'|'.join(EXPONENT_RULES)}))?$")
# The first is the one that the name may leave out; mxfp6 has to say.
_MX_ELEMENTS = {"fp8": ("e4m3", "e5m2"), "fp6": (None, "e3m2", "e2m3"), "fp4": ("e2m1",), "int8": ("int8f6",)}
_K_QUANT = re.compile(r"q(?P<bits>[2-6])_k$")
# Bits: (elements of a group, scale type, rule) in super-groups of 256; llama.cpp, ggml-common.h and ggml-quants.c.
_K_QUANTS = {2: (16, "u4", "minmax"), 3: (16, "i6", "full_range"), 4: (32, "u6", "minmax"), 5: (32, "u6", "minmax"),
             6: (16, "i8", "full_range")}  # fmt: skip


def float_fields(name: str) -> tuple[int, int, str, bool] | None:
    """The arguments of `minifloat` (exponent and mantissa bits, special codes, sign) for a name such as `e2m1`,
    `fp8_e5m2` or `ue5m3`; None for other names."""
    match = _ELEMENT.match(name)
    if not match or match["int"]:
        return None
    e, m, special = int(match["e"]), int(match["m"]), match["special"]
    if special is None:
        special = {(4, 3): "fn", (5, 3): "fn", (5, 2): "ieee"}.get((e, m), "")
    return e, m, special, not match["unsigned"]


def get_element(name: str) -> ElementType:
    """Element type by name: `int4`, `int8f6` (6 fractional bits), `e2m1`, `e4m3` (which is e4m3fn), `e5m2` (IEEE-like),
    `e4m3fnuz`, `fp8_e5m2`, `ue5m3` (no sign, all ones is NaN), `nf4`, `af4`."""
    if name in _TABLES:
        return _TABLES[name]
    match, fields = _ELEMENT.match(name), float_fields(name)
    if not match:
        raise ValueError(
            f"unknown element type {name!r}; write intB (B = 2..8), eXmY or {' or '.join(_TABLES)}, such as int4, "
            "e4m3, e2m1"
        )
    if fields is None:
        return integer(int(match["int"]), int(match["fraction"] or 0))
    e, m, _, signed = fields
    bits = signed + e + m
    if bits > 8 or (name.startswith("fp8_") and bits != 8):
        raise ValueError(f"{name!r} has {bits} bits; element types have at most 8, and fp8 ones exactly 8")
    return minifloat(*fields, name=f"{'' if signed else 'u'}e{e}m{m}{match['special'] or ''}")


def _parse(name: str) -> Format | None:
    if match := _MX.match(name):
        choices = _MX_ELEMENTS[match["kind"]]
        element = match["element"] or choices[0]
        if element is None or element not in choices:
            return None
        return Format(name, get_element(element), (1, 32), ScaleType("e8m0", match["rule"] or "floor"))
    if name == "nvfp4":
        return Format(name, get_element("e2m1"), (1, 16), ScaleType("e4m3"), tensor_scale=True)
    if match := _K_QUANT.match(name):
        size, scale, rule = _K_QUANTS[int(match["bits"])]
        return Format(name, integer(int(match["bits"])), (1, size), ScaleType(scale, rule), super_group=256)
    match = _NAME.match(name)
    if not match:
        return None
    element, kind = get_element(match["element"]), match["group"]
    if kind == "tensor":
        group = (-1, -1)
    elif kind == "channel":
        group = (1, -1)
    elif kind[0] == "g":
        group = (1, int(kind[1:]))
    else:
        rows, cols = kind[1:].split("x")
        group = (int(rows), int(cols))
    super_group = int(match["super"] or 0)
    is_integer, asym, rule, scale = element.codec.offset_binary, bool(match["asym"]), match["rule"], match["scale"]
    if scale is None:
        scale = "e8m0" if rule in EXPONENT_RULES else "bf16" if is_integer else "f32"
    if rule is None:
        rule = "floor" if scale == "e8m0" else "minmax" if asym else "absmax"
        if is_integer and not (asym or element.fraction or scale == "e8m0"):
            rule = "full_range"
        if scale in ("ue5m3", "u4", "u6", "u8") and rule == "full_range":  # no sign to keep
            rule = "absmax"
    if super_group and asym != (rule == "minmax"):
        return None
    return Format(
        name, element, group, ScaleType(scale, rule), zero_point=asym and not super_group, super_group=super_group
    )


FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Make `fmt` reachable by its name; returns it. ValueError if the name already means something else."""
    if not isinstance(fmt, Format):
        raise TypeError(f"register takes a Format, got {type(fmt).__name__}; names resolve without registration")
    known = FORMATS.get(fmt.name)
    if known is None:
        known = _resolve(fmt.name)
    if known is not None and known != fmt:
        raise ValueError(f"the name {fmt.name!r} already means {known._repr}; choose another name")
    FORMATS[fmt.name] = fmt
    return fmt


@functools.cache
def _resolve(name: str) -> Format | None:
    return _parse(name)


def get_format(fmt: str | Format) -> Format:
    """The Format of a name, registered or parametric; a Format is returned as it is. ValueError for unknown names."""
    if isinstance(fmt, Format):
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"a format is a Format or its name, got {type(fmt).__name__}")
    found = FORMATS.get(fmt) or _resolve(fmt)
    if found is None:
        raise ValueError(
            f"unknown format {fmt!r}; known: {', '.join(FORMATS)}, or any "
            "<element>_<tensor|channel|gN|bRxC>[_asym][_<scale type>[_sN]][_<rule>], such as int3_g64_asym or e3m4_g48"
        )
    return found


def storage_bits(fmt: Format, shape: Shape) -> float:
    """Bits an element of a tensor of `shape`, scales included."""
    return 8 * fmt.nbytes(shape) / max(1, math.prod(shape))


for _name in (
    "int8_channel", "int8_g128", "int4_g128", "int4_g128_asym", "int4_g64", "int4_g32", "int3_g128", "int2_g128",
    "fp8_e4m3_tensor", "fp8_e4m3_channel", "fp8_e4m3_g128", "fp8_e4m3_b128x128", "fp8_e5m2_channel",
    "fp8_e4m3fnuz_channel", "fp8_e5m2fnuz_channel", "mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "nvfp4",
    "mxint8", "nf4_g64", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
):  # fmt: skip
    register(get_format(_name))
