"""Scales that are quantized again: k-quants decode as GGUF's own reader decodes them, err little, and keep the laws.

Parts are packed into GGUF blocks here, by the comments of ggml-common.h, and read by the `gguf` package where there is
one.
"""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same, assert_same_parts

import tritonq as tq
from tritonq import ops, reference
from tritonq.formats import get_format

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
every_k_quant = pytest.mark.parametrize("name", K_QUANTS)

# -------------------------------------------------------------------------------------------------- blocks of GGUF


def low_bits(codes, width, planes, run):
    """Codes [n, 256] to bytes: `planes` fields of `width` bits, of codes `run` apart, share a byte."""
    fields = codes.reshape(len(codes), -1, planes, run)
    return sum(fields[:, :, i] << (width * i) for i in range(planes)).reshape(len(codes), -1)


def six_bit_pairs(scale, minimum):
    """Eight 6-bit scales and minima to 12 bytes, as Q4_K and Q5_K hold them."""
    first = scale[:, :4] | (scale[:, 4:] >> 4 << 6)
    second = minimum[:, :4] | (minimum[:, 4:] >> 4 << 6)
    return [first, second, (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)]


def six_bit_scales(scale):
    """Sixteen 6-bit scales, offset by 32, to 12 bytes, as Q3_K holds them."""
    scale = scale + 32
    low = (scale[:, :8] & 15) | ((scale[:, 8:] & 15) << 4)
    high = scale.reshape(-1, 4, 4) >> 4
    return [low, sum(high[:, i] << (2 * i) for i in range(4))]


def half(part):
    return part.numpy().view(np.uint8).reshape(-1, 2)


