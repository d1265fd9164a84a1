"""Weights in host memory: the bits of the model on the device, whatever order, with nothing left behind.

On the CPU the device is a fake one, whose copies happen as late as they may; a model's own operations happen at once.
`LateDevice` delays those, too.
"""

import contextlib
import copy
import gc
import io
import os
import random
import sys
import threading
import weakref

import pytest
import torch
from conftest import INTERPRET
from fake_device import Event, FakeDevice
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import tritonq as tq
from tritonq.offload import groups as planning
from tritonq.streams import Cuda

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="offload does not depend on kernels"),
    pytest.mark.filterwarnings("ignore:.*bytes of parameters require gradients"),
]

CONTRACT = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4")
WIDTH = 64


class Block(nn.Module):
    """A frozen quantized pair of layers with a trained adapter, as fine-tuning has them."""

    def __init__(self, width, fmt, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        for layer in (self.up, self.down):
            weight = torch.randn(layer.weight.shape, generator=generator) / width**0.5
            layer.weight = nn.Parameter(tq.quantize(weight, fmt) if fmt else weight, requires_grad=False)
        self.up.bias.requires_grad_(False)
        nn.init.normal_(self.up.bias, generator=generator)
        self.gain = nn.Parameter(torch.ones(width) + 0.1 * seed, requires_grad=False)
        self.adapter = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.adapter.weight, std=0.1, generator=generator)
        self.register_buffer("calls", torch.zeros(1))
        self.inner_checkpoint = False

    def feed(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))

    def forward(self, x):
        self.calls += 1
        inner = checkpoint(self.feed, x, use_reentrant=False) if self.inner_checkpoint else self.feed(x)
        return x + self.gain * inner + self.adapter(x)


class Model(nn.Module):
    def __init__(self, blocks=5, fmt="int4_g32", width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(width, width).requires_grad_(False)
        self.layers = nn.ModuleList(Block(width, fmt, i) for i in range(blocks))
        self.head = nn.Linear(width, width)
        self.checkpoint = None

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            if self.checkpoint is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpoint)
        return self.head(x)


def results(model, x, rounds=1):
    """Outputs and every gradient, of a step that accumulates the gradients of several rounds."""
    model.zero_grad()
    x = x.detach().requires_grad_(True)
    outputs = []
    for _ in range(rounds):
        y = model(x)
        y.square().sum().backward()
        outputs.append(y.detach().clone())
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert gradients
    return [*outputs, x.grad.clone(), *gradients]


def same(found, expected):
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a.cpu(), b.cpu()), f"result {index} differs by {(a.cpu() - b.cpu()).abs().max()}"


def data(seed=0, width=WIDTH, device="cpu"):
    return torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).to(device)


