"""Saved activations in host memory: the same bits, one copy a storage, nothing left behind.

On the CPU the device is a fake one, whose copies run as late as they may and lanes in random order, so that what is
read or freed too early shows. Copies are counted where they are made; on a GPU in a trace of the profiler.
"""

import contextlib
import functools
import gc
import json
import tempfile
import threading
import time
import weakref

import pytest
import torch
from fake_device import FakeDevice
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import tritonq as tq
from tritonq import memory
from tritonq.formats import get_format
from tritonq.offload import pool as pools
from tritonq.offload import saved
from tritonq.offload.pool import PinnedPool, size_class
from tritonq.tensor import Layout

FORMATS = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4")


class Device(FakeDevice):
    """All host memory counts as its own. A copy that runs when only its own closure still holds the memory would, on a
    real device, read or write what was freed."""

    def __init__(self, seed=0, **kwargs):
        super().__init__(seed=seed, **kwargs)
        self.out, self.back, self.graph, self.pins = [], [], None, 0

    def holds(self, tensor):
        return True

    def submit(self, lane, function, *after):
        if lane in ("out", "in"):
            target, _ = function.args
            (self.out if lane == "out" else self.back).append(target.numel())
        for before in filter(None, after):
            assert before.graph == self.graph, "a capture cannot wait for what is outside of it, nor others for it"
        event = super().submit(lane, function, *after)
        event.graph = self.graph
        return event

    def follow(self, event):
        assert event is None or event.graph == self.graph
        super().follow(event)

    def copy(self, target, source):
        for tensor in (target, source):
            assert torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 1, "freed before its copy"
        super().copy(target, source)

    def capture(self):
        return self.graph

    def pin(self, memory):
        self.pins += 1

        def unpin():
            self.pins -= 1

        return unpin


def offload(device, **options):
    options = {"min_bytes": 256, "group_bytes": 2048, "pool": PinnedPool(), **options}
    return tq.offload.activations(device=device, **options)


@pytest.fixture
def fake(request):
    """A fake device; after the test nothing may be known of any storage."""
    assert not saved._bases
    yield Device(seed=3)
    if saved._bases:
        gc.collect()  # of frames in tracebacks
    assert not saved._bases and not saved._limbo
    assert memory.offloading == 0


class Block(nn.Module):
    """Attention with q, k and v as views of one tensor, an MLP and residuals."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(scores @ v)
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def stack(width=16, layers=4, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(layers))).to(device, dtype)


def results(model, x, context=None, forward=None):
    """Output and every gradient of one step."""
    x = x.detach().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    with context or contextlib.nullcontext():
        y = (forward or model)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


OPTIONS = (
    {}, {"keep_last": 2}, {"in_flight": 1, "prefetch": 0}, {"in_flight": 2, "prefetch": 1, "group_bytes": 1},
    {"group_bytes": None}, {"manual": True}, {"max_bytes": 8000}, {"share": 0.5},
)  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_bits(fake, options):
    model, x = stack(), torch.randn(2, 8, 16)
    expected = results(model, x)
    context = offload(fake, **options)
    for seed in range(3):
        fake.random.seed(seed)
        same(results(model, x, context), expected)
    assert bool(fake.out) == ("manual" not in options)
    assert len(fake.back) == len(fake.out)  # each comes back once, in whatever order backward reads
    assert context.pool.used == 0 and context.nbytes == 0
    assert context.pool.held <= 2 * context.pool.most


def _intermediates(model, kept):
    """Weak references to the storages of what the layers of a model give."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.Linear):
            module.register_forward_hook(lambda m, i, o: kept.append(StorageWeakRef(o.untyped_storage())))


def test_forward_frees_what_it_offloads(fake):
    model, x, outputs = stack(), torch.randn(2, 8, 16), []
    _intermediates(model, outputs)
    y = model(x)
    held = [weak.expired() for weak in outputs]
    assert not all(held)  # without offload backward keeps most of them
    del y
    outputs.clear()
    with offload(fake):
        y = model(x)
    assert all(weak.expired() for weak in outputs)
    y.sum().backward()


def test_no_cycles(fake):
    """Everything goes with its last reference, in forward, after backward and without it."""
    gc.disable()
    try:
        for min_bytes in (256, 10**6):  # also results that are saved and stay
            with offload(fake, min_bytes=min_bytes):
                y = (torch.randn(300, requires_grad=True) * 1).exp()
            weak = StorageWeakRef(y.untyped_storage())
            del y
            assert weak.expired()
        for backward in (True, False):
            model, x, outputs = stack(layers=2), torch.randn(2, 8, 16, requires_grad=True), []
            _intermediates(model, outputs)
            context, pool = offload(fake), PinnedPool()
            context.pool = pool
            gone = weakref.ref(context)
            with context:
                y = model(x)
                tq.offload.start_offload(y * 1)
            assert pool.used > 0
            if backward:
                y.sum().backward()
                assert pool.used == 0
            del y, context
            assert gone() is None and pool.used == 0 and all(weak.expired() for weak in outputs)
            assert not saved._bases
            assert fake.pins > 0
            pool.trim()
            assert pool.held == 0 and fake.pins == 0
    finally:
        gc.enable()


class Keep(torch.autograd.Function):
    """Saves what it is given, and hands it back to the caller in backward."""

    @staticmethod
    def forward(ctx, x, seen, *tensors):
        ctx.seen = seen
        ctx.save_for_backward(*tensors)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.seen.append(ctx.saved_tensors)
        return dy, None, *[None for _ in ctx.saved_tensors]


def kept(context, make, after=None):
    """What backward finds of the tensors that `make` gives, which live no longer than forward."""
    x, seen = torch.ones(1, requires_grad=True), []
    with context:
        y = Keep.apply(x, seen, *make())
    if after:
        after()
    y.sum().backward()
    return seen[0]


