"""Scaling of columns: which pairs are found, that blocks compute what they did, and that errors get smaller."""

import pytest
import torch
from calibrate_tasks import Attention, GemmaNorm, Mlp, experts_block, layer_of, make_task
from torch import nn

from tritonq import ops
from tritonq.calibrate import awq, clip
from tritonq.calibrate.awq import AWQ
from tritonq.calibrate.bias import BiasCorrection
from tritonq.calibrate.clip import RATIOS, clipped
from tritonq.calibrate.fold import Producer, find_folds, held_elsewhere
from tritonq.calibrate.imatrix import Imatrix
from tritonq.calibrate.pipeline import rounded
from tritonq.calibrate.smoothquant import SmoothQuant
from tritonq.formats import get_format
from tritonq.nn.schemes import get_scheme


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.RMSNorm(32), experts_block()

    def forward(self, x):
        return x + self.moe(self.norm(x))


class PostNorm(nn.Module):
    """norm(x + b(relu(a(x)))): the norm feeds the output, and relu keeps scales > 0 while gelu would not."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.activation = nn.LayerNorm(16), activation
        self.a.weight.data[[3, 11]] *= 30

    def forward(self, x):
        return self.norm(x + self.b(self.activation(self.a(x))))


class Shared(Mlp):
    """The norm's output is also what the block puts out, so nothing may be scaled there."""

    def forward(self, x):
        return super().forward(x) + self.norm(x)


MLP = ("gate", "up", "down")
REPEATED = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]  # heads of 4, each of keys and values for two of queries
FOLDS = {  # block, layers, {producer: (consumers, source)}
    "mlp": (Mlp, MLP, {"norm": ("gate up", None), "up": ("down", None)}),
    "bias": (lambda: Mlp(bias=True), MLP, {"norm": ("gate up", None), "up": ("down", None)}),
    "gemma": (lambda: Mlp(norm=GemmaNorm(16)), MLP, {"norm": ("gate up", None), "up": ("down", None)}),
    "heads": (lambda: Attention(repeats=1), "qkvo", {"norm": ("q k v", None), "v": ("o", None)}),
    "grouped": (lambda: Attention(repeats=2), "qkvo", {"norm": ("q k v", None), "v": ("o", REPEATED)}),
    "relu": (lambda: PostNorm(nn.functional.relu), "ab", {"a": ("b", None)}),
    "gelu": (lambda: PostNorm(nn.functional.gelu), "ab", {}),
    "shared": (Shared, MLP, {"up": ("down", None)}),
}