class CountingDevice(FakeDevice):
    """Counts the copies between host and device that are asked for, in bytes."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.copied = []

    def submit(self, lane, function, *after):
        if lane == "in":
            return super().submit(lane, lambda: (self.copied.append(1), function()), *after)
        return super().submit(lane, function, *after)

    def loads(self):
        self.join()
        count, self.copied = len(self.copied), []
        return count


def trace(model):
    """What hooks of any kind could leave on modules, and which objects and bytes their parameters are."""
    return [
        (name, sorted(module.__dict__), type(module), {k: id(p) for k, p in module._parameters.items()},
         type(module._parameters), module.__dict__.get("forward"), len(module._forward_hooks),
         len(module._forward_pre_hooks), module.__dict__.get("_compiled_call_impl"))
        for name, module in model.named_modules()
    ]  # fmt: skip


def snapshot(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert type(other) is type(tensor) and other.dtype == tensor.dtype and other.shape == tensor.shape, name
        raw = (lambda t: t._buf) if isinstance(tensor, tq.QTensor) else (lambda t: t)
        assert torch.equal(raw(other).cpu(), raw(tensor).cpu()), name


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("groups", ["block", "leaf", "list"])
@pytest.mark.parametrize("blocks", [1, 4, 5])
def test_results_and_gradients(groups, blocks):
    """Also in the second step, which is prefetched, with accumulation, evaluation in between, and after the end."""
    model, x = Model(blocks), data()
    expected, twice = results(model, x), results(model, x, 2)
    with torch.no_grad():
        output = model(x)
    chosen = [f"layers.{i}" for i in range(blocks)] + ["embed"] if groups == "list" else groups
    with tq.offload.enable(model, chosen, FakeDevice(seed=blocks)) as handle:
        assert handle.groups
        for _ in range(3):
            same(results(model, x), expected)
        same(results(model, x, 2), twice)
        for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                same([model(x), model(x)], [output] * 2)
        same(results(model, x), expected)
    same(results(model, x), expected)


@pytest.mark.parametrize("groups", ["block", "leaf"])
@pytest.mark.parametrize("where", ["reentrant", "not reentrant", "within blocks", "both"])
def test_activation_checkpointing(where, groups):
    model, x = Model(4), data()
    model.checkpoint = {"reentrant": True, "within blocks": None}.get(where, False)
    for layer in model.layers:
        layer.inner_checkpoint = where in ("within blocks", "both")
    expected = results(model, x, 2)
    calls = model.layers[0].calls.clone()
    with tq.offload.enable(model, groups, FakeDevice()):
        for _ in range(2):
            same(results(model, x, 2), expected)
        assert model.layers[0].calls == 3 * calls  # recomputed as often


def test_a_graph_may_wait_and_be_used_twice():
    """Backward long after other forwards; twice over one graph; gradients of gradients; after the end of offload."""
    model, x = Model(4), data().requires_grad_(True)

    def run(offload):
        with offload(model):
            first = model(x).square().sum()
            model(x).sum()
            with torch.no_grad():
                model(2 * x)
            (once,) = torch.autograd.grad(first, x, create_graph=True)
            (again,) = torch.autograd.grad(once.square().sum(), x, retain_graph=True)
            (second,) = torch.autograd.grad(first, x, retain_graph=True)
        (late,) = torch.autograd.grad(first, x)
        return [once, again, second, late]

    expected = run(contextlib.nullcontext)
    same(run(lambda m: tq.offload.enable(m, device=FakeDevice())), expected)


@pytest.mark.parametrize("lazy", [True, False])
def test_orders_that_change(lazy):
    """Modules that are called several times, skipped, or in another order every step."""
    model, order = Model(6), random.Random(0)
    x, sequences = data(), [[order.randrange(6) for _ in range(order.randrange(1, 12))] for _ in range(12)]

    def run(sequence):
        y = leaf = x.clone().requires_grad_(True)
        for index in sequence:
            y = model.layers[index](y)
        y.sum().backward()
        return [y.detach(), leaf.grad]

    expected = [run(s) for s in sequences]
    with tq.offload.enable(model, device=FakeDevice(lazy=lazy)):
        for sequence, wanted in zip(sequences, expected, strict=True):
            same(run(sequence), wanted)


class Nested(nn.Module):
    """A unit that calls others, and itself again by way of them."""

    def __init__(self, inner, shared):
        super().__init__()
        self.layer, self.inner = nn.Linear(WIDTH, WIDTH), inner
        self.others = [shared]  # no submodule

    def forward(self, x, depth=1):
        y = self.inner(self.layer(x)) * self.layer.bias
        if depth:
            y = self.others[0](y, depth - 1) + self.layer(y)
        return self.layer(y)


def test_units_within_units():
    first, second = (nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(2))
    a = Nested(first, None)
    b = Nested(second, a)
    a.others[0] = b
    model = nn.ModuleDict({"a": a, "b": b}).requires_grad_(False)
    x = data().requires_grad_(True)

    def run():
        y = model["a"](x, 3)
        return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    expected = run()
    device = FakeDevice()
    with tq.offload.enable(model, ["a", "b", "a.inner", "b.inner"], device) as handle:
        live = device.live
        for _ in range(3):
            with NothingOnTheHost(handle):
                same(run(), expected)
        assert device.live == live


def test_threads():
    model = Model(5)
    inputs = [data(i) for i in range(4)]

    def step(i):
        leaf = inputs[i].clone().requires_grad_(True)
        y = model(leaf)
        if i % 2:
            return [y.detach()]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaf)]

    expected, failures = [step(i) for i in range(4)], []
    device = FakeDevice(shared=True)

    def work(i):
        try:
            for _ in range(6):
                same(step(i), expected[i])
        except BaseException as failure:
            failures.append(failure)

    with tq.offload.enable(model, device=device):
        live = device.live
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert device.live == live


class Mixed(torch.autograd.Function):
    """x @ a @ b, a node that needs two weights at a time."""

    @staticmethod
    def forward(ctx, x, a, b):
        ctx.save_for_backward(a, b)
        return x @ a @ b

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        return dy @ b.t() @ a.t(), None, None


def test_nodes_that_need_weights_of_several_units():
    """Whatever unpacking one weight makes the manager load, the node still has the other."""
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6)).requires_grad_(False)
    x = data().requires_grad_(True)

    class Outer(nn.Module):
        def __init__(self, inner, weight):
            super().__init__()
            self.weight, self.inner = weight, [inner]

        def forward(self, x):
            return self.inner[0](x, self.weight)

    class Inner(nn.Linear):
        def forward(self, x, other=None):
            return super().forward(x) if other is None else Mixed.apply(x, other, self.weight)

    inner = nn.ModuleList(Inner(WIDTH, WIDTH) for _ in range(3)).requires_grad_(False)
    outer = nn.ModuleList(Outer(layer, nn.Parameter(layer.weight.clone(), requires_grad=False)) for layer in inner)
    model = nn.ModuleDict({"inner": inner, "outer": outer, "layers": layers})

    def run():
        y = x
        for i in (0, 1, 2, 0, 2, 1):
            y = model["layers"][i](model["outer"][i](y))
        return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    expected = run()
    with tq.offload.enable(model, [*inner, *outer, *layers], FakeDevice(lazy=False)) as handle:
        for _ in range(4):
            with NothingOnTheHost(handle):
                same(run(), expected)


class LateDevice(FakeDevice):
    """Kernels wait, too: what reads a weight reads what lies there when its turn comes."""

    def record(self, stream=None):
        return self.submit("compute", lambda: None)

    def follow(self, event):
        self.submit("compute", lambda: None, event)


@pytest.mark.parametrize("slabs", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_that_run_late_read_their_weights(seed, slabs):
    """Weights are not overwritten before the last kernel read them, nor read before they are there."""
    device, read, earlier = LateDevice(pinned=True, seed=seed), [], []

    class Reads(nn.Linear):
        def forward(self, index):
            weight = self.weight.data
            for _ in range(3):
                device.submit("compute", lambda: read.append((index, weight.clone())))
            return index

    layers = nn.Sequential(*(Reads(8, 8) for _ in range(5))).requires_grad_(False)
    weights, order = [layer.weight.detach().clone() for layer in layers], random.Random(seed)
    with tq.offload.enable(layers, device=device, budget=slabs * 512) as handle:
        assert len(handle._manager.slabs) == slabs
        for slab in handle._manager.slabs:  # work from before that still reads the memory
            before = slab.memory.clone()
            device.queues["compute"].insert(0, (Event(device), lambda m=slab.memory: earlier.append(m.clone()), []))
        steps = [i for _ in range(6) for i in range(5)] + [order.randrange(5) for _ in range(40)]
        for index in steps:
            layers[index](index)
        device.join()
    assert len(earlier) == slabs and all(torch.equal(memory, before) for memory in earlier)
    assert [index for index, _ in read[::3]] == steps
    assert all(torch.equal(weight, weights[index]) for index, weight in read)


class NothingOnTheHost(TorchDispatchMode):
    """What a real device does: refuse to compute with weights that are not there. Views and copies are fine."""

    def __init__(self, handle):
        super().__init__()
        self.ranges = [(g.host.bytes.data_ptr(), g.nbytes) for g in handle._manager.groups]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(r.alias_info is not None for r in function._schema.returns)
        if not views and function is not torch.ops.aten.copy_.default:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    pointer = tensor._buf.data_ptr() if isinstance(tensor, tq.QTensor) else tensor.data_ptr()
                    assert not any(a <= pointer < a + n for a, n in self.ranges), f"{function} of a host tensor"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", ["block", "leaf"])
@pytest.mark.parametrize("where", [None, False, True, "inner"])
def test_weights_are_on_the_device_where_they_are_used(groups, where):
    model, x = Model(4), data()
    model.checkpoint = None if where == "inner" else where
    for layer in model.layers:
        layer.inner_checkpoint = where == "inner"
    expected = results(model, x, 2)
    with tq.offload.enable(model, groups, FakeDevice()) as handle, NothingOnTheHost(handle):
        for _ in range(2):
            same(results(model, x, 2), expected)


class Capturing(LateDevice):
    """Within a capture every copy has to follow from the captured stream; events from outside may not be waited for."""

    def __init__(self):
        super().__init__(pinned=True)
        self.now, self.made, self.loads = None, {}, []

    def capture(self):
        return self.now

    def record(self, stream=None):
        event = super().record()
        self.made[event] = self.now
        return event

    def follow(self, event):
        assert self.made[event] == self.now
        super().follow(event)

    def submit(self, lane, function, *after):
        event = super().submit(lane, function, *after)
        self.made[event] = self.now
        if lane == "in":
            assert all(self.made[before] == self.now for before in after)
            self.loads.append((self.now, len(after)))
        return event


def test_captures():
    """Each graph loads what it needs; copies in it, and after it, wait for the stream that is captured, or replays."""
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).requires_grad_(False)
    device, x = Capturing(), torch.ones(1, 8)
    with tq.offload.enable(layers, device=device) as handle, torch.no_grad():
        for device.now in (None, None, 1, 2, None, None):
            before = len(device.loads)
            device.join()
            layers(x)
            made = device.loads[before:]
            assert len(made) >= 4 or (device.now is None and not handle._manager._captured)
            assert all(now == device.now and count for now, count in made)
        assert [now for now, _ in device.loads[-8:]] == [None] * 8  # fetched on the spot, and nothing ahead
        device.join()


# -------------------------------------------------------------------------------------- what refers to others' weights


class Reader(nn.Module):
    """Reads its child's weight without calling it, returns views of weights, and ties a third weight to a fourth."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.child = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.positions = Positions()
        self.layers[3].weight = self.layers[0].weight
        self.attention = nn.MultiheadAttention(WIDTH, 4)
        self.requires_grad_(False)

    def forward(self, x):
        places = self.positions(len(x))
        x = nn.functional.linear(x, self.child.weight) + places
        for layer in self.layers:
            x = layer(x)
        y = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return y + places + self.positions.table[:1]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, WIDTH))

    def forward(self, count):
        return self.table[:count]


