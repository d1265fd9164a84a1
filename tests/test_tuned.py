"""QDQ with v, min_scale and max_scale: values bit for bit, gradients against float64 autograd, the step against both.

Sums of gradients over a group are compared with a tolerance of 1e-5 of the sum of magnitudes: they are fp32 sums in an
order that the definition leaves open.
"""

import pytest
import torch
import tuned_oracle
from conftest import INTERPRET

import tritonq as tq
from tritonq import ops, tuned_ops, tuned_tiles
from tritonq.formats import FORMATS, get_format
from tritonq.tuned_reference import Tuning, Wanted

# One of each kind: scale rules, storage types, element types, granularities.
KINDS = ("int4_g32", "int4_g32_absmax", "int8_channel_f16_half_range", "int4_g32_asym", "int3_g8_f32", "mxint8", "mxfp4",
         "mxfp8_rceil", "mxfp6_e3m2_even", "mxfp4_ceil", "nvfp4", "fp8_e4m3_channel", "fp8_e5m2_tensor", "fp8_e4m3_b4x8",
         "e4m3_g32_ue5m3", "nf4_g64", "e3m4_g48", "int5_g96", "q4_k", "q6_k", "int4_tensor_asym",
         "fp8_e4m3fnuz_channel")  # fmt: skip
FEW = ("int4_g32", "int4_g32_asym", "mxfp4", "nvfp4", "fp8_e4m3_tensor", "q4_k")


