"""Element types, scale types and packing against ml_dtypes, torch casts and the tables of `oracle` (laws 3, 4 and 7).

Under TRITON_INTERPRET=1, and on a GPU, the device functions run through a small kernel; elsewhere the torch ones.
"""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRET

from tritonq.codecs import pack as packing
from tritonq.codecs import pack_triton as device_pack
from tritonq.codecs import scale as scales
from tritonq.codecs import scale_triton as device_scales
from tritonq.formats import Format, ScaleType, get_element, get_format, integer, lookup, minifloat

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "e3m4ieee": ml_dtypes.float8_e3m4, "e4m3ieee": ml_dtypes.float8_e4m3,
}  # fmt: skip
TORCH = {
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
# Element types whose value range or kind makes them corners: every X + M <= 7, and the kinds with NaN.
GENERIC = [minifloat(e, m) for e in range(1, 8) for m in range(8) if 1 <= e + m <= 7]
KINDS = [
    minifloat(e, m, kind)
    for e, m, kind in ((2, 1, "fn"), (3, 4, "ieee"), (4, 3, "ieee"), (2, 5, "fnuz"), (3, 2, "fnuz"))
]
INTEGERS = [*(integer(bits) for bits in range(2, 9)), integer(8, 6), integer(8, 7), integer(3, 1)]
# 0 at either end, in the middle, and nowhere near it; midpoints between two fp32 numbers and on one, subnormal numbers,
# neighbours in fp32, the largest one; and counts that do not fill their codes.
TABLES = [
    get_element("nf4"), get_element("af4"), lookup("bits", (0, 1)), lookup("negative", (-4, -1.5, 0)),
    lookup("tiny", (-1e-40, -1e-45, 0, 1e-45, 3e-45, 4e-45, 2e-38, 1)),
    lookup("close", (-1, 0, *(1 + i * 2.0**-23 for i in range(6)), 2**24, 2**24 + 2, 3.4028234e38)),
    lookup("wide", (-7e30, -1, -1e-20, 0, 1e-9)), lookup("seventeen", range(-3, 14)),
    lookup("between", (-22, -21, -16, -10, -8, -3, 0, 1, 7, 11)),  # thresholds in the middle between two cells
    lookup("all", (math.copysign(abs(i / 128) ** 1.7, i) for i in range(-127, 129))),
]  # fmt: skip


def numbers(element, count=None):
    """All finite bf16 values, all representable values and midpoints with their neighbours, and random bit patterns."""
    count = count or 1_000_000
    bf16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)
    if element.ebits:
        table = oracle.magnitudes(element.ebits, element.mbits, element.special)
    elif element.values:
        table = np.array(element.values)
    else:
        table = np.arange(2 ** (element.bits - 1) + 1, dtype=np.float64) / 2**element.fraction
    edges = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype(np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))])
    with np.errstate(over="ignore"):
        near = (rng.standard_normal(count) * float(table[-1]) / 2).astype(np.float32)
    x = np.concatenate([bf16, anything, near, edges, -edges])
    return x[~np.isnan(x)]


@triton.jit
def encode_kernel(x_ptr, code_ptr, value_ptr, zero, n, ELEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0)
    tl.store(code_ptr + i, ELEM.codec.encode(x, zero, None, ELEM), i < n)
    tl.store(value_ptr + i, ELEM.codec.round(x, zero, ELEM), i < n)