class Device(FakeDevice):
    """Refuses what a real device would: parameters that were not brought here."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def check(self, module):
        for name, parameter in module.named_parameters():
            self.seen.append(self.holds(parameter))
            assert self.holds(parameter), f"{name} is not on the device"


@pytest.mark.parametrize("groups", ["block", "leaf"])
def test_weights_that_others_refer_to(groups):
    model, x = Reader(), data().requires_grad_(True)

    def run():
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    expected, before, state = run(), trace(model), snapshot(model)
    device = FakeDevice()
    with tq.offload.enable(model, groups, device):
        assert model.layers[0].weight is model.layers[3].weight and device.holds(model.layers[0].weight)  # tied
        assert not device.holds(model.layers[1].weight)
        for _ in range(3):
            same(run(), expected)
            assert device.holds(model.child.weight) and device.holds(model.positions.table)
        assert not device.holds(model.attention.in_proj_weight) or groups == "block"
    assert trace(model) == before
    assert_same_state(model.state_dict(), state)


def test_weights_are_on_the_device_exactly_within_forward():
    model, device = Model(3), FakeDevice()
    for layer in model.layers:
        layer.feed = lambda x, layer=layer, feed=layer.feed: (seen.append(all_on(layer)), feed(x))[1]

    def all_on(module):
        return all(device.holds(p._buf if isinstance(p, tq.QTensor) else p) for p in module.parameters())

    seen, x = [], data()
    with tq.offload.enable(model, device=device):
        addresses = []
        for _ in range(3):
            model(x)
            assert not any(device.holds(layer.up.weight._buf) for layer in model.layers)
            assert all(device.holds(layer.adapter.weight) and device.holds(layer.calls) for layer in model.layers)
        assert seen == [True] * 9 and not addresses


def test_addresses_are_stable():
    model, found = Model(5), []
    for layer in model.layers:
        layer.feed = lambda x, layer=layer, feed=layer.feed: (found.append(layer.up.weight.data_ptr()), feed(x))[1]
    with tq.offload.enable(model, device=FakeDevice()):
        for index in range(6):
            with contextlib.nullcontext() if index % 2 else torch.no_grad():
                y = model(data())
            if index % 2:
                y.sum().backward()
    assert all(found[i : i + 5] == found[:5] for i in range(0, 30, 5)) and len(set(found[:5])) == 2


def test_tensors_of_one_storage_move_with_what_they_share():
    """Slices of one buffer, strided weights, and two parameters over the same bytes."""
    model = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2)).requires_grad_(False)
    whole = torch.randn(3, 16, 16)
    model[0].weight, model[0].more = (nn.Parameter(whole[i].t(), requires_grad=False) for i in (0, 1))
    model[0].same = nn.Parameter(whole[1], requires_grad=False)
    model[0].empty = nn.Parameter(torch.empty(0, 4), requires_grad=False)
    before, pointers = snapshot(model), model[0].more.data_ptr() == model[0].same.data_ptr()
    with tq.offload.enable(model, device=FakeDevice()) as handle:
        assert handle.offloaded_bytes == 3 * 1024  # the shared one once, the third slice of the storage not at all
        for _ in range(2):
            model[0](torch.randn(2, 16))
            model[1](torch.randn(2, 16))
        assert model[0].more.data_ptr() == model[0].same.data_ptr() and pointers
        assert model[0].weight.stride() == (1, 16)
        assert_same_state(model.state_dict(), before)
    assert_same_state(model.state_dict(), before)


# -------------------------------------------------------------------------------------------------- copies and memory


@pytest.mark.parametrize("blocks", [3, 4, 6])
def test_one_copy_a_group_and_step(blocks):
    model, x = Model(blocks), data()
    device = CountingDevice()
    with tq.offload.enable(model, device=device), torch.no_grad():
        for step in range(5):
            model(x)
            count = device.loads()
            assert step < 2 or count == (blocks if blocks > 3 else 2), (step, count)  # of three, one need not move
    device = CountingDevice()
    with tq.offload.enable(model, device=device):
        for step in range(5):
            results(model, x)
            count = device.loads()
            # The two groups at each end of the way there and back stay in the slabs.
            assert step < 2 or count == 2 * (blocks - 2), (step, count)


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_three_slabs(count):
    """Each group is still copied once a step, groups that follow each other lie in different slabs, also the last and
    the first one, and two are loaded ahead."""
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count))).requires_grad_(False)
    device, x = CountingDevice(), torch.ones(1, 8)
    with tq.offload.enable(layers, device=device, budget=3 * 512) as handle, torch.no_grad():
        for step in range(4):
            layers(x)
            found = device.loads()
            # A slab that only one group uses keeps it.
            alone = sum(sum(g.slab is s for g in handle._manager.groups) == 1 for s in handle._manager.slabs)
            assert step < 2 or found == count - alone, (step, found)
        slabs = [group.slab for group in handle._manager.groups]
        assert len(set(slabs)) == 3 and all(slabs[i] is not slabs[i - 1] for i in range(count))
        contents = []
        layers[1].register_forward_pre_hook(lambda *_: contents.extend(s.content for s in handle._manager.slabs))
        layers(x)
        assert {1, 2} < set(contents) and (count == 4 or {1, 2, 3} == set(contents))
        shared = [i for i in range(count) if slabs[i] is slabs[1]][:2]
        for step in range(4):  # two that share a slab and follow each other: what is needed sooner is not overwritten
            for index in (0, *shared):
                layers[index](x)
            assert device.loads() == 2 or step < 2


class EventDevice(FakeDevice):
    """Counts what costs a call of the driver."""

    def __init__(self):
        super().__init__()
        self.calls = {"submit": 0, "record": 0, "follow": 0}

    def submit(self, lane, function, *after):
        self.calls["submit"] += 1
        return super().submit(lane, function, *after)

    def record(self, stream=None):
        self.calls["record"] += 1
        return super().record(stream)

    def follow(self, event):
        self.calls["follow"] += 1
        super().follow(event)


@pytest.mark.parametrize("blocks", [4, 6])
@pytest.mark.parametrize("fmt", ["int4_g32", "int4_g32_asym"])  # of two and three parts
def test_what_a_step_asks_of_the_host(blocks, fmt, monkeypatch):
    """Copies and events are those of groups, however many tensors autograd saves; and quantized weights go to Python
    for linear layers only, not for attributes that are looked at."""
    model, x, device, functions = Model(blocks, fmt), data(), EventDevice(), []
    dispatch = tq.QTensor.__torch_function__.__func__

    def counted(cls, func, types, args=(), kwargs=None):
        functions.append(getattr(func, "__name__", func))
        return dispatch(cls, func, types, args, kwargs)

    def step():
        return torch.autograd.grad(model(leaf).square().sum(), leaf)

    leaf = x.requires_grad_(True)
    with tq.offload.enable(model, device=device):
        for _ in range(3):
            step()
        monkeypatch.setattr(tq.QTensor, "__torch_function__", classmethod(counted))
        device.calls = dict.fromkeys(device.calls, 0)
        step()
        assert functions == ["linear"] * (2 * blocks)
        # Each group is waited for in forward and in backward. Its call ends with an event, and copies into slabs that
        # backward read begin with one: those in backward, and the first two of the next forward.
        assert device.calls == {"submit": 2 * (blocks - 2), "follow": 2 * blocks, "record": 2 * blocks}


def test_a_later_offload_costs_the_host_no_more(no_gc):
    """Lists that grow, or wrappers around wrappers, would show in the calls of a step."""
    model, leaf, counts = Model(4, "int4_g32"), data().requires_grad_(True), []

    def step():
        return torch.autograd.grad(model(leaf).square().sum(), leaf)

    for _ in range(3):
        with tq.offload.enable(model, device=EventDevice()):
            for _ in range(3):
                step()
            calls = 0

            def count(frame, event, argument):
                nonlocal calls
                calls += event in ("call", "c_call")

            before = sys.getprofile()
            sys.setprofile(count)
            try:
                step()
            finally:
                sys.setprofile(before)
            counts.append(calls)
    assert counts[0] == counts[1] == counts[2] > 0


def expected_bytes(model, slabs):
    """Bytes on the device: the two slabs, the adapters, head, embedding and buffers."""
    resident = [p for n, p in model.named_parameters() if "adapter" in n or "head" in n or "embed" in n]
    return sum(slabs) + sum(t.nbytes for t in [*resident, *model.buffers()])


def block_bytes(model):
    """A block's weights one after the other, aligned to 256 bytes, from the sizes that formats give."""
    end = 0
    for name, p in model.layers[0].named_parameters():
        if "adapter" not in name:
            end = -(-end // 256) * 256 + (p._buf.nbytes if isinstance(p, tq.QTensor) else p.nbytes)
    return end


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_memory_is_what_is_resident(no_gc):
    model, x, device = Model(4), data(), FakeDevice()
    size = block_bytes(model)
    with tq.offload.enable(model, device=device) as handle:
        wanted = expected_bytes(model, [size, size])
        rounded = -(-size // 512) * 512
        assert (device.live, handle.slab_bytes, handle.offloaded_bytes) == (wanted, 2 * rounded, 4 * size)
        for index in range(100):
            if index % 10 == 0:
                results(model, x)
            else:
                with torch.no_grad():
                    model(x)
            assert device.live == wanted
        assert device.peak == wanted
    assert device.live == 0


def test_a_graph_that_is_dropped_is_freed(no_gc):
    """Results that their own nodes save (exp) would hold their graph."""
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), Exponential()) for _ in range(3)).requires_grad_(False)
    with tq.offload.enable(layers, list(layers), FakeDevice()):
        x = torch.ones(2, 8, requires_grad=True)
        middle = layers[0](x)
        y = layers[1](middle)
        found = [weakref.ref(middle), weakref.ref(y)]
        del middle, y
        assert not any(reference() is not None for reference in found)


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


