"""SignRound against its definition: values of QDQ and gradients of its parameters by `learned_oracle` (group by group,
float64 autograd), the block in float64, signs and rates written out here."""

import copy
from types import SimpleNamespace

import learned_oracle
import pytest
import torch
from torch import nn

import tritonq as tq
from tritonq import ops
from tritonq.calibrate.signround import SignRound
from tritonq.calibrate.task import Batch, Layer, Task, squared_error
from tritonq.formats import get_format
from tritonq.nn.select import sharing_key

HIDDEN, TOKENS = 32, 12


class Block(nn.Module):
    """A gated MLP with a residual; `up_proj` and `gate_proj` get the same input."""

    def __init__(self, hidden=HIDDEN, inner=48):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x, scale=1.0):
        h = self.norm(x)
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(h)) * self.up_proj(h)) * scale, "no tensor"


def block(seed=0, dtype=torch.float32, kind=Block, **arguments):
    torch.manual_seed(seed)
    return kind(**arguments).to(dtype).eval()


def inputs(samples=8, seed=1, dtype=torch.float32, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden, hidden, generator=generator) / hidden**0.5 + torch.eye(hidden)
    return [(torch.randn(1, TOKENS, hidden, generator=generator) @ mix).to(dtype) for _ in range(samples)]


def layers(module, fmt, inputs_to=None):
    found = []
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            key = sharing_key(name, get_format(fmt))
            own = None if inputs_to is None else get_format(inputs_to)
            found.append(Layer(name, linear, "weight", get_format(fmt), own, key))
    return found


def task(module, fmt="int4_g16", data=None, masks=None, inputs_to=None, **options):
    """A task over samples that are put together where shapes agree; events are kept in `task.told`."""
    data = inputs(dtype=next(module.parameters()).dtype) if data is None else data
    told = []
    with torch.no_grad():
        targets = [module(x)[0] for x in data]

    def fetch(samples, device, with_targets):
        shapes = {}
        for i in samples:
            shapes.setdefault(tuple(data[i].shape), []).append(i)
        batches = []
        for members in shapes.values():
            own = [None] if masks is None else [torch.cat([masks[i] for i in members]).to(device)]
            batches.append(Batch(
                tuple(members), (torch.cat([data[i] for i in members]).to(device),), {"scale": 1.0},
                [torch.cat([targets[i] for i in members]).to(device)] if with_targets else [], own,
            ))  # fmt: skip
        return batches

    made = Task(
        "block.0", module, layers(module, fmt, inputs_to), len(data), fetch, torch.device("cpu"),
        lambda what, **details: told.append((what, details)), **options,
    )  # fmt: skip
    made.told = told
    return made


def run(method, module, *arguments, **options):
    """The task after `method`; the module is left as it was."""
    given = task(module, *arguments, **options)
    before = copy.deepcopy(module.state_dict())
    method.run(given)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    return given


def codes(given):
    return [{name: part.clone() for name, part in layer.result.items()} for layer in given.layers]


def same(one, other):
    return all(torch.equal(ops._bits(a[n]), ops._bits(b[n])) for a, b in zip(one, other, strict=True) for n in a)


def values(layer, parts=None):
    weight = layer.weight
    return ops.dequantize(parts or layer.result, layer.fmt, tuple(weight.shape), weight.dtype)


def loss_of(given, results=None, samples=None):
    """The mean of squared errors in float64 of the block with these results."""
    copied = copy.deepcopy(given.block)
    for i, layer in enumerate(given.layers):
        parts = layer.result if results is None else results[i]
        copied.get_submodule(layer.name).weight.data.copy_(values(layer, parts))
    copied = copied.double()
    total = count = 0.0
    for batch in given.fetch(range(given.samples) if samples is None else samples, torch.device("cpu"), True):
        with torch.no_grad():
            y = copied(batch.args[0].double())[0]
        difference = y - batch.targets[0].double()
        if batch.masks[0] is not None:
            difference = difference * batch.masks[0]
        total, count = total + float(difference.square().sum()), count + batch.count
    return total / count