@triton.jit
def decode_kernel(x_ptr, code_ptr, value_ptr, zero, n, ELEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(value_ptr + i, ELEM.codec.decode(tl.load(x_ptr + i, i < n, other=0), zero, ELEM), i < n)


@triton.jit
def scale_kernel(x_ptr, code_ptr, value_ptr, zero, n, ELEM: tl.constexpr, BLOCK: tl.constexpr):
    """`ELEM` is a Format here and below."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0)
    bad = x - x != 0.0
    bits, value = device_scales.store(tl.where(bad, 0.0, x), bad, ELEM)
    tl.store(code_ptr + i, bits, i < n)
    tl.store(value_ptr + i, tl.where(bad, float("nan"), value), i < n)


@triton.jit
def exponent_kernel(x_ptr, code_ptr, value_ptr, zero, n, ELEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high, low = device_scales.keys(tl.load(x_ptr + i, i < n, other=0.0), ELEM)
    bits, factor, _, bad = device_scales.choose(high, low, 1.0, ELEM)
    tl.store(code_ptr + i, bits, i < n)
    tl.store(value_ptr + i, tl.where(bad, float("nan"), factor), i < n)


@triton.jit
def load_kernel(x_ptr, code_ptr, value_ptr, zero, n, ELEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(value_ptr + i, device_scales.load(tl.load(x_ptr + i, i < n, other=0), 1.0, ELEM), i < n)


@triton.jit
def pack_kernel(codes_ptr, data_ptr, back_ptr, BITS: tl.constexpr, M: tl.constexpr, COLS: tl.constexpr):
    """Bytes as `pack` returns them, dense or [M, runs, padded bytes of a run], and the codes `unpack` makes of them."""
    cells = tl.arange(0, M)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    data = device_pack.pack(tl.load(codes_ptr + cells), BITS)
    tl.store(back_ptr + cells, device_pack.unpack(data, BITS))
    if 8 % BITS == 0:
        WIDTH: tl.constexpr = COLS * BITS // 8
        tl.store(data_ptr + tl.arange(0, M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], data)
    else:
        PADDED: tl.constexpr = data.shape[2]
        run = tl.arange(0, M)[:, None] * data.shape[1] + tl.arange(0, data.shape[1])[None, :]
        tl.store(data_ptr + run[:, :, None] * PADDED + tl.arange(0, PADDED)[None, None, :], data)


@triton.jit
def quotient_kernel(factor_ptr, wrong_ptr, MODERATE: tl.constexpr, FMT: tl.constexpr, BLOCK: tl.constexpr):
    """Counts dividends 1.0 + k * 2^-23 that `quotient` divides unlike an IEEE division."""
    program, factor = tl.program_id(0), tl.load(factor_ptr + tl.program_id(1))
    x = (0x3F800000 + program * BLOCK + tl.arange(0, BLOCK)).to(tl.float32, bitcast=True)
    b = tl.full([BLOCK], 0.0, tl.float32) + factor
    shift, divisor, inverse, below, correction = device_scales.reciprocal(b, MODERATE, FMT)
    q = device_scales.quotient(x, shift, divisor, inverse, below, correction, MODERATE, FMT)
    wrong = q.to(tl.int32, bitcast=True) != tl.div_rn(x, b).to(tl.int32, bitcast=True)
    tl.atomic_add(wrong_ptr + tl.program_id(1), tl.sum(wrong.to(tl.int32)))


@triton.jit
def bf16_kernel(x_ptr, y_ptr, total_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = tl.load(x_ptr + i, i < n, other=0.0).to(tl.bfloat16)
    tl.store(y_ptr + i, y, i < n)
    tl.store(total_ptr + i, y + y * 0.5, i < n)


def run(x, element, device, zero=0):
    """(codes, rounded values) of a codec on a backend."""
    t = torch.from_numpy(np.array(x, np.float32))
    if device == "cpu" and not INTERPRET:
        code = element.codec.encode_ref(t.clone(), zero, element)
        code = code if code.dtype is torch.uint8 else code.view(torch.int16).to(torch.int32) & 0xFFFF
        return code.numpy().astype(np.int64), element.codec.round_ref(t.clone(), zero, element).numpy()
    return launch(encode_kernel, t, element, device, zero)


def launch(kernel, t, element, device, zero):
    block = 1 << 17 if INTERPRET else 1024
    t = t.to(device)
    code = torch.empty(t.shape, dtype=torch.int32, device=device)
    value = torch.empty(t.shape, dtype=torch.float32, device=device)
    kernel[(-(-t.numel() // block),)](
        t, code, value, float(zero), t.numel(), ELEM=element, BLOCK=block, enable_fp_fusion=False
    )
    return code.cpu().numpy().astype(np.int64), value.cpu().numpy()


def decode(codes, element, device, zero=0):
    if device == "cpu" and not INTERPRET:
        return element.codec.decode_ref(torch.from_numpy(codes.astype(np.uint8)), zero, element).numpy()
    return launch(decode_kernel, torch.from_numpy(codes.astype(np.int32)), element, device, zero)[1]


def same(got, expected):
    """Equal numbers, signs of zero included, NaN equal to NaN."""
    np.testing.assert_array_equal(got, expected)
    kept = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got)[kept], np.signbit(expected)[kept])


@pytest.mark.parametrize(
    "name,moderate", [("int4_g128_f32", False), ("int4_g128_bf16", False), ("nvfp4", False), ("nvfp4", True)]
)
def test_quotient_is_the_ieee_division(name, moderate, device):
    """Divisors are those at the ends, with few bits, and random ones; dividends on a GPU all significands, else the
    first 65536."""
    if device == "cpu" and not INTERPRET:
        pytest.skip("the CPU divides")
    fmt = get_format(name)
    rng = np.random.default_rng(0)
    ends = [0x000000, 0x000001, 0x000002, 0x3FFFFF, 0x400000, 0x400001, 0x555555, 0x6A09E6, 0x7FFFFE, 0x7FFFFF]
    significands = np.array([*ends, *rng.integers(0, 1 << 23, 6 if INTERPRET else 1014)])
    if name == "int4_g128_bf16":
        significands &= 0x7F0000
    exponents = np.resize([127, 126, 70, 180], significands.size)
    signs = np.resize([0, 0, 1], significands.size) << 31 if name != "nvfp4" else 0
    factors = torch.from_numpy((signs + significands + (exponents << 23)).astype(np.uint32).view(np.float32)).to(device)
    wrong = torch.zeros(factors.numel(), dtype=torch.int32, device=device)
    block, programs = (1 << 16, 1) if INTERPRET else (1024, 1 << 13)
    quotient_kernel[(programs, factors.numel())](
        factors, wrong, MODERATE=moderate, FMT=fmt, BLOCK=block, enable_fp_fusion=False
    )
    bad = wrong.nonzero().flatten().tolist()
    assert not bad, [(factors[i].item().hex(), wrong[i].item()) for i in bad[:10]]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_against_ml_dtypes(name, device):
    """All bf16 values, all midpoints, random fp32 values; inputs clamped to +-max, for tritonq saturates."""
    element, dtype = get_element(name), ML_DTYPES[name]
    x = numbers(element)
    top = float(ml_dtypes.finfo(dtype).max)
    assert element.max == top
    expected = np.clip(x, -top, top).astype(dtype)
    codes, rounded = run(x, element, device)
    mask = 2**element.bits - 1
    np.testing.assert_array_equal(codes, expected.view(np.uint8).astype(np.int64) & mask)
    same(rounded, expected.astype(np.float32))


@pytest.mark.parametrize("name", TORCH)
def test_against_torch_casts(name, device):
    """torch's own cast as a second oracle."""
    element = get_element(name)
    x = numbers(element, 20_000)
    expected = torch.from_numpy(x).clamp(-element.max, element.max).to(TORCH[name])
    np.testing.assert_array_equal(run(x, element, device)[0], expected.view(torch.uint8).numpy())
    codes = np.arange(256)
    same(decode(codes, element, device), torch.arange(256, dtype=torch.uint8).view(TORCH[name]).float().numpy())


@pytest.mark.parametrize("element", GENERIC + KINDS, ids=lambda e: e.name)
def test_any_minifloat(element, device):
    """Law 4 for every eXmY: encode, round and decode against a search of the table; no code beyond max."""
    spec = (element.ebits, element.mbits, element.special)
    x = numbers(element, 5_000)
    codes, rounded = run(x, element, device)
    expected = oracle.encode_minifloat(x, *spec)
    np.testing.assert_array_equal(codes, expected)
    same(rounded, oracle.decode_minifloat(expected, *spec))
    assert np.abs(rounded).max() == element.max
    every = np.arange(2**element.bits)
    same(decode(every, element, device), oracle.decode_minifloat(every, *spec))


@pytest.mark.parametrize("element", INTEGERS, ids=lambda e: e.name)
def test_integers(element, device):
    """code = clamp(rne(x * 2^F) + z, 0, 2^b - 1) for every zero point; decode is its inverse; 0 is never negative."""
    levels, unit = 2**element.bits - 1, 2.0**-element.fraction
    x = numbers(element, 20_000)
    middle = 2 ** (element.bits - 1)
    for zero in (middle,) if INTERPRET else sorted({0, 1, middle, levels}):
        codes, rounded = run(x, element, device, zero)
        expected = np.rint(np.clip(x.astype(np.float64), -1e9, 1e9) / unit)
        expected = np.clip(expected + zero, 0, levels).astype(np.int64)
        np.testing.assert_array_equal(codes, expected)
        same(rounded, ((expected - zero) * unit).astype(np.float32))
        every = np.arange(levels + 1)
        same(decode(every, element, device, zero), ((every - zero) * unit).astype(np.float32))


def test_mx_int8():
    """OCP MX 1.0 section 5.3.4: INT8 is two's complement with an implied scale of 2^-6, from -2 to 1 63/64."""
    element = get_format("mxint8").element
    assert (element.max, element.emax, element.bits, element.dtype) == (1.984375, 0, 8, torch.int8)
    spec = {1.0: 0x40, -1.0: 0xC0, 1.984375: 0x7F, -2.0: 0x80, 0.015625: 0x01, -0.015625: 0xFF, 0.0: 0x00}
    codes = element.codec.encode_ref(torch.tensor(list(spec)), element.zero_code, element)
    assert (codes ^ 0x80).tolist() == list(spec.values())


@pytest.mark.parametrize("element", TABLES, ids=lambda e: e.name)
def test_tables(element, device):
    """Law 4 for tables: the nearest value, ties to the even code, over all midpoints with their neighbours in fp32."""
    x = numbers(element, 1_000)[-8_000:] if len(element.values) > 16 else numbers(element, 3_000)
    x = np.concatenate([x, np.float32([np.inf, -np.inf, 0.0, -0.0])])
    codes, rounded = run(x, element, device)
    expected = oracle.nearest(x, element.values)
    np.testing.assert_array_equal(codes, expected)
    table = np.array(element.values, np.float32)
    same(rounded, table[expected])
    every = np.arange(2**element.bits)
    same(decode(every, element, device), table[np.minimum(every, len(table) - 1)])


@pytest.mark.parametrize("element", TABLES, ids=lambda e: e.name)
def test_thresholds(element):
    """The fp32 number at a threshold rounds down and the next one up, by comparing exact distances."""
    values = [Fraction(v) for v in element.values]
    assert len(element.thresholds) == len(values) - 1 and list(element.thresholds) == sorted(set(element.thresholds))

    def nearest(x):
        return min(range(len(values)), key=lambda code: (abs(Fraction(float(x)) - values[code]), code % 2))

    for code, threshold in enumerate(np.float32(element.thresholds)):
        assert nearest(threshold) == code and nearest(np.nextafter(threshold, np.float32(np.inf))) == code + 1


@pytest.mark.parametrize("element", TABLES, ids=lambda e: e.name)
def test_cells(element):
    """No two thresholds share a cell."""
    assert (element.cells is not None) == (element.name in ("nf4", "af4", "seventeen", "between"))
    if element.cells is not None:
        scale, cells = element.cells
        assert math.frexp(scale)[0] == 0.5 and list(cells) == sorted(set(cells))
        assert cells[-1] - cells[0] < 4 << element.bits
        magic = np.float32(1.5 * 2**23 - cells[0])  # exact, as are products with the scale: a sum of fp32 rounds once
        sums = np.float32(element.thresholds) * np.float32(scale) + magic
        assert list(cells) == [int(total) - int(magic) for total in sums]


@triton.jit
def masked_kernel(x_ptr, finite_ptr, code_ptr, n, ELEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, finite = tl.load(x_ptr + i, i < n, other=0.0), tl.load(finite_ptr + i, i < n, other=0) != 0
    ZERO: tl.constexpr = ELEM.zero_code
    tl.store(code_ptr + i, ELEM.codec.encode(x, ZERO, finite, ELEM), i < n)


@pytest.mark.parametrize("element", [*TABLES, *INTEGERS], ids=lambda e: e.name)
def test_encode_gives_zero_where_not_finite(element, device):
    """Where `finite` is false, the code is that of 0 whatever x is; elsewhere nothing changes."""
    if device == "cpu" and not INTERPRET:
        pytest.skip("concerns device functions; run with TRITON_INTERPRET=1 or on a GPU")
    x = np.concatenate([np.float32([np.nan, np.inf, -np.inf, 1e30, -1e30]), numbers(element, 100)[-250:]])
    finite = np.isfinite(x) & (np.arange(x.size) % 3 != 0)
    code = torch.empty(x.size, dtype=torch.int32, device=device)
    masked_kernel[(1,)](
        torch.from_numpy(x).to(device), torch.from_numpy(finite.astype(np.int32)).to(device), code, x.size,
        ELEM=element, BLOCK=256, enable_fp_fusion=False,
    )  # fmt: skip
    expected, _ = run(np.where(np.isfinite(x), x, 0), element, device, element.zero_code)
    np.testing.assert_array_equal(code.cpu().numpy(), np.where(finite, expected, element.zero_code))


def test_nf4_is_that_of_bitsandbytes():
    """bitsandbytes' create_normal_map: quantiles of the normal distribution, 8 above 0 and 7 below, over the largest.

    Its constants came out of single precision, so they are 1e-7 off the formula; the QLoRA paper lists the same ones.
    """
    quantile = torch.special.ndtri
    above = quantile(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    formula = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()
    values = get_element("nf4").values
    np.testing.assert_allclose(values, formula.numpy(), atol=2e-7)
    assert (values[0], values[7], values[15]) == (-1.0, 0.0, 1.0)
    printed = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
               -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
               0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
               1.0]  # fmt: skip
    assert list(values) == printed and [float(np.float32(v)) for v in printed] == printed
    boundaries = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
                  -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
                  0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683, 0.5016634166240692,
                  0.6427869200706482, 0.8614784181118011]  # fmt: skip
    # dQuantizeNF4 compares with these rounded midpoints, so the two differ within an fp32 neighbour of a midpoint only.
    thresholds = np.float32(get_element("nf4").thresholds)
    assert (np.abs(thresholds.view(np.int32) - np.float32(boundaries).view(np.int32)) <= 1).all()


def test_af4_halves_its_cells():
    """Yoshida 2023: with the values -1, 0 and 1 fixed, the others halve the probability of their cell, which ends at 0
    or halfway to the neighbour, for x / absmax over 64 normal numbers."""
    group, values = 64, torch.tensor(get_element("af4").values, dtype=torch.float64)
    absmax = torch.linspace(1e-3, 9, 20_001, dtype=torch.float64)
    normal = torch.special.ndtr
    inside = 2 * normal(absmax) - 1
    density = group * inside ** (group - 1) * 2 * torch.exp(-(absmax**2) / 2) / math.sqrt(2 * math.pi)

    def below(x):  # P(0 <= an element that is not the largest <= x), for either sign
        return float(torch.trapezoid((normal(absmax * x) - 0.5) / inside * density, absmax))

    for code in (*range(1, 7), *range(8, 15)):
        lower, upper = (values[code - 1] + values[code]) / 2, (values[code] + values[code + 1]) / 2
        lower, upper = (lower, 0.0) if code == 6 else (0.0, upper) if code == 8 else (lower, upper)
        assert abs(below(values[code]) - below(lower) - (below(upper) - below(values[code]))) < 1e-7


# ----------------------------------------------------------------------------------------------------------- scales


def scale_format(name, rule="absmax", element=None):
    return Format(f"test_{name}_{rule}", element or get_element("e2m1"), (1, 16), ScaleType(name, rule))


def store(x, fmt, device):
    """Storage bits and fp32 values of fp32 scales on a backend."""
    t = torch.from_numpy(np.array(x, np.float32))
    if device == "cpu" and not INTERPRET:
        stored = scales.store(t, ~torch.isfinite(t), fmt.scale)
        value = scales.load(stored, fmt)
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[fmt.scale.dtype.itemsize]
        bits = stored.view(width).numpy().astype(np.int64) % 2 ** (8 * fmt.scale.dtype.itemsize)
        return bits, value.numpy()
    bits, value = launch(scale_kernel, t, fmt, device, 0)
    return bits % 2 ** (8 * fmt.scale.dtype.itemsize), value


@pytest.mark.parametrize("name", ["e4m3", "ue5m3", "f16", "bf16", "f32"])
def test_scale_storage(name, device):
    """Rounded half to even, saturated, zero to the smallest positive number, non-finite to NaN. Only full_range has
    negative ones."""
    signed = name != "ue5m3"
    fmt = scale_format(name, "full_range", get_element("int4")) if signed else scale_format(name)
    x = np.concatenate(
        [numbers(get_element("e5m2"), 20_000), np.float32([np.nan, 114688, 1e5, 122880, 65504, 65519, 448, 464])]
    )
    if not signed:
        x = x[~(x < 0)]
    bits, value = store(x, fmt, device)
    finite = np.isfinite(x)
    assert np.isnan(value[~finite]).all()
    a = x[finite]
    if name == "f32":
        expected = np.where(a == 0, np.float32(2.0**-149), a)
    else:
        dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(name)
        if dtype is None:  # ue5m3: only the table knows it
            code = oracle.encode_minifloat(a, 5, 3, "fn", False)
            expected = oracle.decode_minifloat(code, 5, 3, "fn", False)
            np.testing.assert_array_equal(bits[finite], np.maximum(code, 1))
        else:
            top = float(ml_dtypes.finfo(dtype).max)
            expected = np.clip(a, -top, top).astype(dtype).astype(np.float32)
        tiny = {"e4m3": 2.0**-9, "ue5m3": 2.0**-17, "f16": 2.0**-24, "bf16": 2.0**-133}[name]
        expected = np.where(expected == 0, np.float32(tiny), expected)
    np.testing.assert_array_equal(value[finite], expected)
    nan = {oracle.SCALE_NAN[name]} if name != "f32" else {0x7FC00000}
    assert set(bits[~finite].tolist()) <= nan


def test_ue5m3_by_hand(device):
    """Bias 15, max 114688 (0xFE), 0xFF is NaN; ties carry into the exponent; subnormals round to even."""
    cases = {1.0: 0x78, 114688.0: 0xFE, 1e9: 0xFE, 1.9375: 0x80, 1.0625: 0x78, 1.1875: 0x7A, 2.0**-17: 0x01, 1.5 *
2.0**-17: 0x02,              2.0**-14: 0x08, 7.5 * 2.0**-17: 0x08, 2.0**-18: 0x01, math.nan: 0xFF}  # fmt: skip
    bits, value = store(list(cases), scale_format("ue5m3"), device)
    assert bits.tolist() == list(cases.values())
    assert value[1] == 114688 and np.isnan(value[-1])


RULES = [("e2m1", "ceil"), *itertools.product(("e2m1", "e4m3", "e5m2", "int8", "e3m0"), ("floor", "even", "rceil"))]


@pytest.mark.parametrize("element,rule", RULES)
def test_e8m0_rules(element, rule, device):
    """The exponent rules on powers of two, their neighbours, subnormals and random magnitudes, by exact arithmetic."""
    element = get_element(element)
    fmt = scale_format("e8m0", rule, element)
    powers = np.exp2(np.arange(-149, 128, 3.0)).astype(np.float32)
    rng = np.random.default_rng(1)
    anything = rng.integers(0, 0x7F800000, 300, dtype=np.uint32).view(np.float32)
    mantissas = np.float32([1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.9921875, 1.99609375])
    a = np.concatenate([powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf)), anything,
                        mantissas, np.nextafter(mantissas, np.float32(0)), np.float32([0, oracle.F32_MAX, 448, 6,
                                                                                       127])])  # fmt: skip
    expected = np.array([oracle.exponent(v, element, rule) for v in a])
    if device == "cpu" and not INTERPRET:
        t = torch.from_numpy(a)
        stored, _ = scales.choose(t, -t, fmt, None)
        bits, value = stored.view(torch.uint8).numpy().astype(np.int64), scales.load(stored, fmt).numpy()
    else:
        bits, value = launch(exponent_kernel, torch.from_numpy(a), fmt, device, 0)
    np.testing.assert_array_equal(bits, expected)
    np.testing.assert_array_equal(value, np.ldexp(np.float64(1), expected - 127).astype(np.float32))