class Failure(Exception):
    pass


def fail(*_):
    raise Failure


@pytest.mark.parametrize("where", ["block", "layer", "recompute"])
def test_nothing_leaks_when_forward_raises(where, no_gc):
    model, x, device = Model(4), data(), FakeDevice()
    model.checkpoint = False if where == "recompute" else None
    expected = results(model, x)
    handle = tq.offload.enable(model, device=device)
    same(results(model, x), expected)
    live = device.live
    for _ in range(3):
        target = model.layers[2].down if where == "layer" else model.layers[2]
        if where == "recompute":
            y = model(x.requires_grad_(True)).sum()
        hook = target.register_forward_pre_hook(fail)
        with pytest.raises(Failure):
            y.backward() if where == "recompute" else model(x)
        hook.remove()
        if where == "recompute":
            del y
        assert device.live == live and not any(group.users for group in handle._manager.groups)
        same(results(model, x), expected)
    device.join()
    dead = [weakref.ref(model.layers[0]), weakref.ref(handle._manager)]
    del model, handle, target, hook
    if where != "recompute":  # torch's checkpoint leaves a cycle then, also without offload
        assert not any(reference() for reference in dead)
        assert device.live == 0


def test_disable_leaves_no_trace():
    model, x = Model(4), data()
    results(model, x)
    before, state = trace(model), snapshot(model)
    pointers = list(model.parameters())
    for use in (lambda: None, lambda: model(x), lambda: results(model, x)):
        handle = tq.offload.enable(model, device=FakeDevice())
        use()
        assert_same_state(model.state_dict(), state | {k: v for k, v in model.state_dict().items() if "calls" in k})
        handle.disable()
        handle.disable()
        model.zero_grad()
        assert trace(model) == before and all(a is b for a, b in zip(pointers, model.parameters(), strict=True))
        assert_same_state(snapshot(model), state | {k: v for k, v in model.state_dict().items() if "calls" in k})


def test_an_enable_that_fails_changes_nothing():
    model = Model(4)
    before, state = trace(model), snapshot(model)
    with pytest.raises(torch.OutOfMemoryError):
        tq.offload.enable(model, device=FakeDevice(capacity=20000))
    assert trace(model) == before
    assert_same_state(model.state_dict(), state)


def test_disable_within_forward_is_refused():
    model = Model(3)
    handle = tq.offload.enable(model, device=FakeDevice())
    hook = model.layers[1].register_forward_hook(lambda *_: handle.disable())
    with pytest.raises(RuntimeError, match=r"layers\.1.*after forward"):
        model(data())
    hook.remove()
    handle.disable()


# ---------------------------------------------------------------------------------------------------- plans and budget


