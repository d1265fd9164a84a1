"""A slow, independent oracle in numpy and Python integers, group by group, from the specification (numerics.md).

It takes nothing from tritonq but the declared fields of a Format: bits, ebits, mbits, special, fraction, values, group,
super_group, scale name and rule. fp32 arithmetic is numpy's fp32 arithmetic; everything else is exact (float64 of few
bits, Fraction, table search).
"""

import bisect
import functools
import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch

F32 = np.float32
F32_MAX = float(np.finfo(np.float32).max)

# --------------------------------------------------------------------------------------------------- element types


def minifloat_value(code, ebits, mbits, special="", signed=True):
    """OCP MX 1.0 section 5.3: (-1)^s 2^(e - bias) (1 + m / 2^M), subnormal at e = 0; bias 2^(X-1) - 1, fnuz +1."""
    bias = 2 ** (ebits - 1) - 1 + (special == "fnuz")
    sign = code >> (ebits + mbits) if signed else 0
    e, m = (code >> mbits) % 2**ebits, code % 2**mbits
    if special == "fnuz" and sign and e == m == 0:
        return math.nan
    if special == "fn" and e == 2**ebits - 1 and m == 2**mbits - 1:
        return math.nan
    if special == "ieee" and e == 2**ebits - 1:
        return math.nan if m else (-1) ** sign * math.inf
    magnitude = Fraction(m, 2**mbits) + (1 if e else 0)
    magnitude *= Fraction(2) ** (max(e, 1) - bias)
    return -float(magnitude) if sign else float(magnitude)


@functools.cache
def magnitudes(ebits, mbits, special=""):
    """Finite values >= 0 by code, float64; code i has value i-th smallest."""
    values = [minifloat_value(c, ebits, mbits, special) for c in range(2 ** (ebits + mbits))]
    values = [v for v in values if math.isfinite(v)]
    assert values == sorted(set(values))
    return np.array(values)


def encode_minifloat(x, ebits, mbits, special="", signed=True):
    """Nearest value of the table, ties to the even code, saturating. x fp32 without NaN; int64 codes."""
    x = np.asarray(x, np.float64)
    table = magnitudes(ebits, mbits, special)
    middle = (table[1:] + table[:-1]) / 2  # exact: few bits
    a = np.abs(x) if signed else np.maximum(x, 0.0)
    code = np.searchsorted(middle, a, side="left")  # middles below a
    tie = (code < len(middle)) & (a == middle[np.minimum(code, len(middle) - 1)])
    code = np.where(tie, code + code % 2, code)
    if signed:
        negative = np.signbit(x) & ((code > 0) if special == "fnuz" else True)
        code = code + (negative.astype(np.int64) << (ebits + mbits))
    return code


def decode_minifloat(code, ebits, mbits, special="", signed=True):
    table = [minifloat_value(c, ebits, mbits, special, signed) for c in range(2 ** (ebits + mbits + signed))]
    return np.array(table, np.float32)[np.asarray(code)]


def nearest(x, values):
    """Codes of the nearest entries of an ascending table in rational arithmetic, ties to the even code, saturating."""
    exact = [Fraction(float(v)) for v in values]
    middle = [(a + b) / 2 for a, b in itertools.pairwise(exact)]
    codes = []
    for number in np.ravel(np.clip(np.asarray(x, np.float64), float(exact[0]), float(exact[-1]))):
        number = Fraction(float(number))
        code = bisect.bisect_left(middle, number)  # middles below it
        tie = code < len(middle) and middle[code] == number
        codes.append(code + code % 2 if tie else code)
    return np.array(codes, np.int64).reshape(np.shape(x))


def element_max(element):
    """Largest finite magnitude: of integers the positive one, (2^(B-1) - 1) / 2^F."""
    if element.values:
        return max(abs(v) for v in element.values)
    if not element.ebits:
        return (2 ** (element.bits - 1) - 1) / 2**element.fraction
    return float(magnitudes(element.ebits, element.mbits, element.special)[-1])


# ----------------------------------------------------------------------------------------------------------- scales

