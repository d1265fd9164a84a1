"""QTensor: one buffer whose parts are views, through everything that libraries do to a parameter."""

import copy
import gc
import io
import math
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import tritonq as tq
from tritonq import ops
from tritonq.tensor import Layout, QTensor

FORMATS = ("int4_g128", "int4_g128_asym", "int3_g128", "int8_channel", "fp8_e4m3_tensor", "fp8_e4m3_channel",
           "fp8_e4m3_b128x128", "mxfp8", "mxfp6_e2m3", "mxfp4", "nvfp4", "e3m4_g48", "e2m1_g16_ue5m3", "q4_k",
           "q6_k")  # fmt: skip
SEVERAL = ("int4_g128_asym", "fp8_e4m3_b128x128", "nvfp4")


def dense(shape=(256, 384), dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def quantized(name="int4_g128", shape=(256, 384), dtype=torch.float32, device="cpu", seed=0):
    return tq.quantize(dense(shape, dtype, device, seed), name)


def parameter(q):
    return nn.Parameter(q, requires_grad=False)


def same(q, wanted):
    """Both quantized or both dense, of the same dtype and with the same bits."""
    assert isinstance(q, QTensor) == isinstance(wanted, QTensor)
    assert (q.dtype, q.shape) == (wanted.dtype, wanted.shape)
    a, b = (t.dequantize() if isinstance(t, QTensor) else t for t in (q, wanted))
    return torch.equal(a.cpu(), b.cpu())


# ----------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 200), (2, 0, 5)])
def test_parts_are_what_the_format_says(name, shape, device):
    """Breaks where a part loses its dtype or shape, is misaligned, overlaps another, or is a tensor of its own."""
    q, fmt = quantized(name, shape, device=device), tq.get_format(name)
    assert {k: (tuple(p.shape), p.dtype) for k, p in q.parts().items()} == fmt.storage(shape)
    assert isinstance(q.qdata, torch.Tensor) and q.scale.dtype is fmt.scale.dtype
    assert (q.zero_point is not None, q.tensor_scale is not None) == (fmt.zero_point, fmt.tensor_scale)
    buffer = q._buf
    assert buffer.dtype is torch.uint8 and buffer.ndim == 1
    end = 0
    for segment, part in zip(q._layout.segments, q.parts().values(), strict=True):
        assert segment[1] % (256 if segment[0] == "qdata" else 16) == 0 and segment[1] >= end
        end = segment[1] + part.numel() * part.dtype.itemsize
        assert part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert not part.numel() or part.data_ptr() == buffer.data_ptr() + segment[1]
    assert end == buffer.numel()
    for part, wanted in zip(q.parts().values(), ops.quantize(dense(shape, device=device), fmt).values(), strict=True):
        assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_buffer_is_dequantized_where_its_parts_lie(name, dtype, device):
    """On a GPU the second call launches with addresses: of a fresh tensor, and of one inside of a larger buffer that
    begins at 16 bytes. It cannot where that begins at 8, where scales of rows begin anywhere, and within rows."""
    q = quantized(name, device=device)
    rows = [q[128:], q[64:192], q[1:3], q[:, 128:256]] if q.format.group[0] == 1 else [q[128:]]
    for shift in (16, 8):
        store = torch.empty(q._buf.numel() + shift, dtype=torch.uint8, device=device)
        store[shift:] = q._buf
        rows.append(QTensor(store[shift:], q._layout, q.dtype))
    for window in (q, *rows):
        if isinstance(window, QTensor):
            parts = {n: p.clone(memory_format=torch.contiguous_format) for n, p in window.parts().items()}
            wanted = ops.dequantize(parts, q.format, tuple(window.shape), dtype)
            for _ in range(2):
                assert torch.equal(ops.dequantize_buffer(window._buf, window._layout, dtype), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_offsets_are_where_parts_begin(name, device):
    q = quantized(name, device=device)
    assert q._layout.offsets == {n: p.data_ptr() - q._buf.data_ptr() for n, p in q.parts().items()}
    for window in (q[128:], q[:, 128:256], q[1:3]):
        if isinstance(window, QTensor) and window._layout.offsets is not None:
            assert all(p.is_contiguous() for p in window.parts().values())
            found = {n: p.data_ptr() - q._buf.data_ptr() for n, p in window.parts().items()}
            assert window._layout.offsets == found and not any(n % 16 for n in found.values())


def test_layouts_are_values():
    """A layout that does not hash or compare by content recompiles graphs and defeats caches."""
    fmt = tq.get_format("nvfp4")
    first, second = Layout.of(fmt, (4, 32)), Layout.of(tq.get_format("nvfp4"), (4, 32))
    assert first == second and hash(first) == hash(second) and first != Layout.of(fmt, (32, 4))
    names, (layout, dtype) = quantized("nvfp4", (4, 32)).__tensor_flatten__()
    assert names == ["_buf"] and layout == first and dtype is torch.float32


def test_no_view_pins_an_old_buffer(device):
    """Cached part views keep the old buffer alive after the tensor has moved on."""
    q = quantized(device=device)
    old = weakref.ref(q._buf)
    q.scale, q.qdata
    q.data = quantized(seed=1, device=device)
    gc.collect()
    assert old() is None


# ------------------------------------------------------------------------------------------------- identity, .data


@pytest.mark.parametrize("name", SEVERAL)
def test_data_is_a_new_alias_and_retargets_in_place(name, device):
    """Assigning .data on a naive subclass moves the wrapper and leaves the payload where it was."""
    p, new = parameter(quantized(name, device=device)), quantized(name, seed=1, device=device)
    held, alias = weakref.ref(p), p.data
    assert alias is not p and type(alias) is QTensor and alias.data_ptr() == p.data_ptr()
    p.data = new
    assert held() is p and isinstance(p, nn.Parameter) and p.data_ptr() == new.data_ptr() and same(p, new)
    assert alias.data_ptr() != p.data_ptr() and same(alias, quantized(name, device=device))
    other = quantized("mxfp8", (32, 64), torch.bfloat16, device)
    p.data = other
    assert p.format is other.format and tuple(p.shape) == (32, 64) and p.dtype is torch.bfloat16 and same(p, other)
    with pytest.raises(TypeError, match="is a QTensor, got Tensor"):
        p.data = dense(device=device)


@pytest.mark.parametrize("name", SEVERAL)
def test_data_moves_between_devices(name, device):
    """diffusers' group offload: param.data = param.data.to(device), with weakrefs alive."""
    if device == "cpu":
        pytest.skip("needs a second device")
    p = parameter(quantized(name))
    wanted, held, identity = p.dequantize(), weakref.ref(p), id(p)
    for where in (device, "cpu", device):
        p.data = p.data.to(where, non_blocking=True)
        torch.cuda.synchronize()
        assert p.device.type == p._buf.device.type == where and all(t.device.type == where for t in p.parts().values())
        assert id(p) == identity and held() is p and isinstance(p, nn.Parameter)
        assert torch.equal(p.dequantize().cpu(), wanted)
        x = dense((2, 384), device=where)
        assert torch.equal(F.linear(x, p), F.linear(x, p.dequantize()))


def test_copy_constructor(device):
    """accelerate calls type(old)(value, requires_grad=...)."""
    p = parameter(quantized(device=device))
    for grad in (False, True):
        made = type(p)(p.data, requires_grad=grad)
        assert type(made) is QTensor and made is not p and made.requires_grad is grad and made.is_leaf
        assert made.data_ptr() == p.data_ptr() and same(made, p)
    assert not p.requires_grad
    with pytest.raises(TypeError, match="existing QTensor"):
        QTensor(torch.ones(3))


def test_data_ptr_tells_tensors_apart(device):
    """A wrapper's own pointer is 0; accelerate takes equal pointers for tied weights."""
    first, second = quantized(device=device), quantized(seed=1, device=device)
    assert 0 != first.data_ptr() == first.qdata.data_ptr() != second.data_ptr() != 0
    assert first.clone().data_ptr() != first.data_ptr() == first.detach().data_ptr()


def test_a_parameter_is_both():
    p = nn.Parameter(quantized())
    assert isinstance(p, nn.Parameter) and isinstance(p, QTensor) and p.requires_grad and p.is_leaf
    module = nn.Module()
    module.weight = p
    assert dict(module.named_parameters()) == {"weight": p} and not isinstance(quantized(), nn.Parameter)
    assert "int4_g128" in repr(p) and "requires_grad=True" in repr(p) and "requires_grad" not in repr(p.data)


def test_swap_tensors():
    """swap_tensors refuses tensors with weakrefs, and must swap the buffers with the wrappers."""
    a, b = parameter(quantized()), parameter(quantized("mxfp8", (4, 64)))
    wanted = b.dequantize()
    torch.utils.swap_tensors(a, b)
    assert a.format.name == "mxfp8" and tuple(b.shape) == (256, 384)
    assert torch.equal(a.dequantize(), wanted) and same(b, quantized())


# ------------------------------------------------------------------------------------------- operations that stay


@pytest.mark.parametrize("name", SEVERAL)
def test_aliases_and_copies_stay_quantized(name, device):
    """None of these may dequantize; copies must not share memory and aliases must."""
    q = quantized(name, device=device)
    for alias in (q.detach(), torch.ops.aten.alias(q), q.view(256, 384), q.reshape(256, -1), q.contiguous(), q.data):
        assert alias.data_ptr() == q.data_ptr() and same(alias, q)
    for made in (q.clone(), copy.copy(q).clone(), q.to(device, copy=True), copy.deepcopy(q)):
        assert made._buf.data_ptr() != q._buf.data_ptr() and same(made, q)
    for made in (q.to(torch.bfloat16), q.bfloat16(), q.half(), q.double()):
        assert type(made) is QTensor and made.format == q.format
        assert same(made, q.to(made.dtype)) and torch.equal(made.dequantize(), q.dequantize(made.dtype))
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(made.parts().values(), q.parts().values(), strict=True)
        )
    meta = q.to("meta")
    assert type(meta) is QTensor and meta.device.type == meta._buf.device.type == "meta" and q.device.type == device
    assert q.cpu() is q if device == "cpu" else q.cpu().device.type == "cpu"
    assert q.to(torch.int32).dtype is torch.int32 and not isinstance(q.to(torch.int32), QTensor)


@pytest.mark.parametrize("name", SEVERAL)
def test_fresh_tensors_stay_quantized(name, device):
    """empty_like and zeros_like of a dense fallback would be dense; new_zeros of a shape without blocks must be."""
    q = quantized(name, device=device)
    assert torch.empty_like(q).format == q.format and torch.empty_like(q, dtype=torch.half).dtype is torch.half
    assert torch.empty_like(q, device="meta").device.type == "meta"
    assert not isinstance(torch.empty_like(q, dtype=torch.int64), QTensor)
    for zeros in (torch.zeros_like(q), q.new_zeros((256, 384)), q.new_zeros(2, 128, 128)):
        assert type(zeros) is QTensor and zeros.format == q.format and not zeros.dequantize().any()
    for shape in ((), (5,)):
        zeros = q.new_zeros(shape)
        assert tuple(zeros.shape) == shape and zeros.device == q.device and not (zeros + 0).any()
    assert q.new_zeros((3, 3), dtype=torch.int32).dtype is torch.int32


@pytest.mark.parametrize("name", FORMATS)
def test_copy_(name, device):
    """From the same format byte for byte; from anything else by quantizing; a naive subclass writes into a copy."""
    q, target = quantized(name, device=device), quantized(name, seed=1, device=device)
    pointer = target.data_ptr()
    assert target.copy_(q) is target and same(target, q) and target.data_ptr() == pointer
    new = dense(seed=2, dtype=torch.bfloat16, device=device)
    assert same(target.copy_(new), tq.quantize(new.float(), name)) and target.dtype is torch.float32
    strided = dense((384, 256), seed=3, device=device).t()
    assert same(target.copy_(strided), tq.quantize(strided, name))
    other = quantized("int8_channel_f32", seed=4, device=device)
    assert same(target.copy_(other), tq.quantize(other.dequantize(), name))
    out = torch.empty(256, 384, device=device)
    assert torch.equal(out.copy_(q), q.dequantize())
    with pytest.raises(RuntimeError, match=r"\(256, 384\) from shape \(2, 2\)"):
        target.copy_(torch.zeros(2, 2, device=device))


def test_pinning_and_sharing(device):
    """is_pinned of a wrapper asks its own null storage; share_memory_ of it crashes the process."""
    q = quantized()
    assert not q.is_pinned() and not q.is_shared()
    assert q.share_memory_() is q and q.is_shared() and q._buf.is_shared() and same(q, quantized())
    if device != "cpu":
        pinned = q.pin_memory()
        assert type(pinned) is QTensor and pinned.is_pinned() and pinned._buf.is_pinned() and same(pinned, q)
        moved = pinned.to(device, non_blocking=True)
        moved.record_stream(torch.cuda.Stream())
        torch.cuda.synchronize()
        assert same(moved, q)


# --------------------------------------------------------------------------------------------------------- windows

WHOLE = [  # format, index: along whole groups and bytes
    ("int4_g128", (slice(3, 9),)), ("int4_g128", (slice(None), slice(128, 384))), ("int4_g128", (7,)),
    ("int4_g128", (slice(2, 9), slice(256, None))), ("int4_g128_asym", (slice(None), slice(0, 256))),
    ("int3_g8", (slice(1, 2), slice(8, 24))), ("int8_channel", (slice(5, None),)), ("fp8_e4m3_tensor", (slice(4, 8),)),
    ("fp8_e4m3_b128x128", (slice(128, None), slice(128, 256))), ("fp8_e4m3_b128x128", (slice(0, 128),)),
    ("mxfp4", (slice(None), slice(32, 96))), ("nvfp4", (slice(17, 40), slice(16, 384))), ("mxfp6_e2m3", (-1,)),
    ("int8_channel", (slice(None), slice(5, 128))), ("fp8_e4m3_tensor", (slice(3, 9), slice(1, 128))),
    ("int4_channel", (slice(None), slice(2, 128))), ("nvfp4", (slice(9, 9),)), ("nvfp4", (None, slice(2, 9))),
    ("e3m4_g48", (slice(None), slice(48, 96))),
]  # fmt: skip
CUT = [  # through a group, a byte, or at a stride
    ("int4_g128", (slice(None), slice(0, 64))), ("int4_g128", (slice(None), slice(1, 384))), ("int3_g4", (0, 3)),
    ("int3_g4", (slice(None), slice(4, 8))), ("int4_channel", (slice(None), slice(1, 128))),
    ("fp8_e4m3_b128x128", (slice(0, 64),)),
    ("fp8_e4m3_b128x128", (5,)), ("mxfp4", (slice(None), slice(16, 64))), ("mxfp4", (slice(None, None, 2),)),
    ("nvfp4", ([1, 5],)), ("nvfp4", (slice(None), 7)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "index"), WHOLE)
def test_windows_along_whole_groups_are_views(name, index, device):
    """Must be quantized, exact and without a copy; so must windows of windows, their clones and their pickles."""
    q = quantized(name, device=device)
    window, wanted = q[index], q.dequantize()[index]
    assert type(window) is QTensor and window._buf is q._buf and window.dtype is q.dtype
    assert {k: (tuple(p.shape), p.dtype) for k, p in window.parts().items()} == q.format.storage(tuple(wanted.shape))
    assert torch.equal(window.dequantize(), wanted) and torch.equal(window + 1, wanted + 1)
    for made in (window.clone(), window.to(device, copy=True)):
        assert same(made, window) and made._buf.numel() == Layout.of(q.format, tuple(wanted.shape)).nbytes
    for made in (window.bfloat16().float(), copy.deepcopy(window), pickle.loads(pickle.dumps(window)), window[...]):
        assert same(made, window)
    if wanted.ndim == 2 and wanted.shape[1] == 384:
        x = dense((3, 384), device=device)
        assert torch.equal(F.linear(x, window), F.linear(x, wanted))


@pytest.mark.parametrize(("name", "index"), CUT)
def test_windows_through_a_group_are_dense_and_right(name, index, device):
    q = quantized(name, device=device)
    assert not isinstance(q[index], QTensor) and torch.equal(q[index], q.dequantize()[index])


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "fp8_e4m3_b128x128"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_splitting(name, dim, device):
    """split, chunk, tensor_split and unbind: views of one buffer, or dense pieces, always with the same values."""
    q = quantized(name, device=device)
    whole = q.dequantize()
    for split in (
        lambda t: t.split(128, dim), lambda t: t.split([128, t.shape[dim] - 128], dim), lambda t: t.chunk(2, dim),
        lambda t: t.split(100, dim), lambda t: t.unbind(dim), lambda t: (t.narrow(dim, 128, 128), t.select(dim, -1)),
    ):  # fmt: skip
        pieces, wanted = split(q), split(whole)
        assert len(pieces) == len(wanted)
        assert all(torch.equal(torch.as_tensor(p + 0), w) for p, w in zip(pieces, wanted, strict=True))
    assert all(type(piece) is QTensor and piece._buf is q._buf for piece in q.split(128, dim))
    assert not any(isinstance(piece, QTensor) for piece in q.split(100, 1))


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "fp8_e4m3_b128x128", "fp8_e4m3_tensor", "mxfp4"])
def test_experts(name, device):
    """Fused experts [E, N, K]: one expert is a view, and so is its gate half; F.linear takes both."""
    q = quantized(name, (3, 256, 128), device=device)
    whole, x = q.dequantize(), dense((5, 128), device=device)
    for i, expert in enumerate(q):
        assert type(expert) is QTensor and expert._buf is q._buf and torch.equal(expert.dequantize(), whole[i])
        gate, up = expert.chunk(2)
        assert type(gate) is type(up) is QTensor
        assert torch.equal(F.linear(x, expert), F.linear(x, whole[i]))
        assert torch.equal(F.linear(x, up), F.linear(x, whole[i, 128:]))
    assert type(q[1:]) is QTensor and torch.equal(q[1:].dequantize(), whole[1:])
    assert torch.equal(q[torch.tensor([2, 0], device=device)], whole[[2, 0]])
    assert torch.equal(torch.bmm(x.expand(3, 5, 128), q.transpose(1, 2)), x.expand(3, 5, 128) @ whole.mT)