def test_e8m0_decodes_as_ml_dtypes(device):
    """Every byte, 0 being 2^-127 and 0xFF NaN."""
    every = np.arange(256, dtype=np.uint8)
    fmt = scale_format("e8m0", "floor")
    if device == "cpu" and not INTERPRET:
        value = scales.load(torch.from_numpy(every).view(torch.float8_e8m0fnu), fmt).numpy()
    else:
        value = launch(load_kernel, torch.from_numpy(every.astype(np.int32)), fmt, device, 0)[1]
    np.testing.assert_array_equal(value, every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize("name", ["e4m3", "ue5m3", "f16", "bf16"])
def test_every_stored_scale_decodes(name, device):
    ebits, mbits, kind, signed, size = oracle.SCALES[name]
    every = np.arange(2 ** (8 * size))
    if device == "cpu" and not INTERPRET:
        raw = torch.from_numpy(
            every.astype(np.uint8 if size == 1 else np.uint16).view(np.uint8 if size == 1 else np.int16)
        )
        value = scales.load(raw.view(scale_format(name).scale.dtype), scale_format(name)).numpy()
    else:
        value = launch(load_kernel, torch.from_numpy(every.astype(np.int32)), scale_format(name), device, 0)[1]
    if kind == "ieee":
        dtype = np.float16 if name == "f16" else ml_dtypes.bfloat16
        expected = every.astype(np.uint16).view(dtype).astype(np.float32)
    else:
        expected = oracle.decode_minifloat(every, ebits, mbits, kind, signed)
    np.testing.assert_array_equal(value, expected)


# ---------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing(bits, device):
    """Law 3: a dense LSB-first bitstream, ceil(bits n / 8) bytes a row, for any n; unpack(pack(codes)) == codes."""
    rng = np.random.default_rng(bits)
    if device == "cpu" and not INTERPRET:
        for n, rows in itertools.product((1, 2, 3, 7, 8, 9, 17, 64, 131), (1, 3)):
            codes = rng.integers(0, 2**bits, (rows, n), dtype=np.uint8)
            packed = packing.pack(torch.from_numpy(codes), bits)
            assert packed.shape == (rows, -(-bits * n // 8))
            for row, data in zip(codes, packed.numpy(), strict=True):
                assert bytes(data) == oracle.pack(row, bits)
            np.testing.assert_array_equal(packing.unpack(packed, bits, n).numpy(), codes)
        return
    n, per, width = 256, *packing.chunk(bits)
    padded = width if 8 % bits == 0 else (4 if bits == 6 else 8)
    codes = rng.integers(0, 2**bits, (2, n)).astype(np.int32)
    data = torch.zeros(2 * n // per * padded, dtype=torch.int32, device=device)
    back = torch.zeros((2, n), dtype=torch.int32, device=device)
    pack_kernel[(1,)](torch.from_numpy(codes).to(device), data, back, BITS=bits, M=2, COLS=n)
    rows = data.cpu().numpy().reshape(2, n // per, padded)
    assert not rows[..., width:].any()
    for row, got in zip(codes, rows[..., :width].reshape(2, -1), strict=True):
        assert bytes(got.tolist()) == oracle.pack(row, bits)
    np.testing.assert_array_equal(back.cpu().numpy(), codes)


def test_packing_every_code():
    """Law 3 for every code at every position of a run."""
    for bits in range(2, 9):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(9)
        for shift in range(8):
            turned = codes.roll(shift)
            assert torch.equal(packing.unpack(packing.pack(turned, bits), bits, turned.numel()), turned)


def test_packing_leaves_strided_input_alone():
    codes = torch.arange(60, dtype=torch.uint8).reshape(6, 10) % 8
    view = codes.t()[:, ::2]
    before = codes.clone()
    packed = packing.pack(view, 3)
    assert torch.equal(packed, packing.pack(view.contiguous(), 3)) and torch.equal(codes, before)


@pytest.mark.skipif(not INTERPRET, reason="concerns Triton's interpreter; run with TRITON_INTERPRET=1")
def test_interpreter_shim():
    """numerics.md trap 4: fp32 to bf16 rounds half to even, and bf16 arithmetic is arithmetic."""
    x = torch.from_numpy(numbers(get_element("e5m2"), 20_000))
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    total = torch.empty(x.shape, dtype=torch.bfloat16)
    bf16_kernel[(1,)](x, y, total, x.numel(), BLOCK=1 << 18)
    assert torch.equal(y, x.to(torch.bfloat16))
    assert torch.equal(total.isnan(), (y + y * 0.5).isnan())
    assert torch.equal(total.nan_to_num(), (y + y * 0.5).nan_to_num())
