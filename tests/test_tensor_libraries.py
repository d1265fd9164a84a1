"""QTensor through what libraries call: moves in every form, views, payloads, checkpoints, export, compile."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_tensor import SEVERAL, dense, layer, parameter, quantized
from torch import nn
from torch.nn import functional as F

import tritonq as tq
from tritonq import ops
from tritonq.tensor import Layout, QTensor


def bits(q):
    return [part.contiguous().view(torch.uint8) for part in q.parts().values()]


def equal_bits(q, other):
    return type(q) is QTensor and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(bits(q), bits(other), strict=True))


MOVES = {
    "to(device)": lambda t, d: t.to(d),
    "to(device, dtype)": lambda t, d: t.to(d, t.dtype),
    "to(dtype)": lambda t, d: t.to(torch.float16),
    "to(other)": lambda t, d: t.to(torch.zeros(1, dtype=torch.float64, device=d)),
    "to(quantized)": lambda t, d: t.to(quantized("mxfp4", (2, 64), torch.half, d)),
    "to(keywords)": lambda t, d: t.to(device=d, dtype=torch.half, non_blocking=True, copy=True),
    "to(memory_format)": lambda t, d: t.to(d, memory_format=torch.preserve_format),
    "cpu": lambda t, d: t.cpu(),
    "cuda or cpu": lambda t, d: t.cuda() if d == "cuda" else t.cpu(),
    "half": lambda t, d: t.half(),
    "type": lambda t, d: t.type(torch.bfloat16),
    "type_as": lambda t, d: t.type_as(torch.zeros(1, dtype=torch.half, device=d)),
    "contiguous": lambda t, d: t.contiguous(),
    "contiguous(memory_format)": lambda t, d: t.contiguous(memory_format=torch.contiguous_format),
    "clone(memory_format)": lambda t, d: t.clone(memory_format=torch.contiguous_format),
    "detach": lambda t, d: t.detach(),
    "alias": lambda t, d: torch.ops.aten.alias(t),
    "lift_fresh": lambda t, d: torch.ops.aten.lift_fresh(t),
    "view_as": lambda t, d: t.view_as(t),
    "expand": lambda t, d: t.expand(-1, -1),
    "share_memory_": lambda t, d: t.cpu().clone().share_memory_(),
    "requires_grad_": lambda t, d: t.clone().requires_grad_().detach_(),
    "empty_like.copy_": lambda t, d: torch.empty_like(t).copy_(t),
    "new_empty.copy_": lambda t, d: t.new_empty(t.shape).copy_(t, non_blocking=True),
    "new_zeros.copy_": lambda t, d: t.new_zeros(t.shape, device=d).copy_(t),
    "chunk and cat": lambda t, d: torch.cat(torch.chunk(t, 2)),
    "narrow and cat": lambda t, d: torch.cat([t.narrow(0, 0, 128), t.narrow(0, 128, 128)]),
    "unsafe_split and cat": lambda t, d: torch.cat(torch.unsafe_chunk(t, 2)),
    "set_": lambda t, d: quantized(t.format, (128, 128), device=t.device.type).set_(t),
}  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", ["int4_g128_asym", "nvfp4", "fp8_e4m3_b128x128", "int8_tensor_asym"])
def test_nothing_dequantizes_on_the_way(name, inference, device, monkeypatch):
    """Each call form that moves, copies or aliases, with dequantizing forbidden."""
    q = quantized(name, device=device)
    wanted = [b.clone() for b in bits(q)]
    whole = q.dequantize(torch.float64)
    monkeypatch.setattr(ops, "dequantize", lambda *_, **__: pytest.fail("dequantized"))
    found = {}
    with torch.inference_mode(inference):
        for how, move in MOVES.items():
            if not (inference and how == "requires_grad_"):
                found[how] = move(q, device)
    monkeypatch.undo()
    for how, made in found.items():
        assert type(made) is QTensor and made.format == q.format and made.shape == q.shape, how
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(bits(made), wanted, strict=True)), how
        assert torch.equal(made.dequantize(torch.float64).cpu(), whole.cpu()), how
    assert all(torch.equal(a, b) for a, b in zip(bits(q), wanted, strict=True))


@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "int8_channel", "fp8_e4m3_b64x64", "fp8_e4m3_tensor", "q4_k"])
def test_views_along_whole_groups(name, device):
    """Merged and split axes are views of the same bytes where groups stay groups, else dense values."""
    q = quantized(name, (4, 128, 256), device=device)
    whole, kept = q.dequantize(), 0
    for shape in ((512, 256), (2, 2, 128, 256), (4, 2, 64, 256), (1, 4, 128, 256), (4, 128, 4, 64), (-1,), (1024, 128),
                  (4, -1), (2048, 64), (4, 256, 128)):  # fmt: skip
        view = q.view(shape)
        assert torch.equal(view + 0, whole.view(shape)), shape
        if type(view) is QTensor:
            kept += 1
            stored = q.format.storage(tuple(view.shape))
            assert {k: (tuple(p.shape), p.dtype) for k, p in view.parts().items()} == stored
            assert view._buf is q._buf and torch.equal(view[1:].clone().dequantize(), whole.view(shape)[1:])
    assert type(q.view(512, 256)) is type(q.unsqueeze(0)) is type(q[None].squeeze(0)) is QTensor
    assert type(q.flatten(0, 1)) is type(q.unflatten(0, (2, 2))) is QTensor and kept >= 4
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        q.view(7, -1)


def test_joining(device):
    """cat along whole groups keeps the codes; scales of whole tensors have to be the same."""
    for name in ("int4_g128", "int8_channel", "fp8_e4m3_b128x128", "mxfp4", "q4_k"):
        a, b = quantized(name, device=device), quantized(name, (128, 384), seed=1, device=device)
        joined = torch.cat([a, b])
        assert type(joined) is QTensor and equal_bits(joined[:256], a) and equal_bits(joined[256:], b)
    a, b = (quantized("int4_g128", (64, n), device=device) for n in (256, 200))
    joined = torch.cat([a, b], dim=-1)
    assert type(joined) is QTensor and torch.equal(joined[:, 256:] + 0, b.dequantize())
    for parts in ([b, a], [a, a.dequantize()], [a, a.half()], [a, quantized("int4_g64", (64, 256), device=device)]):
        joined = torch.cat(parts, 1)
        assert type(joined) is torch.Tensor and torch.equal(joined, torch.cat([p + 0 for p in parts], 1))
    for name in ("nvfp4", "fp8_e4m3_tensor"):
        a, b = quantized(name, device=device), tq.quantize(dense(seed=1, device=device) * 9, name)
        assert type(torch.cat([a, b])) is torch.Tensor and torch.equal(torch.cat([a, b]), torch.cat([a + 0, b + 0]))
        assert equal_bits(torch.cat(a.chunk(2)), a)


def test_columns_of_a_row_with_one_scale(device):
    """A window of some columns shares the scale of its rows: reading keeps it, writing would change the rest."""
    q = quantized("int8_channel", device=device)
    window, before = q[:, 128:256], q.dequantize()
    assert type(window) is QTensor and torch.equal(window.dequantize(), before[:, 128:256])
    with pytest.raises(RuntimeError, match="scale the rest of the row shares"):
        window.copy_(dense((256, 128), device=device) * 100)
    with pytest.raises(RuntimeError, match="scale the rest of the row shares"):
        q[:, 128:256] = 0.0
    assert torch.equal(q.dequantize(), before)
    window.copy_(window.clone())
    own = window.clone()
    own.copy_(dense((256, 128), device=device) * 100)
    assert torch.equal(q.dequantize(), before) and own.dequantize().abs().max() > 100
    row, part = q[3], q[:, 128:256][3]
    assert (
        type(row) is QTensor and type(part) is type(row[5:]) is torch.Tensor and torch.equal(part, before[3, 128:256])
    )
    q[3] = new = dense((384,), device=device, seed=7) * 100
    assert torch.equal(q[3] + 0, tq.quantize(new, "int8_channel").dequantize())
    assert torch.equal(q[4:] + 0, before[4:]) and torch.equal(q[:3] + 0, before[:3])


def test_sizes_and_storages_that_libraries_read(device):
    """safetensors and transformers tell tied tensors by storages; a wrapper's is null, and for all the same."""
    first, second = quantized("int4_g128", device=device), quantized("int4_g128", device=device)
    assert first.untyped_storage().data_ptr() == first._buf.untyped_storage().data_ptr() != 0
    assert first.untyped_storage().data_ptr() == first[3:].untyped_storage().data_ptr()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == first._buf.numel()
    stored = 256 * 384 // 2 + 256 * 3 * 2
    assert first.nbytes == stored and first[:128].nbytes == stored // 2 and first.to("meta").nbytes == stored
    assert first.element_size() == first.itemsize == 4 and first.numel() == 256 * 384
    assert first.dequantize().cpu().numpy().tolist() == first.cpu().numpy().tolist() == first.tolist()


