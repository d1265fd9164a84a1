"""Static scales of inputs: their values against definitions written out, and that layers use them."""

import pytest
import torch
from calibrate_tasks import Mlp, layer_of, make_task
from torch import nn

from tritonq import ops
from tritonq.calibrate.calibration import Calibration
from tritonq.calibrate.gptq import GPTQ
from tritonq.calibrate.inputs import StaticInputs, use_static
from tritonq.calibrate.methods import resolve
from tritonq.nn.linear import QLinear
from tritonq.nn.schemes import get_scheme
from tritonq.tensor import quantize


def layers_of(device, input_format, samples):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 8)).to(device)
    layer = layer_of(block, "0", "int4_g8", input_format)
    return block, layer, make_task(block, [layer], [s.to(device) for s in samples])[0]


def heavy(rows=10, count=6):
    """Inputs of which a few are far out."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(rows, 32, generator=generator) for _ in range(count)]
    samples[2][3, 5] = -60.0
    return samples


def test_minmax(device):
    _, layer, task = layers_of(device, "fp8_e4m3_tensor", heavy())
    StaticInputs("minmax").run(task)
    storage = layer.input_format.storage((4, 32))
    assert {n: (tuple(p.shape), p.dtype) for n, p in layer.inputs.items()} == {"scale": storage["scale"]}
    assert float(layer.inputs["scale"]) == pytest.approx(60.0 / 448, rel=1e-6)
    _, layer, task = layers_of(device, "nvfp4", heavy())
    StaticInputs().run(task)
    assert layer.inputs.keys() == {"tensor_scale"}
    assert float(layer.inputs["tensor_scale"]) == pytest.approx(448 * 6 / 60.0, rel=1e-6)
    _, layer, task = layers_of(device, "int8_tensor_asym_f32", heavy())
    StaticInputs().run(task)
    high = float(torch.cat(heavy()).amax())
    scale = (high + 60) / 255
    assert float(layer.inputs["scale"]) == pytest.approx(scale, rel=1e-6)
    assert int(layer.inputs["zero_point"]) == round(60 / scale)


def test_percentile(device):
    _, layer, task = layers_of(device, "fp8_e4m3_tensor", heavy())
    StaticInputs("percentile", percentile=99.0).run(task)
    expected = torch.cat(heavy()).abs().flatten().quantile(0.99)
    assert float(layer.inputs["scale"]) * 448 == pytest.approx(float(expected), abs=2 * 64 / 4096)
    assert layer.notes["inputs"]["largest"] == 60.0


@pytest.mark.parametrize("input_format", ["int4_tensor_f32_absmax", "int4_tensor_asym_f32", "nvfp4"])
def test_smallest_error(input_format):
    samples = heavy(rows=40)
    _, layer, task = layers_of("cpu", input_format, samples)
    StaticInputs("mse").run(task)
    x = torch.cat(samples)

    def error(parts):
        return float((ops.qdq(x, layer.input_format, **parts).double() - x.double()).square().sum())

    def clipped(top):
        own = torch.stack([x.amin().clamp(min=-top), x.amax().clamp(max=top)])
        if layer.input_format.tensor_scale:
            return {"tensor_scale": (448 * 6 / own.abs().amax()).reshape(1)}
        if not layer.input_format.zero_point:
            return {"scale": (own.abs().amax() / 7).reshape(1)}
        scale = (own[1] - own[0]) / 15
        return {"scale": scale.reshape(1), "zero_point": (-own[0] / scale).round().to(torch.uint8).reshape(1)}

    found = error(layer.inputs)
    best = min(error(clipped(top)) for top in torch.linspace(3, 60, 40))
    assert found <= 1.05 * best
    if "int" in input_format:  # a range of 60 leaves most of the others one code
        assert found < 0.8 * error(clipped(torch.tensor(60.0)))


@pytest.mark.parametrize("input_format", ["fp8_e4m3_tensor", "nvfp4"])
def test_quantized_layers_use_them(device, input_format):
    block, layer, task = layers_of(device, input_format, heavy())
    StaticInputs().run(task)
    weight = nn.Parameter(quantize(block[0].weight.detach(), layer.fmt), requires_grad=False)
    quantized = QLinear.adopt(block[0], weight, layer.input_format)
    x = heavy()[0].to(device)  # not the one with the largest, whose own scale would be the same
    dynamic = quantized(x)
    use_static(quantized, layer.inputs)
    expected = ops.qdq(x, layer.input_format, **layer.inputs) @ weight.dequantize().T + block[0].bias
    assert torch.allclose(quantized(x), expected, atol=1e-4)
    assert not torch.allclose(dynamic, expected, atol=1e-4)
    name = "input_scale" if input_format.startswith("fp8") else "input_global_scale"
    assert torch.equal(quantized.state_dict()[name], next(iter(layer.inputs.values())))


def test_gptq_sees_them():
    """With inputs saturating at a hundredth of their range, H is that of the saturated ones."""
    block, layer, task = layers_of("cpu", "fp8_e4m3_tensor", heavy())
    StaticInputs().run(task)
    layer.inputs["scale"] /= 1e6
    other = layer_of(block, "0", "int4_g8", "fp8_e4m3_tensor")
    task.layers.append(other)
    for one in task.layers:
        GPTQ().run(make_task(block, [one], heavy())[0])
    assert layer.notes["gptq"] < 1e-6 * other.notes["gptq"]


def test_layers_with_one_input_get_the_same():
    block = Mlp()
    layers = [layer_of(block, name, "int4_g8", "fp8_e4m3_tensor") for name in ("gate", "up", "down")]
    StaticInputs().run(make_task(block, layers, [torch.randn(5, 16)])[0])
    assert torch.equal(layers[0].inputs["scale"], layers[1].inputs["scale"])
    assert not torch.equal(layers[0].inputs["scale"], layers[2].inputs["scale"])


def test_formats_without_anything_static_are_refused():
    for scheme, what in (("FP8_DYNAMIC", "scales of their own"), ("MXFP8", "mxfp8"), ("W4A16", "alone")):
        with pytest.raises(ValueError, match=what):
            StaticInputs().check(get_scheme(scheme), "mse")
    for scheme in ("FP8", "NVFP4"):
        StaticInputs().check(get_scheme(scheme), "mse")
    with pytest.raises(ValueError, match="minmax, percentile, mse, got 'max'"):
        StaticInputs("max")
    with pytest.raises(ValueError, match="up to 100, got 101"):
        StaticInputs("percentile", 101)


def test_static_scales_come_after_what_scales_inputs_and_before_what_rounds():
    def names(method):
        return [one.name for one in resolve(Calibration(data=[], method=method, inputs="minmax"))]

    assert names(("smoothquant", "gptq", "bias")) == ["smoothquant", "inputs", "gptq", "bias"]
    assert names(("bias", "gptq")) == ["inputs", "gptq", "bias"]
    assert names("rtn") == ["inputs", "rtn"]
