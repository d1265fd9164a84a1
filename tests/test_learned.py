"""QDQ with v, min_scale and max_scale: values bit for bit, gradients against float64 autograd, the step against both.

Sums of gradients over a group are compared with a tolerance of 1e-5 of the sum of magnitudes: they are fp32 sums in an
order that the definition leaves open.
"""

import learned_oracle
import pytest
import torch
from conftest import INTERPRET

import tritonq as tq
from tritonq import learned_ops, learned_plans, ops
from tritonq.formats import FORMATS, get_format
from tritonq.learned_reference import Learned, Wanted

# One of each kind: scale rules, storage types, element types, granularities.
KINDS = ("int4_g32", "int4_g32_absmax", "int8_channel_f16_half_range", "int4_g32_asym", "int3_g8_f32", "mxint8",
         "mxfp4", "mxfp8_rceil", "mxfp6_e3m2_even", "mxfp4_ceil", "nvfp4", "fp8_e4m3_channel", "fp8_e5m2_tensor",
         "fp8_e4m3_b4x8", "e4m3_g32_ue5m3", "nf4_g64", "e3m4_g48", "int5_g96", "q4_k", "q6_k", "int4_tensor_asym",
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
    x[4].clamp_(-4.0, 4.0)
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
    view, _, groups = learned_oracle.oracle.regions(tuple(x.shape), fmt)
    flat, flat_dy = x.detach().cpu().double().reshape(view), dy.cpu().double().reshape(view)
    for index, where in groups:
        sizes[index] = flat_dy[where].abs().sum() * (flat[where].abs().max() + 1e-30) * 2
    return sizes.reshape(fmt.scale_shape(tuple(x.shape)))


def check(x, fmt, device, dy=None, **parameters):
    """Value and every gradient of one call; returns what was expected."""
    dy = numbers(x.shape, 9, x.dtype, 1.0) if dy is None else dy
    own = leaves(device, x=x, **parameters)
    y = tq.qdq(own["x"], fmt, **{name: t for name, t in own.items() if name != "x"})
    expected = learned_oracle.qdq(x, fmt, dy, **parameters)
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
    v = numbers(shape, 1, scale=0.8)
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


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_absmax", "int4_g32_asym", "mxfp4", "fp8_e4m3_channel"])
def test_ties_and_negative_ratios(name, device):
    """Extremes of equal magnitude: the positive one has the gradient. Negative ratios count as 0 and get none."""
    fmt, shape = get_format(name), (8, 64)
    x, one = awkward(shape), torch.ones(fmt.scale_shape(shape))
    x[0, ::3] = 1e-38  # a scale that may be lifted
    dy = numbers(shape, 4, torch.bfloat16)
    found = check(x, fmt, device, dy, min_scale=one, max_scale=one.clone())
    tied = found.min_scale[4] == 0 if not fmt.zero_point else found.min_scale[4] != 0
    assert tied.all() and (found.max_scale[4] != 0).any()
    check(x, fmt, device, dy, min_scale=-one, max_scale=one * 0.7)
    check(x, fmt, device, dy, min_scale=one * 0.7, max_scale=-one)


LEARNED = ("int4_g32", "int4_g32_asym", "fp8_e4m3_channel", "mxfp4", "nvfp4", "int4_tensor_asym")


@pytest.mark.parametrize("name", LEARNED)
def test_learned_step_size(name, device):
    """A given scale and zero point, of any floating dtype, take gradients; so does v beside them."""
    fmt, shape = get_format(name), (6, 72)
    x = numbers(shape, 6)
    parts = ops.quantize(x, fmt)
    scale = learned_scales(parts["scale"], fmt)
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
    largest = {"int4_g32_asym": 15, "int4_tensor_asym": 15}.get(name) or learned_oracle.oracle.element_max(fmt.element)
    factor = (count * largest) ** -0.5  # the largest code without a sign
    for one in given:
        torch.testing.assert_close(own[one].grad, plain[one].grad * factor, rtol=1e-5, atol=1e-6)


def test_learned_scales_without_gradients(device):
    """Evaluation and the first pass of activation checkpointing compute what training does."""
    x, scale = numbers((4, 64)).to(device), torch.rand(4, 2, device=device, requires_grad=True)
    zero = torch.full((4, 2), 6.4, device=device, requires_grad=True)
    y = tq.qdq(x, "int4_g32", scale=scale)
    asymmetric = tq.qdq(x, "int4_g32_asym", scale=scale, zero_point=zero)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(tq.qdq(x, "int4_g32", scale=scale), y)
            assert torch.equal(tq.qdq(x, "int4_g32_asym", scale=scale, zero_point=zero), asymmetric)


def learned_scales(scale, fmt):
    from tritonq.codecs import scale as scales

    return scales.load(scale, fmt)


@pytest.mark.parametrize("name", ["int4_g32", "mxfp4", "fp8_e4m3_b4x8", "fp8_e4m3_channel", "int4_tensor_asym", "q4_k"])
def test_strides(name, device):
    """Transposed, sliced, expanded and stacked x, v and dy: gradients line up with the elements, not with memory."""
    fmt, shape = get_format(name), (2, 16, 64)
    x, v, dy = numbers(shape).to(device), numbers(shape, 1, scale=0.3).to(device), numbers(shape, 2).to(device)
    own = {"min_scale": ratios(fmt, shape, 2).to(device), "max_scale": ratios(fmt, shape, 3).to(device)}
    given = learned_ops.check(x, fmt, v, own["min_scale"], own["max_scale"], None, None, None)
    plain_y = learned_ops.qdq(x, fmt, given)
    plain = learned_ops.backward(x, dy, fmt, given, Wanted(True, True, True, True))
    views = (
        lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, -t], -1)[..., 0],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: torch.cat([t, t], 1)[:, :16],
    )  # fmt: skip
    for i, view in enumerate(views):
        other = views[(i + 1) % len(views)]
        strided = Learned(other(v), given.high, given.low, False, given.tensor_scale)
        assert torch.equal(learned_ops.qdq(view(x), fmt, strided), plain_y)
        found = learned_ops.backward(view(x), view(other(dy)), fmt, strided, Wanted(True, True, True, True))
        for one in ("dx", "dv"):
            assert torch.equal(found[one], plain[one])
        for one in ("d_high", "d_low"):
            torch.testing.assert_close(found[one], plain[one], rtol=1e-5, atol=1e-4)
    expanded = learned_ops.backward(x, dy[:, :, :1].expand(shape), fmt, given, Wanted(True, True))
    dense = learned_ops.backward(x, dy[:, :, :1].expand(shape).contiguous(), fmt, given, Wanted(True, True))
    assert torch.equal(expanded["dx"], dense["dx"]) and torch.equal(expanded["dv"], dense["dv"])


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_asym", "e3m4_g48", "fp8_e4m3_channel", "q4_k"])
def test_tiles_do_not_show(name, device, monkeypatch):
    """Small tiles, of which rows hold several, give the bits of large ones; groups larger than a tile do, too."""
    fmt, shape = get_format(name), (2, 600)
    x, v, dy = numbers(shape), numbers(shape, 1, scale=0.3), numbers(shape, 2)
    given = Learned(*(t.to(device) for t in (v, ratios(fmt, shape, 2), ratios(fmt, shape, 3))))

    def call():
        learned_plans.forget()
        found = learned_ops.backward(x.to(device), dy.to(device), fmt, given, Wanted(True, True, True, True))
        packed = learned_ops.quantized(x.to(device), fmt, given)
        return {"y": learned_ops.qdq(x.to(device), fmt, given), **found, **packed}

    large = call()
    for choice, largest in (((512, 8), 8192), ((256, 16), 512)):
        monkeypatch.setattr(learned_plans, "CHOICES", dict.fromkeys(learned_plans.CHOICES, choice))
        monkeypatch.setattr(learned_plans, "_LARGEST_TILE", largest)
        monkeypatch.setattr(learned_plans, "_scaled", lambda tile: tile)
        small = call()
        for one, t in large.items():
            if one in ("d_high", "d_low"):
                torch.testing.assert_close(small[one], t, rtol=1e-5, atol=1e-4)
            else:
                learned_oracle.oracle.assert_same(small[one], t, one)
    learned_plans.forget()


