"""Straight-through gradients: the identity where a number was in range before rounding, 0 where it was clipped."""

import pytest
import torch

import tritonq as tq
from tritonq import autograd, ops

FORMATS = ("int4_g32", "int4_g32_half_range", "int4_g32_absmax", "int4_g32_asym", "int8_channel_half_range",
           "int3_g8_f32_half_range", "fp8_e4m3_channel", "fp8_e5m2_tensor", "fp8_e4m3_b32x16", "mxfp4", "mxfp8_ceil",
           "mxfp4_even", "mxfp6_e3m2", "mxfp4_rceil", "mxfp8_rceil", "nvfp4", "e3m4_g48")  # fmt: skip
CLIPS = ("int4_g32_half_range", "int8_channel_half_range", "int3_g8_f32_half_range", "mxfp4", "mxfp6_e3m2")

NEVER = ("fp8_e4m3_channel", "fp8_e5m2_tensor", "fp8_e4m3_b32x16", "e3m4_g48", "mxfp4_rceil", "mxfp8_rceil")
# The others clip where a scale was rounded down when it was stored.


def numbers(shape, device, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(device, dtype)


def expand(part, fmt, shape):
    """A part of the scale's shape for every element of x, in float64."""
    part = (part.view(torch.uint8) if part.dtype is torch.uint8 else part).double()
    rows, cols = fmt.group
    if rows == -1:
        return part.reshape(1).expand(shape)
    along = shape[-1] if cols == -1 else cols
    part = part.repeat_interleave(along, -1)[..., : shape[-1]]
    return part.repeat_interleave(rows, -2)[..., : shape[-2], :] if rows > 1 else part


def oracle(x, fmt, **given):
    """(inside, sure) in float64: where x / scale is in the range of the codes, and where fp32 cannot disagree."""
    parts = ops.quantize(x, fmt, **given)
    scale = expand(parts["scale"], fmt, tuple(x.shape))
    if fmt.tensor_scale:
        scale = scale / parts["tensor_scale"].double()
    ratio = torch.where(scale == 0, 0.0, x.double() / scale)
    low, high = -fmt.element.max, fmt.element.max
    if fmt.zero_point:
        zero = expand(parts["zero_point"], fmt, tuple(x.shape))
        low, high = -zero, 2.0**fmt.bits - 1 - zero
    elif fmt.element.codec.offset_binary:
        low = low - 1
    low, high = (torch.as_tensor(bound, dtype=torch.float64, device=x.device) for bound in (low, high))
    sure = ((ratio - low).abs() > 1e-5 * (1 + low.abs())) & ((ratio - high).abs() > 1e-5 * (1 + high.abs()))
    return (ratio >= low) & (ratio <= high), sure


def check(x, name, **given):
    """The gradient is exactly dy or exactly 0; returns how many elements were clipped."""
    fmt = tq.get_format(name)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = tq.qdq(leaf, fmt, **given)
    assert torch.equal(y, tq.quantize(x, fmt, **given).dequantize()) and y.dtype is x.dtype
    dy = numbers(y.shape, x.device, 9, y.dtype)
    y.backward(dy)
    inside, sure = oracle(x, fmt, **given)
    assert leaf.grad.shape == x.shape and leaf.grad.dtype is x.dtype
    assert ((leaf.grad == dy) | (leaf.grad == 0)).all()
    assert torch.equal(leaf.grad[sure], torch.where(inside, dy, 0)[sure])
    return int((~inside & sure).sum())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 96), (3, 40, 50), (2, 2, 33, 17)])
def test_gradient_is_the_identity_where_nothing_was_clipped(name, shape, device):
    """Zero gradient for rounded numbers, or the identity for clipped ones: both train, and both are wrong."""
    clipped = check(numbers(shape, device), name)
    assert clipped > 0 if name in CLIPS else clipped == 0 if name in NEVER else True
    check(numbers(shape, device, dtype=torch.bfloat16), name)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_rceil", "mxfp8", "mxfp8_rceil"])
def test_floor_clips_and_rceil_does_not(name, device):
    """OCP's floor leaves the top quarter of a binade above the largest code; rounding the exponent up never does."""
    x = torch.full((4, 64), 0.1, device=device)
    x[:, 5], x[:, 40] = 7.9, -7.9  # 7.9 / 2^e with 2^e * max just below it
    leaf = x.clone().requires_grad_()
    tq.qdq(leaf, name).sum().backward()
    wanted = torch.ones_like(x)
    if "rceil" not in name:
        wanted[:, [5, 40]] = 0
    assert torch.equal(leaf.grad, wanted)


