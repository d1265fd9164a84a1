"""GPTQ against its definition in float64, and what has to hold for every format."""

import pytest
import torch
from calibrate_tasks import Mlp, experts_block, layer_of, make_task
from torch import nn

from tritonq import ops
from tritonq.calibrate import gptq
from tritonq.calibrate.gptq import GPTQ, inverse_factor

# One of each kind: groups (ragged, too), channel, tensor, asymmetric, MX, two levels, a table, super-groups, a block.
FORMATS = [
    "int4_g8", "int3_g7", "int4_channel", "fp8_e4m3_tensor", "int2_g8_asym", "mxfp4", "nvfp4", "nf4_g8", "q4_k",
    "q3_k", "e3m2_b4x8",
]  # fmt: skip
ORDERS = [{}, {"act_order": False}, {"static_groups": False}]


def one_layer(device, fmt="int4_g8", rows=6, columns=19, seed=0):
    """A layer alone, correlated inputs, and their H as float64."""
    generator = torch.Generator().manual_seed(seed)
    block = nn.Sequential(nn.Linear(columns, rows, bias=False))
    weight = torch.randn(rows, columns, generator=generator)
    block[0].weight.data.copy_(weight)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator).exp2() ** 3
    samples = [torch.randn(12, columns, generator=generator) @ mix for _ in range(5)]
    x = torch.cat(samples).double()
    block = block.to(device)
    return block, layer_of(block, "0", fmt), [s.to(device) for s in samples], x.T @ x / len(x)


def loss(weight, values, hessian):
    e = weight.detach().double().cpu() - values.double().cpu()
    return float(((e @ hessian) * e).sum())


def values(layer):
    return ops.dequantize(layer.result, layer.fmt, tuple(layer.weight.shape), torch.float32)


def sequential(weight, hessian, scale, low, high, order, damping=0.01):
    """Columns in order; after each, those not rounded yet take their best values for the errors so far: the minimum of
    tr(E H E^T) over them, from the normal equations, not from a factor of the inverse. float64."""
    w, h = weight.double().clone(), hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    done = torch.zeros_like(w)
    for i, column in enumerate(order):
        done[:, column] = (w[:, column] / scale[:, column]).round().clamp(low, high) * scale[:, column]
        rest, fixed = order[i + 1 :], order[: i + 1]
        if len(rest):
            e = weight.double()[:, fixed] - done[:, fixed]
            w[:, rest] = weight.double()[:, rest] + torch.linalg.solve(h[rest][:, rest], h[rest][:, fixed] @ e.T).T
    return done


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("chunk", [4, 128])
def test_equals_the_best_sequence(device, act_order, chunk):
    block, layer, samples, hessian = one_layer(device, "int4_g8_f32")
    task, _ = make_task(block, [layer], samples)
    GPTQ(act_order=act_order, static_groups=True, chunk=chunk).run(task)
    scale = layer.result["scale"].cpu().double().repeat_interleave(8, 1)[:, :19]
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(19)
    expected = sequential(layer.weight.detach().cpu(), hessian, scale, -8, 7, order)
    assert torch.allclose(values(layer).cpu().double(), expected, atol=1e-5)
    rule = ops.quantize(layer.weight.detach(), layer.fmt)
    assert torch.equal(layer.result["scale"], rule["scale"])
    assert layer.notes["tokens"] == 60


def test_scales_of_groups_as_they_are_reached(device):
    """With static_groups=False the scale of a group is that of its columns after all errors of groups before."""
    block, layer, samples, hessian = one_layer(device, "int4_g8_f32_absmax")
    task, _ = make_task(block, [layer], samples)
    GPTQ(act_order=False, static_groups=False).run(task)
    w = layer.weight.detach().cpu().double()
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(19).double()
    found, done = values(layer).cpu().double(), torch.arange(8)
    rest = torch.arange(8, 19)
    moved = w[:, rest] + torch.linalg.solve(h[rest][:, rest], h[rest][:, done] @ (w - found)[:, done].T).T
    expected = moved[:, :8].abs().amax(1) / 7
    assert torch.allclose(layer.result["scale"][:, 1].cpu().double(), expected, rtol=1e-4)


