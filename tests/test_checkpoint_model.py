"""A model quantized in memory saves to the bytes that quantizing its checkpoint gives."""

import json

import models
import pytest
import torch

from tritonq import ops
from tritonq.io.checkpoint import quantize_checkpoint
from tritonq.io.model import save_pretrained
from tritonq.nn.schemes import Scheme, get_scheme
from tritonq.nn.select import Selection, sharing_key

pytest.importorskip("transformers")


class Quantized(torch.Tensor):
    """What save_pretrained needs of a quantized parameter: its shape and dtype, and the parts as attributes."""

    @staticmethod
    def __new__(cls, x, fmt, **given):
        self = torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)
        parts = ops.quantize(x, fmt, **given)
        self.format = fmt
        for name in ("qdata", "scale", "zero_point", "tensor_scale"):
            setattr(self, name, parts.get(name))
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def quantize_in_memory(model, scheme, ignore=()):
    """Linear layers and fused experts as `Quantized`; NVFP4's divisor shared by layers that runtimes fuse."""
    scheme, selection = get_scheme(scheme), Selection(ignore)
    found = [
        (name, module, parameter)
        for name, module in model.named_modules()
        for parameter in ("weight", "gate_up_proj", "down_proj")
        if (isinstance(module, torch.nn.Linear) and parameter == "weight")
        or (name.endswith("experts") and isinstance(getattr(module, parameter, None), torch.nn.Parameter))
    ]
    found = [(name, module, parameter) for name, module, parameter in found if not selection.ignores(name)]
    shared = {}
    for name, module, parameter in found:
        x = getattr(module, parameter).detach()
        fmt = scheme.weight_format(x.dtype)
        if fmt.tensor_scale and x.ndim == 2 and (key := sharing_key(name, fmt)):
            shared[key] = torch.minimum(shared.get(key, torch.tensor([torch.inf])), ops.tensor_scale(x, fmt))
    for name, module, parameter in found:
        x = getattr(module, parameter).detach()
        fmt = scheme.weight_format(x.dtype)
        key = sharing_key(name, fmt) if x.ndim == 2 else None
        given = {"tensor_scale": shared[key]} if key in shared else {}
        module._parameters[parameter] = Quantized(x, fmt, **given, search=scheme.search(None))
    model.tritonq_scheme = scheme
    return model


def same(one, other):
    first, second = models.tensors(one), models.tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype is second[name].dtype and first[name].shape == second[name].shape, name
        assert torch.equal(first[name].reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)), name
    assert {p.name: p.read_bytes() for p in one.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in other.glob("*.safetensors")
    }
    quantization = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (one, other)]
    assert quantization[0] == quantization[1]


@pytest.mark.parametrize("scheme", models.EXPORTED)
@pytest.mark.parametrize("kind", ["llama_tied", "qwen3moe"])
def test_memory_and_file_give_the_same_bytes(kind, scheme, tmp_path):
    source = models.save(kind, tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "file", scheme, max_shard_size="300KB", progress=False)
    model = quantize_in_memory(models.build(kind), scheme)
    assert save_pretrained(model, tmp_path / "memory", max_shard_size="300KB") == tmp_path / "memory"
    same(tmp_path / "file", tmp_path / "memory")


def test_a_loaded_mixtral_keeps_its_names(tmp_path):
    import transformers

    source = models.save("mixtral", tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "file", "FP8", ignore="o_proj", progress=False)
    model = transformers.MixtralForCausalLM.from_pretrained(source)
    save_pretrained(quantize_in_memory(model, "FP8", "o_proj"), tmp_path / "memory")
    same(tmp_path / "file", tmp_path / "memory")
    wanted = models.expected(models.tensors(source), "FP8")
    wanted.update({name: tensor for name, tensor in models.tensors(source).items() if "o_proj" in name})
    loaded = models.load(tmp_path / "memory", dequantize=False)
    assert models.worst(loaded.state_dict(), models.fuse(wanted)) == 0.0
    assert "path/to/this/folder" in (tmp_path / "memory/README.md").read_text()


def test_an_encoder(tmp_path):
    source = models.save("bert", tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "file", "W8A16", progress=False)
    save_pretrained(quantize_in_memory(models.build("bert"), "W8A16"), tmp_path / "memory")
    same(tmp_path / "file", tmp_path / "memory")


def test_errors(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="is not quantized"):
        save_pretrained(models.build("llama"), out)
    model = quantize_in_memory(models.build("llama"), "W4A16")
    with pytest.raises(ValueError, match="unknown export format 'gguf'"):
        save_pretrained(model, out, format="gguf")
    out.mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        save_pretrained(model, out)
    save_pretrained(model, out, force=True)
    odd = quantize_in_memory(models.build("llama", intermediate_size=200), "MXFP4")
    with pytest.raises(ValueError, match=r"down_proj.*\[256, 200\].*groups of 32"):
        save_pretrained(odd, tmp_path / "odd")
    blocks = quantize_in_memory(models.build("qwen3moe", moe_intermediate_size=192), Scheme("B", "fp8_e4m3_b128x128"))
    with pytest.raises(ValueError, match=r"begins at row 192 .* block of 128"):
        save_pretrained(blocks, tmp_path / "blocks")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("scheme", models.EXPORTED)