@pytest.mark.parametrize("name", FORMATS)
def test_writing_a_window_leaves_the_rest_alone(name, device):
    """A scale or divisor of the whole tensor is shared: overwriting it would rescale the rows outside the window."""
    for shape, index in (((256, 384), slice(0, 128)), ((3, 128, 128), 1)):
        q = quantized(name, shape, device=device)
        before, new = q.dequantize(), dense(before_shape(shape, index), device=device, seed=5) * 8
        for source in (new, tq.quantize(new, name)):
            window = q[index]
            assert type(window) is QTensor and window.copy_(source) is window
            after = q.dequantize()
            rest = torch.ones(shape, dtype=torch.bool, device=device)
            rest[index] = False
            assert torch.equal(after[rest], before[rest])
            shared = q.format.tensor_scale or q.format.group[0] == -1
            if not shared:
                assert torch.equal(after[index], tq.quantize(new, name).dequantize())
            assert (after[index] * new).sum() > 0 and torch.isfinite(after).all()


def before_shape(shape, index):
    return torch.empty(shape, device="meta")[index].shape


# ------------------------------------------------------------------------------------------ arithmetic and writes


def test_arithmetic_dequantizes(device):
    """Results are plain tensors: a subclass that wraps every result would claim codes it does not have."""
    q = quantized(device=device)
    whole, x = q.dequantize(), dense((384, 7), device=device)
    for op in (
        lambda t: t + 1, lambda t: 2 * t, lambda t: t.sum(), lambda t: t @ x, lambda t: torch.matmul(t, x),
        lambda t: x.T @ t.T, lambda t: t.T, lambda t: t.abs().amax(-1), lambda t: torch.cat([t, t], 1).T,
        lambda t: torch.stack([t, t], -1), lambda t: t.view(64, -1, 64), lambda t: t.expand(2, 256, 384),
        lambda t: t == t,
        lambda t: torch.where(t > 0, t, 0.0), lambda t: t.unsqueeze(2), lambda t: F.linear(t, x.T.contiguous()),
        lambda t: F.linear(x.T, t), lambda t: F.linear(t, t), lambda t: torch.ones_like(t), lambda t: -t,
    ):  # fmt: skip
        result = op(q)
        assert type(result) is torch.Tensor and torch.equal(result, op(whole))
    assert np.array_equal(np.asarray(q.cpu()), whole.cpu().numpy())
    assert np.asarray(q.cpu(), dtype="float64").dtype == np.float64
    assert type(torch.randn_like(q)) is torch.Tensor and q.numel() == 256 * 384 and q.stride() == (384, 1)