def test_one_copy_for_a_tensor_saved_three_times(fake):
    def make():
        h = torch.arange(1000.0)
        return h, h, h

    found = kept(offload(fake), make)
    assert fake.out == [4000] and fake.back == [4000]
    assert all(torch.equal(t, torch.arange(1000.0)) for t in found)
    assert len({t.data_ptr() for t in found}) == 1

    x = torch.randn(300, requires_grad=True)  # as autograd does it: by sin, cos and a product
    h = x * 1
    expected = torch.autograd.grad((h.sin() + h.cos() * h).sum(), x)[0]
    fake.out.clear()
    with offload(fake, group_bytes=1):
        h = x * 1
        y = (h.sin() + h.cos() * h).sum()
        del h
    assert len(fake.out) == 2  # h, and its cosine
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_views_of_one_base_move_as_one(fake):
    base = torch.arange(1200.0)

    def make():
        b = base.clone()
        return b[:400].view(20, 20).t(), b[400:].view(torch.int32), b[::3]

    t, i, s = kept(offload(fake), make)
    assert fake.out == [4800] and fake.back == [4800]
    assert torch.equal(t, base[:400].view(20, 20).t()) and t.stride() == (1, 20)
    assert torch.equal(i, base[400:].view(torch.int32)) and i.storage_offset() == 400
    assert torch.equal(s, base[::3])


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_activation_moves_as_one_buffer(fake, name):
    x = torch.randn(16, 256, dtype=torch.bfloat16)
    q = tq.quantize(x, name)

    def make():
        mine = tq.quantize(x, name)
        return mine, mine[4:8] if get_format(name).group[0] != -1 else mine, mine

    found = kept(offload(fake), make)
    assert fake.out == [q._buf.numel()] and fake.back == [q._buf.numel()]
    for got, want in zip(found, (q, q[4:8] if get_format(name).group[0] != -1 else q, q), strict=True):
        assert isinstance(got, tq.QTensor) and got.format == q.format and got._layout == want._layout
        assert got.dtype == want.dtype and torch.equal(got.dequantize(), want.dequantize())
        for part, other in zip(got.parts().values(), want.parts().values(), strict=True):
            assert part.dtype == other.dtype and torch.equal(part.view(torch.uint8), other.view(torch.uint8))


def test_members_of_one_allocation_move_as_one(fake):
    """TransformerEngine's case: parts of many quantized tensors, small ones among them, are slices of one buffer."""
    tensors = [tq.quantize(torch.randn(8, 128), name) for name in ("mxfp4", "int8_channel", "nvfp4")]
    sizes = [t._buf.numel() for t in tensors]

    def make():
        whole = torch.cat([t._buf for t in tensors])
        pieces = whole.split(sizes)
        return [tq.QTensor(piece, t._layout, t.dtype) for piece, t in zip(pieces, tensors, strict=True)]

    found = kept(offload(fake, min_bytes=max(sizes) + 1), make)  # the threshold is that of the buffer
    assert fake.out == [sum(sizes)]
    for got, want in zip(found, tensors, strict=True):
        assert torch.equal(got.dequantize(), want.dequantize()) and got.scale.dtype == want.scale.dtype


def _views(device):
    f = torch.arange(2048.0, device=device)
    c = torch.complex(f, -f).clone()
    yield "transposed", lambda: f.clone().view(32, 64).t()
    yield "expanded", lambda: f.clone()[:1024].view(1, 1024).expand(5, 1024)
    yield "overlapping", lambda: f.clone().as_strided((100, 50), (3, 2), 7)
    yield "offset", lambda: f.clone()[77:]
    yield "channels_last", lambda: f.clone().view(2, 4, 16, 16).to(memory_format=torch.channels_last)
    yield "conjugated", lambda: c.clone().conj()
    yield "negative", lambda: c.clone().conj().imag
    yield "both", lambda: torch._neg_view(c.clone().conj())
    yield "real", lambda: c.clone().real
    yield "bool", lambda: f.clone() > 1000
    yield "empty", lambda: f.clone()[5:5].view(0, 3)
    yield "scalar", lambda: f.clone()[5]
    yield "bytes", lambda: f.clone().view(torch.uint8)[4:-4].view(torch.float32)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bfloat16, torch.float64):
        yield str(dtype), lambda dtype=dtype: f.to(dtype).view(2, -1).t()


VIEWS = dict(_views("cpu"))


def check_view(got, want):
    for of in (torch.Tensor.size, torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.is_conj):
        assert of(got) == of(want)
    assert got.dtype == want.dtype and got.is_neg() == want.is_neg()
    assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
    a, b = (t.untyped_storage() for t in (got, want))
    flat = [torch.empty(0, dtype=torch.uint8, device=got.device).set_(s) for s in (a, b)]
    assert torch.equal(*flat)


@pytest.mark.parametrize("view", VIEWS)
def test_views_come_back_as_they_were(fake, view):
    (got,) = kept(offload(fake), lambda: (VIEWS[view](),))
    assert fake.out and fake.back
    check_view(got, VIEWS[view]())


def test_what_stays(fake):
    model = nn.Linear(64, 64)
    frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    leaf, small, marked = torch.randn(64, 64, requires_grad=True), torch.randn(8), torch.randn(64, 64)
    tq.offload.mark_not_offload(marked)

    given = [
        model.weight, model.weight.t(), frozen, frozen.t(), leaf, leaf[3:], small, marked, marked[1:].detach(),
        torch.zeros(64, 64).to_sparse(), torch._efficientzerotensor((64, 64)),
    ]  # fmt: skip
    found = kept(offload(fake), lambda: given)
    assert fake.out == []
    assert all(got.data_ptr() == want.data_ptr() for got, want in zip(found[:9], given[:9], strict=True))

    def rebind():  # as those do who move parameters
        model.weight.data, frozen.data = torch.zeros(64, 64), torch.ones(64, 64)

    found = kept(offload(fake), lambda: (model.weight, frozen), rebind)
    assert not found[0].any() and found[1].all()

    addresses = {given[7].untyped_storage()._cdata}
    assert addresses <= set(memory._staying)
    given.clear()
    found = marked = None  # marks live as long as what they mark
    kept(offload(fake), lambda: (torch.randn(64, 64),))
    assert fake.out == [64 * 64 * 4]


def test_marks_of_modules_and_quantized_tensors(fake):
    model, q = nn.BatchNorm1d(300), tq.quantize(torch.randn(16, 256), "int4_g128")
    tq.offload.mark_not_offload(model, [q])
    kept(offload(fake), lambda: (model.running_mean.view(3, 100), model.weight.detach(), q, q.qdata, q[3:]))
    assert fake.out == []


def test_weights_of_quantized_layers_stay(fake):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    tq.quantize_(model, "W8A16", ignore=())
    x = torch.randn(64, 128)
    expected = results(model, x, forward=lambda x: model(x).sin())
    same(results(model, x, offload(fake), forward=lambda x: model(x).sin()), expected)
    assert fake.out == [64 * 128 * 4]  # what sin saves, and no weight


def test_beside_offloaded_weights(fake):
    """The same activations move, and no weight twice."""
    model, x = nn.ModuleList(Block(32) for _ in range(3)), torch.randn(2, 8, 32)
    tq.quantize_(model, "W8A16", ignore=())

    def forward(x):
        for block in model:
            x = block(x)
        return x

    expected = results(model, x, forward=forward)
    same(results(model, x, offload(fake), forward), expected)
    alone = list(fake.out)
    fake.out.clear()
    with tq.offload.enable(model, device=FakeDevice(seed=2)):
        for _ in range(3):
            same(results(model, x, offload(fake), forward), expected)
    assert fake.out == 3 * alone