def make(name, device="cpu", fmt="int4_g8", input_format=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    build, names, expected = FOLDS[name]
    block = build().to(device, dtype)
    layers = [layer_of(block, name, fmt, input_format) for name in names]
    outliers = torch.ones(16).index_fill_(0, torch.tensor([3, 11]), 30.0)
    samples = [(torch.randn(9, 16) * outliers).to(device, dtype) for _ in range(5)]
    return block, *make_task(block, layers, samples, **options), samples, expected


def state(block):
    return {name: p.detach().clone() for name, p in block.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDS)
def test_pairs_are_found_by_what_happens(device, name, dtype):
    block, task, _, _, expected = make(name, device, dtype=dtype)
    before = state(block)
    found = {}
    for fold in find_folds(task):
        source = None if fold.source is None else fold.source.tolist()
        found[fold.producer.name] = (" ".join(layer.name for layer in fold.layers), source)
    assert found == expected
    assert all(torch.equal(p, before[key]) for key, p in block.named_parameters())


def test_channels_of_weights_and_biases():
    """Row r of a weight and entry r of its bias, of all experts or of a linear layer."""
    factor = torch.tensor([2.0, 4.0])
    for lead, by in (((), factor), ((3,), factor * torch.arange(1, 4)[:, None])):
        weight, bias = nn.Parameter(torch.randn(*lead, 5, 6)), nn.Parameter(torch.randn(*lead, 5))
        expected = torch.ones(*lead, 5)
        expected[..., 2:4] = by
        before = weight.detach().clone(), bias.detach().clone()
        Producer("p", [weight, bias], slice(2, 4), 2).multiply(by)
        assert torch.equal(weight, before[0] * expected.unsqueeze(-1))
        assert torch.equal(bias, before[1] * expected)


def test_pairs_of_experts(device):
    torch.manual_seed(0)
    block = Moe().to(device)
    layers = [layer_of(block, "moe.experts", "int4_g8", key=key) for key in ("gate_up_proj", "down_proj")]
    norm, up = find_folds(make_task(block, layers, [torch.randn(20, 32, device=device)])[0])
    assert norm.producer.name == "norm" and norm.weights.keys() == {"moe.gate.weight", "moe.experts.gate_up_proj"}
    assert up.producer.rows == slice(16, 32) and up.by_expert and up.layers == [layers[1]]  # gate comes first


@pytest.mark.parametrize("name", ["mlp", "bias", "gemma", "grouped", "relu"])
@pytest.mark.parametrize("method", [AWQ(steps=4), SmoothQuant()])
def test_blocks_compute_what_they_did(device, name, method):
    block, task, _, samples, expected = make(name, device, input_format="int8_channel_f32_absmax")
    before, outputs = state(block), [block(x).detach() for x in samples]
    method.run(task)
    assert any(not torch.equal(p, before[key]) for key, p in block.named_parameters())
    assert all(
        method.name in layer.notes for layer in task.layers if any(layer.name in c for c, _ in expected.values())
    )
    for x, y in zip(samples, outputs, strict=True):
        assert torch.allclose(block(x), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def output_error(block, samples, layers):
    """Mean squared error of the block's outputs with weights (and inputs) rounded to nearest."""
    dense = [block(x).detach() for x in samples]
    before = state(block)
    hooks = []
    for layer in layers:
        layer.weight.data = ops.qdq(layer.weight.detach(), layer.fmt)
        if layer.input_format is not None:
            hooks.append(layer.module.register_forward_pre_hook(lambda m, a, f=layer.input_format: ops.qdq(a[0], f)))
    found = sum(float((block(x).detach() - y).square().mean()) for x, y in zip(samples, dense, strict=True))
    for hook in hooks:
        hook.remove()
    for key, p in block.named_parameters():
        p.data = before[key]
    return found


def test_awq_takes_the_best_ratio():
    """The layer's squared output error, written out, of every ratio: the one taken is the smallest."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 6, bias=False))
    block[0].weight.data[[2, 9]] = 40.0
    layer = layer_of(block, "1", "int3_g8_f32")
    samples = [torch.randn(9, 16) for _ in range(3)]
    x, weight = block[0](torch.cat(samples)).detach().double(), block[1].weight.detach().clone()
    errors = {}
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        s = x.abs().mean(0).pow(ratio)
        s = (s / (s.max() * s.min()).sqrt()).float()
        q = ops.qdq(weight * s, layer.fmt).double() / s
        errors[ratio] = float(((weight.double() - q) @ x.T).square().sum())
    AWQ(steps=4).run(make_task(block, [layer], samples)[0])
    best = min(errors, key=errors.get)
    assert layer.notes["awq"] == {"producer": "0", "ratio": best} and best not in (0.0, 1.0)
    assert errors[best] < 0.7 * errors[0.0]
    s = x.abs().mean(0).pow(best)
    assert torch.allclose(block[1].weight.detach() / weight, (s / (s.max() * s.min()).sqrt()).float(), rtol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "grouped"])
def test_awq_lowers_the_error_of_the_block(device, name):
    block, task, _, samples, _ = make(name, device, fmt="int3_g8")
    block.norm.weight.data[[3, 11]] = 20.0
    before = output_error(block, samples, task.layers)
    AWQ(steps=10).run(task)
    assert output_error(block, samples, task.layers) < 0.9 * before


def test_smoothquant_is_its_formula_and_lowers_the_error(device):
    block, task, _, samples, _ = make("mlp", device, fmt="int8_channel_f32", input_format="int8_tensor_f32_absmax")
    block.norm.weight.data[[3, 11]] = 50.0
    x = block.norm(torch.cat(samples)).detach()
    weight = torch.cat([block.gate.weight, block.up.weight]).detach()
    norm, before = block.norm.weight.detach().clone(), output_error(block, samples, task.layers)
    SmoothQuant(0.6).run(task)
    s = x.abs().amax(0).pow(0.6) / weight.abs().amax(0).pow(0.4)
    assert torch.allclose(block.norm.weight.detach(), norm / s, rtol=1e-4)
    assert torch.allclose(block.gate.weight.detach(), weight[:24] * s, rtol=1e-4)
    assert output_error(block, samples, task.layers) < 0.5 * before


def test_methods_on_experts(device):
    torch.manual_seed(0)
    block = Moe().to(device)
    block.norm.weight.data[[3, 11]] = 10.0
    samples = [torch.randn(20, 32, device=device) for _ in range(2)]
    layers = [layer_of(block, "moe.experts", "int4_g8", key=key) for key in ("gate_up_proj", "down_proj")]
    outputs, before = [block(x[None]) for x in samples], block.moe.experts.down_proj.detach().clone()
    AWQ(steps=4).run(make_task(block, layers, samples)[0])
    for x, y in zip(samples, outputs, strict=True):
        assert torch.allclose(block(x[None]), y, rtol=1e-3, atol=1e-4)
    assert len(layers[1].notes["awq"]["ratio"]) == 4
    ratio = block.moe.experts.down_proj.detach() / before  # a scale a column of each expert, not of each row
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)


def test_smoothquant_needs_quantized_inputs():
    with pytest.raises(ValueError, match="leaves inputs alone"):
        SmoothQuant().check(get_scheme("W4A16"), "mse")
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        SmoothQuant(2)


# -------------------------------------------------------------------------------------------------------------- guards


def exact_loss(block, samples, layers, weights):
    """Mean squared error of the block with these weights, by hand."""
    dense = [block(x[None]).detach().double() for x in samples]
    before = [layer.weight.data for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight
    found = [block(x[None]).detach().double() for x in samples]
    for layer, weight in zip(layers, before, strict=True):
        layer.weight.data = weight
    return float(sum((y - t).square().mean() for y, t in zip(found, dense, strict=True)) / len(samples))


def decided(layer):
    weight = layer.weight.detach()
    if layer.result is not None:
        return ops.dequantize(layer.result, layer.fmt, tuple(weight.shape), weight.dtype)
    return ops.qdq(weight, layer.fmt, **searched(layer, layer.importance))


def searched(layer, importance):
    return ops.searched_scales(layer.weight.detach(), layer.fmt, importance=importance)


@pytest.mark.parametrize("fmt", ["int3_g8_f32", "int4_g8_asym", "mxfp4_even"])
@pytest.mark.parametrize("name", ["mlp", "heads", "grouped", "gelu"])
def test_awq_is_never_worse_than_the_search(name, fmt):
    block, task, told, samples, _ = make(name, fmt=fmt, search="mse")
    nearest = exact_loss(block, samples, task.layers, [decided(layer) for layer in task.layers])
    AWQ(steps=5).run(task)
    loss = exact_loss(block, samples, task.layers, [decided(layer) for layer in task.layers])
    ((what, event),) = told
    assert loss < nearest if event["kept"] != "nearest" else loss == pytest.approx(nearest, rel=1e-3)
    assert what == "awq" and event["loss_nearest"] == pytest.approx(nearest, rel=1e-3)
    assert event["loss_scaled"] == pytest.approx(loss, rel=1e-3)


def test_pairs_that_do_not_help_are_undone(monkeypatch):
    """Losses that only rise: everything is as it was, and rounded to nearest."""
    losses = iter(range(1, 100))
    monkeypatch.setattr(awq, "quantized_loss", lambda *_: float(next(losses)))
    block, task, told, _, _ = make("grouped", search="mse")
    before = state(block)
    AWQ(steps=4).run(task)
    assert all(torch.equal(p, before[key]) for key, p in block.named_parameters())
    assert all(layer.result is None and layer.importance is None for layer in task.layers)
    assert all(layer.notes["awq"]["ratio"] == 0 for layer in task.layers)
    ((_, event),) = told
    assert event["kept"] == "nearest" and event["pairs"] == [] and set(event["undone"]) <= {"norm", "v"}
    assert event["undone"]


def test_layers_that_share_a_divisor_share_it_afterwards(monkeypatch):
    """Scaling v for o changes what q, k and v have in common."""
    losses = iter(range(100, 1, -1))
    monkeypatch.setattr(awq, "quantized_loss", lambda *_: float(next(losses)))
    block, task, told, _, _ = make("heads", fmt="nvfp4", search="mse")
    s = torch.linspace(0.2, 4, 16)
    monkeypatch.setattr(AWQ, "_scales", lambda self, fold, seen: (s, torch.tensor(0.5)))
    block.v.weight.data *= 4
    for layer in task.layers[:3]:
        layer.shared = "qkv"
    AWQ(steps=4).run(task)
    assert "v" in told[0][1]["pairs"]
    first, *others = (layer.result["tensor_scale"] for layer in task.layers[:3])
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("method", [Imatrix(), SmoothQuant()])
def test_other_guards(monkeypatch, method, rises):
    losses = iter(range(1, 100) if rises else range(100, 1, -1))
    monkeypatch.setattr(f"tritonq.calibrate.{method.name}.quantized_loss", lambda *_: float(next(losses)))
    block, task, told, _, _ = make("mlp", fmt="int8_channel_f32", input_format="int8_tensor_f32_absmax", search="mse")
    before = state(block)
    method.run(task)
    changed = any(not torch.equal(p, before[key]) for key, p in block.named_parameters())
    changed = changed or any(layer.importance is not None for layer in task.layers)
    assert changed is not rises
    assert [what for what, _ in told] == [method.name]


def test_imatrix_takes_the_better_one():
    """Both losses by hand, for blocks of which some are better with importance and some without."""
    outcomes = set()
    for seed in range(6):
        torch.manual_seed(seed)
        block = Mlp()
        layers = [layer_of(block, name, "int3_g8_f32") for name in MLP]
        samples = [torch.randn(9, 16) for _ in range(3)]
        task, told = make_task(block, layers, samples, search="mse")
        plain = exact_loss(block, samples, layers, [decided(layer) for layer in layers])
        Imatrix().run(task)
        loss = exact_loss(block, samples, layers, [decided(layer) for layer in layers])
        ((_, event),) = told
        outcomes.add(event["kept"])
        assert loss < plain if event["kept"] else loss == pytest.approx(plain)
        assert event["loss_unweighted"] == pytest.approx(plain, rel=1e-3)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "name", ["int3_g8_f32", "int4_g8_asym", "mxfp4_even", "nvfp4", "fp8_e4m3_b8x8", "int4_channel", "int4_tensor"]
)
def test_scales_by_the_error_of_outputs(name, monkeypatch):
    """tr(E H E^T) in fp64 is less than with the scales of the rule; what is taken lies on the rule's candidates."""
    torch.manual_seed(0)
    fmt = get_format(name)
    weight = torch.randn(20, 64)
    weight[3, 8:16], weight[5] = 0, 0  # groups without a scale
    x = torch.randn(200, 64) @ torch.randn(64, 64) + 1
    divisor = ops.tensor_scale(weight, fmt) if fmt.tensor_scale else None

    def error(**parts):
        q = ops.qdq(weight, fmt, **parts).double()
        return float(((weight - q) @ x.T.double()).square().sum())

    parts = clipped(weight, fmt, x.T @ x, divisor)
    monkeypatch.setattr(clip, "TOGETHER", 1)  # wide groups: the errors of all candidates would be 14 weights in fp32
    one_by_one = clipped(weight, fmt, x.T @ x, divisor)
    assert all(torch.equal(ops._bits(part), ops._bits(one_by_one[key])) for key, part in parts.items())
    assert error(**parts) <= (error(tensor_scale=divisor) if divisor is not None else error())
    if fmt.group == (1, 8):
        assert error(**parts) < error(**ops.searched_scales(weight, fmt))


def test_a_tensor_wide_scale_is_the_best_of_all_candidates():
    torch.manual_seed(1)
    fmt, weight = get_format("int3_tensor_f32"), torch.randn(6, 16)
    x = torch.randn(40, 16)
    errors = {}
    for ratio in RATIOS:
        scale = ops.quantize(weight * ratio, fmt)["scale"]
        e = weight - ops.qdq(weight, fmt, scale=scale)
        errors[float(scale)] = float((e.double() @ x.T.double()).square().sum())
    best = min(errors, key=errors.get)
    assert float(clipped(weight, fmt, x.T @ x)["scale"]) == best and errors[best] < errors[max(errors)]


def test_what_is_held_elsewhere_is_not_scaled():
    """A norm that the model has in a second place, and a weight that is tied to another's."""
    model = nn.Module()
    model.layers = nn.ModuleList([Mlp()])
    block = model.layers[0]
    assert held_elsewhere(model, block) == frozenset() == held_elsewhere(block, block)
    layers = [layer_of(block, name, "int4_g8") for name in MLP]
    model.again = block.norm
    model.head = nn.Linear(16, 24, bias=False)
    model.head.weight = block.gate.weight
    held = held_elsewhere(model, block)
    assert held == {id(block.norm.weight), id(block.norm.bias), id(block.gate.weight)}
    task, _ = make_task(block, layers, [torch.randn(9, 16)], elsewhere=held)
    assert [fold.producer.name for fold in find_folds(task)] == ["up"]


@pytest.mark.parametrize("method", [AWQ(steps=2), Imatrix()])
def test_inputs_that_are_not_finite(method):
    _, task, _, samples, _ = make("mlp", search="mse")
    samples[1][0, 3] = torch.nan
    method.run(task)
    for layer in task.layers:
        assert layer.notes["fallback"] == "saw no finite input" and layer.importance is None


def test_awq_tries_at_least_one_ratio():
    with pytest.raises(ValueError, match="steps is a number of ratios >= 1, got 0"):
        AWQ(steps=0)


def test_importance_is_the_mean_square(device):
    block, task, _, samples, _ = make("mlp", device, search="mse")
    Imatrix(guard=False).run(task)
    expected = block.norm(torch.cat(samples)).detach().double().square().mean(0)
    for layer in task.layers[:2]:
        assert layer.result is None and layer.importance.dtype is torch.float32
        assert torch.allclose(layer.importance.double(), expected, rtol=1e-4)


def test_importance_by_expert():
    torch.manual_seed(0)
    block = experts_block()
    layer = layer_of(block, "experts", "int3_g8", key="gate_up_proj")
    samples = [torch.randn(20, 32) * torch.linspace(0.1, 3, 32) for _ in range(2)]
    Imatrix(guard=False).run(make_task(block, [layer], samples, search="mse")[0])
    x, weight = torch.cat(samples), block.experts.gate_up_proj.detach()
    _, _, chosen = block.gate(x)
    found = rounded(layer, None, "mse")
    for expert in (0, 3):
        importance = x[(chosen == expert).any(1)].square().mean(0)
        alone = ops.quantize(weight[expert], layer.fmt, search="mse", importance=importance)
        assert torch.allclose(layer.importance[expert], importance, rtol=1e-4)
        assert (found["qdata"][expert] == alone["qdata"]).float().mean() > 0.99  # but for ties, found in sums
    assert not torch.equal(found["scale"], ops.quantize(weight, layer.fmt, search="mse")["scale"])


def test_importance_needs_a_search():
    with pytest.raises(ValueError, match="search='mse'"):
        Imatrix().check(get_scheme("W4A16"), False)


@pytest.mark.parametrize("input_format", [None, "int4_channel_f32_absmax"])
def test_bias_takes_the_mean_error(device, input_format):
    """Afterwards the mean of the quantized layer's outputs is that of the dense one."""
    block, task, _, samples, _ = make("bias", device, fmt="int2_g8", input_format=input_format)
    block.norm.bias.data += 1  # inputs with a mean, without which there is nothing to correct
    x = block.norm(torch.cat(samples)).detach()
    dense = block.gate(x).detach().double().mean(0)
    rounded = x if input_format is None else ops.qdq(x, task.layers[0].input_format)
    before = block.gate.bias.detach().clone()
    BiasCorrection().run(task)
    for layer in task.layers:
        assert torch.equal(layer.result["qdata"], ops.quantize(layer.weight.detach(), layer.fmt)["qdata"])
    quantized = rounded @ ops.qdq(block.gate.weight.detach(), task.layers[0].fmt).T
    assert torch.allclose((quantized + block.gate.bias).double().mean(0), dense, atol=1e-4)
    assert not torch.allclose((quantized + before).double().mean(0), dense, atol=1e-2)


def test_bias_without_one_is_left_alone():
    _, task, _, _, _ = make("mlp")
    BiasCorrection().run(task)
    assert all(layer.result is None and not layer.notes for layer in task.layers)