def test_lost_writes_are_errors(device):
    """A write into the dequantized copy changes nothing and says nothing (PEFT's merge was such a no-op)."""
    q, x = quantized(device=device), dense(device=device)
    before = q.dequantize()
    for write in (
        lambda: q.add_(1), lambda: q.mul_(x), lambda: q.zero_(), lambda: q.fill_(1), lambda: nn.init.normal_(q),
        lambda: torch.add(x, x, out=q), lambda: q.clamp_(0, 1), lambda: q.masked_fill_(x > 0, 1.0), lambda: q.t_(),
        lambda: torch._foreach_add_([q], [x]), lambda: torch._foreach_mul_([x.clone(), q], 2.0), lambda: q[0].add_(1),
        lambda: q.__iadd__(x), lambda: q.index_copy_(0, torch.tensor([0], device=device), x[:1]), lambda: q.resize_(3),
        lambda: q.__setitem__((0, 3), 1.0), lambda: q.__setitem__((slice(None), slice(3, 9)), 1.0),
        lambda: q.__setitem__(x > 0, 1.0), lambda: q.__setitem__([1, 2], 1.0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"quantized tensor \(int4_g128\).*copy_"):
            write()
        assert torch.equal(q.dequantize(), before)
    trained = nn.Parameter(q)
    (trained * 2).sum().backward()
    for foreach in (False, True):
        with pytest.raises(RuntimeError, match="copy_"):
            torch.optim.SGD([trained], lr=0.1, foreach=foreach).step()


def test_out_of_range_is_an_error(device):
    """An index or axis taken modulo the size silently gives another row."""
    q = quantized(shape=(4, 256), device=device)
    for index, error in (
        (lambda: q[4], IndexError), (lambda: q.select(0, 4), IndexError), (lambda: q.select(0, -5), IndexError),
        (lambda: q.select(2, 0), IndexError), (lambda: q.split(2, 2), IndexError), (lambda: q.unbind(-3), IndexError),
        (lambda: q.split([128, 64], 1), RuntimeError), (lambda: q.split([1, 5]), RuntimeError),
        (lambda: q.split(0), RuntimeError), (lambda: q.split(-1), RuntimeError), (lambda: q.view(3, -1), RuntimeError),
    ):  # fmt: skip
        with pytest.raises(error):
            index()


def test_assigning_whole_groups_quantizes(device):
    q, new = quantized(device=device), dense((256, 128), device=device, seed=1)
    wanted = q.dequantize()
    q[:, 128:256] = new
    wanted[:, 128:256] = tq.quantize(new, "int4_g128").dequantize()
    q[3] = 0.0
    wanted[3] = 0.0
    q[4:6] = torch.ones(384, device=device)
    wanted[4:6] = tq.quantize(torch.ones(384, device=device), "int4_g128").dequantize()
    q[8:10] = q[10:12]
    wanted[8:10] = wanted[10:12]
    assert torch.equal(q.dequantize(), wanted)


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "fp8_e4m3_b128x128"])
@pytest.mark.parametrize("through", ["linear", "linear_bias", "matmul", "matmul_T", "addmm"])
def test_gradients_reach_the_input(name, through, device):
    """Square weight: contracting the wrong axis in backward gives a gradient of the right shape."""
    q = quantized(name, (256, 256), device=device)
    ops_by_name = {
        "linear": lambda x, w: F.linear(x, w), "linear_bias": lambda x, w: F.linear(x, w, bias),
        "matmul": lambda x, w: x @ w, "matmul_T": lambda x, w: x @ w.T, "addmm": lambda x, w: torch.addmm(bias, x, w),
    }  # fmt: skip
    bias = dense((256,), device=device, seed=2).requires_grad_()
    results = []
    for weight in (q, q.dequantize()):
        x = dense((6, 256), device=device, seed=1).requires_grad_()
        y = ops_by_name[through](x, weight)
        grads = torch.autograd.grad((y * dense((6, 256), device=device, seed=3)).sum(), (x, bias), allow_unused=True)
        results.append((y, *[g for g in grads if g is not None]))
    assert len(results[0]) == (3 if through in ("linear_bias", "addmm") else 2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x, t: torch.func.grad(lambda y: f(y).square().sum())(x),
        lambda f, x, t: torch.func.vmap(torch.func.grad(lambda y: f(y).square().sum()))(x),
        lambda f, x, t: torch.func.jacrev(lambda y: f(y).sum(0))(x),
        lambda f, x, t: torch.func.hessian(lambda y: f(y).square().sum())(x[0]),
        lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
        lambda f, x, t: forward_mode(f, x.requires_grad_(), t),
    ],
    ids=["grad", "vmap_grad", "jacrev", "hessian", "jvp", "forward_mode"],
)
def test_function_transforms(transformed):
    """As of the dense weight, also where the layer's bias is trained."""
    q, bias = quantized("q4_k", (12, 256)), dense((12,), seed=2).requires_grad_()
    found, wanted = (
        transformed(lambda x, w=w: F.linear(x, w, bias), dense((3, 256), seed=1), dense((3, 256), seed=3))
        for w in (q, q.dequantize())
    )
    assert torch.equal(found, wanted) and found.any()