def test_threshold_and_budget(fake):
    sizes = (50, 100, 200, 400)

    def make():
        return [torch.full((n,), n % 256, dtype=torch.uint8) for n in sizes]

    def ran(**options):
        fake.out.clear()
        found = kept(offload(fake, **options), make)
        assert all(torch.equal(a, b) for a, b in zip(found, make(), strict=True))
        return fake.out

    assert ran(min_bytes=0) == [50, 100, 200, 400]
    assert ran(min_bytes=101) == [200, 400]
    assert ran(min_bytes=0, max_bytes=399) == [50, 100, 200]
    assert ran(min_bytes=0, max_bytes=0) == []
    assert ran(min_bytes=0, group_bytes=1, keep_last=3) == [50]
    assert ran(min_bytes=0, group_bytes=250, keep_last=1) == [50, 100, 200]  # the first group holds three
    with tq.offload.activations(device=fake) as defaults:
        assert defaults._packed(torch.empty(65535, dtype=torch.uint8)).__class__ is saved.Kept
        assert defaults._packed(torch.empty(65536, dtype=torch.uint8)).__class__ is saved.Saved


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.99])
def test_a_share_is_spread_evenly(fake, share):
    context, sizes = offload(fake, min_bytes=0, share=share), [1000 + n for n in range(40)]
    offered = []
    for _ in range(2):
        fake.out.clear()
        y, seen = chain(context, sizes)
        offered.append(list(fake.out))
        y.backward()
        assert [int(t[0]) for (t,) in seen] == list(range(40))[::-1]
    assert offered[0] == offered[1]  # the same ones in every pass, which CUDA graphs count on
    places = [sizes.index(size) for size in offered[0]]
    for end in range(1, 41):
        moved, of = sum(sizes[p] for p in places if p < end), sum(sizes[:end])
        assert share * of - 1100 < moved <= share * of

    def views():  # of what stays no view moves either
        b = torch.randn(1000)
        return [b[n:] for n in range(30)]

    fake.out.clear()
    kept(offload(fake, share=0.5), views)
    assert fake.out == []


def test_bad_options():
    for bad in (
        {"share": 0},
        {"share": 1.5},
        {"keep_last": -1},
        {"in_flight": 0},
        {"prefetch": -1},
        {"prefetch": 1.5},
        {"min_bytes": "many"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            tq.offload.activations(**bad)


@pytest.mark.parametrize("given", ["x", ["x"], 3, None])
def test_what_cannot_be_marked(given):
    with pytest.raises(TypeError, match="mark_not_offload takes tensors"):
        tq.offload.mark_not_offload(given)
    with pytest.raises(TypeError, match="start_offload takes tensors"):
        tq.offload.start_offload(given)


def test_tensors_elsewhere_pass_through():
    """Without a GPU nothing moves, and the graph is that of a plain call."""
    model, x = stack(layers=1), torch.randn(2, 8, 16)
    same(results(model, x, tq.offload.activations(min_bytes=0)), results(model, x))


# ------------------------------------------------------------------------------------------------- what autograd allows


@pytest.mark.parametrize("large", [True, False], ids=["offloaded", "kept"])
def test_changes_in_place_are_detected(fake, large):
    x = torch.randn(300 if large else 4, requires_grad=True)
    for context in (contextlib.nullcontext(), offload(fake)):
        for change in (lambda t: t.add_(1), lambda t: t[:2].zero_(), lambda t: t.detach().mul_(2)):
            h = x * 2
            with context:
                y = h.sin()
            change(h)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_a_change_between_saves_makes_another_copy(fake):
    x = torch.randn(300, requires_grad=True)

    def run(context):
        with context:
            h = x * 2
            first = h.cos()  # saves h as it is now; its gradient is not asked for
            with torch.no_grad():
                h.add_(1)
            second = h.sin()
            del h
        return first, torch.autograd.grad(second.sum(), x)[0]

    expected = run(contextlib.nullcontext())[1]
    first, found = run(offload(fake))
    assert torch.equal(found, expected) and fake.out == [1200, 1200]
    with pytest.raises(RuntimeError, match="inplace"):
        first.sum().backward()


def test_in_place_operations_that_are_allowed(fake):
    x = torch.randn(40, 40)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(inplace=True), nn.Linear(40, 40), nn.Sigmoid(), nn.Tanh())
    same(results(model, x, offload(fake)), results(model, x))


def test_backward_that_writes_into_what_it_reads(fake):
    """As autograd has it: whoever reads the tensor after that hears of it."""

    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(t)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            (t,) = ctx.saved_tensors
            t.mul_(2)
            return dy, None

    for context in (contextlib.nullcontext(), offload(fake)):
        x = torch.ones(1, requires_grad=True)
        with context:
            t = torch.ones(300)
            y = Writes.apply(Writes.apply(x, t), t)
            del t
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_addresses_that_come_back(fake):
    """A storage that takes the place of a freed one is another storage."""
    x, seen, context = torch.ones(1, requires_grad=True), [], offload(fake, group_bytes=1, in_flight=1)
    addresses, y = set(), x
    with context:
        for n in range(20):
            t = torch.full((256,), float(n))
            addresses.add(t.data_ptr())
            y = Keep.apply(y, seen, t)
            del t
    assert len(fake.out) == 20
    assert len(addresses) < 20, "no address came back, so this shows nothing"
    y.backward()
    assert [int(t[0]) for (t,) in reversed(seen)] == list(range(20))


def test_backward_twice_and_in_part(fake):
    model, x = stack(layers=2), torch.randn(2, 8, 16, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    context = offload(fake, group_bytes=1, prefetch=2)
    with context:
        y = model(x)
    part = list(model[1].parameters())
    same(torch.autograd.grad(y.sum(), part, retain_graph=True), expected[1 + len(part) :])
    for again in (True, True, False):
        same(torch.autograd.grad(y.sum(), [x, *model.parameters()], retain_graph=again), expected)
    assert context.pool.used == 0


def test_what_is_not_wanted_any_more_is_let_go(fake):
    """On the device: what only a graph that died was still to read, and what was fetched ahead and never read."""
    x, seen = torch.ones(1, requires_grad=True), []
    with offload(fake):
        t = torch.randn(500)
        first, second = Keep.apply(x, seen, t), Keep.apply(x, seen, t)
        del t
    first.backward(retain_graph=True)
    seen.clear()
    assert fake.live == 2000  # second has not read it yet
    del second
    assert fake.live == 0
    del first

    context, nodes = offload(fake, min_bytes=0, group_bytes=1, prefetch=2), [x]
    with context:
        for _ in range(6):
            nodes.append(Keep.apply(nodes[-1], seen, torch.empty(1000, dtype=torch.uint8)))
    torch.autograd.grad(nodes[6], nodes[3], retain_graph=True)
    seen.clear()
    assert fake.back[-5:] == [1000] * 5 and fake.live == 2000  # the two that come before the three
    with context:
        other = Keep.apply(x, seen, torch.empty(1000, dtype=torch.uint8))
    other.backward()
    seen.clear()
    assert fake.live == 2000  # now those before the other's, instead
    nodes[6].backward()
    assert fake.live == 6000  # what seen holds


def test_retained_graphs_hold_nothing_on_the_device(fake):
    x = torch.ones(1, requires_grad=True)
    seen = []
    with offload(fake):
        y = Keep.apply(x, seen, torch.randn(500))
    for _ in range(2):
        y.backward(retain_graph=True)
        weak = StorageWeakRef(seen.pop()[0].untyped_storage())
        assert weak.expired()
    assert fake.back == [2000, 2000]


def test_double_backward(fake):
    x = torch.randn(300, dtype=torch.float64)

    def second(context, inside):
        v = x.clone().requires_grad_()
        with context:
            y = (v.sin() * v.exp() * v.cos()).tanh()
            if inside:
                (g,) = torch.autograd.grad(y.sum(), v, create_graph=True)
        if not inside:
            (g,) = torch.autograd.grad(y.sum(), v, create_graph=True)
        return torch.autograd.grad(g.square().sum(), v)[0]

    for inside in (False, True):
        expected = second(contextlib.nullcontext(), inside)
        assert torch.equal(second(offload(fake), inside), expected)
    assert fake.out


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["around", "within"])
def test_checkpoint(fake, reentrant, where):
    model, x = stack(layers=3), torch.randn(2, 8, 16)
    context = offload(fake)

    def forward(x):
        for block in model:
            if where == "around":
                x = checkpoint(block, x, use_reentrant=reentrant)
            else:

                def inner(x, block=block):
                    with context:
                        return block(x)

                x = checkpoint(inner, x, use_reentrant=reentrant)
        return x

    found = results(model, x, context if where == "around" else None, forward)
    same(found, results(model, x))
    assert fake.out
    if where == "around":
        assert set(fake.out) == {2 * 8 * 16 * 4}  # the inputs of blocks


def test_nested_contexts(fake):
    """The innermost counts, and what both save is copied once."""
    x = torch.randn(300, requires_grad=True)
    outer, inner = offload(fake), offload(fake, min_bytes=10**6)
    with outer:
        h = x * 1
        a = h.sin()
        with inner:
            b = h.exp()
        with outer:
            c = h.cos()
        del h
    assert fake.out == [1200]
    (a + b + c).sum().backward()
    assert torch.allclose(x.grad, x.cos() + x.exp() - x.sin())


def test_autocast(fake):
    model, x = stack(layers=2), torch.randn(2, 8, 16)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    same(results(model, x, offload(fake), forward), results(model, x, forward=forward))


def test_compiled_parts(fake):
    model, x = stack(layers=2), torch.randn(2, 8, 16)
    expected = results(model, x)
    compiled = [torch.compile(block, backend="aot_eager") for block in model]
    assert torch.equal(compiled[1](compiled[0](x)), expected[0])  # compiled outside of the context
    same(results(model, x, offload(fake), lambda x: compiled[1](compiled[0](x))), expected)
    assert fake.out
    torch._dynamo.reset()
    fake.out.clear()

    @torch.compile(backend="aot_eager")
    def whole(x):
        with context:
            x = model[0](x)
        return model[1](x)

    context = offload(fake)
    same(results(model, x, forward=whole), expected)
    assert fake.out


def test_exceptions_in_forward_and_backward(fake):
    model, x, outputs = stack(layers=2), torch.randn(2, 8, 16), []
    expected = results(model, x)
    _intermediates(model, outputs)
    context = offload(fake)
    handle = model[1].down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), context:
        model(x)
    handle.remove()
    gc.collect()  # of frames in the traceback
    assert context.pool.used == 0 and all(weak.expired() for weak in outputs)

    with context:
        y = model(x)
    y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    del y
    gc.collect()
    assert context.pool.used == 0 and context.nbytes == 0
    same(results(model, x, context), expected)