# ---------------------------------------------------------------------------------------------- more of the definition


def test_fp8_passes_small_gradients(device):
    """Elsewhere a gradient is cast to unscaled fp8 on its way back, which turns 99.6% of gradients near 1e-2 to 0."""
    x = numbers((8, 64)).to(device).requires_grad_()
    v = torch.zeros(8, 64, device=device)
    y = tq.qdq(x, "fp8_e4m3_channel", v=v)
    y.backward(torch.full_like(y, 1e-4))
    assert x.grad.eq(1e-4).all()


@pytest.mark.parametrize("name", ["int4_g32", "mxfp8", "fp8_e4m3_channel", "int4_g32_asym", "q4_k"])
def test_groups_that_are_not_finite(name, device):
    """y is NaN in the whole group, dx is dy there, other gradients are 0; neighbours are as without it."""
    fmt, shape = get_format(name), (3, 512)
    x, v, dy = numbers(shape), numbers(shape, 1, scale=0.3), numbers(shape, 2)
    own = {"min_scale": ratios(fmt, shape, 2), "max_scale": ratios(fmt, shape, 3)}
    clean = learned_oracle.qdq(x, fmt, dy, v=v, **own)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    tensors = leaves(device, x=x, v=v, **own)
    y = tq.qdq(tensors["x"], fmt, **{n: t for n, t in tensors.items() if n != "x"})
    y.backward(dy.to(device))
    size = fmt.super_group or (512 if fmt.group[1] == -1 else fmt.group[1])
    bad = torch.zeros(shape, dtype=torch.bool)
    bad[1:, :size] = True
    assert torch.equal(torch.isnan(y.cpu()), bad)
    assert torch.equal(tensors["x"].grad.cpu()[bad], dy[bad]) and (tensors["v"].grad.cpu()[bad] == 0).all()
    assert torch.equal(y.detach().cpu().double()[~bad], clean.y[~bad])
    for one in own:
        gradient = tensors[one].grad.cpu()
        assert torch.isfinite(gradient).all()
        assert (gradient[1:, : max(1, gradient.shape[1] * size // 512)] == 0).all()


def test_what_is_not_finite_or_negative_among_the_parameters(device):
    """A ratio that is not finite makes its group NaN, a negative one counts as 0; NaN in v as infinity with the
    sign of x / s."""
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -7.5]] * 3, device=device)
    low = torch.tensor([[torch.nan], [-1.0], [0.5]], device=device).requires_grad_()
    y = tq.qdq(x, "int4_g8_f32_absmax", min_scale=low)
    y.sum().backward()
    assert torch.isnan(y[0]).all() and torch.equal(y[1], torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8], device=device))
    assert low.grad[0] == 0 and low.grad[1] == 0
    v = torch.zeros(3, 8, device=device)
    v[0, 2] = torch.nan
    y = tq.qdq(x, "int4_g8_f32_absmax", v=v)
    assert y[0, 2] == y[0].max() == 7.5 and torch.isfinite(y).all()