@pytest.mark.parametrize("search", [False, "mse"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_beats_rounding_to_nearest(device, fmt, search):
    for options in ORDERS if not search else ORDERS[:1]:
        block, layer, samples, hessian = one_layer(device, fmt, rows=8, columns=24)
        task, _ = make_task(block, [layer], samples, search=search)
        GPTQ(**options).run(task)
        weight = layer.weight.detach()
        storage = layer.fmt.storage(tuple(weight.shape))
        assert {n: (tuple(p.shape), p.dtype) for n, p in layer.result.items()} == storage
        nearest = ops.quantize(weight, layer.fmt, search=search if not layer.fmt.super_group else None)
        plain = ops.dequantize(nearest, layer.fmt, tuple(weight.shape), torch.float32)
        own = loss(weight, values(layer), hessian)
        assert own < 0.8 * loss(weight, plain, hessian), options
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24).double()
        assert layer.notes["gptq"] == pytest.approx(loss(weight, values(layer), damped) / 8, rel=1e-3), options


@pytest.mark.parametrize("fmt", FORMATS)
def test_uncorrelated_inputs_leave_rounding_to_nearest(device, fmt):
    block, layer, _, _ = one_layer(device, fmt, columns=24)
    task, _ = make_task(block, [layer], [torch.eye(24, device=device)])
    for options in ORDERS:
        GPTQ(**options).run(task)
        nearest = ops.quantize(layer.weight.detach(), layer.fmt)
        for name, part in nearest.items():
            assert torch.equal(layer.result[name].view(torch.uint8), part.view(torch.uint8)), (name, options)


def test_layers_with_one_input_are_as_alone(device):
    torch.manual_seed(0)
    block = Mlp().to(device)
    samples = [torch.randn(9, 16, device=device) @ torch.randn(16, 16, device=device) for _ in range(4)]
    together = [layer_of(block, name, "int4_g8") for name in ("gate", "up", "down")]
    GPTQ().run(make_task(block, together, samples)[0])
    for layer in together:
        alone = layer_of(block, layer.name, "int4_g8")
        GPTQ().run(make_task(block, [alone], samples)[0])
        assert torch.equal(alone.result["qdata"], layer.result["qdata"]) or device == "cuda"
        assert torch.allclose(values(alone), values(layer), atol=0.3)


def test_shared_divisor():
    block = Mlp()
    block.up.weight.data.mul_(4)
    layers = [layer_of(block, name, "nvfp4", shared="gate+up") for name in ("gate", "up")]
    GPTQ().run(make_task(block, layers, [torch.randn(40, 16)])[0])
    both = torch.cat([block.gate.weight, block.up.weight])
    # Of NVFP4: the largest e4m3 times the largest e2m1; a number over a tensor would multiply by a reciprocal.
    expected = torch.tensor(448.0 * 6) / both.detach().abs().amax()
    for layer in layers:
        assert torch.equal(layer.result["tensor_scale"], expected.reshape(1))


def test_same_bits_every_time():
    found = []
    for _ in range(2):
        block, layer, samples, _ = one_layer("cpu")
        GPTQ().run(make_task(block, [layer], samples, search="mse")[0])
        found.append(layer.result)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_dead_columns_are_rounded_to_nearest(device):
    block, layer, samples, _ = one_layer(device, "int4_g8_f32")
    for sample in samples:
        sample[:, 3] = 0
    GPTQ().run(make_task(block, [layer], samples)[0])
    nearest = ops.qdq(layer.weight.detach(), layer.fmt)
    assert torch.equal(values(layer)[:, 3], nearest[:, 3])
    assert not torch.equal(values(layer), nearest)


def test_damping_grows_until_the_matrix_is_positive():
    indefinite = torch.diag(torch.tensor([2.0, 2.0, 2.0]))
    indefinite[0, 1] = indefinite[1, 0] = 2.1  # eigenvalues 4.1, 2, -0.1: 0.01 * 2 is not enough, 0.1 * 2 is
    upper, damping = inverse_factor(indefinite.clone(), 0.01)
    assert damping == pytest.approx(0.1)
    inverse = torch.linalg.inv(indefinite.double() + 0.2 * torch.eye(3).double())
    assert torch.allclose(upper.double().T @ upper.double(), inverse, rtol=1e-4)
    assert torch.equal(upper, upper.triu())
    hopeless, damping = inverse_factor(torch.full((2, 2), -1.0), 0.01)
    assert damping == float("inf") and torch.equal(hopeless, torch.eye(2))


def test_infinite_inputs_are_told_and_left_to_rounding():
    block, layer, samples, _ = one_layer("cpu")
    samples[0][0, 0] = torch.inf
    GPTQ().run(make_task(block, [layer], samples)[0])
    assert layer.result is None and "finite" in layer.notes["fallback"]


def test_inputs_are_seen_as_the_scheme_rounds_them():
    """Two bits of inputs: H is that of the rounded ones."""
    block, _, samples, _ = one_layer("cpu")
    layer = layer_of(block, "0", "int4_g8_f32", "int2_channel_f32_absmax")
    GPTQ(act_order=False, static_groups=True).run(make_task(block, [layer], samples)[0])
    x = torch.cat(samples).double()
    scale = x.abs().amax(1, keepdim=True)  # int2 by absmax: -2 .. 1, scale = amax / 1
    x = (x / scale).round().clamp(-2, 1) * scale
    scale = layer.result["scale"].double().repeat_interleave(8, 1)[:, :19]
    expected = sequential(layer.weight.detach(), x.T @ x / len(x), scale, -8, 7, torch.arange(19))
    assert torch.allclose(values(layer).double(), expected, atol=1e-5)


def test_experts_each_with_their_own_inputs(device):
    torch.manual_seed(1)
    block = experts_block().to(device)
    samples = [torch.randn(20, 32, device=device) for _ in range(6)]

    def run(**options):
        layers = [layer_of(block, "experts", "int4_g8", key=key) for key in ("gate_up_proj", "down_proj")]
        GPTQ(**options).run(make_task(block, layers, samples)[0])
        return layers

    layers = run()
    x = torch.cat(samples)
    _, _, chosen = block.gate(x)
    for expert in range(4):
        rows = x[(chosen == expert).any(1)].cpu().double()
        assert layers[0].notes["tokens"][expert] == len(rows)
        lone = nn.Sequential(nn.Linear(32, 32, bias=False)).to(device)
        lone[0].weight.data.copy_(block.experts.gate_up_proj[expert])
        alone = layer_of(lone, "0", "int4_g8")
        GPTQ().run(make_task(lone, [alone], [rows.float().to(device)])[0])
        if device == "cpu":
            assert torch.equal(layers[0].result["qdata"][expert], alone.result["qdata"])
        else:
            assert torch.allclose(values(layers[0])[expert], values(alone), atol=0.2)
    chunks = run(budget=4 * 32 * 32)  # an expert at a time
    for one, other in zip(layers, chunks, strict=True):
        if device == "cpu":
            assert torch.equal(one.result["qdata"], other.result["qdata"])
        assert torch.equal(one.result["scale"], other.result["scale"])
    assert block.experts.config._experts_implementation == "grouped_mm"


def test_experts_that_saw_nothing_are_rounded_to_nearest():
    torch.manual_seed(1)
    block = experts_block()
    block.gate.weight.data[2] = block.gate.weight.data[3] - 100 * torch.ones(32)  # inputs are positive: never chosen
    samples = [torch.rand(20, 32) for _ in range(3)]
    layer = layer_of(block, "experts", "int4_g8", key="gate_up_proj")
    GPTQ().run(make_task(block, [layer], samples)[0])
    tokens = layer.notes["tokens"]
    assert tokens[2] == 0 and sum(tokens.values()) == 2 * 60
    assert layer.notes["fallback"] == [e for e in range(4) if tokens[e] == 0]
    nearest = ops.quantize(block.experts.gate_up_proj.detach(), layer.fmt)
    for expert in range(4):
        same = torch.equal(layer.result["qdata"][expert], nearest["qdata"][expert])
        assert same == (tokens[expert] == 0)


def failing(monkeypatch, fails):
    """Memory runs out in `propagate` for the shapes of weights that `fails` says."""
    propagate = gptq.propagate

    def limited(weight, *arguments, **options):
        if fails(*weight.shape):
            raise torch.OutOfMemoryError("injected")
        return propagate(weight, *arguments, **options)

    monkeypatch.setattr(gptq, "propagate", limited)


@pytest.mark.parametrize("act_order", [False, True])
def test_out_of_memory_solves_fewer_at_a_time(monkeypatch, act_order):
    torch.manual_seed(0)
    block, samples = Mlp(), [torch.randn(9, 16) for _ in range(4)]

    def run(fmt="int4_g8"):
        layers = [layer_of(block, name, fmt) for name in ("gate", "up", "down")]
        task, told = make_task(block, layers, samples)
        GPTQ(act_order=act_order).run(task)
        return layers, told

    expected, _ = run()
    failing(monkeypatch, lambda batch, rows, columns: rows > 24)
    found, told = run()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.result["qdata"], other.result["qdata"])
    assert [(what, details["where"], details["layer"]) for what, details in told] == [("out of memory", "gptq", "gate")]
    assert told[0][1]["reaction"] == "1 experts and 1 layers at a time"
    failing(monkeypatch, lambda batch, rows, columns: True)
    with pytest.raises(torch.OutOfMemoryError, match=r"gate: GPTQ keeps .* injected; pass a smaller budget"):
        run()


