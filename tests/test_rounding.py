"""Stochastic rounding: the random numbers, the decision element by element, and the laws, for every Format and backend.

Expected numbers come from Philox in Python integers and from rational arithmetic on a table of each element type's
values.
"""

import bisect
import functools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRET
from oracle import F32, assert_same, assert_same_parts
from test_laws import NAMES, check_against_oracle, get_format, lay_out, takes_scales, tile_sizes, unit_parts, values

import tritonq as tq
from tritonq import ops, plans, reference, tiling, tuning
from tritonq.codecs import philox, philox_triton

every_format = pytest.mark.parametrize("name", NAMES)
FEW = ("int4_g128", "int4_g128_asym", "mxfp4", "nvfp4", "fp8_e4m3_channel", "fp8_e4m3fnuz_channel", "nf4_g64",
       "e3m0_g32_e8m0_even", "int6f2_g20", "fp8_e4m3_b128x128", "int8_tensor", "int3_g7")  # fmt: skip
K_QUANTS = ("q4_k", "q6_k")
with_super_groups = pytest.mark.parametrize("name", [n for n in NAMES if get_format(n).super_group])
SEEDS = (0, 1, 0x7FFFFFFF, 0x80000000, 0x0123456789ABCDEF, (1 << 63) - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed):
    """The seed that a call with `generator(seed)` draws: one int64 below 2^63 - 1."""
    return int(torch.randint(2**63 - 1, (), generator=generator(seed), dtype=torch.int64))


# -------------------------------------------------------------------------------------------------------- the oracle

# Random123's known answers for philox4x32-10: counter, key, words.
VECTORS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def integers(text):
    return [int(word, 16) for word in text.split()]