def test_safetensors_does_not_read_past_the_codes(tmp_path, device):
    """It takes numel() * element_size() bytes from data_ptr(): eight times what a tensor of four bits has there."""
    q = quantized(device=device)
    for write in (lambda: save_file({"w": q}, tmp_path / "w.safetensors"), lambda: save({"w": q})):
        with pytest.raises(RuntimeError, match=r"safetensors.*save_pretrained.*payload_data_"):
            write()
    save_file({name: part.clone() for name, part in q.parts().items()}, tmp_path / "w.safetensors")
    module = nn.Module()
    module.weight = parameter(q)
    tq.payload_data_(module)
    save_file({"w": module.weight.data}, tmp_path / "w.safetensors")
    module.weight.data = load_file(tmp_path / "w.safetensors", device=device)["w"]
    assert equal_bits(module.weight.detach(), q)


def storage_of(buffer, offset=4096):
    big = torch.zeros(offset + buffer.numel() + 512, dtype=torch.uint8, device=buffer.device)
    big[offset : offset + buffer.numel()] = buffer
    return big[offset : offset + buffer.numel()]


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("grad", [False, True])
def test_data_in_every_state(name, grad, device):
    """A slice of a larger buffer, a window, a gradient, inference mode: identity, flags, values stay."""
    p, new = nn.Parameter(quantized(name, device=device), requires_grad=grad), quantized(name, seed=1, device=device)
    held = weakref.ref(p)
    if grad:
        (p * 2).sum().backward()
        gradient = p.grad
    inside = QTensor(storage_of(new._buf), new._layout, new.dtype)
    with torch.no_grad():
        for value in (inside, new.clone(), nn.Parameter(inside, requires_grad=not grad), new[128:], inside[128:]):
            wanted = value.dequantize()
            p.data = value
            assert held() is p and p.is_leaf and p.requires_grad is grad and type(p.data) is QTensor
            assert p.shape == value.shape and torch.equal(p.dequantize(), wanted) and p.data_ptr() == value.data_ptr()
            assert p.data is not p.data and not p.data.requires_grad
            assert p.data.to(device, copy=True)._is_compact() and equal_bits(copy.deepcopy(p).data, value)
    if grad:
        assert p.grad is gradient
    with torch.inference_mode():
        p.data = quantized(name, seed=2, device=device)
        y = F.linear(dense((2, 384), device=device), p)
    x = dense((2, 384), device=device).requires_grad_()
    assert torch.equal(F.linear(x, p.detach()), y)
    p.data = new
    F.linear(x, p).sum().backward()
    assert x.grad is not None and not p.is_inference()