def test_graphs_without_backward_return_their_memory(fake):
    model, x, context = stack(), torch.randn(2, 8, 16), offload(fake)
    for _ in range(5):
        with context:
            model(x.requires_grad_())
    assert context.pool.used == 0 and context.pool.held == context.pool.most == context.pool.held
    with context:  # a whole loop of training within one context
        for _ in range(5):
            y = model(x)
            y.sum().backward()
            del y
    assert context.pool.used == 0 and context.nbytes == 0 and len(context._groups) < 200


def test_threads(fake):
    """Forward and backward of several threads at a time, and backward in another thread than forward."""
    device = Device(shared=True)
    context = offload(device)
    models = [stack(layers=2) for _ in range(3)]
    inputs = [torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    expected = [results(model, x) for model, x in zip(models, inputs, strict=True)]
    failed = []

    def work(n):
        try:
            for _ in range(3):
                x = inputs[n].clone().requires_grad_()
                models[n].zero_grad()
                with context:
                    y = models[n](x)
                other = threading.Thread(target=lambda y=y: y.square().sum().backward())
                other.start()
                other.join()
                same([y.detach(), x.grad, *(p.grad for p in models[n].parameters())], expected[n])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert context.pool.used == 0


def test_other_streams_come_after_the_copy(fake):
    """Memory that may be of the stream the context was entered on is freed after that has waited for the copy, too."""

    class Stream(Device):
        stream = "where the context was entered"

        def __init__(self):
            super().__init__()
            self.followed = []

        def follow(self, event):
            assert event.device is fake
            self.followed.append(event)
            super().follow(event)

    owner, waits = offload(fake), []
    for ends in ("release", "death"):
        home = Stream()
        base = saved.Base(torch.randn(500), fake, owner.pool, owner, home)
        owner.nbytes += base.nbytes
        waits.append(home.followed)
        base.start()
        if ends == "release":
            base.release()
        del base
    assert [len(events) for events in waits] == [1, 1] and waits[0] != waits[1]
    same_stream = saved.Base(torch.randn(500), fake, owner.pool, owner, fake)
    owner.nbytes += same_stream.nbytes
    assert same_stream.home is None and owner.nbytes == 2000


def test_what_lives_on_is_not_copied_back(fake):
    x = torch.randn(300, requires_grad=True)
    with offload(fake):
        h = x * 1
        y = h.sin()
    y.sum().backward()
    assert fake.out == [1200] and fake.back == []
    assert torch.equal(x.grad, x.detach().cos())


# ------------------------------------------------------------------------------------------------- scheduling


def chain(context, sizes):
    """Saves one tensor after the other."""
    x, seen = torch.ones(1, requires_grad=True), []
    with context:
        y = x
        for n, size in enumerate(sizes):
            y = Keep.apply(y, seen, torch.full((size,), n, dtype=torch.uint8))
    return y, seen


def test_groups_are_copied_back_in_reverse_and_ahead(fake):
    sizes = [1000 + n for n in range(6)]
    y, seen = chain(offload(fake, min_bytes=0, group_bytes=1, prefetch=2), sizes)
    assert fake.out == sizes
    ahead = []
    forward = Keep.backward

    def spy(ctx, dy):
        result = forward(ctx, dy)
        ahead.append(list(fake.back))
        return result

    Keep.backward = staticmethod(spy)
    try:
        y.backward()
    finally:
        Keep.backward = staticmethod(forward)
    turned = sizes[::-1]
    assert ahead == [turned[: min(n + 3, 6)] for n in range(6)]
    assert [int(t[0]) for (t,) in seen] == [5, 4, 3, 2, 1, 0]


def test_no_room_to_copy_back_ahead(fake):
    """Where memory runs out, backward goes on with what it needs at once."""
    y, seen = chain(offload(fake, min_bytes=0, group_bytes=1, prefetch=3), [1000] * 6)
    fake.capacity = 2500
    forward = Keep.backward

    def forgets(ctx, dy):
        result = forward(ctx, dy)
        seen[-1] = int(seen[-1][0][0])
        return result

    Keep.backward = staticmethod(forgets)
    try:
        y.backward()
    finally:
        Keep.backward = staticmethod(forward)
    assert seen == [5, 4, 3, 2, 1, 0] and fake.peak <= 2500 and len(fake.back) == 6
    y, seen = chain(offload(fake, min_bytes=0, group_bytes=1), [1000] * 2)
    fake.capacity = 500
    with pytest.raises(torch.OutOfMemoryError):
        y.backward()


def test_what_lives_on_does_not_disturb_prefetching(fake):
    x, seen, alive = torch.ones(1, requires_grad=True), [], []
    y = x
    with offload(fake, min_bytes=0, group_bytes=1, prefetch=3):
        for n in range(8):
            t = torch.full((1000,), n, dtype=torch.uint8)
            alive += [t] if n % 2 else []
            y = Keep.apply(y, seen, t)
            del t
    y.backward()
    assert [int(t[0]) for (t,) in seen] == list(range(8))[::-1]
    assert len(fake.out) == 8 and len(fake.back) == 4


def test_start_offload(fake):
    x = torch.randn(300, requires_grad=True)
    tq.offload.start_offload(x * 1)  # nobody offloads: nothing happens
    with offload(fake, manual=True) as context:
        h = x * 1
        tq.offload.start_offload(h, x)
        assert fake.out == [1200]
        y = h.sin()
        del h
        context.release(0)
    assert fake.out == [1200]
    y.sum().backward()
    assert fake.back == [1200] and torch.equal(x.grad, x.detach().cos())
    fake.out.clear()
    with offload(fake) as context:
        tq.offload.start_offload(x * 1)  # which nobody saves
    assert fake.out == [1200] and context.pool.used == 0


def test_manual_control(fake):
    sizes = [300, 400, 500]
    controller = offload(fake, min_bytes=0, manual=True)
    for step in range(2):
        x, seen, y, storages = torch.ones(1, requires_grad=True), [], None, []
        y = x
        for size in sizes:
            with controller:
                t = torch.full((size,), size % 256, dtype=torch.uint8)
                storages.append(StorageWeakRef(t.untyped_storage()))
                y = Keep.apply(y, seen, t)
                del t
        assert fake.out == [] and not any(weak.expired() for weak in storages)
        controller.start_offload_layer(1)
        assert fake.out == [400]
        controller.start_offload_layer(1)
        controller.release(0)  # was not started
        controller.release_activation_forward_gpu_memory(1)
        assert [weak.expired() for weak in storages] == [False, True, False]
        controller.start_reload_layer(1)
        controller.start_reload_layer(2)
        assert fake.back == [400]
        controller.start_offload_layer(0)
        controller.release(0)
        y.backward()  # layer 0 was not asked back
        assert fake.back == [400, 300] and fake.out == [400, 300]
        assert [int(t[0]) for (t,) in seen] == [size % 256 for size in sizes[::-1]], step
        fake.out.clear()
        fake.back.clear()
    with pytest.raises(ValueError, match="no layer 7"):
        controller.release(7)


def test_named_layers(fake):
    """Two microbatches under way at a time, as in a pipeline."""
    controller = offload(fake, min_bytes=0, manual=True)
    seen, ys = [], []
    for batch in range(2):
        with controller.layer(("batch", batch)):
            ys.append(Keep.apply(torch.ones(1, requires_grad=True), seen, torch.full((100,), batch)))
        controller.start_offload_layer(("batch", batch))
    for batch in range(2):
        controller.release(("batch", batch))
        controller.start_reload_layer(("batch", batch))
        ys[batch].backward()
    assert [int(t[0]) for (t,) in seen] == [0, 1] and len(fake.out) == len(fake.back) == 2


def test_layers_are_groups(fake):
    x, seen = torch.ones(1, requires_grad=True), []
    y = x
    with offload(fake, min_bytes=0, group_bytes=None, keep_last=2) as context:
        for n in range(5):
            with context.layer():
                y = Keep.apply(y, seen, torch.empty(100 + n, dtype=torch.uint8), torch.empty(200, dtype=torch.uint8))
    assert fake.out == [100, 200, 101, 200, 102, 200]
    context.start_offload_layer(4)
    assert fake.out[6:] == [104, 200]
    context.release(4)
    y.backward()
    assert len(fake.back) == 8


# ------------------------------------------------------------------------------------------------- pinned memory


def test_size_classes():
    previous = 0
    for n in [*range(1, 70000, 37), *(2**k + d for k in range(12, 40) for d in (-1, 0, 1))]:
        size = size_class(n)
        assert size >= n and size % 4096 == 0 and size_class(size) == size
        assert size - n < max(4096, n / 8)
    for n in range(1, 10**7, 9999):
        assert size_class(n) >= previous
        previous = size_class(n)


def test_pool_is_bounded(fake):
    """Steps of ever other sizes keep at most twice what one of them took."""
    pool = PinnedPool()
    for step in range(30):
        buffers = [pool.take(fake, 5000 * (step + 1) + n) for n in range(4)]
        for buffer in buffers:
            pool.put(buffer)
        assert pool.held <= 2 * pool.most
    assert pool.used == 0
    pool.trim()
    assert pool.held == 0 and fake.pins == 0


def test_buffers_are_written_to_after_their_copies(fake):
    """The second step's copies out wait for the first's copies back, which the fake device runs late."""
    pool, seen = PinnedPool(), []
    for step in range(20):
        fake.random.seed(step)
        x = torch.ones(1, requires_grad=True)
        with offload(fake, pool=pool):
            y = Keep.apply(x, seen, torch.full((500,), float(step)), torch.full((500,), -float(step)))
        if step % 3:
            y.backward()
            assert [int(t[499]) for t in seen.pop()] == [step, -step]
        del y
    assert pool.held == pool.most == 2 * size_class(2000)


def test_devices_that_share_a_pool(fake):
    """A device writes to a buffer after another one has read it."""
    pool, other = PinnedPool(), Device()
    buffer = pool.take(other, 2000)
    buffer.bytes.fill_(7)
    target = other.empty(2000)
    pool.put(buffer, other.submit("in", functools.partial(other.copy, target, buffer.bytes[:2000])))
    kept(offload(fake, pool=pool), lambda: (torch.full((2000,), 1, dtype=torch.uint8),))
    assert pool.held == size_class(2000)
    other.join()
    assert (target == 7).all()


def test_no_room_on_the_host(fake):
    """Where memory cannot be pinned, torch's own pinned memory is taken."""

    def refuse(memory):
        raise RuntimeError("no")

    fake.pin = refuse
    assert torch.equal(kept(offload(fake), lambda: (torch.arange(999.0),))[0], torch.arange(999.0))


# ------------------------------------------------------------------------------------------------- captures


def test_captures(fake):
    """Buffers of a captured graph stay its own; it allocates none, and waits for nothing from outside."""
    pool, seen = PinnedPool(), []

    def step(context, **capture):
        x = torch.ones(1, requires_grad=True)
        with context:
            y = Keep.apply(x, seen, torch.arange(500.0), torch.arange(300.0))
        y.backward()
        return [tuple(t.shape) for t in seen.pop()]

    context = offload(fake, pool=pool)
    fake.graph = "first"
    with pytest.raises(RuntimeError, match="before, without capturing"):
        step(context)
    fake.graph = None
    gc.collect()
    step(context)
    held = pool.held
    fake.graph = "first"
    step(context)
    step(context)  # the same buffers again
    assert pool.held == held
    fake.graph = "second"
    with pytest.raises(RuntimeError, match="captured"):
        step(context)
    fake.graph = None
    gc.collect()
    step(context)
    assert pool.held == 2 * held
    lost = PinnedPool()
    lost.reserve(fake, [2000, 1200])
    fake.graph = "third"
    step(offload(fake, pool=lost))
    fake.graph = None
    pins = fake.pins
    del lost  # the graph may still be replayed
    assert fake.pins == pins
    pools._orphans.clear()
    assert fake.pins == pins - 2
    pool.trim()
    assert pool.held == held  # those of the graph
    pool.forget_graphs()
    pool.trim()
    assert pool.held == 0 and fake.pins == 0


def test_half_a_capture_is_refused(fake):
    pool = PinnedPool()
    pool.reserve(fake, [2000, 2000])
    for before, after, said in ((None, "graph", "forward inside"), ("graph", None, "capture backward, too")):
        x = torch.ones(1, requires_grad=True)
        fake.graph = before
        with offload(fake, pool=pool):
            y = Keep.apply(x, [], torch.randn(500))
        fake.graph = after
        with pytest.raises(RuntimeError, match=said):
            y.backward()
        fake.graph = None
    # torch.cuda.make_graphed_callables captures forward and backward one after the other
    fake.graph = "forward"
    seen = []
    with offload(fake, pool=pool):
        y = Keep.apply(torch.ones(1, requires_grad=True), seen, torch.arange(500.0))
    fake.graph = "backward"
    y.backward()
    assert torch.equal(seen[0][0], torch.arange(500.0))
    fake.graph = None

    # Of two modules: nothing of the first is copied back in the graph of the second.
    pool, ys = PinnedPool(), []
    pool.reserve(fake, [2000, 2000])
    context = offload(fake, pool=pool, prefetch=3, group_bytes=1)
    for n in range(2):
        fake.graph = f"forward {n}"
        with context:
            ys.append(Keep.apply(torch.ones(1, requires_grad=True), seen, torch.full((500,), float(n))))
    for n in (1, 0):
        fake.graph = f"backward {n}"
        fake.back.clear()
        ys[n].backward()
        assert fake.back == [2000] and int(seen[-1][0][0]) == n
    fake.graph = None


def test_what_dies_during_a_capture(fake):
    """Memory of an eager step that goes while something else is captured is held until its copies can be waited for."""
    context = offload(fake, in_flight=4)
    context.pool.reserve(fake, [2000])
    x = torch.ones(1, requires_grad=True)
    with context:
        y = Keep.apply(x, [], torch.randn(500))
        fake.graph = "graph"
        del y
        assert len(saved._limbo) == 1
        fake.graph = None
    with context:
        pass
    assert not saved._limbo and context.pool.used == 0


# ------------------------------------------------------------------------------------------------- on a GPU

MIB = 2**20


def trace(function):
    """What a call does on the device and in the runtime: (kind of copy, bytes) of each, and names of runtime calls."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        with open(file.name) as text:
            events = json.load(text)["traceEvents"]
    copies = [(e["name"], int(e["args"]["bytes"])) for e in events if e.get("cat") == "gpu_memcpy"]
    return copies, [e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]


def to_host(copies):
    return [nbytes for name, nbytes in copies if "DtoH" in name]


def to_device(copies):
    return [nbytes for name, nbytes in copies if "HtoD" in name]


def gpu_context(**options):
    return tq.offload.activations(**{"pool": PinnedPool(), "group_bytes": "1MiB", **options})


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gpu_same_bits(options):
    model = stack(256, 4, "cuda", torch.bfloat16)
    x = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    expected = results(model, x)
    context = gpu_context(**{**options, **({"max_bytes": "5MiB"} if "max_bytes" in options else {})})
    for _ in range(3):
        same(results(model, x, context), expected)
    assert context.pool.used == 0 and (context.pool.held > 0) == (not options.get("manual"))


@pytest.mark.gpu
def test_gpu_forward_frees_everything_it_offloads():
    """After forward the device holds what it held before, the output and what is under the threshold, to the byte."""
    model, x = stack(512, 4, "cuda", torch.bfloat16), torch.randn(8, 512, 512, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    results(model, x)
    gc.collect()
    gc.disable()
    try:
        for parameter in model.parameters():
            parameter.grad = None
        before = torch.cuda.memory_allocated()
        y = model(x)
        plain = torch.cuda.memory_allocated() - before
        y.sum().backward()  # workspaces of matrix products are there
        del y
        for parameter in (x, *model.parameters()):
            parameter.grad = None
        before = torch.cuda.memory_allocated()
        small = 0
        with gpu_context() as context:
            pack = context._packed

            def seen(tensor):
                nonlocal small
                packed = pack(tensor)
                storage = tensor.untyped_storage()
                if isinstance(packed, saved.Kept) and storage.nbytes() < 65536:
                    small += max(512, -(-storage.nbytes() // 512) * 512)  # blocks of torch's allocator
                return packed

            context._packed = seen
            y = model(x)
            del context._packed
        left = torch.cuda.memory_allocated() - before
        print(
            f"plain forward {plain / MIB:.2f} MiB, offloaded {left / MIB:.3f} MiB, output {y.nbytes / MIB} MiB, "
            f"small {small}"
        )
        assert y.nbytes <= left <= y.nbytes + small < plain / 8
        y.sum().backward()
        del y
        for parameter in (x, *model.parameters()):
            parameter.grad = None
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def deep(layers, width, rows):
    """Layers that each save one tensor of rows x width bf16, and nothing else that is not a parameter."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to("cuda", torch.bfloat16)


@pytest.mark.gpu
def test_gpu_peak_falls_as_predicted():
    """A stack of L linear layers saves L - 1 activations of A bytes and the leaf x. Plain, all are there at the end of
    forward. Offloaded, with a group each: those in flight, the output being written and its input."""
    layers, width, rows = 24, 512, 16384
    model, x = deep(layers, width, rows), torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    size = rows * width * 2

    def peak(context):
        for parameter in (x, *model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with context:
            y = model(x)
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        y.backward(torch.ones_like(y))
        return forward, torch.cuda.max_memory_allocated() - before

    peak(contextlib.nullcontext())
    weight = width * width * 2
    plain = peak(contextlib.nullcontext())
    in_flight, prefetch, keep = 2, 1, 1
    context = gpu_context(group_bytes=1, in_flight=in_flight, prefetch=prefetch)
    kept_last = gpu_context(group_bytes=1, in_flight=in_flight, prefetch=prefetch, keep_last=keep)
    found, last = [peak(c) for c in (context, context)][1], [peak(c) for c in (kept_last, kept_last)][1]
    print(
        f"activations of {size / MIB} MiB; peaks of forward, backward in activations: plain {plain[0] / size:.3f} "
        f"{plain[1] / size:.3f}, offloaded {found[0] / size:.3f} {found[1] / size:.3f}, one kept {last[0] / size:.3f} "
        f"{last[1] / size:.3f}"
    )
    assert plain[0] == layers * size  # L - 1 saved ones, and the output
    # Groups in flight hold one activation each; the newest is the input of the layer that writes its output.
    assert found[0] <= (in_flight + 1) * size
    assert last[0] <= (in_flight + keep + 1) * size
    # The output and its gradient, which the caller holds, the gradient and the next one, the group that is read, those
    # ahead, and the gradient of a weight.
    assert found[1] <= (4 + 1 + prefetch) * size + 2 * weight < plain[1] / 3
    assert found[0] < plain[0] / 6


@pytest.mark.gpu
def test_gpu_copies_are_those_of_the_bases():
    """From the profiler's trace: one copy out and one back for a tensor saved three times, for two views, for members
    of one buffer."""

    def thrice():
        h = torch.arange(1 << 20, device="cuda").float()
        return h, h, h

    def views():
        b = torch.randn(3 << 18, device="cuda")
        return b[: 1 << 18].view(512, 512).t(), b[1 << 18 :].view(torch.int32)

    tensors = [tq.quantize(torch.randn(512, 1024, device="cuda"), name) for name in FORMATS]

    def members():
        pieces = torch.cat([t._buf for t in tensors]).split([t._buf.numel() for t in tensors])
        return [tq.QTensor(piece, t._layout, t.dtype) for piece, t in zip(pieces, tensors, strict=True)]

    context = gpu_context(min_bytes="64KiB")
    for make, nbytes in ((thrice, 4 << 20), (views, 3 << 20), (members, sum(t._buf.numel() for t in tensors))):
        kept(context, make)
        found = []
        copies, _ = trace(lambda make=make, found=found: found.extend(kept(context, make)))
        assert to_host(copies) == [nbytes] and to_device(copies) == [nbytes], copies
        assert all("Pinned" in name for name, _ in copies if "DtoH" in name or "HtoD" in name), copies
    for got, want in zip(found, tensors, strict=True):
        assert isinstance(got, tq.QTensor) and torch.equal(got.dequantize(), want.dequantize())
        for part, other in zip(got.parts().values(), want.parts().values(), strict=True):
            assert part.dtype == other.dtype and part.stride() == other.stride()
            assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))