def test_empty_and_one_dimension(device):
    x = torch.empty(0, 32, device=device, requires_grad=True)
    ratio = torch.ones(0, 1, device=device, requires_grad=True)
    tq.qdq(x, "mxfp4", max_scale=ratio).sum().backward()
    assert x.grad.shape == (0, 32) and ratio.grad.shape == (0, 1)
    check(numbers((70,)), get_format("int4_g32"), device, v=numbers((70,), 1, scale=0.3),
          max_scale=ratios(get_format("int4_g32"), (70,), 2))  # fmt: skip
    check(numbers((70,), dtype=torch.float64), get_format("fp8_e4m3_tensor"), device, min_scale=torch.full((1,), 0.7))


def test_bad_parameters(device):
    x = numbers((4, 64)).to(device)
    ratio = torch.ones(4, 2, device=device)
    for arguments, error, words in (
        ({"v": x[:2]}, ValueError, r"\(4, 64\)"), ({"max_scale": ratio[:2]}, ValueError, r"\(4, 2\)"),
        ({"min_scale": ratio.to(torch.int32)}, TypeError, "int32"), ({"v": 0.5}, TypeError, "float"),
        ({"v": x, "rounding": "stochastic"}, ValueError, "nearest"), ({"v": x, "search": "mse"}, ValueError, "search"),
        ({"scale": ratio, "max_scale": ratio}, ValueError, "computed"),
        ({"step": tq.SignStep(0.1, device=device)}, ValueError, "at least one"),
        ({"scale": ratio.requires_grad_(), "scale_gradient": "l2"}, ValueError, "lsq"),
        ({"scale_gradient": "l2"}, ValueError, "lsq"), ({"v": x, "scale_gradient": None}, ValueError, "lsq"),
        ({"v": x, "step": 0.1}, TypeError, "SignStep"), ({"scale": 0.5}, TypeError, "bfloat16"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            tq.qdq(x, "int4_g32", **arguments)
    with pytest.raises(ValueError, match="again"):
        tq.qdq(numbers((1, 256)).to(device), "q4_k", v=None, scale=torch.ones(1, 8, device=device).requires_grad_())
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=">= 0"):
            tq.SignStep(rate)
    with pytest.raises(ValueError, match="lowest"):
        tq.SignStep(0.1, clamp_v=(float("nan"), 0.5))


def test_forward_keeps_only_its_inputs(device):
    x, v = numbers((16, 64)).to(device), torch.zeros(16, 64, device=device, requires_grad=True)
    ratio = torch.ones(16, 4, device=device, requires_grad=True)
    y = tq.qdq(x, "nvfp4", v=v, max_scale=ratio)
    saved = [t for name in dir(y.grad_fn) if name == "saved_tensors" for t in y.grad_fn.saved_tensors if t is not None]
    known = {x.data_ptr(), v.data_ptr(), ratio.data_ptr()}
    assert saved and all(t.data_ptr() in known or t.numel() <= 1 for t in saved)
    assert not tq.qdq(x, "nvfp4", v=v.detach()).requires_grad


# ------------------------------------------------------------------------------------------------------- packed codes


def check_packed(x, fmt, device, **parameters):
    """dequantize(quantize(x, v, ...)) == qdq(x, v, ...), bit for bit, in the bytes that the format declares."""
    own = {name: t.to(device) for name, t in parameters.items()}
    packed, y = tq.quantize(x.to(device), fmt, **own), tq.qdq(x.to(device), fmt, **own)
    learned_oracle.oracle.assert_same(packed.dequantize(), y, fmt.name)
    storage = fmt.storage(tuple(x.shape))
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.parts().items()} == storage