def test_data_goes_to_meta_and_comes_back(device):
    """What no plain tensor does: the memory is given back, the frozen parameter stays the same object."""
    p = parameter(quantized("nvfp4", device=device))
    held, old, wanted = weakref.ref(p), weakref.ref(p._buf), p.clone()
    p.data = p.data.to("meta")
    assert held() is p and isinstance(p, nn.Parameter) and p.device.type == p._buf.device.type == "meta"
    assert old() is None and tuple(p.shape) == (256, 384) and not p.requires_grad
    p.data = wanted
    assert held() is p and isinstance(p, nn.Parameter) and p.device.type == device and equal_bits(p.detach(), wanted)
    assert F.linear(dense((2, 384), device=device), p).shape == (2, 256)
    trained = nn.Parameter(quantized(device=device))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        trained.data = trained.data.to("meta")
    assert trained.device.type == device and equal_bits(trained.detach(), quantized())


def test_set_shares_the_buffer(device):
    q, other = quantized(device=device), quantized("mxfp8", (32, 64), device=device)
    assert q.set_(other) is q and q.data_ptr() == other.data_ptr() and tuple(q.shape) == (32, 64)
    for wrong in (lambda: q.set_(dense(device=device)), lambda: dense(device=device).set_(q)):
        with pytest.raises(TypeError, match="share a buffer"):
            wrong()