class Quantized(torch.autograd.Function):
    """x @ w with x kept quantized for the gradient of w."""

    @staticmethod
    def forward(ctx, x, w, name):
        q = tq.quantize(x, name)
        ctx.save_for_backward(q, w)
        return q.dequantize() @ w

    @staticmethod
    def backward(ctx, dy):
        q, w = ctx.saved_tensors
        assert isinstance(q, tq.QTensor)
        return dy @ w.t(), q.dequantize().t() @ dy, None


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_gpu_quantized_activations(name):
    width, rows, layers = 512, 4096, 6
    torch.manual_seed(0)
    weights = [
        torch.randn(width, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(layers)
    ]
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def settled():
        """Bytes allocated when the threads of the step before, which drop tensors when they like, have done so."""
        gc.collect()  # of the profiler, and of compiling kernels
        found = [torch.cuda.memory_allocated()]
        while found[-10:] != found[-1:] * 10:
            time.sleep(0.005)
            found.append(torch.cuda.memory_allocated())
        return found[-1]

    def step(context):
        y, start = x, settled()
        with context:
            for weight in weights:
                y = Quantized.apply(y, weight, name) * 0.05
        held = torch.cuda.memory_allocated() - start
        return held, [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *weights])]

    step(contextlib.nullcontext())
    expected = step(contextlib.nullcontext())
    context = gpu_context()
    step(context)
    nbytes = Layout.of(get_format(name), (rows, width)).nbytes
    found = []
    copies, _ = trace(lambda: found.append(step(context)))
    same(found[0][1], expected[1])
    assert to_host(copies) == [nbytes] * layers and to_device(copies) == [nbytes] * layers, copies
    print(f"{name}: {expected[0] / MIB:.2f} MiB after a plain forward, {found[0][0] / MIB:.2f} offloaded")
    rounded = -(-nbytes // 512) * 512
    assert expected[0] - step(context)[0] >= layers * rounded


@pytest.mark.gpu
def test_gpu_steady_state_waits_for_nothing():
    """No call of the runtime that holds the host, and no new memory, over steps of a model that is warm."""
    model, x = stack(512, 4, "cuda", torch.bfloat16), torch.randn(8, 512, 512, device="cuda", dtype=torch.bfloat16)
    context = gpu_context()

    def steps(count):
        for _ in range(count):
            results(model, x, context)

    steps(3)
    held, reserved = context.pool.held, torch.cuda.memory_reserved()
    copies, calls = trace(lambda: steps(3))
    waits = [name for name in calls if "Synchronize" in name]
    assert all("Device" in name for name in waits) and len(waits) <= 2, waits  # those at the end of the trace
    assert not [name for name in calls if "Malloc" in name or "HostAlloc" in name or "HostRegister" in name]
    assert context.pool.held == held and torch.cuda.memory_reserved() == reserved
    assert sum(to_host(copies)) == sum(to_device(copies)) > 0
    assert len(to_host(copies)) % 3 == 0


@pytest.mark.gpu
def test_gpu_no_growth_over_many_steps():
    model, x = stack(256, 3, "cuda", torch.bfloat16), torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    context = gpu_context()
    for _ in range(3):
        results(model, x, context)
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated(), context.pool.held
        for step in range(100):
            if step % 5 == 4:  # a graph without backward
                with context:
                    model(x.requires_grad_())
            else:
                results(model, x, context)
        assert (torch.cuda.memory_allocated(), context.pool.held) == before and context.pool.used == 0
    finally:
        gc.enable()


@pytest.mark.gpu
def test_gpu_manual_control():
    size = 4 * MIB
    controller = gpu_context(manual=True)
    for _ in range(2):
        x, seen = torch.ones(1, device="cuda", requires_grad=True), []
        y, start = x, torch.cuda.memory_allocated()
        for n in range(4):
            with controller:
                y = Keep.apply(y, seen, torch.full((size,), n, dtype=torch.uint8, device="cuda"))
            controller.start_offload_layer(n)

        def layers(start=start):
            return (torch.cuda.memory_allocated() - start + size // 2) // size

        assert layers() == 4
        for n in range(3):
            controller.release(n)
            assert layers() == 3 - n
        for n in (2, 1):
            controller.start_reload_layer(n)
        assert layers() == 3
        y.backward()
        assert [int(t[-1]) for (t,) in seen] == [3, 2, 1, 0]
        seen.clear()
        assert layers() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"keep_last": 2}, {"in_flight": 1, "prefetch": 0}], ids=str)