@pytest.mark.parametrize("name", [*KINDS, "int3_g7", "int8_g128", "fp8_e4m3_b256x256"])
def test_packed(name, device):
    fmt, shape = get_format(name), (8, 200)
    x, v = awkward(shape), numbers(shape, 1, scale=0.4)
    x[6, 3], x[7, 199] = torch.nan, -torch.inf
    v[0, 5] = torch.nan
    check_packed(x, fmt, device, v=v, min_scale=ratios(fmt, shape, 2), max_scale=ratios(fmt, shape, 3))


def test_packed_otherwise(device):
    """Parts of the parameters, other strides, given scales, several matrices, nothing at all."""
    fmt, shape = get_format("int4_g32_asym"), (2, 6, 64)
    x, v = numbers(shape, dtype=torch.bfloat16), numbers(shape, 1, scale=0.4)
    check_packed(x.mT.contiguous().mT, fmt, device, v=v)
    check_packed(x, fmt, device, max_scale=ratios(fmt, shape, 3, torch.bfloat16))
    parts = ops.quantize(x, fmt)
    check_packed(x, fmt, device, v=v, scale=parts["scale"], zero_point=parts["zero_point"])
    fp8 = get_format("fp8_e4m3_channel")
    y = x.clone()
    y[0, 0, 0], y[1, 1, 1] = torch.nan, torch.inf
    check_packed(y, fp8, device, v=v, scale=ops.quantize(x, fp8)["scale"])
    empty = tq.quantize(torch.empty(0, 64, device=device), fmt, v=torch.empty(0, 64, device=device))
    assert empty.shape == (0, 64)
    with pytest.raises(ValueError, match="nearest"):
        tq.quantize(x.to(device), fmt, v=v.to(device), search="mse")
    with pytest.raises(TypeError, match="stored as"):
        tq.quantize(x.to(device), "mxfp4", v=v.to(device), scale=torch.ones(2, 6, 2, device=device))