def test_payloads(device):
    """The opt-in for libraries that write `.data` to files of plain tensors: bytes out, bytes in."""
    module = nn.Module()
    module.weight, module.window = parameter(quantized("nvfp4", device=device)), parameter(quantized(device=device)[7:])
    module.bias = nn.Parameter(torch.zeros(3, device=device))
    wanted = {n: p.clone() for n, p in module.named_parameters()}
    assert tq.payload_data_(module) is module
    files = {name: p.data.to("cpu", copy=True) for name, p in module.named_parameters()}
    for name in ("weight", "window"):
        p, identity = getattr(module, name), id(getattr(module, name))
        payload = p.data
        assert type(payload) is torch.Tensor and payload.dtype is torch.uint8 and payload.ndim == 1
        assert payload.numel() == Layout.of(p.format, tuple(p.shape)).nbytes and payload is not p.data
        p.data = torch.empty_like(p.data, device="cpu")  # what group offload leaves behind
        assert p.device.type == "cpu" and tuple(p.shape) == tuple(wanted[name].shape)
        p.data = files[name].to(device)
        assert id(getattr(module, name)) == identity and p.device.type == device and equal_bits(p.clone(), wanted[name])
        p.data = wanted[name]
        with pytest.raises(TypeError, match=rf"\({files[name].numel()},\), got torch.float32"):
            p.data = torch.zeros(3)
        with pytest.raises(TypeError, match="uint8 of shape"):
            p.data = files[name][1:]
    tq.payload_data_(module, False)
    assert type(module.weight.data) is QTensor
    with pytest.raises(TypeError, match="payload_data_"):
        module.weight.data = files["weight"]
    with pytest.raises(ValueError, match="no quantized parameters"):
        tq.payload_data_(nn.Linear(2, 2))


def test_merging_an_adapter_is_never_lost(device):
    """What PEFT's merge does to a weight, in place and safely; both were silent on a naive subclass."""
    p, delta = parameter(quantized(device=device)), dense(device=device, seed=1) * 0.1
    wanted = p.dequantize()

    def in_place():
        p.data += delta

    def safely():
        weight = p.data.clone()
        weight += delta
        p.data = weight

    for merge in (in_place, safely, lambda: p.data.add_(delta), lambda: setattr(p, "data", p.data + delta)):
        with pytest.raises((RuntimeError, TypeError), match="quantize"):
            merge()
        assert torch.equal(p.dequantize(), wanted)
    p.data.copy_(p.dequantize() + delta)  # what the error says
    assert equal_bits(p.data, tq.quantize(wanted + delta, p.format))


