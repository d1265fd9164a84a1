"""Laws 1 to 8 of numerics.md over every Format, listed or not, on every backend (see conftest).

Expected values come from `oracle` on small tensors, and from `tritonq.reference` (law 2) on larger ones.
"""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from conftest import INTERPRET
from fake_device import FakeDevice
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import assert_same, assert_same_parts

from tritonq import formats, memory, ops, plans, reference, scheduler, tiling, tuning
from tritonq.formats import FORMATS, Format, ScaleType, lookup

UNLISTED = (
    "e3m4_g48", "int5_g20", "int3_g7", "int3_g64_asym", "e2m0_g16", "e1m2_b3x5", "int6_channel", "int4_tensor_asym",
    "int3_g3_asym", "e5m1_b16x16_f16", "mxfp4_rceil", "mxfp8_ceil", "mxfp4_even", "int4_g128_half_range",
    "int8_channel_absmax", "e4m3_g32_ue5m3", "e3m0_g32_e8m0_even", "int4_g128_f16", "fp8_e4m3_channel_bf16",
    "int8_g32_e8m0_floor", "int7_b2x6_absmax", "e4m3ieee_g16_e4m3", "int2_tensor", "e1m0_g5", "int8_g16_asym",
    "int4_g3", "int2_g3_asym", "e2m3_g3", "int8_g3", "int4_g1", "nf4_channel", "nf4_b16x16", "nf4_g48_bf16", "af4_g64",
    "mxint8_rceil", "int6f2_g20", "nf4_g32_e8m0_even", "e2m1_g16_u8_s64", "int8_g8_asym_u4_s32", "int3_g4_i6_s8",
    "fp8_e4m3_g64_u6_s64", "int8_g32_i8_s128", "nf4_g16_u4_s128", "int4_g16_u6_s32_half_range",
    "int5_g96", "int6_g80_asym", "int3_g96_f16", "int2_g56",
)  # fmt: skip
# Tables of a user: 3 bits, subnormal values among them; 3 bits of which 3 codes are not used; 8 bits.
TABLES = {fmt.name: fmt for fmt in (
    Format("table8_g24", lookup("table8", (-3, -1.5, -0.4, 0, 1e-40, 0.7, 2, 5.1)), (1, 24)),
    Format("table5_channel", lookup("table5", (-1, -0.25, 0, 0.3, 0.9)), (1, -1), ScaleType("f16")),
    Format("table256_g32", lookup("table256", (math.copysign(abs(i / 128) ** 1.7, i) for i in range(-127, 129))),
           (1, 32), ScaleType("e8m0", "floor")),
)}  # fmt: skip
NAMES = tuple(dict.fromkeys((*FORMATS, *UNLISTED, *TABLES)))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def get_format(name):
    """As `formats.get_format`; knows TABLES, which stay out of the registry."""
    return TABLES.get(name) or formats.get_format(name)


every_format = pytest.mark.parametrize("name", NAMES)
# Formats with super-groups take no given scales; test_super_groups.py has these laws for them.
takes_scales = pytest.mark.parametrize("name", [n for n in NAMES if not get_format(n).super_group])