# --------------------------------------------------------------------------------------------------------- definition


def definition(given, method, draws):
    """Signed gradient descent: every iteration's values of the weights and its loss, and the last values."""
    module = copy.deepcopy(given.block).double()
    weights = [layer.weight.detach() for layer in given.layers]
    v = [torch.zeros(w.shape, dtype=torch.float32) for w in weights]
    shapes = [layer.fmt.scale_shape(tuple(w.shape)) for layer, w in zip(given.layers, weights, strict=True)]
    low, high = ([torch.ones(shape) for shape in shapes] for _ in range(2))
    divisors = [None] * len(weights)
    if given.layers[0].fmt.tensor_scale:
        own = [float(learned_oracle.oracle.choose_tensor_scale(w.numpy(), given.layers[0].fmt)) for w in weights]
        sets = [layer.shared or layer.name for layer in given.layers]
        divisors = [min(d for d, s in zip(own, sets, strict=True) if s == mine) for mine in sets]

    def qdq(i, dy):
        ratios = {"min_scale": low[i], "max_scale": high[i]} if method.tune_ratios else {}
        return learned_oracle.qdq(
            weights[i], given.layers[i].fmt, dy, v=v[i], tensor_scale=divisors[i], **ratios
        )  # fmt: skip

    history = []
    for step, samples in enumerate([*draws, None]):
        found = [qdq(i, torch.zeros_like(w)).y for i, w in enumerate(weights)]
        if samples is None:
            return history, found
        leaves = []
        for layer, y in zip(given.layers, found, strict=True):
            linear = module.get_submodule(layer.name)
            linear.weight = nn.Parameter(y.clone())
            leaves.append(linear.weight)
        x = torch.cat([given.data[i] for i in samples]).double()
        target = torch.cat([given.targets[i] for i in samples]).double()
        loss = (module(x)[0] - target).square().mean()
        history.append((loss.item(), found))
        gradients = torch.autograd.grad(loss, leaves)
        rate = (1 - step / method.iters) / method.iters
        for i, dy in enumerate(gradients):
            of = qdq(i, (dy * 1e6).to(torch.float32))
            v[i] = (v[i] - rate * of.v.sign().float()).clamp(-0.5, 0.5)
            if method.tune_ratios:
                low[i] = (low[i] - rate * of.min_scale.sign().float()).clamp(0, 1)
                high[i] = (high[i] - rate * of.max_scale.sign().float()).clamp(0, 1)
    return None


@pytest.mark.parametrize("fmt", ["int4_g16", "int4_g16_asym", "mxfp4", "nvfp4", "fp8_e4m3_channel", "q4_k"])
@pytest.mark.parametrize("fused", [True, False])
def test_codes_are_those_of_the_definition(fmt, fused):
    """Four iterations over all samples: best and last values are those of the definition."""
    module, data = block(kind=Block, inner=16), inputs(4)
    given = task(module, fmt, data, search=False)
    method = SignRound(iters=4, batch=4, fused=fused, evaluation=None)
    given.data, given.targets = data, [given.fetch([i], torch.device("cpu"), True)[0].targets[0] for i in range(4)]
    history, last = definition(given, method, [[0, 1, 2, 3]] * 4)
    method.run(given)
    ((_, told),) = given.told
    best = min(range(4), key=lambda i: history[i][0])
    assert told["best_iteration"] == best and told["iterations"] == 4
    assert told["loss_before"] == pytest.approx(history[0][0], rel=1e-4)
    assert told["kept"] in ("best", "last")
    for layer, expected in zip(given.layers, history[best][1] if told["kept"] == "best" else last, strict=True):
        assert torch.equal(values(layer).double(), expected.reshape(layer.weight.shape)), layer.name
    assert told["loss_after"] == pytest.approx(loss_of(given), rel=1e-4)