def numbers(shape, seed=0, dtype=torch.float32, scale=3.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def awkward(shape, seed=0, dtype=torch.bfloat16):
    """Zero groups, one-sided ones, ties of both extremes, halves, very large and very small numbers."""
    x = numbers(shape, seed)
    x[0] = 0.0
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = (x[3] * 2).round() / 2
    x[4, ::7], x[4, 1::7] = 5.0, -5.0
    x[5] *= 1e30
    x[6] *= 1e-36
    x[7, ::3] = 0.0
    return x.to(dtype)


def ratios(fmt, shape, seed, dtype=torch.float32):
    return (0.5 + 0.5 * torch.rand(fmt.scale_shape(shape), generator=torch.Generator().manual_seed(seed))).to(dtype)


def leaves(device, **tensors):
    return {
        name: t.detach().to(device).clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in tensors.items()
    }


def close(got, expected, weight, what):
    """Within 1e-5 of `weight`, the sum of magnitudes, and of the rounding of the gradient's dtype."""
    unit = torch.finfo(got.dtype).eps if got.dtype in (torch.bfloat16, torch.float16) else 1e-6
    error = (got.detach().cpu().double() - expected).abs()
    allowed = 1e-5 * weight + unit * expected.abs() + 1e-37
    assert (error <= allowed).all(), f"{what}: off by {float((error - allowed).max())}, wanted {expected.flatten()[:4]}"


def weights(x, fmt, dy, expected):
    """A bound of what a group's gradients are sums of: |dy| times codes times extremes, in the shape of the scale."""
    sizes = torch.zeros(fmt.scale_shape(tuple(x.shape)), dtype=torch.float64).reshape(-1)
    view, _, groups = tuned_oracle.oracle.regions(tuple(x.shape), fmt)
    flat, flat_dy = x.detach().cpu().double().reshape(view), dy.cpu().double().reshape(view)
    for index, where in groups:
        sizes[index] = flat_dy[where].abs().sum() * (flat[where].abs().max() + 1e-30) * 2
    return sizes.reshape(fmt.scale_shape(tuple(x.shape)))


def check(x, fmt, device, dy=None, **parameters):
    """Value and every gradient of one call; returns what was expected."""
    dy = numbers(x.shape, 9, x.dtype, 1.0) if dy is None else dy
    own = leaves(device, x=x, **parameters)
    y = tq.qdq(own["x"], fmt, **{name: t for name, t in own.items() if name != "x"})
    expected = tuned_oracle.qdq(x, fmt, dy, **parameters)
    assert y.dtype is x.dtype and y.is_contiguous()
    wrong = y.detach().cpu().double() != expected.y
    assert not wrong.any(), f"{int(wrong.sum())} values, first at {wrong.nonzero()[0].tolist()}"
    y.backward(dy.to(device))
    assert torch.equal(own["x"].grad.cpu().double(), expected.x)
    sizes = weights(x, fmt, dy, expected)
    for name in parameters:
        got, wanted = own[name].grad, getattr(expected, name)
        assert got.dtype is own[name].dtype and got.shape == own[name].shape
        close(got, wanted, 0.0 if name == "v" else sizes, name)
    return expected


@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients(name, device):
    """bf16 numbers, all kinds of groups, the last one of a row not full."""
    fmt, shape = get_format(name), (8, 200)
    v = numbers(shape, 1, scale=0.4)
    found = check(awkward(shape), fmt, device, v=v, min_scale=ratios(fmt, shape, 2), max_scale=ratios(fmt, shape, 3))
    assert not found.inside.all() and found.inside.any()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("only", ["v", "min_scale", "max_scale"])
def test_one_parameter(name, only, device):
    """What is left out is 0 or 1; gradients have the parameter's dtype."""
    fmt, shape = get_format(name), (3, 4, 64)
    x = numbers(shape, 5, torch.float16)
    own = numbers(shape, 1, torch.bfloat16, 0.4) if only == "v" else ratios(fmt, shape, 2, torch.bfloat16)
    check(x, fmt, device, **{only: own})


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_asym", "fp8_e4m3_channel", "mxfp4", "nvfp4", "int4_tensor_asym"])
def test_learned_step_size(name, device):
    """A given scale and zero point, of any floating dtype, take gradients; so does v beside them."""
    fmt, shape = get_format(name), (6, 72)
    x = numbers(shape, 6)
    parts = ops.quantize(x, fmt)
    scale = tuned_scales(parts["scale"], fmt)
    given = {"scale": (scale * 0.7).to(torch.float32)}
    if fmt.zero_point:
        z = parts["zero_point"].float() + 0.3
        z.view(-1)[0] = -2.0  # clamped
        given["zero_point"] = z
    found = check(x, fmt, device, v=numbers(shape, 1, scale=0.3), **given)
    assert not found.inside.all()
    own = leaves(device, **given)
    tq.qdq(x.to(device), fmt, **own, scale_gradient="lsq").sum().backward()
    plain = leaves(device, **given)
    tq.qdq(x.to(device), fmt, **plain).sum().backward()
    count = {"tensor": x.numel(), "channel": 72}.get(name.split("_")[-1], fmt.group[1])
    count = x.numel() if fmt.group[0] == -1 else count
    factor = (count * tuned_oracle.oracle.element_max(fmt.element)) ** -0.5
    for one in given:
        torch.testing.assert_close(own[one].grad, plain[one].grad * factor, rtol=1e-5, atol=1e-6)


def tuned_scales(scale, fmt):
    from tritonq.codecs import scale as scales

    return scales.load(scale, fmt)


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4", "fp8_e4m3_b4x8", "fp8_e4m3_channel", "int4_tensor_asym", "q4_k"])
def test_strides(name, device):
    """Transposed, sliced, expanded and stacked x, v and dy: gradients line up with the elements, not with memory."""
    fmt, shape = get_format(name), (2, 16, 64)
    x, v, dy = numbers(shape).to(device), numbers(shape, 1, scale=0.3).to(device), numbers(shape, 2).to(device)
    own = {"min_scale": ratios(fmt, shape, 2).to(device), "max_scale": ratios(fmt, shape, 3).to(device)}
    given = tuned_ops.check(x, fmt, v, own["min_scale"], own["max_scale"], None, None, None)
    plain_y = tuned_ops.qdq(x, fmt, given)
    plain = tuned_ops.backward(x, dy, fmt, given, Wanted(True, True, True, True))
    views = (
        lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, -t], -1)[..., 0],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: torch.cat([t, t], 1)[:, :16],
    )  # fmt: skip
    for i, view in enumerate(views):
        other = views[(i + 1) % len(views)]
        strided = Tuning(other(v), given.high, given.low, False, given.tensor_scale)
        assert torch.equal(tuned_ops.qdq(view(x), fmt, strided), plain_y)
        found = tuned_ops.backward(view(x), view(other(dy)), fmt, strided, Wanted(True, True, True, True))
        for one in ("dx", "dv"):
            assert torch.equal(found[one], plain[one])
        for one in ("d_high", "d_low"):
            torch.testing.assert_close(found[one], plain[one], rtol=1e-5, atol=1e-4)
    expanded = tuned_ops.backward(x, dy[:, :, :1].expand(shape), fmt, given, Wanted(True, True))
    dense = tuned_ops.backward(x, dy[:, :, :1].expand(shape).contiguous(), fmt, given, Wanted(True, True))
    assert torch.equal(expanded["dx"], dense["dx"]) and torch.equal(expanded["dv"], dense["dv"])