def test_checkpoints_of_one_process(tmp_path, device):
    """DCP, synchronous and not: as many bytes as are stored, the same bits back, and views that need no format."""
    import torch.distributed.checkpoint as dcp

    for how in ("save", "async_save") if device == "cpu" else ("save",):
        source, target = layer("nvfp4", device=device, seed=1), layer("nvfp4", device=device)
        pending = getattr(dcp, how)({"m": source.state_dict()}, checkpoint_id=tmp_path / how)
        if how == "async_save":
            pending.result()
        size = sum(f.stat().st_size for f in (tmp_path / how).iterdir())
        assert source.weight.nbytes <= size < source.weight.nbytes + 20000 < 4 * source.weight.numel()
        state = {"m": target.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / how)
        target.load_state_dict(state["m"])
        assert equal_bits(target.weight.data, source.weight)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    """The program keeps quantized weights, gives the same bits, and survives its own file."""
    for scheme in ("W4A16", "NVFP4A16"):
        model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128)).to(device)
        tq.quantize_(model, scheme, progress=False).requires_grad_(False)
        x = dense((3, 128), device=device)
        program, file = torch.export.export(model, (x,), strict=strict), io.BytesIO()
        assert sum(type(t) is QTensor for t in program.state_dict.values()) == 2
        torch.export.save(program, file)
        file.seek(0)
        for made in (program, torch.export.load(file)):
            assert torch.equal(made.module()(x), model(x))


@pytest.mark.parametrize("grad", [False, True])
def test_rebinding_does_not_recompile(grad, device):
    """Another buffer, a slice at another offset of a larger one, the same slab refilled: one graph."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128)).to(device)
    tq.quantize_(model, "W4A16", progress=False).requires_grad_(False)
    x = dense((3, 128), device=device).requires_grad_(grad)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    wanted = model(x)
    assert torch.allclose(compiled(x), wanted, atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rebind in (
            lambda w: w.data.clone(),
            lambda w: QTensor(storage_of(w._buf), w._layout, w.dtype),
            lambda w: QTensor(storage_of(w._buf, 8192), w._layout, w.dtype),
            lambda w: w.data.to("cpu").to(device),
        ):
            for linear in (model[0], model[2]):
                held = weakref.ref(linear.weight)
                linear.weight.data = rebind(linear.weight)
                assert held() is linear.weight
            y = compiled(x)
            assert torch.allclose(y, wanted, atol=1e-6)
            if grad:
                y.sum().backward()


def test_no_weakrefs_and_no_cycles():
    """swap_tensors refuses a tensor that somebody holds weakly, and a cycle outlives the last reference."""
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(128, 64))
        tq.quantize_(model, "W4A16", progress=False)
        w = model[0].weight
        model(dense((2, 128)))
        copy.deepcopy(model), model.state_dict(), pickle.dumps(w), w.data, w.parts(), repr(w)
        assert not weakref.getweakrefs(w) and not weakref.getweakrefs(w._buf)
        torch.utils.swap_tensors(w, nn.Parameter(quantized("mxfp8", (64, 128)), requires_grad=False))
        assert model[0].weight.format.name == "mxfp8"
        old = weakref.ref(w._buf)
        del w, model
        assert old() is None
    finally:
        gc.enable()


def test_conversion_by_swapping(device):
    """torch.__future__.set_swap_module_params_on_conversion: what Module.to and load_state_dict do then."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module, source = layer(device=device), layer(device=device, seed=1)
        identity = id(module.weight)
        module.half().float()
        module.load_state_dict(source.state_dict())
        assert id(module.weight) == identity and equal_bits(module.weight.data, source.weight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_meta_tensors_compute_shapes():
    module = layer().to("meta")
    assert F.linear(torch.empty(2, 384, device="meta"), module.weight).shape == (2, 256)
    assert type(module.weight[3:]) is QTensor and module.weight.dequantize().is_meta


def test_layers_are_linear():
    """diffusers' leaf level and PEFT find layers by isinstance."""
    for scheme in ("W4A16", "FP8_DYNAMIC", "NVFP4"):
        model = nn.Sequential(nn.Linear(128, 64))
        tq.quantize_(model, scheme, progress=False)
        assert isinstance(model[0], nn.Linear) and type(model[0].weight) is QTensor
        assert isinstance(model[0].weight, nn.Parameter) and next(iter(model.state_dict())) == "0.weight"


def test_copies_of_a_window_hold_the_window(device):
    """Its buffer is that of the whole tensor, which a copy, a file or pinned memory must not carry along."""
    q = quantized("nvfp4", (4096, 256), device=device)
    small, own = q[5:7], Layout.of(q.format, (2, 256)).nbytes
    copies = [copy.deepcopy(small), small.clone(), small.to(device, copy=True), pickle.loads(pickle.dumps(small))]
    if device == "cuda":
        copies += [small.cpu().pin_memory(), small.to("cpu")]
    for made in copies:
        assert equal_bits(made, small) and made._buf.numel() == made._buf.untyped_storage().nbytes() == own
    file = io.BytesIO()
    torch.save(small, file)
    assert len(file.getvalue()) < own + 4096 and len(pickle.dumps(small)) < own + 4096
    inside = QTensor(storage_of(q._buf), q._layout, q.dtype)
    assert len(pickle.dumps(inside)) < q._buf.numel() + 4096 and equal_bits(copy.deepcopy(inside), q)


def test_frozen_weights_that_fully_shard_moves_stay_frozen():
    """It makes a Parameter, with the default, of what it moves; dense weights it moves by .data."""
    from torch.distributed.fsdp._fully_shard._fsdp_init import _move_states_to_device

    for trained in (False, True):
        module = nn.Linear(384, 256)
        module.weight = nn.Parameter(quantized(), requires_grad=trained)
        module.bias = None
        _move_states_to_device(list(module.parameters()), [], torch.device("meta"))
        assert module.weight.is_meta and isinstance(module.weight, nn.Parameter)
        assert module.weight.requires_grad is trained


@pytest.mark.gpu
def test_streams_keep_what_they_read():
    """record_stream of a wrapper would record nothing: the allocator gives the buffer away while a kernel reads it."""
    q = tq.quantize(dense((2048, 4096), device="cuda"), "int4_g128")
    wanted, pointer, size = q.dequantize(), q.data_ptr(), q._buf.numel()
    side, result = torch.cuda.Stream(), torch.empty_like(wanted)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(int(2e8))  # some 100 ms
        result.copy_(q.dequantize())
        q.record_stream(side)
    del q
    taken = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert taken.data_ptr() != pointer, "given away while another stream reads it"
    taken.zero_()
    torch.cuda.synchronize()
    assert torch.equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "fp8_e4m3_b128x128"])