def test_out_of_memory_of_experts(monkeypatch):
    torch.manual_seed(0)
    block, samples = experts_block(), [torch.randn(20, 32) for _ in range(3)]

    def run():
        layer = layer_of(block, "experts", "int4_g8", key="down_proj")
        task, told = make_task(block, [layer], samples)
        GPTQ().run(task)
        return layer, told

    expected, _ = run()
    failing(monkeypatch, lambda batch, rows, columns: batch > 1)
    found, told = run()
    assert torch.equal(found.result["qdata"], expected.result["qdata"])
    assert found.notes["gptq"] == pytest.approx(expected.notes["gptq"])
    assert [details["reaction"][:9] for _, details in told] == ["2 experts", "1 experts", "1 experts"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_layers_on_a_gpu(dtype):
    """Hessians by tensor cores, several chunks of columns, and codes by the kernels."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(1024, 512, bias=False)).to("cuda", dtype)
    mix = torch.randn(1024, 1024, device="cuda") / 32
    samples = [(torch.randn(512, 1024, device="cuda") @ mix).to(dtype) for _ in range(8)]
    x = torch.cat(samples).double()
    hessian = (x.T @ x / len(x)).cpu()
    for fmt in ("int4_g128", "mxfp4", "nvfp4", "int3_g128_asym"):
        layer = layer_of(block, "0", fmt)
        GPTQ().run(make_task(block, [layer], samples, search="mse")[0])
        weight = layer.weight.detach()
        nearest = ops.quantize(weight, layer.fmt, search="mse")
        plain = ops.dequantize(nearest, layer.fmt, tuple(weight.shape), torch.float32)
        assert loss(weight.float(), values(layer), hessian) < 0.9 * loss(weight.float(), plain, hessian), fmt
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(1024).double()
        assert layer.notes["gptq"] == pytest.approx(loss(weight.float(), values(layer), damped) / 512, rel=0.02), fmt


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="damping is a number > 0, got 0"):
        GPTQ(damping=0)