def examples(device, native, interpreted):
    """Deterministic hypothesis settings; interpreted programs are slow,
    and on a GPU a new shape may compile a kernel."""
    return settings(
        max_examples=interpreted if INTERPRET or device == "cuda" else native, derandomize=True, deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- inputs


def values(shape, dtype, seed, kind="normal"):
    """A tensor: "normal", "wide" (any magnitude of the dtype), "ties" (of halves), "top" (near the max), "tiny"."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    info = torch.finfo(dtype)
    if kind == "wide":
        low, high = math.log2(info.tiny) - 8, math.log2(info.max) - 1
        x = np.sign(x) * np.exp2(rng.uniform(low, high, size=tuple(1 for _ in shape)) + rng.uniform(-8, 0.9, shape))
    elif kind == "ties":
        x = np.rint(4 * x) / 2
    elif kind == "top":
        x = np.sign(x) * float(info.max) * np.where(np.abs(x) > 1.0, 1.0, rng.uniform(0.5, 1.0, shape))
    elif kind == "tiny":
        x = np.rint(3 * x) * info.smallest_normal * info.eps
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).reshape(shape)


def lay_out(x, layout):
    """The same values with other strides."""
    if layout == "step":  # every second element, every third row, from an offset
        wide = x.new_zeros(*(2 * s + 1 for s in x.shape))
        view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "permuted" and x.ndim >= 3:
        order = [x.ndim - 1, *range(x.ndim - 1)]
        return x.permute(order).contiguous().permute([*range(1, x.ndim), 0])
    if layout == "swapped" and x.ndim >= 3:
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "expanded":
        return x[..., :1].expand(x.shape)
    if layout == "expanded_rows" and x.ndim >= 2:
        return x[..., :1, :].expand(x.shape)
    return x.contiguous()


LAYOUTS = ("contiguous", "transposed", "step", "permuted", "swapped", "expanded", "expanded_rows")
KINDS = ("normal", "wide", "ties", "top", "tiny")


@st.composite
def tensors(draw, fmt, layouts=LAYOUTS, kinds=KINDS, limit=6000):
    """Any floating tensor of 1 to 4 dimensions that `fmt` takes, ragged last groups included."""
    rows, cols = fmt.group
    cols = fmt.super_group or (cols if cols > 0 else draw(st.sampled_from((8, 33, 64))))
    sizes = {1, 2, max(1, cols - 1), cols, cols + 1, 2 * cols, 2 * cols + 3, 5}
    if fmt.super_group:  # whole groups in the last super-group, of which one is short
        sizes |= {cols + fmt.group[1], 3 * fmt.group[1]}
    k = draw(st.sampled_from(sorted(sizes)))
    lead = draw(st.lists(st.integers(1, 4), min_size=1 if rows > 1 else 0, max_size=3))
    if rows > 1:
        lead[-1] = draw(st.sampled_from((1, rows - 1, rows, rows + 2)))
    while math.prod(lead) * k > limit and len(lead) > 1:
        del lead[0]
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(layouts))
    x = values((*lead, k), dtype, draw(st.integers(0, 1000)), draw(st.sampled_from(kinds)))
    return lay_out(x, layout)


def storage_bits(scale):
    """Raw storage bits of scales, flat int64, NaN canonical as the oracle writes it."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.dtype.itemsize]
    return scale.cpu().contiguous().view(width).numpy().astype(np.int64).ravel() % 2 ** (8 * scale.dtype.itemsize)


def check_against_oracle(parts, y, expected, fmt, dtype):
    """Stored bytes, scales and values of a backend against the oracle's."""
    if fmt.super_group:
        for key, bits in {"scale": expected.scale, **expected.supers}.items():
            np.testing.assert_array_equal(storage_bits(parts[key]), bits, key)
    else:
        got = storage_bits(parts["scale"])
        name = fmt.scale.name
        nan = np.array([math.isnan(oracle.load_scale(int(b), name)) for b in got], bool)
        got = np.where(nan, oracle.SCALE_NAN[name], got)
        np.testing.assert_array_equal(got, expected.scale, "scale")
    if fmt.zero_point:
        np.testing.assert_array_equal(parts["zero_point"].cpu().numpy().ravel(), expected.zero_point, "zero point")
    if fmt.tensor_scale:
        assert float(parts["tensor_scale"]) == float(expected.tensor_scale)
    data = parts["qdata"].cpu().view(torch.uint8).numpy()
    np.testing.assert_array_equal(data, oracle.qdata(expected.codes, fmt), "qdata")
    target = oracle.output(expected.values, str(dtype).removeprefix("torch."))
    got = y.cpu().to(torch.float64).numpy()
    np.testing.assert_array_equal(got, target, "values")
    numbers = ~np.isnan(target)
    np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(target)[numbers], "signs")


# ----------------------------------------------------------------------------------------------------------- laws


@every_format
def test_qdq_is_dequantize_of_quantize(name, device):
    """Law 1, and the parts that Format.storage promises; law 2 against reference on the same input."""
    fmt = get_format(name)

    @examples(device, 60, 5)
    @given(tensors(fmt))
    def check(x):
        expected = reference.quantize(x, fmt)
        x = x.to(device)
        parts = ops.quantize(x, fmt)
        shape = tuple(x.shape)
        assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == fmt.storage(shape)
        assert_same_parts(parts, expected)
        y = ops.dequantize(parts, fmt, shape, x.dtype)
        assert_same(ops.qdq(x, fmt), y, "qdq")
        assert_same(y.cpu(), reference.dequantize(expected, fmt, shape, x.dtype), "dequantize")
        assert bool(torch.isfinite(y).all()), "finite input gives finite output"

    check()


@every_format
def test_oracle(name, device):
    """Law 2: every byte and value is what the specification says."""
    fmt = get_format(name)

    @examples(device, 40, 3)
    @given(tensors(fmt, limit=600))
    def check(x):
        expected = oracle.quantize(x.to(torch.float64).numpy(), fmt)
        parts = ops.quantize(x.to(device), fmt)
        check_against_oracle(parts, ops.qdq(x.to(device), fmt), expected, fmt, x.dtype)

    check()