# name: (exponent bits, mantissa bits, kind, sign, bytes)
SCALES = {"e4m3": (4, 3, "fn", True, 1), "ue5m3": (5, 3, "fn", False, 1), "f16": (5, 10, "ieee", True, 2),
          "bf16": (8, 7, "ieee", True, 2)}  # fmt: skip
SCALE_BYTES = {"e8m0": 1, "f32": 4, **{k: v[4] for k, v in SCALES.items()}}
SCALE_NAN = {"e8m0": 0xFF, "e4m3": 0x7F, "ue5m3": 0xFF, "f16": 0x7E00, "bf16": 0x7FC0, "f32": 0x7FC00000}


def store_scale(s, name):
    """Storage bits of an fp32 scale: rounded half to even, saturated, zero becomes the smallest positive number."""
    s = F32(s)
    if name == "f32":
        s = F32(np.clip(s, -F32_MAX, F32_MAX))
        return int(s.view(np.uint32)) if s else 1
    if name == "e8m0":
        mantissa, exponent = math.frexp(float(s))
        assert mantissa == 0.5
        return exponent - 1 + 127
    ebits, mbits, kind, signed, _ = SCALES[name]
    code = int(encode_minifloat(s, ebits, mbits, kind, signed))
    return code if code % 2 ** (ebits + mbits) else 1


def load_scale(bits, name):
    """Value of storage bits, fp32."""
    if name == "f32":
        return np.uint32(bits).view(np.float32)
    if name == "e8m0":
        return F32(math.nan) if bits == 255 else F32(math.ldexp(1.0, bits - 127))
    ebits, mbits, kind, signed, _ = SCALES[name]
    return F32(minifloat_value(bits, ebits, mbits, kind, signed))


def exponent(amax, element, rule):
    """E of 2^(E - 127), from exact arithmetic; MX rules of numerics.md."""
    if amax == 0:
        return 0
    emax = math.frexp(element_max(element))[1] - 1
    a = Fraction(float(amax))
    if rule == "rceil":
        a, emax = Fraction(float(F32(amax) / F32(element_max(element)))), 0
        if a == 0:
            return 0
    e = math.frexp(float(a))[1] - 1  # floor(log2 a)
    if rule == "even":
        steps = 2**element.mbits
        mantissa = Fraction(math.floor(a / Fraction(2) ** e * steps + Fraction(1, 2)), steps)
        e += mantissa >= 2
    elif rule in ("ceil", "rceil"):
        e += a > Fraction(2) ** e
    return min(max(e - emax + 127, 0), 254)


def raw_scale(hi, lo, fmt, tensor_scale=None):
    """fp32 scale, not rounded, of a group with largest and smallest element hi, lo; by the rules of float scales."""
    rule, element = fmt.scale.rule, fmt.element
    amax, levels = max(abs(hi), abs(lo)), 2**element.bits - 1
    with np.errstate(over="ignore"):
        if rule == "minmax":
            return (max(hi, F32(0)) - min(lo, F32(0))) / F32(levels)
        if rule == "full_range":
            m = hi if hi >= -lo else lo
            return -m / F32(2 ** (element.bits - 1))
        if rule == "half_range":
            return amax / F32(levels / 2)
        if tensor_scale is not None:
            return F32(tensor_scale) * amax / F32(element_max(element))
        return amax / F32(element_max(element))


def choose(x, fmt, tensor_scale=None):
    """(storage bits, zero point) of one group, flat fp32."""
    name, rule, element = fmt.scale.name, fmt.scale.rule, fmt.element
    if not np.isfinite(x).all():
        return SCALE_NAN[name], 0
    hi, lo = (F32(x.max()), F32(x.min())) if x.size else (F32(0), F32(0))
    if name == "e8m0":
        return exponent(max(abs(hi), abs(lo)), element, rule), 0
    bits = store_scale(raw_scale(hi, lo, fmt, tensor_scale), name)
    if rule != "minmax":
        return bits, 0
    zero = np.clip(np.rint(-min(lo, F32(0)) / load_scale(bits, name)), 0, 2**element.bits - 1)
    return bits, int(zero)