def blocks(parts, fmt):
    """GGUF blocks uint8 [n, bytes] of rows of whole super-groups."""
    codes = np.array([oracle.unpack(row, fmt.bits, 8 * len(row) // fmt.bits) for row in parts["qdata"].numpy()])
    codes = codes.reshape(-1, 256)
    scale = parts["scale"].numpy().astype(np.int64).reshape(len(codes), -1)
    d, minimum, dmin = half(parts["super_scale"]), None, None
    if "group_minimum" in parts:
        minimum = parts["group_minimum"].numpy().astype(np.int64).reshape(scale.shape)
        dmin = half(parts["super_minimum"])
    if fmt.bits == 2:
        data = [scale | (minimum << 4), low_bits(codes, 2, 4, 32), d, dmin]
    elif fmt.bits == 3:  # the high bits are set where nothing is subtracted
        data = [low_bits(codes >> 2, 1, 8, 32), low_bits(codes & 3, 2, 4, 32), *six_bit_scales(scale), d]
    elif fmt.bits == 4:
        data = [d, dmin, *six_bit_pairs(scale, minimum), low_bits(codes, 4, 2, 32)]
    elif fmt.bits == 5:
        data = [d, dmin, *six_bit_pairs(scale, minimum), low_bits(codes >> 4, 1, 8, 32), low_bits(codes & 15, 4, 2, 32)]
    else:
        data = [low_bits(codes & 15, 4, 2, 64), low_bits(codes >> 4, 2, 4, 32), scale % 256, d]
    return np.concatenate([np.asarray(part).astype(np.uint8) for part in data], axis=1)


def read_by_gguf(parts, fmt, shape):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[fmt.name.upper()]
    data = blocks({k: v.cpu().reshape(-1, v.shape[-1]) for k, v in parts.items()}, fmt)
    assert data.shape[1] == gguf.GGML_QUANT_SIZES[kind][1]
    return torch.from_numpy(gguf.quants.dequantize(data, kind)).reshape(shape)


@every_k_quant
@pytest.mark.parametrize("shape", [(512,), (5, 256), (2, 3, 1024)], ids=str)
def test_decodes_as_gguf_does(name, shape, device):
    """What tritonq quantized, bit for bit in fp32."""
    fmt = get_format(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    x[..., 32:64] = 0
    x[..., 64:96] = x[..., 64:96].abs() + 1
    x[..., 128:200] *= 1e-3
    parts = ops.quantize(x.to(device), fmt)
    y = ops.dequantize(parts, fmt, shape, torch.float32)
    assert_same(y.cpu(), read_by_gguf(parts, fmt, shape))
    assert_same(ops.qdq(x.to(device), fmt), y)


def foreign_parts(fmt, shape, seed=0):
    """Any codes, integers and super-scales there can be, such as others write."""
    rng = np.random.default_rng(seed)
    low, high = oracle.INTEGERS[fmt.scale.name]
    parts = {}
    for name, (size, dtype) in fmt.storage(shape).items():
        if name == "qdata":
            made = rng.integers(0, 256, size).astype(np.uint8)
        elif name.startswith("super_"):
            made = rng.integers(-(2**15), 2**15, size).astype(np.int16)
            made = np.where(np.isfinite(made.view(np.float16)), made, 0).astype(np.int16)
        else:
            made = rng.integers(low, high + 1, size).astype(np.int8 if low else np.uint8)
        parts[name] = torch.from_numpy(made).view(dtype)
    return parts


@every_k_quant
def test_any_block_decodes_as_gguf_does(name, device):
    """Integers of 0, negative super-scales and super-minima, subnormal ones, zeros."""
    fmt = get_format(name)
    shape = (64, 512)
    parts = foreign_parts(fmt, shape)
    y = ops.dequantize({k: v.to(device) for k, v in parts.items()}, fmt, shape, torch.float32)
    assert_same(y.cpu(), read_by_gguf(parts, fmt, shape))


@pytest.mark.parametrize("name", [*K_QUANTS, "e2m1_g16_u8_s64", "int8_g8_asym_u4_s32", "nf4_g16_u4_s128"])
def test_any_parts_decode_by_the_book(name, device):
    """Law 3 for short super-groups and other elements: y = d k value(code) - e j, every product rounded once."""
    fmt = get_format(name)
    shape = (3, 2 * fmt.super_group + fmt.group[1] + 3)
    parts = foreign_parts(fmt, shape, 1)
    codes = np.array([oracle.unpack(row, fmt.bits, shape[1]) for row in parts["qdata"].view(torch.uint8).numpy()])
    *_, found = oracle.super_groups(shape, fmt)
    expected, flat = np.zeros((1, *shape), np.float32), codes[None]
    p = {k: v.numpy().ravel() for k, v in parts.items()}
    for index, _, groups in found:
        for group, where in groups:
            factor = np.float32(p["super_scale"][index]) * np.float32(p["scale"][group])
            expected[where] = oracle.decode(flat[where], fmt, factor, 0)
            if oracle.asymmetric(fmt):
                expected[where] -= np.float32(p["super_minimum"][index]) * np.float32(p["group_minimum"][group])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = ops.dequantize({k: v.to(device) for k, v in parts.items()}, fmt, shape, dtype)
        target = oracle.output(expected[0], str(dtype).removeprefix("torch."))
        np.testing.assert_array_equal(y.cpu().to(torch.float64).numpy(), target)


# ---------------------------------------------------------------------------------------------------------- accuracy


def rmse(y, x):
    return float((y.double() - x.double()).pow(2).mean().sqrt())


def naive(x, fmt):
    """The formulas in float64, super-scales rounded to f16: [n, 256]."""
    low, high = oracle.INTEGERS[fmt.scale.name]
    groups = x.double().numpy().reshape(len(x), -1, fmt.group[1])
    levels = 2**fmt.bits

    def again(s):
        s = s[..., 0]
        largest = np.take_along_axis(s, np.abs(s).argmax(-1)[:, None], -1)
        d = (largest / (low or high)).astype(np.float16).astype(np.float64)
        k = np.clip(np.rint(s / d), low, high)
        return d[..., None], k[..., None]

    if oracle.asymmetric(fmt):
        hi, lo = groups.max(-1, keepdims=True).clip(min=0), groups.min(-1, keepdims=True).clip(max=0)
        (d, k), (e, j) = again((hi - lo) / (levels - 1)), again(-lo)
        factor, offset, bounds = d * k, e * j, (0, levels - 1)
    else:
        m = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
        d, k = again(-m / (levels // 2))
        factor, offset, bounds = d * k, 0, (-levels // 2, levels // 2 - 1)
    codes = np.clip(np.rint((groups + offset) / factor), *bounds)
    return torch.from_numpy(codes * factor - offset).reshape(x.shape)


@every_k_quant
def test_error_is_that_of_the_formulas(name, device):
    """Against float64 to a thousandth; and against plain groups of as many bits, whose scales are not quantized."""
    fmt = get_format(name)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = rmse(ops.qdq(x.to(device), fmt).cpu(), x)
    assert error == pytest.approx(rmse(naive(x, fmt), x), rel=1e-3)
    plain = f"int{fmt.bits}_g{fmt.group[1]}{'_asym' * fmt.minimum}_f32"
    assert error < 1.05 * rmse(ops.qdq(x.to(device), plain).cpu(), x)
    if fmt.bits == 4:
        assert error < rmse(ops.qdq(x.to(device), "int4_g32").cpu(), x)


def test_small_groups_keep_their_numbers(device):
    """An integer scale that would be 0 is 1: a group 1000 times smaller than its neighbour still has a code or two."""
    x = torch.ones(1, 256, device=device)
    x[:, 16:32] = 4e-3
    y = ops.qdq(x, "q6_k")
    assert (y[:, 16:32] > 0).all() and float((y - x).abs().max()) < 5e-3


# -------------------------------------------------------------------------------------------------------------- laws


@every_k_quant
def test_representable_values_and_midpoints(name, device):
    """Law 4: with scales that quantize exactly, codes decode to themselves and midpoints go to the even code."""
    fmt = get_format(name)
    low, high = oracle.INTEGERS[fmt.scale.name]
    first = 0 if fmt.minimum else -(2 ** (fmt.bits - 1))
    codes = np.arange(first, first + 2**fmt.bits, dtype=np.float64)
    points = np.concatenate([codes, codes[:-1] + 0.5])
    rounded = np.concatenate([codes, [2 * math.floor(c / 2 + 0.5) for c in codes[:-1] + 0.5]])
    top = codes[-1] if fmt.minimum else codes[0]
    g = fmt.group[1]
    width = g - 2  # one element of every group sets its scale, and one its minimum
    count = -(-len(points) // width)
    wide, expected = (np.resize(v, (count, width)) for v in (points, rounded))
    # Steps are `high` (or `-low`) units of a super-scale of 1; minima are `high` units of theirs, also 1.
    unit = float(abs(low or high))
    offset = unit if fmt.minimum else 0.0
    ends = np.tile([top, 0.0], (count, 1))
    if not fmt.minimum:
        ends[:, 1] = codes[0]
    x = torch.from_numpy(np.concatenate([ends, wide], 1) * unit - offset).float().reshape(1, -1).to(device)
    parts = ops.quantize(x, fmt)
    scale = {"u4": 15, "u6": 63, "i6": -32, "i8": -128}[fmt.scale.name]
    assert set(parts["scale"].flatten().tolist()) == {scale} and parts["super_scale"].abs().unique().tolist() == [1]
    y = ops.dequantize(parts, fmt, tuple(x.shape), torch.float32).cpu().numpy().reshape(count, g)[:, 2:]
    np.testing.assert_array_equal((y + offset) / unit, expected)


@every_k_quant
def test_super_group_of_extremes_stays_finite(name, device):
    """Super-scales saturate at both ends of f16 and are never zero."""
    fmt = get_format(name)
    for size in (3e38, -3e38, 1e7, 1e-10, 1e-45):
        x = torch.full((2, 512), size, device=device)
        x[0, ::3] = 0
        x[1, 1::2] *= -1
        parts = ops.quantize(x, fmt)
        y = ops.dequantize(parts, fmt, (2, 512), torch.float32)
        assert (
            bool(y.isfinite().all()) and bool((parts["super_scale"] != 0).all()) and bool((parts["scale"] != 0).all())
        )
        assert_same(ops.qdq(x, fmt), y)
        assert_same_parts(parts, reference.quantize(x.cpu(), fmt))


@every_k_quant
def test_non_finite_element_takes_its_super_group(name, device):
    x = torch.randn(2, 600, generator=torch.Generator().manual_seed(1)).to(device)
    clean = ops.qdq(x, name)
    x[0, 300], x[1, 599] = math.inf, math.nan
    y = ops.qdq(x, name)
    assert bool(y[0, 256:512].isnan().all()) and bool(y[1, 512:].isnan().all())
    clean[0, 256:512], clean[1, 512:] = math.nan, math.nan
    assert_same(y, clean)


def test_given_scales_are_refused(device):
    x = torch.randn(2, 256, device=device)
    parts = ops.quantize(x, "q4_k")
    for call in (ops.quantize, ops.qdq, tq.quantize, tq.qdq):
        with pytest.raises(ValueError, match=r"q4_k.*super-groups of 256.*leave scale out"):
            call(x, "q4_k", scale=parts["scale"])
        with pytest.raises(ValueError, match="zero_point"):
            call(x, "q4_k", zero_point=parts["scale"])
    with pytest.raises(ValueError, match=r"q4_k.*leave search out"):
        tq.quantize(x, "q4_k", search="mse")
    with pytest.raises(ValueError, match=r"super-groups.*q4_k"):
        ops.quantize(x, "q4_k", swizzled=True)


def test_both_directions(device):
    """Rows and columns, each with super-groups of its own."""
    x = torch.randn(300, 520, generator=torch.Generator().manual_seed(4)).to(device)
    for got, wanted in zip(ops.quantize_both(x, "q4_k"), (x, x.mT), strict=True):
        assert_same_parts(got, ops.quantize(wanted, "q4_k"))


@pytest.mark.skipif(INTERPRET, reason="no kernel of its own")
def test_gradient(device):
    """Zero exactly where (x + minimum) / factor leaves the codes."""
    for name in K_QUANTS:
        fmt = get_format(name)
        x = torch.randn(3, 600, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
        y = tq.qdq(x, name)
        y.backward(torch.ones_like(y))
        q = tq.quantize(x, name)
        factor = q.super_scale.double().repeat_interleave(256 // fmt.group[1], -1)[:, : q.scale.shape[1]] * q.scale
        offset = torch.zeros_like(factor)
        if fmt.minimum:
            e = q.super_minimum.double().repeat_interleave(256 // fmt.group[1], -1)[:, : q.scale.shape[1]]
            offset = e * q.group_minimum
        spread = [t.repeat_interleave(fmt.group[1], -1)[:, :600] for t in (factor, offset)]
        ratio = (x.detach().double() + spread[1]) / spread[0]
        low = 0 if fmt.minimum else -(2 ** (fmt.bits - 1))
        high = low + 2**fmt.bits - 1
        sure = ((ratio - low).abs() > 1e-5) & ((ratio - high).abs() > 1e-5)
        inside = (ratio >= low) & (ratio <= high)
        assert torch.equal(x.grad[sure] == 1, inside[sure]) and bool(((x.grad == 0) | (x.grad == 1)).all())
        assert not bool(inside.all())


# ------------------------------------------------------------------------------------------------------- the tensor


@every_k_quant
def test_tensor(name, device, tmp_path):
    """Parts by name, views along whole super-groups, and files."""
    fmt = get_format(name)
    x = torch.randn(6, 1024, generator=torch.Generator().manual_seed(3)).to(device)
    q = tq.quantize(x, name)
    assert {k: (tuple(v.shape), v.dtype) for k, v in q.parts().items()} == fmt.storage((6, 1024))
    assert (q.group_minimum is not None, q.super_minimum is not None) == (fmt.minimum, fmt.minimum)
    y = q.dequantize()
    for index in (slice(2, 5), (slice(None), slice(256, 768)), 3, (slice(1, 3), slice(512, None))):
        assert isinstance(q[index], tq.QTensor)
        assert_same(q[index].dequantize(), y[index].contiguous())
    assert not isinstance(q[:, 32:512], tq.QTensor)  # through a super-group
    assert_same(q[:, 32:512], y[:, 32:512])
    window = q[:, 256:512]
    window.copy_(torch.zeros(6, 256, device=device))
    y[:, 256:512] = 0
    assert_same(q.dequantize() + 0.0, y + 0.0)
    torch.save(q, tmp_path / "q.pt")
    assert_same(torch.load(tmp_path / "q.pt").dequantize(), q.dequantize())


def test_names():
    """k-quants are names for what the grammar can say."""
    grammar = {
        "q2_k": "int2_g16_asym_u4_s256", "q3_k": "int3_g16_i6_s256", "q4_k": "int4_g32_asym_u6_s256",
        "q5_k": "int5_g32_asym_u6_s256", "q6_k": "int6_g16_i8_s256",
    }  # fmt: skip
    for name, long in grammar.items():
        assert replace(get_format(long), name=name) == get_format(name)


def test_size_in_memory():
    """Integers of 4 and 6 bits take a byte; those of 8 bits lose nothing to a GGUF file."""
    held = {name: get_format(name).nbytes((1, 256)) for name in K_QUANTS}
    assert held == {"q2_k": 100, "q3_k": 114, "q4_k": 148, "q5_k": 180, "q6_k": 210}
    gguf = pytest.importorskip("gguf")
    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][1] for name in K_QUANTS}
    assert sizes == {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}