def test_gpu_captured_step(options):
    """Forward and backward in one CUDA graph, replayed on other inputs; eager steps go on beside it."""
    model = stack(256, 3, "cuda", torch.bfloat16)
    x = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randn_like(x) for _ in range(3)]
    expected = [results(model, given) for given in inputs]
    context = gpu_context(**options)
    leaf = x.clone().requires_grad_()

    def step():
        for parameter in (leaf, *model.parameters()):
            parameter.grad = None
        with context:
            y = model(leaf)
        y.square().sum().backward()
        return y.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    gradients = [leaf.grad, *(parameter.grad for parameter in model.parameters())]
    assert context.pool.used == 0
    for given, want in zip(inputs, expected, strict=True):
        with torch.no_grad():
            leaf.copy_(given)
        graph.replay()
        found = [y.clone(), *(g.clone() for g in gradients)]
        same(found, want)
        same(results(model, given, context), want)  # uses other buffers
    copies, _ = trace(graph.replay)
    assert len(to_host(copies)) == len(to_device(copies)) > 0
    del graph, y, gradients
    torch.cuda.synchronize()
    held = context.pool.held
    context.pool.forget_graphs()
    assert context.pool.held == held


@pytest.mark.gpu
def test_gpu_graphed_callables():
    """Forward and backward of each block in graphs of their own."""
    model = stack(256, 2, "cuda", torch.bfloat16)
    x = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    expected = results(model, x)
    context = gpu_context()

    class Offloaded(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            with context:
                return self.block(x)

    results(model, x, context)
    graphed = torch.cuda.make_graphed_callables(
        tuple(Offloaded(block) for block in model), tuple((torch.randn_like(x).requires_grad_(),) for _ in model)
    )
    for _ in range(2):
        same(results(model, x, forward=lambda x: graphed[1](graphed[0](x))), expected)


@pytest.mark.gpu
def test_gpu_capture_without_warm_up_is_refused():
    context = gpu_context()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before, without capturing"), torch.cuda.graph(graph):
        kept(context, lambda: (torch.zeros(1 << 20, device="cuda"),))
    del graph
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_streams():
    """Two models on streams of their own, a tensor saved on both, and a copy engine that is kept busy."""
    first, second = stack(256, 3, "cuda", torch.bfloat16), stack(256, 3, "cuda", torch.bfloat16)
    x = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    sides = [torch.cuda.Stream(), torch.cuda.Stream()]

    def step(context):
        for parameter in (x, *first.parameters(), *second.parameters()):
            parameter.grad = None
        main = torch.cuda.current_stream()
        outputs = []
        with context:
            shared = x * 2
            for model, stream in zip((first, second), sides, strict=True):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    outputs.append(model(shared.sin()) * shared)
                shared.record_stream(stream)
            del shared
            for stream, output in zip(sides, outputs, strict=True):
                main.wait_stream(stream)
                output.record_stream(main)
            y = outputs[0] + outputs[1]
            del outputs
        y.float().square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in (*first.parameters(), *second.parameters()))]

    expected = step(contextlib.nullcontext())
    context = gpu_context()
    busy = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    other = torch.cuda.Stream()
    for _ in range(4):
        with torch.cuda.stream(other):
            busy.copy_(on_device, non_blocking=True)
            on_device.copy_(busy, non_blocking=True)
        same(step(context), expected)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_threads():
    models = [stack(256, 2, "cuda", torch.bfloat16) for _ in range(3)]
    x = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)
    expected = results(models[0], x)
    context, failed = gpu_context(), []

    def work(model):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                for _ in range(5):
                    same(results(model, x, context), expected)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert context.pool.used == 0


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_gpu_views(view):
    make, context = dict(_views("cuda"))[view], gpu_context(min_bytes=0)
    (got,) = kept(context, lambda: (make(),))
    check_view(got, make())
    assert context.pool.held > 0