def choose_tensor_scale(x, fmt):
    """G = scale max * element max / amax over finite elements, a divisor; 1 for a tensor of zeros."""
    finite = np.abs(x[np.isfinite(x)])
    amax = finite.max() if finite.size else F32(0)
    if amax == 0:
        return F32(1)
    with np.errstate(over="ignore"):
        top = F32(448.0 * 6.0) / F32(amax)
    assert fmt.scale.name == "e4m3" and element_max(fmt.element) == 6
    return min(top, F32(F32_MAX))


# ------------------------------------------------------------------------------------------------- groups and tensors


def asymmetric(fmt):
    """Whether codes are 0 .. 2^bits - 1: with a zero point, or with the minima of super-groups."""
    return fmt.zero_point or bool(fmt.super_group and fmt.scale.rule == "minmax")


def encode(x, fmt, factor, zero):
    """Codes (int64, as packed: offset-binary integers) of one group for an fp32 factor; NaN quotients take code 0."""
    element = fmt.element
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        y = (x / factor).astype(np.float32)
    y = np.where(np.isnan(y), F32(0), y)
    if element.ebits:
        code = encode_minifloat(y, element.ebits, element.mbits, element.special)
        nan = {"fn": 2 ** (element.bits - 1) - 1, "fnuz": 2 ** (element.bits - 1)}.get(element.special)
        if element.special == "ieee":
            nan = ((2**element.ebits - 1) << element.mbits) | (1 << (element.mbits - 1))
        if nan is not None and not np.isnan(factor):
            code = np.where(np.isfinite(x), code, nan)
        return code
    if element.values:
        return nearest(y, element.values)
    levels = 2**element.bits - 1
    y = np.clip(np.rint(y.astype(np.float64) * 2**element.fraction), -1e6, 1e6).astype(np.int64)
    return np.clip(y + (zero if asymmetric(fmt) else 2 ** (element.bits - 1)), 0, levels)


def decode(codes, fmt, factor, zero):
    """fp32 values of one group."""
    element = fmt.element
    if element.ebits:
        values = decode_minifloat(codes, element.ebits, element.mbits, element.special)
    elif element.values:  # codes beyond the table stand for its last value
        values = np.array(element.values, np.float32)[np.minimum(codes, len(element.values) - 1)]
    else:
        values = (np.asarray(codes) - (zero if asymmetric(fmt) else 2 ** (element.bits - 1))).astype(np.float32)
        values /= F32(2**element.fraction)
    with np.errstate(over="ignore", invalid="ignore"):
        return values * F32(factor)