def test_half_range_clips_the_positive_end_only(device):
    """Codes are -8..7 and the scale puts the largest magnitude at 7.5."""
    x = torch.tensor([[7.5, -7.5, 7.0, 7.1, -1.0, 0.0, 0.4, 3.0]], device=device).requires_grad_()
    tq.qdq(x, "int4_g8_f32_half_range").sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "name", ["int4_g32", "fp8_e4m3_channel", "mxfp4", "e3m4_g48", "fp8_e4m3_b32x16", "int4_g32_asym", "fp8_e4m3_tensor",
             "nvfp4"],
)  # fmt: skip
def test_given_scales(name, device):
    """Scales computed anew in backward would clip nothing where the given ones clip half."""
    fmt, x = tq.get_format(name), numbers((64, 96), device)
    parts = ops.quantize(x / 8, fmt)  # scales an eighth of what x needs
    names = ("scale", "zero_point", "tensor_scale")
    clipped = check(x, name, **{k: parts[k] for k in names if k in parts})
    assert clipped > x.numel() // 8
    if fmt.tensor_scale:
        check(x, name, tensor_scale=parts["tensor_scale"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*tq.FORMATS, "e3m4_g48", "int5_g96"])
def test_gpu_gives_the_bits_of_the_cpu(name):
    """Two definitions: the kernel recomputes what it clips, the CPU path compares with scales that it has computed."""
    fmt = tq.get_format(name)
    for dtype, shape in ((torch.bfloat16, (96, 512)), (torch.float32, (3, 40, 200)), (torch.float64, (33, 70))):
        x, dy = numbers(shape, "cpu", dtype=dtype), numbers(shape, "cpu", 1, dtype)
        x[..., 3] *= 1e4
        x[0, ..., 1] = float("inf")
        x[-1, ..., 2] = float("nan")
        found = ops.qdq_backward(x.cuda(), dy.cuda(), fmt)
        assert torch.equal(found.cpu(), ops.qdq_backward(x, dy, fmt))


@pytest.mark.parametrize("name", ["int4_g32_half_range", "mxfp4", "fp8_e4m3_b32x16", "nvfp4", "fp8_e5m2_tensor"])
def test_strides_of_inputs_and_gradients(name, device):
    """Transposed, sliced, expanded: gradients line up with the elements, not with memory."""
    x, dy = numbers((48, 64), device), numbers((48, 64), device, 1)
    leaf = x.clone().requires_grad_()
    tq.qdq(leaf, name).backward(dy)
    for make, view in (
        (lambda t: t.t().contiguous(), lambda t: t.t()), (lambda t: torch.stack([t, -t], -1), lambda t: t[..., 0]),
        (lambda t: torch.cat([t, t, t])[None], lambda t: t[0, 48:96]), (lambda t: t.flip(0), lambda t: t.flip(0)),
    ):  # fmt: skip
        base = make(x).requires_grad_()
        for gradient in (dy, view(make(dy))):
            base.grad = None
            tq.qdq(view(base), name).backward(gradient)
            assert torch.equal(view(base.grad), leaf.grad)
    wide = x[:, :1].clone().requires_grad_()
    tq.qdq(wide.expand(48, 64), "mxfp8_rceil").sum().backward()
    assert wide.grad.eq(64).all()


def test_used_twice_and_composed(device):
    """Gradients of two uses add up; a chain of two clips twice."""
    x = numbers((8, 64), device).requires_grad_()
    (tq.qdq(x, "mxfp4") + 2 * tq.qdq(x, "mxfp4")).sum().backward()
    once = x.detach().clone().requires_grad_()
    tq.qdq(once, "mxfp4").sum().backward()
    assert torch.equal(x.grad, 3 * once.grad) and set(once.grad.unique().tolist()) == {0.0, 1.0}
    x.grad = None
    tq.qdq(tq.qdq(x, "int4_g32_half_range"), "mxfp8_rceil").sum().backward()
    y = x.detach().clone().requires_grad_()
    tq.qdq(y, "int4_g32_half_range").sum().backward()
    assert torch.equal(x.grad, y.grad)
    graph = tq.qdq(x, "mxfp4").sum()
    graph.backward(retain_graph=True)
    graph.backward()


def test_no_graph_where_none_is_needed(device):
    x = numbers((4, 32), device)
    assert not tq.qdq(x, "mxfp4").requires_grad
    with torch.no_grad():
        assert not tq.qdq(x.clone().requires_grad_(), "mxfp4").requires_grad
    y = tq.qdq(x.clone().requires_grad_(), "mxfp4_rceil")
    assert y.requires_grad and not y.grad_fn.saved_tensors  # nothing is clipped, so nothing is kept
    empty = torch.empty(0, 32, device=device, requires_grad=True)
    tq.qdq(empty, "mxfp4").sum().backward()
    assert empty.grad.shape == (0, 32)