@pytest.mark.gpu
def test_gpu_beside_offloaded_weights():
    model = nn.ModuleList(Block(256) for _ in range(4)).to("cuda", torch.bfloat16)
    tq.quantize_(model, "W4A16", ignore=())
    x = torch.randn(8, 256, 256, device="cuda", dtype=torch.bfloat16)

    def forward(x):
        for block in model:
            x = block(x)
        return x

    expected, context = results(model, x, forward=forward), gpu_context()
    model.zero_grad()  # moving the model would move them
    with tq.offload.enable(model.cpu(), device="cuda"):
        for _ in range(4):
            same(results(model, x, context, forward), expected)
    assert context.pool.held > 0


@pytest.mark.gpu
def test_gpu_checkpoint_autocast_and_compile():
    model = stack(256, 3, "cuda")
    x = torch.randn(8, 256, 256, device="cuda")
    context = gpu_context()

    def around(x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    same(results(model, x, context, around), results(model, x, forward=around))

    def autocast(x):
        with torch.autocast("cuda", torch.bfloat16):
            return model(x)

    same(results(model, x, context, autocast), results(model, x, forward=autocast))

    compiled = torch.compile(model[0])

    def partly(x):
        return model[2](model[1](compiled(x)))

    expected = results(model, x, forward=lambda x: partly(x))
    copies, _ = trace(lambda: same(results(model, x, context, partly), expected))
    assert 0 < len(to_device(copies)) <= len(to_host(copies))