@pytest.mark.parametrize("kind", ["llama_tied", "qwen3moe"])
def test_quantize_in_place_then_save(kind, scheme, tmp_path):
    quantize = pytest.importorskip("tritonq.nn.quantize")
    source = models.save(kind, tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "file", scheme, progress=False)
    model = quantize.quantize_(models.build(kind), scheme, progress=False)
    save_pretrained(model, tmp_path / "memory")
    same(tmp_path / "file", tmp_path / "memory")


# ------------------------------------------------------------------------------------ static scales of inputs


def with_static_inputs(scheme, values, ignored=(), **shape):
    """A quantized model whose layers have made-up static parts of inputs, and these by the name of the layer."""
    import tritonq as tq
    from tritonq.nn.linear import STATIC, QLinear

    model = tq.quantize_(models.build("llama", **shape), scheme, progress=False)
    given, generator = {}, torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and name.rpartition(".")[2] not in ignored:
            given[name] = {part: make(torch.rand(1, generator=generator)) for part, make in values.items()}
            for part, tensor in given[name].items():
                module.register_buffer(STATIC[part], tensor)
    return model, given


def as_read(folder, name):
    """A layer as transformers and compressed-tensors set it up, and what they make of an input of it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    layer = models.load(folder, dequantize=False).get_submodule(name)
    arguments = layer.quantization_scheme.input_activations
    return layer, lambda x: forward_quantize(layer.float(), x, "input", arguments), arguments


NAME = "model.layers.1.mlp.up_proj"


def test_static_scales_of_fp8_inputs_arrive(tmp_path):
    model, given = with_static_inputs("FP8", {"scale": lambda u: 0.01 + u})
    save_pretrained(model, tmp_path / "out")
    found = models.tensors(tmp_path / "out")
    assert {n for n in found if n.endswith("input_scale")} == {f"{n}.input_scale" for n in given}
    layer, quantize, arguments = as_read(tmp_path / "out", NAME)
    assert arguments.dynamic is False and arguments.strategy == "tensor"
    scale = given[NAME]["scale"].bfloat16()  # what readers cast it to is what was written
    assert torch.equal(layer.input_scale, scale) and torch.equal(found[f"{NAME}.input_scale"], scale)
    x = torch.randn(5, 256) * 100  # beyond 448 times the scale in places: clipped
    wanted = (x / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.float()
    assert torch.allclose(quantize(x), wanted, rtol=1e-6) and float((quantize(x) - x).abs().max()) > 0
    assert "under static scales" in (tmp_path / "out/README.md").read_text()


def test_static_divisors_of_nvfp4_inputs_arrive(tmp_path):
    model, given = with_static_inputs("NVFP4", {"tensor_scale": lambda u: 1 + 100 * u}, ignored=("q_proj",))
    save_pretrained(model, tmp_path / "out")
    found = models.tensors(tmp_path / "out")
    layer, _, arguments = as_read(tmp_path / "out", NAME)
    assert arguments.dynamic == "local" and arguments.strategy == "tensor_group"
    assert torch.equal(layer.input_global_scale, given[NAME]["tensor_scale"])
    assert float(found["model.layers.0.self_attn.q_proj.input_global_scale"]) == 1.0  # covers every input


def test_static_scales_of_some_layers(tmp_path):
    """Layers without them keep scales of each call; both kinds are described."""
    model, given = with_static_inputs("FP8", {"scale": lambda u: 0.01 + u}, ignored=("down_proj",))
    save_pretrained(model, tmp_path / "out")
    found = models.tensors(tmp_path / "out")
    assert {n for n in found if n.endswith("input_scale")} == {f"{n}.input_scale" for n in given}
    layer, _, arguments = as_read(tmp_path / "out", NAME)
    assert arguments.dynamic is False and torch.equal(layer.input_scale, given[NAME]["scale"].bfloat16())
    layer, _, arguments = as_read(tmp_path / "out", "model.layers.1.mlp.down_proj")
    assert arguments.dynamic is True and not hasattr(layer, "input_scale")


def test_static_zero_points_of_inputs_arrive(tmp_path):
    scheme = Scheme("W8A8_ASYM", "int8_channel", "int8_tensor_asym")
    values = {"scale": lambda u: 0.01 + u, "zero_point": lambda u: (u * 255).to(torch.uint8)}
    model, given = with_static_inputs(scheme, values)
    save_pretrained(model, tmp_path / "out")
    layer, quantize, arguments = as_read(tmp_path / "out", NAME)
    assert arguments.dynamic is False and arguments.symmetric is False
    scale, zero = given[NAME]["scale"].bfloat16().float(), given[NAME]["zero_point"].float()
    x = torch.randn(5, 256) * 30
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    assert torch.allclose(quantize(x), (codes - zero) * scale, rtol=1e-6, atol=1e-6)
    assert int(layer.input_zero_point) == int(given[NAME]["zero_point"]) - 128


def test_static_scales_without_a_layout_are_refused(tmp_path):
    model, _ = with_static_inputs("NVFP4", {"scale": lambda u: u}, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"q_proj\.weight has static scales of inputs in nvfp4"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
