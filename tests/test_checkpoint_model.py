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