def test_budget():
    model, x = Model(6), data()
    expected, size = results(model, x), block_bytes(model)
    rounded = -(-size // 512) * 512
    resident = sum(
        -(-t.nbytes // 512) * 512
        for t in [*model.buffers(), *(p for n, p in model.named_parameters() if "layers" not in n or "adapter" in n)]
    )
    least = resident + 2 * rounded
    with pytest.raises(ValueError, match=rf"{least - 1} bytes is too small: {resident} bytes.*at least {least}"):
        tq.offload.enable(model, device=FakeDevice(), budget=least - 1)
    counts = []
    for budget in (least, least + rounded, least + 3 * rounded, f"{least / 2**20 + 1}MiB"):
        device = CountingDevice()
        with tq.offload.enable(model, device=device, budget=budget) as handle:
            for _ in range(3):
                same(results(model, x), expected)
            addresses = {group.slab.start for group in handle._manager.groups}
            assert len(addresses) == (0 if budget not in range(least + 4 * rounded) else 2 if budget == least else 3)
            assert device.peak <= (budget if isinstance(budget, int) else 2**21)
            counts.append(len(handle.groups))
    assert counts == [6, 6, 4, 0]
    same(results(model, x), expected)


def test_what_stays_is_spread():
    assert planning.stay([10] * 7, [10] * 7, 5, None) == (set(), 2)
    assert planning.stay([500] * 7, [512] * 7, 0, 2 * 512) == (set(), 2)
    assert planning.stay([500] * 7, [512] * 7, 0, 3 * 512) == (set(), 3)
    assert planning.stay([500] * 7, [512] * 7, 0, 4 * 512) == ({3}, 3)
    assert planning.stay([500] * 7, [512] * 7, 0, 5 * 512 + 511) == ({1, 5}, 3)
    assert planning.stay([500] * 7, [512] * 7, 8, 7 * 512 + 8) == (set(range(7)), 2)


def test_groups():
    model = Model(3)
    assert [u.name for u in planning.units(model, "block")] == ["layers.0", "layers.1", "layers.2"]
    leaves = [name for name, _ in planning.find(model.layers[0], "leaf")]
    assert leaves == ["up", "down", "adapter"]
    stacked = nn.ModuleDict(
        {"a": nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(2)]) for _ in range(2)])}
    )
    assert [n for n, _ in planning.find(stacked, "block")] == ["a.0.0", "a.0.1", "a.1.0", "a.1.1"]
    named = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    assert [n for n, _ in planning.find(named, "block")] == ["0", "1"]  # nothing repeats
    assert [n for n, _ in planning.find(model, [model.head, "layers.1"])] == ["layers.1", "head"]
    for wrong, words in (("layer", "'block', 'leaf'"), (["layers.7"], "layers.7"), ([nn.Linear(2, 2)], "no module")):
        with pytest.raises(ValueError, match=words):
            tq.offload.enable(model, wrong, FakeDevice())


def test_what_is_refused():
    model = Model(3)
    with tq.offload.enable(model, device="cpu"), pytest.raises(RuntimeError, match="already"):
        tq.offload.enable(model, device="cpu")
    with pytest.raises(ValueError, match="meta"):
        tq.offload.enable(nn.Linear(2, 2, device="meta"), device="cpu")
    with pytest.warns(UserWarning, match="requires_grad_") as caught:
        tq.offload.enable(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), device="cpu").disable()
    assert caught[0].filename == __file__
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="inference mode"):
        tq.offload.enable(model, device="cpu")
    for arguments, words in (
        ({"groups": None}, "'block', 'leaf' or a list"), ({"device": "meta"}, "device is a GPU"),
        ({"disk": "/nowhere/weights"}, "/nowhere is no folder"), ({"budget": "much"}, "budget 'much'"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=words):
            tq.offload.enable(Model(2), **{"device": "cpu", **arguments})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got OrderedDict"):
        tq.offload.enable(Model(2).state_dict(), device="cpu")
    compiled = torch.compile(Model(2), backend="eager")
    with pytest.raises(ValueError, match="blocks"):
        tq.offload.enable(compiled, device="cpu")


def test_cpu():
    model, x = Model(4), data()
    expected = results(model, x)
    with tq.offload.enable(model, device="cpu"):
        for _ in range(2):
            same(results(model, x), expected)


# --------------------------------------------------------------------------------------------- others and the weights


def test_copies_and_files_during_offload(tmp_path):
    model, x = Model(3), data()
    state = snapshot(model)
    with torch.no_grad():
        expected = model(x)
    state = snapshot(model)
    with tq.offload.enable(model, device=FakeDevice()), torch.no_grad():
        model(x)
        calls = {k: v for k, v in model.state_dict().items() if "calls" in k}
        assert_same_state(model.state_dict(), state | calls)
        twin = copy.deepcopy(model)
        assert not any("_compiled_call_impl" in module.__dict__ for module in twin.modules())
        same([twin(x)], [expected])
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert_same_state(torch.load(file, weights_only=True), state | calls)
        single = io.BytesIO()
        torch.save(model.layers[0].up.weight, single)
        assert single.tell() < 2 * model.layers[0].up.weight._buf.nbytes + 4096  # not the slab
        same([model(x)], [expected])


def test_weights_that_are_changed_between_steps():
    """Master copies follow `load_state_dict`, in-place writes, `.data`, replaced parameters, and writes in forward."""
    model, other, x = Model(3), Model(3), data()
    for p in other.parameters():
        if not isinstance(p, tq.QTensor):
            p.data = p.data + 0.125
    other.layers[1].up.weight = nn.Parameter(
        tq.quantize(torch.randn(2 * WIDTH, WIDTH), "int4_g32"), requires_grad=False
    )
    with torch.no_grad():
        expected = other(x)
        device = FakeDevice()
        for way in ("load", "assign", "to", "data"):
            model = Model(3)
            with tq.offload.enable(model, device=device):
                model(x), model(x)
                if way in ("load", "assign"):
                    state = {k: v for k, v in other.state_dict().items() if "layers" in k}
                    model.load_state_dict(state, assign=way == "assign", strict=False)
                    for name in ("embed", "head"):
                        getattr(model, name).load_state_dict(getattr(other, name).state_dict())
                else:
                    for p, q in zip(model.parameters(), other.parameters(), strict=True):
                        p.data = q.data.clone()
                    if way == "to":
                        model.to("cpu")
                same([model(x), model(x)], [expected] * 2)
            same([model(x)], [expected])
        model = Model(2)
        expected = model(x)
        with tq.offload.enable(model, device=device) as handle:
            model(x)
            for factor in (2, 0.5):
                model.layers[1].gain.data *= factor
                handle.refresh()
                assert torch.equal(model(x), expected) == (factor < 1)
        model = Model(3)
        with tq.offload.enable(model, device=device):
            model(x)
            model.layers[2].register_forward_pre_hook(lambda layer, _: setattr(layer, "gain", layer.gain.mul_(2)))
            model(x), model(x)
        assert torch.equal(model.layers[2].gain, Model(3).layers[2].gain * 4)


def test_changes_that_cannot_be_followed():
    x = data()
    for change, words in (
        (lambda m: setattr(m.layers[1].up, "weight", nn.Parameter(torch.ones(2 * WIDTH, WIDTH))), "was replaced by"),
        (lambda m: setattr(m.layers[1].gain, "data", torch.ones(3)), r"shape \(3,\)"),
        (lambda m: m.layers[1].gain.requires_grad_(True), "gradients now"),
    ):
        model = Model(3)
        handle = tq.offload.enable(model, device=FakeDevice())
        model(x)
        change(model)
        now = dict(model.named_parameters())
        values = {name: parameter.detach().clone() for name, parameter in now.items()}
        with pytest.raises(RuntimeError, match=rf"layers\.1.*{words}.*enable it again"):
            model(x)
        handle.disable()  # as the message says; what was changed stays as it is
        assert all(parameter is now[name] for name, parameter in model.named_parameters())
        assert_same_state({name: parameter.detach() for name, parameter in now.items()}, values)
        assert "_compiled_call_impl" not in model.layers[1].__dict__


@pytest.mark.parametrize("where", ["cpu", "fake"])
def test_parameters_that_are_put_back(where):
    model, x = Model(4, fmt=None), data()
    whole = copy.deepcopy(model)
    with torch.no_grad():
        others = {name: 2 * parameter for name, parameter in model.named_parameters()}
        given = {name: tensor.clone() for name, tensor in others.items()}
        before, other = whole(x), torch.func.functional_call(whole, others, x)
        with tq.offload.enable(model, device="cpu" if where == "cpu" else FakeDevice()):
            for _ in range(2):
                same([model(x), torch.func.functional_call(model, others, x)], [before, other])
        same([model(x)], [before])
    same(list(others.values()), list(given.values()))


@pytest.mark.parametrize("how", ["operation", "load", "data"])
def test_changes_of_groups_that_stayed_survive(how):
    model, x = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).requires_grad_(False), data(width=8)
    model.forward = lambda x: model[2](model[1](model[0](x))) @ model[1].weight + model[3].bias
    with tq.offload.enable(model, device=FakeDevice()):
        model(x)
        twice = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        if how == "load":
            model.load_state_dict(twice)
        for name, parameter in model.named_parameters():
            if how == "data":
                parameter.data = twice[name].clone()
            elif how == "operation":
                parameter.mul_(2)
    assert_same_state(model.state_dict(), twice)