def test_copies_on_streams_are_one_copy(name):
    """Pinned to device and back: one copy of the buffer each, on the stream of the call, without waiting."""
    host = tq.quantize(dense((1024, 4096)), name).pin_memory()
    assert host.is_pinned() and type(host) is QTensor
    target, back = torch.empty_like(host, device="cuda"), torch.empty_like(host, pin_memory=True)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace, torch.cuda.stream(side):
        moved = host.to("cuda", non_blocking=True)
        target.copy_(host, non_blocking=True)
        back.copy_(moved, non_blocking=True)
        moved.record_stream(side)
        side.synchronize()
    kinds = [e.name for e in trace.events() if e.name.startswith("Memcpy ")]
    assert sorted(k.split(" ")[1] for k in kinds) == ["DtoH", "HtoD", "HtoD"], kinds
    assert equal_bits(moved, host) and equal_bits(target, host) and equal_bits(back, host)


@pytest.mark.gpu
def test_between_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = parameter(quantized("nvfp4", device="cuda:0"))
    wanted, held = p.dequantize().cpu(), weakref.ref(p)
    for where in ("cuda:1", "cpu", "cuda:1", "cuda:0"):
        p.data = p.data.to(where, non_blocking=True)
        torch.cuda.synchronize()
        assert str(p.device) == str(p._buf.device) == where and held() is p
        assert torch.equal(p.dequantize().cpu(), wanted)


def test_a_frozen_layer_keeps_codes_for_backward(device):
    """autograd of a naive subclass keeps the dequantized weight, four bytes an element, from forward to backward."""
    q, x = parameter(quantized(device=device)), dense((2, 384), device=device).requires_grad_()
    saved = []

    def keep(t):
        saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = F.linear(x, q)
    assert sum(saved) <= q.nbytes + x.numel() * 4 < 4 * q.numel(), saved
    y.sum().backward()
    assert torch.allclose(x.grad, q.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-3)