def test_scales_that_are_found_get_no_gradient(device):
    """x's gradient takes the scale as constant; one that is given gets its own (`test_learned.py`)."""
    x, fmt = numbers((4, 64), device).requires_grad_(), tq.get_format("int4_g32_f32")
    scale = ops.quantize(x.detach(), fmt)["scale"]
    y = tq.qdq(x, fmt, scale=scale)
    y.sum().backward()
    assert scale.grad is None and x.grad is not None
    learned = scale.clone().requires_grad_()
    again = tq.qdq(x.detach(), fmt, scale=learned)
    again.sum().backward()
    assert torch.equal(y, again) and learned.grad is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_linear(lead, bias, device):
    """Square weight and any rank of x: an axis mixed up in backward keeps the shape; the weight is not kept dense."""
    fmt, weight = tq.get_format("int4_g32"), numbers((64, 64), device, 2)
    q = tq.quantize(weight, fmt)
    dense = q.dequantize()
    results = []
    for quantized in (True, False):
        x = numbers((*lead, 64), device, 3).requires_grad_()
        b = numbers((64,), device, 4).requires_grad_() if bias else None
        y = autograd.linear(x, q._buf, q._layout, b) if quantized else torch.nn.functional.linear(x, dense, b)
        if quantized:
            assert [t.data_ptr() for t in y.grad_fn.saved_tensors] == [q._buf.data_ptr()]
        y.backward(numbers(y.shape, device, 5))
        results.append((y, x.grad, *([b.grad] if bias else [])))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*results, strict=True))
    frozen = numbers((*lead, 64), device, 3)
    trained = numbers((64,), device, 4).requires_grad_()
    autograd.linear(frozen, q._buf, q._layout, trained).sum().backward()
    assert trained.grad.eq(max(1, frozen.numel() // 64) if lead != (0,) else 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_output_of_linear_is_a_tensor_of_its_own(bias, device):
    """Residuals are added in place; autograd refuses that for a view that a Function returned, and in three dimensions
    with a bias torch's linear returns one."""
    fmt, weight = tq.get_format("int4_g32"), numbers((64, 64), device, 2)
    b = numbers((64,), device, 4) if bias else None
    q = tq.quantize(weight, fmt)
    dense = q.dequantize()
    results = []
    for linear in (
        lambda x: torch.nn.functional.linear(x, dense, b),
        lambda x: autograd.linear(x, q._buf, q._layout, b),
        lambda x: autograd.qdq_linear(x, weight, b, fmt),
    ):
        x = numbers((2, 3, 64), device, 3).requires_grad_()
        y = linear(x)
        y += 1
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_linear_is_recomputed_in_backward(device):
    """Checkpointing without reentering autograd unpacks what backward saved a single time."""
    fmt = tq.get_format("int4_g32")
    q = tq.quantize(numbers((64, 64), device, 2), fmt)
    gradients = []
    for recomputed in (False, True):
        x = numbers((2, 3, 64), device, 3).requires_grad_()

        def twice(x):
            return autograd.linear(autograd.linear(x, q._buf, q._layout), q._buf, q._layout)

        y = torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=False) if recomputed else twice(x)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_bad_input(device):
    for x, fmt, error, words in (
        (torch.ones(4, dtype=torch.int32, device=device), "mxfp4", TypeError, "int32"),
        (torch.ones((), device=device), "mxfp4", ValueError, "reshape"),
        (torch.ones(4, device=device), "mxfp5", ValueError, "mxfp5"),
        (torch.ones(4, device=device), "fp8_e4m3_b2x2", ValueError, "last two axes"),
    ):
        with pytest.raises(error, match=words):
            tq.qdq(x, fmt)
    with pytest.raises(ValueError, match="no zero_point"):
        tq.qdq(torch.ones(4, device=device), "mxfp4", zero_point=torch.ones(1, dtype=torch.uint8, device=device))
    with pytest.raises(TypeError, match="e8m0"):
        tq.qdq(torch.ones(4, device=device), "mxfp4", scale=torch.ones(1, device=device))


SATURATING = ("fp8_e4m3_tensor", "mxfp4", "int4_g32_half_range", "mxfp8_rceil")


@pytest.mark.parametrize("name", SATURATING)
def test_function_transforms(name, device):
    """torch.func sees the gradient that autograd sees, for each sample of a batch, and forward mode its transpose."""
    x = torch.randn(3, 4, 64, device=device)
    weight = torch.randn(4, 64, device=device)
    leaves = [sample.clone().requires_grad_() for sample in x]
    expected = [torch.autograd.grad((tq.qdq(leaf, name) * weight).sum(), leaf)[0] for leaf in leaves]

    def loss(sample):
        return (tq.qdq(sample, name) * weight).sum()

    assert torch.equal(torch.func.grad(loss)(x[0]), expected[0])
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), torch.stack(expected))
    y, tangent = torch.func.jvp(lambda sample: tq.qdq(sample, name), (x[0],), (weight,))
    assert torch.equal(y, tq.qdq(x[0], name)) and torch.equal(tangent, expected[0])
    with torch.autograd.forward_ad.dual_level():
        dual = tq.qdq(torch.autograd.forward_ad.make_dual(x[0], weight), name)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[0])


@pytest.mark.parametrize("name", SATURATING)
def test_double_backward(name, device):
    """The gradient is linear in what comes in: that of y^2 is 2 y where x was not clipped, and its own is 2 there."""
    x = torch.randn(4, 64, device=device, requires_grad=True)
    (through,) = torch.autograd.grad(tq.qdq(x, name).sum(), x)
    (first,) = torch.autograd.grad(tq.qdq(x, name).square().sum(), x, create_graph=True)
    assert torch.equal(first, 2 * tq.qdq(x, name).detach() * through)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2 * through)