def test_inference_mode_and_none():
    model, x = Model(4), data()
    expected = results(model, x)
    with torch.inference_mode():
        handle = tq.offload.enable(model, device=FakeDevice())
        same([model(x)], expected[:1])
    same(results(model, x), expected)
    with torch.inference_mode():
        handle.disable()
    same(results(model, x), expected)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_transforms():
    layers, x = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)).requires_grad_(False), data()
    expected = layers[0](x)
    with tq.offload.enable(layers, device=FakeDevice()):
        torch.testing.assert_close(torch.func.vmap(layers[0])(x), expected)
        with pytest.raises(RuntimeError, match=r"derivative of torch\.func.*disable offload"):
            torch.func.grad(lambda x: layers[0](x).sum())(x)


def test_saved_tensors_that_were_changed_are_noticed():
    model = Model(3)
    with tq.offload.enable(model, device=FakeDevice()):
        y = model(data().requires_grad_(True))
        with torch.no_grad():
            model.layers[1].gain.mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            y.sum().backward()

    class InPlace(nn.Linear):
        def forward(self, x):
            y = x.exp()
            super().forward(y).sum()
            z = y * 1
            y.add_(1)
            return z

    model = nn.Sequential(InPlace(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    with tq.offload.enable(model, ["0", "1"], device=FakeDevice()):
        z = model(torch.ones(2, 4, requires_grad=True))
        with pytest.raises(RuntimeError, match="inplace operation"):
            z.sum().backward()


def test_hooks_of_others_see_activations_only():
    model, x, device = Model(4), data(), FakeDevice()
    packed, unpacked = [], []
    expected = results(model, x)
    with tq.offload.enable(model, device=device) as handle:
        slabs = handle._manager.slabs
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(any(s.holds(t) for s in slabs)) or t.clone(), lambda t: unpacked.append(1) or t
        ):
            y = model(x.requires_grad_(True))
        y.square().sum().backward()
    assert len(packed) > 8 and not any(packed) and len(unpacked) == len(packed)
    same([y.detach(), x.grad], expected[:2])


@pytest.mark.parametrize("way", ["compile", "torch.compile"])
def test_compiled_blocks(way):
    """One graph a block, compiled once."""
    model, x = Model(3), data()
    expected = results(model, x)
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    for index, layer in enumerate(model.layers):
        layer.forward = layer.forward  # nothing here is special to classes
        del layer.forward
        if way == "compile":
            layer.compile(backend=counter, fullgraph=True)
        else:
            model.layers[index] = torch.compile(layer, backend=counter, fullgraph=True)
    with tq.offload.enable(model, device=FakeDevice()) as handle:
        assert len(handle.groups) == 3
        same(results(model, x), expected)
        frames = counter.frame_count
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                same(results(model, x), expected)
        assert counter.frame_count == frames
    same(results(model, x), expected)


def test_a_language_model():
    """Tied embeddings, a cache, checkpoints around layers, and loops of generation."""
    import models

    model = tq.quantize_(models.build("llama_tied", torch.float32), "W4A16", progress=False).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    tokens = torch.arange(24).view(2, 12) % 128

    def train():
        model.zero_grad()
        loss = model(inputs_embeds=embedded, labels=tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, [embedded, model.model.norm.weight])]

    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    arguments = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    text, plain = model.generate(tokens, **arguments), train()
    for groups in ("block", "leaf"):
        with tq.offload.enable(model, groups, FakeDevice()) as handle:
            with NothingOnTheHost(handle):
                same([model.generate(tokens, **arguments)], [text])
                same(train(), plain)
                model.train()
                model.gradient_checkpointing_enable()
                same(train(), plain)
            model.gradient_checkpointing_disable()
            model.eval()


class PinningDevice(FakeDevice):
    """Knows what is pinned; `refuses` to pin, if told so."""

    def __init__(self, refuses=False):
        super().__init__(pinned=True, shared=True)
        self.pinned_now, self.refuses = {}, refuses

    def pin(self, memory):
        if self.refuses:
            raise RuntimeError("no more pages can be locked")
        start = memory.data_ptr()
        assert start % 4096 == 0
        self.pinned_now[start] = memory.nbytes
        return lambda: self.pinned_now.pop(start)


