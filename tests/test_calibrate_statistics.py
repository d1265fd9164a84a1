"""Sums over the rows that layers multiply, against the same sums written out over inputs known by hand."""

import warnings

import pytest
import torch
from calibrate_tasks import Mlp, experts_block, layer_of, make_task
from torch import nn

from tritonq.calibrate.statistics import Columns, Hessian, Range, collect, shared_inputs


def samples_of(lengths=(5, 5, 3, 5, 3, 5, 5), width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator) for n in lengths]


class Named(Columns):
    """Columns that are compared with rows given in full."""

    def check(self, rows, expert=0):
        rows = rows.detach().double()
        expected = rows.sum(0), rows.abs().sum(0), rows.square().sum(0), rows.abs().amax(0)
        for found, wanted in zip((self.sum, self.absolute, self.square, self.largest), expected, strict=True):
            assert torch.allclose(found[expert].double(), wanted, rtol=1e-4, atol=1e-4)
        assert self.count[expert] == len(rows)


def test_rows_of_linear_layers(device):
    block, samples = Mlp().to(device), [s.to(device) for s in samples_of()]
    gate, down = layer_of(block, "gate", "int4_g8"), layer_of(block, "down", "int4_g8")
    observers = {gate: Named(gate), down: Hessian(down)}
    task, told = make_task(block, [gate, down], samples)
    tokens = collect(task, observers)
    x = block.norm(torch.cat(samples))
    observers[gate].check(x)
    inner = (nn.functional.silu(block.gate(x)) * block.up(x)).detach().double()
    assert torch.allclose(observers[down].sum[0].double(), inner.T @ inner, rtol=1e-3, atol=1e-4)
    assert torch.allclose(observers[down].absolute[0].double(), inner.abs().sum(0), rtol=1e-4)
    assert tokens == {gate: 31, down: 31} and not told


def test_padding_does_not_count():
    block = Mlp()
    samples = samples_of((6, 6, 6))
    masks = [torch.arange(6) < n for n in (6, 4, 1)]
    layer = layer_of(block, "gate", "int4_g8")
    observer = Named(layer)
    task, _ = make_task(block, [layer], samples, masks=masks)
    assert collect(task, {layer: observer}) == {layer: 11}
    observer.check(block.norm(torch.cat([s[m] for s, m in zip(samples, masks, strict=True)])))


@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_experts(device, padded):
    torch.manual_seed(0)
    block = experts_block().to(device)
    samples = [s.to(device) for s in samples_of((8, 8, 8), 32)]
    masks = [(torch.arange(8) < n).to(device) for n in (8, 5, 2)] if padded else None
    layers = [layer_of(block, "experts", "int4_g8", key=key) for key in ("gate_up_proj", "down_proj")]
    observers = {layer: Named(layer) for layer in layers}
    task, _ = make_task(block, layers, samples, masks=masks)
    tokens = collect(task, observers)
    x = torch.cat([s[m] for s, m in zip(samples, masks, strict=True)] if padded else samples)
    assert tokens == dict.fromkeys(layers, len(x))
    _, _, chosen = block.gate(x)
    for expert in range(4):
        own = x[(chosen == expert).any(1)]
        observers[layers[0]].check(own, expert) if len(own) else None
        gate, up = (own @ block.experts.gate_up_proj[expert].T).chunk(2, 1)
        observers[layers[1]].check(nn.functional.silu(gate) * up, expert) if len(own) else None
    assert sum(observers[layers[0]].count) == 2 * len(x)
    assert block.experts.config._experts_implementation == "grouped_mm"
    assert not block.experts._forward_pre_hooks