@takes_scales
def test_packed_bytes_decode(name, device):
    """Law 3: rows take ceil(bits n / 8) bytes of an LSB-first bitstream; any code and scale decodes by the book."""
    fmt = get_format(name)
    element = fmt.element
    rows, k = (2, 2 ** min(7, element.bits) + 3) if not INTERPRET else (1, 2**element.bits + 3)
    codes = np.resize(np.random.default_rng(0).permutation(2**element.bits), (rows, k))
    if element.special == "ieee":  # infinity is never written
        codes = np.where(codes % 2 ** (element.bits - 1) == (2**element.ebits - 1) << element.mbits, 0, codes)
    shapes = fmt.storage((rows, k))
    assert shapes["qdata"][0][-1] == -(-element.bits * k // 8)
    count = math.prod(shapes["scale"][0])
    scale_name = fmt.scale.name
    choices = [1, 3, oracle.SCALE_NAN[scale_name]] + [oracle.store_scale(s, scale_name) for s in (0.125, 1, 2, 64)]
    scale = np.resize(choices, count)
    zero = np.resize(np.arange(2**element.bits), count) if fmt.zero_point else None
    data = torch.from_numpy(oracle.qdata(codes, fmt))
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[oracle.SCALE_BYTES[scale_name]]
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[oracle.SCALE_BYTES[scale_name]]
    parts = {
        "qdata": data.view(fmt.qdtype),
        "scale": torch.from_numpy(scale.astype(width).view(signed)).view(fmt.scale.dtype).reshape(shapes["scale"][0]),
    }
    if fmt.zero_point:
        parts["zero_point"] = torch.from_numpy(zero.astype(np.uint8)).reshape(shapes["scale"][0])
    if fmt.tensor_scale:
        parts["tensor_scale"] = torch.tensor([3.0])
    for key, part in parts.items():
        assert (tuple(part.shape), part.dtype) == shapes[key]
    expected = oracle.dequantize(codes, fmt, scale, zero, 3.0 if fmt.tensor_scale else None)
    parts = {key: part.to(device) for key, part in parts.items()}
    for dtype in DTYPES:
        y = ops.dequantize(parts, fmt, (rows, k), dtype)
        target = oracle.output(expected, str(dtype).removeprefix("torch."))
        np.testing.assert_array_equal(y.cpu().to(torch.float64).numpy(), target)


def unit_parts(fmt, shape):
    """Scales that stand for 1 and, with zero points, the middle of the range."""
    shapes = fmt.storage(shape)
    one = torch.tensor(oracle.store_scale(1.0, fmt.scale.name), dtype=torch.int64)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[fmt.scale.dtype.itemsize]
    parts = {"scale": one.to(width).view(fmt.scale.dtype).expand(shapes["scale"][0]).contiguous()}
    if fmt.zero_point:
        parts["zero_point"] = torch.full(shapes["scale"][0], 2 ** (fmt.bits - 1), dtype=torch.uint8)
    if fmt.tensor_scale:
        parts["tensor_scale"] = torch.ones(1)
    return parts


@takes_scales
def test_representable_values_midpoints_monotone(name, device):
    """Law 4, with scale 1: values encode to themselves, midpoints to the even code, in order, up to element.max."""
    fmt = get_format(name)
    element = fmt.element
    if element.ebits:
        positive = oracle.magnitudes(element.ebits, element.mbits, element.special)
        exact = np.concatenate([-positive[::-1], positive])
        even = [c + c % 2 for c in range(len(positive) - 1)]
        ties = (positive[1:] + positive[:-1]) / 2
        tie_values = positive[even]
        points, point_values = np.concatenate([-ties, ties]), np.concatenate([-tie_values, tie_values])
    elif element.values:
        exact = np.array(element.values)
        points = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)  # few are midpoints in fp32
        points = np.concatenate([points, *(np.nextafter(points, np.float32(d)) for d in (-np.inf, np.inf))])
        points = points.astype(np.float64)
        point_values = exact[oracle.nearest(points, element.values)]
    else:
        unit = 2.0**-element.fraction
        exact = np.arange(-(2 ** (element.bits - 1)), 2 ** (element.bits - 1), dtype=np.float64)
        points = exact[:-1] + 0.5
        point_values = np.array([2 * math.floor(p / 2 + 0.5) for p in points], float) * unit
        exact, points = exact * unit, points * unit
    top = exact[-1]
    assert element.max == oracle.element_max(element)
    ramp = np.sort(np.random.default_rng(0).uniform(exact[0] * 1.2, top * 1.2, 300))
    beyond = np.array([top * 1.001, top * 4, 1e30, -1e30, exact[0] * 4])
    x = torch.from_numpy(np.concatenate([exact, points, beyond, ramp]).astype(np.float32))
    x = x.unsqueeze(0)
    given_parts = {k: v.to(device) for k, v in unit_parts(fmt, tuple(x.shape)).items()}
    y = ops.qdq(x.to(device), fmt, **given_parts).cpu()
    parts = ops.quantize(x.to(device), fmt, **given_parts)
    assert_same(ops.dequantize(parts, fmt, tuple(x.shape), x.dtype).cpu(), y)
    y = y.to(torch.float64).numpy()[0]
    n, m = len(exact), len(points)
    np.testing.assert_array_equal(y[:n], exact)
    np.testing.assert_array_equal(y[n : n + m], point_values)
    np.testing.assert_array_equal(y[n + m : n + m + 5], [top, top, top, exact[0], exact[0]])
    assert (np.diff(y[n + m + 5 :]) >= 0).all()
    codes = oracle.encode(x.numpy()[0], fmt, np.float32(1), 2 ** (fmt.bits - 1))
    np.testing.assert_array_equal(parts["qdata"].cpu().view(torch.uint8).numpy(), oracle.qdata(codes[None], fmt))