def test_pinned_memory_is_exact(tmp_path, no_gc):
    model, x, device = Model(3), data(), PinningDevice()
    with torch.no_grad():
        expected = model(x)
        handle = tq.offload.enable(model, device=device)
        assert list(device.pinned_now.values()) == [block_bytes(model)] * 3
        same([model(x)], [expected])
        state = model.state_dict()
        handle.disable()
        assert not device.pinned_now
        assert_same_state({k: v for k, v in state.items() if "calls" not in k},
                          {k: v for k, v in Model(3).state_dict().items() if "calls" not in k})  # fmt: skip
        tq.offload.enable(model, device=device, disk=tmp_path)
        assert list(device.pinned_now.values()) == [-(-block_bytes(model) // 4096) * 4096] * 2
        same([model(x)], [expected])
        del model, handle, state
        assert not device.pinned_now and not list(tmp_path.iterdir())  # also without disable()
        model = Model(3)
        with pytest.warns(UserWarning, match=r"locked.*pageable"):
            handle = tq.offload.enable(model, device=PinningDevice(refuses=True))
        same([model(x)], [expected])
        handle.disable()


# ---------------------------------------------------------------------------------------------------------------- disk


def test_disk(tmp_path):
    model, x = Model(5), data()
    expected, before, state = results(model, x), trace(model), snapshot(model)
    device = FakeDevice(shared=True)
    with tq.offload.enable(model, device=device, disk=tmp_path / "weights") as handle:
        files = list(tmp_path.iterdir())
        assert [f.name for f in files] == ["weights"]
        size = handle.offloaded_bytes // 5
        assert files[0].stat().st_size == 5 * -(-size // 4096) * 4096
        for _ in range(3):
            same(results(model, x), expected)
        with torch.no_grad():
            model.layers[2].gain.mul_(2)
            y = model(x)
            model.layers[2].gain.mul_(0.5)
            assert not torch.equal(y, expected[0])
        calls = {k: v for k, v in model.state_dict().items() if "calls" in k}
        assert_same_state(model.state_dict(), state | calls)
        y = model(x.clone().requires_grad_(True)).square().sum()
    assert not list(tmp_path.iterdir())
    y.backward()
    model.zero_grad()
    assert trace(model) == before
    assert_same_state(model.state_dict(), state | calls)
    same(results(model, x), expected)
    with tq.offload.enable(model, device=device, disk=tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
        same(results(model, x), expected)
    assert not list(tmp_path.iterdir())


def test_disk_errors(tmp_path):
    model, x = Model(4), data()
    (tmp_path / "taken").write_text("x")
    with pytest.raises(FileExistsError, match="taken"):
        tq.offload.enable(model, device=FakeDevice(), disk=tmp_path / "taken")
    with torch.no_grad():
        expected = model(x)
        handle = tq.offload.enable(model, device=FakeDevice(shared=True), disk=tmp_path / "short")
        model(x)
        files = handle._manager.arena._files
        good, files[:] = list(files), [os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)]
        with pytest.raises(OSError, match="ends at byte"):
            for _ in range(3):
                model(x)
        files[:] = good
        same([model(x)], [expected])
        handle.disable()
    same([model(x).detach()], [expected])


# ----------------------------------------------------------------------------------------------------------- real GPUs


def gpu_model(fmt="int4_g128", blocks=4, width=256):
    return Model(blocks, fmt, width)


def on_gpu(call, model, *arguments):
    """What a call gives for a copy of the model that lies on the GPU as a whole; leaves no memory there."""
    whole = copy.deepcopy(model).cuda()
    found = [t.cpu() for t in call(whole, *arguments)]
    del whole
    torch.cuda.synchronize()
    gc.collect()
    return found


def evaluated(model, x):
    with torch.no_grad():
        return [model(x)]


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", CONTRACT)
@pytest.mark.parametrize("groups", ["block", "leaf"])
def test_gpu_contract(fmt, groups):
    """Outputs and every gradient, freed memory to the byte, no growth, everything back at the end."""
    model, x = gpu_model(fmt), data(width=256, device="cuda")
    expected, twice = on_gpu(results, model, x), on_gpu(results, model, x, 2)
    output = on_gpu(evaluated, model, x)
    for way in (False, True):  # matrix products of this thread and of autograd's take workspaces that they keep
        model.checkpoint = way
        same(on_gpu(results, model, x, 2), twice)
    model.checkpoint = None
    state, before = snapshot(model), trace(model)
    base = torch.cuda.memory_allocated()
    with tq.offload.enable(model, groups, "cuda") as handle:
        resident = [p for n, p in model.named_parameters() if "adapter" in n or "head" in n]
        resident += [] if groups == "leaf" else list(model.embed.parameters())
        resident += [p for n, p in model.named_parameters() if "gain" in n] if groups == "leaf" else []
        resident += list(model.buffers())
        wanted = sum(-(-t.nbytes // 512) * 512 for t in resident)
        if groups == "block":
            wanted += 2 * (-(-block_bytes(model) // 512) * 512)
        else:
            wanted += handle.slab_bytes
        assert torch.cuda.memory_allocated() - base == wanted, (torch.cuda.memory_allocated() - base, wanted)
        assert all(w.host.is_pinned() for g in handle._manager.groups for w in g.weights)
        for _ in range(2):
            same(results(model, x), expected)
            same(evaluated(model, x), output)
        same(results(model, x, 2), twice)
        model.checkpoint = False
        same(results(model, x, 2), twice)
        model.checkpoint = True
        same(results(model, x, 2), twice)
        model.checkpoint = None
        model.zero_grad()
        for _ in range(100):
            evaluated(model, x)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - base == wanted, (torch.cuda.memory_allocated() - base, wanted)
    assert torch.cuda.memory_allocated() == base, torch.cuda.memory_allocated() - base
    assert trace(model) == before
    assert_same_state({k: v for k, v in model.state_dict().items() if "calls" not in k},
                      {k: v for k, v in state.items() if "calls" not in k})  # fmt: skip


@pytest.mark.gpu
def test_gpu_model_that_lies_there():
    model, x = gpu_model().cuda(), data(width=256, device="cuda")
    expected, state = results(model, x), snapshot(model)
    pointers = list(model.parameters())
    with tq.offload.enable(model):
        same(results(model, x), expected)
    assert all(a is b and a.is_cuda for a, b in zip(pointers, model.parameters(), strict=True))
    assert_same_state({k: v for k, v in model.state_dict().items() if "calls" not in k},
                      {k: v for k, v in state.items() if "calls" not in k})  # fmt: skip
    same(results(model, x), expected)
    tq.offload.enable(model).disable("cpu")
    assert not any(t.is_cuda for t in [*model.parameters(), *model.buffers()])


class Slow(nn.Module):
    """Kernels that read their weights late: copies that wait for nothing would overtake them."""

    def forward(self, x):
        torch.cuda._sleep(2_000_000)
        return x


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("slabs", [2, 3])
def test_gpu_kernels_that_run_late(streams, slabs):
    model, x, order = gpu_model(blocks=5), data(width=256, device="cuda"), random.Random(0)
    whole = copy.deepcopy(model).cuda()
    for layer in (*model.layers, *whole.layers):
        layer.feed = lambda x, feed=layer.feed: feed(Slow()(x))
    sequences = [[0, 1, 2, 3, 4]] * 4 + [[order.randrange(5) for _ in range(7)] for _ in range(6)]

    def run(m, sequence, grad):
        with torch.set_grad_enabled(grad):
            y = leaf = x.clone().requires_grad_(grad)
            for index in sequence:
                y = m.layers[index](y)
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), leaf) if grad else ())]

    expected = [run(whole, s, i % 2 == 0) for i, s in enumerate(sequences)]
    others = [torch.cuda.Stream() for _ in range(streams)]
    torch.cuda.synchronize()
    found = []
    with tq.offload.enable(model, device="cuda") as handle:
        budget = handle.resident_bytes + slabs * handle.slab_bytes // 2
    with tq.offload.enable(model, device="cuda", budget=budget) as handle:
        assert len(handle._manager.slabs) == slabs
        for i, sequence in enumerate(sequences):
            with torch.cuda.stream(others[i % streams]):
                found.append(run(model, sequence, i % 2 == 0))
        torch.cuda.synchronize()
        for a, b in zip(found, expected, strict=True):
            same(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [False, True])
def test_gpu_submitting_leaves_the_stream_of_the_caller(fails):
    """Also where the work fails; and `record` and `follow` are of the stream that is current."""
    backend, side, seen = Cuda(torch.device("cuda"), own=True), torch.cuda.Stream(), []

    def work():
        seen.append(torch.cuda.current_stream())
        if fails:
            raise Failure

    with torch.cuda.stream(side):
        with pytest.raises(Failure) if fails else contextlib.nullcontext():
            event = backend.submit("in", work, None, backend.record())
            backend.follow(event)
        assert torch.cuda.current_stream() == side
        x = torch.zeros(1 << 24, device="cuda")
        for _ in range(20):
            x += 1
        event = backend.record()
    backend.follow(event)
    assert torch.equal(x[::4096], torch.full_like(x[::4096], 20))
    assert seen == [backend._streams["in"]] and torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_gpu_threads():
    model = gpu_model(blocks=5)
    inputs = [data(i, 256, "cuda") for i in range(3)]

    def step(m, i):
        leaf = inputs[i].clone().requires_grad_(True)
        y = m(leaf)
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), leaf) if i else ())]

    whole, failures = copy.deepcopy(model).cuda(), []
    expected = [step(whole, i) for i in range(3)]
    torch.cuda.synchronize()

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    found = step(model, i)
                    torch.cuda.current_stream().synchronize()
                    same(found, expected[i])
        except BaseException as failure:
            failures.append(failure)

    with tq.offload.enable(model, device="cuda"):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]