def forward_mode(f, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


def test_a_weight_that_requires_grad_gets_one(device):
    """F.linear's own backward has no gradient for the weight; dropping it silently would freeze a parameter."""
    q, x = nn.Parameter(quantized(device=device)), dense((5, 384), device=device, seed=1)
    F.linear(x, q).square().sum().backward()
    wanted = q.dequantize().requires_grad_()
    F.linear(x, wanted).square().sum().backward()
    assert torch.allclose(q.grad, wanted.grad) and type(q.grad) is torch.Tensor


# --------------------------------------------------------------------------------------------------- serialization


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_through_bytes(name, how, device):
    """A wrapper's own storage is empty, so default copies hold nothing; weights_only refuses unknown classes."""
    q = quantized(name, dtype=torch.bfloat16, device=device)
    for original in (q, parameter(q), nn.Parameter(q), q[128:]):
        if how == "deepcopy":
            made = copy.deepcopy(original)
        elif how == "pickle":
            made = pickle.loads(pickle.dumps(original))
        else:
            file = io.BytesIO()
            torch.save({"w": original}, file)
            file.seek(0)
            made = torch.load(file, weights_only=True)["w"]
        assert same(made, original) and made.format == original.format and made.data_ptr() != original.data_ptr()
        assert made.requires_grad == original.requires_grad and made.device == original.device
        assert isinstance(made, nn.Parameter) == isinstance(original, nn.Parameter)
        assert [p.dtype for p in made.parts().values()] == [p.dtype for p in original.parts().values()]


def test_map_location(device):
    file = io.BytesIO()
    torch.save(quantized(device=device), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True, map_location="cpu"), quantized())