# ------------------------------------------------------------------------------------------------------- sign descent


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_asym", "mxfp4", "nvfp4", "fp8_e4m3_tensor", "fp8_e4m3_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step(name, dtype, device):
    """The step is the gradient's sign times the rate, clamped, bit for bit over several steps of a decaying rate."""
    fmt, shape = get_format(name), (6, 96)
    x = numbers(shape, dtype=torch.bfloat16).to(device)
    start = {"v": torch.zeros(shape, dtype=dtype), "min_scale": ratios(fmt, shape, 1, dtype),
             "max_scale": torch.ones(fmt.scale_shape(shape), dtype=dtype)}  # fmt: skip
    fused, plain = leaves(device, **start), leaves(device, **start)
    step = tq.SignStep(0.3, min_scale_lr=0.05, steps=3, clamp_v=(-0.5, 0.5), clamp_scale=(0.25, 1.0), device=device)
    for i in range(4):
        dy = numbers(shape, 10 + i, torch.bfloat16).to(device)
        y, expected = tq.qdq(x, fmt, **fused, step=step), tq.qdq(x, fmt, **plain)
        assert torch.equal(y, expected)
        y.backward(dy)
        expected.backward(dy)
        for one, p in plain.items():
            lr = torch.tensor(0.3 if one == "v" else 0.05) * (1.0 - torch.tensor(float(i)) / 3).clamp(min=0.0)
            bounds = (-0.5, 0.5) if one == "v" else (0.25, 1.0)
            with torch.no_grad():
                p.copy_((p.float() - lr.to(device) * p.grad.float().sign()).clamp(*bounds))
            p.grad = None
            assert torch.equal(fused[one], p), f"step {i}, {one}: {(fused[one] != p).sum()} differ"
            assert fused[one].grad is None
        step.advance()
    assert not torch.equal(fused["v"].cpu(), start["v"]) and step.rates.tolist() == [0.0, 0.0]
    step.reset()
    assert torch.equal(step.rates, step.initial)


def test_step_needs_no_leaf(device):
    """Buffers are moved, too, and x gets its gradient; parameters of other strides are written through."""
    x, v = numbers((8, 64)).to(device).requires_grad_(), torch.zeros(64, 8, device=device).t()
    ratio = torch.ones(2, 8, device=device).t()
    step = tq.SignStep(0.1, device=device)
    y = tq.qdq(x, "int4_g32", v=v, max_scale=ratio, step=step)
    dy = numbers((8, 64), 3).to(device)
    y.backward(dy)
    twin = {"v": torch.zeros(8, 64), "max_scale": torch.ones(8, 2)}
    expected = learned_oracle.qdq(x, get_format("int4_g32"), dy, **twin)
    assert torch.equal(x.grad.cpu().double(), expected.x)
    assert torch.equal(v.cpu(), -0.1 * expected.v.sign().float())
    assert torch.equal(ratio.cpu(), (1 - torch.tensor(0.1) * expected.max_scale.sign().float()).clamp(0, 1))
    with torch.no_grad():
        assert not tq.qdq(x, "int4_g32", v=v, step=step).requires_grad
    frozen = tq.qdq(x.detach(), "int4_g32", v=v, step=step)
    assert frozen.requires_grad


def test_step_of_parameters_that_are_nan(device):
    """They end at the lower bound, on every backend."""
    v, ratio = torch.zeros(2, 32, device=device), torch.ones(2, 1, device=device)
    v[0, 3], ratio[1] = torch.nan, torch.nan
    step = tq.SignStep(0.1, clamp_v=(-0.25, 0.5), clamp_scale=(0.125, 1.0), device=device)
    tq.qdq(numbers((2, 32)).to(device), "int4_g32", v=v, max_scale=ratio, step=step).sum().backward()
    assert v[0, 3] == -0.25 and ratio[1] == 0.125


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "q4_k"])
def test_best(name, device):
    """Of several losses the smallest decides, and NaN never; the data is packed."""
    fmt, shape = get_format(name), (4, 256)
    x = numbers(shape).to(device)
    best = tq.Best(x, fmt)
    assert torch.equal(best.value.dequantize(), tq.qdq(x, fmt)) and best.loss == torch.inf
    seen = []
    for i, loss in enumerate([3.0, float("nan"), 1.0, 2.0]):
        v = numbers(shape, i, scale=0.3).to(device)
        ratio = ratios(fmt, shape, i).to(device)
        best.update(torch.tensor([loss], device=device), x, v=v, max_scale=ratio)
        seen.append(tq.qdq(x, fmt, v=v, max_scale=ratio))
        assert torch.equal(best.value.dequantize(), seen[0 if i < 2 else 2])
    assert best.loss == 1.0 and not torch.equal(seen[2], seen[3])
    for loss in (x, 1.0):
        with pytest.raises(ValueError, match="one element"):
            best.update(loss, x, v=v)