def profiled(call, steps):
    """Copies by direction, and calls of the runtime that hold up the host, from a trace of some steps."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("steps"):
            for _ in range(steps):
                call()
        torch.cuda.synchronize()
    events = profiler.events()
    inside = next(e for e in events if e.name == "steps").time_range
    counts = {
        direction: sum(e.name.startswith(f"Memcpy {direction}") for e in events) for direction in ("HtoD", "DtoH")
    }
    waits = [
        e.name for e in events if e.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
        and inside.start <= e.time_range.start <= inside.end
    ]  # fmt: skip
    return counts, waits


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["int4_g128", "nvfp4"])
def test_gpu_copies_in_a_trace(fmt):
    """One copy to the device a group and step, none back, and no wait of the host."""
    model, x = gpu_model(fmt, 6), data(width=256, device="cuda")
    with tq.offload.enable(model, device="cuda"):
        for _ in range(3):
            evaluated(model, x)
        assert profiled(lambda: evaluated(model, x), 4) == ({"HtoD": 24, "DtoH": 0}, [])

        def train():
            model(x).square().sum().backward()

        for _ in range(3):
            train()
        # Of the way there and back, the two groups at each end stay in the slabs.
        assert profiled(train, 4) == ({"HtoD": 4 * (6 + 6 - 4), "DtoH": 0}, [])


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [4, 5])
def test_gpu_graphs(blocks):
    """A captured step, replayed between eager ones; and a captured training step."""
    model, static = gpu_model(blocks=blocks), data(width=256, device="cuda")
    inputs = [data(seed, 256, "cuda") for seed in range(3)]
    expected = [on_gpu(evaluated, model, x)[0] for x in inputs]
    trained = [on_gpu(results, model, x) for x in inputs]
    with tq.offload.enable(model, device="cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                evaluated(model, static)
                results(model, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            captured = model(static)
        for _ in range(2):
            for index, x in enumerate(inputs):
                static.copy_(x)
                graph.replay()
                same([captured], [expected[index]])
                same(evaluated(model, inputs[index - 1]), [expected[index - 1]])
                same(results(model, x), trained[index])
        leaf = static.clone().requires_grad_(True)
        model.zero_grad(set_to_none=True)
        backward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(backward):
            y = model(leaf)
            gradients = torch.autograd.grad(
                y.square().sum(), [leaf, *(p for p in model.parameters() if p.requires_grad)]
            )
        for index, x in enumerate(inputs):
            with torch.no_grad():
                leaf.copy_(x)
            backward.replay()
            same([y.detach(), *gradients], trained[index])
            static.copy_(x)
            graph.replay()
            same([captured], [expected[index]])
            same(evaluated(model, x), [expected[index]])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gpu_compiled_blocks(backend):
    model, x = gpu_model("int4_g128" if backend == "aot_eager" else None, 3), data(width=256, device="cuda")
    torch._dynamo.reset()
    whole = copy.deepcopy(model).cuda()
    for layer in (*whole.layers, *model.layers):
        layer.compile(backend=backend, fullgraph=True)
    expected, output = results(whole, x), evaluated(whole, x)
    with tq.offload.enable(model, device="cuda"):
        same(results(model, x), expected)
        same(evaluated(model, x), output)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                same(results(model, x), expected)
                same(evaluated(model, x), output)


@pytest.mark.gpu
def test_gpu_disk(tmp_path):
    model, x = gpu_model(blocks=5), data(width=256, device="cuda")
    expected, output = on_gpu(results, model, x), on_gpu(evaluated, model, x)
    base = torch.cuda.memory_allocated()
    with tq.offload.enable(model, device="cuda", disk=tmp_path) as handle:
        for _ in range(3):
            same(results(model, x), expected)
            same(evaluated(model, x), output)
        assert all(slab.bytes.is_pinned() for slab in handle._manager.arena._staging)
        model.zero_grad()
    assert torch.cuda.memory_allocated() == base and not list(tmp_path.iterdir())
    same([t.cpu() for t in on_gpu(results, model, x)], expected)


@pytest.mark.gpu
def test_gpu_forward_that_raises(no_gc):
    model, x = gpu_model(), data(width=256, device="cuda")
    expected = on_gpu(evaluated, model, x)
    handle = tq.offload.enable(model, device="cuda")
    same(evaluated(model, x), expected)
    live = torch.cuda.memory_allocated()
    for _ in range(3):
        hook = model.layers[2].down.register_forward_pre_hook(fail)
        failed = False
        try:
            evaluated(model, x)
        except Failure:
            failed = True
        hook.remove()
        assert failed
        assert torch.cuda.memory_allocated() == live
        same(evaluated(model, x), expected)
    handle.disable()


@pytest.mark.gpu
def test_gpu_budget():
    model, x = gpu_model(blocks=6), data(width=256, device="cuda")
    expected = on_gpu(evaluated, model, x)
    with tq.offload.enable(model, device="cuda") as handle:
        least = handle.slab_bytes + handle.resident_bytes
    base = torch.cuda.memory_allocated()
    for extra in (0, least // 2, least):
        with tq.offload.enable(model, device="cuda", budget=least + extra):
            for _ in range(2):
                same(evaluated(model, x), expected)
            assert torch.cuda.memory_allocated() - base <= least + extra
    with pytest.raises(ValueError, match="too small"):
        tq.offload.enable(model, device="cuda", budget=least - 512)