def test_deepcopy_keeps_ties():
    """The memo: one parameter under two names stays one."""
    pair = copy.deepcopy([p := parameter(quantized()), p])
    assert pair[0] is pair[1] is not p and isinstance(pair[0], nn.Parameter)


def test_a_new_process_loads_it(tmp_path):
    """Importing tritonq alone has to make weights_only accept the file."""
    torch.save({"w": parameter(quantized("nvfp4"))}, tmp_path / "w.pt")
    code = "import sys, torch, tritonq; print(float(torch.load(sys.argv[1], weights_only=True)['w'].double().sum()))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "w.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert math.isclose(float(done.stdout), float(quantized("nvfp4").double().sum()))


def test_formats_of_ones_own(monkeypatch):
    """Saved by name: a registered format comes back, one under somebody else's name must not be saved."""
    mine = replace(tq.get_format("int4_g128"), name="test_int4_g24", group=(1, 24))
    monkeypatch.setitem(tq.FORMATS, mine.name, mine)  # gone again at the end
    assert tq.register(mine) is mine
    q = quantized(mine)
    for made in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q), q.clone(), q[3:]):
        assert made.format == mine
    assert same(pickle.loads(pickle.dumps(q)), q) and same(quantized("test_int4_g24"), q)
    impostor = quantized(replace(mine, name="int4_g128"))
    assert copy.deepcopy(impostor).format.group == (1, 24) and same(copy.deepcopy(impostor), impostor)
    for unsafe in (impostor, quantized(replace(mine, name="test_never_registered"))):
        with pytest.raises(ValueError, match=r"register"):
            pickle.dumps(unsafe)