def philox_words(key, counter):
    """Salmon et al. 2011, section 3.3, in Python integers."""
    (k0, k1), (x0, x1, x2, x3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b % 2**32, (a >> 32) ^ x3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


@functools.lru_cache(maxsize=1 << 16)
def words_of(seed, counter):
    return philox_words((seed % 2**32, seed >> 32), (counter % 2**32, counter >> 32, 0, 0))


def draws(seed, indices):
    """24-bit numbers of elements: u * 2^24."""
    return [words_of(seed, i // 4)[i % 4] >> 8 for i in indices]


@functools.cache
def table(element, zero):
    """Every finite number of an element type, ascending, float64; integers from code 0 on, less their zero point."""
    if element.ebits:
        positive = oracle.magnitudes(element.ebits, element.mbits, element.special)
        return np.concatenate([-positive[:0:-1], positive])
    if element.values:
        return np.array(element.values)
    return (np.arange(2**element.bits) - float(zero)) / 2**element.fraction


def rounded(t, draw, element, zero):
    """One fp32 number without NaN to a number of the element type; `draw` is u * 2^24."""
    numbers = table(element, zero)
    x = min(max(float(t), numbers[0]), numbers[-1])
    i = bisect.bisect_right(numbers, x) - 1
    lower, upper = float(numbers[i]), float(numbers[min(i + 1, len(numbers) - 1)])
    if element.values:
        up = F32(F32(draw * 2.0**-24) * F32(F32(upper) - F32(lower))) < F32(F32(x) - F32(lower))
    else:
        up = lower < upper and Fraction(draw, 2**24) < (Fraction(x) - Fraction(lower)) / Fraction(upper - lower)
    return math.copysign(upper if up else lower, t) if element.ebits else (upper if up else lower)


def scales_by_group(parts, shape, fmt):
    """(slices of a group, its fp32 factor, zero point, minimum) from parts of the oracle: storage bits, flat."""
    if not fmt.super_group:
        for index, where in oracle.regions(shape, fmt)[2]:
            factor = oracle.load_scale(int(parts.scale[index]), fmt.scale.name)
            if fmt.tensor_scale:
                factor = factor / F32(parts.tensor_scale)
            yield where, factor, int(parts.zero_point[index]), F32(0)
        return
    low, _ = oracle.INTEGERS[fmt.scale.name]
    for index, _, groups in oracle.super_groups(shape, fmt)[3]:
        d, e = (
            oracle.load_scale(int(parts.supers[name][index]), "f16") if name in parts.supers else F32(0)
            for name in ("super_scale", "super_minimum")
        )
        for group, where in groups:
            k = int(parts.scale[group])
            j = int(parts.supers["group_minimum"][group]) if "group_minimum" in parts.supers else 0
            yield where, d * F32(k - 256 if low and k > 127 else k), 0, e * F32(j)


def middle_code(fmt, zero_point=0):
    """The code of 0, or, with minima, of the minimum."""
    return zero_point if oracle.asymmetric(fmt) else 2 ** (fmt.element.bits - 1)


def quantize(x, fmt, seed):
    """As `oracle.quantize`, rounding stochastically: scales and minima do not depend on it."""
    expected = oracle.quantize(x, fmt)
    flat = oracle.to_float32(np.asarray(x, np.float64))
    view, *_ = oracle.regions(flat.shape, fmt)
    flat = flat.reshape(view)
    draw = np.array(draws(seed, range(flat.size)), object).reshape(view)
    codes, result = np.zeros(view, np.int64), np.zeros(view, np.float32)
    for where, factor, zero, minimum in scales_by_group(expected, x.shape, fmt):
        with np.errstate(all="ignore"):
            t = flat[where] + minimum if fmt.minimum else flat[where]
            t = np.nan_to_num((t / factor).astype(np.float32), nan=0.0, posinf=np.inf, neginf=-np.inf)
        middle = middle_code(fmt, zero)
        whole = [rounded(a, b, fmt.element, middle) for a, b in zip(t.ravel(), draw[where].ravel(), strict=True)]
        whole = np.array(whole, np.float32).reshape(t.shape)
        codes[where] = oracle.encode(whole, fmt, F32(1), zero)
        result[where] = oracle.decode(codes[where], fmt, factor, zero)
        if fmt.minimum:
            result[where] -= minimum
    return SimpleNamespace(**{**vars(expected), "codes": codes.reshape(x.shape), "values": result.reshape(x.shape)})


# ---------------------------------------------------------------------------------------------------- random numbers


@triton.jit
def words_kernel(key_ptr, counter_ptr, out_ptr):
    counter = counter_ptr + tl.arange(0, 1)
    w0, w1, w2, w3 = philox_triton.philox(
        tl.load(key_ptr).to(tl.uint32, bitcast=True), tl.load(key_ptr + 1).to(tl.uint32, bitcast=True),
        tl.load(counter).to(tl.uint32, bitcast=True), tl.load(counter + 1).to(tl.uint32, bitcast=True),
        tl.load(counter + 2).to(tl.uint32, bitcast=True), tl.load(counter + 3).to(tl.uint32, bitcast=True),
    )  # fmt: skip
    out = out_ptr + tl.arange(0, 1)
    tl.store(out, w0.to(tl.int32, bitcast=True))
    tl.store(out + 1, w1.to(tl.int32, bitcast=True))
    tl.store(out + 2, w2.to(tl.int32, bitcast=True))
    tl.store(out + 3, w3.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["low", "high", "first", "pitch"])
def uniform_kernel(u_ptr, low, high, first, pitch, COUNTERS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    start = first + tl.arange(0, M).to(tl.int64) * pitch
    fourth = (tl.arange(0, N // 4) * 4).to(tl.int64)
    u = philox_triton.uniform(low, high, start, fourth, COUNTERS)
    tl.store(u_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], u)


@pytest.mark.parametrize("counter,key,words", VECTORS)
def test_known_answers(counter, key, words, device):
    """The oracle's, torch's and Triton's Philox against Random123."""
    counter, key, words = integers(counter), integers(key), integers(words)
    assert philox_words(key, counter) == words
    got = philox.philox(tuple(key), [torch.tensor([c], device=device) for c in counter])
    assert [int(word) & 0xFFFFFFFF for word in got] == words
    if INTERPRET or device == "cuda":
        signed = [torch.tensor(v, device=device).to(torch.int32) for v in (key, counter)]
        out = torch.empty(4, dtype=torch.int32, device=device)
        words_kernel[(1,)](*signed, out)
        assert [int(word) & 0xFFFFFFFF for word in out] == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first,rows,columns,pitch", [
    (0, 2, 64, 64), (0, 8, 16, 20), (5, 8, 16, 21), (2**32 * 4 - 8, 2, 16, 16), (2**40 + 4, 2, 16, 4 * 10**9),
    (3, 4, 8, 8), (7, 1, 8, 8),
])  # fmt: skip
def test_numbers_of_a_window(seed, first, rows, columns, pitch, device):
    """u of every element of a window of a matrix, beyond 2^32 counters too."""
    draw = draws(seed, [first + i * pitch + j for i in range(rows) for j in range(columns)])
    expected = torch.tensor(draw).to(torch.float32).mul(2.0**-24).reshape(rows, columns)
    assert_same(philox.uniform(seed, first, rows, columns, pitch, torch.device(device)).cpu(), expected)
    if INTERPRET or device == "cuda":
        for counters in (1, 2) if first % 4 == 0 == pitch % 4 else (2,):
            u = torch.empty(rows, columns, device=device)
            uniform_kernel[(1,)](u, *philox.halves(seed), first, pitch, counters, rows, columns)
            assert_same(u.cpu(), expected, f"{counters} counters")


def test_numbers_are_uniform():
    """256 bins by chi-square, the mean, and neighbours that know nothing of each other; 8 seeds."""
    for seed in range(8):
        u = philox.uniform(seed << 33, 0, 1, 1 << 16, 1 << 16, torch.device("cpu")).double().ravel()
        assert u.min() >= 0 and u.max() < 1
        counts = torch.histc(u, 256, 0, 1)
        assert abs(float(((counts - 256) ** 2 / 256).sum()) - 255) < 5 * math.sqrt(2 * 255)
        centred = u - 0.5
        assert abs(float(centred.mean())) < 4 / math.sqrt(12 * u.numel())
        for lag in (1, 2, 3, 4, 64):
            assert abs(float((centred[lag:] * centred[:-lag]).mean())) * 12 < 5 / math.sqrt(u.numel())


# --------------------------------------------------------------------------------------------------------- decisions


@every_format
def test_oracle(name, device):
    """Every byte and value, ragged groups, non-finite elements and zeros of both signs included."""
    fmt = get_format(name)
    rows, cols = fmt.group
    cols = min(cols, 64) if cols > 0 else 24
    for i, (columns, kind) in enumerate(((cols + 3, "normal"), (4 * -(-cols // 4), "wide"), (cols, "tiny"))):
        x = values((min(rows, 8) + 1 if rows > 1 else 3, columns), torch.float32, i, kind)
        x[1, :1], x[1, 1:2], x[0, -1] = -0.0, 0.0, -1e-30
        if kind == "normal":
            x[-1, -1] = math.inf
        expected = quantize(x.to(torch.float64).numpy(), fmt, drawn(i))
        parts = ops.quantize(x.to(device), fmt, rounding="stochastic", generator=generator(i))
        y = ops.qdq(x.to(device), fmt, rounding="stochastic", generator=generator(i))
        check_against_oracle(parts, y, expected, fmt, x.dtype)


@takes_scales  # those of super-groups: test_neighbours_in_super_groups
def test_neighbours(name, device):
    """With scale 1: numbers of the type stay, others become one of their two neighbours, both come up, and what lies
    beyond the range saturates."""
    fmt = get_format(name)
    element, middle = fmt.element, 2 ** (fmt.element.bits - 1)
    numbers = table(element, middle)
    exact = np.concatenate([numbers, -numbers[numbers > 0]]) if element.ebits else numbers
    beyond = np.array([numbers[-1] * 1.001, numbers[-1] * 4, 1e30, math.inf, -1e30, -math.inf])
    if element.nan_code >= 0:  # which an infinite element would become under a given scale
        beyond = beyond[np.isfinite(beyond)]
    gaps = np.random.default_rng(0).integers(0, len(numbers) - 1, 400)
    between = numbers[gaps] + (numbers[gaps + 1] - numbers[gaps]) * np.random.default_rng(1).uniform(0.2, 0.8, 400)
    between = between.astype(np.float32)
    x = torch.from_numpy(np.concatenate([exact, beyond, between]).astype(np.float32)).unsqueeze(0).to(device)
    given = {k: v.to(device) for k, v in unit_parts(fmt, tuple(x.shape)).items()}
    y = ops.qdq(x, fmt, **given, rounding="stochastic", generator=generator(3))
    parts = ops.quantize(x, fmt, **given, rounding="stochastic", generator=generator(3))
    assert_same(ops.dequantize(parts, fmt, tuple(x.shape), x.dtype), y)
    y = y.cpu().to(torch.float64).numpy()[0]
    np.testing.assert_array_equal(y[: len(exact)], exact)
    np.testing.assert_array_equal(y[len(exact) : -400], [numbers[-1] if b > 0 else numbers[0] for b in beyond])
    got = y[-400:]
    at = np.searchsorted(numbers, between, side="right") - 1
    lower, upper = numbers[at], numbers[np.minimum(at + 1, len(numbers) - 1)]
    assert ((got == lower) | (got == upper)).all()
    assert 100 < (got == upper).sum() < 300
    if element.ebits and element.special != "fnuz":
        np.testing.assert_array_equal(np.signbit(got), np.signbit(between))


def quotients(x, parts, fmt):
    """(x + minimum) / factor, and the factors and minima, all fp32 numpy [N, K], from the parts of a CPU tensor."""
    g, width = fmt.group[1], x.shape[1]

    def product(integers, supers):
        d = parts[supers].float().repeat_interleave(fmt.super_group // g, 1)[:, : parts[integers].shape[1]]
        return (d * parts[integers].float()).repeat_interleave(g, 1)[:, :width].numpy()

    factor = product("scale", "super_scale")
    minimum = product("group_minimum", "super_minimum") if fmt.minimum else np.zeros_like(factor)
    return (x.numpy() + minimum) / factor, factor, minimum


@with_super_groups
def test_neighbours_in_super_groups(name, device):
    """With the scales and minima of rounding to nearest: quotients that are numbers of the type stay, others become one
    of their two neighbours, both come up, and what lies beyond the range saturates."""
    fmt = get_format(name)
    numbers = table(fmt.element, middle_code(fmt)).astype(np.float32)
    x = values((2, 2 * fmt.super_group + fmt.group[1] + 1), torch.float32, 11)
    x[:, ::5] = ops.qdq(x, fmt)[:, ::5]  # some numbers of the type among them, or next to it
    nearest = {k: v.cpu() for k, v in ops.quantize(x.to(device), fmt).items()}
    t, factor, minimum = quotients(x, nearest, fmt)
    t = np.clip(t, numbers[0], numbers[-1])
    at = np.searchsorted(numbers, t, side="right") - 1
    exact, last = numbers[at] == t, np.minimum(at + 1, len(numbers) - 1)
    lower, upper = (n * factor - minimum for n in (numbers[at], np.where(exact, numbers[at], numbers[last])))
    ups = downs = 0
    for seed in range(2 if INTERPRET else 8):
        parts = ops.quantize(x.to(device), fmt, rounding="stochastic", generator=generator(seed))
        y = ops.qdq(x.to(device), fmt, rounding="stochastic", generator=generator(seed))
        assert_same(ops.dequantize(parts, fmt, tuple(x.shape), x.dtype), y)
        assert_same_parts({k: v.cpu() for k, v in parts.items() if k != "qdata"}, scales_of(nearest))
        y = y.cpu().numpy()
        assert ((y == lower) | (y == upper)).all()
        ups, downs = ups + (y == upper)[~exact].sum(), downs + (y == lower)[~exact].sum()
    assert exact.any() and min(ups, downs) > 0.3 * (ups + downs) > 0


@with_super_groups
def test_unbiased_in_super_groups(name, device):
    """The mean over seeds is x, or the end of the range: of every element within what its own deviation allows, and of
    their sum."""
    if INTERPRET:
        pytest.skip("many programs; the numbers are those of the CPU path")
    fmt, draws = get_format(name), 256
    numbers = table(fmt.element, middle_code(fmt)).astype(np.float64)
    x = values((2, fmt.super_group + fmt.group[1] + 1), torch.float32, 12)
    parts = {k: v.cpu() for k, v in ops.quantize(x.to(device), fmt).items()}
    t, factor, minimum = (a.astype(np.float64) for a in quotients(x, parts, fmt))
    t = np.clip(t, numbers[0], numbers[-1])
    y = [ops.qdq(x.to(device), fmt, rounding="stochastic", generator=generator(s)).double() for s in range(draws)]
    error = (torch.stack(y).mean(0).cpu().numpy() + minimum) / factor - t
    at = np.minimum(np.searchsorted(numbers, t, side="right") - 1, len(numbers) - 2)
    gap = numbers[at + 1] - numbers[at]
    p = (t - numbers[at]) / gap
    deviation = gap * np.sqrt(p * (1 - p) / draws)
    assert (np.abs(error) <= 5 * deviation + 5 * gap / draws).all()
    assert abs((error / gap).sum()) <= 4 * np.sqrt((p * (1 - p) / draws).sum())


@pytest.mark.parametrize("name", FEW)
def test_probability(name, device):
    """Of many elements of one value, the part that goes up is the fraction, within four deviations."""
    fmt = get_format(name)
    numbers = table(fmt.element, 2 ** (fmt.element.bits - 1))
    rng = np.random.default_rng(5)
    count = 1 << 14
    for fraction in (0.001, 0.1, 0.5, 0.77) if not INTERPRET else (0.3,):
        at = int(rng.integers(0, len(numbers) - 1))
        lower, upper = numbers[at], numbers[at + 1]
        value = F32(lower + fraction * (upper - lower))
        x = torch.full((2, count // 2), float(value), device=device)
        given = {k: v.to(device) for k, v in unit_parts(fmt, tuple(x.shape)).items()}
        y = ops.qdq(x, fmt, **given, rounding="stochastic", generator=generator(at))
        p = (float(value) - lower) / (upper - lower)
        ups = int((y.double() == upper).sum())
        assert int((y.double() == lower).sum()) == count - ups
        assert abs(ups - p * count) <= 4 * math.sqrt(p * (1 - p) * count), (lower, upper, fraction)


@pytest.mark.parametrize("name", FEW)
def test_unbiased(name, device):
    """The mean over seeds is x: of every element within what its own deviation allows, and of their sum."""
    if INTERPRET:
        pytest.skip("many programs; the numbers are those of the CPU path")
    fmt, draws = get_format(name), 256
    numbers = table(fmt.element, 2 ** (fmt.element.bits - 1))
    host = np.random.default_rng(8).uniform(numbers[0], numbers[-1], (2, 256)).astype(np.float32)
    x = torch.from_numpy(host).to(device)
    given = {k: v.to(device) for k, v in unit_parts(fmt, (2, 256)).items()}
    y = [ops.qdq(x, fmt, **given, rounding="stochastic", generator=generator(s)).double() for s in range(draws)]
    error = (torch.stack(y).mean(0) - x.double()).cpu().numpy()
    at = np.minimum(np.searchsorted(numbers, host, side="right") - 1, len(numbers) - 2)
    gap = numbers[at + 1] - numbers[at]
    p = (host - numbers[at]) / gap
    deviation = gap * np.sqrt(p * (1 - p) / draws)
    assert (np.abs(error) <= 5 * deviation + 5 * gap / draws).all()
    assert abs((error / gap).sum()) <= 4 * np.sqrt((p * (1 - p) / draws).sum())


# -------------------------------------------------------------------------------------------------------------- laws


@every_format
def test_reference(name, device):
    """Laws 1 and 2, with scales of its own and given, contiguous and transposed."""
    fmt = get_format(name)
    rows, cols = fmt.group[0], fmt.super_group or fmt.group[1]
    for k, layout in ((3 * cols + 5 if cols > 0 else 77, "transposed"), (2 * cols if cols > 0 else 80, "contiguous")):
        x = lay_out(values((min(rows, 16) + 2 if rows > 1 else 3, k), torch.bfloat16, k), layout)
        x[0, 0] = math.nan
        shape, seed = tuple(x.shape), drawn(k)
        expected = reference.quantize(x, fmt, seed=seed)
        parts = ops.quantize(x.to(device), fmt, rounding="stochastic", generator=generator(k))
        assert_same_parts(parts, expected)
        y = ops.dequantize(parts, fmt, shape, x.dtype)
        assert_same(y.cpu(), reference.qdq(x, fmt, seed=seed))
        assert_same(ops.qdq(x.to(device), fmt, rounding="stochastic", generator=generator(k)), y)
        if fmt.super_group:  # takes no given scales
            continue
        given = {k: v for k, v in parts.items() if k != "qdata"}
        x[0, 0] = 0.0  # a given scale says nothing about x
        again = ops.qdq(x.to(device), fmt, **given, rounding="stochastic", generator=generator(k))
        own = reference.quantize(x, fmt, **{k: v.cpu() for k, v in given.items()}, seed=seed)
        assert_same(again.cpu(), reference.dequantize(own, fmt, shape, x.dtype), "given")


@every_format
def test_any_strides(name, device):
    """Law 8: the index of an element is that in the logical tensor, in slabs of four dimensions, too."""
    fmt = get_format(name)
    rows, cols = fmt.group
    ragged = (fmt.super_group + cols + 1, 2 * fmt.super_group) if fmt.super_group else (2 * cols + 1, 4 * cols)
    for last in ragged if 0 < cols < 100 else (50,):
        x = values((2, 2, 3 if rows <= 1 else min(rows, 4) + 1, last), torch.float32, 4)
        expected = reference.quantize(x, fmt, seed=drawn(1))
        layouts = ("swapped", "permuted", "step") if not INTERPRET else ("step" if last % 4 else "swapped",)
        if device == "cuda" and name not in (*FEW, *K_QUANTS):  # each is compiled anew there
            layouts = ("permuted",)
        for layout in layouts:
            strided = lay_out(x, layout).to(device)
            strided = strided if device == "cpu" else lay_out(x.to(device), layout)
            parts = ops.quantize(strided, fmt, rounding="stochastic", generator=generator(1))
            assert_same_parts(parts, expected, layout)
            y = ops.qdq(strided, fmt, rounding="stochastic", generator=generator(1))
            assert_same(y, ops.dequantize(parts, fmt, tuple(x.shape), x.dtype), layout)


@pytest.fixture
def any_plan():
    yield
    plans.forget()


@pytest.mark.parametrize("name", (*FEW, *K_QUANTS))
def test_any_tile(name, device, any_plan, monkeypatch):
    """Law 8: the same bits whatever the tile, and for groups larger than one."""
    fmt = get_format(name)
    rows, cols = fmt.group[0], fmt.super_group or fmt.group[1]
    for k in (3 * cols + 5, 2 * cols) if cols > 0 else (515, 520):
        x = values((rows + 1 if rows > 1 else 5, k), torch.bfloat16, 5)
        expected = reference.quantize(x, fmt, seed=drawn(2))
        for size in tile_sizes():
            monkeypatch.setattr(tiling, "SCRATCH", 48 * size)
            tile = 1 << (size - 1).bit_length()
            monkeypatch.setattr(tuning, "TILE", min(max(64, tile), 1 << (16 if INTERPRET else 14)))
            if size == tile_sizes()[0]:
                monkeypatch.setattr(tuning, "LARGEST_TILE", 256)
            plans.forget()
            parts = ops.quantize(x.to(device), fmt, rounding="stochastic", generator=generator(2))
            assert_same_parts(parts, expected, f"tile {size}")
            y = ops.qdq(x.to(device), fmt, rounding="stochastic", generator=generator(2))
            assert_same(y, ops.dequantize(parts, fmt, tuple(x.shape), x.dtype), f"qdq, tile {size}")
            monkeypatch.undo()
            if INTERPRET:
                monkeypatch.setattr(tuning, "TILE", 1 << 16)


@pytest.mark.parametrize("name,shape", [
    ("int8_channel", (2, 40000)), ("int6_channel", (2, 33333)), ("int4_channel_asym", (1, 140002)),
    ("fp8_e4m3_tensor", (2, 2, 9000)), ("fp8_e4m3_b256x256", (2, 300, 700)), ("nf4_g65536", (2, 70001)),
])  # fmt: skip
def test_groups_larger_than_a_tile(name, shape, device):
    """Rows that are read twice, and groups that go through their keys."""
    fmt, x = get_format(name), values(shape, torch.bfloat16, 7)
    expected = reference.quantize(x, fmt, seed=drawn(7))
    parts = ops.quantize(x.to(device), fmt, rounding="stochastic", generator=generator(7))
    assert_same_parts(parts, expected)
    y = ops.qdq(x.to(device), fmt, rounding="stochastic", generator=generator(7))
    assert_same(y, ops.dequantize(parts, fmt, shape, x.dtype))


def test_candidates(device):
    """Law 8 for tile sizes and slices that the tuner may pick."""
    if device == "cpu" and not INTERPRET:
        pytest.skip("the CPU path has no kernels")
    for name in ("int4_g128", "e3m4_g48", "q4_k"):
        fmt, shape = get_format(name), (2, 384)
        x = values(shape, torch.bfloat16, 1)
        expected = reference.quantize(x, fmt, seed=drawn(1))
        for choice in tuning.candidates("quantize", fmt, *shape, quick=True)[: None if device == "cuda" else 4]:
            plans.forget()
            with tuning.forced("quantize", choice):
                parts = ops.quantize(x.to(device), fmt, rounding="stochastic", generator=generator(1))
                assert_same_parts(parts, expected, str(choice))
    plans.forget()


# ------------------------------------------------------------------------------------- scale search, swizzled scales


def scales_of(parts):
    return {name: part for name, part in parts.items() if name != "qdata"}


@takes_scales  # as every search; super-groups refuse both
def test_search(name, device):
    """The scales are those of a search without it, and rounding is that under given scales; qdq agrees."""
    if INTERPRET and name not in ("mxfp4", "nvfp4", "int3_g7"):
        pytest.skip("many candidates")
    fmt = get_format(name)
    rows, cols = fmt.group
    k = cols + 3 if cols > 0 else 37
    x = values((min(rows, 8) + 1 if rows > 1 else 3, k), torch.bfloat16, 9).to(device)
    importance = torch.linspace(0.5, 2, k, device=device)
    for weights in (None, importance)[: 1 if INTERPRET else 2]:
        search = {"search": "mse", "importance": weights}
        g, twin = generator(3), generator(3)
        q = tq.quantize(x, fmt, **search, rounding="stochastic", generator=g)
        given = scales_of(tq.quantize(x, fmt, **search).parts())
        assert_same_parts(scales_of(q.parts()), given)
        own = {k: v.cpu() for k, v in given.items()}
        assert_same_parts(q.parts(), reference.quantize(x.cpu(), fmt, **own, seed=drawn(3)))
        assert_same(tq.qdq(x, fmt, **search, rounding="stochastic", generator=twin), q.dequantize())
        assert torch.equal(g.get_state(), twin.get_state())
        again = tq.quantize(x, fmt, **search, rounding="stochastic", generator=generator(3), out=tq.quantize(x, fmt))
        assert_same_parts(again.parts(), q.parts())


def test_gradient_with_search(device):
    """Through the scales that were found; it does not depend on the rounding."""
    x = values((3, 64), torch.float32, 3).to(device).requires_grad_()
    grads = []
    for rounding in ("nearest", "stochastic"):
        x.grad = None
        y = tq.qdq(x, "int4_g32", search="mse", rounding=rounding, generator=generator(0))
        (y * torch.arange(64, device=device)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads) and (grads[0][:, 1:] == 0).any()


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "mxfp6_e2m3", "int5_g24_e8m0", "int3_g3_e8m0"])
def test_swizzled(name, device):
    """Swizzled scales come with the codes of plain ones, in tiles and slabs of any shape."""
    fmt = get_format(name)
    cols = fmt.group[1]
    for shape in ((5, 3 * cols + 1), (130, 5 * cols), (2, 3, 2, 4 * cols))[: 1 if INTERPRET else 3]:
        x = values(shape, torch.bfloat16, 2).to(device)
        for view in (x, x.mT.contiguous().mT, x.transpose(0, 1)):
            for search in (None, "mse") if not INTERPRET else (None,):
                plain, got = (
                    ops.quantize(view, fmt, search=search, rounding="stochastic", generator=generator(5), swizzled=s)
                    for s in (False, True)
                )
                assert_same_parts(got, {**plain, "scale": tq.swizzle(plain["scale"])})
    with pytest.raises(ValueError, match="'floor'"):
        ops.quantize(x, fmt, rounding="floor", swizzled=True)


# --------------------------------------------------------------------------------------------------------- the calls


def test_seeds(device):
    """The same seed gives the same bits, another one others; each call draws once; torch.manual_seed reproduces."""
    x = values((4, 256), torch.float32, 1).to(device)

    def codes(**arguments):
        return tq.quantize(x, "int4_g128", rounding="stochastic", **arguments).qdata

    assert torch.equal(codes(generator=generator(1)), codes(generator=generator(1)))
    assert not torch.equal(codes(generator=generator(1)), codes(generator=generator(2)))
    g = generator(1)
    first, second = codes(generator=g), codes(generator=g)
    assert not torch.equal(first, second)
    assert torch.equal(first, codes(generator=generator(1)))
    torch.manual_seed(5)
    first, second = codes(), codes()
    torch.manual_seed(5)
    assert torch.equal(first, codes()) and torch.equal(second, codes())
    torch.manual_seed(5)
    assert torch.equal(codes(generator=generator(5)), codes())
    nearest = tq.quantize(x, "int4_g128")
    assert not torch.equal(nearest.qdata, first)
    before = g.get_state()
    assert torch.equal(tq.quantize(x, "int4_g128", rounding="nearest", generator=g).qdata, nearest.qdata)
    assert torch.equal(g.get_state(), before)
    g, twin = generator(9), generator(9)
    for n in (0, 4):  # also where there is nothing to round
        tq.qdq(x[:n], "int4_g128", rounding="stochastic", generator=g)
        torch.randint(2**63 - 1, (), generator=twin)
    assert torch.equal(g.get_state(), twin.get_state())


@pytest.mark.parametrize("name", (*FEW, *K_QUANTS))
def test_public_calls(name, device):
    """qdq is dequantize of quantize for the same state of the generator."""
    x = values((130, 256), torch.bfloat16, 2).to(device)
    if INTERPRET:
        x = x[:3]
    q = tq.quantize(x, name, rounding="stochastic", generator=generator(4))
    y = tq.qdq(x, name, rounding="stochastic", generator=generator(4))
    assert_same(q.dequantize(), y)
    assert not torch.equal(y, tq.qdq(x, name))


def test_bad_arguments(device):
    x = torch.ones(2, 32, device=device)
    for call in (tq.quantize, tq.qdq, ops.quantize, ops.qdq):
        with pytest.raises(ValueError, match=r"'floor'.*'nearest', 'stochastic'"):
            call(x, "mxfp4", rounding="floor")
        with pytest.raises(TypeError, match=r"torch.Generator.*int"):
            call(x, "mxfp4", rounding="stochastic", generator=3)


def test_no_elements(device):
    for name in ("int4_g128_asym", "nvfp4", "mxfp4", "fp8_e4m3_tensor", "nf4_g64", *K_QUANTS):
        for shape in ((0,), (0, 64), (3, 0)):
            x = torch.zeros(shape, device=device)
            q = tq.quantize(x, name, rounding="stochastic")
            assert tuple(q.shape) == shape == tuple(tq.qdq(x, name, rounding="stochastic").shape)
            assert_same_parts(q.parts(), tq.quantize(x, name).parts())


def test_gradient(device):
    """That of rounding to nearest: 1 inside the range, 0 where a value was clipped."""
    for name in ("int4_g32", "fp8_e4m3_channel", "mxfp4_rceil"):
        x = values((3, 64), torch.float32, 3).to(device).requires_grad_()
        scale = ops.quantize(x.detach() / 2, name)["scale"]
        grads = []
        for rounding in ("nearest", "stochastic"):
            x.grad = None
            y = tq.qdq(x, name, scale=scale, rounding=rounding, generator=generator(0))
            (y * torch.arange(64, device=device)).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


def test_a_seed_makes_no_plan(device):
    """Plans and kernels are kept across seeds, small and large."""
    x = values((2, 256), torch.float32, 1).to(device)
    plans.forget()
    for seed in SEEDS:
        ops._quantize(x, get_format("int4_g128"), None, None, None, seed=seed)
    if INTERPRET or device == "cuda":
        assert plans._encode_plans.cache_info().currsize == 1
    for seed in SEEDS:
        low, high = philox.halves(seed)
        assert -(2**31) <= low < 2**31 and -(2**31) <= high < 2**31
        assert (low % 2**32) | (high % 2**32) << 32 == seed


# ------------------------------------------------------------------------------------------ graphs and compiled kernels

traced = pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")


@traced
@pytest.mark.parametrize("name", (*FEW, *K_QUANTS))
def test_operators(name, device):
    """torch's own checks with a seed; the operator gives the bits of a call that draws it."""
    x, seed = values((4, 256), torch.float32, 1).to(device), torch.tensor(drawn(6))
    operators, given = torch.ops.tritonq, (None, None, None)
    torch.library.opcheck(operators.quantize.default, (x, name, *given, False, None, seed))
    torch.library.opcheck(operators.qdq.default, (x.clone().requires_grad_(), name, *given, seed))
    y = tq.qdq(x, name, rounding="stochastic", generator=generator(6))
    assert_same(operators.qdq(x, name, *given, seed), y)
    assert_same(operators.qdq(x, name, seed=seed), y)
    assert_same(operators.qdq(x, name), tq.qdq(x, name))
    if get_format(name).super_group:  # which refuse a search
        return
    torch.library.opcheck(operators.quantize.default, (x, name), {"search": True, "seed": seed})
    found = ops.quantize(x, name, search="mse", rounding="stochastic", generator=generator(6))
    for part, expected in zip(operators.quantize(x, name, search=True, seed=seed), found.values(), strict=True):
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


@traced
def test_one_graph(device):
    """A compiled call draws a new seed each time, from torch's generator as an eager one does; gradients pass."""

    def step(x):
        y = tq.qdq(x, "int4_g128", rounding="stochastic")
        parts = ops.quantize(x.detach(), "mxfp4", rounding="stochastic")
        found = ops.quantize(x.detach(), "mxfp4", search="mse", rounding="stochastic")
        tiled = ops.quantize(x.detach(), "mxfp4", swizzled=True, rounding="stochastic")
        qdata = tiled["qdata"], found["qdata"], tq.qdq(x.detach(), "mxfp4", search="mse", rounding="stochastic")
        return y, ops.dequantize(parts, "mxfp4", tuple(x.shape), x.dtype), *qdata

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    x = values((4, 256), torch.float32, 1).to(device).requires_grad_()
    results = []
    for call in (compiled, step):
        torch.manual_seed(11)
        with torch._dynamo.config.patch(error_on_recompile=bool(results)):
            results.append([*call(x), *call(x)])
        x.grad = None
        results[-1][0].sum().backward()
        results[-1].append(x.grad)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert not any(torch.equal(results[0][i], results[0][5 + i]) for i in range(5))


@traced
@pytest.mark.parametrize("name", ("int4_g128", "mxfp4", "nvfp4", "fp8_e4m3_channel", "nf4_g64", *K_QUANTS))
@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"))
def test_compiles(target, name, tmp_path):
    """Every kernel, without spills; rows of 4094 elements begin between counters."""
    import test_compile

    fmt, seen = get_format(name), set()
    for shape in ((64, 4096), (64, 4094)) if target == "sm_90" else ((64, 4096),):
        for one in test_compile.record(fmt, shape, torch.bfloat16, rounding="stochastic"):
            if "ROUNDING" in one.constants and one.constants["MODE"] != "scale":
                test_compile.check(one, test_compile.TARGETS[target], tmp_path, 192)
                seen.add(one.constants["ROUNDING"])
                assert one.signature["seed_low"] == one.signature["seed_high"] == "i32"
    assert seen == ({1, 2} if target == "sm_90" else {1})


@traced
def test_nearest_kernels_know_no_seed():
    """Its arguments are compiled away there, and specialise nothing elsewhere."""
    import test_compile

    for one in test_compile.record(get_format("int4_g128"), (64, 4096), torch.bfloat16):
        if "ROUNDING" in one.constants:
            assert one.constants["ROUNDING"] == 0
            names = ("seed_low", "seed_high", "first_index")
            assert all(one.signature[n] == "constexpr" and one.constants[n] is None for n in names)
            assert all(p.do_not_specialize for p in one.kernel.params if p.name in names)