@every_format
def test_non_finite_input_poisons_its_group(name, device):
    """Law 5: its group (its super-group, whose super-scale can be NaN) dequantizes to NaN, its scale is NaN, and no
    other group notices."""
    fmt = get_format(name)
    rows, cols = fmt.group[0], fmt.super_group or fmt.group[1]
    k = 3 * cols + 1 if cols > 0 else 40
    n = 2 * rows + 1 if rows > 1 else 5
    bad_values = (math.nan, math.inf, -math.inf)
    for dtype, bad in itertools.product((torch.bfloat16, torch.float64) if not INTERPRET else DTYPES[:1], bad_values):
        x = values((n, k), dtype, 1)
        x[n // 2, k // 2] = bad
        x[0, 0] = -bad
        expected = oracle.quantize(x.to(torch.float64).numpy(), fmt)
        if fmt.super_group:
            view, *_, groups = oracle.super_groups((n, k), fmt)
            scale, nan = expected.supers["super_scale"], oracle.SCALE_NAN["f16"]
        else:
            view, _, groups = oracle.regions((n, k), fmt)
            scale, nan = expected.scale, oracle.SCALE_NAN[fmt.scale.name]
        for index, where, *_ in groups:
            poisoned = not np.isfinite(x.to(torch.float64).numpy().reshape(view)[where]).all()
            assert np.isnan(expected.values.reshape(view)[where]).all() == poisoned
            assert (scale[index] == nan) == poisoned
        parts = ops.quantize(x.to(device), fmt)
        y = ops.qdq(x.to(device), fmt)
        assert_same(y, ops.dequantize(parts, fmt, (n, k), dtype))
        check_against_oracle(parts, y, expected, fmt, dtype)
        assert_same_parts(parts, reference.quantize(x, fmt))


def check_zero_scales(parts, fmt):
    """Those of zeros: e8m0 byte 0, or a finite positive number; so are an integer scale and its super-scale."""
    if fmt.super_group:
        for bits in storage_bits(parts["super_scale"]):
            assert 0 < oracle.load_scale(int(bits), "f16") < math.inf
        assert set(storage_bits(parts["scale"])) <= {1}
        return
    for bits in storage_bits(parts["scale"]):
        assert bits == 0 if fmt.scale.name == "e8m0" else 0 < oracle.load_scale(int(bits), fmt.scale.name) < math.inf


@every_format
def test_zeros(name, device):
    """Laws 6 and 7: a group of zeros gives zero codes and zeros, with e8m0 byte 0 or a finite positive scale."""
    fmt = get_format(name)
    signed_zero = fmt.element.ebits and fmt.element.special != "fnuz"
    rows, cols = fmt.group
    shape = (max(2, rows), 2 * cols + 1 if cols > 0 else 24)
    x = torch.zeros(shape, dtype=torch.bfloat16)
    x[:, ::2] = -0.0
    parts = ops.quantize(x.to(device), fmt)
    check_zero_scales(parts, fmt)
    y = ops.dequantize(parts, fmt, shape, x.dtype)
    assert bool((y == 0).all())
    assert_same(ops.qdq(x.to(device), fmt), y)
    codes = oracle.encode(x.to(torch.float32).numpy(), fmt, np.float32(1), 0)
    zero_code = {True: 0, False: 2 ** (fmt.bits - 1)}[bool(fmt.element.ebits) or oracle.asymmetric(fmt)]
    if fmt.element.values:
        zero_code = fmt.element.values.index(0)
    assert set(np.unique(codes % 2 ** (fmt.bits - 1) if fmt.element.ebits else codes)) == {zero_code}
    np.testing.assert_array_equal(parts["qdata"].cpu().view(torch.uint8).numpy(), oracle.qdata(codes, fmt))
    if signed_zero:
        assert_same(y.cpu(), x)


@every_format
def test_signed_zeros(name, device):
    """Law 7: zeros, and what rounds to zero, keep their sign beside other numbers; fnuz has no -0."""
    fmt = get_format(name)
    if not fmt.element.ebits:
        pytest.skip("integers and tables have one zero")
    x = values((max(1, fmt.group[0]) + 1, 48), torch.float32, 3)
    x[:, 1::4], x[:, 2::4] = -0.0, 1e-30
    x[:, 3::8] = -1e-30
    parts = ops.quantize(x.to(device), fmt)
    for y in (ops.dequantize(parts, fmt, tuple(x.shape), x.dtype).cpu(), ops.qdq(x.to(device), fmt).cpu()):
        if fmt.element.special == "fnuz":
            assert not torch.signbit(y[y == 0]).any()
        else:
            assert torch.equal(torch.signbit(y), torch.signbit(x))


@pytest.fixture
def any_plan():
    yield
    plans.forget()


def tile_sizes():
    return (1 << 10, 1 << 16) if INTERPRET else (8, 64, 1000, 1 << 12, 1 << 20)


@every_format
def test_any_tile(name, device, any_plan, monkeypatch):
    """Law 8: the same bits whatever the tile, on the CPU and for kernels, and for groups larger than one."""
    fmt = get_format(name)
    rows, cols = fmt.group
    cols = fmt.super_group or cols
    x = values((2 * rows + 1 if 1 < rows < 100 else 7, 3 * cols + 5 if cols > 0 else 515), torch.bfloat16, 5)
    if INTERPRET:
        x = x[:3]
    expected = reference.quantize(x, fmt)
    for size in tile_sizes():
        monkeypatch.setattr(tiling, "SCRATCH", 12 * size)
        kernel_tile = 1 << (size - 1).bit_length()  # a power of two, as Triton's ranges are
        monkeypatch.setattr(tuning, "TILE", min(max(64, kernel_tile), 1 << (16 if INTERPRET else 14)))
        if size == tile_sizes()[0]:
            monkeypatch.setattr(tuning, "LARGEST_TILE", 256)  # larger groups go through their keys
        plans.forget()
        parts = ops.quantize(x.to(device), fmt)
        assert_same_parts(parts, expected, f"tile {size}")
        y = ops.dequantize(parts, fmt, tuple(x.shape), x.dtype)
        assert_same(ops.qdq(x.to(device), fmt), y, f"qdq, tile {size}")
        assert_same(y.cpu(), reference.dequantize(expected, fmt, tuple(x.shape), x.dtype), f"dequantize, tile {size}")
        monkeypatch.undo()
        if INTERPRET:
            monkeypatch.setattr(tuning, "TILE", 1 << 16)


@pytest.mark.parametrize("name", ["e3m4_g48", "int5_g96", "int3_g7", "int6_g80_asym", "int4_g3000", "int4_g128"])
def test_tiles_begin_anywhere_in_a_group(name, device, any_plan):
    """Law 8: dequantize, and QDQ with given scales, find the scales of a tile whose first column is in some group."""
    fmt = get_format(name)
    x = values((2, 5000), torch.bfloat16, 11)
    parts = reference.quantize(x, fmt)
    expected = reference.dequantize(parts, fmt, tuple(x.shape), x.dtype)
    parts = {key: part.to(device) for key, part in parts.items()}
    plans.forget()
    with tuning.forced("dequantize", {"TILE": 1024, "PER_THREAD": 32, "BLOCK_N": 256}):
        assert_same(ops.dequantize(parts, fmt, tuple(x.shape), x.dtype), expected, "dequantize")
        given = {key: part for key, part in parts.items() if key != "qdata"}
        assert_same(ops.qdq(x.to(device), fmt, **given), expected, "given")


@pytest.mark.parametrize("name", ["int4_g3000", "e3m4_g3000", "int6_g3000"])
def test_padded_group_fills_its_tile(name, device):
    """Law 8: a tile of one padded group ends where the group does; its padding once overwrote the next group's
    codes."""
    fmt = get_format(name)
    x = values((2, 7001), torch.bfloat16, 9)
    parts = ops.quantize(x.to(device), fmt)
    assert_same_parts(parts, reference.quantize(x, fmt))


@every_format
def test_one_column_of_neighbours(name, device):
    """Neighbours that are groups of one element each: a compiler knows that the others are missing."""
    fmt = get_format(name)
    x = values((1, 23), torch.bfloat16, 7).to(device).mT
    assert_same_parts(ops.quantize(x, fmt), reference.quantize(x.cpu(), fmt), name)


# Formats that take every path through the kernels. On a GPU layouts are compiled anew, so the others see two of them.
EVERY_PATH = (
    "int4_g128", "int4_g128_asym", "int3_g64_asym", "int8_channel", "int6_channel", "int4_tensor_asym", "mxfp4",
    "mxfp6_e2m3", "nvfp4", "fp8_e4m3_tensor", "fp8_e4m3_b128x128", "e1m2_b3x5", "e3m4_g48", "int5_g20", "int3_g7",
    "nf4_g64", "q4_k", "q6_k",
)  # fmt: skip


@every_format
def test_any_strides(name, device):
    """Law 8: strides do not matter; the result is contiguous and the input left alone."""
    fmt = get_format(name)
    rows, cols = fmt.group
    shape = (2, 2, 3 if rows <= 1 else min(rows, 8) + 1, 2 * cols + 1 if 0 < cols < 200 else 50)
    layouts = LAYOUTS[1:] if not INTERPRET else LAYOUTS[1:4]
    cases = itertools.product(layouts, (4,) if INTERPRET else (2, 3, 4))
    if device == "cuda" and name not in EVERY_PATH:
        cases = [("transposed", 3), ("step", 2)]
    for layout, ndim in cases:
        x = lay_out(values(shape[-ndim:], torch.float32, ndim), layout).to(device)
        before = x.clone()
        parts, y = ops.quantize(x, fmt), ops.qdq(x, fmt)
        assert_same(x, before, "input")
        assert_same_parts(parts, ops.quantize(before.contiguous(), fmt), layout)
        assert_same(y, ops.dequantize(parts, fmt, tuple(x.shape), x.dtype), layout)
        assert y.is_contiguous()


@pytest.mark.parametrize(
    "name", NAMES if not INTERPRET else ("int4_g128_asym", "nvfp4", "mxfp4", "fp8_e4m3_tensor", "e1m2_b3x5")
)
def test_no_elements(name, device):
    """0 elements in any dimension: parts of the promised shapes, scales those of zeros, an empty result."""
    fmt = get_format(name)
    for shape in ((0,), (0, 64), (3, 0), (2, 0, 5), (0, 0), (2, 3, 0), (1, 2, 0, 4)):
        if fmt.group[0] > 1 and len(shape) < 2:
            continue
        x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        parts = ops.quantize(x, fmt)
        assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == fmt.storage(shape)
        check_zero_scales(parts, fmt)
        for y in (ops.qdq(x, fmt), ops.dequantize(parts, fmt, shape, x.dtype)):
            assert tuple(y.shape) == shape and y.dtype is x.dtype


LARGE = {
    "int8_channel": (2, 40000), "int6_channel": (2, 33333), "fp8_e4m3_channel": (1, 65537), "int4_tensor_asym": (3,
    20001),
    "fp8_e4m3_tensor": (2, 2, 9000), "fp8_e4m3_b256x256": (2, 300, 700), "int4_g65536": (2, 70001), "nvfp4": (3, 8192),
    "nf4_channel": (2, 40001), "int3_g50000_asym": (2, 60003), "int8_b512x100_absmax": (600, 333),
    "int4_channel_asym": (3, 40003), "int3_channel": (2, 140001), "e3m4_channel": (2, 200000),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_groups_larger_than_a_tile(name, device):
    """Laws 1, 2 and 5 where one group does not fit a tile, contiguous and not."""
    fmt = get_format(name)
    for layout, bad in (("contiguous", None), ("transposed", math.inf)):
        x = lay_out(values(LARGE[name], torch.bfloat16, 7), layout)
        if bad is not None:
            x[..., -1, -1] = bad
        expected = reference.quantize(x, fmt)
        parts = ops.quantize(x.to(device), fmt)
        assert_same_parts(parts, expected)
        y = ops.dequantize(parts, fmt, tuple(x.shape), x.dtype)
        assert_same(ops.qdq(x.to(device), fmt), y)
        assert_same(y.cpu(), reference.dequantize(expected, fmt, tuple(x.shape), x.dtype))
        assert bool(y[..., -1, -1].isnan().all()) == (bad is not None)


@takes_scales
def test_given_parts_are_used_verbatim(name, device):
    """A scale, zero point or tensor scale passed in comes back as it is, and the codes follow it by the book."""
    fmt = get_format(name)
    shape = (3, 2 * fmt.group[1] + 1 if fmt.group[1] > 0 else 21)
    shapes = fmt.storage(shape)
    x = values(shape, torch.float32, 11)
    rng = np.random.default_rng(2)
    count = math.prod(shapes["scale"][0])
    bits = np.array([oracle.store_scale(s, fmt.scale.name) for s in np.exp2(rng.integers(-3, 3, count))])
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[fmt.scale.dtype.itemsize]
    own = {"scale": torch.from_numpy(bits).to(width).view(fmt.scale.dtype).reshape(shapes["scale"][0])}
    zero = rng.integers(0, 2**fmt.bits, count)
    if fmt.zero_point:
        own["zero_point"] = torch.from_numpy(zero).to(torch.uint8).reshape(shapes["scale"][0])
    if fmt.tensor_scale:
        own["tensor_scale"] = torch.tensor([1.5])
    on_device = {k: v.to(device) for k, v in own.items()}
    parts = ops.quantize(x.to(device), fmt, **on_device)
    for key, part in own.items():
        assert_same(parts[key].cpu(), part, key)
    expected = oracle.quantize(x.numpy(), fmt, bits, zero, np.float32(1.5) if fmt.tensor_scale else None)
    if not fmt.zero_point:
        expected.zero_point[:] = 0
    check_against_oracle(parts, ops.qdq(x.to(device), fmt, **on_device), expected, fmt, x.dtype)
    if fmt.tensor_scale:  # alone: the scales are chosen under it
        expected = oracle.quantize(x.numpy(), fmt, tensor_scale=np.float32(1.5))
        only = {"tensor_scale": on_device["tensor_scale"]}
        check_against_oracle(
            ops.quantize(x.to(device), fmt, **only), ops.qdq(x.to(device), fmt, **only), expected, fmt, x.dtype
        )


@pytest.mark.parametrize(
    "name", [n for n in NAMES if get_format(n).element.nan_code >= 0 and not get_format(n).super_group]
)
def test_given_scale_keeps_nan_where_the_element_can(name, device):
    """Law 5 with a scale that says nothing about x: elements with a NaN code store NaN."""
    fmt = get_format(name)
    x = values((2, 40), torch.float32, 13)
    x[0, 3], x[1, 5], x[1, 38] = math.nan, math.inf, -math.inf
    own = {k: v.to(device) for k, v in unit_parts(fmt, (2, 40)).items()}
    y = ops.qdq(x.to(device), fmt, **own).cpu()
    parts = ops.quantize(x.to(device), fmt, **own)
    assert_same(ops.dequantize(parts, fmt, (2, 40), x.dtype).cpu(), y)
    assert torch.equal(y.isnan(), ~x.isfinite())


def edge_cases():
    """(format, values) that sit on an edge of a scale rule; the oracle knows the answers."""
    top = oracle.F32_MAX
    powers = [math.ldexp(1.0, e) for e in (-149, -140, -128, -127, -126, -125, 0, 1, 126, 127)]
    around = [float(np.nextafter(np.float32(p), np.float32(d))) for p in powers[2:] for d in (0, np.inf)]
    rounding = [
        math.ldexp(m, e)
        for m in (1.125, 1.25, 1.5, 1.75, 1.874999, 1.875, 1.9375, 1.96875, 1.99)
        for e in (-127, -3, 5)
    ]
    for name in ("mxfp8", "mxfp8_ceil", "mxfp8_rceil", "mxfp8_even", "mxfp4", "mxfp4_ceil", "mxfp4_rceil", "mxfp4_even",
                 "int8_g32_e8m0_even", "mxfp6_e3m2_rceil", "e4m3_g32_ue5m3", "nvfp4", "int4_g32", "int4_g32_f16",
                 "int8_g32_f32",
                 "int4_g32_asym", "int4_g32_asym_f32", "fp8_e4m3_g32", "int3_g32_half_range", "mxint8", "mxint8_rceil",
                 "nf4_g32", "q2_k", "q3_k", "q4_k", "q6_k", "int4_g16_u6_s32_half_range"):  # fmt: skip
        yield (
            name,
            [*powers, *around, *rounding, top, -top, top / 2, 448.0, 6.0, 448.00003, 6.0000005, 65504.0, 1e-45, 3e-39],
        )


@pytest.mark.parametrize("name,numbers", list(edge_cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_scale_edges(name, numbers, device):
    """Scale rules on powers of two and their neighbours, subnormals and the largest numbers (law 2, oracle)."""
    fmt = get_format(name)
    g = fmt.group[1]
    x = np.zeros((len(numbers), g), np.float32)
    x[:, 3], x[:, 5], x[:, 7] = numbers, -np.array(numbers, np.float32) / 3, np.array(numbers, np.float32) * 0.71
    if fmt.tensor_scale:  # one tensor scale hides the others' edges
        rows = [x[i : i + 1] for i in range(0, len(x), 9 if INTERPRET else 1)]
    else:
        rows = [x]
    for row in rows:
        t = torch.from_numpy(row)
        parts = ops.quantize(t.to(device), fmt)
        check_against_oracle(parts, ops.qdq(t.to(device), fmt), oracle.quantize(row, fmt), fmt, t.dtype)


def test_full_range_tie_is_positive(device):
    """m is the element of largest magnitude, the positive one on a tie; s = -m / 2^(b-1)."""
    x = torch.tensor([[-8.0, 8.0, 1.0, 0.0], [8.0, -8.0, 1.0, 0.0], [-8.0, 7.0, 1.0, 0.0]], device=device)
    parts = ops.quantize(x, "int4_g4_f32")
    assert parts["scale"].cpu().ravel().tolist() == [-1.0, -1.0, 1.0]


def test_fp64_saturates_instead_of_becoming_infinite(device):
    """Law 5 the other way: 1e300 is finite, so its group is."""
    x = torch.tensor([[1e300, -1e300, 1.0, 0.0]], dtype=torch.float64, device=device)
    y = ops.qdq(x, "int8_g4_f32")
    assert y.dtype is torch.float64 and bool(y.isfinite().all())
    assert y[0, 0] > 3e38 and y[0, 1] < -3e38


def test_nvfp4_tensor_scale_ignores_non_finite_elements(device):
    """G = 448 * 6 / amax over finite elements; a non-finite element poisons its own group only."""
    x = values((4, 64), torch.bfloat16, 17).to(device)
    clean = ops.tensor_scale(x, "nvfp4")
    amax = float(x.abs().max())
    assert float(clean) == float(np.float32(2688.0) / np.float32(amax))
    position = int(x.abs().float().argmin())
    x.view(-1)[position] = math.inf
    assert float(ops.tensor_scale(x, "nvfp4")) == float(clean)
    y = ops.qdq(x, "nvfp4").reshape(-1, 16)
    assert y.isnan().all(1).tolist() == [i == position // 16 for i in range(16)]


def test_rceil_never_saturates(device):
    """RCEIL cannot saturate: |x / s| <= max for every group."""
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((512, 32)).astype(np.float32))
    x *= torch.exp2(torch.linspace(-110, 110, 512)).unsqueeze(1)
    for name in ("mxfp4_rceil", "mxfp8_rceil", "mxfp6_e2m3_rceil"):
        fmt = get_format(name)
        scale = ops.quantize(x.to(device), fmt)["scale"].cpu().float()
        assert bool((x.abs() / scale <= oracle.element_max(fmt.element)).all())
        assert not fmt.saturates


@pytest.mark.parametrize("name,columns,stride", [("int4_g128", 128, 24_000_000), ("int8_channel", 40_000, 60_000),
                                                 ("q4_k", 256, 12_000_000)])  # fmt: skip
def test_column_strides_beyond_32_bits(name, columns, stride, device):
    """Offsets of columns need 64 bits: 32 read outside the tensor, in slices of groups and in long rows."""
    if device == "cpu" and not INTERPRET:
        pytest.skip("the CPU path leaves strides to torch")
    base = torch.empty(columns * stride, dtype=torch.bfloat16, device=device)  # a few pages of it are ever touched
    x = base.as_strided((2, columns), (1, stride))
    host = values((2, columns), torch.bfloat16, 3)
    x.copy_(host)
    fmt = get_format(name)
    assert_same_parts(ops.quantize(x, fmt), reference.quantize(host, fmt))


def test_given_scale_of_zero(device):
    """A dead group may come with a scale of 0: zeros, on every backend."""
    for name in ("int4_g32", "int4_g32_asym", "fp8_e4m3_g32", "int8_channel"):
        fmt = get_format(name)
        x = torch.zeros(3, 64, device=device)
        given = {k: torch.zeros_like(v) for k, v in ops.quantize(x, fmt).items() if k != "qdata"}
        assert torch.equal(ops.qdq(x, fmt, **given), x), name
        assert torch.equal(ops.dequantize(ops.quantize(x, fmt, **given), fmt, (3, 64), torch.float32), x), name


def test_foreign_infinity_saturates(device):
    """Codes of infinity are not written here, but may come from elsewhere."""
    fmt = get_format("mxfp8_e5m2")
    parts = ops.quantize(torch.ones(1, 32, device=device), fmt)
    parts["qdata"].view(torch.uint8)[0, 0] = 0x7C
    assert ops.dequantize(parts, fmt, (1, 32), torch.float16)[0, 0] == 65504


def test_out_has_to_fit(device):
    fmt = get_format("int4_g32")
    x = torch.ones(2, 64, device=device)
    out = ops.allocate(fmt, (2, 64), x.device)
    out["qdata"] = torch.zeros(2, 64, dtype=torch.uint8, device=device)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        ops.quantize(x, fmt, out=out)
    parts = ops.quantize(x, fmt)
    spread = {k: torch.stack([v, v], -1)[..., 0] for k, v in parts.items()}
    assert torch.equal(ops.dequantize(spread, fmt, (2, 64), x.dtype), ops.dequantize(parts, fmt, (2, 64), x.dtype))


def test_negative_view(device):
    """A view whose minus sign has not been carried out yet."""
    x = torch.randn(2, 64, dtype=torch.cfloat, generator=torch.Generator().manual_seed(0)).to(device).conj().imag
    assert x.is_neg()
    assert torch.equal(ops.qdq(x, "int4_g32"), ops.qdq(x.clone().contiguous() + 0.0, "int4_g32"))


def test_parameters_leave_no_graph(device):
    x = torch.nn.Parameter(torch.randn(2, 64, device=device))
    for name in ("nvfp4", "mxfp6_e3m2", "int4_g32"):
        assert not any(part.requires_grad for part in ops.quantize(x, name).values())


@pytest.mark.parametrize(
    "name", NAMES if not INTERPRET else ("int4_g32", "int3_g20_asym", "q4_k", "nvfp4", "int4_tensor")
)
def test_streamed(name):
    """Law 8: a tensor that passes through a device in tiles gets the bytes of one call, and each element its own random
    number."""
    fmt = TABLES.get(name) or formats.get_format(name)
    x = torch.randn(2, 9 if fmt.group[0] == 1 else 33, 344, generator=torch.Generator().manual_seed(0))
    device, tiles = FakeDevice(pinned=True), []
    for rounding in ("nearest", "stochastic"):
        if INTERPRET and rounding == "nearest":
            continue
        expected = ops.quantize(x, fmt, rounding=rounding, generator=torch.Generator().manual_seed(1))
        out = {part: torch.empty_like(value) for part, value in expected.items()}
        with memory.workspace(1 << 14):
            scheduler.quantize(
                x, fmt, device, out, rounding=rounding, generator=torch.Generator().manual_seed(1),
                progress=lambda done, total: tiles.append(done),
            )  # fmt: skip
        assert_same_parts(out, expected)
        y = torch.empty_like(x)
        with memory.workspace(1 << 14):
            scheduler.dequantize(expected, fmt, device, y)
        assert_same(y, ops.dequantize(expected, fmt, tuple(x.shape), x.dtype))
    assert len(tiles) > 2