def layer(name="int4_g128", device="cpu", seed=0):
    module = nn.Module()
    module.register_parameter("weight", parameter(quantized(name, device=device, seed=seed)))
    return module


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_load_state_dict(assign, meta, device):
    """assign=False goes through copy_, assign=True through nn.Parameter; keys are those of a dense module."""
    source, target = layer(device=device, seed=1), layer(device=device)
    assert list(source.state_dict()) == ["weight"] and type(source.state_dict()["weight"]) is QTensor
    if meta:
        target = target.to("meta")
        target = target if assign else target.to_empty(device=device)
    before = target.weight
    assert str(target.load_state_dict(source.state_dict(), strict=True, assign=assign)).startswith("<All keys")
    assert isinstance(target.weight, nn.Parameter) and same(target.weight, source.weight)
    assert (target.weight is before) is not assign
    assert (target.weight.data_ptr() == source.weight.data_ptr()) is assign


def test_load_state_dict_quantizes_dense_weights():
    target, new = layer(), dense(seed=3)
    target.load_state_dict({"weight": new})
    assert same(target.weight, tq.quantize(new, "int4_g128"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        target.load_state_dict({"weight": new[:5]})
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})


def test_module_casts_keep_the_parameter(device):
    """Module.to rebinds parameters through .data; the format must survive dtype and device changes."""
    module = layer(device=device)
    for move in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu"), lambda m: m.to(device), nn.Module.float):
        move(module)
        assert isinstance(module.weight, nn.Parameter) and isinstance(module.weight, QTensor)
    assert same(module.weight, quantized()) and module.weight.device.type == device