def regions(shape, fmt):
    """(scale index, slices into [batch, N, K]) of every group of a tensor of `shape`."""
    rows, cols = fmt.group
    k = shape[-1]
    n = (shape[-2] if len(shape) > 1 else 1) if rows > 1 else math.prod(shape[:-1])
    batch = math.prod(shape[:-2]) if rows > 1 else 1
    if rows == -1:
        return (batch, n, k), 1, [(0, (slice(None),) * 3)]
    c = k if cols == -1 else cols
    down, across = -(-n // rows), 1 if cols == -1 else -(-k // c)
    found = []
    for index in range(batch * down * across):
        b, i, j = index // (down * across), index // across % down, index % across
        found.append((index, (slice(b, b + 1), slice(i * rows, (i + 1) * rows), slice(j * c, (j + 1) * c))))
    return (batch, n, k), batch * down * across, found


def to_float32(x):
    """fp64 saturates; NaN and infinity stay."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isinf(x), x, np.clip(x, -F32_MAX, F32_MAX)).astype(np.float32)


def quantize(x, fmt, scale=None, zero_point=None, tensor_scale=None):
    """Parts of an array: codes (int64, shape of x), scale (storage bits, flat), zero_point (flat), tensor_scale,
    values.

    `scale` (storage bits), `zero_point` and `tensor_scale` given are used verbatim.
    """
    flat = to_float32(np.asarray(x, np.float64))
    if fmt.super_group:
        return quantize_super_groups(flat, fmt)
    view, count, groups = regions(flat.shape, fmt)
    flat = flat.reshape(view)
    codes, values = np.zeros(view, np.int64), np.zeros(view, np.float32)
    bits, zeros = np.zeros(count, np.int64), np.zeros(count, np.int64)
    if fmt.tensor_scale and tensor_scale is None:
        tensor_scale = choose_tensor_scale(flat, fmt)
    for index, where in groups:
        group = flat[where]
        if scale is None:
            bits[index], zeros[index] = choose(group.ravel(), fmt, tensor_scale)
        else:
            bits[index], zeros[index] = scale[index], 0 if zero_point is None else zero_point[index]
        factor = load_scale(int(bits[index]), fmt.scale.name)
        if fmt.tensor_scale:
            factor = factor / F32(tensor_scale)
        codes[where] = encode(group, fmt, factor, zeros[index])
        values[where] = decode(codes[where], fmt, factor, zeros[index])
    return SimpleNamespace(codes=codes.reshape(x.shape), scale=bits, zero_point=zeros, tensor_scale=tensor_scale,
                           values=values.reshape(x.shape))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- super-groups

INTEGERS = {"u4": (0, 15), "u6": (0, 63), "u8": (0, 255), "i6": (-32, 31), "i8": (-128, 127)}


def super_groups(shape, fmt):
    """((batch, n, k), scales, super-scales, [(super index, slices, groups within)]); groups are as in `regions`."""
    view, count, groups = regions(shape, fmt)
    k, per = shape[-1], fmt.super_group // fmt.group[1]
    in_row, across = -(-k // fmt.group[1]), -(-k // fmt.super_group)
    found = []
    for index in range(view[1] * across):
        row, j = divmod(index, across)
        inside = [groups[row * in_row + i] for i in range(j * per, min((j + 1) * per, in_row))]
        where = (slice(0, 1), slice(row, row + 1), slice(j * fmt.super_group, (j + 1) * fmt.super_group))
        found.append((index, where, inside))
    return view, count, view[1] * across, found


def quantize_again(raw, fmt, zero):
    """(storage bits of the super-scale, its value, integers) of the scales or minima of one super-group: the largest
    magnitude takes the end of the range, with the sign that brings it there; `zero` replaces an integer 0."""
    low, high = INTEGERS[fmt.scale.name]
    largest = max(raw, key=lambda s: (abs(s), s))
    bits = store_scale(largest / F32(low or high), "f16")
    value = load_scale(bits, "f16")
    integers = [int(np.clip(np.rint(s / value), low, high)) or zero for s in raw]
    return bits, value, integers


def quantize_super_groups(flat, fmt):
    """As `quantize`; `supers` holds the other parts, flat, as storage bits."""
    shape = flat.shape
    view, count, super_count, found = super_groups(shape, fmt)
    flat = flat.reshape(view)
    codes, values = np.zeros(view, np.int64), np.zeros(view, np.float32)
    names = {"super_scale": super_count}
    if asymmetric(fmt):
        names.update(group_minimum=count, super_minimum=super_count)
    scale, supers = np.zeros(count, np.int64), {name: np.zeros(n, np.int64) for name, n in names.items()}
    for index, where, groups in found:
        if not np.isfinite(flat[where]).all():
            supers["super_scale"][index] = SCALE_NAN["f16"]
            codes[where] = 0 if asymmetric(fmt) else encode(np.zeros(1, np.float32), fmt, F32(1), 0)
            values[where] = math.nan
            if asymmetric(fmt):
                supers["super_minimum"][index] = SCALE_NAN["f16"]
            continue
        ranges = [(F32(flat[w].max()), F32(flat[w].min())) for _, w in groups]
        bits, d, integers = quantize_again([raw_scale(hi, lo, fmt) for hi, lo in ranges], fmt, 1)
        supers["super_scale"][index] = bits
        e, minima = F32(0), [0] * len(groups)
        if asymmetric(fmt):
            bits, e, minima = quantize_again([-min(lo, F32(0)) for _, lo in ranges], fmt, 0)
            supers["super_minimum"][index] = bits
        for (group, w), k, j in zip(groups, integers, minima, strict=True):
            scale[group] = k % 256
            factor, offset = d * F32(k), e * F32(j)
            x = flat[w] + offset if asymmetric(fmt) else flat[w]
            codes[w] = encode(x, fmt, factor, 0)
            values[w] = decode(codes[w], fmt, factor, 0)
            if asymmetric(fmt):
                supers["group_minimum"][group] = j
                values[w] -= offset
    return SimpleNamespace(codes=codes.reshape(shape), scale=scale, supers=supers, values=values.reshape(shape))


def dequantize(codes, fmt, scale, zero_point=None, tensor_scale=None):
    """fp32 values of codes and storage bits."""
    view, _, groups = regions(codes.shape, fmt)
    values, flat = np.zeros(view, np.float32), codes.reshape(view)
    for index, where in groups:
        factor = load_scale(int(scale[index]), fmt.scale.name)
        if fmt.tensor_scale:
            factor = factor / F32(tensor_scale)
        values[where] = decode(flat[where], fmt, factor, 0 if zero_point is None else zero_point[index])
    return values.reshape(codes.shape)


OUTPUTS = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def output(values, dtype):
    """fp32 values rounded once to a dtype (by name), finite ones saturating; the result as float64."""
    target = OUTPUTS[dtype]
    top = F32_MAX if dtype in ("float32", "float64") else float(ml_dtypes.finfo(target).max)
    return np.clip(values, -top, top).astype(target).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------- packing


def pack(codes, bits):
    """One row to bytes: the Python integer sum(code_i << (bits * i)), little-endian, ceil(bits n / 8) bytes."""
    word = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    return word.to_bytes(-(-bits * len(codes) // 8), "little")


def unpack(data, bits, n):
    word = int.from_bytes(bytes(data), "little")
    return [(word >> (bits * i)) % 2**bits for i in range(n)]


def qdata(codes, fmt):
    """Stored bytes [..., ceil(bits K / 8)] of codes; symmetric int8 is stored as two's complement."""
    codes = np.asarray(codes)
    if not (fmt.element.ebits or fmt.element.values or asymmetric(fmt)) and fmt.element.bits == 8:
        codes = (codes - 128) % 256
    rows = [list(pack(row, fmt.element.bits)) for row in codes.reshape(-1, codes.shape[-1])] if codes.size else []
    width = -(-fmt.element.bits * codes.shape[-1] // 8)
    return np.array(rows, np.uint8).reshape(*codes.shape[:-1], width)


# ------------------------------------------------------------------------------------------------------ comparisons


def bits_of(t: torch.Tensor) -> np.ndarray:
    """Raw bits as unsigned integers, every NaN the same."""
    t = t.detach().cpu().contiguous()
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[t.dtype.itemsize]
    raw = (
        t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])
        .numpy()
        .view(unsigned)
    )
    if t.dtype.is_floating_point:
        raw = np.where(torch.isnan(t.to(torch.float64)).numpy(), np.iinfo(unsigned).max, raw)
    return raw


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal dtype, shape and bits; NaNs are equal whatever their payload."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    a, b = bits_of(got), bits_of(expected)
    if not np.array_equal(a, b):
        where = np.argwhere(a != b)
        first = tuple(int(i) for i in where[0])
        raise AssertionError(
            f"{what}: {len(where)} of {a.size} differ, first at {first}: bits {a[first]:#x} instead of {b[first]:#x} "
            f"({got.cpu()[first]} instead of {expected.cpu()[first]})"
        )


def assert_same_parts(got: dict, expected: dict, what: str = "") -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(got[name], expected[name], f"{what} {name}")


def check_replay(x, step):
    """A CUDA graph holds all of step(), which reads x on a GPU and returns tensors: a replay on new data gives what an
    eager call gives."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(x.shape).to(x.dtype) * 3)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)