class Products(nn.Module):
    """The same product, written in many ways, of a weight [N, K] and of experts [E, N, K]."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(3, 8)), how
        self.experts = nn.Parameter(torch.randn(2, 3, 8))

    def forward(self, x):
        flat = x.reshape(-1, 8)
        return {
            "linear": lambda: nn.functional.linear(x, self.weight),
            "keywords": lambda: nn.functional.linear(weight=self.weight, input=x),
            "at": lambda: x @ self.weight.T,
            "matmul": lambda: torch.matmul(x, self.weight.mT),
            "mm": lambda: torch.mm(flat, self.weight.t()),
            "addmm": lambda: torch.addmm(torch.zeros(3), flat, self.weight.t()),
            "halves": lambda: nn.functional.linear(x, self.weight[1:]),
            "bmm": lambda: torch.bmm(flat.view(2, -1, 8), self.experts.mT),
            "broadcast": lambda: flat @ self.experts.mT,
        }[self.how]()


@pytest.mark.parametrize("how", ["linear", "keywords", "at", "matmul", "mm", "addmm", "halves", "bmm", "broadcast"])
def test_products_however_they_are_written(how):
    block, samples = Products(how), samples_of((4, 4), 8)
    several = how in ("bmm", "broadcast")
    layer = layer_of(block, "", "int4_g8", key="experts" if several else "weight")
    observer = Named(layer)
    collect(make_task(block, [layer], samples)[0], {layer: observer})
    x = torch.cat(samples)
    halves = (x[:4], x[4:]) if how == "bmm" else (x, x)
    for expert in range(2 if several else 1):
        observer.check(halves[expert] if several else x, expert)


def test_compiled_blocks_are_seen():
    block, samples = Mlp(), samples_of((5, 5))
    block.gate.compile(backend="eager")
    compiled = torch.compile(block, backend="eager")
    layer = layer_of(block, "gate", "int4_g8")
    observer = Named(layer)
    with torch.no_grad():
        compiled(samples[0][None])  # the code is there already
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # dynamo warns of addresses that it is asked for
            collect(make_task(compiled, [layer], samples)[0], {layer: observer})
    observer.check(block.norm(torch.cat(samples)))


def test_out_of_memory_between_layers():
    """The second layer fails on more than one sample, after the first has seen them: each row counts once."""
    block, samples = Mlp(), samples_of()
    gate, down = layer_of(block, "gate", "int4_g8"), layer_of(block, "down", "int4_g8")

    class Fails(Named):
        limit = 5

        def add(self, rows, expert):
            if rows.shape[0] > self.limit:
                raise torch.OutOfMemoryError("injected")
            super().add(rows, expert)

    observers = {gate: Named(gate), down: Fails(down)}
    task, told = make_task(block, [gate, down], samples, micro_batch=7)
    tokens = collect(task, observers)
    x = block.norm(torch.cat(samples))
    observers[gate].check(x)
    observers[down].check(nn.functional.silu(block.gate(x)) * block.up(x))
    assert tokens == {gate: 31, down: 31}
    assert [details["micro_batch"] for _, details in told] == [3, 1] and task.micro_batch == 1
    assert all(what == "out of memory" and "injected" in details["reason"] for what, details in told)


def test_out_of_memory_of_experts():
    torch.manual_seed(0)
    block, samples = experts_block(), samples_of((8, 8, 8, 8), 32)
    layer = layer_of(block, "experts", "int4_g8", key="gate_up_proj")

    class Fails(Named):
        failed = False

        def add(self, rows, expert):
            if expert == 2 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("injected")
            super().add(rows, expert)

    observer = Fails(layer)
    tokens = collect(make_task(block, [layer], samples)[0], {layer: observer})
    x = torch.cat(samples)
    _, _, chosen = block.gate(x)
    for expert in range(4):
        observer.check(x[(chosen == expert).any(1)], expert)
    assert observer.failed and tokens == {layer: 32}


def test_out_of_memory_of_one_sample_is_raised_and_leaves_nothing():
    block = experts_block()
    layer = layer_of(block, "experts", "int4_g8", key="gate_up_proj")

    def fail(numbers):
        raise torch.OutOfMemoryError("injected")

    task, told = make_task(block, [layer], samples_of((8, 8), 32), fail=fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory for one sample on cpu: injected; take shorter"):
        collect(task, {layer: Columns(layer)})
    assert [details["micro_batch"] for _, details in told] == [1]
    assert block.experts.config._experts_implementation == "grouped_mm" and not block.experts._forward_pre_hooks


def test_layers_with_the_same_inputs():
    block = Mlp()
    layers = [layer_of(block, name, "int4_g8") for name in ("down", "gate", "up")]
    sets = shared_inputs(make_task(block, layers, samples_of())[0], layers)
    assert [[layer.name for layer in members] for members in sets] == [["down"], ["gate", "up"]]


def test_range_and_histogram(device):
    layer = layer_of(nn.Linear(4, 2).to(device), "", "int4_g8")
    x = torch.tensor([[0.0, 1.0, -3.0, 0.25], [7.5, -0.5, 0.0, 2.0], [torch.nan, 1e9, 0, 0]], device=device)
    one, other = Range(layer, rows=8), Range(layer)
    one.add(x, 0)
    for row in x.flip(0):  # the largest last, and first
        other.add(row[None], 0)
    assert (float(one.low), float(one.high), one.top, one.total) == (-3.0, 7.5, 7.5, 8)
    assert torch.equal(one.counts, other.counts) and one.width == other.width == 8 / Range.BINS
    for value in (1.0, -3.0, 7.5, -0.5):
        center = one.centers[one.counts.flatten() > 0]
        assert (center - value).abs().min() <= one.width / 2
    assert one.counts.sum() == 8
    assert abs(one.quantile(0.75) - 2.0) <= 2 * one.width  # six of eight magnitudes are at most 2
    assert torch.equal(one.rows.sort(0).values, x[:2].sort(0).values)


def test_drawn_rows_are_spread_over_all():
    layer = layer_of(nn.Linear(1, 2), "", "int4_g8")
    seen = Range(layer, rows=64)
    for start in range(0, 1024, 128):
        seen.add(torch.arange(start, start + 128).float()[:, None], 0)
    drawn = seen.rows.flatten()
    assert len(drawn) == 64 and len(drawn.unique()) == 64
    assert 350 < drawn.mean() < 674  # 512 +- 4.4 standard errors of the mean of 64 of 1024