# ---------------------------------------------------------------------------------------------- what torch makes of it

traced = pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")


@traced
@pytest.mark.parametrize("name", ["int4_g32", "nvfp4"])
@pytest.mark.parametrize("fused", [False, True])
def test_compiled(name, fused, device):
    """One graph, the bits of eager calls, with and without the step in backward."""
    fmt, shape = get_format(name), (4, 64)
    x = numbers(shape, dtype=torch.bfloat16).to(device)
    start = {"v": numbers(shape, 1, scale=0.3), "min_scale": ratios(fmt, shape, 1), "max_scale": ratios(fmt, shape, 2)}
    step = tq.SignStep(0.1, device=device) if fused else None
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"

    def call(x, v, min_scale, max_scale):
        y = tq.qdq(x, name, v=v, min_scale=min_scale, max_scale=max_scale, step=step)
        return (y.float() ** 2).sum()

    one, other = leaves(device, x=x, **start), leaves(device, x=x, **start)
    if fused:
        one, other = ({n: t if n == "x" else t.detach() for n, t in side.items()} for side in (one, other))
    loss, expected = torch.compile(call, fullgraph=True, backend=backend)(**one), call(**other)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for n in one:
        assert torch.equal(one[n], other[n])
        if n == "x" or not fused:
            torch.testing.assert_close(one[n].grad, other[n].grad)
    assert not fused or not torch.equal(one["v"].cpu(), start["v"])


@traced
def test_opcheck(device):
    shape, fmt = (4, 64), get_format("int4_g32_asym")
    x, dy = numbers(shape).to(device), numbers(shape, 2).to(device)
    v, high, low = (t.to(device) for t in (numbers(shape, 1, scale=0.3), ratios(fmt, shape, 1), ratios(fmt, shape, 2)))
    own = (v, high, low, None)
    operators, rates, bounds = torch.ops.tritonq, torch.full((2,), 0.1, device=device), [-0.5, 0.5, 0.0, 1.0]
    needing = [t.clone().requires_grad_() for t in (x, v, high, low)]
    torch.library.opcheck(operators.learned_qdq.default, (needing[0], fmt.name, *needing[1:], None, False, 1.0))
    torch.library.opcheck(operators.learned_backward.default, (x, dy, fmt.name, *own, False, 1.0, [True] * 4))
    torch.library.opcheck(operators.learned_step.default, (x, dy, fmt.name, *own, rates, bounds, True))