# ---------------------------------------------------------------------------------------------------- odd, compiled


@pytest.mark.parametrize("name", ["int4_g128", "int4_g128_asym", "nvfp4", "mxfp4", "fp8_e4m3_tensor", "int8_channel"])
@pytest.mark.parametrize("shape", [(0,), (0, 128), (4, 0), (2, 0, 3), (1,), (130,), (3, 1), (2, 2, 2, 17)])
def test_any_shape(name, shape, device):
    """No elements, one dimension, ragged groups: everything that works on a matrix works on these."""
    q = quantized(name, shape, device=device)
    assert q.dequantize().shape == shape and q.numel() == math.prod(shape)
    for made in (q.clone(), copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.detach(), torch.zeros_like(q).copy_(q)):
        assert same(made, q)
    assert torch.equal(q + 1, q.dequantize() + 1) and isinstance(q.data_ptr(), int) and repr(q)
    for a, b in zip(q.split(1), q.dequantize().split(1), strict=True):
        assert torch.equal(a + 0, b)


def test_strided_input_and_inference_mode(device):
    x = dense((384, 256), device=device).t()
    assert same(tq.quantize(x, "nvfp4"), tq.quantize(x.contiguous(), "nvfp4"))
    with torch.inference_mode():
        q = quantized(device=device)
        assert same(q[2:].clone(), quantized(device=device)[2:]) and F.linear(dense((2, 384), device=device), q).any()
    with pytest.raises(TypeError, match="got Tensor"):
        tq.dequantize(x)
    with pytest.raises(TypeError, match="int64"):
        tq.quantize(torch.ones(4, dtype=torch.int64), "mxfp4")


@pytest.mark.parametrize("name", ["int8_channel", "mxfp4", "int4_g32_asym"])
def test_a_graph_ends_where_a_qtensor_is_made(name):
    """It once took dynamo down with it."""
    torch._dynamo.reset()
    x = torch.randn(4, 64)

    def quantized(x):
        q = tq.quantize(x * 2, name)
        return q, q.dequantize() + 1

    q, y = torch.compile(quantized, backend="aot_eager")(x)
    expected, z = quantized(x)
    assert isinstance(q, QTensor) and torch.equal(q._buf, expected._buf) and torch.equal(y, z)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"quantize makes a QTensor.*tritonq\.ops"):
        torch.compile(quantized, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_compiles_without_graph_breaks(scheme):
    """fullgraph, and no recompilation when offload rebinds the buffer."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(128, 64))
    tq.quantize_(model, scheme, progress=False)
    x = dense((3, 128))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), model(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            model[0].weight.data = model[0].weight.data.clone()
            assert torch.equal(compiled(x), model(x))