@traced
def test_function_transforms(device):
    """torch.func.grad gives what autograd gives, a step refuses it; gradients are not differentiable themselves."""
    x, v = numbers((4, 64)).to(device), numbers((4, 64), 1, scale=0.3).to(device)
    ratio = ratios(get_format("int4_g32"), (4, 64), 2).to(device)

    def loss(v, ratio):
        return tq.qdq(x, "int4_g32", v=v, max_scale=ratio).square().sum()

    found = torch.func.grad(loss, (0, 1))(v, ratio)
    own = leaves(device, v=v, ratio=ratio)
    expected = torch.autograd.grad(loss(**own), list(own.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one, other = torch.func.vmap(loss)(torch.stack([v, -v]), torch.stack([ratio, ratio]))
    assert one == loss(v, ratio) and other == loss(-v, ratio)
    stacked = torch.stack([v, -v], 1)
    for name in ("int4_g32", "nvfp4"):

        def of(v, ratio, name=name):
            return tq.qdq(x, name, v=v, max_scale=ratio).square().sum()

        ones, gradient = torch.ones(get_format(name).scale_shape((4, 64)), device=device), torch.func.grad(of, (0, 1))
        both = torch.func.vmap(gradient, (1, None))(stacked, ones)
        for i, one in enumerate((v, -v)):
            assert all(torch.equal(a[i], b) for a, b in zip(both, gradient(one, ones), strict=True))
    step = tq.SignStep(0.1, device=device)
    with pytest.raises(ValueError, match="allow"):
        torch.func.grad(lambda v: tq.qdq(x, "int4_g32", v=v, step=step).sum())(v)
    (first,) = torch.autograd.grad(loss(**own), own["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_second_backward_of_a_step_is_refused(device):
    x, v = numbers((4, 64)).to(device), torch.zeros(4, 64, device=device)
    y = tq.qdq(x, "int4_g32", v=v, step=tq.SignStep(0.1, device=device)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_checkpointing_and_autocast(device):
    """Activation checkpointing runs forward again, before the step; autocast leaves dtypes alone."""
    from torch.utils.checkpoint import checkpoint

    x, weight = numbers((3, 64)).to(device), numbers((64, 64), 1).to(device)
    results = []
    for again in (False, True):
        v = torch.zeros(64, 64, device=device, requires_grad=True)
        moving, step = torch.zeros(64, 64, device=device), tq.SignStep(0.1, device=device)

        def layer(x, v=v, moving=moving, step=step):
            first = torch.nn.functional.linear(x, tq.qdq(weight, "int4_g32", v=v))
            return torch.nn.functional.linear(first, tq.qdq(weight, "int4_g32", v=moving, step=step))

        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        y.square().sum().backward()
        results.append((y.detach(), v.grad, moving))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][2].any()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tq.qdq(weight, "int4_g32", v=v).dtype is torch.float32


# --------------------------------------------------------------------------------------------------------------- GPUs


ON_GPU = [
    *((name, (64, 1024)) for name in FORMATS), *((name, (5, 333)) for name in KINDS),
    *((name, shape) for name in (*FEW, "fp8_e4m3_channel") for shape in ((3, 20000), (2, 3, 130))),
    ("fp8_e4m3_b256x256", (300, 700)), ("int4_b256x256", (3, 256, 512)), ("int3_g7", (9, 100)), ("int8_g1", (9, 100)),
    ("int8_channel", (2, 300_000)),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name,shape", ON_GPU)
def test_gpu_equals_cpu(name, shape):
    """Every format: y, dx and dv have the bits of the CPU path, sums of groups are close."""
    fmt = get_format(name)
    x, v, dy = numbers(shape, 1, torch.bfloat16), numbers(shape, 2, scale=0.3), numbers(shape, 3, torch.bfloat16)
    own = ratios(fmt, shape, 4), ratios(fmt, shape, 5)
    divisor = ops.tensor_scale(x, fmt) if fmt.tensor_scale else None
    host = Learned(v, *own, False, divisor)
    moved = [None if t is None else t.cuda() for t in (v, *own, divisor)]
    here = Learned(*moved[:3], False, moved[3])
    wanted = Wanted(True, True, True, True)
    assert torch.equal(learned_ops.qdq(x.cuda(), fmt, here).cpu(), learned_ops.qdq(x, fmt, host))
    found = learned_ops.backward(x.cuda(), dy.cuda(), fmt, here, wanted)
    expected = learned_ops.backward(x, dy, fmt, host, wanted)
    assert torch.equal(found["dx"].cpu(), expected["dx"]) and torch.equal(found["dv"].cpu(), expected["dv"])
    sizes = weights(x, fmt, dy, None)
    for one in ("d_high", "d_low"):
        close(found[one], expected[one].double(), sizes, one)
    packed = learned_ops.quantized(x.cuda(), fmt, here)
    learned_oracle.oracle.assert_same_parts(
        {n: t.cpu() for n, t in packed.items()}, learned_ops.quantized(x, fmt, host)
    )
    again = learned_ops.backward(x.cuda(), dy.cuda(), fmt, here, wanted)
    assert all(torch.equal(found[one], again[one]) for one in found), "not deterministic"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "fp8_e4m3_channel", "fp8_e4m3_tensor", "q4_k"])
def test_cuda_graph_and_memory(name):
    """Forward and a fused step are captured; beyond their outputs they take less than 1 MiB."""
    fmt, shape = get_format(name), (1024, 4096)
    x = numbers(shape, dtype=torch.bfloat16).cuda()
    v, ratio = torch.zeros(shape, device="cuda"), torch.ones(fmt.scale_shape(shape), device="cuda")
    step = tq.SignStep(0.01, steps=100, device="cuda")

    def once():
        y = tq.qdq(x, fmt, v=v, max_scale=ratio, step=step)
        y.backward(x)
        step.advance()
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once()
    torch.cuda.synchronize()
    v.zero_()
    ratio.fill_(1.0)
    step.reset()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = once()
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + (1 << 20)
    expected = v.clone(), ratio.clone(), step.rates.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    v.zero_()
    ratio.fill_(1.0)
    step.reset()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((v, ratio, step.rates), expected, strict=True))
    graph.replay()
    assert not torch.equal(v, expected[0])
